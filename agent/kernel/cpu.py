"""How much CPU this process may use, and a thread that keeps to its share of it.

A cgroup's quota is for all threads of all its processes. Who uses it up stands still for the rest of the period, a
tenth of a second as a rule, whatever it was about to answer. So what others can make the agent do is done in slices
much shorter than a period, with pauses between them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SLICE_SECONDS = 0.004  # of work without a pause
SWITCH_SECONDS = 0.001  # after which a thread that works makes way for one that has to answer
COLLECTIONS = 200  # of young objects for one of all
LOOK_SECONDS = 10.0  # the quota may be changed while the agent runs


def quota(proc: Path = Path("/proc/self")) -> float:
    """How many CPUs the cgroups of this process let it use; infinity where there is no limit, or none to be read."""
    return min((limit for folder in _folders(proc) for limit in _limits(folder)), default=math.inf)


def _folders(proc: Path) -> Iterator[Path]:
    """The process's cgroups that may have a quota, in v2 and v1, and those above them as far as they can be seen."""
    try:
        mounts = os.fsdecode((proc / "mountinfo").read_bytes()).split("\n")
        cgroups = os.fsdecode((proc / "cgroup").read_bytes()).split("\n")
    except OSError:
        return
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in cgroups if line)}
    for line in mounts:
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            path = paths.get("")
        elif kind.startswith("cgroup ") and "cpu" in kind.split(" ")[-1].split(","):
            path = next((path for names, path in paths.items() if "cpu" in names.split(",")), None)
        else:
            continue
        if path is None:
            continue
        root, point = (_unescaped(word) for word in mount.split(" ")[3:5])
        top = Path(point)
        # A container may see its own cgroup as the root of the mount.
        below = path.removeprefix(root).strip("/") if path.startswith(root) else ""
        folder = top / below if ".." not in below else top
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


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
    """The quota, looked up now and then."""

    def __init__(self, look: Callable[[], float] = quota) -> None:
        self._look, self._cpus, self._looked = look, math.inf, -math.inf

    def __call__(self) -> float:
        """How many CPUs this process may use."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._cpus = self._look()
        return self._cpus


class Pace:
    """Keeps one thread to its share of the CPU, and of the quota where that is less than one CPU.

    The thread calls `start`, then the object itself wherever it has done a little work.
    """

    def __init__(
        self,
        share: float,
        cpus: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        """``used``: seconds of CPU that the calling thread has taken."""
        self._share, self._cpus, self._clock, self._used = share, cpus, clock, used
        self._pause: Callable[[float], object] | None = None
        self._taken = self._begun = 0.0

    def start(self, pause: Callable[[float], object]) -> None:
        """Begin, in the thread that is to pause; ``pause`` waits for so many seconds, or less."""
        self._pause = pause
        self._taken, self._begun = self._used(), self._clock()

    def __call__(self) -> None:
        """Pause if a slice of work has been done; before `start`, nothing."""
        if self._pause is None:
            return
        taken = self._used() - self._taken
        if taken < SLICE_SECONDS:
            return
        rest = taken / (self._share * min(1.0, self._cpus())) - (self._clock() - self._begun)
        if rest > 0:
            self._pause(rest)
        self._taken, self._begun = self._used(), self._clock()


def make_way() -> None:
    """Set the interpreter up for threads that answer beside others that work; to be called once all is started.

    The garbage collector keeps the interpreter's lock for as long as it takes to walk all objects: a tenth of a second
    with a thousand DNS queries under way, which are no garbage and leave none.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, COLLECTIONS)


def show_name() -> None:
    """Give the calling thread its name in /proc, too: `top -H` then tells who takes the CPU."""
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name)


def unpaced() -> None:
    """In place of a `Pace`: never pause."""
