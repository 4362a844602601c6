"""Find candidates in conntrack's events over netlink, where function probes are not allowed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from udpwatch.agent.kernel import clock, netns, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ctnetlink import EXPECTED, SEEN_REPLY, Entry, Listener, Overrun, Table
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.rlimits import raise_descriptor_limit
from udpwatch.agent.kernel.routes import route_to
from udpwatch.agent.model import Cause, Event, Finding, Tuple, Verdict
from udpwatch.agent.sources import flows
from udpwatch.agent.sources.flows import (
    ANY_SERVER,
    MAX_NAMESPACES,
    MAX_WAITING,
    Reported,
    Settled,
    client_of,
    entry_age_ns,
    entry_timeout,
    is_group,
    settle_by_netlink,
)
from udpwatch.agent.sources.requests import MAX_REQUESTS, Requests

#: The size of all receive buffers, which the kernel doubles. One half is for our own namespace (15,000 events: a
#: quarter is data, the rest is overhead of the kernel), the other half for all other namespaces.
RECEIVE_BYTES = 32 << 20
MIN_RECEIVE_BYTES = 16 << 10
OTHER_DESCRIPTORS = 1024  # of the agent, beside three for each namespace
LOOK_SECONDS = 5.0  # between two searches for new namespaces
READ_SECONDS = 1.0  # for events in one sample; the rest waits, and overruns are read from the table
TURN_SECONDS = 0.02  # for the events of one namespace, while others wait
TABLE_SECONDS = 0.3  # for tables in one sample; the rest is read in the next one
TABLE_TURN = 200  # entries of one table before the next table
START_SECONDS = 5.0  # for tables before the first sample
TABLE_ERROR_NS = 1_000_000_000  # a table has whole seconds, so either of two times may be early by one
_EVENTS = Path("/proc/sys/net/netfilter/nf_conntrack_events")


@dataclass(frozen=True, slots=True)
class Transport:
    """Where namespaces and conntrack's messages come from: the kernel, or a fake in unit tests."""

    namespaces: Callable[[], Iterator[int]] = netns.everywhere
    table: Callable[[], Table] = Table
    listener: Callable[[int], Listener] = Listener


KERNEL = Transport()


class _Namespace:
    """One watched namespace; holds three descriptors."""

    def __init__(self, fd: int, inode: int, transport: Transport) -> None:
        self.inode = inode
        with contextlib.ExitStack() as opened:
            self.fd = os.dup(fd)
            opened.callback(os.close, self.fd)
            with netns.entered(fd):
                self.table = transport.table()
                opened.callback(self.table.close)
                self.listener = transport.listener(MIN_RECEIVE_BYTES)
                self.has_no_events = _has_no_events()
            opened.pop_all()

    def close(self) -> None:
        self.listener.close()
        self.table.close()
        os.close(self.fd)


def _has_no_events() -> bool:
    """Return whether this namespace has conntrack's events disabled; old kernels always have them."""
    try:
        return _EVENTS.read_text().strip() == "0"
    except OSError:
        return False


