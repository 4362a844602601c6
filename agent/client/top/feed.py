"""A thread that reads the source, so that a slow source never blocks the screen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from udpwatch.agent.client.top.detail import events_of
from udpwatch.agent.client.top.rows import Key, Meter, View
from udpwatch.agent.client.top.sources import ViewSource, Wanted
from udpwatch.agent.errors import UdpwatchError

STOP_SECONDS = 2.0
EVENTS_REQUESTED = 1_000


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one read."""

    view: View | None = None
    error: str = ""  # why there is no result; the next read tries again
    fatal: UdpwatchError | None = None  # why reading has stopped
    key: Key | None = None  # the row of the events
    events: tuple[dict[str, Any], ...] = ()  # the newest first


class Feed(threading.Thread):
    """Reads every ``interval`` seconds, and immediately when another row is followed."""

    def __init__(self, source: ViewSource, interval: float, publish: Callable[[Update], None]) -> None:
        """``publish`` is called in this thread and must not block."""
        super().__init__(name="feed", daemon=True)
        self._source, self._interval, self._publish = source, interval, publish
        self._meter = Meter()
        self._key: Key | None = None
        self._wanted = Wanted()
        self._wake = threading.Event()
        self._stopping = False

    def follow(self, key: Key | None) -> None:
        """Read the events of this row, too; None: no events."""
        self._key = key
        if key:
            self._wake.set()

    def want(self, wanted: Wanted) -> None:
        """Read this from now on, and read it now."""
        self._wanted = wanted
        self._wake.set()

    def run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            update = self._read()
            if self._stopping:
                break
            self._publish(update)
            if update.fatal:
                break
            self._wake.wait(self._interval)

    def _read(self) -> Update:
        key = self._key
        try:
            self._source.select(self._wanted)
            view = self._meter.add(self._source.read())
            events = events_of(key, self._source.events(EVENTS_REQUESTED)) if key else []
            return Update(view, key=key, events=tuple(events))
        except OSError as error:
            return Update(error=error.strerror or str(error) or type(error).__name__)
        except UdpwatchError as error:
            return Update(fatal=error)

    def stop(self) -> None:
        """Stop reading. A read that is still waiting for a response ends later and is discarded."""
        self._stopping = True
        self._wake.set()
        if self.ident and self is not threading.current_thread():
            self.join(STOP_SECONDS)
