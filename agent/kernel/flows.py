"""Wrong replies of other machines, seen in the flows that conntrack books: bpf/flows.c, or its events over netlink.

Rules
1. Conntrack speaks once a flow: a finding made here counts flows.
2. A new flow that mirrors an unanswered one, from another address, is a candidate. Peers that call each other look
   the same at first; GRACE_SECONDS later neither of the two may have been answered.
3. In doubt nothing is claimed: a client that asked two addresses from one port, an address that was asked before, an
   entry that is gone. What could not be decided is counted.
4. What a socket of this node sent is that socket's finding (reply.py), and what passes several namespaces is one.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import os
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from udpwatch.agent.kernel import bpf, netns, records
from udpwatch.agent.kernel.ctnetlink import EXPECTED, SEEN_REPLY, Entry, Listener, Overrun, Table
from udpwatch.agent.kernel.loader import SETTLE, Limits, Loaded
from udpwatch.agent.kernel.netlink import route_to
from udpwatch.agent.model import Cause, Event, Finding, Increase, Tuple, Verdict

GRACE_SECONDS = 2.0  # a peer that was called has answered by then
MAX_NAMESPACES = 1_000
MAX_REQUESTS = 65_536  # remembered of conntrack's events
MAX_WAITING = 8_192
RECEIVE_BYTES = 32 << 20  # holds 30,000 events (a quarter of it what they are, the rest the kernel's bookkeeping)
LOOK_SECONDS = 5.0  # for namespaces that have come or gone
_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout")


class _Settled(IntEnum):
    """enum settled in bpf/records.h."""

    NONE, WRONG, ANSWERED, ASK, UNDECIDED = range(5)


class _Source(Protocol):
    """Where candidates come from; `decided` gives those that were wrong replies."""

    undecided: int
    overruns: int

    def decided(self, now: int) -> Iterator[Event]: ...

    @property
    def flows(self) -> int | None:
        """New UDP flows seen; None where the kernel programs count them."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sum:
    count: int = 0
    second: int = 0  # that in_second counts in
    in_second: int = 0  # events


class FlowSensor:
    """Adds up what its source has decided. Not thread-safe: one thread reads."""

    def __init__(self, source: _Source, told: int | None, limits: Limits) -> None:
        """``told``: descriptor of reply.c's map of what sockets were found with; None where there is none."""
        self._source, self._told, self._limits = source, told, limits
        self._fresh: dict[Finding, Increase] = {}
        self._sums: OrderedDict[Finding, _Sum] = OrderedDict()  # for the events' own numbers
        self._seen: OrderedDict[tuple[str, int, str, int], tuple[int | None, int]] = OrderedDict()
        self._events: deque[Event] = deque(maxlen=MAX_WAITING)
        self.held_back = 0  # events above the limit

    @property
    def undecided(self) -> int:
        return self._source.undecided

    @property
    def overruns(self) -> int:
        return self._source.overruns

    @property
    def flows(self) -> int | None:
        return self._source.flows

    def close(self) -> None:
        self._source.close()

    def events(self) -> Iterator[Event]:
        """The events of what has been decided since the last call."""
        self._take()
        while self._events:
            yield self._events.popleft()

    def increases(self) -> Iterable[Increase]:
        """What was added to each finding since the last call."""
        self._take()
        fresh, self._fresh = self._fresh, {}
        return fresh.values()

    def _take(self) -> None:
        for event in self._source.decided(time.monotonic_ns()):
            if not self._is_another_ones(event):
                self._add(event)

    def _is_another_ones(self, event: Event) -> bool:
        """Whether a socket's finding, or another namespace's, is about the same datagram."""
        finding = event.finding
        wire = (finding.actual, finding.port, event.peer, event.peer_port)
        oldest = event.time - 2 * self._limits.window_ns
        if self._told is not None:
            seen = bpf.map_lookup(self._told, records.encode_told(*wire), 8)
            if seen and struct.unpack("=Q", seen)[0] > oldest:
                return True
        known = self._seen.get(wire)
        if known and known[0] != event.netns_inode and known[1] > oldest:
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
        else:
            self._events.append(replace(event, count=known.count))


