"""What keepers add to the engines they keep: starts, recoveries, memory, CPU. Prints a table and, with --json, data.

Rounds are interleaved and medians count. Run it with nothing else on the machine.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.demo import KEYS, Demo, devices_file, project_folder, running_demo
from vllm_unified import loopback
from vllm_unified.settings import load

IDLE_SECONDS = 120.0


def alone() -> dict[str, float]:
    """Seconds from the start of each server to its health check, as `show` prints it, one after the other."""
    with project_folder() as (home, environ):
        settings = load(home / "config" / "models.demo.json", home, environ)
        return {
            model.key: _server_alone(home, environ, model.key, settings.engine_url(model)) for model in settings.engines
        }


def _server_alone(home: Path, environ: dict[str, str], key: str, url: str) -> float:
    command = ["vllm-unified", "--config", str(home / "config" / "models.demo.json"), "show", key]
    program = Path(sys.executable).parent
    shown = subprocess.run(
        [program / command[0], *command[1:]], env=environ, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        server = subprocess.Popen(["sh", "-c", f"exec {shown.stdout}"], env=environ, stdout=log, stderr=log)
        try:
            while not _is_healthy(url):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-2000:])
                time.sleep(0.1)
            return time.monotonic() - began
        finally:
            server.terminate()
            server.wait(60)


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError):
        return loopback.get(f"{url}/health", 5)[0] == 200
    return False


def recovery(demo: Demo, key: str) -> float:
    """Seconds from SIGKILL of an engine to ready again."""
    before = demo.state(key).engine
    began = time.monotonic()
    os.kill(before.pid, signal.SIGKILL)  # type: ignore[union-attr]
    while not (demo.is_ready(key) and demo.state(key).engine != before):
        time.sleep(0.05)
    return time.monotonic() - began


def keepers_when_idle(demo: Demo) -> dict[str, Any]:
    """Memory in MiB and percent of a core, of the largest and of the busiest keeper."""
    keepers = [psutil.Process(keeper.pid) for key in KEYS if (keeper := demo.state(key).keeper)]
    before = [sum(each.cpu_times()[:2]) for each in keepers]
    time.sleep(IDLE_SECONDS)
    spent = [sum(each.cpu_times()[:2]) - earlier for each, earlier in zip(keepers, before, strict=True)]
    return {
        "rss_mib": round(max(each.memory_info().rss for each in keepers) / (1 << 20), 1),
        "percent_of_a_core": round(max(spent) / IDLE_SECONDS * 100, 3),
    }


def rounds(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        each: dict[str, Any] = {"alone": alone()}
        with running_demo() as demo:
            each["start"] = demo.start_seconds
            each["recovery"] = {key: recovery(demo, key) for key in KEYS}
            if number == 0:
                each["keepers"] = keepers_when_idle(demo)
        with project_folder() as (home, _), running_demo(VLLM_UNIFIED_DEVICES=str(devices_file(home, 2))) as demo:
            each["start_on_two"] = demo.start_seconds
            each["devices"] = {key: list(demo.state(key).devices) for key in KEYS}
        yield each


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios within each round, then their medians."""

    def longer(each: dict[str, Any]) -> float:
        sums: dict[str, float] = {}
        for key in KEYS:
            sums[each["devices"][key][0]] = sums.get(each["devices"][key][0], 0) + each["alone"][key]
        return max(sums.values())

    ratios = {
        "start of four / sum of their starts alone": [each["start"] / sum(each["alone"].values()) for each in measured],
        "start on two devices / the longer of the two": [each["start_on_two"] / longer(each) for each in measured],
        **{
            f"recovery of {key} / its start alone": [each["recovery"][key] / each["alone"][key] for each in measured]
            for key in KEYS
        },
    }
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: .venv/bin/python -m benchmarks.starts --rounds 3"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="all that was measured, instead of the table")
    options = parser.parse_args()
    measured = list(rounds(options.rounds))
    if options.json:
        print(json.dumps({"summary": summary(measured), "rounds": measured}, indent=2))
        return
    table = Table("what", f"median of {options.rounds}")
    for name, value in summary(measured).items():
        table.add_row(name, f"{value:.2f}")
    for name, value in measured[0]["keepers"].items():
        table.add_row(f"keeper when idle: {name}", str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
