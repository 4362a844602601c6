"""The thread that asks a source in turn, so that a slow one never holds up the screen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from udpwatch.agent.client.top.detail import events_of
from udpwatch.agent.client.top.rows import Key, Look, Meter
from udpwatch.agent.client.top.sources import Source
from udpwatch.agent.errors import UdpwatchError

STOP_SECONDS = 2.0
EVENTS_ASKED = 1_000


@dataclass(frozen=True, slots=True)
class News:
    """What one round brought."""

    look: Look | None = None
    trouble: str = ""  # why there is no look; the next round tries again
    failure: UdpwatchError | None = None  # why there will be no other one
    subject: Key | None = None  # whose events these are
    events: tuple[dict[str, Any], ...] = ()  # the newest first


class Feed(threading.Thread):
    """Asks every ``interval`` seconds, and at once when the subject changes."""

    def __init__(self, source: Source, interval: float, tell: Callable[[News], None]) -> None:
        """``tell`` is called in this thread and must not block."""
        super().__init__(name="feed", daemon=True)
        self._source, self._interval, self._tell = source, interval, tell
        self._meter = Meter()
        self._subject: Key | None = None
        self._wake = threading.Event()
        self._stopping = False

    def follow(self, subject: Key | None) -> None:
        """Bring this row's events, too; None: none."""
        self._subject = subject
        if subject:
            self._wake.set()

    def run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            news = self._ask()
            if self._stopping:
                break
            self._tell(news)
            if news.failure:
                break
            self._wake.wait(self._interval)

    def _ask(self) -> News:
        subject = self._subject
        try:
            look = self._meter.add(self._source.read())
            events = events_of(subject, self._source.events(EVENTS_ASKED)) if subject else []
            return News(look, subject=subject, events=tuple(events))
        except OSError as error:
            return News(trouble=error.strerror or str(error) or type(error).__name__)
        except UdpwatchError as error:
            return News(failure=error)

    def stop(self) -> None:
        """End it; where it waits for an answer, it ends by itself, unheard."""
        self._stopping = True
        self._wake.set()
        if self.ident and self is not threading.current_thread():
            self.join(STOP_SECONDS)
