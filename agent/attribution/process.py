"""From what the kernel saw of the sender (a thread's name and a process id) to the process.

Of a process that has exited since, the thread's name is all that is left; its cgroup's id is in the finding.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from udpwatch.agent.attribution.cache import Cache
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_PATH, tenant
from udpwatch.agent.kernel.records import printable

MAX_PROCESSES = 4096
KEEP_SECONDS = 60.0  # a process may change its name, and a process id is used again
MAX_THREADS = 64  # looked at for one name: the rest would keep the agent from its events for as long as somebody likes
MAX_COMMAND_BYTES = 1024  # of the command line; Java's have many thousand
MAX_COMMAND_LETTERS = 2048  # of it as it is shown: control characters and quotes take up to five
_CUT = "…"
_DELETED = " (deleted)"  # the kernel adds it to the path of a cgroup that is gone


@dataclass(frozen=True, slots=True)
class Process:
    """What is known of a sender; "" and (): not known."""

    name: str
    executable: str = ""
    command: str = ""
    cgroups: tuple[str, ...] = ()  # its path in each hierarchy: v2 first, then systemd's, then the other ones of v1
    unified: str = ""  # its path in v2, by which it can be compared with what the kernel reported


class Processes:
    """Looks senders up in /proc."""

    def __init__(self, proc_root: Path, command_lines: CommandLines) -> None:
        self._proc, self._command_lines = proc_root, command_lines
        self._cache: Cache[tuple[int, str, int], Process] = Cache(MAX_PROCESSES, KEEP_SECONDS)

    def lookup(self, pid: int, comm: str, cgroup: int, now: float) -> Process:
        """The process behind a thread's name. ``now``: monotonic seconds.

        The kernel reports the name of the thread that sent. The process is called after its main thread; that one
        is taken if one of the process's first MAX_THREADS threads still has the reported name, else the id may already
        belong to somebody else, and the reported name stands. The cgroup's id only tells processes apart that had
        the same id one after the other.
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
            return unknown
        unified = next((path for controllers, path in lines if not controllers), "")
        return Process(main, executable, _command(arguments), _paths(lines), unified)

    def _arguments(self, path: Path, tenant: str, now: float) -> list[bytes]:
        """The arguments, as far as MAX_COMMAND_BYTES go; none of a kernel thread, of a process that is just ending and
        of one that withholds them."""
        try:
            raw = self._command_lines.read(path, MAX_COMMAND_BYTES + 1, tenant, now) or b""
        except OSError:
            return []
        whole = len(raw) <= MAX_COMMAND_BYTES
        raw = raw[:MAX_COMMAND_BYTES].rstrip(b"\0")
        return (raw if whole else raw + _CUT.encode()).split(b"\0") if raw else []


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """A folder of /proc that stays that one process's, whoever gets its id next."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _name(path: Path) -> str:
    return printable(path.read_bytes().removesuffix(b"\n"))


def _has_thread(tasks: Path, comm: str) -> bool:
    with os.scandir(tasks) as entries:
        return any(_name(tasks / entry.name / "comm") == comm for entry in islice(entries, MAX_THREADS))


def cgroups_of(path: Path) -> tuple[str, ...]:
    """The paths of a /proc/PID/cgroup, each once, v2 first. Raises OSError."""
    return _paths(_cgroup_lines(path))


def _cgroup_lines(path: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line ID:CONTROLLERS:PATH that has a path of MAX_PATH at most; v2 has no controllers,
    and comes first."""
    # A cgroup's name may hold all that str.splitlines() takes for the end of a line, except "\n".
    lines = [line.split(":", 2) for line in os.fsdecode(path.read_bytes()).split("\n")]
    order = {"": 0, "name=systemd": 1}
    found = [(line[1], line[2].removesuffix(_DELETED)) for line in lines if len(line) == 3]
    found = [(controllers, path) for controllers, path in found if len(os.fsencode(path)) <= MAX_PATH]
    return sorted(found, key=lambda line: order.get(line[0], 2))


def _paths(lines: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for _, path in lines))


def _command(arguments: list[bytes]) -> str:
    text = shlex.join(map(printable, arguments))
    return text if len(text) <= MAX_COMMAND_LETTERS else text[:MAX_COMMAND_LETTERS] + _CUT


def _executable(link: Path, arguments: list[bytes]) -> str:
    """The program's path: the kernel's word where it may be asked (CAP_SYS_PTRACE, for most processes), else that of
    the process: its first argument, if that is a path."""
    try:
        return printable(os.fsencode(link.readlink()).removesuffix(_DELETED.encode()))[:MAX_PATH]
    except OSError:
        return printable(arguments[0]) if arguments and arguments[0].startswith(b"/") else ""
