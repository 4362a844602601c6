"""Rate limit for log lines that a packet can cause: a few per minute of each kind, then the number left out.

Otherwise anyone who can send a packet could fill the disk, or hide one line among a million.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LINES_PER_MINUTE = 5  # of each kind
MINUTE = 60.0


@dataclass(slots=True)
class _Kind:
    until: float  # the end of the minute that started with the first line
    written: int = 0
    left_out: int = 0
    last: tuple[object, ...] = ()  # arguments of the last line left out


class LimitedLog:
    """Writes to loggers. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: monotonic seconds."""
        self._clock = clock
        self._kinds: dict[tuple[logging.Logger, int, str], _Kind] = {}
        self._lock = threading.Lock()

    def write(
        self, log: logging.Logger, level: int, message: str, *args: object, error: BaseException | None = None
    ) -> None:
        """Log a line unless too many of its kind were logged in this minute.

        ``message``: the format, which defines the kind. ``error``: log its traceback, too.
        """
        now, key = self._clock(), (log, level, message)
        with self._lock:
            kind = self._kinds.get(key)
            summary = ""
            if kind is None or now >= kind.until:
                summary = _summary(message, kind)
                kind = self._kinds[key] = _Kind(now + MINUTE)
            full = kind.written >= LINES_PER_MINUTE
            if full:
                kind.left_out += 1
                kind.last = args
            else:
                kind.written += 1
        if summary:
            log.log(level, "%s", summary)
        if not full:
            log.log(level, message, *args, exc_info=error)

    def flush(self, everything: bool = False) -> None:
        """Log how many lines were left out in minutes that are over; with ``everything``, in all."""
        now = self._clock()
        with self._lock:
            over = [(key, kind) for key, kind in self._kinds.items() if everything or now >= kind.until]
            for key, _ in over:
                del self._kinds[key]
        for (log, level, message), kind in over:
            if summary := _summary(message, kind):
                log.log(level, "%s", summary)


def _summary(message: str, kind: _Kind | None) -> str:
    if not kind or not kind.left_out:
        return ""
    return f"dns: left out {kind.left_out} more lines like this, the last: {message % kind.last}"


#: Shared by all modules of the responder; `Service` calls its `flush`.
LIMITED = LimitedLog()
