"""How much memory the cgroups of this process allow, and how much of it is in use.

A cgroup's limit covers all its processes and what the kernel allocates for them, also the maps of the kernel programs
and the files that they have read or written. The kernel takes the memory of files that are not in use back before it
kills a process, so this memory does not count here.
"""

from __future__ import annotations

from pathlib import Path

from udpwatch.agent.kernel.own_cgroups import folders
from udpwatch.agent.model import Memory

_UNLIMITED = 1 << 60  # bytes; without a limit, v1 has the largest number of whole pages


def read_memory(proc: Path = Path("/proc/self")) -> Memory | None:
    """Return the cgroup of this process that is nearest to its limit; None without a readable limit."""
    found = [memory for folder in folders("memory", proc) if (memory := _read(folder))]
    return max(found, key=lambda memory: memory.used / memory.limit, default=None)


def _read(folder: Path) -> Memory | None:
    is_v2 = (folder / "memory.max").exists()
    names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    idle = "inactive_file" if is_v2 else "total_inactive_file"
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        if limit == "max" or not 0 < int(limit) < _UNLIMITED:
            return None
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = next((int(value) for name, value in lines if name == idle), 0)
        return Memory(max(0, int(used) - files), int(limit))
    except (OSError, ValueError):
        return None
