"""Read the clock of the kernel programs: the CLOCK_MONOTONIC of the host (bpf_ktime_get_ns).

In a time namespace (time_namespaces(7)), the CLOCK_MONOTONIC of this process differs from it by a constant.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import NamedTuple

_AT_ONCE = 0.005  # seconds within which clocks are read, or they are read again
_TRIES = 5
_OFFSETS = Path("/proc/self/timens_offsets")


class Clocks(NamedTuple):
    """What the clocks of this process show at one moment, in seconds."""

    wall: float  # since the epoch; it may be set
    monotonic: float  # stands still while the machine is suspended
    boot: float  # goes on


def monotonic_ns() -> int:
    """Return nanoseconds that are comparable with the times of kernel programs."""
    return time.monotonic_ns() - offset_ns()


def read_clocks() -> Clocks:
    """Read all clocks at once, as far as this thread gets the CPU for it."""
    for _ in range(_TRIES):
        monotonic = time.monotonic()
        clocks = Clocks(time.time(), monotonic, time.clock_gettime(time.CLOCK_BOOTTIME))
        if time.monotonic() - monotonic < _AT_ONCE:
            break
    return clocks


@functools.cache
def offset_ns() -> int:
    """Return the offset of the time namespace, which is constant for a process; 0: it is the host's."""
    try:
        lines = _OFFSETS.read_text().splitlines()
    except OSError:  # a kernel without time namespaces
        return 0
    for name, seconds, nanoseconds in map(str.split, lines):
        if name == "monotonic":
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0
