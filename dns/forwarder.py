"""Queries in flight to upstream servers, and the clients that wait for them. Runs in the packet loop.

Rules
1. A query that is in flight is not sent again: an attacker must not be able to make us send a thousand copies and to
   guess at all of them (CVE-2020-25686).
2. A client waits for a query once. The same query from the same client, from another port or with another id, is a
   repeat: it gets the response too, but it never takes a slot from others.
3. At a limit the client with the most queries gives way (shares.py): its oldest query is refused. A client with as many
   takes the slot of a query older than FRESH_SECONDS, which is unlikely to succeed, or is refused. So clients behind
   one address get responses while one of them looks up names of a dead zone, and no client makes us query upstream
   servers more often than twice the limit a second.
4. Nothing here blocks the packet loop: DELIVERED_PER_TURN responses to one query are sent per turn.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import Entry, Key, failure
from udpwatch.dns.edns import ClientOptions
from udpwatch.dns.failover import Failover
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.message import Query, Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import name_to_text
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.policy import rebinds
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.resolution import Group, Resolution
from udpwatch.dns.responder import Forward, Reply, Responder, from_entry
from udpwatch.dns.settings import Settings
from udpwatch.dns.shares import LazyShares, network_of

FRESH_SECONDS = 0.5  # a younger query gives its slot only to a client with fewer queries
#: Multiples of --dns-forward-max, which is per server group, so that dead servers cost the other groups nothing:
#: queries in flight to all servers; clients that wait (several may wait for one query), per server group and in all.
ALL_ASKED, WAITING, ALL_WAITING = 4, 2, 4
MAX_REPEATS_PER_CLIENT = 256  # for all clients together: ALL_WAITING times --dns-forward-max
MAX_SHED = 4  # waiting clients that give way to one query; several may wait for the same one
DELIVERED_PER_TURN = 32
DRAIN_POLL_SECONDS = 0.02

_type_and_class = struct.Struct("!HH")

log = logging.getLogger(__name__)


class ClientQuery(Protocol):
    """One client's query, and where its response goes."""

    @property
    def forward(self) -> Forward:
        """The query, and the maximum size of its response."""

    @property
    def client(self) -> bytes:
        """The client's address, 4 or 16 octets."""

    @property
    def received(self) -> float:
        """When it arrived, in monotonic seconds."""

    @property
    def origin(self) -> Hashable:
        """Two queries with the same origin are the same one, sent again."""

    @property
    def must_answer(self) -> bool:
        """Over TCP: the client does not retry."""

    def peer(self) -> tuple[str, int]:
        """Return the client's address and port, for the log."""

    def deliver(self, reply: Reply) -> None:
        """Send the response."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A client that waits for a query."""

    query: _InFlight
    client: bytes
    since: float  # monotonic seconds
    queries: dict[Hashable, ClientQuery]
    repeats: int = 0


@dataclass(slots=True, eq=False)
class _InFlight(Resolution):
    """A query to upstream servers, and who waits for it."""

    waiters: dict[bytes, _Waiter] = field(default_factory=dict)


