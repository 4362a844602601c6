"""Read the command line of a process, without blocking on a process that withholds it.

To read /proc/PID/cmdline, the kernel copies from the process's memory while it holds the lock of that memory
(mmap_lock). The process controls how long the lock is held. For example, a reader of its /proc/PID/mem waits for a FUSE
file system, and an mmap(2) waits for that reader: both hold the lock forever. Among the files in /proc that attribution
reads, only cmdline needs this lock; comm, cgroup, stat, exe and task/ do not.

Rules
1. A separate thread reads each command line. After WAIT_SECONDS the thread is abandoned. It keeps one descriptor open
   and ends with the agent, because the kernel's wait for the lock is killable.
2. Each tenant may have one abandoned thread, and all tenants together MAX_ABANDONED. An abandoned thread counts for at
   least REST_SECONDS, even if it returns sooner. Otherwise a process could delay the agent again and again by
   withholding its arguments for a moment each time.
3. A command line that was not read is counted and returned as None.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

WAIT_SECONDS = 0.2  # reading usually takes 0.1 ms; it takes longer only if no CPU is free
MAX_ABANDONED = 8
REST_SECONDS = 60.0


class CommandLines:
    """Reads files /proc/PID/cmdline."""

    def __init__(self) -> None:
        self._abandoned: dict[str, tuple[_Reader, float]] = {}  # by tenant, with the time it counts until
        self.left_out = 0  # command lines that were not read

    def read(self, path: Path, limit: int, tenant: str, now: float) -> bytes | None:
        """Return the first ``limit`` bytes of a /proc/PID/cmdline, or None if the process withholds them.

        ``tenant``: the tenant of that process, from `container.tenant`. ``now``: monotonic seconds.
        Raises OSError if the process does not exist.
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
        except OSError:  # the process has exited
            pass
        finally:
            os.close(self._fd)

    def wait(self) -> bool:
        """Read the file; return False if that takes longer than WAIT_SECONDS."""
        try:
            self.start()
        except RuntimeError:  # the limit of threads is reached
            os.close(self._fd)
            return False
        self.join(WAIT_SECONDS)
        return not self.is_alive()