# ---- function probes ----


class ProbedFlows:
    """Candidates of bpf/flows.c."""

    def __init__(self, loaded: Loaded, limits: Limits) -> None:
        """Take over the maps; reads what conntrack knows already, so that it begins with what other tools see."""
        self._candidates, self._requests = loaded.maps["candidates"], loaded.maps["requests"]
        self._settle = loaded.programs[SETTLE]
        self._tables: dict[int, Table] = {}  # of namespaces where requests came from a dump, as long as they count
        self._keep_tables_until = time.monotonic_ns() + limits.window_ns + int(GRACE_SECONDS * 1e9)
        self.undecided = self.overruns = 0
        self.flows = None
        self._read_existing(limits)

    def close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables.clear()

    def decided(self, now: int) -> Iterator[Event]:
        """The candidates whose time has come and that were wrong replies; all of these are taken out."""
        for key, raw in bpf.map_items(self._candidates, records.CANDIDATE_KEY_BYTES, records.CANDIDATE_BYTES):
            event, zone = records.decode_candidate(raw)
            if now - event.time < GRACE_SECONDS * 1e9:
                continue
            # An Ethernet header that nobody looks at, and the key as the "packet".
            outcome, _ = bpf.program_test_run(self._settle, bytes(14) + key + bytes(42), 1)
            bpf.map_delete(self._candidates, key)
            if outcome == _Settled.ASK:
                table = self._tables.get(event.netns_inode or 0)
                outcome, event = _settle_by_netlink(table, event, zone) if table else (_Settled.UNDECIDED, event)
            if outcome == _Settled.WRONG:
                yield event
            elif outcome == _Settled.UNDECIDED:
                self.undecided += 1
        if self._tables and now > self._keep_tables_until:
            self.close()

    def _read_existing(self, limits: Limits) -> None:
        for number, fd in enumerate(netns.everywhere()):
            if number >= MAX_NAMESPACES:
                return
            with contextlib.suppress(OSError), netns.entered(fd):
                self._read_namespace(os.fstat(fd).st_ino, limits)

    def _read_namespace(self, inode: int, limits: Limits) -> None:
        table = Table()
        asked: dict[bytes, list[tuple[str, int]]] = {}
        now = time.monotonic_ns()
        try:
            for entry in table.dump():
                seen = now - _age(entry)
                if entry.status & SEEN_REPLY or now - seen > limits.window_ns:
                    continue
                reply = entry.reply
                if _is_group(entry.original.destination) or _is_broadcast(reply.source):
                    continue
                key = records.encode_request_key(
                    inode, entry.zone, reply.destination, reply.destination_port, reply.source_port
                )
                asked.setdefault(key, []).append((reply.source, seen))
            for key, servers in asked.items():
                newest = sorted(servers, key=lambda server: -server[1])[:2]
                with contextlib.suppress(FileExistsError):  # the probe was faster, and knows more
                    bpf.map_update(self._requests, key, records.encode_requests(newest), only_new=True)
        except BaseException:
            table.close()
            raise
        if asked:
            self._tables[inode] = table
        else:
            table.close()


def _age(entry: Entry) -> int:
    """Nanoseconds since an unanswered entry was last refreshed, by the namespace's timeout."""
    try:
        timeout = int(_TIMEOUT.read_text())
    except (OSError, ValueError):
        timeout = 30
    return max(0, timeout - (entry.timeout or 0)) * 1_000_000_000


def _is_group(address: str) -> bool:
    """Whether it is a group's by itself: multicast, 240/4 with 255.255.255.255 in it."""
    asked = ipaddress.ip_address(address)
    return asked.is_multicast or (asked.version == 4 and int(asked) >> 28 == 15)


