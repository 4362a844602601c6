"""The lines above the table of `udpwatch top`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from top_snapshots import NOW, healed_row, row, view

from udpwatch.agent.client.top.banner import SourceState, banner, spark
from udpwatch.agent.client.top.layout import plain
from udpwatch.agent.client.top.rows import View
from udpwatch.agent.model import Healing


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "total 1   findings 1   lost 0"),
        ({"other": 3, "lost": {"queue": 2}}, "total 4   findings 1   other 3   lost 2"),
    ],
    ids=["in rows", "in no row"],
)
def test_totals_of_a_node(changes: dict[str, Any], told: str) -> None:
    lines = banner(view(0, row(count=1), **changes), SourceState("test", NOW), None, 100)
    assert told in "".join(text for text, _ in lines[1])


def test_healed_replies_are_no_findings() -> None:
    lines = banner(view(0, row(count=2), healed_row(count=9)), SourceState("test", NOW), None, 100)
    assert "total 2   findings 1   lost 0" in plain(lines[1])


@pytest.mark.parametrize(
    ("healing", "told"),
    [
        (None, "healed 9 replies of 2 servers"),
        (Healing("port 69", True, False), "healed 9 replies of 2 servers"),
        (
            Healing("port 69", True, False, refused={"several-addresses": 3, "not-local": 4, "group": 9}),
            "healed 9 replies of 2 servers, refused 7",
        ),
        (Healing("port 69", False, False), "heal: off, healed 9 replies of 2 servers"),
        (
            Healing("port 69", True, True, dry_run_replies=5),
            "heal: dry run, 5 would be healed, healed 9 replies of 2 servers",
        ),
        (Healing("port 69", True, False, reason="no hook"), "heal: does not work (?), healed 9 replies of 2 servers"),
    ],
)
def test_banner_says_what_is_healed(healing: Healing | None, told: str) -> None:
    seen = view(0, row(), healed_row(count=4), healed_row(count=2, expected="10.0.0.9"), healed_row("x", count=3))
    seen = replace(seen, snapshots=(replace(seen.snapshots[0], healing=healing),))
    assert plain(banner(seen, SourceState("test", NOW), None, 120)[2]).endswith(told)
    for width in (80, 60, 40):
        assert len(plain(banner(seen, SourceState("test", NOW), None, width)[2])) <= width


def test_banner_says_nothing_of_healing_where_it_is_not_enabled() -> None:
    assert "heal" not in state(view(0, row()))
    off = view(0, row(), healing=Healing("nothing", False, False))
    assert plain(banner(off, SourceState("test", NOW), None, 80)[2]).endswith("heal: off")


def test_sparkline_has_the_newest_rate_at_the_right() -> None:
    bars, peak = spark([(NOW - 150, 1.0), (NOW, 4.0)], NOW, 10)
    assert peak == 4.0
    assert bars[-1] == "█"
    assert bars.startswith("    ")
    assert spark([], NOW, 10) == (" " * 10, 0.0)
    assert spark([], NOW, 0) == ("", 0.0)


def test_sparkline_is_flat_without_wrong_replies() -> None:
    bars, peak = spark([(NOW - second, 0.0) for second in range(60, 0, -1)], NOW, 50)
    assert (set(bars.strip()), peak) == ({"▁"}, 0.0)


def state(seen: View | None, **changes: Any) -> str:
    lines = banner(seen, replace(SourceState("/run/a.sock", NOW + 1), **changes), None, 80)
    return "\n".join(map(plain, lines))


def test_banner_shows_the_state_of_the_connection() -> None:
    good = view(0, row())
    assert "● 1s ago" in state(good)
    assert "paused at " in state(good, paused=NOW)
    assert "not connected: retrying, data is 1s old" in state(good, error="Connection refused")
    assert "Connection refused" in state(good, error="Connection refused")
    assert "/run/a.sock" in state(None)
    assert "not ready" in state(view(0, row(), ready=False))
    assert "2 nodes" in state(replace(good, cluster=True, snapshots=good.snapshots * 2))


def test_banner_shows_the_counts() -> None:
    text = state(view(0, row(count=3), other=4, lost={"queue": 2, "output": 3}))
    for fact in ("total 7", "other 4", "findings 1", "lost 5"):
        assert fact in text
