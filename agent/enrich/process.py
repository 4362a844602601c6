"""From what the kernel saw of the sender (a thread's name and a process id) to the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.kernel.records import printable

MAX_PROCESSES = 4096
KEEP_SECONDS = 60.0  # a process may change its name, and a process id is used again


@dataclass(frozen=True, slots=True)
class Process:
    """What is known of a sender."""

    name: str
    cgroup: str | None  # path in the v2 hierarchy, None where it cannot be told any more


class Processes:
    """Looks senders up in /proc."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self._proc = proc_root
        self._cache: OrderedDict[tuple[int, str], tuple[float, Process]] = OrderedDict()

    def lookup(self, pid: int, comm: str, now: float | None = None) -> Process:
        """The process behind a thread's name.

        The kernel reports the name of the thread that sent. The process is called after its main thread; that one
        is taken if one of the process's threads still has the reported name, else the id may already belong to
        somebody else, and the reported name stands.
        """
        now = time.monotonic() if now is None else now
        cached = self._cache.get((pid, comm))
        if cached and now - cached[0] < KEEP_SECONDS:
            return cached[1]
        process = self._read(pid, comm)
        self._cache[pid, comm] = (now, process)
        self._cache.move_to_end((pid, comm))
        if len(self._cache) > MAX_PROCESSES:
            self._cache.popitem(last=False)
        return process

    def _read(self, pid: int, comm: str) -> Process:
        folder = self._proc / str(pid)
        unknown = Process(comm or "unknown", None)
        if not pid:
            return unknown
        try:
            main = _name(folder / "comm")
            if main != comm and comm and not any(_name(t / "comm") == comm for t in (folder / "task").iterdir()):
                return unknown
            return Process(main, _unified_path(folder / "cgroup"))
        except OSError:
            return unknown


def _name(path: Path) -> str:
    return printable(path.read_bytes().removesuffix(b"\n"))


def _unified_path(path: Path) -> str | None:
    for line in path.read_text(errors="backslashreplace").splitlines():
        if line.startswith("0::"):
            return line[3:]
    return None
