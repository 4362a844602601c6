"""Questions under way to upstream servers, and the clients that wait for their answers. All of it runs in the event
loop's thread, but `HandOver.put`.

Rules
1. A question that is under way is not asked again: an attacker must not make us ask it a thousand times and guess at
   all of them (CVE-2020-25686).
2. A client waits for a question once. The same question from it again, from another port or with another id, is a
   repeat: it is answered, too, but it never takes anybody's place.
3. At a limit the greediest client gives way (shares.py): its oldest question is refused. A client that is as greedy as
   the greediest takes the place of a question older than FRESH_SECONDS, which has little hope, or is refused. So
   clients behind one address are answered while one of them asks for names of a dead zone; and no client makes us ask
   upstream servers more often than the limit twice a second.
4. Nothing here takes long: a batch per turn of the loop is taken in, DELIVERED_PER_TURN answers go out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from udpwatch.dns import cache
from udpwatch.dns.cache import Cache, Entry, Key
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.policy import rebinds
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Forward, Reply, Responder, from_entry
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.shares import Shares, network_of
from udpwatch.dns.udp import BATCH, Pending
from udpwatch.dns.upstream import NoAnswer, Upstream
from udpwatch.dns.wire import Rcode, name_to_text

STALE_SECONDS = 1.8  # RFC 8767, section 5: the client response timer
FRESH_SECONDS = 0.5  # for which a question is safe from a client that is not less greedy than its own
#: In multiples of --dns-forward-max, which is for the servers of one domain, so that dead ones cost the others nothing:
#: questions to all servers; clients that wait (several may for one question), for a domain's servers and for all.
ALL_ASKED, WAITING, ALL_WAITING = 4, 2, 4
MAX_REPEATS_PER_CLIENT = 256  # for all clients together ALL_WAITING times --dns-forward-max
MAX_SHED = 4  # waiting clients that give way for one question; they may wait for the same one as others
DELIVERED_PER_TURN = 32
TAKEN_PER_TURN = BATCH  # single questions, too, are taken together: a turn for each costs half as much again
#: Questions read from sockets that the event loop has not looked at yet. Beyond that the clients have to ask again: a
#: flood must find an end somewhere, and what is refused takes the loop's time, too.
MAX_QUEUED, MAX_QUEUED_PER_CLIENT = 4_096, 1_024

Group = tuple[Server, ...]  # the servers of one domain

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's question, and what to do with its answer."""

    forward: Forward
    client: bytes  # 4 or 16 octets
    origin: Hashable  # of two asks that have the same, one is the other again
    peer: Callable[[], tuple[str, int]]  # for the log
    deliver: Callable[[Reply], None]
    must_answer: bool  # over TCP: the client does not ask again


@dataclass(slots=True, eq=False)
class _Waiter:
    """A client that waits for a question."""

    question: _Question
    client: bytes
    since: float  # monotonic seconds
    asks: dict[Hashable, Ask] = field(default_factory=dict)
    repeats: int = 0


@dataclass(slots=True, eq=False)
class _Question:
    key: Key
    servers: Group
    waiters: dict[bytes, _Waiter] = field(default_factory=dict)
    task: asyncio.Task[Entry] | None = None
    timer: asyncio.TimerHandle | None = None


class _Load:
    """What is under way to the servers of one domain, or to all."""

    __slots__ = ("questions", "shares")

    def __init__(self) -> None:
        self.questions = 0
        self.shares: Shares[_Waiter] = Shares()


