"""Limits the CPU time that clients and upstream servers can cause.

When a cgroup's quota is less than one CPU and is used up, the kernel stops the whole process for the rest of the
period, including what answers from memory. So forwarding and TCP are delayed once their thread has used its share of
the quota; the agent's HTTP server does the same. Without such a quota nothing waits.

A piece of work waits once, for a bounded time. So work that cannot wait, such as accepting connections, delays the rest
but never stops it, also if it takes more than the share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

#: Of the quota: for the thread that forwards queries, and for the event loop, which serves TCP.
FORWARD_SHARE, TCP_SHARE = 0.3, 0.2
BURST_SECONDS = 0.01  # of CPU time, after an idle period
MAX_DEBT_SECONDS = 0.05  # of CPU time used beyond the share; the rest is forgotten
_SMALL_SECONDS = 1e-6  # a smaller debt does not count


class Budget:
    """A token bucket of CPU seconds, for one thread."""

    def __init__(
        self,
        cpus: Callable[[], float],
        share: float,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        """``cpus``: how many CPUs this process may use. ``used``: CPU seconds used so far."""
        self._cpus, self._share, self._clock, self._used = cpus, share, clock, used
        self._left, self._at, self._taken = BURST_SECONDS, clock(), used()

    @property
    def is_limited(self) -> bool:
        """Whether there is a quota of less than one CPU."""
        return self._cpus() < 1

    def delay(self) -> float:
        """Return how many seconds the next piece of work shall wait; 0: none. It waits once."""
        rate = self._share * self._cpus()
        now, taken = self._clock(), self._used()
        self._left = min(BURST_SECONDS, self._left + (now - self._at) * rate - (taken - self._taken))
        self._left = max(-MAX_DEBT_SECONDS, self._left)
        self._at, self._taken = now, taken
        return -self._left / rate if rate < self._share and self._left < -_SMALL_SECONDS else 0.0


UNLIMITED = Budget(lambda: math.inf, 1.0)
