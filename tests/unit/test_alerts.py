"""The alert rules: valid for Prometheus' own tool, and each has a runbook page and test cases."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import boards
import pytest
import yaml
from repository import DOCS

from udpwatch.agent.cli import parse
from udpwatch.agent.model import HARMFUL_REFUSALS

HERE = Path(__file__).resolve().parent
CASES = HERE / "alerts_test.yaml"
RUNBOOKS = DOCS / "runbooks"
NAMES = [rule["alert"] for rule in boards.rules()]


def promtool(*arguments: str) -> None:
    """Run promtool; an error fails the test."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is missing: apt-get install prometheus")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_are_valid() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(boards.ALERTS))


def test_documented_scrape_configuration_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```yaml\n(scrape_configs:.*?)```", (RUNBOOKS.parent / "monitoring.md").read_text(), re.DOTALL
    )
    shutil.copy(boards.ALERTS, tmp_path)
    (tmp_path / "prometheus.yml").write_text(block)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


def test_alerts_fire_in_their_cases_and_in_no_others() -> None:
    promtool("test", "rules", str(CASES))


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(NAMES)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(NAMES)


@pytest.mark.parametrize("rule", boards.rules(), ids=NAMES)
def test_each_alert_says_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    name = rule["alert"]
    assert re.fullmatch(r"Udpwatch([A-Z][a-z]+)+", str(name))
    assert rule["labels"] in [{"severity": severity} for severity in ("info", "warning", "critical")]
    assert rule["for"]
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"docs/runbooks/{name}.md"
    assert re.search(r"\b(First|log)\b", notes["description"])
    assert not notes["summary"].endswith("."), "a heading"


def test_each_alert_has_a_page_and_each_page_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README", "SwitchHealingOff"} == set(NAMES)
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", (RUNBOOKS / "README.md").read_text(), re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in boards.rules()]


def test_alert_of_refusals_knows_those_that_can_leave_a_wrong_reply() -> None:
    (rule,) = [rule for rule in boards.rules() if rule["alert"] == "UdpwatchHealRefused"]
    assert re.findall(r'reason=~"(.*?)"', rule["expr"]) == ["|".join(HARMFUL_REFUSALS)]
    page = (RUNBOOKS / "UdpwatchHealRefused.md").read_text()
    assert re.findall(r"^- `([\w-]+)`:", page.partition("## Mitigation")[0], re.MULTILINE) == list(HARMFUL_REFUSALS)


@pytest.mark.parametrize("name", ["UdpwatchHealRefused", "UdpwatchHealing"])
def test_pages_on_healing_name_the_kill_switch(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text().partition("## Mitigation")[2]
    assert "`udpwatch heal off`" in page
    assert "kubectl -n udpwatch exec POD --" in page


@pytest.mark.parametrize("name", NAMES)
def test_each_page_has_all_sections(name: str) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert "```sh\n" in page.partition("## Diagnosis")[2], "exact commands"


def commands() -> list[str]:
    """Find all udpwatch commands that a runbook, an alert or a dashboard names."""
    blocks = [
        block for page in RUNBOOKS.glob("*.md") for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    ]
    typed = [line for block in blocks for line in block.splitlines()]
    typed += [word for rule in boards.rules() for word in re.findall(r"`(.+?)`", rule["annotations"]["description"])]
    panels = [panel for board in boards.boards().values() for panel in board["panels"] if panel["type"] == "text"]
    typed += [line for panel in panels for line in panel["options"]["content"].splitlines()]
    found = [re.search(r"(?:^\s*|-- )udpwatch (.*?)\s*(?:#.*)?$", line) for line in typed]
    return sorted({each[1] for each in found if each})


@pytest.mark.parametrize("command", commands())
def test_commands_on_the_pages_are_accepted(command: str) -> None:
    filled = re.sub(r"\$\{port:text\}|\{\{ \$labels\.port \}\}|\bPORT\b", "53", command)
    assert "{" not in filled and "$" not in filled
    parse(filled.split())
