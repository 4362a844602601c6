"""Find the runtime of a container by the monitor process that the runtime runs beside it.

This supplies what the cgroup's path does not contain. Every runtime starts one monitor per container: containerd-shim
(Docker and containerd) or conmon (CRI-O and podman). It is the parent of the container's first process, and the
container id is among its arguments.

Rules
1. A process inside the container may have the name of a monitor. It is ignored, because a real monitor is not in the
   container's cgroup.
2. The arguments of a monitor count only if they contain the complete id of the container that the path names.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from udpwatch.agent.attribution.cache import TtlCache
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_LABEL, folder, parse, tenant
from udpwatch.agent.attribution.process import cgroups_of
from udpwatch.agent.kernel.records import printable

MAX_CONTAINERS = 4096
KEEP_SECONDS = 600.0
RETRY_SECONDS = 60.0  # another process of the container may lead to the monitor
MAX_ANCESTORS = 64
MAX_ARGUMENTS_BYTES = 8192
_SHIM, _CONMON = b"containerd-shim", b"conmon"
_DOCKER = "moby"  # the namespace that Docker uses in containerd


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the monitor's arguments contain; "": unknown."""

    name: str = ""  # as in Sender.runtime
    container_id: str = ""  # complete; "" for containerd in Kubernetes, where one monitor serves a whole pod
    container: str = ""  # the container's name; podman only


_UNKNOWN = Runtime()
_OF_A_POD = Runtime("containerd")


class Runtimes:
    """Looks up the monitor among a process's ancestors in /proc."""

    def __init__(self, proc_root: Path, command_lines: CommandLines) -> None:
        self._proc, self._command_lines = proc_root, command_lines
        self._cache: TtlCache[str, Runtime] = TtlCache(MAX_CONTAINERS, KEEP_SECONDS)

    def lookup(self, pid: int, cgroup: str, now: float) -> Runtime:
        """Return the runtime of the container in a cgroup. ``pid``: a process in it. ``now``: monotonic seconds."""
        known = self._cache.get(cgroup, now)
        if known:
            return known
        try:
            found = self._search(pid, cgroup, now)
        except (OSError, ValueError, IndexError):  # one of the processes has exited
            return _UNKNOWN
        return self._cache.put(cgroup, found, now, RETRY_SECONDS if found == _UNKNOWN else None)

    def _search(self, pid: int, cgroup: str, now: float) -> Runtime:
        """Return the runtime that the first valid monitor among the ancestors names. Raises OSError, ValueError."""
        _, pid = self._stat(pid)
        for _ in range(MAX_ANCESTORS):
            if pid <= 1:
                break
            name, parent = self._stat(pid)
            if name.startswith(_SHIM) or name == _CONMON:
                # The cgroups are read first: if the process exits in between, it has no arguments, and on v1 no cgroup.
                paths = cgroups_of(self._proc / str(pid) / "cgroup")
                file = self._proc / str(pid) / "cmdline"
                arguments = self._command_lines.read(file, MAX_ARGUMENTS_BYTES, tenant(paths), now)
                found = _UNKNOWN if arguments is None else _parse_arguments(name, arguments)
                container_id = _monitored(found, cgroup)
                # Compared by name, because a cgroup namespace changes the rest of the path.
                if container_id and paths and not any(folder(path, container_id) for path in paths):
                    return found
            pid = parent
        return _UNKNOWN

    def _stat(self, pid: int) -> tuple[bytes, int]:
        """Return (name, parent) from PID (NAME) STATE PPID ...; the name may contain any character."""
        name, _, rest = (self._proc / str(pid) / "stat").read_bytes().partition(b"(")[2].rpartition(b")")
        return name, int(rest.split()[1])


def _monitored(found: Runtime, cgroup: str) -> str:
    """Return the id of the container in this cgroup if the monitor is for it, else ""."""
    container_id = parse(cgroup).id
    if container_id:  # containerd's monitor of a whole pod names no container
        matches = found == _OF_A_POD or found.container_id == container_id
    else:  # only `ctr` allows ids that are not hexadecimal
        container_id, matches = found.container_id, found.name == "containerd"
    return container_id if matches and folder(cgroup, container_id) else ""


def _parse_arguments(name: bytes, raw: bytes) -> Runtime:
    arguments = [printable(each) for each in raw.split(b"\0")]
    options = dict(pairwise(arguments))
    if name == _CONMON:
        container = options.get("-n", "")
        if container.startswith("k8s_"):
            return Runtime("cri-o", options.get("-c", ""))
        return Runtime("podman", options.get("-c", ""), container[:MAX_LABEL])
    namespace = options.get("-namespace", "")
    if namespace == "k8s.io":  # Kubernetes: one monitor per pod
        return _OF_A_POD
    return Runtime("docker" if namespace == _DOCKER else "containerd", options.get("-id", ""))
