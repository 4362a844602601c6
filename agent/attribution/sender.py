"""Find the sender of a reply: combine the lookups of process, container and pod.

Rules
1. A lookup never raises and never blocks on a process. `budget` limits the lookups of each tenant. Beyond the limit, a
   sender gets the name from the kernel and the names of its container; it is looked up when it is seen again.
2. An incomplete sender is looked up again after one second, then after two, four and so on, because the name of a
   container may appear later than the container, or never.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from udpwatch.agent.attribution.budget import Budget
from udpwatch.agent.attribution.cache import TtlCache
from udpwatch.agent.attribution.cgroups import Cgroups
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_LABEL, MAX_PATH, Container, folder, parse, tenant
from udpwatch.agent.attribution.docker import DockerNames
from udpwatch.agent.attribution.pod import Pod, Pods
from udpwatch.agent.attribution.process import Process, Processes
from udpwatch.agent.attribution.runtime import Runtime, Runtimes
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.records import printable
from udpwatch.agent.model import Cause, Event, Increase, Sender

MAX_SENDERS = 8192  # more than the budget allows in KEEP_SECONDS, so a flood cannot evict other senders
MAX_CONTAINERS = 1024
KEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0
SHORT_ID = 12  # digits, as docker ps shows them

#: a process id, a thread's name and a cgroup's id, as the kernel reports them
_Key = tuple[int, str, int]


@dataclass(frozen=True, slots=True)
class Roots:
    """The directories that the lookups read; the defaults are those of a host."""

    proc: Path = Path("/proc")
    log: Path = Path("/var/log")
    docker: Path = Path("/var/lib/docker")
    cgroup: Path | None = None  # a mount of cgroup v2


@dataclass(frozen=True, slots=True)
class _Cached:
    sender: Sender
    wait: float  # seconds until the next lookup, doubled each time
    retry_at: float  # monotonic seconds


class Senders:
    """Looks up the senders of findings and events."""

    def __init__(
        self, roots: Roots = Roots(), pace: Callable[[], None] = unpaced, budget: Budget | None = None
    ) -> None:
        """``pace`` is called at each lookup, and may pause (cpu.Pace)."""
        self._pace = pace
        self._command_lines = CommandLines()
        self._processes = Processes(roots.proc, self._command_lines)
        self._cgroups = Cgroups(roots.cgroup)
        self._runtimes = Runtimes(roots.proc, self._command_lines)
        self._pods = Pods(roots.log)
        self._docker = DockerNames(roots.docker)
        self._budget = budget or Budget()
        self._cache: TtlCache[_Key, _Cached] = TtlCache(MAX_SENDERS, KEEP_SECONDS)
        self._containers: TtlCache[int, Sender] = TtlCache(MAX_CONTAINERS, KEEP_SECONDS)  # cgroup id -> a sender in it
        self.deferred = 0  # lookups beyond the budget

    @property
    def left_out(self) -> int:
        """Return how many lookups are incomplete.

        They are lookups beyond the budget, processes that /proc hides, command lines that a process or its tenant
        withheld, and cgroups that a walk skipped because there were too many.
        """
        return self.deferred + self._processes.hidden + self._command_lines.left_out + self._cgroups.left_out

    def lookup(self, reply: Increase | Event, now: float | None = None) -> Sender:
        """Return the sender of a reply. ``now``: monotonic seconds.

        Call it soon after the reply: less is known about a process that has exited.
        """
        finding = reply.finding
        if finding.cause is Cause.FORWARDED:
            return Sender("")  # no process of this node sent it
        return self.sender_of(reply.pid, finding.process, finding.cgroup, finding.netns, now)

    def sender_of(self, pid: int, process: str, cgroup: int, netns: int, now: float | None = None) -> Sender:
        """Return what is known about a process: its id, the name that the kernel reports, its cgroup's id, and the
        number of its network namespace; 0 or "": unknown.
        """
        self._pace()
        now = time.monotonic() if now is None else now
        key = pid, process, cgroup
        known = self._cache.get(key, now)
        if known and now < known.retry_at:
            return known.sender
        path = self._cgroups.path(cgroup, now)
        # On hosts with cgroup v1 every process is in the root cgroup; the network namespace distinguishes tenants.
        if not self._budget.take(tenant((path,)) or f"netns {netns}", now):
            self.deferred += 1
            return known.sender if known else self._deferred_sender(*key, path, now)
        return self._resolve_and_cache(key, known, now)

    def _resolve_and_cache(self, key: _Key, known: _Cached | None, now: float) -> Sender:
        sender, complete = self._resolve(*key, now)
        wait = 2 * known.wait if known else RETRY_SECONDS
        retry_at = now + (KEEP_SECONDS if complete else wait)
        return self._cache.put(key, _Cached(sender, wait, retry_at), now).sender

    def _deferred_sender(self, pid: int, comm: str, cgroup_id: int, path: str, now: float) -> Sender:
        """Return what is known about a sender without reading a file."""
        name = comm or "unknown"
        other = self._containers.get(cgroup_id, now)
        if other:
            return replace(other, process=name, pid=pid, executable="", command="")
        container = parse(path)
        return Sender(
            process=name,
            pid=pid,
            cgroup=printable(os.fsencode(path))[:MAX_PATH],
            runtime=container.runtime,
            container_id=container.id,
            container=container.id[:SHORT_ID],
        )

    def namespace_of(self, tenant: int) -> str:
        """Return the Kubernetes namespace of a tenant in the kernel's findings (records.tenant_of), or ""."""
        if tenant >= 1 << 63:  # the tenant is a network namespace, not a cgroup
            return ""
        key, now = (0, "", tenant), time.monotonic()
        known = self._cache.get(key, now)
        if known:
            return known.sender.namespace
        if not self._budget.take(f"findings of {tenant}", now):
            self.deferred += 1
            return ""
        return self._resolve_and_cache(key, None, now).namespace

    def _resolve(self, pid: int, comm: str, cgroup_id: int, now: float) -> tuple[Sender, bool]:
        """Look up everything about a sender; return it, and whether it is complete."""
        process = self._processes.lookup(pid, comm, cgroup_id, now)
        # If the process is not in the cgroup that the kernel reported, the kernel has reused the process id.
        if process.cgroups and not self._cgroups.is_at(cgroup_id, process.unified, now):
            process = Process(comm or "unknown")
        path = self._path(process, cgroup_id, now)
        runtime = self._runtimes.lookup(pid, path, now) if process.cgroups and path != "/" else Runtime()
        container = _merge(parse(path), runtime, path)
        pod, name = self._names(container, runtime, now)
        if container.cgroup:
            self._cgroups.watch(container.cgroup, now)
        sender = Sender(
            process=process.name,
            pid=pid,
            executable=process.executable,
            command=process.command,
            cgroup=printable(os.fsencode(path))[:MAX_PATH],
            runtime=container.runtime,
            container_id=container.id,
            container=(name or container.id[:SHORT_ID])[:MAX_LABEL],
            namespace=pod.namespace[:MAX_LABEL],
            pod=pod.pod[:MAX_LABEL],
        )
        # The cgroup id identifies this container only if the path is in the v2 hierarchy.
        if cgroup_id and container.id and path in (process.unified, self._cgroups.path(cgroup_id, now)):
            self._containers.put(cgroup_id, sender, now)
        return sender, bool(name if container.id else path)

    def _path(self, process: Process, cgroup_id: int, now: float) -> str:
        """Return the path that names the container, else the first path of the process, else ""."""
        paths = list(process.cgroups)
        # A path with "/.." is relative to the agent's own cgroup namespace and useless; the id still leads to the path.
        if not paths or "/.." in paths[0]:
            by_id = self._cgroups.path(cgroup_id, now)
            paths = [by_id, *paths] if by_id else paths
        return next((path for path in paths if parse(path).id), paths[0] if paths else "")

    def _names(self, container: Container, runtime: Runtime, now: float) -> tuple[Pod, str]:
        """Return the pod and the container's name. Names from Kubernetes take precedence over the runtime's."""
        pod = self._pods.lookup(container.id, container.pod_uid) or Pod("", "")
        name = pod.container or runtime.container
        if not name and not pod.pod and container.id and container.runtime in ("docker", ""):
            name = self._docker.lookup(container.id, now)
        return pod, name

    def has_ended(self, sender: Sender, now: float) -> bool:
        """Return whether the sender's pod, or its container outside a pod, has ended. ``now``: monotonic seconds.

        A pod ends with its last container, which is usually its sandbox. An empty cgroup counts as ended, too, because
        some runtimes do not remove the pod's cgroup.
        """
        container = parse(sender.cgroup)
        path = container.cgroup or folder(sender.cgroup, sender.container_id)
        return bool(path) and self._cgroups.is_removed(path, now, when_empty=container.id not in path)


def _merge(container: Container, runtime: Runtime, path: str) -> Container:
    """Complete the container that the path names with what the monitor's arguments contain."""
    if container.id:
        return replace(container, runtime=container.runtime or runtime.name)
    if runtime.container_id:  # the path has a name instead of an id: `ctr` lets the user choose
        return Container(runtime.container_id, runtime.name, "", folder(path, runtime.container_id))
    return container
