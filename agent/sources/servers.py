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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from udpwatch.agent.kernel import bpf, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.shares import Shares, excess
from udpwatch.agent.model import ServerCount

_SLOT = struct.Struct("=I")
_FRAME_BYTES = 64  # a test run needs an Ethernet frame
WAITING_SECONDS = 2.0  # how often the peers that wait are counted


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
        maps: dict[str, int],
        count_waiting: int,
        limits: Limits,
        cpus: int,
        pace: Callable[[], None] = unpaced,
    ) -> None:
        """Use the maps; ``count_waiting`` is the descriptor of that program, ``cpus`` the number of possible CPUs."""
        self._maps, self._count_waiting, self._limits, self._cpus, self._pace = maps, count_waiting, limits, cpus, pace
        self._known: dict[bytes, _Known] = {}
        self._resting: dict[int, float] = {}  # slot -> monotonic seconds when it is free again
        self._shares = Shares(maps["servers_held"], maps["all_servers"])
        self._ended = 0  # replies of servers that are gone
        self._other_unanswered = 0
        self._counted_at = -WAITING_SECONDS
        self.tracked = 0  # conversations with a request within the window
        for slot in range(records.FIRST_SLOT, records.FIRST_SLOT + limits.max_servers):
            bpf.map_push(maps["free_slots"], _SLOT.pack(slot))

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
        for key, value in bpf.map_items(self._maps["servers"], records.SERVER_KEY_BYTES, records.SERVER_BYTES):
            yield key, records.decode_server(key, value)

    def _totals(self, slot: int) -> records.ServerTotals:
        raw = bpf.map_lookup(self._maps["server_counts"], _SLOT.pack(slot), records.SERVER_COUNTS_BYTES * self._cpus)
        return records.decode_server_counts(raw or bytes(records.SERVER_COUNTS_BYTES))

    def _unanswered(self, slot: int, totals: records.ServerTotals) -> int:
        waiting = bpf.map_lookup(self._maps["waiting"], _SLOT.pack(slot), records.WAITING_BYTES)
        count, _ = records.decode_waiting(waiting or bytes(records.WAITING_BYTES))
        return totals.begun - totals.ended - count

    def _count(self) -> None:
        """Let the program count the peers that wait."""
        for slot in (records.NO_SERVER, records.OTHER_SERVERS, *(known.server.slot for known in self._known.values())):
            bpf.map_update(self._maps["waiting"], _SLOT.pack(slot), bytes(records.WAITING_BYTES))
        sets = max(1, self._limits.max_peers // records.WAYS)
        bpf.program_test_run(self._count_waiting, bytes(_FRAME_BYTES), sets)
        total = bpf.map_lookup(self._maps["waiting"], _SLOT.pack(records.NO_SERVER), records.WAITING_BYTES)
        _, self.tracked = records.decode_waiting(total or bytes(records.WAITING_BYTES))

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
            self._resting[known.server.slot] = now + 2 * window
        self._shares.set(held)

    def _free(self, now: float) -> None:
        """Let the kernel use the slots that have rested."""
        for slot in [slot for slot, at in self._resting.items() if at <= now]:
            self._ended += self._totals(slot).replies
            bpf.map_update(
                self._maps["server_counts"], _SLOT.pack(slot), bytes(records.SERVER_COUNTS_BYTES * self._cpus)
            )
            bpf.map_push(self._maps["free_slots"], _SLOT.pack(slot))
            del self._resting[slot]


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