def _is_broadcast(address: str) -> bool:
    """Whether it is a group's as the calling thread's namespace routes it."""
    route = route_to(address)
    return route is not None and route.is_group


def _settle_by_netlink(table: Table, event: Event, zone: int) -> tuple[_Settled, Event]:
    """(the decision, the event with the request's own tuple in it), from conntrack's word on both entries."""
    finding = event.finding
    try:
        assert event.original is not None
        own = table.lookup(event.original, zone)
        request = table.lookup(Tuple(finding.expected, finding.port, event.peer, event.peer_port), zone)
    except OSError:
        return _Settled.UNDECIDED, event
    if own is None or request is None:
        return _Settled.UNDECIDED, event
    if (own.status | request.status) & SEEN_REPLY:
        return _Settled.ANSWERED, event
    return _Settled.WRONG, replace(event, request=request.original)


# ---- conntrack's events ----


@dataclass(slots=True)
class _Asked:
    """Whom a client asked from one port at one port, the two newest: (server, when), newest last."""

    servers: list[tuple[str, int]]


class _Namespace:
    """One namespace that is listened to."""

    def __init__(self, fd: int, inode: int) -> None:
        self.fd, self.inode = os.dup(fd), inode
        try:
            with netns.entered(fd):
                self.table = Table()
                self.listener = Listener(RECEIVE_BYTES)
        except OSError:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.listener.close()
        self.table.close()
        os.close(self.fd)


