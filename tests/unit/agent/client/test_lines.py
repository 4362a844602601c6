"""The lines of `udpwatch events`: one for each event, in columns that stay aligned."""

from __future__ import annotations

import json
from datetime import UTC
from typing import Any

from golden import compare
from repository import GOLDEN

from udpwatch.agent.client.lines import EventLines, server_of

EVENTS: list[dict[str, Any]] = [json.loads(line) for line in (GOLDEN / "events.jsonl").read_text().splitlines()]
EVENT = EVENTS[0]


def test_golden_lines() -> None:
    events = [
        *EVENTS,
        EVENT | {"process": "openvpn", "pod": None, "namespace": None, "container": None, "port": 1194},
        EVENT | {"process": "unbound", "pod": None, "container": "dns", "port": 53},
        EVENT | {"expected": "2001:db8:1:2:3:4:5:6", "actual": "2001:db8:1:2:3:4:5:7", "peer": "2001:db8::9"},
        EVENT | {"cause": "explicit", "verdict": "untracked", "port": 53},
    ]
    lines = EventLines(False, UTC)
    shown = [lines.line(event) for event in events]
    again = [lines.line(event) for event in events]
    compare("event-lines.txt", "\n".join([*shown, "", lines.head(), *again]) + "\n")


def test_line_of_short_addresses_fits_80_columns() -> None:
    lines = EventLines(False, UTC)
    event = EVENT | {"process": "openvpn", "pod": None, "container": None, "port": 1194}
    assert len(lines.line(event)) <= 80


def test_columns_stay_aligned() -> None:
    lines = EventLines(False, UTC)
    for event in EVENTS:
        lines.line(event)
    starts = {lines.line(event).index("->") for event in EVENTS} | {lines.head().index("->")}
    assert len(starts) == 1


def test_colour_moves_no_column() -> None:
    plain, painted = EventLines(False, UTC), EventLines(True, UTC)
    for event in EVENTS:
        bare = plain.line(event)
        coloured = painted.line(event)
        assert "\x1b" not in bare
        for style in ("1", "2", "31", "32", "33", "0"):
            coloured = coloured.replace(f"\x1b[{style}m", "")
        assert coloured.rstrip() == bare


def test_source_of_a_healed_reply_is_not_shown_as_wrong() -> None:
    healed = EVENTS[3]
    shown = EventLines(True, UTC).line(healed)
    assert f"-> \x1b[32m{healed['actual']}\x1b[0m" in shown
    assert "\x1b[32mhealed\x1b[0m" in shown
    assert "\x1b[31m" not in shown


def test_server_has_process_and_place() -> None:
    assert server_of(EVENT) == "plain-server@shop/dns-7c9"
    assert server_of(EVENTS[2]) == "via vnet3"
    assert server_of(EVENT | {"pod": None, "namespace": None}) == "plain-server@dns"
    assert server_of(EVENT | {"namespace": None}) == "plain-server@dns-7c9"
    assert server_of({"process": "openvpn"}) == "openvpn"
    assert server_of({"pod": "x"}) == "-@x"
    assert server_of({}) == "-"


def test_control_characters_in_names_are_escaped() -> None:
    nasty = "\x1b[2J\r\n\u202e[red]x"
    line = EventLines(False, UTC).line(dict.fromkeys(EVENT, nasty))
    assert line.isprintable()
    assert "[red]x" in line


def test_missing_fields_are_dashes() -> None:
    assert EventLines(False, UTC).line({}).count("-") == 8 + 1  # of "->"
