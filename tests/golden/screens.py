"""Makes docs/top.svg: `udpwatch top` on a recording of a real run, exported by Textual. `make screens`."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from pathlib import Path

from udpwatch.agent.client import explain
from udpwatch.agent.client.top.screen import TopApp
from udpwatch.agent.client.top.sources import open_replay
from udpwatch.agent.client.top.widgets import RowTable

ROOT = Path(__file__).resolve().parents[2]
SIZE = (100, 30)
PLAYED_SECONDS = 12.0  # until rates and the sparkline have something to show


async def photograph(recording: Path) -> str:
    """Return the screen as SVG, with the first row's details open."""
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


def main() -> int:
    """Usage: screens.py [RECORDING]."""
    recording = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/golden/replay.jsonl"
    svg = asyncio.run(photograph(recording))
    # A README must not fetch fonts from elsewhere: the reader's own do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("<text ", '<text xml:space="preserve" ')  # not every renderer keeps leading blanks
    release = os.uname().release
    svg = svg.replace(release, release.partition("-")[0])  # what its builder called it is nobody's business
    (ROOT / "docs/top.svg").write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
