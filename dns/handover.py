"""Pass queries from the UDP thread to the event loop, and their responses back to the clients."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.forwarder import ClientQuery
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.responder import Reply
from udpwatch.dns.shares import Counts, network_of
from udpwatch.dns.udp import Pending
from udpwatch.dns.udp_socket import BATCH, peer_of

TAKEN_PER_TURN = BATCH  # a turn of the event loop for each query would cost half as much again
TAKEN_WHERE_LIMITED = 8  # with a CPU quota
#: Queries that the event loop has not taken yet. Above that, the client with the most loses its oldest one: a flood
#: must end somewhere, and even a refusal costs the event loop time.
MAX_QUEUED, MAX_QUEUED_PER_CLIENT = 4_096, 1_024


class HandoverQueue:
    """A bounded queue, per client and in all, from the UDP thread to `Forwarder.submit`.

    Clients take turns, however many queries each of them sends. With a CPU quota (budget.py) they may have to wait.
    """

    def __init__(self, metrics: Metrics, submit: Callable[[ClientQuery], None], budget: Budget = UNLIMITED) -> None:
        """``submit`` is called in the event loop."""
        self._metrics, self._budget, self._submit = metrics, budget, submit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._waiting: OrderedDict[bytes, deque[Pending]] = OrderedDict()  # by network, in the order of their turns
        self._held: Counts[bytes] = Counts()  # how many of these
        self._size = 0
        self._scheduled = False

    def start(self) -> None:
        """Start in the running event loop."""
        self._loop = asyncio.get_running_loop()

    def put(self, pending: list[Pending]) -> None:
        """Queue a batch; any thread may call this. Queries above the limits are dropped and counted."""
        with self._lock:
            for each in pending:
                network = network_of(each.peer)
                if self._held[network] >= MAX_QUEUED_PER_CLIENT:
                    self._metrics.forward_rejects["queue_share"][0] += 1
                    continue
                if self._size >= MAX_QUEUED:
                    self._metrics.forward_rejects["queue"][0] += 1
                    self._pop(self._held.greediest())
                self._waiting.setdefault(network, deque()).append(each)
                self._held.add(network, 1)
                self._size += 1
            wake = bool(self._size) and not self._scheduled
            self._scheduled = self._scheduled or wake
        if wake and self._loop:
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop is closed
                return

    def _pop(self, network: bytes) -> Pending:
        """Take the oldest query of a client."""
        waiting = self._waiting[network]
        query = waiting.popleft()
        if not waiting:
            del self._waiting[network]
        self._held.add(network, -1)
        self._size -= 1
        return query

    def _take(self, has_waited: bool = False) -> None:
        """Submit at most TAKEN_PER_TURN queries, so that other events get their turn."""
        assert self._loop
        if not has_waited and (delay := self._budget.delay()):
            self._loop.call_later(delay, self._take, True)
            return
        batch: list[Pending] = []
        most = TAKEN_WHERE_LIMITED if self._budget.is_limited else TAKEN_PER_TURN
        with self._lock:
            while self._waiting and len(batch) < most:
                network = next(iter(self._waiting))
                self._waiting.move_to_end(network)
                batch.append(self._pop(network))
            self._scheduled = bool(self._waiting)
        if self._scheduled:
            self._loop.call_soon(self._take)
        for each in batch:
            self._submit(self._client_query(each))

    def _client_query(self, pending: Pending) -> ClientQuery:
        return ClientQuery(
            pending.forward,
            pending.peer,
            origin=(pending.name, pending.forward.query.id),
            peer=lambda: peer_of(pending.name),
            deliver=lambda reply: self._send(pending, reply),
            must_answer=False,
        )

    def _send(self, pending: Pending, reply: Reply) -> None:
        assert self._loop
        if reply.query:
            cell = self._metrics.cell("udp", pending.socket.layout.name, reply.query.type, reply.rcode, reply.source)
            cell[0] += 1
        self._metrics.duration["forward"].observe(self._loop.time() - pending.received)
        try:
            pending.socket.send(reply.data, pending.name, pending.control)
        except (OSError, ValueError):  # the address or its socket has disappeared meanwhile
            self._metrics.dropped["send"][0] += 1
