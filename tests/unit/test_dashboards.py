"""The dashboards: generated from their code, valid for Grafana, and about metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boards
import pytest
import yaml
from boards import Query, filled_in
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from repository import ROOT

#: of Grafana's @grafana/data, valueFormats/categories.ts
UNITS = {"short", "percentunit", "cps", "reqps", "pps", "ops", "s", "bytes", "bool_yes_no"}
UNITS |= {"dateTimeAsIso", "dateTimeFromNow"}
#: what Prometheus adds to every series, or may add (docs/monitoring.md)
TARGET_LABELS = {"cluster", "job", "instance", "node"}
#: Grafana's own variables
BUILT_IN = {"__range", "__interval", "__rate_interval", "__rate_interval_ms", "__url_time_range", "__data", "__field"}

register_default_plugins()
EACH = pytest.mark.parametrize("board", boards.boards().values(), ids=boards.boards())


def test_generated_files_match_the_code(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "dashboards/build.py", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / "dashboards/grafana").iterdir()}
    assert made == kept, "dashboards/grafana is stale: `make dashboards`"


# ---- valid for Grafana ----


@EACH
def test_grafanas_types_lose_nothing(board: dict[str, Any]) -> None:
    """The SDK's types come from Grafana's schemas; what they do not know would be lost in conversion."""
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert again == board


@EACH
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height, "no holes"


@EACH
def test_panels_are_complete(board: dict[str, Any]) -> None:
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    for panel in panels:
        assert panel["title"] and len(panel["description"]) > 10, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] in {"stat", "table", "text", "timeseries"}
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(letters)) == len(letters) and (letters or panel["type"] == "text")
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"]
            assert bool(target.get("instant")) == (panel["type"] in {"stat", "table"})
        for unit in _units(panel):
            assert unit in UNITS, f"{panel['title']}: Grafana has no unit {unit}"
        assert list(_units(panel)) or panel["type"] == "text", f"{panel['title']} has no unit"


def _units(panel: dict[str, Any]) -> Iterator[str]:
    config = panel.get("fieldConfig", {"defaults": {}, "overrides": []})
    if "unit" in config["defaults"]:
        yield config["defaults"]["unit"]
    for override in config["overrides"]:
        yield from (each["value"] for each in override["properties"] if each["id"] == "unit")


@EACH
def test_columns_that_a_table_refers_to_exist(board: dict[str, Any]) -> None:
    """These are the columns that are renamed, overridden, filtered or sorted."""
    for panel in board["panels"]:
        if panel["type"] != "table":
            continue
        steps = {each["id"]: each["options"] for each in panel["transformations"]}
        values = {f"Value #{target['refId']}" for target in panel["targets"]}
        renamed = steps["organize"]["renameByName"]
        assert set(renamed) == values
        columns = set(steps["organize"]["indexByName"]) - values | set(renamed.values())
        used = {each["matcher"]["options"] for each in panel["fieldConfig"]["overrides"]}
        used |= {each["fieldName"] for each in steps.get("filterByValue", {"filters": []})["filters"]}
        used |= {each["displayName"] for each in panel["options"].get("sortBy", ())}
        assert used <= columns
        for target in panel["targets"]:
            labels = re.search(r"\bby \(([^)]*)\)", target["expr"])
            assert labels and set(labels[1].split(", ")) == columns - set(renamed.values()), "rows would not meet"


@EACH
def test_links_and_variables_refer_to_existing_ones(board: dict[str, Any]) -> None:
    known = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "cluster", "node", "instance"} <= known
    text = json.dumps(board["panels"])
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used - BUILT_IN <= known
    assert known - {"datasource"} <= used, "a variable that chooses nothing"
    for uid, query in re.findall(r'"/d/([\w-]+)\?([^"]*)"', text):
        there = {variable["name"] for variable in boards.boards()[uid]["templating"]["list"]}
        given = set(re.findall(r"\$\{(\w+):queryparam\}", query)) | set(re.findall(r"\bvar-(\w+)=", query))
        assert given <= there, f"{uid} has no variables {given - there}"
        assert "datasource" in given and "${__url_time_range}" in query


def test_every_dashboard_is_linked_from_another() -> None:
    for uid, board in boards.boards().items():
        (link,) = board["links"]
        assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == (
            "dashboards",
            ["udpwatch"],
            True,
            True,
        )
        assert "udpwatch" in board["tags"]
        assert len(uid) <= 40, "Grafana's limit"
    clicked = "".join(json.dumps(board["panels"]) for board in boards.boards().values())
    assert {"udpwatch-server", "udpwatch-agent"} == set(re.findall(r"/d/([\w-]+)\?", clicked))


# ---- metrics ----


def exported() -> dict[str, set[str]]:
    """Return the labels of each metric, as the agent exports them."""
    found: dict[str, set[str]] = {}
    for name in ("metrics", "dns-metrics"):
        text = (ROOT / f"tests/golden/{name}.txt").read_text()
        for metric, labels in re.findall(r"^(udpwatch_\w+?)(?:\{(.*)\})? ", text, re.MULTILINE):
            found.setdefault(metric, set()).update(re.findall(r'(\w+)="', labels))
    for name in ("resident_memory_bytes", "start_time_seconds", "cpu_seconds_total", "open_fds", "max_fds"):
        found[f"process_{name}"] = set()
    return found | {"up": set()}


EXPORTED = exported()
QUERIES = [*boards.of_panels(), *boards.of_alerts(), *boards.of_documents()]
#: words of PromQL before a bracket or brace that name no metric
METRIC = re.compile(r"\b(udpwatch_\w+|process_\w+|up)\b(?:\s*\{([^}]*)\})?")


@pytest.mark.parametrize("query", QUERIES, ids=[each.where for each in QUERIES])
def test_metrics_and_labels_are_exported_by_the_agent(query: Query) -> None:
    known = set(TARGET_LABELS)
    asked = METRIC.findall(query.expression)
    assert asked, query
    for metric, matchers in asked:
        assert metric in EXPORTED, f"no metric {metric}"
        labels = EXPORTED[metric] | TARGET_LABELS
        known |= labels
        given = set(re.findall(r"(\w+)\s*[=!]", matchers))
        assert given <= labels, f"{metric} has no labels {given - labels}"
    for labels in re.findall(r"\b(?:by|on|without|ignoring|group_left|group_right) \(([^)]*)\)", query.expression):
        given = set(re.findall(r"\w+", labels))
        assert given <= known, f"nothing in it has labels {given - known}"


@EACH
def test_legends_use_labels_that_the_query_keeps(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            kept = re.search(r"\bby \(([^)]*)\)", target["expr"])
            labels = set(kept[1].split(", ")) if kept and not target["expr"].startswith("process") else TARGET_LABELS
            assert named <= labels, f"{panel['title']}: {named - labels}"


def test_metrics_named_in_the_docs_exist() -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in EXPORTED} | set(EXPORTED)
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for name, more in re.findall(r"\b(udpwatch_[a-z_0-9]+)(\*?)", page.read_text()):
            assert name in families or (more and any(each.startswith(name) for each in families)), f"{page}: {name}"


@pytest.mark.parametrize("checked", ["replies", "flows"])
def test_shares_are_relative_to_checked_replies(checked: str, tmp_path: Path) -> None:
    """The share is one in ten, also for an agent with `hooks = "function"`, which checks flows and no replies."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is missing: apt-get install prometheus")
    of = '{cluster="east", node="worker-1", instance="10.0.0.1:9953", job="udpwatch"'
    series = {
        f"udpwatch_build_info{of}}}": "1x180",
        f'udpwatch_reply_source_mismatch_total{of}, process="openvpn", port="1194"}}': "0+120x180",
        f"udpwatch_replies_checked_total{of}}}": "0x180",
        f"udpwatch_flows_checked_total{of}}}": "0x180",
    }
    series[f"udpwatch_{checked}_checked_total{of}}}"] = "0+1200x180"
    shares = [each for each in boards.of_panels() if re.search(r"mismatch_total.* / .*_checked_total", each.expression)]
    assert len(shares) == 4
    cases = [
        {
            "expr": f"round(sum({filled_in(each.expression, {}, 3600, 60, 240)}), 0.001)",
            "eval_time": "150m",
            "exp_samples": [{"labels": "{}", "value": 0.1}],
        }
        for each in shares
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": cases}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_every_expression_is_promql(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is missing: apt-get install prometheus")
    filled = [filled_in(query.expression, {}, 3600, 15, 60) for query in QUERIES]
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(filled)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=none", tmp_path / "rules.yaml"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
