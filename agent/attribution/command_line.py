"""Read the arguments of a process without waiting for a process that withholds them.

The kernel copies /proc/PID/cmdline out of the process's memory, under that memory's lock (mmap_lock). The process
decides how long the lock is held: a reader of its /proc/PID/mem that waits for a FUSE file system, and an mmap(2)
that waits for this reader, hold it forever. Of the files of /proc that attribution reads, cmdline is the only one
that needs this lock: comm, cgroup, stat, exe and task/ do not.

Rules
1. A thread of its own reads. After WAIT_SECONDS it is abandoned: it holds one descriptor, and ends with the agent,
   since the kernel's wait for the lock is killable.
2. One tenant has one abandoned thread, all together MAX_ABANDONED. Each counts for REST_SECONDS at least, even if it
   returns sooner, so that a process that withholds its arguments for a moment at a time delays nothing for long.
3. What is not read is counted and returned as None.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

WAIT_SECONDS = 0.2  # usually 0.1 ms; more only on a machine without a free CPU
MAX_ABANDONED = 8
REST_SECONDS = 60.0


class CommandLines:
    """Reads files /proc/PID/cmdline."""

    def __init__(self) -> None:
        self._abandoned: dict[str, tuple[_Reader, float]] = {}  # by tenant, with the end of its rest
        self.left_out = 0  # command lines that were not read

    def read(self, path: Path, limit: int, tenant: str, now: float) -> bytes | None:
        """The first ``limit`` bytes of a /proc/PID/cmdline; None where the process withholds them.

        ``tenant``: of the process that is read, as `container.tenant` returns it. ``now``: monotonic seconds.
        Raises OSError if there is no such process.
        """
        busy = {key: (reader, end) for key, (reader, end) in self._abandoned.items() if reader.is_alive() or now < end}
        self._abandoned = busy
        if tenant in busy or len(busy) >= MAX_ABANDONED:
            self.left_out += 1
            return None
        reader = _Reader(os.open(path, os.O_RDONLY | os.O_CLOEXEC), limit)
        if reader.wait():
            return reader.content
        self.left_out += 1
        busy[tenant] = reader, now + REST_SECONDS
        return None


class _Reader(threading.Thread):
    """Reads and closes one descriptor."""

    def __init__(self, fd: int, limit: int) -> None:
        super().__init__(name="command line", daemon=True)
        self._fd, self._limit = fd, limit
        self.content = b""

    def run(self) -> None:
        try:
            self.content = os.read(self._fd, self._limit)
        except OSError:  # it has ended
            pass
        finally:
            os.close(self._fd)

    def wait(self) -> bool:
        """Read; False if that takes longer than WAIT_SECONDS."""
        try:
            self.start()
        except RuntimeError:  # no more threads are allowed here
            os.close(self._fd)
            return False
        self.join(WAIT_SECONDS)
        return not self.is_alive()
