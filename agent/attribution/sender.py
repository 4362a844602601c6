"""Who sent a reply: process, container, pod and their names, put together from the single lookups.

Rules
1. A lookup neither raises nor waits for a process. What the lookups of a tenant cost is bounded (`budget`); beyond
   that a sender has the kernel's name and its container's, and is looked up when it is seen again.
2. A sender that is not known as a whole is looked up again after one second, then after two, four and so on: a name
   may come a moment after its container, or never.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from udpwatch.agent.attribution.budget import Budget
from udpwatch.agent.attribution.cache import Cache
from udpwatch.agent.attribution.cgroups import Cgroups
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.container import MAX_LABEL, MAX_PATH, Container, folder, parse, tenant
from udpwatch.agent.attribution.docker import DockerNames
from udpwatch.agent.attribution.pod import Pod, Pods
from udpwatch.agent.attribution.process import Process, Processes
from udpwatch.agent.attribution.runtime import Runtime, Runtimes
from udpwatch.agent.kernel.records import printable
from udpwatch.agent.model import Cause, Event, Increase, Sender

MAX_SENDERS = 8192  # more than the budget allows in KEEP_SECONDS: nobody's flood evicts them
MAX_CONTAINERS = 1024
KEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0
SHORT_ID = 12  # digits, as docker ps shows them

#: a process id, a thread's name and a cgroup's id, as the kernel reports them
_Key = tuple[int, str, int]


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the lookups read; the defaults are a host's own."""

    proc: Path = Path("/proc")
    log: Path = Path("/var/log")
    docker: Path = Path("/var/lib/docker")
    cgroup: Path | None = None  # a mount of cgroup v2


@dataclass(frozen=True, slots=True)
class _Known:
    sender: Sender
    wait: float  # seconds until it is looked up again
    retry_at: float  # monotonic seconds


class Senders:
    """Looks up who is behind findings and events."""

    def __init__(self, roots: Roots = Roots()) -> None:
        self._command_lines = CommandLines()
        self._processes = Processes(roots.proc, self._command_lines)
        self._cgroups = Cgroups(roots.cgroup)
        self._runtimes = Runtimes(roots.proc, self._command_lines)
        self._pods = Pods(roots.log)
        self._docker = DockerNames(roots.docker)
        self._budget = Budget()
        self._cache: Cache[_Key, _Known] = Cache(MAX_SENDERS, KEEP_SECONDS)
        self._containers: Cache[int, Sender] = Cache(MAX_CONTAINERS, KEEP_SECONDS)  # by the cgroup's id: one in it
        self.deferred = 0  # lookups beyond the budget

    @property
    def left_out(self) -> int:
        """Look-ups beyond the budget; command lines not read because their process, or its tenant, withheld one; and
        cgroups that a search by id left out because there were too many.
        """
        return self.deferred + self._command_lines.left_out + self._cgroups.left_out

    def lookup(self, seen: Increase | Event, now: float | None = None) -> Sender:
        """The sender of a reply. Ask soon: of a process that has exited less is known. ``now``: monotonic seconds."""
        finding = seen.finding
        if finding.cause is Cause.FORWARDED:
            return Sender("")  # another machine's
        now = time.monotonic() if now is None else now
        key = seen.pid, finding.process, finding.cgroup
        known = self._cache.get(key, now)
        if known and now < known.retry_at:
            return known.sender
        path = self._cgroups.path(finding.cgroup, now)
        # In the root cgroup, as on hosts with v1, the network namespace tells tenants apart.
        if not self._budget.take(tenant((path,)) or f"netns {finding.netns}", now):
            self.deferred += 1
            return known.sender if known else self._unread(*key, path, now)
        return self._remember(key, known, now)

    def _remember(self, key: _Key, known: _Known | None, now: float) -> Sender:
        sender, complete = self._look(*key, now)
        wait = 2 * known.wait if known else RETRY_SECONDS
        retry_at = now + (KEEP_SECONDS if complete else wait)
        return self._cache.put(key, _Known(sender, wait, retry_at), now).sender

    def _unread(self, pid: int, comm: str, number: int, path: str, now: float) -> Sender:
        """A sender by what is known without reading anything."""
        name = comm or "unknown"
        other = self._containers.get(number, now)
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
        """The Kubernetes namespace of a tenant of the kernel's findings (records.tenant_of); "" where it has none."""
        if tenant >= 1 << 63:  # in the root cgroup
            return ""
        key, now = (0, "", tenant), time.monotonic()
        known = self._cache.get(key, now)
        if known:
            return known.sender.namespace
        if not self._budget.take(f"findings of {tenant}", now):
            self.deferred += 1
            return ""
        return self._remember(key, None, now).namespace

    def _look(self, pid: int, comm: str, number: int, now: float) -> tuple[Sender, bool]:
        process = self._processes.lookup(pid, comm, number, now)
        # The id may be another process's by now: the kernel's word on the cgroup decides.
        if process.cgroups and not self._cgroups.is_at(number, process.unified, now):
            process = Process(comm or "unknown")
        paths = list(process.cgroups)
        # Relative to this process's own cgroup namespace ("/../..") it leads nowhere; by its id it does.
        if not paths or "/.." in paths[0]:
            by_id = self._cgroups.path(number, now)
            paths = [by_id, *paths] if by_id else paths
        path = next((path for path in paths if parse(path).id), paths[0] if paths else "")
        container, runtime = parse(path), Runtime()
        if process.cgroups and path != "/":
            runtime = self._runtimes.lookup(pid, path, now)
        container = _agreed(container, runtime, path)
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
        # The id names this container only where the path is that of the v2 hierarchy.
        if number and container.id and path in (process.unified, self._cgroups.path(number, now)):
            self._containers.put(number, sender, now)
        return sender, bool(name if container.id else path)

    def _names(self, container: Container, runtime: Runtime, now: float) -> tuple[Pod, str]:
        """(the pod, the container's name). Kubernetes' names go before those that a runtime made up for it."""
        pod = self._pods.lookup(container.id, container.pod_uid) or Pod("", "")
        name = pod.container or runtime.container
        if not name and not pod.pod and container.id and container.runtime in ("docker", ""):
            name = self._docker.lookup(container.id, now)
        return pod, name

    def has_ended(self, sender: Sender, now: float) -> bool:
        """Whether the sender's pod, or its container where it is in none, has ended as far as can be seen.

        A pod lives as long as anything in it does, its sandbox at least; not everybody removes its empty cgroup.
        """
        container = parse(sender.cgroup)
        place = container.cgroup or folder(sender.cgroup, sender.container_id)
        return bool(place) and self._cgroups.gone(place, now, when_empty=container.id not in place)


def _agreed(container: Container, runtime: Runtime, path: str) -> Container:
    """What the path tells, and what only the runtime's arguments do."""
    if container.id:
        return replace(container, runtime=container.runtime or runtime.name)
    if runtime.container_id:  # a name instead of a number: ctr lets its user choose
        return Container(runtime.container_id, runtime.name, "", folder(path, runtime.container_id))
    return container
