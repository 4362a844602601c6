"""Wrong replies of other machines, seen in the flows that conntrack books: function probes
(flow_probes.py), or its events over netlink (flow_events.py).

Rules
1. Conntrack speaks once a flow: a finding made here counts flows.
2. A new flow that mirrors an unanswered one, from another address, is a candidate. Peers that call each other look
   the same at first; GRACE_SECONDS later neither of the two may have been answered.
3. In doubt nothing is claimed: a client that asked two addresses from one port, an address that was asked before, an
   entry that is gone. What could not be decided is counted.
4. What a socket of this node sent is that socket's finding (sockets.py), and what passes several namespaces is one.
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
from udpwatch.agent.kernel.netlink import route_to
from udpwatch.agent.model import Event, Finding, Increase, Tuple

GRACE_SECONDS = 2.0  # a peer that was called has answered by then
MAX_NAMESPACES = 1_000
MAX_WAITING = 8_192
ANY_SERVER = ""  # in place of the server, where a group was asked: whoever answers is right
_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout")


class Settled(IntEnum):
    """enum settled in bpf/records.h."""

    NONE, WRONG, ANSWERED, ASK, UNDECIDED = range(5)


class FlowSource(Protocol):
    """Where candidates come from; `decided` gives those that were wrong replies."""

    undecided: int
    overruns: int

    def decided(self, now: int) -> Iterator[Event]: ...

    @property
    def flows(self) -> int | None:
        """New UDP flows seen; None where the kernel programs count them."""
        ...

    @property
    def evicted(self) -> int: ...

    @property
    def unwatched(self) -> tuple[str, ...]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sum:
    count: int = 0
    second: int = 0  # that in_second counts in
    in_second: int = 0  # events


class Reported:
    """sockets.c's map of the datagrams that sockets of this node were found with."""

    def __init__(self, descriptor: int | None, window_ns: int) -> None:
        """None: there is no such map, nothing was reported."""
        self._descriptor, self._window_ns = descriptor, window_ns

    def has(self, event: Event) -> bool:
        """Whether the event is about a datagram that has been reported."""
        if self._descriptor is None:
            return False
        finding = event.finding
        wire = records.encode_reported(finding.actual, finding.port, event.peer, event.peer_port)
        seen = bpf.map_lookup(self._descriptor, wire, 8)
        return seen is not None and struct.unpack("=Q", seen)[0] > event.time - 2 * self._window_ns


class FlowSensor:
    """Adds up what its source has decided. Not thread-safe: one thread reads."""

    def __init__(self, source: FlowSource, reported: Reported, limits: Limits) -> None:
        self._source, self._reported, self._limits = source, reported, limits
        self._fresh: dict[Finding, Increase] = {}
        self._sums: OrderedDict[Finding, _Sum] = OrderedDict()  # for the events' own numbers
        self._seen: OrderedDict[tuple[str, int, str, int], tuple[int | None, int]] = OrderedDict()
        self._events: deque[Event] = deque()
        self.held_back = 0  # events above the limit
        self.dropped = 0  # events that were not taken in time

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
        """Clients that had to make room for others within the window, where the kernel programs do not count them."""
        return self._source.evicted

    @property
    def unwatched(self) -> tuple[str, ...]:
        """Where flows are not seen, and why, a line each."""
        return self._source.unwatched

    def close(self) -> None:
        self._source.close()

    def events(self, most: int) -> Iterator[Event]:
        """The events of what has been decided since the last call, ``most`` of them."""
        self._take()
        for _ in range(min(most, len(self._events))):
            yield self._events.popleft()

    def increases(self) -> Iterable[Increase]:
        """What was added to each finding since the last call."""
        self._take()
        fresh, self._fresh = self._fresh, {}
        return fresh.values()

    def _take(self) -> None:
        for event in self._source.decided(clock.monotonic_ns()):
            if not self._is_another_ones(event):
                self._add(event)

    def _is_another_ones(self, event: Event) -> bool:
        """Whether a socket's finding, or another namespace's, is about the same datagram."""
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


def entry_timeout() -> int:
    """Seconds that conntrack keeps an unanswered UDP entry in the calling thread's namespace."""
    try:
        return int(_TIMEOUT.read_text())
    except (OSError, ValueError):
        return 30


def entry_age_ns(entry: Entry, timeout: int) -> int:
    """Nanoseconds since an unanswered entry was last refreshed; whole seconds, as conntrack tells it."""
    return max(0, timeout - (entry.timeout or 0)) * 1_000_000_000


def is_group(address: str) -> bool:
    """Whether it is a group's by itself: multicast, 240/4 with 255.255.255.255 in it."""
    asked = ipaddress.ip_address(address)
    return asked.is_multicast or (asked.version == 4 and int(asked) >> 28 == 15)


def is_broadcast(address: str) -> bool:
    """Whether it is a group's as the calling thread's namespace routes it."""
    route = route_to(address)
    return route is not None and route.is_group


def settle_by_netlink(table: Table, event: Event, zone: int) -> tuple[Settled, Event]:
    """(the decision, the event with the request's own tuple in it), from conntrack's word on both entries."""
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
