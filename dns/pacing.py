"""Queries on their way to the forwarder, which wait while the CPU quota is used up (budget.py)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.shares import Counts, network_of
from udpwatch.dns.udp import UdpQuery

TAKEN_AT_ONCE = 8
PACE_SECONDS = 0.002  # between two looks at the budget
#: Queries that wait. Above that, the client with the most loses its oldest one: a flood must end somewhere, and even a
#: refusal costs time.
MAX_QUEUED, MAX_QUEUED_PER_CLIENT = 4_096, 1_024


class PacedQueue:
    """A bounded queue, per client and in all. Clients take turns, however many queries each of them sends.

    Without a CPU quota below one CPU nothing waits. Runs in the packet loop.
    """

    def __init__(
        self, loop: PacketLoop, metrics: Metrics, submit: Callable[[UdpQuery], None], budget: Budget = UNLIMITED
    ) -> None:
        self._loop, self._metrics, self._submit, self._budget = loop, metrics, submit, budget
        self._waiting: OrderedDict[bytes, deque[UdpQuery]] = OrderedDict()  # by network, in the order of their turns
        self._held: Counts[bytes] = Counts()  # how many of these
        self._size = 0
        self._pace = loop.delay_queue(PACE_SECONDS, self._tick)
        self._wait_until: float | None = None  # monotonic seconds

    def put(self, queries: list[UdpQuery]) -> None:
        """Submit queries, now or later. Those above the limits are dropped and counted."""
        if not self._size and not self._budget.is_limited:
            for each in queries:
                self._submit(each)
            return
        if not self._size:
            self._pace.start(self, self._loop.now)
        for each in queries:
            self._put(each)

    def _put(self, query: UdpQuery) -> None:
        network = network_of(query.client)
        if self._held[network] >= MAX_QUEUED_PER_CLIENT:
            self._metrics.forward_rejects["queue_share"][0] += 1
            return
        if self._size >= MAX_QUEUED:
            self._metrics.forward_rejects["queue"][0] += 1
            self._pop(self._held.greediest())
        self._waiting.setdefault(network, deque()).append(query)
        self._held.add(network, 1)
        self._size += 1

    def _pop(self, network: bytes) -> UdpQuery:
        """Take the oldest query of a client."""
        waiting = self._waiting[network]
        query = waiting.popleft()
        if not waiting:
            del self._waiting[network]
        self._held.add(network, -1)
        self._size -= 1
        return query

    def _tick(self, _: PacedQueue) -> None:
        """Submit some queries if there is CPU time. A query waits once, for a bounded time."""
        now = self._loop.now
        if self._wait_until is None:
            self._wait_until = now + self._budget.delay()
        if now >= self._wait_until:
            self._wait_until = None
            for _turn in range(min(self._size, TAKEN_AT_ONCE)):
                network = next(iter(self._waiting))
                self._waiting.move_to_end(network)
                self._submit(self._pop(network))
        if self._size:
            self._pace.start(self, now)
