"""What was measured as Markdown, and what of it has to be how good."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.bundle.measures import OURS, Figures

PLAIN_IMAGES = "docker save | gzip, gunzip | docker load"


class Wanted(NamedTuple):
    """`way` has to reach `least` times the speed of `other`, of the measure `name`."""

    name: str
    way: str
    other: str
    least: float


WANTED = (
    Wanted("images", OURS, PLAIN_IMAGES, 3.0),
    Wanted("packing", OURS, "cp + sha256sum", 1.0),
    Wanted("verification", "verify.sh", "cat", 0.8),
    Wanted("verification", "models verify", "cat", 0.8),
    Wanted("downloads", OURS, "curl -o", 0.9),
)


class Bar(NamedTuple):
    what: str
    measured: float
    least: float

    @property
    def is_met(self) -> bool:
        return self.measured >= self.least


def bars(measured: Mapping[str, Figures]) -> Iterator[Bar]:
    """Of the measures that were made."""
    for name, way, other, least in WANTED:
        if name in measured:
            yield Bar(f"{name}: speed of {way} to {other}", speed(measured[name], way, other), least)


def speed(figures: Figures, way: str, other: str) -> float:
    """How many times as fast: within each round, then the median."""
    return statistics.median(_seconds(each[other]) / _seconds(each[way]) for each in figures["rounds"])


def _seconds(took: Figures) -> float:
    return float(sum(took["stages"].values()))


def tables(measured: Mapping[str, Figures]) -> str:
    return "\n\n".join(_table_of(name, figures) for name, figures in measured.items())


def table_of_bars(measured: Mapping[str, Figures]) -> str:
    rows = [
        [bar.what, f"{bar.measured:.2f}", f">= {bar.least:g}", "yes" if bar.is_met else "**no**"]
        for bar in bars(measured)
    ]
    return _table(["", "measured", "wanted", "met"], rows)


def _table_of(name: str, figures: Figures) -> str:
    rounds = figures["rounds"]
    first, *_, reference = rounds[0]
    stages = list(rounds[0][first]["stages"])
    head = [name, *(f"{stage}, s" for stage in stages), *(["together, s"] if len(stages) > 1 else [])]
    head += ["MB", "MB/s", f"speed to {reference}"]
    rows = []
    for way in rounds[0]:
        seconds = [statistics.median(each[way]["stages"][stage] for each in rounds) for stage in stages]
        whole = statistics.median(_seconds(each[way]) for each in rounds)
        megabytes = rounds[0][way]["size"] / 1e6
        cells = [*seconds, *([whole] if len(stages) > 1 else [])]
        ratio = speed(figures, way, reference)
        rows.append([way, *(f"{cell:.1f}" for cell in cells), f"{megabytes:,.0f}", f"{megabytes / whole:,.0f}"])
        rows[-1].append(f"{ratio:.2f}")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
