"""What was measured as Markdown, and what of it has to be how good."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.documents.measures import Figures

LEAST_RATIO = 0.95
MOST_RSS_MB = 400.0
MOST_HEALTH_MS = 50.0
MOST_GROUNDING_MS = 50.0
# Of what a page, or a byte, takes in the largest to what it takes in the smallest, which is an eighth of it.
MOST_GROWTH = 1.5
LEAST_GROUNDING_MS = 10.0  # of the largest; what takes less is noise
MEGABYTE = 1_000_000


class Bar(NamedTuple):
    """`is_timed`: it depends on the machine and its load, and means nothing where sizes are small."""

    what: str
    measured: str
    wanted: str
    is_met: bool
    is_timed: bool = True


def bars(measured: dict[str, Figures]) -> list[Bar]:
    """Of the measures that were made."""
    return [bar for name, figures in measured.items() for bar in BARS[name](figures)]


def tables(measured: dict[str, Figures]) -> str:
    parts = [TABLES[name](figures) for name, figures in measured.items()]
    rows = [[bar.what, bar.measured, bar.wanted, "yes" if bar.is_met else "**no**"] for bar in bars(measured)]
    return "\n\n".join([*parts, _table(["", "measured", "wanted", "met"], rows)])


# --- pages a second ---


def _throughput(figures: Figures) -> str:
    ratios = {
        "engine alone, kept full": (figures["engine"], 1.0),
        "service": (figures["pages_per_second"], figures["ratio"]),
        "service, first document after its start": (figures["first"], figures["ratio_of_first"]),
        "one page at a time": (figures["one_at_a_time"], figures["ratio_of_one_at_a_time"]),
    }
    rows = [[name, f"{rate:.2f}", f"{ratio:.3f}"] for name, (rate, ratio) in ratios.items()]
    loads = ", ".join(f"{each['load']:.2f}" for each in figures["rounds"])
    return (
        f"{_table(['', 'pages/s', 'to the engine'], rows)}\n\n"
        f"At most {figures['most_waiting']:.0f} pages waited in the engine. Load before each round: {loads}."
    )


def _throughput_bars(figures: Figures) -> Iterator[Bar]:
    ratio = figures["ratio"]
    yield Bar("pages/s of the service to the engine's", f"{ratio:.3f}", f">= {LEAST_RATIO}", ratio >= LEAST_RATIO)


# --- long documents ---


def _documents(figures: Figures) -> str:
    head = ["pages", "read, s", "ms a page", "products, s", "ms a page", "products, MB"]
    head += [
        "RSS while read, MB",
        "RSS after, MB",
        "with renderers, MB",
        "/health median / 99th / longest, ms",
        "of an idle server, ms",
        "load",
    ]
    return _table(head, [_document_row(each) for each in figures["documents"]])


def _document_row(each: Figures) -> list[str]:
    return [
        f"{each['pages']:,}",
        f"{each['read_seconds']:.1f}",
        f"{1000 * each['read_seconds'] / each['pages']:.1f}",
        f"{each['product_seconds']:.1f}",
        f"{1000 * each['product_seconds'] / each['pages']:.1f}",
        f"{each['product_mb']:.0f}",
        f"{each['rss_mb_while_read']:.0f}",
        f"{each['rss_mb_after']:.0f}",
        f"{each['rss_mb_with_renderers']:.0f}",
        *(
            f"{asked['median']:.1f} / {asked['p99']:.1f} / {asked['longest']:.1f}"
            for asked in (each["health_ms"], each["idle_ms"])
        ),
        f"{each['load']:.2f}",
    ]


def _documents_bars(figures: Figures) -> Iterator[Bar]:
    documents = figures["documents"]
    rss = max(max(each["rss_mb_while_read"], each["rss_mb_after"]) for each in documents)
    yield Bar("RSS of the service, MB", f"{rss:.0f}", f"< {MOST_RSS_MB:.0f}", rss < MOST_RSS_MB, is_timed=False)
    for what, name in (("reading", "read_seconds"), ("products", "product_seconds")):
        yield _growth(f"{what}: time a page, most pages to fewest", {each["pages"]: each[name] for each in documents})
    p99 = max(each["health_ms"]["p99"] for each in documents)
    idle = max(each["idle_ms"]["p99"] for each in documents)
    what = f"/health, 99th, ms (that of an idle server: {idle:.1f})"
    yield Bar(what, f"{p99:.1f}", f"< {MOST_HEALTH_MS:.0f}", p99 < MOST_HEALTH_MS)


def _growth(what: str, seconds: dict[int, float]) -> Bar:
    fewest, most = min(seconds), max(seconds)
    growth = seconds[most] / most / (seconds[fewest] / fewest or 1.0)
    return Bar(what, f"{growth:.2f}", f"<= {MOST_GROWTH}", growth <= MOST_GROWTH)


# --- grounding ---


def _grounding(figures: Figures) -> str:
    rows = figures["ms"]
    head = ["answer", *(f"{size / MEGABYTE:g} MB, ms" for size in next(iter(rows.values())))]
    table = _table(head, [[name, *(f"{ms:.1f}" for ms in row.values())] for name, row in rows.items()])
    return f"{table}\n\nLoad: {figures['load']:.2f}."


def _grounding_bars(figures: Figures) -> Iterator[Bar]:
    (form, true), *hostile = figures["ms"].items()
    megabyte = true[min(max(true), MEGABYTE)]
    wanted = f"< {MOST_GROUNDING_MS:.0f}"
    yield Bar(f"grounding, 1 MB of {form}, ms", f"{megabyte:.1f}", wanted, megabyte < MOST_GROUNDING_MS)
    yield _growth(f"grounding, {form}: time a byte, largest to smallest", true)
    slow = [(name, row) for name, row in hostile if max(row.values()) >= LEAST_GROUNDING_MS]
    growths = [_growth(f"grounding, {name}: time a byte, largest to smallest", row) for name, row in slow]
    yield from sorted(growths, key=lambda bar: float(bar.measured))[-1:]


# --- kills ---


def _kills(figures: Figures) -> str:
    at = ", ".join(map(str, figures["pages_read_at_each_kill"]))
    return (
        f"{figures['pages']} pages, SIGKILL when {at} were on the disk. The engine was asked {figures['requests']} "
        f"times: the others are pages that were in flight. Load: {figures['load']:.2f}."
    )


def _kills_bars(figures: Figures) -> Iterator[Bar]:
    for what, name in (("pages read twice after kills", "pages_read_twice"), ("lost", "pages_never_asked_for")):
        yield Bar(what, str(figures[name]), "0", not figures[name], is_timed=False)


BARS = {
    "throughput": _throughput_bars,
    "documents": _documents_bars,
    "grounding": _grounding_bars,
    "kills": _kills_bars,
}
TABLES = {"throughput": _throughput, "documents": _documents, "grounding": _grounding, "kills": _kills}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
