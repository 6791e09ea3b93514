"""The offline bundle and downloads beside the plain tools: images, weights, verification. Prints Markdown.

Exits with 1 when a bar is missed. Run it with nothing else on the machine: it says when it was not alone.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from rich.filesize import decimal

from benchmarks.bundle import measures, report
from benchmarks.bundle.measures import Sizes
from benchmarks.router.programs import BenchmarkError

MEASURES = {
    "images": measures.images,
    "packing": measures.packing,
    "verification": measures.verification,
    "downloads": measures.downloads,
}
QUICK_BYTES = 8_000_000
# Of the weights, on the disk at once: the source, what is made of it, and room to spare.
COPIES = 2.1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bundle",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: .venv/bin/python -m benchmarks.bundle --only verification,downloads --gigabytes 4",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda said: said.split(","), default=list(MEASURES), metavar=",".join(MEASURES))
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of weights (default 10, less on a small disk)")
    parser.add_argument(
        "--image", default="knowflow/vllm-unified:latest", help="one that the Docker engine has (default %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="on the disk that counts (default: the system's for such files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    parser.add_argument("--quick", action="store_true", help="small and short: whether it works, not how fast it is")
    options = parser.parse_args()
    for name in options.only:
        if name not in MEASURES:
            parser.error(f'--only: no "{name}"; there are {", ".join(MEASURES)}')
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    if options.quick:
        return Sizes(1, QUICK_BYTES, options.image)
    free = shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    weights = min(int(options.gigabytes * 1e9), int(free / COPIES))
    if weights < int(options.gigabytes * 1e9):
        print(f"{decimal(weights)} of weights: no more has room", file=sys.stderr)
    return Sizes(options.rounds, weights, options.image)


def main() -> None:
    options = arguments()
    sizes = sizes_of(options)
    measured = {}
    for name in options.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-", dir=options.folder) as folder:
            try:
                measured[name] = MEASURES[name](Path(folder), sizes)
            except BenchmarkError as error:
                sys.exit(f"benchmarks.bundle: {name}: {error}")
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    print(f"{report.tables(measured)}\n\n{machine['cores']} cores, {machine['system']}.")
    if options.quick:
        print("--quick: sizes are small, and the times mean nothing", file=sys.stderr)
    else:
        print(f"\n{report.table_of_bars(measured)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **measured}, indent=2) + "\n")
    if busy := sum(each["busy"] for each in measured.values()):
        print(f"others worked on this machine before {busy} of the measurements: not to be relied on", file=sys.stderr)
    sys.exit(0 if options.quick or all(bar.is_met for bar in report.bars(measured)) else 1)


if __name__ == "__main__":
    main()
