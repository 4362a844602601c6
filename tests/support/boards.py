"""What the dashboards and the alert rules ask of Prometheus, and how Grafana puts its variables in."""

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
class Question:
    """One expression, and where it stands: `udpwatch-fleet/Nodes/A` or `alert/UdpwatchAgentDown`."""

    where: str
    expression: str
    instant: bool = True


def boards() -> dict[str, dict[str, Any]]:
    """The generated dashboards, by uid."""
    loaded = [json.loads(path.read_text()) for path in DASHBOARDS]
    return {each["uid"]: each for each in loaded}


def of_panels() -> Iterator[Question]:
    """What all panels ask."""
    for uid, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                where = f"{uid}/{panel['title']}/{target['refId']}"
                yield Question(where, target["expr"], bool(target.get("instant")))


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def of_alerts() -> Iterator[Question]:
    """What all alert rules ask."""
    for rule in rules():
        yield Question(f"alert/{rule['alert']}", rule["expr"])


def of_documents() -> Iterator[Question]:
    """The ```promql blocks of the documents: one question a line or paragraph, comments aside."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```promql\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
            for number, line in enumerate(lines):
                yield Question(f"{page.relative_to(ROOT)}/{number}", line)


def of_variables() -> Iterator[tuple[str, str, str]]:
    """(where, label, selector) of each variable: Grafana asks for the values of that label among these series."""
    for uid, board in boards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert found, variable["query"]
                yield f"{uid}/${variable['name']}", found[2], found[1]


def filled_in(expression: str, chosen: Mapping[str, Sequence[str]], range_s: int, step_s: int, rate_s: int) -> str:
    """As Grafana sends it: `chosen` has the values of the variables, what is not in it is at All, `.*`.

    A variable that allows several values becomes a regular expression of them, each escaped.
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
    """For a regular expression within a string of PromQL."""
    return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", text.replace("\\", "\\" * 4))