class Forwarder:
    """Takes questions, asks, keeps the answers, and delivers them."""

    def __init__(
        self,
        settings: Settings,
        responder: Responder,
        kept: Cache,
        upstream: Upstream,
        metrics: Metrics,
        query_log: QueryLog | None,
    ) -> None:
        self._settings, self._responder, self._cache = settings, responder, kept
        self._upstream, self._metrics, self._query_log = upstream, metrics, query_log
        self._under_way: dict[Key, _Question] = {}
        self._loads: dict[Group, _Load] = {}
        self._all = _Load()
        self._repeats: Counter[bytes] = Counter()  # by network
        self._all_repeats = 0
        self._tasks: set[asyncio.Task[Entry]] = set()

    def __len__(self) -> int:
        return len(self._under_way)

    async def drain(self, seconds: float) -> None:
        """Wait for what is under way, for so long at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def stop(self) -> None:
        """Give up what is under way; the clients that wait get SERVFAIL."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- questions ----

    def ask(self, ask: Ask) -> None:
        """Take a question; its answer, if by a refusal, is delivered in time."""
        key = ask.forward.query.key
        servers = self._responder.upstreams.for_name(ask.forward.query.name)
        if not servers:  # they changed since
            self._refuse(ask, Rcode.REFUSED)
            return
        question = self._under_way.get(key)
        if question and (waiter := question.waiters.get(ask.client)):
            self._repeat(waiter, ask)
            return
        group = question.servers if question else servers
        load = self._loads.setdefault(group, _Load())
        reason = self._make_room(load, question is None, ask.client)
        load = self._loads.setdefault(group, load)  # all that it held may have given way
        question = self._under_way.get(key)  # so may this one
        if not reason and question is None and self._limit(load, True):
            reason = "servers"
        if reason:
            self._metrics.forward_rejects[reason][0] += 1
            self._forget(group)
            self._refuse(ask, Rcode.REFUSED)
            return
        if self._query_log:
            first = self._upstream.order(group)[0]
            to = first.address if first.port == 53 else str(first)
            self._query_log.forwarded(ask.forward.query, to, *ask.peer())
        if question is None:
            question = self._begin(key, group, load)
        else:
            self._metrics.coalesced[0] += 1
        waiter = question.waiters[ask.client] = _Waiter(question, ask.client, time.monotonic(), {ask.origin: ask})
        for shares in (load.shares, self._all.shares):
            shares.add(ask.client, waiter)

    def give_up(self, ask: Ask) -> None:
        """The client has gone."""
        question = self._under_way.get(ask.forward.query.key)
        waiter = question.waiters.get(ask.client) if question else None
        if waiter and waiter.asks.get(ask.origin) is ask:
            del waiter.asks[ask.origin]
            if not waiter.asks:
                self._end_wait(waiter)

    def _repeat(self, waiter: _Waiter, ask: Ask) -> None:
        network = network_of(ask.client)
        if ask.origin not in waiter.asks:
            most = ALL_WAITING * self._settings.forward_max
            if self._repeats[network] >= MAX_REPEATS_PER_CLIENT or self._all_repeats >= most:
                self._metrics.forward_rejects["repeat"][0] += 1
                if ask.must_answer:
                    self._refuse(ask, Rcode.REFUSED)
                return  # else it asks again, and finds the answer in the cache
            self._repeats[network] += 1
            self._all_repeats += 1
            waiter.repeats += 1
        self._metrics.coalesced[0] += 1
        waiter.asks[ask.origin] = ask

    # ---- room ----

    def _limit(self, load: _Load, new: bool) -> tuple[Shares[_Waiter], str] | None:
        """What is full, and its name; None: there is room. ``new``: for a question that is not under way yet."""
        most = self._settings.forward_max
        if len(load.shares) >= WAITING * most or (new and load.questions >= most):
            return load.shares, "servers"
        if len(self._all.shares) >= ALL_WAITING * most or (new and self._all.questions >= ALL_ASKED * most):
            return self._all.shares, "all"
        return None

    def _make_room(self, load: _Load, new: bool, client: bytes) -> str:
        """See to it that one more question of this client fits in; what is full if it does not, else ""."""
        reason = ""
        for _ in range(MAX_SHED):
            if (found := self._limit(load, new)) is None:
                return ""
            shares, reason = found
            waiter, is_greedier = shares.to_give_way(client)
            if not is_greedier and time.monotonic() - waiter.since < FRESH_SECONDS:
                return reason
            self._shed(waiter)
        return reason if self._limit(load, new) else ""

    def _shed(self, waiter: _Waiter) -> None:
        self._metrics.forward_rejects["shed"][0] += 1
        self._end_wait(waiter)
        self._deliver(deque(waiter.asks.values()), None, Rcode.REFUSED)

    def _end_wait(self, waiter: _Waiter) -> None:
        """Take one out; with its last client a question ends."""
        question = waiter.question
        del question.waiters[waiter.client]
        self._release(waiter)
        if not question.waiters:
            self._end(question)
            if question.task:
                question.task.cancel()

    def _release(self, waiter: _Waiter) -> None:
        for shares in (self._loads[waiter.question.servers].shares, self._all.shares):
            shares.remove(waiter.client, waiter)
        if waiter.repeats:
            network = network_of(waiter.client)
            self._repeats[network] -= waiter.repeats
            self._all_repeats -= waiter.repeats
            if not self._repeats[network]:
                del self._repeats[network]

    def _forget(self, servers: Group) -> None:
        """Groups come and go with the resolv file."""
        load = self._loads.get(servers)
        if load and not load.questions:
            del self._loads[servers]

    # ---- answers ----

    def _begin(self, key: Key, servers: Group, load: _Load) -> _Question:
        loop = asyncio.get_running_loop()
        question = self._under_way[key] = _Question(key, servers)
        load.questions += 1
        self._all.questions += 1
        question.timer = loop.call_later(STALE_SECONDS, self._stand_in_for, question)
        question.task = loop.create_task(self._bring(key, servers))
        self._tasks.add(question.task)
        question.task.add_done_callback(lambda task: self._finish(question, task))
        return question

    def _end(self, question: _Question) -> None:
        """It is no longer under way: its place is free."""
        if question.timer:
            question.timer.cancel()
        del self._under_way[question.key]
        self._loads[question.servers].questions -= 1
        self._all.questions -= 1
        self._forget(question.servers)

    def _finish(self, question: _Question, task: asyncio.Task[Entry]) -> None:
        self._tasks.discard(task)
        question.task = None
        entry, rcode = None, int(Rcode.SERVFAIL)
        if task.cancelled():
            pass
        elif (error := task.exception()) is None:
            entry = task.result()
        elif isinstance(error, NoAnswer):
            rcode = error.rcode
        else:  # a bug: the client must not have to wait for its own time-out
            text = name_to_text(question.key[0])
            LIMITED.write(log, logging.ERROR, "dns: cannot resolve %s: internal error", text, error=error)
        if self._under_way.get(question.key) is not question:
            return  # nobody waits any more
        asks = deque(ask for waiter in question.waiters.values() for ask in waiter.asks.values())
        for waiter in question.waiters.values():
            self._release(waiter)
        self._end(question)
        self._deliver(asks, entry, rcode)

    def _deliver(self, asks: deque[Ask], entry: Entry | None, rcode: int) -> None:
        """An upstream server's answer, or none, for some; then for the rest in the next turn."""
        for _ in range(min(len(asks), DELIVERED_PER_TURN)):
            ask = asks.popleft()
            query = ask.forward.query
            if entry:  # new: its TTLs as they came
                reply = from_entry(query, entry, ask.forward.most, entry.stored, "forward")
            else:
                reply = self._stand_in(ask.forward) or self._responder.refuse(query, rcode)
            self._give(ask, reply)
        if asks:
            asyncio.get_running_loop().call_soon(self._deliver, asks, entry, rcode)

    def _refuse(self, ask: Ask, rcode: int) -> None:
        self._give(ask, self._responder.refuse(ask.forward.query, rcode))

    def _give(self, ask: Ask, reply: Reply) -> None:
        if self._query_log:
            self._query_log.answer(reply, *ask.peer())
        ask.deliver(reply)

    def _stand_in(self, forward: Forward) -> Reply | None:
        now = time.monotonic()
        entry = self._cache.stand_in(forward.query.key, now)
        source = "cache" if entry and now < entry.expires else "stale"  # somebody else may have had an answer meanwhile
        return from_entry(forward.query, entry, forward.most, now, source) if entry else None

    def _stand_in_for(self, question: _Question) -> None:
        """The servers take their time: the clients get an expired answer, if there is one. The question goes on, and
        counts for the same clients."""
        for waiter in question.waiters.values():
            for origin, ask in list(waiter.asks.items()):
                if (reply := self._stand_in(ask.forward)) is None:
                    return
                del waiter.asks[origin]
                self._give(ask, reply)

    async def _bring(self, key: Key, servers: Group) -> Entry:
        """Ask, and keep the answer. Raises NoAnswer."""
        try:
            answer = await self._upstream.ask(key, servers)
        except NoAnswer as error:
            if error.rcode == Rcode.SERVFAIL and not self._cache.stand_in(key, time.monotonic()):
                self._cache.put(key, cache.failure(time.monotonic()))
            raise
        if rebinds(self._settings, answer):
            text = name_to_text(key[0])
            LIMITED.write(log, logging.WARNING, "dns: possible DNS-rebind attack detected: %s", text)
            raise NoAnswer(Rcode.REFUSED)
        entry = self._responder.entry_of(answer, time.monotonic())
        if entry.expires > entry.stored:
            self._cache.put(key, entry)
        return entry


