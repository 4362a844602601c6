"""Drive the screen of `udpwatch top` by Textual's pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from top_snapshots import NOW, row, server, view

from udpwatch.agent.client.top.feed import Update
from udpwatch.agent.client.top.rows import Meter, View
from udpwatch.agent.client.top.screen import TopApp
from udpwatch.agent.client.top.sources import Wanted
from udpwatch.agent.client.top.widgets import RowTable
from udpwatch.agent.model import Risk, Row

THREE = (row("aaa", 3, 5), row("bbb", 1, 7, pod="web-0", namespace="shop"), row("ccc", 2, 6))
SERVERS = (
    server("dnsd", 53, 900, namespace="shop", pod="dns-0", container="dns"),
    server("openvpn", 1194, 20, risk=Risk.VIRTUAL, at_risk=1, pktinfo=False),
    server("ntpd", 123, 7, addresses=("::",), drops=3),
)


def screen(app: TopApp) -> list[str]:
    """Return the text on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip).rstrip() for strip in strips]


def drive(
    play: Callable[[TopApp, Any], Awaitable[None]],
    *found: Row,
    size: tuple[int, int] = (80, 24),
    app: TopApp | None = None,
) -> TopApp:
    """Run a screen with two views, one second apart, and play on it."""
    app = app or TopApp(None, clock=lambda: NOW + 1, name="test")
    found = found or THREE

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            meter = Meter()
            app.take(Update(meter.add(view(0, *(replace(each, count=1) for each in found)))))
            app.take(Update(meter.add(view(1, *found))))
            await pilot.pause()
            await play(app, pilot)

    asyncio.run(run())
    return app


def processes(app: TopApp) -> str:
    return " ".join(line.split()[0] for line in app.query_one(RowTable).text)


def selected(app: TopApp) -> str:
    line = app.query_one(RowTable).selected
    return line.key.process if line else ""


class Slow:
    """A source that answers when the test lets it."""

    name = "slow"

    def __init__(self) -> None:
        self.asked = 0
        self.subjects = 0

    def read(self) -> View:
        self.asked += 1
        if self.asked == 2:
            raise ConnectionRefusedError(111, "Connection refused")
        return view(self.asked, row(count=self.asked))

    def select(self, wanted: Wanted) -> None:
        pass

    def events(self, limit: int) -> list[dict[str, Any]]:
        self.subjects += 1
        return []

    def close(self) -> None:
        pass
