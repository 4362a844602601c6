"""The agent's rows: adds findings up, ends old rows, publishes an immutable Snapshot.

Rules
1. Memory is bounded: beyond the limit of rows, wrong replies count under `other` of their namespace; none is lost. A
   row of the tenant with the most rows is evicted first. A tenant is a container, else a cgroup.
2. A row ends after `forget` seconds without a wrong reply, or ENDED_SECONDS after its pod or container has ended. Its
   count ends with it, as a counter ends with its process; `other` never ends, and ended rows are not added to it.
3. The clocks are arguments: wall time is only shown; rows age by the monotonic clock, which cannot be set. When the
   wall clock is set, all times move with it.
4. Counters go on where an earlier process stopped (`restore`): what a source has counted is added as far as it grew.
5. Not thread-safe, except for `lose`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from udpwatch.agent.daemon.memory import described, numbers, restored
from udpwatch.agent.daemon.servers import ServerLookup, Servers
from udpwatch.agent.model import (
    NODE_FAULTS,
    UNWATCHED,
    Cause,
    Counters,
    Event,
    Finding,
    Healing,
    Increase,
    Row,
    Sample,
    Sender,
    ServerCount,
    Snapshot,
    Verdict,
)
from udpwatch.agent.servers.namespaces import Risks

#: Every stage where events or replies can be lost, and what is lost there. Metrics show each from the start.
LOSS_STAGES = {
    "rate_limit": "events held back in the kernel by events_per_second",
    "ring_full": "events for which the ring buffer had no room",
    "findings_full": "wrong replies for which the kernel's findings table had no room; counted under `other`",
    "undecided": "replies without a decision: conntrack could not be asked, or their request had been evicted",
    "flows_full": "candidates (new flows that may be wrong replies) for which there was no room",
    "conntrack_overrun": "times that conntrack's events overran the buffer; udpwatch read the table instead",
    "probe_missed": "runs of function probes that the kernel skipped",
    "remember": "requests of flows that were not stored because two CPUs wrote the same slot",
    "unparsed": "UDP packets with unreadable headers",
    "attribution": "lookups of a process, command line or cgroup that were not possible; the kernel's name is shown",
    "queue": "events dropped because the reader was too slow",
    "output": "events that could not be written",
}


MAX_OTHER_NAMESPACES = 100  # with an `other` of their own; further namespaces share one
MAX_EVICTIONS = 100  # rows that make room in one sample
ENDED_SECONDS = 60.0  # longer than a scrape interval, so that Prometheus gets the last count
CHECK_SECONDS = 5.0  # how often to check whether pods and containers have ended


@dataclass(frozen=True, slots=True)
class About:
    """What stays the same while the agent runs."""

    version: str
    kernel: str
    node: str
    mode: str
    started: float
    notes: tuple[str, ...]


_Tenant = tuple[str, str, str]  # namespace, pod and container; of what is in no container, its cgroup or interface


@dataclass(slots=True)
class _Sum:
    increase: Increase
    sender: Sender
    count: int
    first: float  # seconds since the epoch
    last: float
    touched: float  # monotonic seconds
    tenant: _Tenant
    ended: float | None = None  # monotonic seconds when its pod or container was first seen to have ended


_NOTHING = Sample((), Counters(), (), 0, 0, 0)

_Key = tuple[str, str, str, str, int, str, str, Verdict, Cause]


class SenderLookup(ServerLookup, Protocol):
    """Finds the sender of a reply. No method blocks."""

    @property
    def left_out(self) -> int:
        """Return the number of lookups skipped since the start because a tenant had too many."""

    def lookup(self, seen: Increase | Event) -> Sender:
        """Return the sender of a reply."""

    def namespace_of(self, tenant: int) -> str:
        """Return the Kubernetes namespace of a tenant of the kernel's findings (Sample.beyond); "": none or unknown."""


