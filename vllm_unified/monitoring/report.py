"""The last hours as one page that needs nothing else, or as one picture."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime

from lxml import etree  # type: ignore[import-untyped]
from lxml import html as lxml_html
from lxml.html.builder import E  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_unified import __version__
from vllm_unified.monitoring.charts import MODELS, Chart, Kind
from vllm_unified.monitoring.drawing import FAINT, INK, RULE, Look, colour_of, draw, picture_of, style, svg_of
from vllm_unified.monitoring.history import MOST_MODELS, Alert, History, Line, Part, Section, Seen
from vllm_unified.monitoring.units import shown

TITLE = "vllm-unified"
MOST_ALERTS_IN_PICTURE = 6
STYLE = """
:root { color-scheme: light; --ink: #1f2937; --faint: #6b7280; --rule: #e5e7eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 20px; margin: 40px 0 2px; }
h3 { font-size: 13px; margin: 22px 0 8px; color: var(--faint); text-transform: uppercase; letter-spacing: .05em; }
h4 { font-size: 14px; margin: 0 0 4px; }
p { margin: 2px 0 0; color: var(--faint); }
nav { margin-top: 12px; }
nav a { margin-right: 18px; color: #0072b2; text-decoration: none; }
.grid, .tiles { display: grid; gap: 14px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); margin-bottom: 14px; }
figure, .tile, .card { background: #fff; border: 1px solid var(--rule); border-radius: 8px; margin: 0; }
figure, .tile { padding: 12px 14px; }
figcaption, .tile span { color: var(--faint); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-weight: 600; }
.card { overflow-x: auto; margin-top: 10px; padding: 6px 4px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 500; font-size: 13px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.left th, .left td, th:first-child, td:first-child { text-align: left; }
.mark { color: #fff; border-radius: 4px; padding: 1px 8px; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
.quiet { margin-top: 10px; font-size: 13px; }
"""
# Whatever a label says, nothing of the page can run or fetch anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(seen: History) -> str:
    """HTML."""
    look = _look(seen)
    sections = [_section(each, look) for each in seen.sections if not each.model]
    about_models = [_details(each, look) for each in seen.sections if each.model]
    body = E.main(
        E.header(E.h1(f"{TITLE} report"), E.p(_span(seen, look)), _navigation(seen)),
        *_first(seen, look),
        *sections[0],
        E.h2({"id": "models"}, "Each model"),
        E.p(_which_models(seen)),
        *about_models,
        *(element for section in sections[1:] for element in section),
        E.p(
            {"class": "quiet"},
            f"vllm-unified {__version__}; the same charts, live: Grafana, with COMPOSE_PROFILES=monitoring",
        ),
    )
    head = E.head(
        E.meta({"charset": "utf-8"}),
        E.meta({"http-equiv": "Content-Security-Policy", "content": POLICY}),
        E.meta({"name": "viewport", "content": "width=device-width"}),
        E.title(f"{TITLE} report"),
        E.style(STYLE),
    )
    whole = E.html({"lang": "en"}, head, E.body(body))
    text: str = lxml_html.tostring(whole, encoding="unicode", doctype="<!doctype html>")
    return text


def picture(seen: History) -> bytes:
    """PNG: the state of each model, alerts, and the charts of the overview."""
    look = _look(seen)
    overview = [each for part in seen.overview.parts for each in part.seen]
    rows = next(each.lines for each in overview if each.chart is MODELS)
    tiles = [each for each in overview if each.chart.kind is Kind.STAT]
    charts = [each for each in overview if _is_drawn(each)]
    heights = [1.15, 0.36 + 0.27 * len(rows), *([_alerts_height(seen)] if seen.alerts else [])]
    chart_rows = [charts[at : at + 2] for at in range(0, len(charts), 2)]
    heights += [2.35] * len(chart_rows)
    with style():
        figure = Figure(figsize=(12, sum(heights) + 0.12 * len(heights)), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.06)  # type: ignore[union-attr]
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        _draw_head(figure.add_subplot(grid[0, :]), seen, look, tiles)
        _draw_table(figure.add_subplot(grid[1, :]), rows)
        if seen.alerts:
            _draw_alerts(figure.add_subplot(grid[2, :]), seen.alerts, look)
        first = len(heights) - len(chart_rows)
        for at, pair in enumerate(chart_rows):
            for column, each in enumerate(pair):
                axes = figure.add_subplot(grid[first + at, column])
                axes.set_title(each.chart.title)
                draw(axes, each.chart, each.lines, look)
        return picture_of(figure, "png")


def _look(seen: History) -> Look:
    return Look(seen.span, sorted(seen.models), datetime.now().astimezone().tzinfo)


def _span(seen: History, look: Look) -> str:
    start, end = (datetime.fromtimestamp(at, look.zone) for at in (seen.span.start, seen.span.end))
    same_day = start.date() == end.date()
    return (
        f"{start:%Y-%m-%d %H:%M} to {end:%H:%M}"
        + (f" ({end:%Z})" if same_day else f" on {end:%Y-%m-%d} ({end:%Z})")
        + f", {shown(seen.span.seconds, 's')}"
    )


def _which_models(seen: History) -> str:
    if len(seen.models) > MOST_MODELS:
        return f"The {MOST_MODELS} busiest of {len(seen.models)}; open one to see its charts."
    return "Open one to see its charts."


def _is_drawn(seen: Seen) -> bool:
    return seen.chart.kind not in (Kind.STAT, Kind.TABLE) and not seen.is_empty and not seen.is_zero


# --- the page ---


def _navigation(seen: History) -> etree._Element:
    links = [("models", "Each model")] + [
        (each.dashboard.name, each.dashboard.title) for each in seen.sections[1:] if not each.model
    ]
    return E.nav(*(E.a({"href": f"#{name}"}, title) for name, title in links))


def _first(seen: History, look: Look) -> Iterator[etree._Element]:
    """The state of each model, and the alerts."""
    overview = [each for part in seen.overview.parts for each in part.seen]
    yield E.h2("Models")
    yield _table(next(each.lines for each in overview if each.chart is MODELS))
    yield E.h2("Alerts")
    if seen.alerts:
        rows = [E.tr(*(E.td(cell) for cell in _alert_cells(alert, look))) for alert in seen.alerts]
        head = E.tr(*(E.th(name) for name in ("alert", "of", "severity", "from", "to", "for")))
        yield E.div({"class": "card left"}, E.table(head, *rows))
    else:
        yield E.p("None fired.")


def _table(rows: Sequence[Line]) -> etree._Element:
    head = E.tr(E.th("model"), *(E.th(query.legend) for query in MODELS.queries))
    lines = [E.tr(E.td(row.name), *(_cell(at, value) for at, value in enumerate(row.values))) for row in rows]
    return E.div({"class": "card"}, E.table(head, *lines))


def _cell(column: int, value: float) -> etree._Element:
    text = _in_table(column, value)
    colour = colour_of(MODELS, value) if column == 0 else None
    return E.td(E.span({"class": "mark", "style": f"background: {colour}"}, text) if colour else text)


def _in_table(column: int, value: float) -> str:
    states = {number: name for number, name, _ in MODELS.states}
    if column == 0:
        return "–" if math.isnan(value) else states[round(value)]
    unit = MODELS.queries[column].unit
    return shown(round(value) if unit == "short" and not math.isnan(value) else value, unit)


def _section(section: Section, look: Look) -> list[etree._Element]:
    about = section.dashboard
    parts = [element for part in section.parts for element in _part(part, look)]
    return [E.h2({"id": about.name}, about.title), E.p(about.description), *parts, *_quiet(section)]


def _details(section: Section, look: Look) -> etree._Element:
    parts = [element for part in section.parts for element in _part(part, look)]
    return E.details(E.summary(section.model), *parts, *_quiet(section))


def _part(part: Part, look: Look) -> Iterator[etree._Element]:
    tiles = [_tile(each) for each in part.seen if each.chart.kind is Kind.STAT and not each.is_empty]
    figures = [_figure(each, look) for each in part.seen if _is_drawn(each)]
    if tiles or figures:
        yield E.h3(part.title)
    if tiles:
        yield E.div({"class": "tiles"}, *tiles)
    if figures:
        yield E.div({"class": "grid"}, *figures)


def _tile(seen: Seen) -> etree._Element:
    value = seen.lines[0].values[0]
    colour = colour_of(seen.chart, value) or INK
    return E.div(
        {"class": "tile", "title": seen.chart.description},
        E.b({"style": f"color: {colour}"}, _told(seen.chart, value)),
        E.span(seen.chart.title),
    )


def _told(chart: Chart, value: float) -> str:
    names = {number: name for number, name, _ in chart.states}
    return names[round(value)] if names else shown(value, chart.unit)


def _figure(seen: Seen, look: Look) -> etree._Element:
    svg = etree.fromstring(svg_of(seen.chart, seen.lines, look).encode())
    for name in ("width", "height"):
        del svg.attrib[name]
    for group in svg.iter("{*}g"):  # each chart has the same ones
        group.attrib.pop("id", None)
    svg.attrib.update({"role": "img", "aria-label": seen.chart.title})
    return E.figure(E.h4(seen.chart.title), svg, E.figcaption(seen.chart.description))


def _quiet(section: Section) -> Iterator[etree._Element]:
    """What is not shown, and why."""
    all_seen = [each for part in section.parts for each in part.seen if each.chart.kind is not Kind.TABLE]
    empty = [each.chart.title for each in all_seen if each.is_empty]
    zero = [each.chart.title for each in all_seen if not each.is_empty and each.is_zero]
    for what, titles in (("All the time at zero", zero), ("No data", empty)):
        if titles:
            yield E.p({"class": "quiet"}, f"{what}: {', '.join(titles)}.")


def _alert_cells(alert: Alert, look: Look) -> list[str]:
    start, end = (
        f"{datetime.fromtimestamp(at or look.span.end, look.zone):%m-%d %H:%M}" for at in (alert.start, alert.end)
    )
    lasted = shown((alert.end or look.span.end) - alert.start, "s")
    return [alert.name, alert.about, alert.severity, start, end if alert.end else "still firing", lasted]


# --- the picture ---


def _draw_head(axes: Axes, seen: History, look: Look, tiles: Sequence[Seen]) -> None:
    axes.set_axis_off()
    axes.text(0, 1, TITLE, fontsize=17, fontweight="bold", va="top", transform=axes.transAxes)
    axes.text(1, 0.97, _span(seen, look), color=FAINT, va="top", ha="right", transform=axes.transAxes)
    for at, each in enumerate(tiles):
        left = at / len(tiles)
        value = each.lines[0].values[0] if each.lines else math.nan
        axes.text(
            left,
            0.36,
            _told(each.chart, value),
            fontsize=15,
            color=colour_of(each.chart, value) or INK,
            transform=axes.transAxes,
        )
        axes.text(left, 0.12, each.chart.title, color=FAINT, transform=axes.transAxes)


def _draw_table(axes: Axes, rows: Sequence[Line]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) + 0.9, -0.1)
    rights = [0.14 + 0.86 * (at + 1) / len(MODELS.queries) for at in range(len(MODELS.queries))]
    for right, query in zip(rights, MODELS.queries, strict=True):
        axes.text(right, 0.4, query.legend, color=FAINT, ha="right", va="center")
    for at, row in enumerate(rows, 1):
        axes.axhline(at - 0.1, color=RULE, linewidth=0.8)
        axes.text(0, at + 0.4, row.name, fontweight="bold", va="center")
        for column, (right, value) in enumerate(zip(rights, row.values, strict=True)):
            colour = colour_of(MODELS, value) if column == 0 else None
            axes.text(right, at + 0.4, _in_table(column, value), color=colour or INK, ha="right", va="center")


def _alerts_height(seen: History) -> float:
    return 0.4 + 0.25 * min(len(seen.alerts), MOST_ALERTS_IN_PICTURE + 1)


def _draw_alerts(axes: Axes, alerts: Sequence[Alert], look: Look) -> None:
    axes.set_axis_off()
    axes.set_title("Alerts")
    lines = [
        "   ".join(cell for cell in _alert_cells(alert, look) if cell) for alert in alerts[:MOST_ALERTS_IN_PICTURE]
    ]
    if len(alerts) > MOST_ALERTS_IN_PICTURE:
        lines.append(f"{len(alerts) - MOST_ALERTS_IN_PICTURE} more")
    axes.set_ylim(len(lines), 0)
    for at, line in enumerate(lines):
        axes.text(0, at + 0.5, line, va="center")
