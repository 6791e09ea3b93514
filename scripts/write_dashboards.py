"""Write Grafana's dashboards, monitoring/grafana/dashboards/*.json, from vllm_unified/monitoring/charts.py.

.venv/bin/python scripts/write_dashboards.py
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import bargauge, common, heatmap, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from vllm_unified.monitoring.charts import COLOURS, DASHBOARDS, MODEL, PREFIX, Chart, Colour, Dashboard, Kind, Query

FOLDER = Path(__file__).parents[1] / "monitoring" / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid=PREFIX)
COLUMNS = 24  # of Grafana's grid
ALL_CHARTS_OF_MODEL = f"/d/{MODEL.uid}?var-model=${{__value.text}}&${{__url_time_range}}"

Panel = timeseries.Panel | stat.Panel | table.Panel | bargauge.Panel | statetimeline.Panel | heatmap.Panel


def dashboard_json(dashboard: Dashboard) -> str:
    made = (
        grafana.Dashboard(f"{PREFIX}: {dashboard.title}")
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags([PREFIX])
        .readonly()
        .time("now-3h", "now")
        .refresh("30s")
        .timezone(options.TimeZoneBrowser)
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            grafana.DashboardLink("Dashboards")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([PREFIX])
            .keep_time(True)
            .include_vars(True)
        )
        .annotation(
            grafana.AnnotationQuery()
            .name("Alerts")
            .datasource(SOURCE)
            .enable(True)
            .icon_color(Colour.BAD)
            .expr('ALERTS{alertstate="firing"}')
        )
    )
    if dashboard.of_one_model:
        made.with_variable(
            grafana.QueryVariable("model")
            .label("Model")
            .datasource(SOURCE)
            .query({"query": "label_values(vllm_unified_model_ready, model)", "refId": "model"})
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
    for row in dashboard.rows:
        made.with_row(grafana.Row(row.title))
        for chart, width in zip(row.charts, widths(row.charts), strict=True):
            made.with_panel(panel(chart, width))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def widths(charts: Sequence[Chart]) -> Iterator[int]:
    """Numbers share a line, pictures stand two beside each other."""
    numbers = sum(chart.kind is Kind.STAT for chart in charts)
    for chart in charts:
        yield COLUMNS // numbers if chart.kind is Kind.STAT else COLUMNS if chart.kind is Kind.TABLE else COLUMNS // 2


def panel(chart: Chart, width: int) -> Panel:
    made = PANELS[chart.kind](chart)
    made.title(chart.title).description(chart.description).datasource(SOURCE).span(width).unit(chart.unit)
    made.thresholds(thresholds(chart)).min(0)
    if chart.top is not None:
        made.max(chart.top)
    if chart.states and chart.kind is not Kind.TABLE:  # whose first column alone is a state
        made.mappings([states(chart)])
    for ref_id, query in zip(ascii_uppercase, chart.queries, strict=False):
        made.with_target(target(chart, query, ref_id))
    return made


def target(chart: Chart, query: Query, ref_id: str) -> Dataquery:
    made = Dataquery().ref_id(ref_id).datasource(SOURCE).expr(query.expr).legend_format(query.legend)
    if chart.kind in (Kind.TABLE, Kind.BARS):
        made.instant()
    else:
        made.range()
    if chart.kind is Kind.TABLE:
        made.format(PromQueryFormat.TABLE)
    elif chart.kind is Kind.HEATMAP:
        made.format(PromQueryFormat.HEATMAP)
    return made


def thresholds(chart: Chart) -> grafana.ThresholdsConfig:
    steps = [Threshold(None, Colour.GOOD if chart.limits else "text")]
    if chart.limits:
        warning, bad = chart.limits
        if bad < warning:  # small values are bad
            steps = [Threshold(None, Colour.BAD), Threshold(bad, Colour.WARNING), Threshold(warning, Colour.GOOD)]
        elif bad == warning:
            steps.append(Threshold(bad, Colour.BAD))
        else:
            steps += [Threshold(warning, Colour.WARNING), Threshold(bad, Colour.BAD)]
    return grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def states(chart: Chart) -> ValueMap:
    return ValueMap(
        {
            str(value): ValueMappingResult(text=name, color=colour, index=at)
            for at, (value, name, colour) in enumerate(chart.states)
        }
    )


def lines(chart: Chart) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .height(8)
        .line_width(2)
        .fill_opacity(50 if chart.stacked else 8)
        .show_points(options.VisibilityMode.AUTO)
        .legend(bottom_legend())
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    )
    if chart.stacked:
        made.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL)).line_width(0)
    if chart.limits:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    for name, colour in COLOURS.items():
        if any(query.legend in ("{{code}}", "{{owner}}") for query in chart.queries):
            made.override_by_name(name, [fixed_colour(colour)])
    return made


def number(chart: Chart) -> stat.Panel:
    return (
        stat.Panel()
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE if chart.states else options.BigValueGraphMode.AREA)
        .text_mode(options.BigValueTextMode.VALUE)
        .no_value("–")
    )


def bars(_: Chart) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .height(8)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .value_mode(options.BarGaugeValueMode.TEXT)
    )


def timeline(_: Chart) -> statetimeline.Panel:
    return (
        statetimeline.Panel()
        .height(8)
        .show_value(options.VisibilityMode.NEVER)
        .fill_opacity(85)
        .line_width(0)
        .row_height(0.7)
        .legend(bottom_legend())
    )


def heat(chart: Chart) -> heatmap.Panel:
    return (
        heatmap.Panel()
        .height(8)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(chart.unit))
        .show_legend()
    )


def rows(chart: Chart) -> table.Panel:
    """A line for each model, from one query for each column."""
    names = {f"Value #{ref_id}": query.legend for ref_id, query in zip(ascii_uppercase, chart.queries, strict=False)}
    order = {name: at for at, name in enumerate(["model", *names])}
    made = (
        table.Panel()
        .height(9)
        .no_value("–")
        .with_transformation(DataTransformerConfig("merge", options={}))
        .with_transformation(
            DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": order,
                    "renameByName": {"model": "Model", **names},
                },
            )
        )
        .override_by_name(
            "Model", [DynamicConfigValue("links", [{"title": "All charts of this model", "url": ALL_CHARTS_OF_MODEL}])]
        )
    )
    for at, query in enumerate(chart.queries):
        if at == 0:
            coloured = {"type": "color-background", "mode": "basic"}
            made.override_by_name(
                query.legend,
                [DynamicConfigValue("custom.cellOptions", coloured), DynamicConfigValue("mappings", [states(chart)])],
            )
        else:
            digits = [DynamicConfigValue("decimals", 0)] if query.unit == "short" else []
            made.override_by_name(query.legend, [DynamicConfigValue("unit", query.unit), *digits])
    return made


def bottom_legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(options.LegendDisplayMode.LIST)
        .placement(options.LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def fixed_colour(colour: Colour) -> DynamicConfigValue:
    return DynamicConfigValue("color", {"mode": FieldColorModeId.FIXED, "fixedColor": colour})


PANELS: dict[Kind, Callable[[Chart], Panel]] = {
    Kind.TIMESERIES: lines,
    Kind.STAT: number,
    Kind.TABLE: rows,
    Kind.BARS: bars,
    Kind.TIMELINE: timeline,
    Kind.HEATMAP: heat,
}


def main() -> None:
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(dashboard_json(dashboard), encoding="utf-8")
    print(f"wrote {len(DASHBOARDS)} dashboards into {FOLDER}")


if __name__ == "__main__":
    main()
