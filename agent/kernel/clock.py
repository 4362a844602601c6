"""Read the clock of the kernel programs: the CLOCK_MONOTONIC of the host (bpf_ktime_get_ns).

In a time namespace (time_namespaces(7)), the CLOCK_MONOTONIC of this process differs from it by a constant.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

_OFFSETS = Path("/proc/self/timens_offsets")


def monotonic_ns() -> int:
    """Return nanoseconds that are comparable with the times of kernel programs."""
    return time.monotonic_ns() - _offset_ns()


@functools.cache
def _offset_ns() -> int:
    """Return the offset of the time namespace, which is constant for a process."""
    try:
        lines = _OFFSETS.read_text().splitlines()
    except OSError:  # a kernel without time namespaces
        return 0
    for name, seconds, nanoseconds in map(str.split, lines):
        if name == "monotonic":
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0
