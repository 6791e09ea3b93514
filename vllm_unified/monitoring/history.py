"""What happened in a span of time: the values of every chart, and the alerts that fired."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from vllm_unified.monitoring.charts import DASHBOARDS, OVERVIEW, Chart, Dashboard, Kind, Query
from vllm_unified.monitoring.prometheus import Prometheus, Series, Span

BUSIEST = Query(
    "sort_desc(sum by (model) (increase(vllm_unified_requests_total[$__range]))"
    " and on (model) max by (model) (max_over_time(vllm_unified_model_ready[$__range])))"
)
KNOWN = Query("max by (model) (max_over_time(vllm_unified_model_ready[$__range]))")
FIRED = Query('max_over_time(ALERTS{alertstate="firing"}[$__step])')
MOST_MODELS = 12  # with all of their charts; the overview has every one
OVER_TIME = (Kind.TIMESERIES, Kind.TIMELINE, Kind.HEATMAP)
APART = ("alertname", "alertstate", "severity", "job", "instance")


@dataclass(frozen=True)
class Line:
    """A name, and its value at each of the span's times; of STAT and BARS the one value, of TABLE one a column."""

    name: str
    values: Sequence[float]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class Seen:
    """A chart, and what there is to be drawn of it."""

    chart: Chart
    lines: Sequence[Line]

    @property
    def is_empty(self) -> bool:
        return not any(line.finite for line in self.lines)

    @property
    def is_zero(self) -> bool:
        """Nothing of what it counts happened."""
        return self.chart.kind in (Kind.TIMESERIES, Kind.HEATMAP) and not any(
            map(any, (line.finite for line in self.lines))
        )


@dataclass(frozen=True)
class Part:
    """A row of a dashboard."""

    title: str
    seen: Sequence[Seen]


@dataclass(frozen=True)
class Section:
    """A dashboard; `model`: the one that it is about."""

    dashboard: Dashboard
    parts: Sequence[Part]
    model: str = ""


@dataclass(frozen=True)
class Alert:
    """`end`: None while it fires."""

    name: str
    severity: str
    about: str
    start: float
    end: float | None


@dataclass(frozen=True)
class History:
    """`models`: all, the busiest first."""

    span: Span
    models: Sequence[str]
    sections: Sequence[Section]
    alerts: Sequence[Alert]

    @property
    def overview(self) -> Section:
        return self.sections[0]


def history(prometheus: Prometheus, *, whole: bool) -> History:
    """Raises as Prometheus' methods do. `whole`: every dashboard, and not the overview alone."""
    busiest = [series.labels.get("model", "") for series in prometheus.now(BUSIEST)]
    models = [*busiest, *(name for name in _names(prometheus.now(KNOWN)) if name not in busiest)]
    sections = []
    for dashboard in DASHBOARDS if whole else (OVERVIEW,):
        of = models[:MOST_MODELS] if dashboard.of_one_model else [""]
        sections += [_section(prometheus, dashboard, model) for model in of]
    return History(prometheus.span, models, sections, _alerts(prometheus))


def _names(found: Sequence[Series]) -> list[str]:
    return sorted(series.labels.get("model", "") for series in found)


def _section(prometheus: Prometheus, dashboard: Dashboard, model: str) -> Section:
    parts = [
        Part(row.title, [Seen(chart, _lines(prometheus, chart, model)) for chart in row.charts])
        for row in dashboard.rows
    ]
    return Section(dashboard, parts, model)


def _lines(prometheus: Prometheus, chart: Chart, model: str) -> list[Line]:
    if chart.kind is Kind.TABLE:
        return _rows(prometheus, chart)
    ask = prometheus.series if chart.kind in OVER_TIME else prometheus.now
    found = [Line(series.name(query.legend), series.values) for query in chart.queries for series in ask(query, model)]
    return [line for line in found if line.finite]


def _rows(prometheus: Prometheus, chart: Chart) -> list[Line]:
    """A line for each model, with a value for each query."""
    columns = [
        {series.name("{{model}}"): series.values[0] for series in prometheus.now(query)} for query in chart.queries
    ]
    models = sorted({model for column in columns for model in column})
    return [Line(model, [column.get(model, math.nan) for column in columns]) for model in models]


def _alerts(prometheus: Prometheus) -> list[Alert]:
    found = [alert for series in prometheus.series(FIRED) for alert in _firings(series, prometheus.span)]
    return sorted(found, key=lambda alert: alert.start)


def _firings(series: Series, span: Span) -> Iterator[Alert]:
    about = ", ".join(f"{name} {value}" for name, value in sorted(series.labels.items()) if name not in APART)
    at = 0
    for fires, same in groupby(not math.isnan(value) for value in series.values):
        count = len(list(same))
        if fires:
            goes_on = at + count == len(series.values)
            yield Alert(
                series.labels["alertname"],
                series.labels.get("severity", ""),
                about,
                span.times[max(0, at - 1)],
                None if goes_on else span.times[at + count - 1],
            )
        at += count
