"""Charts as pictures: drawn once, for the page as SVG and for the picture as a part of it."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import groupby

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from vllm_unified.monitoring.charts import COLOURS, Chart, Colour, Kind
from vllm_unified.monitoring.history import Line
from vllm_unified.monitoring.prometheus import Span
from vllm_unified.monitoring.units import scale_of, shown

INK, FAINT, RULE = "#1f2937", "#6b7280", "#e5e7eb"
# Told apart by people who see fewer colours too: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f6bc4", "#8c8c3b")
WORDS: dict[str, str] = {**COLOURS, "p50": "#56b4e9", "p95": "#0072b2", "p99": "#1f2937"}
HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#bfdcee", "#0072b2", "#08264a"])
MOST_LINES = 8  # the rest is grey, and one line of the legend
MOST_BARS = 15
# Of those that are there; others show what they lack as a box.
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback")


@dataclass(frozen=True)
class Look:
    """What all charts of a report have in common. `models`: in the order of their colours."""

    span: Span
    models: Sequence[str]
    zone: tzinfo | None

    @property
    def dates(self) -> list[float]:
        return [self.date(at) for at in self.span.times]

    def date(self, at: float) -> float:
        return float(date2num(datetime.fromtimestamp(at, self.zone)))

    def colours(self, names: Sequence[str]) -> list[str]:
        """A model has the same in every chart, and so have words with a meaning."""
        fixed = {**{model: PALETTE[at % len(PALETTE)] for at, model in enumerate(self.models)}, **WORDS}
        free = (colour for colour in PALETTE if all(fixed.get(name) != colour for name in names))
        taken = iter([*free, *PALETTE * (len(names) // len(PALETTE) + 1)])
        return [fixed.get(name) or next(taken) for name in names]


def svg_of(chart: Chart, lines: Sequence[Line], look: Look) -> str:
    """The element <svg> alone; what it has written in it is text."""
    with style():
        figure = Figure(figsize=(6.1, _height(chart, lines)), layout="constrained")
        draw(figure.add_subplot(), chart, lines, look)
        text = picture_of(figure, "svg").decode()
    return text[text.index("<svg") :]


def picture_of(figure: Figure, kind: str, dots_per_inch: int = 100) -> bytes:
    """`kind`: svg or png."""
    written = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(written, format=kind, dpi=dots_per_inch, metadata=metadata)
    return written.getvalue()


@contextmanager
def style() -> Iterator[None]:
    there = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "font.family": ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in there)],
        "font.size": 8.5,
        "text.parse_math": False,  # a label with two dollar signs is no formula
        "text.color": INK,
        "svg.fonttype": "none",
        "axes.edgecolor": RULE,
        "axes.labelcolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlecolor": INK,
        "axes.titlepad": 8,
        "grid.color": RULE,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": INK,
    }
    with rc_context(settings):  # type: ignore[arg-type]  # its stub wants a Literal for each key
        yield


def draw(axes: Axes, chart: Chart, lines: Sequence[Line], look: Look) -> None:
    DRAWN[chart.kind](axes, chart, lines, look)


def _draw_lines(axes: Axes, chart: Chart, lines: Sequence[Line], look: Look) -> None:
    if chart.stacked:  # what is nothing has no area
        lines = [line for line in lines if any(line.finite)] or lines
    lines = sorted(lines, key=lambda line: max(line.finite, default=0), reverse=True)
    named, others = sorted(lines[:MOST_LINES], key=lambda line: line.name), lines[MOST_LINES:]
    colours = look.colours([line.name for line in named])
    dates = look.dates
    if chart.stacked:
        heights = [[0 if math.isnan(value) else value for value in line.values] for line in [*named, *others]]
        all_colours = [*colours, *["#d1d5db"] * len(others)]
        axes.stackplot(dates, heights, colors=all_colours, alpha=0.85, linewidth=0)
        highest = max(float(sum(together)) for together in zip(*heights, strict=True))
    else:
        for line in others:
            axes.plot(dates, line.values, color="#d1d5db", linewidth=1)
        for line, colour in zip(named, colours, strict=True):
            axes.plot(dates, line.values, color=colour, linewidth=1.6, solid_capstyle="round")
            _draw_lone_points(axes, dates, line.values, colour)
        if len(lines) == 1:
            axes.fill_between(dates, lines[0].values, color=colours[0], alpha=0.12, linewidth=0)
        highest = max((value for line in lines for value in line.finite), default=0)
    _scale_axis(axes, chart, highest)
    _draw_limits(axes, chart)
    _time_axis(axes, look)
    shapes = [Line2D([], [], color=colour, linewidth=4, solid_capstyle="butt") for colour in colours]
    names = [line.name for line in named]
    if others:
        shapes.append(Line2D([], [], color="#d1d5db", linewidth=4))
        names.append(f"{len(others)} more")
    _legend(axes, shapes, names)


def _draw_lone_points(axes: Axes, dates: Sequence[float], values: Sequence[float], colour: str) -> None:
    """A line needs two."""
    known = [not math.isnan(value) for value in values]
    lone = [
        at
        for at, here in enumerate(known)
        if here and not (at and known[at - 1]) and not (at + 1 < len(known) and known[at + 1])
    ]
    if lone:
        axes.plot([dates[at] for at in lone], [values[at] for at in lone], ".", color=colour, markersize=3)


def _draw_bars(axes: Axes, chart: Chart, lines: Sequence[Line], look: Look) -> None:
    lines = sorted(lines, key=lambda line: line.values[-1])[-MOST_BARS:]
    values = [line.values[-1] for line in lines]
    highest = max(chart.top or 0, *(value for value in values if math.isfinite(value)), 0)
    colours = [colour_of(chart, value) or PALETTE[0] for value in values]
    axes.barh(range(len(lines)), values, height=0.62, color=colours)
    for at, value in enumerate(values):
        axes.annotate(shown(value, chart.unit), (value, at), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(lines)), [line.name for line in lines], color=INK)
    axes.set_xlim(0, highest * 1.16 or 1)
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)


def _draw_timeline(axes: Axes, chart: Chart, lines: Sequence[Line], look: Look) -> None:
    lines = sorted(lines, key=lambda line: line.name, reverse=True)
    colours = {value: colour for value, _, colour in chart.states}
    step = look.span.step
    for row, line in enumerate(lines):
        at = 0
        for value, same in groupby(line.values):
            count = len(list(same))
            if not math.isnan(value):
                begin, end = (look.date(look.span.times[0] + step * (edge - 1)) for edge in (at, at + count))
                axes.broken_barh([(begin, end - begin)], (row - 0.34, 0.68), color=colours[round(value)], linewidth=0)
            at += count
    axes.set_yticks(range(len(lines)), [line.name for line in lines], color=INK)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.grid(visible=False)
    _time_axis(axes, look)
    if len(chart.states) > 1:
        _legend(
            axes, [Patch(color=colours[value]) for value, _, _ in chart.states], [name for _, name, _ in chart.states]
        )


def _draw_heatmap(axes: Axes, chart: Chart, lines: Sequence[Line], look: Look) -> None:
    """The lines are the histogram's buckets; each has those below it in it."""
    lines = sorted(lines, key=lambda line: float(line.name))
    counts = [[0 if math.isnan(value) else value for value in line.values] for line in lines]
    own = [
        [
            max(0.0, here - below)
            for here, below in zip(counts[at], counts[at - 1] if at else [0] * len(counts[0]), strict=True)
        ]
        for at in range(len(counts))
    ]
    filled = [at for at, row in enumerate(own) if max(row) > 0] or [0]
    rows = range(filled[0], filled[-1] + 1)
    step = look.span.step
    edges = [look.date(at - step) for at in look.span.times] + [look.date(look.span.end)]
    axes.pcolormesh(edges, range(len(rows) + 1), [own[at] for at in rows], cmap=HEAT, vmin=0)
    axes.set_yticks(
        [at + 0.5 for at in range(len(rows))],
        ["more" if lines[at].name == "+Inf" else f"≤ {shown(float(lines[at].name), chart.unit)}" for at in rows],
    )
    axes.grid(visible=False)
    _time_axis(axes, look)


