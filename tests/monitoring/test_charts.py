"""Every query of every chart, asked of a real Prometheus."""

import math
import re

import pytest

from scripts.write_dashboards import FOLDER, dashboard_json
from vllm_unified.monitoring.charts import DASHBOARDS, Chart, Dashboard, Kind, Query
from vllm_unified.monitoring.prometheus import Prometheus
from vllm_unified.monitoring.units import UNITS

QUERIES = [
    pytest.param(chart, query, id=f"{dashboard.name}-{chart.title}-{at}".replace(" ", "_"))
    for dashboard in DASHBOARDS
    for chart in dashboard.charts()
    for at, query in enumerate(chart.queries)
]


@pytest.mark.parametrize(("chart", "query"), QUERIES)
def test_no_panel_is_empty_and_no_label_missing(asked: Prometheus, chart: Chart, query: Query) -> None:
    of_now, over_time = asked.now(query, "chat"), asked.series(query, "chat")
    assert of_now
    assert any(math.isfinite(value) for series in of_now for value in series.values)
    assert any(math.isfinite(value) for series in over_time for value in series.values)
    legend = "{{model}}" if chart.kind is Kind.TABLE else query.legend
    wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
    for series in of_now:
        assert wanted <= set(series.labels), series.labels  # Prometheus leaves empty ones out
    names = [series.name(legend) for series in of_now]
    assert len(set(names)) == len(names), "two lines of one name"


def test_dashboards_are_as_written() -> None:
    for dashboard in DASHBOARDS:
        written = (FOLDER / f"{dashboard.name}.json").read_text(encoding="utf-8")
        assert written == dashboard_json(dashboard), "run scripts/write_dashboards.py"
    assert {path.stem for path in FOLDER.glob("*.json")} == {dashboard.name for dashboard in DASHBOARDS}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_charts_say_what_they_show(dashboard: Dashboard) -> None:
    charts = list(dashboard.charts())
    assert len({(chart.title, chart.kind) for chart in charts}) == len(charts)
    for chart in charts:
        assert chart.unit in UNITS
        assert chart.description.endswith(".")
        assert all(query.unit in UNITS for query in chart.queries)
        of_one = ["$model" in query.expr for query in chart.queries]
        assert all(of_one) if dashboard.of_one_model else not any(of_one), chart.title
