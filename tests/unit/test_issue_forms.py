"""The issue forms are valid for GitHub, and name commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

from udpwatch.agent import cli

FOLDER = ROOT / ".github/ISSUE_TEMPLATE"
FORMS = sorted(FOLDER.glob("*.yaml"))
INPUTS = {"checkboxes", "dropdown", "input", "textarea"}


def load(form: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(form.read_text())
    return content


def test_there_is_a_form_for_each_kind_of_issue() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature", "finding"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_form_follows_githubs_schema(form: Path) -> None:
    content = load(form)
    assert {"name", "description", "body"} <= content.keys() <= {"name", "description", "labels", "body"}
    questions = [part for part in content["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in questions} <= INPUTS
    assert len({part["id"] for part in questions}) == len(questions)
    for part in questions:
        assert part.keys() <= {"type", "id", "attributes", "validations"}
        assert part["attributes"]["label"]
        assert all(isinstance(option, str) for option in part["attributes"].get("options", ()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_commands_in_form_are_accepted(form: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(r"`udpwatch ([^`]+)`", form.read_text()):
        command, *flags = line.split()
        assert cli.main([command, "--help"]) == 0, line
        text = capsys.readouterr().out
        assert all(flag in text for flag in flags if flag.startswith("--")), line