Draw = Callable[[Axes, Chart, Sequence[Line], Look], None]
DRAWN: Mapping[Kind, Draw] = {
    Kind.TIMESERIES: _draw_lines,
    Kind.BARS: _draw_bars,
    Kind.TIMELINE: _draw_timeline,
    Kind.HEATMAP: _draw_heatmap,
}


def colour_of(chart: Chart, value: float) -> str | None:
    """By the chart's states or limits; None where it has none, or nothing was measured."""
    states: dict[int, str] = {number: colour for number, _, colour in chart.states}
    if math.isnan(value):
        return None
    if not chart.limits:
        return states.get(round(value)) if states else None
    warning, bad = chart.limits
    sign = -1 if bad < warning else 1
    reached = [
        colour for limit, colour in ((bad, Colour.BAD), (warning, Colour.WARNING)) if sign * value >= sign * limit
    ]
    return reached[0] if reached else Colour.GOOD


def _height(chart: Chart, lines: Sequence[Line]) -> float:
    """Inches."""
    if chart.kind in (Kind.BARS, Kind.TIMELINE):
        return 0.75 + 0.26 * min(len(lines), MOST_BARS if chart.kind is Kind.BARS else len(lines))
    return 2.3


def _scale_axis(axes: Axes, chart: Chart, highest: float) -> None:
    scale = scale_of(chart.unit, highest)
    top = min(highest * 1.12, chart.top) if chart.top and highest * 1.12 > chart.top * 0.6 else highest * 1.12
    top = top or scale.factor  # nothing but zeros: a line at the bottom
    axes.set_ylim(0, top * 1.02)
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=chart.unit == "short").tick_values(0, top / scale.factor)
    axes.yaxis.set_major_locator(
        FixedLocator([tick * scale.factor for tick in ticks if tick * scale.factor <= top * 1.02])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.text(value)))


def _draw_limits(axes: Axes, chart: Chart) -> None:
    """Where they are near; the numbers are not made small for their sake."""
    _, top = axes.get_ylim()
    for limit, colour in zip(chart.limits or (), (Colour.WARNING, Colour.BAD), strict=False):
        if limit <= top:
            axes.axhline(limit, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)


def _time_axis(axes: Axes, look: Look) -> None:
    locator = AutoDateLocator(look.zone, minticks=4, maxticks=10)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, look.zone, show_offset=False))
    axes.set_xlim(look.date(look.span.start), look.date(look.span.end))


def _legend(axes: Axes, shapes: Sequence[Line2D | Patch], names: Sequence[str]) -> None:
    if len(names) == 1 and not names[0]:
        return
    # An underscore at the beginning has a meaning to matplotlib.
    shown_names = [f" {name}" if name.startswith("_") else name for name in names]
    longest = max(map(len, shown_names))
    columns = max(1, min(len(names), 84 // (longest + 8)))
    axes.legend(
        shapes,
        shown_names,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=columns,
        handlelength=1.1,
        columnspacing=1.4,
        handletextpad=0.5,
    )
