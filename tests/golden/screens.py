"""Makes docs/top.svg and docs/top-servers.svg: both tables of `udpwatch top` on recordings of a real run, exported by
Textual. `make screens`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from pathlib import Path

from udpwatch.agent.client import explain
from udpwatch.agent.client.connection import from_json
from udpwatch.agent.client.top.feed import Update
from udpwatch.agent.client.top.rows import Meter, View
from udpwatch.agent.client.top.screen import TopApp
from udpwatch.agent.client.top.sources import open_replay
from udpwatch.agent.client.top.widgets import RowTable
from udpwatch.agent.model import Snapshot

ROOT = Path(__file__).resolve().parents[2]
SIZE = (100, 30)
PLAYED_SECONDS = 12.0  # until rates and the sparkline have something to show


async def findings(recording: Path) -> str:
    """Return the table of findings as SVG, with the first row's details open."""
    os.environ.setdefault("UDPWATCH_NODE", "node-1")
    source = open_replay(str(recording))
    try:
        app = TopApp(source, fix=explain.short_advice)
        async with app.run_test(size=SIZE) as pilot:
            end = time.monotonic() + PLAYED_SECONDS
            while time.monotonic() < end or not app.query_one(RowTable).selected:
                await pilot.pause(0.2)
            await pilot.press("enter")
            await pilot.pause(2)
            return app.export_screenshot(title="udpwatch top")
    finally:
        source.close()


async def servers(recording: Path) -> str:
    """Return the table of servers as SVG, with the details of the first server that has replied rightly so far."""
    snapshots = [from_json(Snapshot, json.loads(line)) for line in recording.read_text().splitlines()]
    app = TopApp(None, fix=explain.short_advice, clock=lambda: snapshots[-1].time, servers=True)
    async with app.run_test(size=SIZE) as pilot:
        meter = Meter()
        for each in snapshots:
            app.take(Update(meter.add(View(each.time, (each,)))))
        await pilot.press("enter")
        while (line := app.query_one(RowTable).selected) and line.key.process != "turnserver":
            await pilot.press("j")
        await pilot.pause(1)
        return app.export_screenshot(title="udpwatch top --servers")


def written(svg: str, path: Path) -> None:
    """Write a picture without fonts from elsewhere, which a README must not fetch, and the kernel's full name."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("<text ", '<text xml:space="preserve" ')  # not every renderer keeps leading blanks
    release = os.uname().release
    path.write_text(svg.replace(release, release.partition("-")[0]))


def main() -> int:
    """Usage: screens.py [RECORDING]."""
    recording = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/golden/replay.jsonl"
    written(asyncio.run(findings(recording)), ROOT / "docs/top.svg")
    written(asyncio.run(servers(ROOT / "tests/golden/servers.jsonl")), ROOT / "docs/top-servers.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
