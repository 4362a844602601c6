"""Shared parts of the dashboards: variables, links, kinds of panel, expressions that need care.

Rule 1: a panel has a title, a description for an on-call engineer, a unit, and the selected data source.
Rule 2: every expression is restricted to SCOPE, so that a selection at the top applies to the whole dashboard.
Rule 3: a Prometheus may or may not add the labels `cluster` and `node` (docs/monitoring.md); `instance` always exists.
The selection All is the matcher `.*`, which also accepts a missing label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from grafana_foundation_sdk.builders import common, prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel = stat.Panel | table.Panel | text.Panel | timeseries.Panel
#: (expression, legend)
Query = tuple[str, str]

FLEET, SERVER, RESPONDER, AGENT = "udpwatch-fleet", "udpwatch-server", "udpwatch-dns", "udpwatch-agent"
TAG = "udpwatch"
DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

SCOPE = 'cluster=~"$cluster", node=~"$node", instance=~"$instance"'
WHERE = "cluster, node, instance"
#: as a legend
WHERE_LEGEND = "{{cluster}} {{node}} {{instance}}"
#: identifies one agent among the targets of a Prometheus
TARGET = "cluster, job, instance"
MISMATCH = "udpwatch_reply_source_mismatch_total"
HEALED = "udpwatch_healed_replies_total"
REFUSED = "udpwatch_heal_refused_total"
SERVER_LABELS = "namespace, pod, container, process, port"
FINDING_LABELS = f"{SERVER_LABELS}, expected, actual, verdict, cause"
AGENTS = f"udpwatch_build_info{{{SCOPE}}}"

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
Steps = Sequence[tuple[float, str]]


# ---- expressions ----


def grown(selector: str, window: str) -> str:
    """Return by how much counters grew within a window, including counters that started or ended in it.

    A finding's counter starts with its first value, often 1, which increase() does not see. It ends with its pod.
    """
    return f"({_born(selector, window)} or increase({selector}[{window}]))"


def per_second(selector: str) -> str:
    """Return the same as `grown` per second.

    Counters of an agent that Prometheus did not scrape a window ago are left out: they only look new.
    """
    window = "$__rate_interval"
    born = f"{_born(selector, window)} and on ({TARGET}) {AGENTS} offset {window}"
    return f"({born} or increase({selector}[{window}])) * 1000 / $__rate_interval_ms"


def _born(selector: str, window: str) -> str:
    return f"(max_over_time({selector}[{window}]) unless {selector} offset {window})"


def rate(selector: str) -> str:
    """Return the rate of counters that exist from an agent's start."""
    return f"rate({selector}[$__rate_interval])"


def increase(selector: str) -> str:
    """Return the increase within the selected time of counters that exist from an agent's start."""
    return f"increase({selector}[$__range])"


def share(wrong: str, over: Callable[[str], str], by: str = "") -> str:
    """Return the share among checked replies and flows; an agent with `hooks = "function"` checks only flows."""
    checked = (f"udpwatch_{what}_checked_total{{{SCOPE}}}" for what in ("replies", "flows"))
    return f"{wrong} / ({' + '.join(f'sum{by} ({over(each)})' for each in checked)} > 0)"


def count(expression: str) -> str:
    """Return the number of series: 0 if an agent exists and there are none, else no data."""
    return f"count({expression}) or 0 * count({AGENTS})"


def of_agents(selector: str) -> str:
    """Restrict a metric that other programs also have to the agents."""
    return f"{selector} and on ({TARGET}) {AGENTS}"


# ---- panels ----


def _queries(queries: Iterable[Query], instant: bool = False, as_table: bool = False) -> list[prometheus.Dataquery]:
    found = []
    for letter, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        query = prometheus.Dataquery().expr(expression).ref_id(letter).datasource(DATASOURCE)
        query = query.instant() if instant else query.range()
        if as_table:
            query = query.format(PromQueryFormat.TABLE)
        elif legend:
            query = query.legend_format(legend)
        found.append(query)
    return found


def _thresholds(steps: Steps, base: str = GREEN) -> builder.ThresholdsConfig:
    values = [model.Threshold(None, base), *(model.Threshold(value, color) for value, color in steps)]
    return builder.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(values)


def number(
    title: str,
    description: str,
    expression: str,
    unit: str = "short",
    steps: Steps = (),
    base: str = GREEN,
    width: int = 4,
    decimals: int | None = None,
) -> stat.Panel:
    """Return a panel with one number, coloured by its thresholds."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .no_value("no data")
        .thresholds(_thresholds(steps, base))
        .color_scheme(builder.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .span(width)
        .height(4)
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    return panel.targets(list(_queries([(expression, "")], instant=True)))


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = (),
    stacked: bool = False,
    width: int = 12,
    top: float | None = None,
    leads_to: tuple[str, str, str] | None = None,
) -> timeseries.Panel:
    """Return a panel with lines over time, and with its thresholds as dashed lines.

    `leads_to`: (title, dashboard, label) that a click on a line opens.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .color_scheme(builder.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
        .min(0)
        .fill_opacity(25 if stacked else 5)
        .show_points(kinds.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.TABLE)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
        .span(width)
        .height(8)
    )
    if all(expression.endswith("> 0") for expression, _ in queries):
        panel = panel.no_value("none")
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if top is not None:
        panel = panel.max(top)
    if leads_to:
        heading, uid, label = leads_to
        panel = panel.data_links([builder.DashboardLink(heading).url(link(uid, label, of="__field.labels"))])
    if steps:
        style = common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(steps)).thresholds_style(style)
    return panel.targets(list(_queries(queries)))


