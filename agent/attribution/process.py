"""Find the sending process by what the kernel reports: a thread's name and a process id.

If the process has exited, only the thread's name is left; the finding still has the cgroup id. The same is true if
/proc hides the process (mount option hidepid), which is counted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from udpwatch.agent.attribution.cache import TtlCache
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_PATH, tenant
from udpwatch.agent.kernel.records import printable

MAX_PROCESSES = 4096
KEEP_SECONDS = 60.0  # a process may change its name, and the kernel reuses process ids
MAX_THREADS = 64  # compared with a name; without a limit, a process could block the agent with many threads
MAX_COMMAND_BYTES = 1024  # of the command line; those of Java have many thousands
MAX_COMMAND_CHARACTERS = 2048  # as shown: a control character or quote becomes up to five characters
_CUT = "…"
_DELETED = " (deleted)"  # the kernel appends this to the path of a removed cgroup


@dataclass(frozen=True, slots=True)
class Process:
    """A sending process; "" and (): unknown."""

    name: str
    executable: str = ""
    command: str = ""
    cgroups: tuple[str, ...] = ()  # its path in each hierarchy: v2, then systemd's, then the others of v1
    unified: str = ""  # its path in v2, to compare with the cgroup that the kernel reported


class Processes:
    """Looks up processes in /proc."""

    def __init__(self, proc_root: Path, command_lines: CommandLines) -> None:
        self._proc, self._command_lines = proc_root, command_lines
        self._cache: TtlCache[tuple[int, str, int], Process] = TtlCache(MAX_PROCESSES, KEEP_SECONDS)
        self.hidden = 0  # lookups of processes that exist and that /proc does not show

    def lookup(self, pid: int, comm: str, cgroup: int, now: float) -> Process:
        """Return the process of a sending thread. ``now``: monotonic seconds.

        The kernel reports the name of the thread that sent. A process is named after its main thread. That name is used
        if one of the first MAX_THREADS threads still has the reported name. Otherwise the kernel may have reused the
        process id, and the reported name is used. ``cgroup`` distinguishes processes that had the same id one after
        the other.
        """
        key = pid, comm, cgroup
        return self._cache.get(key, now) or self._cache.put(key, self._read(pid, comm, now), now)

    def _read(self, pid: int, comm: str, now: float) -> Process:
        unknown = Process(comm or "unknown")
        if not pid:
            return unknown
        try:
            with _opened(self._proc / str(pid)) as folder:
                main = _name(folder / "comm")
                if main != comm and comm and not _has_thread(folder / "task", comm):
                    return unknown
                lines = _cgroup_lines(folder / "cgroup")
                arguments = self._arguments(folder / "cmdline", tenant(_paths(lines)), now)
                executable = _executable(folder / "exe", arguments)
        except OSError:
            self.hidden += _exists(pid)
            return unknown
        unified = next((path for controllers, path in lines if not controllers), "")
        return Process(main, executable, _command(arguments), _paths(lines), unified)

    def _arguments(self, path: Path, tenant: str, now: float) -> list[bytes]:
        """Return the arguments, up to MAX_COMMAND_BYTES.

        A kernel thread, an exiting process and a process that withholds its command line have none.
        """
        try:
            raw = self._command_lines.read(path, MAX_COMMAND_BYTES + 1, tenant, now) or b""
        except OSError:
            return []
        whole = len(raw) <= MAX_COMMAND_BYTES
        raw = raw[:MAX_COMMAND_BYTES].rstrip(b"\0")
        return (raw if whole else raw + _CUT.encode()).split(b"\0") if raw else []


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """Yield a path to a /proc/PID that stays with this process, even if the kernel reuses its id."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _exists(pid: int) -> bool:
    """Return whether there is a process with this id. The kernel tells, whatever /proc shows."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _name(path: Path) -> str:
    return printable(path.read_bytes().removesuffix(b"\n"))


def _has_thread(tasks: Path, comm: str) -> bool:
    with os.scandir(tasks) as entries:
        return any(_name(tasks / entry.name / "comm") == comm for entry in islice(entries, MAX_THREADS))


def cgroups_of(path: Path) -> tuple[str, ...]:
    """Return the paths in a /proc/PID/cgroup without duplicates, v2 first. Raises OSError."""
    return _paths(_cgroup_lines(path))


def _cgroup_lines(path: Path) -> list[tuple[str, str]]:
    """Return (controllers, path) of each line ID:CONTROLLERS:PATH whose path has at most MAX_PATH bytes.

    The line of v2 has no controllers and comes first.
    """
    # A cgroup's name may contain every line separator of str.splitlines() except "\n".
    lines = [line.split(":", 2) for line in os.fsdecode(path.read_bytes()).split("\n")]
    order = {"": 0, "name=systemd": 1}
    found = [(line[1], line[2].removesuffix(_DELETED)) for line in lines if len(line) == 3]
    found = [(controllers, path) for controllers, path in found if len(os.fsencode(path)) <= MAX_PATH]
    return sorted(found, key=lambda line: order.get(line[0], 2))


def _paths(lines: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for _, path in lines))


def _command(arguments: list[bytes]) -> str:
    text = shlex.join(map(printable, arguments))
    return text if len(text) <= MAX_COMMAND_CHARACTERS else text[:MAX_COMMAND_CHARACTERS] + _CUT


def _executable(link: Path, arguments: list[bytes]) -> str:
    """Return the program's path from the kernel, else the first argument if it is a path, else "".

    For most processes the kernel's link requires CAP_SYS_PTRACE.
    """
    try:
        return printable(os.fsencode(link.readlink()).removesuffix(_DELETED.encode()))[:MAX_PATH]
    except OSError:
        return printable(arguments[0]) if arguments and arguments[0].startswith(b"/") else ""
