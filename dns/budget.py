"""How much CPU may be spent on what others order.

Where a cgroup's quota is less than one CPU, using it up silences the whole process for the rest of a period, the thread
that answers from memory with it. So what clients and upstream servers can order from the event loop waits once the
loop has taken its share of the quota; the agent's HTTP view does the same. Without such a quota nothing waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SHARE = 0.4  # of the quota, for the event loop
BURST_SECONDS = 0.01  # of CPU, after a quiet time
_SMALL_SECONDS = 1e-6  # of debt, which is none


class Budget:
    """A token bucket of CPU seconds. One thread asks."""

    def __init__(
        self,
        cpus: Callable[[], float],
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        """``cpus``: how many this process may use. ``used``: seconds of CPU that have been taken."""
        self._cpus, self._share, self._clock, self._used = cpus, share, clock, used
        self._left, self._at, self._taken = BURST_SECONDS, clock(), used()

    @property
    def is_limited(self) -> bool:
        """Whether there is a quota that is less than one CPU."""
        return self._cpus() < 1

    def delay(self) -> float:
        """Seconds until more may be done; 0: now."""
        rate = self._share * self._cpus()
        now, taken = self._clock(), self._used()
        self._left = min(BURST_SECONDS, self._left + (now - self._at) * rate - (taken - self._taken))
        self._at, self._taken = now, taken
        return -self._left / rate if rate < self._share and self._left < -_SMALL_SECONDS else 0.0


UNLIMITED = Budget(lambda: math.inf)