class HandOver:
    """What the UDP thread could not answer, on its way to the event loop: bounded, for each client and in all."""

    def __init__(self, metrics: Metrics, take: Callable[[Pending], None]) -> None:
        """``take`` is called in the event loop."""
        self._metrics, self._take_one = metrics, take
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._batches: deque[list[Pending]] = deque()
        self._by_network: Counter[bytes] = Counter()
        self._size = 0
        self._scheduled = False

    def start(self) -> None:
        """Begin, in the running loop."""
        self._loop = asyncio.get_running_loop()

    def put(self, pending: list[Pending]) -> None:
        """Hand over a batch; any thread. What is too much is dropped and counted."""
        kept = []
        with self._lock:
            for each in pending:
                network = network_of(each.peer)
                if self._by_network[network] >= MAX_QUEUED_PER_CLIENT:
                    self._metrics.forward_rejects["queue_share"][0] += 1
                elif self._size >= MAX_QUEUED:
                    self._metrics.forward_rejects["queue"][0] += 1
                else:
                    self._by_network[network] += 1
                    self._size += 1
                    kept.append(each)
            if not kept:
                return
            self._batches.append(kept)
            wake, self._scheduled = not self._scheduled, True
        if wake and self._loop:
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop has ended
                return

    def _take(self) -> None:
        """At most TAKEN_PER_TURN questions, so that others have their turn."""
        assert self._loop
        batch: list[Pending] = []
        with self._lock:
            while self._batches and len(batch) + len(self._batches[0]) <= TAKEN_PER_TURN:
                batch += self._batches.popleft()
            self._size -= len(batch)
            for each in batch:
                network = network_of(each.peer)
                self._by_network[network] -= 1
                if not self._by_network[network]:
                    del self._by_network[network]
            self._scheduled = bool(self._batches)
        if self._scheduled:
            self._loop.call_soon(self._take)
        for each in batch:
            self._take_one(each)