class Forwarder:
    """Takes client queries, resolves them, caches the responses and delivers them."""

    def __init__(
        self,
        loop: PacketLoop,
        settings: Settings,
        responder: Responder,
        cache: Cache,
        failover: Failover,
        metrics: Metrics,
        query_log: QueryLog | None,
        client_options: ClientOptions | None = None,
    ) -> None:
        """``client_options``: EDNS options that servers get."""
        self._loop, self._options = loop, client_options
        self._settings, self._responder, self._cache = settings, responder, cache
        self._failover, self._metrics, self._query_log = failover, metrics, query_log
        failover.owner = self
        most = settings.forward_max
        self._max_queries, self._max_all_queries = most, ALL_ASKED * most
        self._max_waiting, self._max_all_waiting = WAITING * most, ALL_WAITING * most
        self._in_flight: dict[Key, _InFlight] = {}
        self._waiting: dict[Group, LazyShares[_Waiter]] = {}  # of groups with queries in flight
        self._all_waiting: LazyShares[_Waiter] = LazyShares(self._max_all_waiting // 2)
        self._repeats: Counter[bytes] = Counter()  # by network
        self._all_repeats = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    async def drain(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the queries in flight; in the event loop's thread."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._in_flight and loop.time() < end:
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def stop(self) -> None:
        """Drop the queries in flight; clients that wait get SERVFAIL."""
        for query in list(self._in_flight.values()):
            self._failover.drop(query)
            waiting = self._end(query)
            while waiting:
                self._refuse(waiting.popleft(), Rcode.SERVFAIL)

    # ---- client queries ----

    def submit(self, client_query: ClientQuery) -> None:
        """Take a client's query. Its response, which may be a refusal, is delivered later."""
        asked, client = client_query.forward.query, client_query.client
        key: Key = asked.key
        options = b""
        if self._options:
            key, options = self._with_options(key, client)
        query = self._in_flight.get(key)
        if query is None:
            servers = self._responder.routes.for_name(asked.name)
            if not servers:  # the routes have changed since
                self._refuse(client_query, Rcode.REFUSED)
                return
            group = self._failover.group(servers)
        elif (waiter := query.waiters.get(client)) is not None:
            self._repeat(waiter, client_query)
            return
        else:
            group = query.group
        if (
            group.waiting >= self._max_waiting
            or len(self._all_waiting) >= self._max_all_waiting
            or (query is None and (group.queries >= self._max_queries or len(self._in_flight) >= self._max_all_queries))
        ):
            if reason := self._make_room(group, key, client):
                self._metrics.forward_rejects[reason][0] += 1
                self._refuse(client_query, Rcode.REFUSED)
                return
            query = self._in_flight.get(key)  # shedding may have removed it
        if self._query_log:
            self._log_forwarded(self._query_log, client_query, group)
        is_new = query is None
        if query is None:
            query = self._add(key, asked, group)
            query.client = client
            if options:
                query.options = options
        else:
            self._metrics.coalesced[0] += 1
        waiter = _Waiter(query, client, self._loop.now, {client_query.origin: client_query})
        query.waiters[client] = waiter
        group.waiting += 1
        self._waiting[group].add(client, waiter)
        self._all_waiting.add(client, waiter)
        if is_new:
            self._failover.start(query)

    def cancel(self, client_query: ClientQuery) -> None:
        """Drop a query whose client has disconnected."""
        key, _ = self._with_options(client_query.forward.query.key, client_query.client)
        query = self._in_flight.get(key)
        waiter = query.waiters.get(client_query.client) if query else None
        if waiter and waiter.queries.get(client_query.origin) is client_query:
            del waiter.queries[client_query.origin]
            if not waiter.queries:
                self._remove_waiter(waiter)

    def _with_options(self, key: Key, client: bytes) -> tuple[Key, bytes]:
        """Return the key of a client's query in flight, and the EDNS options of the query."""
        if self._options is None:
            return key, b""
        options = self._options.of(client)
        return ((*key[:4], options) if self._options.vary else key), options

    def _repeat(self, waiter: _Waiter, client_query: ClientQuery) -> None:
        network = network_of(client_query.client)
        if client_query.origin not in waiter.queries:
            if self._repeats[network] >= MAX_REPEATS_PER_CLIENT or self._all_repeats >= self._max_all_waiting:
                self._metrics.forward_rejects["repeat"][0] += 1
                if client_query.must_answer:
                    self._refuse(client_query, Rcode.REFUSED)
                return  # over UDP the client retries and finds the response in the cache
            self._repeats[network] += 1
            self._all_repeats += 1
            waiter.repeats += 1
        self._metrics.coalesced[0] += 1
        waiter.queries[client_query.origin] = client_query

    def _log_forwarded(self, query_log: QueryLog, client_query: ClientQuery, group: Group) -> None:
        first = self._failover.order(group)[0].upstream.server
        to = first.address if first.port == 53 else str(first)
        query_log.forwarded(client_query.forward.query, to, *client_query.peer())

    # ---- limits ----

    def _is_full(self, group: Group, new: bool) -> str:
        """Return the name of the limit that is reached, or "". ``new``: for a query that is not in flight yet."""
        if group.waiting >= self._max_waiting or (new and group.queries >= self._max_queries):
            return "servers"
        if len(self._all_waiting) >= self._max_all_waiting or (new and len(self._in_flight) >= self._max_all_queries):
            return "all"
        return ""

    def _make_room(self, group: Group, key: Key, client: bytes) -> str:
        """Make room for another query of this client. Return the name of the limit if that is impossible, else ""."""
        reason = ""
        for _ in range(MAX_SHED):
            if not (reason := self._is_full(group, key not in self._in_flight)):
                return ""
            shares = self._waiting[group] if reason == "servers" else self._all_waiting
            waiter, is_greedier = shares.to_give_way(client)
            if not is_greedier and self._loop.now - waiter.since < FRESH_SECONDS:
                return reason
            self._shed(waiter)
        return self._is_full(group, key not in self._in_flight)

    def _shed(self, waiter: _Waiter) -> None:
        self._metrics.forward_rejects["shed"][0] += 1
        self._remove_waiter(waiter)
        self._deliver(deque(waiter.queries.values()), None, Rcode.REFUSED)

    def _remove_waiter(self, waiter: _Waiter) -> None:
        """Remove a waiting client. A query without clients is dropped."""
        query = waiter.query
        del query.waiters[waiter.client]
        self._release(waiter)
        if not query.waiters:
            self._failover.drop(query)
            self._remove(query)

    def _release(self, waiter: _Waiter) -> None:
        group = waiter.query.group
        group.waiting -= 1
        self._waiting[group].remove(waiter.client, waiter)
        self._all_waiting.remove(waiter.client, waiter)
        if waiter.repeats:
            network = network_of(waiter.client)
            self._repeats[network] -= waiter.repeats
            self._all_repeats -= waiter.repeats
            if not self._repeats[network]:
                del self._repeats[network]

    # ---- queries in flight ----

    def _add(self, key: Key, asked: Query, group: Group) -> _InFlight:
        query = self._in_flight[key] = _InFlight(key, asked.name + _type_and_class.pack(key[1], key[2]), group)
        if not group.queries:
            self._waiting[group] = LazyShares(self._max_waiting // 2)
        group.queries += 1
        return query

    def _remove(self, query: _InFlight) -> None:
        """Free the slot of a query."""
        del self._in_flight[query.key]
        query.group.queries -= 1
        if not query.group.queries:  # resolv.conf may no longer name its servers
            del self._waiting[query.group]

    def _end(self, query: _InFlight) -> deque[ClientQuery]:
        """Free what a query uses. Return who waits for it."""
        waiting: deque[ClientQuery] = deque()
        for waiter in query.waiters.values():
            waiting += waiter.queries.values()
            self._release(waiter)
        query.waiters.clear()  # break reference cycles: no work for the garbage collector
        self._remove(query)
        return waiting

    def on_response(self, resolution: Resolution, response: Response | Entry) -> None:
        """Cache a response and deliver it. A late one has nobody waiting."""
        entry, rcode = None, int(Rcode.SERVFAIL)
        try:
            if isinstance(response, Entry):
                entry = response
            elif rebinds(self._settings, response):
                rcode = Rcode.REFUSED
                text = name_to_text(resolution.key[0])
                LIMITED.write(log, logging.WARNING, "dns: possible DNS-rebind attack detected: %s", text)
            else:
                entry = self._responder.entry_of(response, self._loop.now)
            if entry and entry.expires > entry.stored:
                self._cache.put(resolution.key, entry)
        except Exception as error:  # a bug: the client must not have to wait for its own timeout
            text = name_to_text(resolution.key[0])
            LIMITED.write(log, logging.ERROR, "dns: cannot resolve %s: internal error", text, error=error)
        if not resolution.is_late:
            assert isinstance(resolution, _InFlight)
            self._deliver(self._end(resolution), entry, rcode)

    def on_failure(self, resolution: Resolution, rcode: int) -> None:
        """Tell the clients, and the cache for a while."""
        assert isinstance(resolution, _InFlight)
        now = self._loop.now
        if rcode == Rcode.SERVFAIL and not self._cache.get_stale(resolution.key, now):
            self._cache.put(resolution.key, failure(now))
        self._deliver(self._end(resolution), None, rcode)

    # ---- responses ----

    def _deliver(self, waiting: deque[ClientQuery], entry: Entry | None, rcode: int) -> None:
        """Respond to some clients, and to the rest in the next turn. Without ``entry``: a stale one, or ``rcode``."""
        for _ in range(min(len(waiting), DELIVERED_PER_TURN)):
            client_query = waiting.popleft()
            forward = client_query.forward
            if entry:  # new: TTLs as received
                reply = from_entry(forward.query, entry, forward.most, entry.stored, "forward")
            else:
                reply = self._stale(forward) or self._responder.refuse(forward.query, rcode)
            self._send(client_query, reply)
        if waiting:
            self._loop.call_soon(lambda: self._deliver(waiting, entry, rcode))

    def _refuse(self, client_query: ClientQuery, rcode: int) -> None:
        self._send(client_query, self._responder.refuse(client_query.forward.query, rcode))

    def _send(self, client_query: ClientQuery, reply: Reply) -> None:
        if self._query_log:
            self._query_log.response(reply, *client_query.peer())
        self._metrics.duration["forward"].observe(self._loop.now - client_query.received)
        client_query.deliver(reply)

    def _stale(self, forward: Forward) -> Reply | None:
        now = self._loop.now
        entry = self._cache.get_stale(forward.query.key, now)
        source = "cache" if entry and now < entry.expires else "stale"  # another query may have renewed it meanwhile
        return from_entry(forward.query, entry, forward.most, now, source) if entry else None

    def on_slow(self, resolution: Resolution) -> None:
        """Send an expired response, if there is one, because the servers are slow. The query continues and still
        counts for the same clients."""
        assert isinstance(resolution, _InFlight)
        for waiter in resolution.waiters.values():
            for origin, client_query in list(waiter.queries.items()):
                if (reply := self._stale(client_query.forward)) is None:
                    return
                del waiter.queries[origin]
                self._send(client_query, reply)
