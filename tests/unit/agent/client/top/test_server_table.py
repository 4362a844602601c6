"""The screen of `udpwatch top`: the table of servers, and the rows of a cluster."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from rich.cells import cell_len
from top_screens import SERVERS, THREE, Slow, drive, processes, screen, selected
from top_snapshots import NOW, row, server, snapshot, view

from udpwatch.agent.client.top.feed import Update
from udpwatch.agent.client.top.rows import Meter, View, key_of
from udpwatch.agent.client.top.screen import TopApp
from udpwatch.agent.client.top.sources import Wanted
from udpwatch.agent.client.top.traffic import Rates, ServerKey
from udpwatch.agent.client.top.widgets import RowTable
from udpwatch.agent.model import Risk, Server


def with_servers(seconds: float, *servers: Server, **changes: Any) -> View:
    return view(seconds, *THREE, servers=servers or SERVERS, **changes)


def test_tab_switches_between_the_tables() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(with_servers(2)))
        await pilot.press("j", "tab")
        await pilot.pause()
        assert processes(app) == "openvpn dnsd ntpd"
        assert "⇥ findings" in screen(app)[-1]
        assert "risk▼" in screen(app)[3]
        await pilot.press("s", "s", "j", "j", "enter")
        await pilot.pause()
        text = "\n".join(screen(app))
        assert "rep/s▼" in text
        for fact in ("ntpd, port 123/udp", "bound to  ::, with PKTINFO", "3 drops"):
            assert fact in text, text
        await pilot.press("tab")
        assert processes(app) == "bbb ccc aaa"
        assert "/s▼" in screen(app)[3]  # each table keeps its order
        await pilot.press("tab", "r")
        assert "rep/s▲" in screen(app)[3]

    drive(play)


def test_filter_pause_and_help_work_for_servers() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(with_servers(2)))
        await pilot.press("tab", "slash", *"shop", "enter")
        assert processes(app) == "dnsd"
        await pilot.press("escape", "p", "c")
        app.take(Update(with_servers(3, *SERVERS, server("new", 9))))
        await pilot.pause()
        assert "new" not in processes(app)
        assert "totals since" not in screen(app)[1]
        await pilot.press("p")
        assert "new" in processes(app)
        await pilot.press("question_mark")
        await pilot.pause()
        assert "requests/s" in "\n".join(screen(app))
        await pilot.press("tab")  # any key closes the help
        await pilot.pause()
        assert "risk▼" in screen(app)[3]
        assert "fix " not in "\n".join(screen(app))

    drive(play)


def test_screen_begins_with_servers_if_asked() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        assert "The agent lists no UDP servers" in screen(app)[5]
        app.take(Update(with_servers(2)))
        await pilot.press("G")
        assert selected(app) == "ntpd"

    drive(play, app=TopApp(None, clock=lambda: NOW + 1, name="test", servers=True))


def test_empty_table_of_findings_tells_what_is_at_risk() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(view(2, servers=SERVERS, checked=1234)))
        await pilot.pause()
        assert screen(app)[5] == " No wrong reply so far: 1234 replies checked, 1 socket at risk (Tab)."
        app.take(Update(view(2, servers=SERVERS[::2], checked=1234)))
        await pilot.pause()
        assert screen(app)[5] == " Nothing is wrong: 1234 replies checked, no socket at risk."

    drive(play)


def test_names_of_tenants_cannot_break_the_table_of_servers() -> None:
    nasty = [
        server("[red]\x1b[2Jx" * 20, 1, risk=Risk.WRONG),
        server("\u202egnp", 2, pod="[/bold]" * 30, namespace="\x1b]0;x\x07"),
        server("漢字" * 40, 3, addresses=("\r\n",)),
        server("\udc80", 4),
        server("", 5),
    ]

    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(with_servers(2, *nasty)))
        await pilot.press("tab", "j", "enter")
        for width in (200, 80, 40, 20):
            await pilot.resize_terminal(width, 24)
            await pilot.pause()
            lines = screen(app)
            assert len(lines) == 24
            assert all(cell_len(line) <= width and line.isprintable() for line in lines)

    drive(play)


def test_five_thousand_servers_leave_keys_responsive() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        meter = Meter()
        for second in range(2, 6):
            many = (server(f"srv-{number}", number, number * second) for number in range(1, 5001))
            app.take(Update(meter.add(with_servers(second, *many))))
            begun = time.monotonic()
            await pilot.press("tab" if second == 2 else "j")
            took = time.monotonic() - begun
        await pilot.press("G")
        await pilot.pause()
        assert "of 5000" in screen(app)[-1]
        assert selected(app) == "srv-1"
        assert took < 10

    drive(play)


def folded(seconds: float) -> View:
    """A cluster of 1,000 nodes as the sums that Prometheus returns."""
    found = replace(row("dnsd", 53, 4000, namespace="shop"), expected="", actual="", verdict="", cause="")
    served = server("dnsd", 53, 9000, namespace="shop", risk=Risk.WRONG, at_risk=40, addresses=(), pktinfo=None)
    whole = snapshot(found, node="", servers=(replace(served, netns=0),), time=NOW + seconds)
    keys = key_of("", found), ServerKey("", "dnsd", "shop", "", "", 53)
    return View(NOW + seconds, (whole,), True, {keys[0]: 4.0}, 4.0, 100.0, server_rates={keys[1]: Rates(30.0, 26.0)},
                folded=True, nodes=dict.fromkeys(keys, 1000), node_count=1000, found=4000, at_risk=40)  # fmt: skip


class Recorder(Slow):
    """A cluster that records what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[Wanted] = []

    def read(self) -> View:
        self.asked += 1
        if self.wanted[-1].only:
            nodes = (snapshot(row("dnsd", 53, 4, namespace="shop"), node=f"node-{number}") for number in range(3))
            return replace(folded(self.asked), folded=False, snapshots=tuple(nodes))
        return folded(self.asked)

    def select(self, wanted: Wanted) -> None:
        self.wanted.append(wanted)


def test_g_unfolds_the_selected_row_of_a_cluster() -> None:
    source = Recorder()

    async def shows(pilot: Any, *words: str) -> None:
        end = time.monotonic() + 30
        while not all(word in "\n".join(screen(pilot.app)) for word in words):
            assert time.monotonic() < end, screen(pilot.app)
            await pilot.pause(0.02)

    async def run() -> None:
        app = TopApp(source, 0.05)
        async with app.run_test(size=(100, 24)) as pilot:
            await shows(pilot, "1000 nodes", "findings 4000", "g each node")
            assert app.query_one(RowTable).text[0].split()[:4] == ["dnsd", "shop", "53", "1000"]
            await pilot.press("enter")
            await shows(pilot, "g shows the rows of each node")
            await pilot.press("g")
            await shows(pilot, "node-0", "node-2", "172.16.13.13", "g all nodes")
            only = source.wanted[-1].only
            assert only and only.process == "dnsd"
            await pilot.press("escape")
            await shows(pilot, "1000", "g each node")
            await pilot.press("p", "tab")
            await shows(pilot, "requests/s", "wrong", "26.0")
            assert source.wanted[-1] == Wanted(servers=True)
            await pilot.press("enter")
            await shows(pilot, "1000; g shows each", "40 sockets at risk")

    asyncio.run(run())
