"""Count wrong replies of other machines, found in conntrack's flows: by function probes (flow_probes.py) or by
conntrack's events (flow_events.py).

Rules
1. Conntrack confirms each flow once, so these findings count flows.
2. A new flow that mirrors an unanswered one, from another address, is a candidate. Peers that call each other look the
   same at first, so both flows must still be unanswered GRACE_SECONDS later.
3. Unclear cases are undecided and counted: a client that asked two addresses from one port, an address that was asked
   before, an entry that is gone.
4. A reply of a local socket belongs to the finding of the socket (sockets.py), and a reply that passes several
   namespaces counts once.
"""

from __future__ import annotations

import ipaddress
import struct
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from udpwatch.agent.kernel import bpf, clock, records
from udpwatch.agent.kernel.ctnetlink import SEEN_REPLY, Entry, Table
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.routes import route_to
from udpwatch.agent.model import Event, Finding, Increase, Tuple

GRACE_SECONDS = 2.0  # a peer that was called has answered by then
MAX_NAMESPACES = 1_000
MAX_WAITING = 8_192
ANY_SERVER = ""  # the server of a request to a group, which any server may answer
_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout")


class Settled(IntEnum):
    """Mirror enum settled in bpf/records.h."""

    NONE, WRONG, ANSWERED, ASK, UNDECIDED = range(5)


class FlowSource(Protocol):
    """A source of candidates; `decided` yields those that were wrong replies."""

    undecided: int
    overruns: int

    def decided(self, now: int) -> Iterator[Event]: ...

    @property
    def flows(self) -> int | None:
        """New UDP flows; None if the kernel programs count them."""
        ...

    @property
    def evicted(self) -> int: ...

    @property
    def unwatched(self) -> tuple[str, ...]: ...

    @property
    def missing(self) -> int: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sum:
    count: int = 0
    second: int = 0  # the second that in_second counts
    in_second: int = 0  # events


class Reported:
    """The datagrams that findings of local sockets cover: maps of bpf/sockets.c."""

    def __init__(self, descriptors: Iterable[int], window_ns: int) -> None:
        """Use the maps of the programs that count, and of those that counted before; none: nothing is reported."""
        self._descriptors, self._window_ns = tuple(descriptors), window_ns

    def is_over(self, switched_ns: int) -> bool:
        """Return whether programs that ended then have reported nothing that an event may still be about."""
        return clock.monotonic_ns() > switched_ns + 3 * self._window_ns

    def keep(self, descriptor: int) -> None:
        """Use only this map from now on."""
        self._descriptors = (descriptor,)

    def has(self, event: Event) -> bool:
        """Return whether a local socket's finding covers the datagram of an event."""
        finding = event.finding
        wire = records.encode_reported(finding.actual, finding.port, event.peer, event.peer_port)
        found = (bpf.map_lookup(descriptor, wire, 8) for descriptor in self._descriptors)
        return any(seen and struct.unpack("=Q", seen)[0] > event.time - 2 * self._window_ns for seen in found)


