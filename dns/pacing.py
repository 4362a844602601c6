"""Queries on their way to the forwarder, which wait while the CPU quota is used up (budget.py)."""

from __future__ import annotations

from collections.abc import Callable

from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.shares import Turns
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
        self._waiting: Turns[UdpQuery] = Turns()
        self._pace = loop.delay_queue(PACE_SECONDS, self._tick)
        self._wait_until: float | None = None  # monotonic seconds

    def put(self, queries: list[UdpQuery]) -> None:
        """Submit queries, now or later. Those above the limits are dropped and counted."""
        if not self._waiting and not self._budget.is_limited:
            for each in queries:
                self._submit(each)
            return
        if not self._waiting:
            self._pace.start(self, self._loop.now)
        for each in queries:
            self._put(each)

    def _put(self, query: UdpQuery) -> None:
        if self._waiting.of(query.client) >= MAX_QUEUED_PER_CLIENT:
            self._metrics.forward_rejects["queue_share"][0] += 1
            return
        if len(self._waiting) >= MAX_QUEUED:
            self._metrics.forward_rejects["queue"][0] += 1
            self._waiting.take_from_greediest()
        self._waiting.add(query.client, query)

    def _tick(self, _: PacedQueue) -> None:
        """Submit some queries if there is CPU time. A query waits once, for a bounded time."""
        now = self._loop.now
        if self._wait_until is None:
            self._wait_until = now + self._budget.delay()
        if now >= self._wait_until:
            self._wait_until = None
            for _turn in range(min(len(self._waiting), TAKEN_AT_ONCE)):
                self._submit(self._waiting.take())
        if self._waiting:
            self._pace.start(self, now)
