"""What bpf/sockets.c found: wrong replies of this node's own sockets.

Rules
1. Counts are the kernel's. What leaves here is the increase since the last sample, each datagram once.
   An element that is taken out of the kernel's table loses nothing: its finding has left, and begins again at 0.
2. A suspected reply (verdict unknown) leaves only after conntrack has been asked; what cannot be decided
   within two windows is counted as undecided and never reported.
"""

from __future__ import annotations

import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from udpwatch.agent.kernel import bpf, clock, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.libbpf import RingBuffer
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.shares import Shares
from udpwatch.agent.model import Conversation, Event, Finding, Increase
from udpwatch.agent.sources.conntrack import Conntrack

MAX_WAITING = 1_000  # events of suspected replies that conntrack could not be asked about yet
ASK_SECONDS = 1.0  # of netlink questions in one sample; what is left is asked in the next
RESTING_NS = 200_000_000  # what a program may be counting in is not taken away from under it
_NUMBER = struct.Struct("=Q")
_FRAME_BYTES = 64  # a test run wants an Ethernet frame
COUNT_PEERS_SECONDS = 10.0  # walking the whole map is not done at every sample


@dataclass(slots=True)
class _Known:
    """One element of the findings map, as last read."""

    finding: Finding
    conversation: Conversation | None
    counted: int = 0  # of its count, how many have left as increases, were NAT, or were given up
    undecided_since: int | None = None  # CLOCK_MONOTONIC, nanoseconds
    translated: bool = False  # conntrack said that it is NAT
    asked_at: float = 0.0  # monotonic seconds, when conntrack was asked about it last


_Suspect = tuple[_Known, int, int, int]  # with its count, time and process id


