"""From a process to the program that watches over its container, for what the cgroup's path does not tell.

Every runtime leaves a small process beside each container, which is the parent of the container's first process and
has the container's id among its arguments: containerd-shim (Docker and containerd) or conmon (CRI-O and podman).
A process inside may call itself so, too: what is said here counts only as far as the cgroup's path agrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from udpwatch.agent.enrich.cache import Cache
from udpwatch.agent.kernel.records import printable

MAX_CONTAINERS = 4096
KEEP_SECONDS = 600.0
MAX_ANCESTORS = 64
MAX_ARGUMENTS_BYTES = 8192
_DOCKER = "moby"  # the namespace that Docker uses in containerd


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the watching program's arguments tell; "": nothing."""

    name: str = ""  # as Sender.runtime
    container_id: str = ""  # with containerd in Kubernetes that of the pod's first container
    container: str = ""  # its name; podman only


_UNKNOWN = Runtime()


class Runtimes:
    """Looks in /proc for a process's ancestors."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self._proc = proc_root
        self._cache: Cache[str, Runtime] = Cache(MAX_CONTAINERS, KEEP_SECONDS)

    def lookup(self, pid: int, cgroup: str, now: float) -> Runtime:
        """The runtime of the container that this cgroup is; ``pid``: a process in it. ``now``: monotonic seconds."""
        known = self._cache.get(cgroup, now)
        if known:
            return known
        try:
            found = self._climb(pid)
        except (OSError, ValueError):  # one of them has ended
            return _UNKNOWN
        if found.container_id and found.container_id not in cgroup:
            found = _UNKNOWN
        return self._cache.put(cgroup, found, now)

    def _climb(self, pid: int) -> Runtime:
        for _ in range(MAX_ANCESTORS):
            if pid <= 1:
                break
            folder = self._proc / str(pid)
            # stat: PID (NAME) STATE PPID ...; the name may hold anything
            name, _, behind = (folder / "stat").read_bytes().partition(b"(")[2].rpartition(b")")
            if name.startswith((b"containerd-shim", b"conmon")):
                return _of_arguments(name, folder / "cmdline")
            pid = int(behind.split()[1])
        return _UNKNOWN


def _of_arguments(name: bytes, path: Path) -> Runtime:
    with path.open("rb") as file:
        arguments = [printable(each) for each in file.read(MAX_ARGUMENTS_BYTES).split(b"\0")]
    options = dict(pairwise(arguments))
    if name == b"conmon":
        container = options.get("-n", "")
        if container.startswith("k8s_"):
            return Runtime("cri-o", options.get("-c", ""))
        return Runtime("podman", options.get("-c", ""), container)
    namespace = options.get("-namespace", "")
    if namespace == "k8s.io":  # one for the whole pod
        return Runtime("containerd")
    return Runtime("docker" if namespace == _DOCKER else "containerd", options.get("-id", ""))
