"""The queries of the dashboards, the alert rules and the docs, with variables filled in as Grafana does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from repository import ROOT

DASHBOARDS = sorted((ROOT / "dashboards/grafana").glob("*.json"))
ALERTS = ROOT / "dashboards/alerts.yaml"


@dataclass(frozen=True)
class Query:
    """One query and its place: `udpwatch-fleet/Nodes/A` or `alert/UdpwatchAgentDown`."""

    where: str
    expression: str
    instant: bool = True


def boards() -> dict[str, dict[str, Any]]:
    """Return the generated dashboards by uid."""
    loaded = [json.loads(path.read_text()) for path in DASHBOARDS]
    return {each["uid"]: each for each in loaded}


def of_panels() -> Iterator[Query]:
    """Yield the queries of all panels."""
    for uid, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                where = f"{uid}/{panel['title']}/{target['refId']}"
                yield Query(where, target["expr"], bool(target.get("instant")))


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def of_alerts() -> Iterator[Query]:
    """Yield the queries of all alert rules."""
    for rule in rules():
        yield Query(f"alert/{rule['alert']}", rule["expr"])


def of_documents() -> Iterator[Query]:
    """Yield the queries in the docs' ```promql blocks: one for each line, without comments."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```promql\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
            for number, line in enumerate(lines):
                yield Query(f"{page.relative_to(ROOT)}/{number}", line)


def of_variables() -> Iterator[tuple[str, str, str]]:
    """Yield (where, label, selector) of each variable: Grafana queries the values of that label in these series."""
    for uid, board in boards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert found, variable["query"]
                yield f"{uid}/${variable['name']}", found[2], found[1]


def filled_in(expression: str, chosen: Mapping[str, Sequence[str]], range_s: int, step_s: int, rate_s: int) -> str:
    """Return the query as Grafana sends it. `chosen` has the selected values of variables; others are at All, `.*`.
    Several values become a regular expression in which each is escaped.
    """
    times = {
        "__range": f"{range_s}s",
        "__interval": f"{step_s}s",
        "__rate_interval": f"{rate_s}s",
        "__rate_interval_ms": str(rate_s * 1000),
    }

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name in times:
            return times[name]
        assert not name.startswith("__"), f"Grafana has no ${name}, or this test does not know it"
        if name not in chosen:
            return ".*"
        escaped = [_escaped(each) for each in chosen[name]]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return re.sub(r"\$(\w+)", value, expression)


def _escaped(text: str) -> str:
    """Escape a text for a regular expression in a PromQL string."""
    return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", text.replace("\\", "\\" * 4))