class ReplySensor:
    """Reads the maps of sockets.c, which stay the caller's to close. Not thread-safe: one thread reads."""

    def __init__(
        self, maps: dict[str, int], clock_program: int, limits: Limits, pace: Callable[[], None] = unpaced
    ) -> None:
        """``clock_program``: the descriptor of the program clock_ticks. ``pace``: as `Sensor` takes it."""
        self._limits, self._pace = limits, pace
        self._most = limits.max_findings // 2  # elements that are left in the map of findings
        self._maps = maps
        self._clock = clock_program
        self._known: dict[bytes, _Known] = {}
        self._waiting: deque[bytes] = deque()  # MAX_WAITING at most
        self._conntrack = Conntrack()
        self._tracked = 0
        self._tracked_at = -COUNT_PEERS_SECONDS
        self._ring = RingBuffer(maps["events"])
        self._shares = Shares(maps["findings_held"], maps["all_findings"])
        self.undecided = 0
        self.dropped = 0  # events for which too many others waited for conntrack's answer

    def fileno(self) -> int:
        """A descriptor that polls readable when events are there."""
        return self._ring.fileno()

    def close(self) -> None:
        self._ring.close()

    def events(self, most: int) -> Iterator[Event]:
        """The events that are there now, ``most`` of them, and those that wait; those of suspected replies once
        conntrack has confirmed them.

        An event whose conversation stays undecided is never returned; it is counted as undecided with it.
        """
        waiting, asked = self._waiting, list[bytes]()
        self._waiting = deque()
        # Half of the time for each: neither those that stay undecided nor a flood of new ones delay the others.
        begin = time.monotonic()
        for group, seconds in ((self._ring.read(most), ASK_SECONDS / 2), (waiting, ASK_SECONDS)):
            for raw in group:
                self._pace()
                event = records.decode_event(raw)
                if event.conversation is None:
                    yield event
                    continue
                may_ask = time.monotonic() < begin + seconds
                is_wrong = self._conntrack.is_wrong(event.finding, event.conversation, event.pid) if may_ask else None
                if is_wrong:
                    yield event
                elif is_wrong is None and clock.monotonic_ns() - event.time < 2 * self._limits.window_ns:
                    (asked if may_ask else self._waiting).append(raw)
        self._waiting += asked  # the next call asks first about those for which there was no time
        self.dropped += max(0, len(self._waiting) - MAX_WAITING)
        while len(self._waiting) > MAX_WAITING:
            self._waiting.pop()

    def increases(self, expire_ns: int) -> Iterator[Increase]:
        """What was added since the last sample; elements unused for ``expire_ns`` are taken out of the map, and so
        are those of the tenants that hold the most of it, where more than half of it is in use.
        """
        now = clock.monotonic_ns()
        ask_until = time.monotonic() + ASK_SECONDS
        quiet: list[bytes] = []
        held: dict[int, int] = {}
        resting: dict[int, list[tuple[int, bytes]]] = {}
        suspected: list[_Suspect] = []
        for key, value in bpf.map_items(self._maps["findings"], records.FINDING_KEY_BYTES, records.FINDING_BYTES):
            self._pace()
            count, last, pid = records.decode_finding(value)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = _Known(*records.decode_finding_key(key))
            if known.conversation is None or known.translated:
                yield from self._settle(known, count, last, pid)
            elif known.counted != count:
                suspected.append((known, count, last, pid))
            # A decided conversation is done with once it is quiet; a finding stays for as long as it is shown.
            forget = 2 * self._limits.window_ns if known.conversation else expire_ns
            if last and known.counted == count and now - last > forget:  # 0: it is being filled in
                quiet.append(key)
                continue
            tenant = records.tenant_of(known.finding)
            held[tenant] = held.get(tenant, 0) + 1
            if last and known.conversation is None and now - last > RESTING_NS:  # others wait for conntrack's answer
                resting.setdefault(tenant, []).append((last, key))
        # Each tenant in turn, and of each what was asked about longest ago: it may stay undecided for as long as its
        # sender likes.
        for known, count, last, pid in _in_turn(suspected):
            if time.monotonic() > ask_until:
                break
            self._pace()
            known.asked_at = time.monotonic()
            yield from self._settle(known, count, last, pid)
        for tenant, excess in _excess(held, self._most).items():
            taken_away = [key for _, key in sorted(resting.get(tenant, []))[:excess]]
            held[tenant] -= len(taken_away)
            quiet += taken_away
        for key in quiet:
            self._pace()
            try:
                taken = bpf.map_take(self._maps["findings"], key, records.FINDING_BYTES)
            except OSError:  # the kernel may be short of something: at the next sample
                continue
            known = self._known.pop(key)
            if taken:
                yield from self._settle(known, *records.decode_finding(taken), is_last=True)
        self._shares.set(held)

    def beyond(self) -> dict[int, int]:
        """Wrong replies for which the table of findings had no room, by tenant (records.tenant_of), since the start."""
        items = bpf.map_items(self._maps["findings_beyond"], 8, 8)
        return {_NUMBER.unpack(key)[0]: _NUMBER.unpack(value)[0] for key, value in items}

    def _settle(self, known: _Known, count: int, last: int, pid: int, is_last: bool = False) -> Iterator[Increase]:
        """What was added to an element since it was last read: an increase, NAT, or not decided yet."""
        fresh = count - known.counted
        if not fresh:
            return
        wrong: bool | None = True
        if known.conversation is not None:
            # A wrong one is asked about anew each time: its entry may have been deleted, and NAT come in since.
            wrong = False if known.translated else self._conntrack.is_wrong(known.finding, known.conversation, pid)
            known.translated = wrong is False
        if wrong is None:
            since = known.undecided_since = known.undecided_since or clock.monotonic_ns()
            if clock.monotonic_ns() - since <= 2 * self._limits.window_ns and not is_last:
                return
            self.undecided += fresh
        known.undecided_since = None
        known.counted = count
        if wrong:
            yield Increase(known.finding, fresh, last, pid)

    def count_peers(self) -> int:
        """How many conversations are remembered: those that asked something within the window."""
        now = time.monotonic()
        if now - self._tracked_at >= COUNT_PEERS_SECONDS:
            self._tracked_at = now
            window, tick = self._limits.window_ns, records.tick_ns()
            ticks, _ = bpf.program_test_run(self._clock, bytes(_FRAME_BYTES), 1)  # of 64 bits the lower half
            sets = bpf.array_values(self._maps["conversations"], records.CONVERSATION_SET_BYTES)
            ages = ((ticks - asked // tick) % (1 << 32) * tick for asked in records.asked_times(sets) if asked)
            # What was asked twice within a tick is ahead of the clock by nanoseconds.
            self._tracked = sum(age <= window for age in ages)
        return self._tracked


def _in_turn(suspected: list[_Suspect]) -> list[_Suspect]:
    """One of each tenant after the other; of each tenant in the order in which they were asked about last."""
    ordered, seen = [], Counter[int]()
    for each in sorted(suspected, key=lambda each: each[0].asked_at):
        tenant = records.tenant_of(each[0].finding)
        ordered.append((seen[tenant], each))
        seen[tenant] += 1
    return [each for _, each in sorted(ordered, key=lambda pair: pair[0])]


def _excess(held: dict[int, int], most: int) -> dict[int, int]:
    """How many of its elements each of the tenants that hold the most must lose so that ``most`` are left."""
    if sum(held.values()) <= most:
        return {}
    share, left, room = most, len(held), most
    for number in sorted(held.values()):
        if number * left > room:
            share = room // left  # what each of the tenants that are left may keep
            break
        room, left = room - number, left - 1
    return {tenant: number - share for tenant, number in held.items() if number > share}
