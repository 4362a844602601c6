"""The table of servers in `udpwatch top`: order, filter, columns, text, JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from top_snapshots import NOW, row, server, view

from udpwatch.agent.client import explain
from udpwatch.agent.client.top import text
from udpwatch.agent.client.top.banner import nothing_wrong
from udpwatch.agent.client.top.layout import cells, columns_for, heading, plain
from udpwatch.agent.client.top.rows import Meter, View
from udpwatch.agent.client.top.server_table import (
    SERVERS,
    no_servers,
    server_detail,
    server_title,
    servers_table,
    share_text,
)
from udpwatch.agent.client.top.servers import ServerOrder, server_rows
from udpwatch.agent.model import Risk, Server

RISKS = (
    server("quiet", 1, 10),
    server("busy", 2, 90),
    server("bad", 3, 5, risk=Risk.WRONG, wrong=3, at_risk=2),
    server("vip", 4, 20, risk=Risk.VIRTUAL, at_risk=1, pod="web-0", namespace="shop", container="nginx"),
    server("maybe", 5, 20, risk=Risk.POSSIBLE, at_risk=1, drops=7, unanswered=15),
    server("hidden", 6, 50, risk=Risk.UNKNOWN, pktinfo=None, drops=None, queue=None, addresses=("10.0.0.1", "::1")),
)


def seen(*servers: Server) -> View:
    """Return a view with rates: within a second, each server did what it has done."""
    meter = Meter()
    zero = (replace(each, requests=0, replies=0, unanswered=0, wrong=0, drops=each.drops and 0) for each in servers)
    meter.add(view(0, servers=tuple(zero)))
    return meter.add(view(1, servers=servers))


@pytest.mark.parametrize(
    ("order", "processes"),
    [
        (ServerOrder.RISK, "bad vip maybe hidden busy quiet"),
        (ServerOrder.REQUESTS, "busy hidden maybe vip quiet bad"),
        (ServerOrder.REPLIES, "busy hidden maybe vip quiet bad"),
        (ServerOrder.UNANSWERED, "maybe busy hidden vip quiet bad"),
        (ServerOrder.WRONG, "bad busy hidden maybe vip quiet"),
        (ServerOrder.DROPS, "maybe busy hidden vip quiet bad"),
        (ServerOrder.PROCESS, "bad busy hidden maybe quiet vip"),
        (ServerOrder.LOCATION, "busy hidden maybe quiet bad vip"),
        (ServerOrder.PORT, "quiet busy bad vip maybe hidden"),
    ],
)
def test_servers_are_sorted_by_each_column(order: ServerOrder, processes: str) -> None:
    lines = server_rows(seen(*RISKS), order)
    assert " ".join(line.key.process for line in lines) == processes
    assert len(server_rows(seen(*RISKS), order, backwards=True)) == 6


def test_sort_key_visits_every_column() -> None:
    order, visited = ServerOrder.RISK, []
    for _ in ServerOrder:
        visited.append(order)
        order = order.next
    assert (sorted(visited), order) == (sorted(ServerOrder), ServerOrder.RISK)


@pytest.mark.parametrize(
    ("words", "processes"),
    [("", 6), ("SHOP/web", 1), ("nginx", 1), ("10.0.0.1", 1), ("virtual", 1), ("virtual 10.", 0), ("[red]", 0)],
)
def test_filter_selects_servers_by_words(words: str, processes: int) -> None:
    assert len(server_rows(seen(*RISKS), ServerOrder.RISK, words=words)) == processes


def shown(view: View, width: int) -> list[str]:
    lines = server_rows(view, ServerOrder.RISK)
    columns = columns_for(lines, width, view.cluster, ServerOrder.RISK, servers_table(view))
    return [
        plain(heading(columns, ServerOrder.RISK, False)),
        *(plain(cells(line, columns, NOW)) for line in lines),
    ]


def test_important_columns_fit_80_cells() -> None:
    long = server("unbound-control-very-long", 65535, 123_456, namespace="kube-system", pod="coredns-7c9f6d-x2x9k")
    head, first, *_ = shown(seen(long, *RISKS), 80)
    assert head.split() == [
        "process",
        "pod",
        "port",
        "bound",
        "req/s",
        "rep/s",
        "unans",
        "wrong",
        "drops",
        "pkt",
        "risk▼",
    ]
    assert first.split() == ["bad", "-", "3", "0.0.0.0", "5.0", "5.0", "0%", "3.0", "0", "yes", "wrong"]
    assert any("65535" in line and "123k" in line for line in shown(seen(long, *RISKS), 80))


def test_wide_terminal_shows_every_column() -> None:
    head, *lines = shown(seen(*RISKS), 160)
    for name in ("pod or container", "bound to", "requests/s", "unanswered", "drops/s", "queue", "PKTINFO", "risk▼"):
        assert name in head
    assert lines[2].split() == ["maybe", "-", "5", "0.0.0.0", "20.0", "20.0", "75%", "0", "7.0", "0", "yes", "possible"]
    assert lines[3].split()[3:] == ["10.0.0.1", "+1", "50.0", "50.0", "0%", "0", "-", "-", "-", "unknown"]


NAMES = st.text(max_size=60)


@given(
    st.lists(st.tuples(NAMES, NAMES, NAMES, st.integers(0, 10**15)), max_size=4),
    st.integers(40, 240),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(ServerOrder)),
)
def test_no_line_is_wider_than_the_screen(
    found: list[tuple[str, str, str, int]], width: int, cluster: bool, folded: bool, order: ServerOrder
) -> None:
    servers = (server(name, 53, count, pod=pod, namespace=pod, addresses=(where,)) for name, pod, where, count in found)
    shown = replace(seen(*servers), cluster=cluster, folded=folded)
    lines = server_rows(shown, order)
    columns = columns_for(lines, width, cluster, order, servers_table(shown))
    for painted in (heading(columns, order, False), *(cells(line, columns, NOW) for line in lines)):
        line = "".join(part for part, _ in painted)
        assert cell_len(line) <= width
        assert line.isprintable()
    for each in lines:
        for painted in server_detail(each, "", width, shown):
            assert "".join(part for part, _ in painted).isprintable()


@pytest.mark.parametrize(("share", "shown"), [(None, "-"), (0, "0%"), (0.001, "<1%"), (0.999, "99%"), (1, "100%")])
def test_share_as_text(share: float | None, shown: str) -> None:
    assert share_text(share) == shown


def detail(each: Server, fix: str = "") -> str:
    one = seen(each)
    (line,) = server_rows(one, ServerOrder.RISK)
    return "\n".join(map(plain, server_detail(line, fix, 100, one)))


def test_detail_shows_what_is_known() -> None:
    told = detail(RISKS[4])
    for fact in (
        "pid 77",
        "bound to  0.0.0.0, with PKTINFO",
        "20 requests, 20 replies, 0 wrong; 15 requests",
        "7 drops; 0 bytes wait of 212992",
        "possible: it will reply",
        "recvmsg()",
        "`udpwatch audit`",
    ):
        assert fact in told, told
    assert "PKTINFO" not in detail(server(addresses=("10.0.0.1",))).split("risk")[0]
    assert "unknown drops" in detail(RISKS[5])
    assert "Tab shows its wrong replies" in detail(RISKS[2], "restart it")


def test_known_server_at_risk_has_its_remedy() -> None:
    assert "multihome" in explain.short_advice(server("openvpn"))
    assert explain.short_advice(server("unheard-of")) == ""


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        ((), "No wrong reply so far: 100 replies checked."),
        ((server(),), "Nothing is wrong: 100 replies checked, no socket at risk."),
        ((RISKS[3],), "No wrong reply so far: 100 replies checked, 1 socket at risk (Tab)."),
        ((RISKS[5],), "No wrong reply so far: 100 replies checked; the risk of 1 server is unknown (Tab)."),
        (RISKS, "No wrong reply so far: 100 replies checked, 4 sockets at risk (Tab)."),
    ],
)
def test_without_findings_one_line_tells_what_is_at_risk(servers: tuple[Server, ...], told: str) -> None:
    assert nothing_wrong(view(0, servers=servers), " (Tab)") == told


def test_sockets_of_servers_that_are_not_listed_are_at_risk_too() -> None:
    assert "5 sockets at risk" in nothing_wrong(view(0, servers=RISKS, other_at_risk={"": 1}))


def test_agent_without_servers_is_explained() -> None:
    assert no_servers(view(0)).startswith("The agent lists no UDP servers;")
    assert len(no_servers(view(0))) < 79
    assert "older agents" in text.table(view(0), 80, "script", servers=True)


def test_output_for_scripts() -> None:
    one = seen(*RISKS)
    lines = text.table(one, 80, "script", servers=True).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["bad", "vip", "maybe", "hidden", "busy", "quiet"]
    told = json.loads(json.dumps(text.as_json(one, servers=True)))
    assert told["sockets_at_risk"] == 4
    assert told["servers"][2] | {"last": None} == {
        "node": "node-1", "nodes": 1, "process": "maybe", "pid": 77, "command": None, "namespace": None, "pod": None,
        "container": None, "port": 5, "netns": 1, "addresses": ["0.0.0.0"], "requests": 20, "replies": 20,
        "unanswered": 15, "wrong": 0, "drops": 7, "requests_per_second": 20.0, "replies_per_second": 20.0,
        "wrong_per_second": 0.0, "drops_per_second": 7.0, "unanswered_share": 0.75, "queue": 0,
        "queue_limit": 212_992, "pktinfo": True, "risk": "possible", "sockets_at_risk": 1, "last": None,
    }  # fmt: skip
    assert "servers" not in text.as_json(one)


def test_plain_lines_show_servers_that_were_asked() -> None:
    before: dict[Any, int] = {}
    assert len(text.server_changes(seen(*RISKS), before)) == 6
    (line,) = text.server_changes(seen(*RISKS[1:], server("quiet", 1, 11)), before)
    assert "quiet port 1 requests 11.0/s replies 11.0/s unanswered 0% wrong 0 drops 0 risk none" in line


def test_control_characters_of_tenants_are_escaped() -> None:
    evil = "\x1b]52;c;eA==\x07\r\u202e"
    nasty: Any = server(evil, namespace=evil, pod=evil, container=evil, addresses=(evil, evil), risk=evil)
    for one in (seen(nasty), replace(seen(nasty), cluster=True), replace(seen(nasty), cluster=True, folded=True)):
        (line,) = server_rows(one, ServerOrder.RISK)
        told = [text.table(one, width, "script", servers=True) for width in (None, 100, 40)]
        told += [*text.server_changes(one, {}), server_title(line)]
        told += [plain(each) for each in server_detail(line, evil, 80, one)]
        assert all(each.isprintable() for each in "\n".join(told).split("\n"))


def test_findings_do_not_change_the_table_of_servers() -> None:
    both = replace(seen(*RISKS), snapshots=view(1, row(), servers=RISKS).snapshots)
    assert len(server_rows(both, ServerOrder.RISK)) == 6
    assert SERVERS.columns[-1].name == "risk"
