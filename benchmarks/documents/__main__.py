"""The document service on a fake OCR engine: pages a second, memory, /health, grounding, kills. Prints Markdown.

Exits with 1 when a bar is missed. Run it with nothing else on the machine: the load before each measure is shown.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import httpx

from benchmarks.documents import measures, report
from benchmarks.documents.measures import FULL, QUICK
from benchmarks.router.programs import BenchmarkError

MEASURES = {
    "throughput": measures.throughput,
    "documents": measures.long_documents,
    "grounding": measures.grounding,
    "kills": measures.kills,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.documents",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: .venv/bin/python -m benchmarks.documents --only throughput,kills --json documents.json",
    )
    parser.add_argument("--only", type=lambda said: said.split(","), default=list(MEASURES), metavar=",".join(MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    parser.add_argument("--quick", action="store_true", help="small and short: whether it works, not how fast it is")
    options = parser.parse_args()
    for name in options.only:
        if name not in MEASURES:
            parser.error(f'--only: no "{name}"; there are {", ".join(MEASURES)}')
    return options


def main() -> None:
    options = arguments()
    measured = {}
    for name in options.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-") as folder:
            try:
                measured[name] = MEASURES[name](Path(folder), QUICK if options.quick else FULL)
            except (BenchmarkError, httpx.HTTPError) as error:
                sys.exit(f"benchmarks.documents: {name}: {error}")
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    print(f"{report.tables(measured)}\n\n{machine['cores']} cores, {machine['system']}.")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **measured}, indent=2) + "\n")
    if options.quick:
        print("--quick: sizes are small, and the times mean nothing", file=sys.stderr)
    bars = [bar for bar in report.bars(measured) if not (options.quick and bar.is_timed)]
    sys.exit(0 if all(bar.is_met for bar in bars) else 1)


if __name__ == "__main__":
    main()
