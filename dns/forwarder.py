"""Queries in flight to upstream servers, and the clients that wait for them. Runs in the event loop's thread.

Rules
1. A query that is in flight is not sent again: an attacker must not be able to make us send a thousand copies and to
   guess at all of them (CVE-2020-25686).
2. A client waits for a query once. The same query from the same client, from another port or with another id, is a
   repeat: it gets the response too, but it never takes a slot from others.
3. At a limit the client with the most queries gives way (shares.py): its oldest query is refused. A client with as many
   takes the slot of a query older than FRESH_SECONDS, which is unlikely to succeed, or is refused. So clients behind
   one address get responses while one of them looks up names of a dead zone, and no client makes us query upstream
   servers more often than twice the limit a second.
4. Nothing here blocks the event loop: DELIVERED_PER_TURN responses are sent per turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import Entry, Key, failure
from udpwatch.dns.failover import Failover, ResolutionFailed
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.message import Rcode
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import name_to_text
from udpwatch.dns.policy import rebinds
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Forward, Reply, Responder, from_entry
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.shares import Shares, network_of

STALE_SECONDS = 1.8  # RFC 8767, section 5: the client response timer
FRESH_SECONDS = 0.5  # a younger query gives its slot only to a client with fewer queries
#: Multiples of --dns-forward-max, which is per server group, so that dead servers cost the other groups nothing:
#: queries in flight to all servers; clients that wait (several may wait for one query), per server group and in all.
ALL_ASKED, WAITING, ALL_WAITING = 4, 2, 4
MAX_REPEATS_PER_CLIENT = 256  # for all clients together: ALL_WAITING times --dns-forward-max
MAX_SHED = 4  # waiting clients that give way to one query; several may wait for the same one
DELIVERED_PER_TURN = 32

Group = tuple[Server, ...]  # the servers of one domain

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientQuery:
    """One client's query, and where its response goes."""

    forward: Forward
    client: bytes  # 4 or 16 octets
    origin: Hashable  # two queries with the same origin are the same one, sent again
    peer: Callable[[], tuple[str, int]]  # for the log
    deliver: Callable[[Reply], None]
    must_answer: bool  # over TCP: the client does not retry


@dataclass(slots=True, eq=False)
class _Waiter:
    """A client that waits for a query."""

    query: _InFlight
    client: bytes
    since: float  # event loop time
    queries: dict[Hashable, ClientQuery] = field(default_factory=dict)
    repeats: int = 0


@dataclass(slots=True, eq=False)
class _InFlight:
    """A query to upstream servers."""

    key: Key
    servers: Group
    waiters: dict[bytes, _Waiter] = field(default_factory=dict)
    task: asyncio.Task[Entry] | None = None
    timer: asyncio.TimerHandle | None = None


class _Load:
    """What is in flight to one server group, or in all."""

    __slots__ = ("queries", "shares")

    def __init__(self) -> None:
        self.queries = 0
        self.shares: Shares[_Waiter] = Shares()


