"""docs/event.schema.json: every event of the agent is valid, a broken one is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from golden import EVENTS
from jsonschema import Draft202012Validator
from repository import DOCS, GOLDEN

from udpwatch.agent.daemon.event_log import as_json
from udpwatch.agent.model import Cause, Sender, Verdict

SCHEMA = json.loads((DOCS / "event.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)
LINES: list[dict[str, Any]] = [json.loads(line) for line in (GOLDEN / "events.jsonl").read_text().splitlines()]


def test_schema_is_valid() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("event", LINES, ids=lambda event: event["verdict"] + " " + event["cause"])
def test_golden_events_are_valid(event: dict[str, Any]) -> None:
    VALIDATOR.validate(event)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event.finding.verdict} {event.finding.cause}")
@pytest.mark.parametrize(
    "sender",
    [Sender(""), Sender("a", 1, "/b", "c", "/d", "docker", "e", "f", "g", "h")],
    ids=["unknown sender", "every field"],
)
def test_event_of_any_sender_is_valid(event: Any, sender: Sender) -> None:
    if event.finding.cause == Cause.FORWARDED and sender.process:
        return  # another machine's has none here
    VALIDATOR.validate(as_json(event, sender, "node-1", 1_800_000_000.123))


def test_schema_has_every_verdict_and_cause() -> None:
    assert SCHEMA["properties"]["verdict"]["enum"] == [str(verdict) for verdict in Verdict]
    assert SCHEMA["properties"]["cause"]["enum"] == [str(cause) for cause in Cause]
    for cause in set(Cause) - {Cause.FORWARDED}:
        event = replace(EVENTS[0], finding=replace(EVENTS[0].finding, cause=cause))
        VALIDATOR.validate(as_json(event, Sender("x", 1), "node-1", 0.0))


def test_keys_have_the_order_of_the_events() -> None:
    assert list(SCHEMA["properties"]) == list(LINES[0]) == SCHEMA["required"]


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"expected": "localhost"},
        {"actual": "300.1.1.1"},
        {"port": 65536},
        {"port": "53"},
        {"port": True},
        {"time": "2027-01-15 08:00:00"},
        {"verdict": "right"},
        {"cause": "forwarded"},
        {"interface": "eth0"},
        {"pid": 0},
        {"process": ""},
        {"count": 0},
        {"healed": None},
        {"healed": True},
        {"verdict": "healed"},
        {"conntrack": None},
        {"conntrack": {"original": None, "reply": None}},
        {"conntrack": {"original": {"source": "10.0.0.1"}, "reply": None, "request": None}},
    ],
    ids=str,
)
def test_broken_event_is_invalid(change: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(LINES[0] | change)


@pytest.mark.parametrize("key", LINES[0])
def test_event_without_a_key_is_invalid(key: str) -> None:
    assert not VALIDATOR.is_valid({name: value for name, value in LINES[0].items() if name != key})