class ListenedFlows:
    """Find candidates in conntrack's events, where function probes are not allowed."""

    def __init__(
        self,
        limits: Limits,
        sockets: bool,
        reported: Reported,
        pace: Callable[[], None] = unpaced,
        transport: Transport = KERNEL,
    ) -> None:
        """Listen in every namespace. With ``sockets``, replies of local sockets are left to the cgroup hooks.

        Raises OSError if not even our own namespace can be watched.
        """
        self._window_ns, self._sockets, self._reported, self._pace = limits.window_ns, sockets, reported, pace
        self._transport = transport
        self.missing = 0  # namespaces that could not be watched at the last search
        self._missing_reason = ""
        self._namespaces: OrderedDict[int, _Namespace] = OrderedDict()  # the last one read is at the end
        self._own = 0  # the agent's namespace
        self._requests = Requests(limits.window_ns, MAX_REQUESTS)
        self._waiting: deque[tuple[Event, int]] = deque()
        self._waiting_of: Counter[int] = Counter()  # namespace -> how many of them
        self._tables: OrderedDict[int, Iterator[None]] = OrderedDict()  # tables being read, by namespace
        self._missed: set[int] = set()  # namespaces whose events overran while their table was read
        self._judged: OrderedDict[tuple[int, int, Tuple], int] = OrderedDict()
        self._looked = 0.0
        self.undecided = self.overruns = 0
        self.flows: int | None = 0
        raise_descriptor_limit(3 * MAX_NAMESPACES + OTHER_DESCRIPTORS)
        self._look_for_namespaces(must=True)
        self._read_tables(time.monotonic() + START_SECONDS)

    def close(self) -> None:
        self._tables.clear()
        for each in self._namespaces.values():
            each.close()
        self._namespaces.clear()

    def decided(self, now: int) -> Iterator[Event]:
        """Read waiting events; then yield the due candidates that were wrong replies."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look_for_namespaces()
        self._read_tables(time.monotonic() + TABLE_SECONDS)
        self._read_events(time.monotonic() + READ_SECONDS)
        self._requests.expire(now - 2 * self._window_ns)
        until = time.monotonic() + READ_SECONDS
        while (
            self._waiting and now - self._waiting[0][0].time >= flows.GRACE_SECONDS * 1e9 and time.monotonic() < until
        ):
            self._pace()
            event, zone = self._waiting.popleft()
            inode = event.netns_inode or 0
            self._waiting_of[inode] -= 1
            if not self._waiting_of[inode]:
                del self._waiting_of[inode]
            namespace = self._namespaces.get(event.netns_inode or 0)
            outcome, event = self._settle(namespace, event, zone) if namespace else (Settled.UNDECIDED, event)
            if outcome == Settled.WRONG:
                yield event
            elif outcome == Settled.UNDECIDED:
                self.undecided += 1

    def _settle(self, namespace: _Namespace, event: Event, zone: int) -> tuple[Settled, Event]:
        outcome, event = settle_by_netlink(namespace.table, event, zone)
        if outcome != Settled.WRONG:
            return outcome, event
        try:
            with netns.entered(namespace.fd):
                expected, actual = route_to(event.finding.expected), route_to(event.finding.actual)
        except OSError:
            return Settled.UNDECIDED, event
        if expected and expected.is_group:
            return Settled.ANSWERED, event
        if self._sockets and actual and actual.is_local:
            return Settled.ANSWERED, event
        # Events do not have the interface. The route back has it, unless routing is asymmetric.
        finding = replace(event.finding, interface=actual.interface if actual else "")
        return outcome, replace(event, finding=finding)

    def _look_for_namespaces(self, must: bool = False) -> None:
        self._looked = time.monotonic()
        there: set[int] = set()
        self.missing = 0
        try:
            for fd in itertools.islice(self._transport.namespaces(), 2 * MAX_NAMESPACES):
                inode = os.fstat(fd).st_ino
                there.add(inode)
                self._own = self._own or inode  # the first one
                if inode in self._namespaces:
                    continue
                if len(self._namespaces) < MAX_NAMESPACES:
                    self._listen(fd, inode, must)
                else:
                    self.missing += 1
                    self._missing_reason = f"{MAX_NAMESPACES} are watched already"
        except OSError as error:  # no free descriptors, so the list is incomplete
            if must and not self._namespaces:
                raise
            self._miss(error)
            return
        for inode in self._namespaces.keys() - there:
            self._tables.pop(inode, None)
            self._missed.discard(inode)
            self._namespaces.pop(inode).close()
        self._share_buffers()

    def _share_buffers(self) -> None:
        """Give one half of RECEIVE_BYTES to our own namespace and share the other half among the rest."""
        half = RECEIVE_BYTES // 2
        share = min(half, max(MIN_RECEIVE_BYTES, half // max(1, len(self._namespaces) - 1)))
        for inode, each in self._namespaces.items():
            each.listener.resize(half if inode == self._own else share)

    def _listen(self, fd: int, inode: int, must: bool) -> None:
        try:
            self._namespaces[inode] = _Namespace(fd, inode, self._transport)
        except OSError as error:
            if must and not self._namespaces:
                raise
            self._miss(error)
            return
        self._begin_table(self._namespaces[inode], TABLE_ERROR_NS)

    def _miss(self, error: OSError) -> None:
        self.missing += 1
        self._missing_reason = error.strerror or str(error)

    @property
    def unwatched(self) -> tuple[str, ...]:
        """Namespaces that are not watched, and why, one line each."""
        lines = []
        if without := sum(each.has_no_events for each in self._namespaces.values()):
            lines.append(f"net.netfilter.nf_conntrack_events is 0 in {without} network namespaces")
        if self.missing:
            lines.append(f"cannot watch {self.missing} network namespaces: {self._missing_reason}")
        return tuple(lines)

    @property
    def evicted(self) -> int:
        return self._requests.evicted

    def _read_events(self, until: float) -> None:
        """Read the namespaces in turn, so that the events of one do not delay the others."""
        waiting = list(self._namespaces)
        while waiting:
            again = []
            for inode in waiting:
                now = time.monotonic()
                if now > until:
                    return
                self._namespaces.move_to_end(inode)
                if self._read(self._namespaces[inode], min(until, now + TURN_SECONDS)):
                    again.append(inode)
            waiting = again

    def _read(self, namespace: _Namespace, until: float) -> bool:
        """Read the events of a namespace; return whether there may be more."""
        try:
            for entry in namespace.listener.read():
                self._pace()
                assert self.flows is not None
                self.flows += 1
                now = clock.monotonic_ns()
                if not self._judge(namespace.inode, entry, now, 0):
                    self._remember(namespace.inode, entry, now)
                if time.monotonic() > until:
                    return True
        except Overrun:
            self.overruns += 1
            self._begin_table(namespace, -TABLE_ERROR_NS)
            return True
        except OSError as error:
            return error.errno == errno.EINTR
        return False

    def _begin_table(self, namespace: _Namespace, later_ns: int) -> None:
        """Begin to read a table, again if this is under way.

        First come the requests of all clients, then the flows that mirror a request at least ``later_ns`` older. Flows
        that existed before we listened count only if they are certainly newer than the request; otherwise the peer may
        have called first. After an overrun, the time before was watched, so they count unless they are certainly older.
        """
        if namespace.inode in self._tables:
            self._missed.add(namespace.inode)
        else:
            self._tables[namespace.inode] = self._read_entries(namespace, later_ns)

    def _read_tables(self, until: float) -> None:
        """Read the tables in turn, a part at a time, because tables may be large."""
        while self._tables and time.monotonic() < until:
            inode, entries = next(iter(self._tables.items()))
            self._tables.move_to_end(inode)
            try:
                for _ in range(TABLE_TURN):
                    self._pace()
                    next(entries)
            except StopIteration:
                del self._tables[inode]
                if inode in self._missed:
                    self._missed.discard(inode)
                    self._begin_table(self._namespaces[inode], -TABLE_ERROR_NS)

    def _read_entries(self, namespace: _Namespace, later_ns: int) -> Iterator[None]:
        """Read one entry per step."""
        with contextlib.suppress(OSError):
            for entry, seen in self._entries(namespace):
                if seen is not None:
                    self._remember(namespace.inode, entry, seen)
                yield
            for entry, seen in self._entries(namespace):
                if seen is not None:
                    self._judge(namespace.inode, entry, seen, later_ns)
                yield

    def _entries(self, namespace: _Namespace) -> Iterator[tuple[Entry, int | None]]:
        """Yield the entries of a table with the time of their last refresh; raises OSError.

        The time is None for answered entries and for old ones.
        """
        with netns.entered(namespace.fd):
            timeout, table = (
                entry_timeout(),
                self._transport.table(),
            )  # a socket of its own, because lookups happen meanwhile
        with table:
            for entry in table.dump():
                age = entry_age_ns(entry, timeout)
                counts = not entry.status & SEEN_REPLY and age <= 2 * self._window_ns
                yield entry, clock.monotonic_ns() - age if counts else None

    def _remember(self, inode: int, entry: Entry, seen: int) -> None:
        if entry.status & EXPECTED:
            return
        server = ANY_SERVER if is_group(entry.original.destination) else entry.reply.source
        self._requests.remember(client_of(inode, entry), server, seen)

    def _judge(self, inode: int, entry: Entry, seen: int, later_ns: int) -> bool:
        """Return whether an entry mirrors a request that it may answer wrongly; it then becomes a candidate, once."""
        expected = self._mirrored(inode, entry, seen, later_ns)
        if not expected:
            return False
        now, identity = clock.monotonic_ns(), (inode, entry.zone, entry.original)
        event = self._candidate(inode, entry, expected)
        if now - self._judged.get(identity, -self._window_ns * 2) < 2 * self._window_ns or self._reported.has(event):
            return True
        # A namespace may have as many waiting candidates as there is free room.
        if len(self._waiting) + self._waiting_of[inode] >= MAX_WAITING:
            self.undecided += 1
            return True
        self._judged[identity] = now
        self._judged.move_to_end(identity)
        if len(self._judged) > MAX_WAITING:
            self._judged.popitem(last=False)
        self._waiting.append((event, entry.zone))
        self._waiting_of[inode] += 1
        return True

    def _mirrored(self, inode: int, entry: Entry, seen: int, later_ns: int) -> str:
        """Return the address that should have replied, from the one request that is ``later_ns`` older, or ""."""
        flow = entry.original
        client = records.Requester(inode, entry.zone, flow.destination, flow.destination_port, flow.source_port)
        known = self._requests.get(client)
        if entry.status & EXPECTED or (known and any(server == flow.source for server, _ in known.servers)):
            return ""
        expected, asked = known.servers[-1] if known else (ANY_SERVER, 0)
        if known:
            in_time = [server for server, when in known.servers if abs(seen - when) <= self._window_ns]
            if expected == ANY_SERVER or in_time != [expected] or seen - asked < later_ns:
                return ""
        # If the client is unknown, its request may have been evicted; if one request is known, another one may have
        # been.
        if self._requests.may_be_evicted(client, seen) or (known and inode in self._missed):
            self.undecided += 1
            return ""
        return expected

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
            time=clock.monotonic_ns(),
            count=0,
            peer=flow.destination,
            peer_port=flow.destination_port,
            segments=1,
            pid=0,
            uid=0,
            netns_inode=inode,
            original=entry.original,
            reply=entry.reply,
            conversation=None,
        )
