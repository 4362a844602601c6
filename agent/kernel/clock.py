"""The clock of the kernel programs (bpf_ktime_get_ns, bpf_jiffies64): the host's CLOCK_MONOTONIC.

In a time namespace (time_namespaces(7)) this process's own CLOCK_MONOTONIC differs from it by a constant.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

_OFFSETS = Path("/proc/self/timens_offsets")


def monotonic_ns() -> int:
    """Nanoseconds, comparable with the times of kernel programs."""
    return time.monotonic_ns() - _offset_ns()


@functools.cache
def _offset_ns() -> int:
    """What the time namespace adds; the kernel keeps it from changing once a process is in there."""
    try:
        lines = _OFFSETS.read_text().splitlines()
    except OSError:  # a kernel without time namespaces
        return 0
    for name, seconds, nanoseconds in map(str.split, lines):
        if name == "monotonic":
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0