class State:
    """The agent's memory of what was found."""

    def __init__(
        self,
        about: About,
        max_series: int,
        forget_seconds: float,
        senders: SenderLookup,
        max_servers: int = 500,
    ) -> None:
        self._about = about
        self._servers = Servers(max_servers, senders, Risks(), forget_seconds)
        self._senders = senders
        self._next_check = 0.0
        self._max_series = max_series
        self._forget = forget_seconds
        self._sums: dict[_Key, _Sum] = {}
        self._held: Counter[_Tenant] = Counter()  # rows
        self._other: dict[str, int] = {}  # namespace -> wrong replies in no row
        self._other_healed: dict[str, int] = {}  # namespace -> healed replies in no row
        self._totals: Counter[str] = Counter()  # what snapshots show, by the names in `_read`
        self._seen: dict[str, int] = {}  # what the programs had counted at the last sample
        self._seen_here: dict[str, int] = {}  # what this process had counted
        self._generation = ""  # of the programs
        self._beyond: dict[int, int] = {}  # Sample.beyond, as last added to `_other`
        self._sample: Sample | None = None
        self._lost_here: dict[str, int] = {}
        self._losing = threading.Lock()

    def add(self, sample: Sample, now: float, monotonic: float) -> list[Row]:
        """Add a sample; return the rows that are new. ``now``: seconds since the epoch."""
        fresh: dict[_Key, _Sum] = {}
        evictions = MAX_EVICTIONS
        for increase in sample.increases:
            sender, finding = self._senders.lookup(increase), increase.finding
            is_healed = finding.verdict is Verdict.HEALED
            if not is_healed:
                self._servers.add_wrong(sender, finding, increase.count)
            key = _key(sender, finding)
            known = self._sums.get(key)
            if known is None:
                tenant = _tenant(increase, sender)
                if len(self._sums) >= self._max_series:
                    evicted = self._make_room(tenant) if evictions else None
                    if evicted is None:
                        self._add_other(sender.namespace, increase.count, is_healed)
                        continue
                    evictions -= 1
                    fresh.pop(evicted, None)
                known = fresh[key] = self._sums[key] = _Sum(increase, sender, 0, now, now, monotonic, tenant)
                self._held[tenant] += 1
            known.increase, known.sender = increase, sender
            known.count += increase.count
            known.last, known.touched, known.ended = now, monotonic, None
        if sample.generation != self._generation:
            self._generation, self._seen, self._beyond = sample.generation, {}, {}
        if self._about.mode != "netlink":  # there, the kernel only suspects wrong replies
            self._add_beyond(sample.beyond)
        by_programs, here = self._read(sample)
        self._add_other("", max(0, by_programs["healed"] - self._seen.get("healed", 0)), is_healed=True)
        for read, seen in ((by_programs, self._seen), (here, self._seen_here)):
            for name, value in read.items():
                self._totals[name] += max(0, value - seen.get(name, 0))
        self._seen, self._seen_here = by_programs, here
        self._sample = sample
        self._servers.add(sample, now, monotonic)
        self._check_for_ended(monotonic)
        for idle in [key for key, known in self._sums.items() if self._is_over(known, monotonic)]:
            self._remove(idle)
        return [_row(known) for known in fresh.values()]

    def _read(self, sample: Sample) -> tuple[dict[str, int], dict[str, int]]:
        """Return what the programs have counted since they were loaded, and what this process has counted since it
        started.
        """
        counters = sample.counters
        # In mode netlink the kernel cannot distinguish NAT from a wrong reply: the overflow counts suspected replies.
        overflow = "undecided" if self._about.mode == "netlink" else "findings_full"
        by_programs = {
            "rate_limit": counters.rate_limited,
            "ring_full": counters.ring_full,
            "undecided": counters.undecided,
            "remember": counters.unremembered,
            "flows_full": counters.candidates,
            "unparsed": counters.unparsed,
            "checked": counters.checked,
            "evicted": counters.evicted,
            "flows": counters.flows,
            "healed": counters.healed_overflow,
        }
        by_programs[overflow] = by_programs.get(overflow, 0) + counters.overflow
        here = {
            "rate_limit": sample.held_back,
            "undecided": sample.undecided,
            "queue": sample.dropped,
            "conntrack_overrun": sample.overruns,
            "probe_missed": sum(probe.missed for probe in sample.probes),
            "evicted": sample.evicted_peers - counters.evicted,
            "flows": sample.flows - counters.flows,
            **sample.node_faults,
        }
        return by_programs, here

    def _make_room(self, tenant: _Tenant) -> _Key | None:
        """Evict the oldest row of the tenant with the most rows; None if this tenant would then have as many."""
        most, held = max(self._held.items(), key=lambda each: each[1])
        if held <= self._held[tenant] + 1:
            return None
        rows = ((key, known) for key, known in self._sums.items() if known.tenant == most)
        key, known = min(rows, key=lambda row: row[1].touched)
        self._remove(key)
        self._add_other(known.sender.namespace, known.count, known.increase.finding.verdict is Verdict.HEALED)
        return key

    def _remove(self, key: _Key) -> None:
        tenant = self._sums.pop(key).tenant
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def _add_other(self, namespace: str, count: int, is_healed: bool = False) -> None:
        other = self._other_healed if is_healed else self._other
        if namespace not in other and len(other) >= MAX_OTHER_NAMESPACES:
            namespace = ""
        if count:
            other[namespace] = other.get(namespace, 0) + count

    def servers_of(self, sample: Sample) -> list[tuple[ServerCount, Sender]]:
        """Return what the kernel counts of each server, with the server's process, if it is known."""
        return self._servers.identified(sample)

    def _add_beyond(self, beyond: dict[int, int]) -> None:
        for tenant, count in beyond.items():
            more = count - self._beyond.get(tenant, 0)
            if more:  # a tenant that the kernel has evicted begins at 0 again
                self._add_other(self._senders.namespace_of(tenant), more if more > 0 else count)
        self._beyond = dict(beyond)

    def _check_for_ended(self, monotonic: float) -> None:
        if monotonic < self._next_check:
            return
        self._next_check = monotonic + CHECK_SECONDS
        answers: dict[str, bool] = {}  # many rows have one container
        for known in self._sums.values():
            sender = known.sender
            if not sender.container_id:
                continue
            if sender.container_id not in answers:
                answers[sender.container_id] = self._senders.has_ended(sender, monotonic)
            if not answers[sender.container_id]:
                known.ended = None  # it was only restarted
            elif known.ended is None:
                known.ended = monotonic

    def _is_over(self, known: _Sum, monotonic: float) -> bool:
        if known.ended is not None and monotonic - known.ended > ENDED_SECONDS:
            return True
        return monotonic - known.touched > self._forget

    def lose(self, stage: str, count: int = 1) -> None:
        """Count events lost above the kernel; ``stage`` is one of LOSS_STAGES."""
        with self._losing:
            self._lost_here[stage] = self._lost_here.get(stage, 0) + count

    def move_times(self, seconds: float) -> None:
        """Move all times after the wall clock was set forward by so many seconds."""
        for known in self._sums.values():
            known.first += seconds
            known.last += seconds
        self._servers.move_times(seconds)

    def to_store(self, rows: bool = True) -> dict[str, Any]:
        """Return what the next process needs so that no counter falls (`restore`). Without ``rows``, it is small."""
        with self._losing:
            lost = dict(self._lost_here)
        return {
            "totals": dict(self._totals),
            "seen": self._seen,
            "generation": self._generation,
            "lost": lost,
            "other": self._other,
            "other_healed": self._other_healed,
            "beyond": {str(tenant): count for tenant, count in self._beyond.items()},
            "rows": [described(known) for known in self._sums.values()] if rows else [],
            "servers": self._servers.to_store(rows),
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on with what an earlier process stored; call this first. Raises LookupError, TypeError, ValueError or
        AttributeError if that is invalid, and then nothing has changed.
        """
        totals, lost = numbers(stored["totals"]), numbers(stored["lost"])
        other, other_healed = numbers(stored["other"]), numbers(stored["other_healed"])
        beyond = {int(tenant): int(count) for tenant, count in stored["beyond"].items()}
        seen, sums = numbers(stored["seen"]), dict[_Key, _Sum]()
        for row in stored["rows"]:
            try:
                finding = restored(Finding, row["increase"]["finding"])
            except ValueError:  # a cause or verdict that this version does not know
                finding = None
            if finding is None or len(sums) >= self._max_series:  # or the limit was higher
                namespace = str(row["sender"]["namespace"])
                more = other_healed if row["increase"]["finding"]["verdict"] == Verdict.HEALED else other
                more[namespace] = more.get(namespace, 0) + int(row["count"])
                continue
            increase = restored(Increase, row["increase"] | {"finding": finding})
            namespace, pod, container = map(str, row["tenant"])
            parts = {"increase": increase, "sender": restored(Sender, row["sender"])}
            known = restored(_Sum, row | parts | {"tenant": (namespace, pod, container)})
            sums[_key(known.sender, finding)] = known
        generation = str(stored["generation"])
        self._servers.restore(stored["servers"])
        self._totals, self._lost_here, self._other, self._other_healed = Counter(totals), lost, other, other_healed
        self._generation, self._seen, self._beyond = generation, seen, beyond
        self._sums, self._held = sums, Counter(known.tenant for known in sums.values())

    def snapshot(self, self_test_passed: bool, now: float, healing: Healing | None = None) -> Snapshot:
        """Return everything, as of the last sample."""
        sample = self._sample or _NOTHING
        with self._losing:
            lost = dict.fromkeys(LOSS_STAGES, 0) | self._lost_here
        for stage in LOSS_STAGES:
            lost[stage] += self._totals[stage]
        rows = tuple(sorted(map(_row, self._sums.values()), key=lambda row: -row.count))
        return Snapshot(
            version=self._about.version,
            kernel=self._about.kernel,
            node=self._about.node,
            mode=self._about.mode,
            started=self._about.started,
            time=now,
            ready=self._sample is not None
            and self_test_passed
            and all(probe.attached for probe in sample.probes if probe.required),
            notes=self._about.notes,
            rows=rows,
            other=sum(self._other.values()),
            other_of=dict(self._other),
            checked=self._totals["checked"],
            tracked_peers=sample.tracked_peers,
            evicted_peers=self._totals["evicted"],
            lost=lost,
            probes=sample.probes,
            flows=self._totals["flows"],
            conntrack=sample.conntrack,
            udp_sent=sample.udp_sent,
            self_test_passed=self_test_passed,
            servers=self._servers.listed(),
            other_servers={namespace: replace(totals) for namespace, totals in self._servers.other.items()},
            other_at_risk=self._servers.other_at_risk(),
            healing=healing,
            other_healed=dict(self._other_healed),
            node_faults={fault: self._totals[fault] for fault in NODE_FAULTS},
            unwatched=dict.fromkeys(UNWATCHED, 0) | sample.unwatched,
            memory=sample.memory,
        )


def _key(sender: Sender, finding: Finding) -> _Key:
    return (
        sender.process,
        sender.namespace,
        sender.pod,
        sender.container,
        finding.port,
        finding.expected,
        finding.actual,
        finding.verdict,
        finding.cause,
    )


def _tenant(increase: Increase, sender: Sender) -> _Tenant:
    if increase.finding.cause is Cause.FORWARDED:  # another machine's, behind an interface
        return "", "", f"{increase.finding.netns}/{increase.finding.interface}"
    return sender.namespace, sender.pod, sender.container or sender.cgroup


def _row(known: _Sum) -> Row:
    finding = known.increase.finding
    return Row(
        sender=known.sender,
        port=finding.port,
        expected=finding.expected,
        actual=finding.actual,
        verdict=str(finding.verdict),
        cause=str(finding.cause),
        family=finding.family,
        count=known.count,
        first=known.first,
        last=known.last,
        interface=finding.interface,
    )