class ListenedFlows:
    """Candidates from conntrack's events, where function probes are not allowed."""

    def __init__(self, limits: Limits, sockets: bool) -> None:
        """Listen in every namespace there is; ``sockets``: what a socket of this node sends is somebody else's matter.

        Raises OSError where not even our own namespace can be listened to.
        """
        self._window_ns, self._sockets = limits.window_ns, sockets
        self._namespaces: dict[int, _Namespace] = {}
        self._asked: OrderedDict[tuple[int, int, str, int, int], _Asked] = OrderedDict()
        self._waiting: deque[tuple[Event, int]] = deque()
        self._judged: OrderedDict[tuple[int, int, Tuple], int] = OrderedDict()
        self._looked = 0.0
        self.undecided = self.overruns = 0
        self.flows: int | None = 0
        self._look_for_namespaces(must=True)

    def close(self) -> None:
        for each in self._namespaces.values():
            each.close()
        self._namespaces.clear()

    def decided(self, now: int) -> Iterator[Event]:
        """Read what is there; then the candidates whose time has come and that were wrong replies."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look_for_namespaces()
        for each in self._namespaces.values():
            self._read(each)
        while self._waiting and now - self._waiting[0][0].time >= GRACE_SECONDS * 1e9:
            event, zone = self._waiting.popleft()
            namespace = self._namespaces.get(event.netns_inode or 0)
            outcome, event = self._settle(namespace, event, zone) if namespace else (_Settled.UNDECIDED, event)
            if outcome == _Settled.WRONG:
                yield event
            elif outcome == _Settled.UNDECIDED:
                self.undecided += 1

    def _settle(self, namespace: _Namespace, event: Event, zone: int) -> tuple[_Settled, Event]:
        outcome, event = _settle_by_netlink(namespace.table, event, zone)
        if outcome != _Settled.WRONG:
            return outcome, event
        try:
            with netns.entered(namespace.fd):
                expected, actual = route_to(event.finding.expected), route_to(event.finding.actual)
        except OSError:
            return _Settled.UNDECIDED, event
        if expected and expected.is_group:
            return _Settled.ANSWERED, event
        if self._sockets and actual and actual.is_local:
            return _Settled.ANSWERED, event
        # Events do not tell the interface; the way back does, unless routing is asymmetric.
        finding = replace(event.finding, interface=actual.interface if actual else "")
        return outcome, replace(event, finding=finding)

    def _look_for_namespaces(self, must: bool = False) -> None:
        self._looked = time.monotonic()
        there = set()
        for fd in itertools.islice(netns.everywhere(), MAX_NAMESPACES):
            inode = os.fstat(fd).st_ino
            there.add(inode)
            if inode in self._namespaces:
                continue
            try:
                self._namespaces[inode] = _Namespace(fd, inode)
            except OSError:
                if must and not self._namespaces:
                    raise
                continue
            self._resynchronise(self._namespaces[inode])
        for inode in self._namespaces.keys() - there:
            self._namespaces.pop(inode).close()

    def _read(self, namespace: _Namespace) -> None:
        while True:
            try:
                for entry in namespace.listener.read():
                    assert self.flows is not None
                    self.flows += 1
                    now = time.monotonic_ns()
                    if not self._judge(namespace.inode, entry, now):
                        self._remember(namespace.inode, entry, now)
            except Overrun:
                self.overruns += 1
                self._resynchronise(namespace)
                continue
            except OSError as error:
                if error.errno != errno.EINTR:
                    return
            return

    def _resynchronise(self, namespace: _Namespace) -> None:
        """Take the table as it is: first everybody's requests, then who mirrors one."""
        now = time.monotonic_ns()
        try:
            with netns.entered(namespace.fd):
                unanswered = [
                    (entry, now - _age(entry)) for entry in namespace.table.dump() if not entry.status & SEEN_REPLY
                ]
        except OSError:
            return
        unanswered.sort(key=lambda pair: pair[1])
        for entry, seen in unanswered:
            self._remember(namespace.inode, entry, seen)
        for entry, seen in unanswered:
            judged = self._judged.get((namespace.inode, entry.zone, entry.original))
            if judged is None or now - judged > 2 * self._window_ns:
                self._judge(namespace.inode, entry, seen)

    def _remember(self, inode: int, entry: Entry, seen: int) -> None:
        if entry.status & EXPECTED or _is_group(entry.original.destination):
            return
        reply = entry.reply
        key = (inode, entry.zone, reply.destination, reply.destination_port, reply.source_port)
        known = self._asked.setdefault(key, _Asked([]))
        others = [each for each in known.servers if each[0] != reply.source]
        known.servers = [*others[-1:], (reply.source, seen)]
        self._asked.move_to_end(key)
        if len(self._asked) > MAX_REQUESTS:
            self._asked.popitem(last=False)

    def _judge(self, inode: int, entry: Entry, seen: int) -> bool:
        """Whether an entry mirrors the one request that it may answer wrongly; then it is a candidate."""
        flow = entry.original
        known = self._asked.get((inode, entry.zone, flow.destination, flow.destination_port, flow.source_port))
        if known is None or entry.status & EXPECTED:
            return False
        if any(server == flow.source for server, _ in known.servers):
            return False
        in_time = [server for server, when in known.servers if abs(seen - when) <= self._window_ns]
        if len(in_time) != 1 or in_time[0] != known.servers[-1][0]:
            return False
        if len(self._waiting) >= MAX_WAITING:
            self.undecided += 1
            return True
        self._judged[inode, entry.zone, flow] = time.monotonic_ns()
        if len(self._judged) > MAX_WAITING:
            self._judged.popitem(last=False)
        self._waiting.append((self._candidate(inode, entry, in_time[0]), entry.zone))
        return True

    @staticmethod
    def _candidate(inode: int, entry: Entry, expected: str) -> Event:
        flow = entry.original
        finding = Finding(
            expected=expected,
            actual=flow.source,
            port=flow.source_port,
            family=entry.family,
            verdict=Verdict.NEW,
            cause=Cause.FORWARDED,
            process="",
            cgroup=0,
            netns=inode,
        )
        return Event(
            finding=finding,
            time=time.monotonic_ns(),
            count=0,
            peer=flow.destination,
            peer_port=flow.destination_port,
            segments=1,
            pid=0,
            uid=0,
            netns_inode=inode,
            original=entry.original,
            reply=entry.reply,
            flow=None,
        )
