"""Read what bpf/sockets.c counts of each server: requests, replies, and peers that got no datagram.

Rules
1. The kernel gives each server a slot, from a queue that this module fills. A slot of a server that is gone rests until
   no conversation refers to it.
2. A wait begins with a peer's request, and ends with a datagram to that peer. If the peer asks again a second or more
   after it began, the wait is over without one, and another begins. Of the waits that got no datagram, the last one of
   a peer is not yet unanswered while it is younger than the window: a program counts those in the table of
   conversations.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from udpwatch.agent.kernel import bpf, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.records import OWN_LAYOUT, Layout
from udpwatch.agent.kernel.shares import Shares, excess
from udpwatch.agent.model import ServerCount

_SLOT = struct.Struct("=I")
_FRAME_BYTES = 64  # a test run needs an Ethernet frame
WAITING_SECONDS = 2.0  # how often the peers that wait are counted
RESTING_WINDOWS = 2
Stored = Mapping[str, Any]


@dataclass(slots=True)
class _Known:
    """A server, when it was last read."""

    server: records.CountedServer
    totals: records.ServerTotals
    changed: float  # monotonic seconds
    unanswered: int = 0


class ServerCounter:
    """Reads the maps of servers; the caller closes them. Not thread-safe: one thread reads."""

    def __init__(
        self,
        maps: Mapping[str, int],
        count_waiting: int,
        limits: Limits,
        cpus: int,
        pace: Callable[[], None] = unpaced,
        layout: Layout = OWN_LAYOUT,
        resumed: bool = False,
        stored: Stored | None = None,
    ) -> None:
        """Use the maps; ``count_waiting`` is the descriptor of that program, ``cpus`` the number of possible CPUs.

        ``resumed``: another process has used the maps before; ``stored`` is what its `to_store` returned, if anything.
        """
        self._maps, self._count_waiting, self._limits, self._cpus, self._pace = maps, count_waiting, limits, cpus, pace
        self._layout = layout
        stored = stored or {}
        self._known: dict[bytes, _Known] = {}
        self._resting: dict[int, float] = {}  # slot -> monotonic seconds when it is free again
        self._shares = Shares(maps["servers_held"], maps["all_servers"])
        self._ended = int(stored.get("ended", 0))  # replies of servers that are gone
        #: slot -> requests, replies and unanswered ones, when these programs began to count (`begin`)
        self._begun: dict[int, list[int]] = {int(slot): each for slot, each in stored.get("begun", {}).items()}
        self._other_unanswered = 0
        self._counted_at = -WAITING_SECONDS
        self.tracked = 0  # conversations with a request within the window
        slots = range(records.FIRST_SLOT, records.FIRST_SLOT + limits.max_servers)
        if resumed:
            # The last process may have let more slots rest than it stored.
            queued = self._queued()
            used = {server.slot for _, server in self._servers()}
            counted = used | {records.NO_SERVER, records.OTHER_SERVERS}
            self._begun = {slot: each for slot, each in self._begun.items() if slot in counted}
            self._resting = dict.fromkeys(
                set(slots) - queued - used, time.monotonic() + RESTING_WINDOWS * limits.window_ns / 1e9
            )
        else:
            for slot in slots:
                bpf.map_push(maps["free_slots"], _SLOT.pack(slot))

    def to_store(self) -> Stored:
        """Return what the next process needs."""
        return {"ended": self._ended, "begun": {str(slot): each for slot, each in self._begun.items()}}

    def begin(self) -> None:
        """Count from now on: what was counted until now is another version's (handover.py)."""
        self._count()
        slots = (records.NO_SERVER, records.OTHER_SERVERS, *(server.slot for _, server in self._servers()))
        self._begun = {}
        for slot in slots:
            totals = self._totals(slot)
            self._begun[slot] = [totals.requests, totals.replies, self._unanswered(slot, totals)]

    def _queued(self) -> set[int]:
        """Return the slots that are free, without taking one from the programs for long."""
        found = set[int]()
        for _ in range(self._limits.max_servers):
            raw = bpf.map_pop(self._maps["free_slots"], _SLOT.size)
            if raw is None:
                break
            bpf.map_push(self._maps["free_slots"], raw)
            (slot,) = _SLOT.unpack(raw)
            if slot in found:
                break
            found.add(slot)
        return found

    def checked(self) -> int:
        """Return the datagrams that were sent to peers that had asked, of all sockets."""
        return self._without_server() + sum(self._totals(server.slot).replies for _, server in self._servers())

    def _without_server(self) -> int:
        slots = (records.NO_SERVER, records.OTHER_SERVERS, *self._resting)
        return self._ended + sum(self._totals(slot).replies for slot in slots)

    def read(self, expire_ns: int) -> tuple[tuple[ServerCount, ...], ServerCount, int]:
        """Return each server, the sum of those without a slot, and `checked`. Servers that were quiet for ``expire_ns``
        expire.
        """
        now, checked = time.monotonic(), self._without_server()
        fresh = now - self._counted_at >= WAITING_SECONDS
        if fresh:
            self._counted_at = now
            self._count()
        self._free(now)
        for key, server in self._servers():
            self._pace()
            totals = self._totals(server.slot)
            checked += totals.replies
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = _Known(server, totals, now)
            if (totals.requests, totals.replies) != (known.totals.requests, known.totals.replies):
                known.changed = now
            known.totals = totals
            if fresh:
                known.unanswered = max(known.unanswered, self._unanswered(server.slot, totals))
        self._expire(now, expire_ns)
        other = self._totals(records.OTHER_SERVERS)
        if fresh:
            unanswered = self._unanswered(records.OTHER_SERVERS, other)
            self._other_unanswered = max(self._other_unanswered, unanswered)
        servers = tuple(_count(known.server, known.totals, known.unanswered) for known in self._known.values())
        nothing = records.CountedServer(0, "::", 0, 0, 0, records.OTHER_SERVERS)
        return servers, _count(nothing, other, self._other_unanswered), checked

    def _servers(self) -> Iterator[tuple[bytes, records.CountedServer]]:
        own = self._layout.own
        sizes = self._layout.size("server_key"), self._layout.size("server")
        for key, value in bpf.map_items(self._maps["servers"], *sizes):
            yield key, records.decode_server(own("server_key", key), own("server", value))

    def _totals(self, slot: int) -> records.ServerTotals:
        size = self._layout.size("server_counts")
        raw = bpf.map_lookup(self._maps["server_counts"], _SLOT.pack(slot), size * self._cpus) or bytes(size)
        totals = records.decode_server_counts(self._layout.own("server_counts", raw))
        if slot not in self._begun:
            return totals
        requests, replies, _ = self._begun[slot]
        return totals._replace(requests=max(0, totals.requests - requests), replies=max(0, totals.replies - replies))

    def _unanswered(self, slot: int, totals: records.ServerTotals) -> int:
        raw = bpf.map_lookup(self._maps["waiting"], _SLOT.pack(slot), self._layout.size("waiting"))
        count, _ = self._decode_waiting(raw)
        _, _, before = self._begun.get(slot, (0, 0, 0))
        return totals.begun - totals.ended - count - before

    def _decode_waiting(self, raw: bytes | None) -> tuple[int, int]:
        return records.decode_waiting(self._layout.own("waiting", raw or bytes(self._layout.size("waiting"))))

    def _count(self) -> None:
        """Let the program count the peers that wait."""
        for slot in (records.NO_SERVER, records.OTHER_SERVERS, *(server.slot for _, server in self._servers())):
            bpf.map_update(self._maps["waiting"], _SLOT.pack(slot), bytes(self._layout.size("waiting")))
        sets = max(1, self._limits.max_peers // records.WAYS)
        bpf.program_test_run(self._count_waiting, bytes(_FRAME_BYTES), sets)
        total = bpf.map_lookup(self._maps["waiting"], _SLOT.pack(records.NO_SERVER), self._layout.size("waiting"))
        _, self.tracked = self._decode_waiting(total)

    def _expire(self, now: float, expire_ns: int) -> None:
        """Delete servers that were quiet for long, and those of the tenants that hold most if more than half of the
        slots are in use."""
        window = self._limits.window_ns / 1e9
        held: dict[int, int] = {}
        quiet: dict[int, list[tuple[float, bytes]]] = {}
        ended = []
        for key, known in self._known.items():
            tenant = known.server.tenant
            if now - known.changed > max(expire_ns / 1e9, window):
                ended.append(key)
                continue
            held[tenant] = held.get(tenant, 0) + 1
            if now - known.changed > window:
                quiet.setdefault(tenant, []).append((known.changed, key))
        for tenant, number in excess(held, self._limits.max_servers // 2).items():
            deleted = [key for _, key in sorted(quiet.get(tenant, []))[:number]]
            held[tenant] -= len(deleted)
            ended += deleted
        for key in ended:
            self._pace()
            known = self._known.pop(key)
            bpf.map_delete(self._maps["servers"], key)
            self._resting[known.server.slot] = now + RESTING_WINDOWS * window
        self._shares.set(held)

    def _free(self, now: float) -> None:
        """Let the kernel use the slots that have rested."""
        due = [slot for slot, at in self._resting.items() if at <= now]
        used = {server.slot for _, server in self._servers()} if due else set()
        for slot in due:
            del self._resting[slot]
            if slot in used:  # a program took it while the last process ended
                continue
            self._ended += self._totals(slot).replies
            self._begun.pop(slot, None)
            nothing = bytes(self._layout.size("server_counts") * self._cpus)
            bpf.map_update(self._maps["server_counts"], _SLOT.pack(slot), nothing)
            bpf.map_push(self._maps["free_slots"], _SLOT.pack(slot))


def _count(server: records.CountedServer, totals: records.ServerTotals, unanswered: int) -> ServerCount:
    return ServerCount(
        scope=server.scope,
        netns=server.netns,
        address=server.address,
        port=server.port,
        cgroup=totals.cgroup or server.cgroup,
        pid=totals.pid,
        process=totals.process,
        requests=totals.requests,
        replies=totals.replies,
        unanswered=unanswered,
        slot=server.slot,
    )
