"""Query a group of servers until one has responded. Runs in the packet loop.

Rules
1. The servers of a group are queried in their configured order. The next one is queried when the one before has failed
   or has been silent for TICK_SECONDS; a late response still counts. With `--fast-dns-retry` this time is another one,
   and doubles each time.
2. A server that is silent, or whose responses are late or of no use, comes after the others (resolution.py says when)
   and so costs clients nothing. Once in PROBE_SECONDS it gets a query beside the others, of which only the server is
   judged: the first good response restores it. One bad response changes nothing: the next server may know other names.
3. Before that, it is verified: questions that it has answered well for up to four clients (resolution.py) are sent to
   it again, at most once in FAILS_SECONDS. If one gets a good response within TICK_SECONDS, the order stays: names that
   only the next server resolves demote no server. A server that never gave a good response is not verified.
4. If no server behaves well, the order stays: no server is known to be better. All but the first are probed.
5. With `--strict-order` the order never changes; a demoted server does not delay the next one. With `--all-servers` all
   are queried at the same time.
6. The second query to a silent server has no EDNS: firewalls drop queries with an OPT record that they do not know.
   With options (edns.py) every query has EDNS.
7. A response that comes after the clients got SERVFAIL is still cached, so that their next attempt succeeds.
"""

from __future__ import annotations

import math
from typing import Protocol

from udpwatch.dns.cache_entry import Entry, Key
from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.resolution import Attempt, Group, Member, Resolution
from udpwatch.dns.settings import Server
from udpwatch.dns.tcp_connection import Failure
from udpwatch.dns.upstream import UpstreamClient
from udpwatch.dns.upstream_socket import OUR_ERRORS

TICK_SECONDS = 0.8
STALE_SECONDS = 1.6  # about RFC 8767's client response timer (section 5)
TICKS = 6  # 4.8 s: below the 5 s after which a stub resolver retries
ROUNDS = 2  # queries per server at most, except with --fast-dns-retry
MAX_ATTEMPTS = 8
IGNORED_SECONDS = TICK_SECONDS / 2  # a query dropped after this time counts as unanswered: in a flood all are dropped
MAX_UNANSWERED = 16_000  # queries that are listened for, in all


DELAYS = (TICK_SECONDS,) * TICKS  # until the next server is queried, and at the end until SERVFAIL


def doubling(first: float, total: float) -> tuple[float, ...]:
    """Return delays that double, in seconds, whose sum is ``total``: those of `--fast-dns-retry`."""
    delays, left = [], total
    while left > 0:
        delays.append(min(first, left))
        left -= first
        first *= 2
    return tuple(delays)


class Owner(Protocol):
    """Takes what becomes of a query."""

    def on_response(self, resolution: Resolution, response: Response | Entry) -> None:
        """A server has responded; the query is over."""

    def on_failure(self, resolution: Resolution, rcode: int) -> None:
        """No server gave a response that can be forwarded. ``rcode`` is for the client."""

    def on_slow(self, resolution: Resolution) -> None:
        """No server has responded for STALE_SECONDS. The query continues."""


