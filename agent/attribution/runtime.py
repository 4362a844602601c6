"""From a process to the program that watches over its container, for what the cgroup's path does not tell.

Every runtime leaves a small process beside each container, which is the parent of the container's first process and
has the container's id among its arguments: containerd-shim (Docker and containerd) or conmon (CRI-O and podman).

Rules
1. A process inside may call itself so, too. It is passed over: who watches over a container is not in its cgroup.
2. What it says counts only for the very container that the path names, by that container's whole id.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from udpwatch.agent.attribution.cache import Cache
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_LABEL, folder, parse, tenant
from udpwatch.agent.attribution.process import cgroups_of
from udpwatch.agent.kernel.records import printable

MAX_CONTAINERS = 4096
KEEP_SECONDS = 600.0
RETRY_SECONDS = 60.0  # not found from one process may be found from the next
MAX_ANCESTORS = 64
MAX_ARGUMENTS_BYTES = 8192
_SHIM, _CONMON = b"containerd-shim", b"conmon"
_DOCKER = "moby"  # the namespace that Docker uses in containerd


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the watching program's arguments tell; "": nothing."""

    name: str = ""  # as Sender.runtime
    container_id: str = ""  # the whole one; with containerd in Kubernetes, where one watches over a whole pod, none
    container: str = ""  # its name; podman only


_UNKNOWN = Runtime()
_OF_A_POD = Runtime("containerd")


class Runtimes:
    """Looks in /proc for a process's ancestors."""

    def __init__(self, proc_root: Path, command_lines: CommandLines) -> None:
        self._proc, self._command_lines = proc_root, command_lines
        self._cache: Cache[str, Runtime] = Cache(MAX_CONTAINERS, KEEP_SECONDS)

    def lookup(self, pid: int, cgroup: str, now: float) -> Runtime:
        """The runtime of the container that this cgroup is; ``pid``: a process in it. ``now``: monotonic seconds."""
        known = self._cache.get(cgroup, now)
        if known:
            return known
        try:
            found = self._climb(pid, cgroup, now)
        except (OSError, ValueError, IndexError):  # one of them has ended
            return _UNKNOWN
        return self._cache.put(cgroup, found, now, RETRY_SECONDS if found == _UNKNOWN else None)

    def _climb(self, pid: int, cgroup: str, now: float) -> Runtime:
        _, pid = self._stat(pid)
        for _ in range(MAX_ANCESTORS):
            if pid <= 1:
                break
            name, parent = self._stat(pid)
            if name.startswith(_SHIM) or name == _CONMON:
                # First where it is: a process that ends in between has no arguments any more, and on v1 no place.
                places = cgroups_of(self._proc / str(pid) / "cgroup")
                path = self._proc / str(pid) / "cmdline"
                arguments = self._command_lines.read(path, MAX_ARGUMENTS_BYTES, tenant(places), now)
                found = _UNKNOWN if arguments is None else _of_arguments(name, arguments)
                number = _container(found, cgroup)
                # By name, not by the whole path: that is another one as seen from a cgroup namespace.
                if number and places and not any(folder(place, number) for place in places):
                    return found
            pid = parent
        return _UNKNOWN

    def _stat(self, pid: int) -> tuple[bytes, int]:
        """(name, parent) of PID (NAME) STATE PPID ...; the name may hold anything."""
        name, _, behind = (self._proc / str(pid) / "stat").read_bytes().partition(b"(")[2].rpartition(b")")
        return name, int(behind.split()[1])


def _container(found: Runtime, cgroup: str) -> str:
    """The id of the container on the path of which a watching process speaks; "": of none."""
    number = parse(cgroup).id
    if number:  # with containerd in Kubernetes one watches over the whole pod, and has no name to give
        speaks = found == _OF_A_POD or found.container_id == number
    else:  # only ctr takes other ids than numbers
        number, speaks = found.container_id, found.name == "containerd"
    return number if speaks and folder(cgroup, number) else ""


def _of_arguments(name: bytes, raw: bytes) -> Runtime:
    arguments = [printable(each) for each in raw.split(b"\0")]
    options = dict(pairwise(arguments))
    if name == _CONMON:
        container = options.get("-n", "")
        if container.startswith("k8s_"):
            return Runtime("cri-o", options.get("-c", ""))
        return Runtime("podman", options.get("-c", ""), container[:MAX_LABEL])
    namespace = options.get("-namespace", "")
    if namespace == "k8s.io":  # one for the whole pod
        return _OF_A_POD
    return Runtime("docker" if namespace == _DOCKER else "containerd", options.get("-id", ""))
