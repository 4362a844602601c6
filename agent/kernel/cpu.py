"""How much CPU this process may use, and how a thread keeps to its share.

A cgroup's quota covers all threads of all its processes. Once it is used up, all of them stop for the rest of the
period, usually a tenth of a second, also the threads that serve requests. So work that others can cause is done in
slices much shorter than a period, with pauses between them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from udpwatch.agent.kernel.own_cgroups import folders

SLICE_SECONDS = 0.004  # of CPU between two pauses
MAX_PAUSE_SECONDS = 2.0  # whatever one piece of work cost: findings stay fresh, and the agent stays healthy
SWITCH_SECONDS = 0.001  # after which a busy thread yields the interpreter's lock
COLLECTIONS = 200  # garbage collections of young objects for each full one
LOOK_SECONDS = 10.0  # between two reads of the quota, which may change


def quota(proc: Path = Path("/proc/self")) -> float:
    """Return how many CPUs the cgroups of this process allow; infinity without a readable limit."""
    return min((limit for folder in folders("cpu", proc) for limit in _limits(folder)), default=math.inf)


def _limits(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").exists():
            time_us, period_us = (folder / "cpu.max").read_text().split()
        else:
            time_us, period_us = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if time_us != "max" and int(time_us) > 0:
            yield int(time_us) / int(period_us)
    except (OSError, ValueError, ZeroDivisionError):
        return


class Cpus:
    """The quota, read every LOOK_SECONDS."""

    def __init__(self, look: Callable[[], float] = quota) -> None:
        self._look, self._cpus, self._looked = look, math.inf, -math.inf

    def __call__(self) -> float:
        """Return how many CPUs this process may use."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._cpus = self._look()
        return self._cpus


class Pace:
    """Keeps one thread to its share of a CPU, or of the quota if that is less than one CPU.

    The thread calls `start` once, and the object itself after each small piece of work.
    """

    def __init__(
        self,
        share: float,
        cpus: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        """``used``: seconds of CPU that the calling thread has used."""
        self._share, self._cpus, self._clock, self._used = share, cpus, clock, used
        self._pause: Callable[[float], object] | None = None
        self._taken = self._begun = 0.0

    def start(self, pause: Callable[[float], object]) -> None:
        """Begin, in the thread that shall pause; ``pause`` waits for at most the given seconds."""
        self._pause = pause
        self._taken, self._begun = self._used(), self._clock()

    def __call__(self) -> None:
        """Pause if a slice of work is done; do nothing before `start`."""
        if self._pause is None:
            return
        taken = self._used() - self._taken
        if taken < SLICE_SECONDS:
            return
        rest = taken / (self._share * min(1.0, self._cpus())) - (self._clock() - self._begun)
        if rest > 0:
            self._pause(min(rest, MAX_PAUSE_SECONDS))
        self._taken, self._begun = self._used(), self._clock()


def favour_servers() -> None:
    """Configure the interpreter so that busy threads do not delay those that serve requests. Call it after the start.

    A full garbage collection holds the interpreter's lock while it walks all objects: a tenth of a second with a
    thousand DNS queries in flight, which are not garbage and leave none.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, COLLECTIONS)


def show_name() -> None:
    """Set the calling thread's name in /proc, for `top -H`."""
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name)


def unpaced() -> None:
    """Stand in for a `Pace` that never pauses."""