class Forwarder:
    """Takes client queries, resolves them, caches the responses and delivers them."""

    def __init__(
        self,
        settings: Settings,
        responder: Responder,
        cache: Cache,
        failover: Failover,
        metrics: Metrics,
        query_log: QueryLog | None,
    ) -> None:
        self._settings, self._responder, self._cache = settings, responder, cache
        self._failover, self._metrics, self._query_log = failover, metrics, query_log
        self._in_flight: dict[Key, _InFlight] = {}
        self._loads: dict[Group, _Load] = {}
        self._total = _Load()
        self._repeats: Counter[bytes] = Counter()  # by network
        self._all_repeats = 0
        self._tasks: set[asyncio.Task[Entry]] = set()

    def __len__(self) -> int:
        return len(self._in_flight)

    async def drain(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the queries in flight."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def stop(self) -> None:
        """Cancel the queries in flight; clients that wait get SERVFAIL."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- client queries ----

    def submit(self, client_query: ClientQuery) -> None:
        """Take a client's query. Its response, which may be a refusal, is delivered later."""
        key, client = client_query.forward.query.key, client_query.client
        servers = self._responder.routes.for_name(client_query.forward.query.name)
        if not servers:  # the routes have changed since
            self._refuse(client_query, Rcode.REFUSED)
            return
        query = self._in_flight.get(key)
        if query and (waiter := query.waiters.get(client)):
            self._repeat(waiter, client_query)
            return
        group = query.servers if query else servers
        load = self._loads.setdefault(group, _Load())
        reason = self._make_room(load, query is None, client)
        load = self._loads.setdefault(group, load)  # shedding may have removed it
        query = self._in_flight.get(key)  # and this query
        if not reason and query is None and self._limit(load, True):
            reason = "servers"
        if reason:
            self._metrics.forward_rejects[reason][0] += 1
            self._remove_if_idle(group)
            self._refuse(client_query, Rcode.REFUSED)
            return
        if self._query_log:
            self._log_forwarded(self._query_log, client_query, group)
        if query is None:
            query = self._start(key, group, load)
        else:
            self._metrics.coalesced[0] += 1
        now = asyncio.get_running_loop().time()
        waiter = query.waiters[client] = _Waiter(query, client, now, {client_query.origin: client_query})
        for shares in (load.shares, self._total.shares):
            shares.add(client, waiter)

    def cancel(self, client_query: ClientQuery) -> None:
        """Drop a query whose client has disconnected."""
        query = self._in_flight.get(client_query.forward.query.key)
        waiter = query.waiters.get(client_query.client) if query else None
        if waiter and waiter.queries.get(client_query.origin) is client_query:
            del waiter.queries[client_query.origin]
            if not waiter.queries:
                self._remove_waiter(waiter)

    def _repeat(self, waiter: _Waiter, client_query: ClientQuery) -> None:
        network = network_of(client_query.client)
        if client_query.origin not in waiter.queries:
            most = ALL_WAITING * self._settings.forward_max
            if self._repeats[network] >= MAX_REPEATS_PER_CLIENT or self._all_repeats >= most:
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
        first = self._failover.order(group)[0]
        to = first.address if first.port == 53 else str(first)
        query_log.forwarded(client_query.forward.query, to, *client_query.peer())

    # ---- limits ----

    def _limit(self, load: _Load, new: bool) -> tuple[Shares[_Waiter], str] | None:
        """Return what is full and its name, or None. ``new``: for a query that is not in flight yet."""
        most = self._settings.forward_max
        if len(load.shares) >= WAITING * most or (new and load.queries >= most):
            return load.shares, "servers"
        if len(self._total.shares) >= ALL_WAITING * most or (new and self._total.queries >= ALL_ASKED * most):
            return self._total.shares, "all"
        return None

    def _make_room(self, load: _Load, new: bool, client: bytes) -> str:
        """Make room for another query of this client. Return the name of the limit if that is impossible, else ""."""
        reason = ""
        for _ in range(MAX_SHED):
            if (found := self._limit(load, new)) is None:
                return ""
            shares, reason = found
            waiter, is_greedier = shares.to_give_way(client)
            if not is_greedier and asyncio.get_running_loop().time() - waiter.since < FRESH_SECONDS:
                return reason
            self._shed(waiter)
        return reason if self._limit(load, new) else ""

    def _shed(self, waiter: _Waiter) -> None:
        self._metrics.forward_rejects["shed"][0] += 1
        self._remove_waiter(waiter)
        self._deliver(deque(waiter.queries.values()), None, Rcode.REFUSED)

    def _remove_waiter(self, waiter: _Waiter) -> None:
        """Remove a waiting client. A query without clients is cancelled."""
        query = waiter.query
        del query.waiters[waiter.client]
        self._release(waiter)
        if not query.waiters:
            self._remove(query)
            if query.task:
                query.task.cancel()

    def _release(self, waiter: _Waiter) -> None:
        for shares in (self._loads[waiter.query.servers].shares, self._total.shares):
            shares.remove(waiter.client, waiter)
        if waiter.repeats:
            network = network_of(waiter.client)
            self._repeats[network] -= waiter.repeats
            self._all_repeats -= waiter.repeats
            if not self._repeats[network]:
                del self._repeats[network]

    def _remove_if_idle(self, group: Group) -> None:
        """Forget a group without queries, because resolv.conf may no longer name its servers."""
        load = self._loads.get(group)
        if load and not load.queries:
            del self._loads[group]

    # ---- queries in flight ----

    def _start(self, key: Key, servers: Group, load: _Load) -> _InFlight:
        loop = asyncio.get_running_loop()
        query = self._in_flight[key] = _InFlight(key, servers)
        load.queries += 1
        self._total.queries += 1
        query.timer = loop.call_later(STALE_SECONDS, self._serve_stale, query)
        query.task = loop.create_task(self._resolve(key, servers))
        self._tasks.add(query.task)
        query.task.add_done_callback(lambda task: self._complete(query, task))
        return query

    async def _resolve(self, key: Key, servers: Group) -> Entry:
        """Query upstream and cache the response. Raises ResolutionFailed."""
        loop = asyncio.get_running_loop()
        try:
            response = await self._failover.query(key, servers)
        except ResolutionFailed as error:
            if error.rcode == Rcode.SERVFAIL and not self._cache.get_stale(key, loop.time()):
                self._cache.put(key, failure(loop.time()))
            raise
        if rebinds(self._settings, response):
            text = name_to_text(key[0])
            LIMITED.write(log, logging.WARNING, "dns: possible DNS-rebind attack detected: %s", text)
            raise ResolutionFailed(Rcode.REFUSED)
        entry = self._responder.entry_of(response, loop.time())
        if entry.expires > entry.stored:
            self._cache.put(key, entry)
        return entry

    def _complete(self, query: _InFlight, task: asyncio.Task[Entry]) -> None:
        self._tasks.discard(task)
        query.task = None
        entry, rcode = None, int(Rcode.SERVFAIL)
        if task.cancelled():
            pass
        elif (error := task.exception()) is None:
            entry = task.result()
        elif isinstance(error, ResolutionFailed):
            rcode = error.rcode
        else:  # a bug: the client must not have to wait for its own timeout
            text = name_to_text(query.key[0])
            LIMITED.write(log, logging.ERROR, "dns: cannot resolve %s: internal error", text, error=error)
        if self._in_flight.get(query.key) is not query:
            return  # no client waits any more
        waiting = deque(each for waiter in query.waiters.values() for each in waiter.queries.values())
        for waiter in query.waiters.values():
            self._release(waiter)
        query.waiters.clear()  # break reference cycles: no work for the garbage collector
        self._remove(query)
        self._deliver(waiting, entry, rcode)

    def _remove(self, query: _InFlight) -> None:
        """Free the slot of a query."""
        if query.timer:
            query.timer.cancel()
            query.timer = None
        del self._in_flight[query.key]
        self._loads[query.servers].queries -= 1
        self._total.queries -= 1
        self._remove_if_idle(query.servers)

    # ---- responses ----

    def _deliver(self, waiting: deque[ClientQuery], entry: Entry | None, rcode: int) -> None:
        """Respond to some clients, and to the rest in the next turn. Without ``entry``: a stale one, or ``rcode``."""
        for _ in range(min(len(waiting), DELIVERED_PER_TURN)):
            client_query = waiting.popleft()
            query = client_query.forward.query
            if entry:  # new: TTLs as received
                reply = from_entry(query, entry, client_query.forward.most, entry.stored, "forward")
            else:
                reply = self._stale(client_query.forward) or self._responder.refuse(query, rcode)
            self._send(client_query, reply)
        if waiting:
            asyncio.get_running_loop().call_soon(self._deliver, waiting, entry, rcode)

    def _refuse(self, client_query: ClientQuery, rcode: int) -> None:
        self._send(client_query, self._responder.refuse(client_query.forward.query, rcode))

    def _send(self, client_query: ClientQuery, reply: Reply) -> None:
        if self._query_log:
            self._query_log.response(reply, *client_query.peer())
        client_query.deliver(reply)

    def _stale(self, forward: Forward) -> Reply | None:
        now = asyncio.get_running_loop().time()
        entry = self._cache.get_stale(forward.query.key, now)
        source = "cache" if entry and now < entry.expires else "stale"  # another query may have renewed it meanwhile
        return from_entry(forward.query, entry, forward.most, now, source) if entry else None

    def _serve_stale(self, query: _InFlight) -> None:
        """Send an expired response, if there is one, because the servers are slow. The query continues and still
        counts for the same clients."""
        query.timer = None
        for waiter in query.waiters.values():
            for origin, client_query in list(waiter.queries.items()):
                if (reply := self._stale(client_query.forward)) is None:
                    return
                del waiter.queries[origin]
                self._send(client_query, reply)
