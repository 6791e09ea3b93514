"""The last hours as one page that needs nothing else, or as one picture."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime

from lxml import etree  # type: ignore[import-untyped]
from lxml import html as lxml_html
from lxml.html.builder import E  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vllm_unified import __version__
from vllm_unified.monitoring.charts import MODELS, Chart, Colour, Kind
from vllm_unified.monitoring.drawing import FAINT, INK, RULE, Look, colour_of, draw, picture_of, style, svg_of
from vllm_unified.monitoring.history import MOST_MODELS, OVER_TIME, Alert, History, Line, Part, Section, Seen
from vllm_unified.monitoring.units import shown

TITLE = "vllm-unified"
GROUND = "#f6f7f9"
ROOM = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.11)  # inches, around each chart
MARGIN = 0.22  # inches
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
    charts = [each for each in overview if each.chart.kind in OVER_TIME and not each.is_empty]
    pairs = [charts[at : at + 2] for at in range(0, len(charts), 2)]
    heights = [1.3, 0.5 + 0.27 * len(rows), *([_alerts_height(seen)] if seen.alerts else []), *[2.6] * len(pairs)]
    with style():
        figure = Figure(figsize=(12, sum(heights)), layout=ROOM, facecolor=GROUND)
        strips = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02, squeeze=False)[:, 0]
        _draw_head(strips[0], seen, look, [each for each in overview if each.chart.kind is Kind.STAT])
        _draw_table(_card(strips[1]), rows)
        if seen.alerts:
            _draw_alerts(_card(strips[2]), seen.alerts, look)
        for strip, pair in zip(strips[len(heights) - len(pairs) :], pairs, strict=True):
            for place, each in zip(strip.subfigures(1, 2, wspace=0.012), pair, strict=False):
                place.set_facecolor("white")
                place.suptitle(each.chart.title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=INK)
                draw(place.add_subplot(), each.chart, each.lines, look)
        return picture_of(figure, "png")


def _look(seen: History) -> Look:
    return Look(seen.span, sorted(seen.models), datetime.now().astimezone().tzinfo)


def _span(seen: History, look: Look) -> str:
    start, end = (datetime.fromtimestamp(at, look.zone) for at in (seen.span.start, seen.span.end))
    day = "" if start.date() == end.date() else f"{end:%Y-%m-%d} "
    return f"{start:%Y-%m-%d %H:%M} to {day}{end:%H:%M} ({end:%Z}), {shown(seen.span.seconds, 's')}"


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
    ended = alert.end or look.span.end
    begin, end = (datetime.fromtimestamp(at, look.zone) for at in (alert.start, ended))
    form = "%H:%M" if look.span.seconds < 86400 else "%m-%d %H:%M"
    until = f"{end:{form}}" if alert.end else "still firing"
    return [alert.name, alert.about, alert.severity, f"{begin:{form}}", until, shown(ended - alert.start, "s")]


# --- the picture ---


def _card(place: SubFigure) -> Axes:
    """All of the place, for words; the units are inches."""
    place.set_facecolor("white")
    axes = place.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    width, height = place.bbox.width / place.figure.dpi, place.bbox.height / place.figure.dpi
    axes.set_xlim(-MARGIN, width - MARGIN)
    axes.set_ylim(height, 0)
    return axes


def _draw_head(place: SubFigure, seen: History, look: Look, tiles: Sequence[Seen]) -> None:
    axes = _card(place)
    place.set_facecolor(GROUND)
    right = axes.get_xlim()[1] - MARGIN
    axes.text(0, 0.28, TITLE, fontsize=17, fontweight="bold", va="center")
    axes.text(right, 0.28, _span(seen, look), color=FAINT, va="center", ha="right")
    for at, each in enumerate(tiles):
        left = at * right / len(tiles)
        value = each.lines[0].values[0] if each.lines else math.nan
        colour = colour_of(each.chart, value) or INK
        axes.text(left, 0.82, _told(each.chart, value), fontsize=16, color=colour, va="center")
        axes.text(left, 1.1, each.chart.title, color=FAINT, va="center")


def _draw_table(axes: Axes, rows: Sequence[Line]) -> None:
    right = axes.get_xlim()[1] - MARGIN
    first = max(1.0, *(0.09 * len(row.name) for row in rows), 0)
    rights = [first + (right - first) * (at + 1) / len(MODELS.queries) for at in range(len(MODELS.queries))]
    for edge, query in zip(rights, MODELS.queries, strict=True):
        axes.text(edge, 0.22, query.legend, color=FAINT, ha="right", va="center")
    for at, row in enumerate(rows):
        middle = 0.5 + 0.27 * at
        axes.plot([0, right], [middle - 0.135] * 2, color=RULE, linewidth=0.8)
        axes.text(0, middle, row.name, fontweight="bold", va="center")
        for column, (edge, value) in enumerate(zip(rights, row.values, strict=True)):
            colour = colour_of(MODELS, value) if column == 0 else None
            axes.text(edge, middle, _in_table(column, value), color=colour or INK, ha="right", va="center")


def _alerts_height(seen: History) -> float:
    return 0.5 + 0.24 * min(len(seen.alerts), MOST_ALERTS_IN_PICTURE + 1)


def _draw_alerts(axes: Axes, alerts: Sequence[Alert], look: Look) -> None:
    axes.text(0, 0.22, "Alerts", fontsize=10, fontweight="bold", va="center")
    for at, alert in enumerate(alerts[:MOST_ALERTS_IN_PICTURE]):
        middle = 0.5 + 0.24 * at
        name, about, severity, start, end, lasted = _alert_cells(alert, look)
        axes.text(0, middle, name, color=Colour.BAD, va="center")
        axes.text(2.2, middle, about, va="center")
        axes.text(6.2, middle, severity, color=FAINT, va="center")
        axes.text(
            7.4, middle, f"{start} to {end}, {lasted}" if alert.end else f"{start}, {end}", color=FAINT, va="center"
        )
    if len(alerts) > MOST_ALERTS_IN_PICTURE:
        middle = 0.5 + 0.24 * MOST_ALERTS_IN_PICTURE
        axes.text(0, middle, f"{len(alerts) - MOST_ALERTS_IN_PICTURE} more", color=FAINT, va="center")
