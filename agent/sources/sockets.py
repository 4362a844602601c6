"""Read the findings of bpf/sockets.c: wrong replies of local sockets.

Rules
1. The kernel counts. This module reports increases since the last sample, and each datagram once. Deleting an element
   of the kernel's table loses nothing: its finding was reported, and begins at 0 again.
2. An element is deleted only after what was reported of it has been stored, if that is stored at all: an agent that
   is killed reports nothing twice, and the next one misses nothing.
3. A suspected reply (verdict unknown) is reported only after conntrack was asked. If it is undecided for two windows,
   it is counted as undecided and never reported.
"""

from __future__ import annotations

import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from udpwatch.agent.kernel import bpf, clock, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.libbpf import RingBuffer
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.records import OWN_LAYOUT, Layout
from udpwatch.agent.kernel.shares import Shares, excess
from udpwatch.agent.model import Conversation, Event, Finding, Increase
from udpwatch.agent.sources.conntrack import Conntrack

MAX_WAITING = 1_000  # events of suspected replies that wait for conntrack
ASK_SECONDS = 1.0  # for netlink requests in one sample; the rest waits for the next one
RESTING_NS = 200_000_000  # an element that a program may be counting in is not deleted
_NUMBER = struct.Struct("=Q")
#: element, in hexadecimal digits -> (when it began, what was counted of it, is NAT, undecided since)
Stored = Mapping[str, tuple[int, int, bool, int | None]]


@dataclass(slots=True)
class _Known:
    """One element of the map of findings, when it was last read."""

    finding: Finding
    conversation: Conversation | None
    began: int  # when the kernel inserted it
    counted: int = 0  # the part of its count that was reported, was NAT, or stayed undecided
    counted_in: int = 0  # the sample that changed `counted`
    read: int = 0  # its count
    undecided_since: int | None = None  # CLOCK_MONOTONIC, nanoseconds
    translated: bool = False  # conntrack reported NAT
    asked_at: float = 0.0  # monotonic seconds of the last request to conntrack about it


_Suspect = tuple[_Known, int, int, int]  # (element, count, time, process id)


