"""What was measured as Markdown."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.router.measures import Figures, median_of

REFERENCE = "nginx"
# name of the figure → column, how it is written
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "requests_per_second": ("requests/s", "{:,.0f}".format),
    "cpu_us_per_chunk": ("CPU per chunk, µs", "{:.1f}".format),
    "first_chunk_ms": ("first chunk, median, ms", "{:.1f}".format),
    "first_chunk_p99_ms": ("first chunk, 99th, ms", "{:.1f}".format),
    "mib_of_many_streams": ("1,000 streams, MiB", "{:.0f}".format),
    "large_body_seconds": ("20 MB body, s", "{:.3f}".format),
}


def tables(measured: dict[str, Any]) -> str:
    parts = [_gateways(measured["rounds"]), _variants(measured["variants"]), _footer(measured)]
    return "\n\n".join(part for part in parts if part)


def _gateways(rounds: Sequence[dict[str, Figures]]) -> str:
    head = ["gateway", *(title for title, _ in COLUMNS.values()), "errors"]
    rows = []
    for name in rounds[0]:
        of_it = [each[name] for each in rounds]
        medians = median_of(of_it)
        cells = [write(medians[figure]) + _ratio(rounds, name, figure) for figure, (_, write) in COLUMNS.items()]
        rows.append([name, *cells, f"{medians['errors']:.0f}"])
    return _table(head, rows)


def ratio(rounds: Sequence[dict[str, Figures]], name: str, figure: str) -> float | None:
    """To nginx, within each round, then their median."""
    if REFERENCE not in rounds[0] or not all(each[REFERENCE][figure] for each in rounds):
        return None
    return statistics.median(each[name][figure] / each[REFERENCE][figure] for each in rounds)


def _ratio(rounds: Sequence[dict[str, Figures]], name: str, figure: str) -> str:
    found = ratio(rounds, name, figure)
    return "" if found is None else f" ({found:.2f})"


def _variants(rounds: Sequence[dict[str, Figures]]) -> str:
    if not rounds:
        return ""
    base = "4 models"
    rows = []
    for name in rounds[0]:
        if not all(each[name] for each in rounds):
            rows.append([name, "not measured: the router reads no keys.yaml", "", ""])
            continue
        medians = median_of([each[name] for each in rounds])
        compared = statistics.median(
            each[name]["requests_per_second"] / (each[base]["requests_per_second"] or 1) for each in rounds
        )
        rows.append([name, f"{medians['requests_per_second']:,.0f}", f"{compared:.2f}", f"{medians['errors']:.0f}"])
    return _table(["ours with", "requests/s", f"to {base}, 1 key", "errors"], rows)


def _footer(measured: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    machine = measured["machine"]
    rounds = len(measured["rounds"])
    medians = f"Medians of {rounds} rounds" if rounds > 1 else "One round"
    ratios = f"; in brackets the ratio to {REFERENCE} in the same round" if REFERENCE in measured["rounds"][0] else ""
    failed = f" Left out, as it failed: {', '.join(measured['failed'])}." if measured["failed"] else ""
    return f"{medians}{ratios}. {machine['cores']} cores, {machine['system']}; {versions}.{failed}"


def memory(steps: Sequence[dict[str, float]]) -> str:
    rows = []
    requests = 0.0
    for step in steps:
        requests += step["complete"]
        rows.append([f"{requests:,.0f}", f"{step['mib']:.1f}", f"{step['errors']:.0f}"])
    return _table(["requests", "MiB", "errors"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