class FlowSensor:
    """Add up what a source has decided. Not thread-safe: one thread reads it."""

    def __init__(self, source: FlowSource, reported: Reported, limits: Limits) -> None:
        self._source, self._reported, self._limits = source, reported, limits
        self._fresh: dict[Finding, Increase] = {}
        self._sums: OrderedDict[Finding, _Sum] = OrderedDict()  # for the counts in events
        self._seen: OrderedDict[tuple[str, int, str, int], tuple[int | None, int]] = OrderedDict()
        self._events: deque[Event] = deque()
        self.held_back = 0  # events above the limit
        self.dropped = 0  # events that were not read in time

    @property
    def undecided(self) -> int:
        return self._source.undecided

    @property
    def overruns(self) -> int:
        return self._source.overruns

    @property
    def flows(self) -> int | None:
        return self._source.flows

    @property
    def evicted(self) -> int:
        """Clients evicted within the window, if the kernel programs do not count them."""
        return self._source.evicted

    @property
    def unwatched(self) -> tuple[str, ...]:
        """Namespaces that are not watched, and why, one line each."""
        return self._source.unwatched

    @property
    def missing(self) -> int:
        """Number of namespaces that are not watched."""
        return self._source.missing

    def close(self) -> None:
        self._source.close()

    def events(self, most: int) -> Iterator[Event]:
        """Yield up to ``most`` events of what was decided."""
        self._take()
        for _ in range(min(most, len(self._events))):
            yield self._events.popleft()

    def increases(self) -> Iterable[Increase]:
        """Return what was added to each finding since the last call."""
        self._take()
        fresh, self._fresh = self._fresh, {}
        return fresh.values()

    def _take(self) -> None:
        for event in self._source.decided(clock.monotonic_ns()):
            if not self._is_duplicate(event):
                self._add(event)

    def _is_duplicate(self, event: Event) -> bool:
        """Return whether the datagram already counts for a local socket or in another namespace."""
        finding = event.finding
        if self._reported.has(event):
            return True
        wire = (finding.actual, finding.port, event.peer, event.peer_port)
        known = self._seen.get(wire)
        if known and known[0] != event.netns_inode and known[1] > event.time - 2 * self._limits.window_ns:
            return True
        self._seen[wire] = (event.netns_inode, event.time)
        self._seen.move_to_end(wire)
        if len(self._seen) > MAX_WAITING:
            self._seen.popitem(last=False)
        return False

    def _add(self, event: Event) -> None:
        finding = event.finding
        before = self._fresh.get(finding)
        self._fresh[finding] = Increase(finding, before.count + 1 if before else 1, event.time, event.pid)
        known = self._sums.setdefault(finding, _Sum())
        self._sums.move_to_end(finding)
        if len(self._sums) > self._limits.max_findings:
            self._sums.popitem(last=False)
        known.count += 1
        second = event.time // 1_000_000_000
        if second != known.second:
            known.second, known.in_second = second, 0
        known.in_second += 1
        if known.in_second > self._limits.events_per_second:
            self.held_back += 1
        elif len(self._events) >= MAX_WAITING:
            self.dropped += 1
        else:
            self._events.append(replace(event, count=known.count))


def client_of(inode: int, entry: Entry) -> records.Requester:
    """Return the client that asked with an entry, in the namespace ``inode``."""
    reply = entry.reply
    return records.Requester(inode, entry.zone, reply.destination, reply.destination_port, reply.source_port)


def entry_timeout() -> int:
    """Return the seconds that conntrack keeps an unanswered UDP entry in the namespace of the calling thread."""
    try:
        return int(_TIMEOUT.read_text())
    except (OSError, ValueError):
        return 30


def entry_age_ns(entry: Entry, timeout: int) -> int:
    """Return the nanoseconds since an unanswered entry was refreshed, in whole seconds."""
    return max(0, timeout - (entry.timeout or 0)) * 1_000_000_000


def is_group(address: str) -> bool:
    """Return whether an address is multicast, reserved (240/4) or the limited broadcast address."""
    asked = ipaddress.ip_address(address)
    return asked.is_multicast or (asked.version == 4 and int(asked) >> 28 == 15)


def is_broadcast(address: str) -> bool:
    """Return whether the namespace of the calling thread routes an address as broadcast or multicast."""
    route = route_to(address)
    return route is not None and route.is_group


def settle_by_netlink(table: Table, event: Event, zone: int) -> tuple[Settled, Event]:
    """Return (the decision, the event with the tuple of its request), from conntrack's current entries."""
    finding = event.finding
    try:
        assert event.original is not None
        own = table.lookup(event.original, zone)
        request = table.lookup(Tuple(finding.expected, finding.port, event.peer, event.peer_port), zone)
    except OSError:
        return Settled.UNDECIDED, event
    if own is None or request is None:
        return Settled.UNDECIDED, event
    if (own.status | request.status) & SEEN_REPLY:
        return Settled.ANSWERED, event
    return Settled.WRONG, replace(event, request=request.original)