class ReplySensor:
    """Read the maps of sockets.c; the caller closes them. Not thread-safe: one thread reads."""

    def __init__(
        self,
        maps: Mapping[str, int],
        limits: Limits,
        pace: Callable[[], None] = unpaced,
        layout: Layout = OWN_LAYOUT,
        stored: Stored | None = None,
    ) -> None:
        """Use the maps; ``stored`` is what `to_store` returned in an earlier process, None if nothing is stored."""
        self._limits, self._pace, self._layout = limits, pace, layout
        #: of elements that were not read since
        self._stored = {
            str(key): (int(began), int(counted), bool(is_translated), undecided_since)
            for key, (began, counted, is_translated, undecided_since) in dict(stored or {}).items()
        }
        self._sample = 0
        self._storing = 0  # the sample that `to_store` described
        self._safe_until = float("inf") if stored is None else 0  # the last sample that was stored
        self._most = limits.max_findings // 2  # elements that may stay in the map of findings
        self._maps = maps
        self._known: dict[bytes, _Known] = {}
        self._waiting: deque[bytes] = deque()  # MAX_WAITING at most
        self._conntrack = Conntrack()
        self._ring = RingBuffer(maps["events"])
        self._shares = Shares(maps["findings_held"], maps["all_findings"])
        self.undecided = 0
        self.dropped = 0  # events dropped because too many waited for conntrack

    def fileno(self) -> int:
        """Return a descriptor that polls readable while events are waiting."""
        return self._ring.fileno()

    def close(self) -> None:
        self._ring.close()

    def events(self, most: int) -> Iterator[Event]:
        """Yield up to ``most`` new events, and waiting events of suspected replies that conntrack has confirmed.

        Events of a conversation that stays undecided are dropped: they are counted with it.
        """
        waiting, asked = self._waiting, list[bytes]()
        self._waiting = deque()
        # New events get half of the time, so that neither a flood of them nor undecided ones delay the others.
        begin = time.monotonic()
        for group, seconds in ((self._ring.read(most), ASK_SECONDS / 2), (waiting, ASK_SECONDS)):
            for raw in group:
                self._pace()
                event = records.decode_event(self._layout.own("event", raw))
                if event.conversation is None:
                    yield event
                    continue
                may_ask = time.monotonic() < begin + seconds
                is_wrong = self._conntrack.is_wrong(event.finding, event.conversation, event.pid) if may_ask else None
                if is_wrong:
                    yield event
                elif is_wrong is None and clock.monotonic_ns() - event.time < 2 * self._limits.window_ns:
                    (asked if may_ask else self._waiting).append(raw)
        self._waiting += asked  # the next call begins with those for which there was no time
        self.dropped += max(0, len(self._waiting) - MAX_WAITING)
        while len(self._waiting) > MAX_WAITING:
            self._waiting.pop()

    def increases(self, expire_ns: int) -> Iterator[Increase]:
        """Yield what was added since the last sample.

        Delete elements that were quiet for ``expire_ns``, and, if more than half of the map is in use, elements of the
        tenants that hold most of it.
        """
        now = clock.monotonic_ns()
        self._sample += 1
        ask_until = time.monotonic() + ASK_SECONDS
        quiet: list[bytes] = []
        held: dict[int, int] = {}
        resting: dict[int, list[tuple[int, bytes]]] = {}
        suspected: list[_Suspect] = []
        sizes = self._layout.size("finding_key"), self._layout.size("finding")
        for key, value in bpf.map_items(self._maps["findings"], *sizes):
            self._pace()
            read = records.decode_finding(self._layout.own("finding", value))
            count, last, pid, _ = read
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = self._meet(key, read)
            known.read = count
            if known.conversation is None or known.translated:
                yield from self._settle(known, count, last, pid)
            elif known.counted != count:
                suspected.append((known, count, last, pid))
            # A decided conversation can go when it is quiet; a finding stays as long as it is shown.
            expire = 2 * self._limits.window_ns if known.conversation else expire_ns
            may_go = bool(last) and known.counted_in <= self._safe_until  # 0: it is being created
            if may_go and known.counted == count and now - last > expire:
                quiet.append(key)
                continue
            tenant = records.tenant_of(known.finding)
            held[tenant] = held.get(tenant, 0) + 1
            if may_go and known.conversation is None and now - last > RESTING_NS:  # others wait for conntrack
                resting.setdefault(tenant, []).append((last, key))
        # Ask for each tenant in turn, and for each tenant first about what was asked longest ago: it may stay undecided
        # for long.
        for known, count, last, pid in _in_turn(suspected):
            if time.monotonic() > ask_until:
                break
            self._pace()
            known.asked_at = time.monotonic()
            yield from self._settle(known, count, last, pid)
        for tenant, number in excess(held, self._most).items():
            deleted = [key for _, key in sorted(resting.get(tenant, []))[:number]]
            held[tenant] -= len(deleted)
            quiet += deleted
        for key in quiet:
            self._pace()
            yield from self._delete(key)
        self._shares.set(held)
        self._stored.clear()  # the elements that were not met are gone

    def _meet(self, key: bytes, read: records.CountedFinding) -> _Known:
        """Return what is known of an element that this process has not read before."""
        known = _Known(*records.decode_finding_key(self._layout.own("finding_key", key)), read.began)
        began, counted, is_translated, undecided_since = self._stored.pop(key.hex(), (0, 0, False, None))
        if began == read.began and counted <= read.datagrams:  # else the element is another one of this key
            known.counted, known.translated, known.undecided_since = counted, is_translated, undecided_since
        return known

    def to_store(self) -> Stored:
        """Return what the next process needs to report the rest. Call `note_stored` when that is stored."""
        self._storing = self._sample
        return self._stored | {
            key.hex(): (known.began, known.counted, known.translated, known.undecided_since)
            for key, known in self._known.items()
            if known.counted
        }

    def note_stored(self) -> None:
        """Note that what `to_store` returned last is stored."""
        self._safe_until = self._storing

    def end(self) -> Iterator[Increase]:
        """Yield what was added since the last sample to a table that no program counts in any longer. What is still
        undecided stays so.
        """
        yield from self.increases(1 << 62)
        for known in self._known.values():
            self.undecided += known.read - known.counted
            known.counted, known.undecided_since = known.read, None
        self.dropped += len(self._waiting)
        self._waiting.clear()

    def _delete(self, key: bytes) -> Iterator[Increase]:
        """Delete an element; yield what was added to it since it was last read."""
        try:
            value = bpf.map_take(self._maps["findings"], key, self._layout.size("finding"))
        except OSError:  # e.g. lack of memory: retried at the next sample
            return
        known = self._known.pop(key)
        if value:
            count, last, pid, _ = records.decode_finding(self._layout.own("finding", value))
            yield from self._settle(known, count, last, pid, is_last=True)

    def beyond(self) -> dict[int, int]:
        """Return by tenant (records.tenant_of) the wrong replies without room in the table of findings."""
        items = bpf.map_items(self._maps["findings_beyond"], 8, 8)
        return {_NUMBER.unpack(key)[0]: _NUMBER.unpack(value)[0] for key, value in items}

    def _settle(self, known: _Known, count: int, last: int, pid: int, is_last: bool = False) -> Iterator[Increase]:
        """Yield what was added to an element since it was last read, unless it was NAT or is undecided."""
        fresh = count - known.counted
        if not fresh:
            return
        wrong: bool | None = True
        if known.conversation is not None:
            # Ask again at each increase: the entry may have been deleted, or NAT may be involved now.
            wrong = False if known.translated else self._conntrack.is_wrong(known.finding, known.conversation, pid)
            known.translated = wrong is False
        if wrong is None:
            since = known.undecided_since = known.undecided_since or clock.monotonic_ns()
            if clock.monotonic_ns() - since <= 2 * self._limits.window_ns and not is_last:
                return
            self.undecided += fresh
        known.undecided_since = None
        known.counted, known.counted_in = count, self._sample
        if wrong:
            yield Increase(known.finding, fresh, last, pid)


def _in_turn(suspected: list[_Suspect]) -> list[_Suspect]:
    """Take one element of each tenant in turn; within a tenant, first the one asked longest ago."""
    ordered, seen = [], Counter[int]()
    for each in sorted(suspected, key=lambda each: each[0].asked_at):
        tenant = records.tenant_of(each[0].finding)
        ordered.append((seen[tenant], each))
        seen[tenant] += 1
    return [each for _, each in sorted(ordered, key=lambda pair: pair[0])]