class Failover:
    """Queries groups of servers and remembers how each behaves."""

    owner: Owner

    def __init__(
        self,
        loop: PacketLoop,
        client: UpstreamClient,
        metrics: Metrics,
        strict_order: bool = False,
        all_servers: bool = False,
        delays: tuple[float, ...] = DELAYS,
    ) -> None:
        self._loop, self._client, self._metrics = loop, client, metrics
        self._strict_order, self._all_servers = strict_order, all_servers
        client.results = self
        self._groups: dict[tuple[Server, ...], Group] = {}
        self._last: tuple[tuple[Server, ...], Group] | None = None
        queues = {delay: loop.delay_queue(delay, self._tick) for delay in delays}
        #: The timer of each tick; the last one is never started.
        self._ticks = (*(queues[delay] for delay in delays), queues[delays[-1]])
        ends = [sum(delays[:number]) for number in range(1, len(delays))]
        self._stale_tick = next((number for number, end in enumerate(ends, 1) if end >= STALE_SECONDS), 0)
        self._rounds = ROUNDS if delays is DELAYS else MAX_ATTEMPTS
        self._late: dict[Key, Resolution] = {}
        self._verifications = loop.delay_queue(TICK_SECONDS, self._judge)

    def group(self, servers: tuple[Server, ...]) -> Group:
        """Return the group of these servers."""
        if self._last and self._last[0] is servers:  # hashing them takes longer than the rest
            return self._last[1]
        group = self._groups.get(servers)
        if group is None:
            members = tuple(Member(self._client.upstream(server)) for server in servers)
            group = self._groups[servers] = Group(members)
        self._last = servers, group
        return group

    def forget_servers(self) -> None:
        """Drop what is known of servers because they have changed."""
        self._groups.clear()
        self._last = None
        self._client.forget_servers()

    def order(self, group: Group) -> tuple[Member, ...]:
        """Return the servers in the order in which they are queried."""
        members, now = group.members, self._loop.now
        if len(members) > 1 and not self._strict_order:
            for member in members:
                if group.is_demoted(member, now):
                    return tuple(sorted(members, key=lambda member: group.is_demoted(member, now)))
        return members

    # ---- a query ----

    def start(self, resolution: Resolution) -> None:
        """Send the first queries. The owner learns what becomes of it, maybe before this returns."""
        if (late := self._late.pop(resolution.key, None)) is not None:
            self.drop(late)  # one query in flight per name: see forwarder.py
        resolution.plan = ordered = self.order(resolution.group)
        self._ticks[0].start(resolution, self._loop.now)
        self._next(resolution)
        if len(ordered) > 1:
            self._start_others(resolution, ordered)
        if not resolution.attempts:
            self._fail(resolution)

    def drop(self, resolution: Resolution) -> None:
        """Forget a query that nobody waits for."""
        self._ticks[resolution.ticks].stop(resolution)
        self._late.pop(resolution.key, None)
        for attempt in resolution.attempts:
            attempt.resolution = None  # break the cycle: no work for the garbage collector
            self._client.forget(attempt)
            if self._loop.now - attempt.sent >= IGNORED_SECONDS:
                self._count(attempt, "timeout")
                self._note_overdue(attempt)
        resolution.attempts.clear()

    def _start_others(self, resolution: Resolution, ordered: tuple[Member, ...]) -> None:
        """Query more servers than the first one, if they are to be queried at the same time."""
        now, group = self._loop.now, resolution.group
        for member in group.members:
            if group.is_suspect(member, now) and member.is_to_verify(now):
                self._verify(group, member)
        if self._all_servers:
            first_ones = len(ordered)
        else:
            well = (number for number, member in enumerate(ordered, 1) if not group.is_demoted(member, now))
            first_ones = next(well, len(ordered))  # 1, except with --strict-order
        for _ in range(min(first_ones, MAX_ATTEMPTS) - 1):
            self._next(resolution)
        if first_ones == 1 and not self._strict_order:
            self._probe(resolution, ordered[0])

    def _next(self, resolution: Resolution, rounds: int = ROUNDS) -> None:
        """Query the next server of the plan, or the one after it if that is impossible."""
        plan = resolution.plan
        servers = len(plan)
        while (begun := resolution.begun) < servers or (begun < rounds * servers and begun < MAX_ATTEMPTS):
            member = plan[begun % servers]
            resolution.begun = begun + 1
            silent = False
            for each in resolution.attempts:
                silent |= each.member is member and each.edns
            if (attempt := self._send(resolution, member, silent)) is not None:
                attempt.resolution = resolution
                resolution.attempts.append(attempt)
                return

    def _send(self, resolution: Resolution, member: Member, repeated: bool = False) -> Attempt | None:
        """Query a server, ``repeated``: without EDNS. Return None if that has failed."""
        now = self._loop.now
        edns = (not repeated and member.upstream.plain_until <= now) or resolution.options != b""
        attempt = Attempt(member, resolution.key, resolution.question, edns, now, repeated)
        attempt.options, attempt.client = resolution.options, resolution.client
        if self._client.waiting >= MAX_UNANSWERED:
            self._give_up(self._client.forget_oldest())
        try:
            self._client.query(attempt)
        except OSError as error:
            if error.errno in OUR_ERRORS:  # this host's, not the server's
                self._count(attempt, "busy")
                resolution.rcode = Rcode.REFUSED
            else:
                self._count(attempt, "network")
                member.note_unreachable(now)
            return None
        return attempt

    def _probe(self, resolution: Resolution, first: Member) -> None:
        """Send the query to the servers that fail as well, or to all others if the first one fails; only they are
        judged: a failing first one is demoted once another one has responded."""
        now = self._loop.now
        all_others = first.fails_since(now) < math.inf
        for member in resolution.group.members:
            if (
                member is not first
                and (all_others or member.fails_since(now) < math.inf)
                and member.is_to_probe(now, resolution.client)
            ):
                self._send(resolution, member)

    def _verify(self, group: Group, member: Member) -> None:
        """Send a server questions that it has answered well. Only the server is judged."""
        is_shortage = False
        for known in list(member.known.values()):
            question = Resolution(known.key, known.question, group, known.client, options=known.options)
            self._send(question, member)
            is_shortage |= question.rcode == Rcode.REFUSED  # this host has run out of something
        if not is_shortage:
            self._verifications.start(member, self._loop.now)

    def _judge(self, member: Member) -> None:
        """End a verification."""
        member.failed_verification = member.good < member.verified_at and member.fails_since(self._loop.now) < math.inf

    def _tick(self, resolution: Resolution) -> None:
        for attempt in resolution.attempts:
            self._note_overdue(attempt)
        resolution.ticks += 1
        if resolution.ticks >= len(self._ticks) - 1:
            self._fail(resolution)
            return
        self._ticks[resolution.ticks].start(resolution, self._loop.now)
        self._next(resolution, self._rounds)
        if resolution.ticks == self._stale_tick:
            self.owner.on_slow(resolution)

    def _fail(self, resolution: Resolution) -> None:
        self._ticks[resolution.ticks].stop(resolution)
        for attempt in resolution.attempts:
            self._count(attempt, "timeout")
        if resolution.attempts:
            resolution.is_late = True
            self._late[resolution.key] = resolution
        self.owner.on_failure(resolution, resolution.rcode or Rcode.SERVFAIL)

    # ---- results of attempts ----

    def on_response(self, attempt: Attempt, response: Response | Entry) -> None:
        """End the query with this response."""
        now = self._loop.now
        prompt = now - attempt.sent < TICK_SECONDS
        attempt.member.note_response(now, good=prompt)
        if prompt:
            attempt.member.remember(attempt, now)
        resolution = self._take(attempt)
        if resolution is None:
            return
        self._ticks[resolution.ticks].stop(resolution)
        self._late.pop(resolution.key, None)
        for other in resolution.attempts:
            other.resolution = None
            if other.cancel:  # it holds a slot
                self._client.forget(other)
        resolution.attempts.clear()
        self.owner.on_response(resolution, response)

    def on_failure(self, attempt: Attempt, failure: Failure) -> None:
        """Query the next server."""
        self._count(attempt, failure.reason)
        member = attempt.member
        if failure.reason == "network":
            member.note_unreachable(self._loop.now)
        elif failure.reason == "timeout":
            self._note_overdue(attempt)
        elif failure.reason != "busy":  # that is our limit
            member.note_response(self._loop.now, good=False)
        resolution = self._take(attempt)
        if resolution is None or resolution.is_late:
            return
        resolution.rcode = Rcode.REFUSED if failure.rcode == Rcode.REFUSED else Rcode.SERVFAIL
        if all(each.overdue for each in resolution.attempts):  # else another one may still respond in time
            self._next(resolution)
        if not resolution.attempts:
            self._fail(resolution)

    def _take(self, attempt: Attempt) -> Resolution | None:
        """Take an attempt out of its query. Return the query if this result may end it."""
        resolution = attempt.resolution
        if resolution is None:
            return None
        attempt.resolution = None
        resolution.attempts.remove(attempt)
        if resolution.is_late and not resolution.attempts:
            self._late.pop(resolution.key, None)
        return resolution

    def _give_up(self, attempt: Attempt) -> None:
        """Count an attempt as silent before its time is over. Its query goes on with the next tick."""
        self._count(attempt, "timeout")
        self._note_overdue(attempt)
        self._take(attempt)

    def _note_overdue(self, attempt: Attempt) -> None:
        if not attempt.overdue:
            attempt.overdue = True
            attempt.member.note_overdue(attempt.sent)

    def _count(self, attempt: Attempt, reason: str) -> None:
        if not attempt.counted:
            attempt.counted = True
            self._metrics.upstream_failed[str(attempt.member.upstream.server), reason][0] += 1