class Column:
    """A query of a table: heading and look of its values. Its labels are the other columns."""

    def __init__(self, heading: str, expression: str, unit: str = "short", steps: Steps = (), width: int = 130) -> None:
        self.heading, self.expression, self.unit, self.steps, self.width = heading, expression, unit, steps, width


def rows(
    title: str,
    description: str,
    labels: str,
    *columns: Column,
    links: Sequence[tuple[str, str]] = (),
    only: str = "",
    sort: str = "",
    width: int = 24,
    height: int = 9,
) -> table.Panel:
    """Return a table with a row for each set of labels and a column for each query.

    `only`: the column that must be above 0; `sort`: the column to sort by, largest first; `links`: (title, URL), from
    every cell with a label.
    """
    order = [*labels.split(", "), *(f"Value #{letter}" for letter, _ in zip("ABCDEFGH", columns, strict=False))]
    headings = {f"Value #{letter}": column.heading for letter, column in zip("ABCDEFGH", columns, strict=False)}
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .thresholds(_thresholds(()))
        .filterable(True)
        .targets(list(_queries([(each.expression, "") for each in columns], instant=True, as_table=True)))
        .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: position for position, name in enumerate(order)},
                    "renameByName": headings,
                },
            )
        )
        .span(width)
        .height(height)
    )
    if only:
        above_zero = {"id": "greater", "options": {"value": 0}}
        options = {"type": "include", "match": "all", "filters": [{"fieldName": only, "config": above_zero}]}
        panel = panel.with_transformation(model.DataTransformerConfig(id_val="filterByValue", options=options))
    if sort:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(True)])
    for column in columns:
        look: list[model.DynamicConfigValue] = [
            model.DynamicConfigValue("unit", column.unit),
            model.DynamicConfigValue("custom.width", column.width),
        ]
        if column.steps:
            steps = _thresholds(column.steps).build()
            look += [
                model.DynamicConfigValue("thresholds", steps.to_json()),
                model.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ]
        panel = panel.override_by_name(column.heading, look)
    if links:
        targets = [{"title": heading, "url": url} for heading, url in links]
        for label in labels.split(", "):
            panel = panel.override_by_name(label, [model.DynamicConfigValue("links", targets)])
    return panel


def words(title: str, content: str, width: int = 24, height: int = 4) -> text.Panel:
    """Return a panel with Markdown, in which Grafana replaces variables."""
    return (
        text.Panel()
        .title(title)
        .description("Commands to run next.")
        .datasource(DATASOURCE)
        .content(content)
        .span(width)
        .height(height)
    )


# ---- links ----


def link(uid: str, *labels: str, of: str = "__data.fields") -> str:
    """Return a link to another dashboard, with the same time and selection, and these labels of what was clicked."""
    kept = [name for name in ("datasource", "cluster", "node", "instance") if name not in labels]
    carried = [f"${{{name}:queryparam}}" for name in kept]
    clicked = [f"var-{label}=${{{of}.{label}:percentencode}}" for label in labels]
    return f"/d/{uid}?{'&'.join([*carried, *clicked])}&${{__url_time_range}}"


# ---- the dashboard around them ----


def _query_variable(name: str, label: str, description: str, metric: str, scope: str) -> builder.QueryVariable:
    query = f"label_values({metric}{{{scope}}}, {name})" if scope else f"label_values({metric}, {name})"
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return (
        builder.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def chosen(*names: str) -> str:
    """Return SCOPE with the matchers of these variables."""
    return ", ".join([SCOPE, *(f'{name}=~"${name}"' for name in names)])


def of_culprits(*names: str) -> list[builder.QueryVariable]:
    """Return variables for labels of wrong and healed replies; each offers the values that the previous ones leave."""
    texts = {
        "namespace": ("Namespace", "Namespace of the pod that sends wrong or healed replies."),
        "pod": ("Pod", "Pod that sends wrong or healed replies."),
        "process": ("Process", "Process that sends wrong or healed replies; empty for machines behind the node."),
        "port": ("Port", "UDP port of the server."),
    }
    of_both = f'__name__=~"{MISMATCH}|{HEALED}"'
    return [
        _query_variable(name, *texts[name], "", f"{of_both}, {chosen(*names[:position])}")
        for position, name in enumerate(names)
    ]


def board(
    uid: str,
    title: str,
    description: str,
    *content: builder.Row | Panel,
    variables: Sequence[builder.QueryVariable] = (),
    metric: str = "udpwatch_build_info",
) -> model.Dashboard:
    """Return a dashboard: its variables, links to the other dashboards, and its numbered panels.

    `metric`: a metric that all targets of this dashboard export.
    """
    made = (
        builder.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .time("now-6h", "now")
        .refresh("1m")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            builder.DashboardLink("udpwatch")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tooltip("The other dashboards, with the same selection")
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(builder.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    where = (
        ("cluster", "Cluster", "A label that Prometheus may add."),
        ("node", "Node", "A label that the scrape may add."),
        ("instance", "Agent", "The address that Prometheus scrapes."),
    )
    scope = ""
    for name, label, meaning in where:
        made = made.with_variable(_query_variable(name, label, meaning, metric, scope))
        scope = f'{scope}, {name}=~"${name}"'.removeprefix(", ")
    for variable in variables:
        made = made.with_variable(variable)
    for each in content:
        made = made.with_row(each) if isinstance(each, builder.Row) else made.with_panel(each)
    built = made.build()
    for number_, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number_
    return built
