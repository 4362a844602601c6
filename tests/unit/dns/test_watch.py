"""A changed file is read, and retried until that succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from udpwatch.dns import watch
from udpwatch.dns.watch import Watch

SECONDS = 10.0


class Reader:
    """Reads the files, successfully or not."""

    def __init__(self) -> None:
        self.can, self.tries = True, 0
        self.tried = asyncio.Event()

    async def read(self) -> bool:
        self.tries += 1
        self.tried.set()
        return self.can

    async def has_tried(self, seconds: float = SECONDS) -> bool:
        """Whether it reads within this time."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.tried.wait(), seconds)
            self.tried.clear()
            return True
        return False


def watched(path: Path, story: Callable[[Reader], Awaitable[None]], read: bool = True) -> None:
    """Run a scenario with a watch on one file."""

    async def play() -> None:
        reader = Reader()
        each = Watch(lambda: [path], reader.read)
        each.start(read)
        try:
            await story(reader)
        finally:
            await each.stop()

    asyncio.run(play())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("one")
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_unreadable_state_is_retried(file: Path) -> None:
    async def story(reader: Reader) -> None:
        reader.can = False
        file.write_text("another")
        for _ in range(3):
            assert await reader.has_tried()
        reader.can = True
        assert await reader.has_tried()
        tries = reader.tries
        assert not await reader.has_tried(0.5) and reader.tries == tries  # it was read

    watched(file, story)


@pytest.mark.usefixtures("quick")
def test_state_unread_at_the_start_is_retried(file: Path) -> None:
    async def story(reader: Reader) -> None:
        assert await reader.has_tried()
        assert not await reader.has_tried(0.2)

    watched(file, story, read=False)


@pytest.mark.usefixtures("quick")
def test_retries_are_spaced_but_changes_are_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_PAUSE_SECONDS", 100.0)

    async def story(reader: Reader) -> None:
        reader.can = False
        tries = 0
        file.write_text("another one")
        while await reader.has_tried(0.3):  # 0.02, 0.04, 0.08, .. seconds apart
            tries += 1
        assert 3 < tries < 8
        file.write_text("and another one")
        assert await reader.has_tried(0.3)

    watched(file, story)


@pytest.mark.parametrize("turns", range(8))
def test_stop_ends_a_watch_that_a_change_wakes(file: Path, turns: int) -> None:
    async def play() -> None:
        each = Watch(lambda: [file], Reader().read)
        each.start()
        await asyncio.sleep(0)
        each._word.set()
        for _ in range(turns):  # of the event loop, until the watch wakes
            await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS):
            await each.stop()

    asyncio.run(play())
