"""The sensor of bpf/reply.c: what it found, how it is, and keeping it attached.

Rules
1. Counts are the kernel's. What leaves here is the increase since the last reading, each datagram once.
2. A suspected reply (verdict unknown) leaves only after conntrack has been asked; what cannot be decided
   within two windows is counted as undecided and never reported.
3. Health is asked of the kernel, link by link, never remembered.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from udpwatch.agent.kernel import bpf, records
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.features import VMLINUX_BTF, Features
from udpwatch.agent.kernel.libbpf import RingBuffer
from udpwatch.agent.kernel.loader import HOOKS, Limits, Loaded, load
from udpwatch.agent.model import Counters, Event, Finding, Flow, Increase, Probe, Reading

if TYPE_CHECKING:
    from udpwatch.agent.kernel.conntrack import Conntrack

MAX_WAITING = 1_000  # events of suspected replies that conntrack could not be asked about yet
CANARY_SECONDS = 0.5
ASK_SECONDS = 1.0  # of netlink questions in one reading; what is left is asked in the next
COUNT_PEERS_SECONDS = 10.0  # walking the whole map is not done at every reading


@dataclass(slots=True)
class _Known:
    """One element of the findings map, as last read."""

    finding: Finding
    flow: Flow | None
    counted: int = 0  # of its count, how many have left as increases, were NAT, or were given up
    undecided_since: int | None = None  # CLOCK_MONOTONIC, nanoseconds
    translated: bool = False  # conntrack said that it is NAT


def possible_cpus(path: Path = Path("/sys/devices/system/cpu/possible")) -> int:
    """How many values an element of a per-CPU map has: one more than the highest possible CPU number."""
    return int(path.read_text().strip().replace(",", "-").split("-")[-1]) + 1


class ReplySensor:
    """Owns the descriptors that the loader handed over. Not thread-safe: one thread reads."""

    def __init__(self, cgroup: Cgroup, limits: Limits, loaded: Loaded) -> None:
        self._cgroup = cgroup
        self._limits = limits
        self._maps = loaded.maps
        self._programs = loaded.programs
        self._links = loaded.links
        self._refused = dict(loaded.refused)
        self._reattached = {hook.name: 0 for hook in HOOKS}
        self._known: dict[bytes, _Known] = {}
        self._undecided = 0
        self._dropped = 0
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._conntrack: Conntrack | None = None
        self._cpus = possible_cpus()
        self._tracked = 0
        self._tracked_at = -COUNT_PEERS_SECONDS
        self._evicted = 0
        self._ring = RingBuffer(loaded.maps["events"])
        self._poll = select.poll()
        self._poll.register(self._ring.fileno(), select.POLLIN)
        self.features: Features = loaded.features
        self.bcc_version = loaded.bcc_version

    @classmethod
    def open(cls, cgroup: Cgroup, limits: Limits, btf: Path = VMLINUX_BTF) -> ReplySensor:
        """Load and attach. Raises what `loader.load` raises."""
        return cls(cgroup, limits, load(cgroup, limits, btf))

    def close(self) -> None:
        """Detach and free everything."""
        self._ring.close()
        for group in (self._links, self._programs, self._maps):
            for descriptor in group.values():
                os.close(descriptor)
            group.clear()

    def events(self) -> Iterator[Event]:
        """The events that are there now; those of suspected replies once conntrack has confirmed them.

        One whose conversation stays undecided is never given out; it is counted as undecided with it.
        """
        waiting, self._waiting = self._waiting, deque(maxlen=MAX_WAITING)
        ask_until = time.monotonic() + ASK_SECONDS
        for raw in itertools.chain(waiting, self._ring.read()):
            event = records.decode_event(raw)
            if event.flow is None:
                yield event
                continue
            may_ask = time.monotonic() < ask_until
            answer = self._ask(event.finding, event.flow, event.pid) if may_ask else None
            if answer:
                yield event
            elif answer is None and time.monotonic_ns() - event.time < 2 * self._limits.window_ns:
                if len(self._waiting) == MAX_WAITING:
                    self._dropped += 1
                self._waiting.append(raw)

    def read(self, forget_ns: int) -> Reading:
        """One reading of everything; elements unused for ``forget_ns`` are taken out of the findings map."""
        now = time.monotonic_ns()
        return Reading(
            increases=tuple(self._increases(now, forget_ns)),
            counters=self.counters(),
            probes=self.probes(),
            tracked_peers=self._count_peers(now),
            evicted_peers=self._evicted,
            undecided=self._undecided,
            dropped=self._dropped,
        )

    def counters(self) -> Counters:
        """The programs' own counters."""
        raw = bpf.map_lookup(self._maps["counters"], bytes(4), records.STATS_BYTES * self._cpus)
        return records.decode_counters(raw or b"")

    def canary(self) -> bool:
        """Send a datagram and an answer over loopback and see whether both programs saw them.

        False also where this process's own packets do not pass the watched cgroup, or loopback is down.
        """
        before = self.counters()
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            ):
                for end in (client, server):
                    end.bind(("127.0.0.1", 0))
                    end.settimeout(CANARY_SECONDS)
                client.sendto(b"udpwatch", server.getsockname())
                server.sendto(*server.recvfrom(16))
                client.recvfrom(16)
        except OSError:
            return False
        after = self.counters()
        return after.remembered > before.remembered and after.checked > before.checked

    def keep_attached(self) -> list[str]:
        """Ask the kernel about every link and attach again what somebody detached; a line for each change."""
        lines = []
        for hook in HOOKS:
            link = self._links.get(hook.name)
            if link is None or bpf.link_cgroup_id(link):
                continue
            if hook.name not in self._refused:
                lines.append(f"{hook.name} was detached from {self._cgroup.path} by somebody else")
            try:
                fresh = bpf.link_create(self._programs[hook.name], self._cgroup.fd, hook.attach)
            except OSError as error:
                reason = f"cannot attach {hook.name} again: {error.strerror}"
                if self._refused.get(hook.name) != reason:
                    lines.append(reason)
                self._refused[hook.name] = reason
                continue
            os.close(link)
            self._links[hook.name] = fresh
            self._refused.pop(hook.name, None)
            self._reattached[hook.name] += 1
            lines.append(f"{hook.name} is attached again")
        return lines

    @property
    def attached(self) -> bool:
        """Whether the kernel says that every required program is attached."""
        return all(probe.attached for probe in self.probes() if _REQUIRED[probe.name])

    def probes(self) -> tuple[Probe, ...]:
        """Every program, as the kernel reports it now."""
        probes = []
        for hook in HOOKS:
            link = self._links.get(hook.name)
            attached = link is not None and bpf.link_cgroup_id(link) != 0
            program = self._programs.get(hook.name)
            info = bpf.program_info(program) if program is not None else None
            probes.append(
                Probe(
                    name=hook.name,
                    attached=attached,
                    reattached=self._reattached[hook.name],
                    run_seconds=info.run_time_ns / 1e9 if info else 0.0,
                    runs=info.run_count if info else 0,
                    instructions=info.instructions if info else 0,
                    reason="" if attached else self._refused.get(hook.name, "detached"),
                )
            )
        return tuple(probes)

    def _ask(self, finding: Finding, flow: Flow, pid: int) -> bool | None:
        if self._conntrack is None:
            # Imported where it is needed: pyroute2 takes megabytes that most nodes can do without.
            from udpwatch.agent.kernel.conntrack import Conntrack  # noqa: PLC0415

            self._conntrack = Conntrack()
        return self._conntrack.is_wrong(finding, flow, pid)

    def _increases(self, now: int, forget_ns: int) -> Iterator[Increase]:
        ask_until = time.monotonic() + ASK_SECONDS
        quiet = []
        for key, value in bpf.map_items(self._maps["findings"], records.FINDING_KEY_BYTES, records.FINDING_BYTES):
            count, last, pid = records.decode_finding(value)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = _Known(*records.decode_finding_key(key))
            if known.flow is None or known.translated or time.monotonic() < ask_until:
                yield from self._settle(known, count, last, pid)
            # A decided conversation is done with once it is quiet; a finding stays for as long as it is shown.
            if known.counted == count and now - last > (2 * self._limits.window_ns if known.flow else forget_ns):
                quiet.append((key, known))
        for key, known in quiet:
            taken = bpf.map_take(self._maps["findings"], key, records.FINDING_BYTES)
            if taken:
                yield from self._settle(known, *records.decode_finding(taken), is_last=True)
            del self._known[key]

    def _settle(self, known: _Known, count: int, last: int, pid: int, is_last: bool = False) -> Iterator[Increase]:
        """What was added to an element since it was last read: an increase, NAT, or not decided yet."""
        fresh = count - known.counted
        if not fresh:
            return
        wrong: bool | None = True
        if known.flow is not None:
            # A wrong one is asked about anew each time: its entry may have been deleted, and NAT come in since.
            wrong = False if known.translated else self._ask(known.finding, known.flow, pid)
            known.translated = wrong is False
        if wrong is None:
            since = known.undecided_since = known.undecided_since or time.monotonic_ns()
            if time.monotonic_ns() - since <= 2 * self._limits.window_ns and not is_last:
                return
            self._undecided += fresh
        known.undecided_since = None
        known.counted = count
        if wrong:
            yield Increase(known.finding, fresh, last, pid)

    def _count_peers(self, now: int) -> int:
        if now - self._tracked_at >= COUNT_PEERS_SECONDS * 1e9:
            self._tracked_at = now
            entered = self.counters().remembered
            self._tracked = bpf.map_count(self._maps["flows"], records.FLOW_KEY_BYTES, records.FLOW_BYTES)
            # Nothing ever deletes from this map: what was entered and is not there has been evicted.
            self._evicted = max(self._evicted, entered - self._tracked)
        return self._tracked

    def wait(self, seconds: float) -> bool:
        """Block until events are there or the time is over."""
        return bool(self._poll.poll(seconds * 1000))


_REQUIRED = {hook.name: hook.required for hook in HOOKS}
