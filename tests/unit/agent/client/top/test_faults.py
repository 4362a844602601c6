"""Faults of the nodes on the screen: which are shown, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from top_snapshots import NOW, row, view

from udpwatch.agent.client.top.banner import SourceState, banner
from udpwatch.agent.client.top.faults import faults_of
from udpwatch.agent.client.top.help import help_lines
from udpwatch.agent.client.top.layout import plain
from udpwatch.agent.client.top.text import as_json, table
from udpwatch.agent.model import NODE_FAULTS, UNWATCHED, ConntrackHealth, Memory

FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"node_faults": {"late_sample": 3}}, "late_sample", "3 samples taken more than 5 s"),
    ({"node_faults": {"memory": 1}}, "memory", "1 checks"),
    ({"node_faults": {"clock_step": 2}}, "clock_step", "2 times that the wall clock was set"),
    ({"node_faults": {"suspend": 1}}, "suspend", "1 times that the machine was suspended"),
    ({"unwatched": {"namespaces": 9000}}, "unwatched", "9000 network namespaces"),
    ({"unwatched": {"sockets": 7}}, "unwatched", "7 UDP sockets"),
    ({"memory": Memory(95 << 20, 100 << 20)}, "memory limit", "95 of 100 MB"),
    ({"conntrack": ConntrackHealth(50, 50, 3, 203, 0)}, "conntrack", "50 of 50 entries are in use; 200 packets"),
]


@pytest.mark.parametrize(("changes", "name", "words"), FAULTS)
def test_each_fault_is_in_the_banner_the_help_and_the_table(changes: dict[str, Any], name: str, words: str) -> None:
    seen = view(0, row(), **changes)
    assert plain(banner(seen, SourceState("test", NOW), None, 100)[1]).rstrip().endswith("faults 1")
    shown = " ".join(" ".join(map(plain, help_lines(seen, False, 80))).split())
    assert "Faults" in shown
    assert f"{name} {words}" in shown
    assert f" fault: {name}: {words}" in table(seen, None, "test")


def test_node_without_faults_shows_none() -> None:
    nothing = {
        "node_faults": dict.fromkeys(NODE_FAULTS, 0),
        "unwatched": dict.fromkeys(UNWATCHED, 0),
        "memory": Memory(90 << 20, 100 << 20),
        "conntrack": ConntrackHealth(45, 50, 0, 200, 0),
    }
    seen = view(0, row(), **nothing)
    assert faults_of(seen) == []
    assert "fault" not in plain(banner(seen, SourceState("test", NOW), None, 100)[1]) + table(seen, None, "test")


def test_faults_of_all_nodes_are_added() -> None:
    one, other = (view(0, row(), node_faults={"suspend": count}).snapshots[0] for count in (1, 2))
    ((name, text),) = faults_of(replace(view(0), snapshots=(one, other), cluster=True))
    assert (name, text.split()[0]) == ("suspend", "3")


def test_fault_that_a_newer_agent_counts_is_shown_by_its_name() -> None:
    assert faults_of(view(0, node_faults={"new\x1b": 1}, unwatched={"more": 2})) == [
        ("new\ufffd", "1 "),
        ("unwatched", "2 more"),
    ]


def test_json_has_the_numbers() -> None:
    told = as_json(view(0, memory=Memory(1, 2), conntrack=ConntrackHealth(1, 2, 3, 4, 5), node_faults={"suspend": 1}))
    (node,) = told["nodes"]
    assert node["faults"] == {"suspend": 1}
    assert node["unwatched"] == {}
    assert node["memory"] == {"used": 1, "limit": 2}
    assert node["conntrack"] == {"entries": 1, "limit": 2, "insert_failed": 3, "dropped": 4, "early_dropped": 5}
