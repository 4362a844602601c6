"""A query in flight: what is known of it, of its attempts, and of the servers that it goes to. No system calls, no
timers.

A server is judged in its group: one that does not answer for one domain may do so for another. It is judged against the
others: clients can ask for names for which no server responds, or gives a useful response in time. And it is judged by
names of several clients: one can ask for names that only the next server resolves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from udpwatch.dns.cache_entry import Key
from udpwatch.dns.metrics import Cell, Histogram
from udpwatch.dns.settings import Server
from udpwatch.dns.shares import network_of
from udpwatch.dns.transport import UdpConnection

SILENT_AFTER = 3  # queries in a row without a response
POOR_AFTER = 5  # responses in a row that were late or of no use
FAILS_SECONDS = 2.0  # for at least this long, without a good response between
PROBE_SECONDS = 1.0  # between two queries to a server that is not preferred because of that
OTHER_CLIENT_SOONER = 0.9  # seconds: if the query is of another client than the last one
KNOWN_QUESTIONS = 4  # per server: of as many clients, so that one client cannot choose all of them
KNOWN_SECONDS = 600.0  # how long a client's question cannot be replaced by another client's
RENEW_SECONDS = 1.0  # how long a client's question stays, although a newer one was answered: most packets cost nothing
EDNS_LOST_AFTER = 3  # queries in a row that only succeeded without EDNS, if the server has answered one with EDNS
PLAIN_SECONDS = 600.0  # how long such a server is queried without EDNS


@dataclass(slots=True, eq=False)
class Upstream:
    """An upstream server, with its sockets."""

    server: Server
    asked: Cell
    duration: Histogram
    pool: list[PooledSocket] = field(default_factory=list)
    opened: int = 0  # sockets: those of the pool, and others that still wait for responses
    ports: set[int] = field(default_factory=set)  # of its open sockets, without those that the kernel chose
    knows_edns: bool = False  # it has answered a query with EDNS
    edns_lost: int = 0
    plain_until: float = 0.0  # monotonic seconds

    def note_edns_lost(self, now: float) -> None:
        """Note that a query with EDNS was not answered, and the same query without EDNS was.

        A firewall may drop queries with OPT, and an old server may refuse them. But a query may also be lost, so one
        loss is not enough if EDNS has worked before.
        """
        self.edns_lost += 1
        if self.edns_lost >= EDNS_LOST_AFTER or not self.knows_edns:
            self.plain_until = now + PLAIN_SECONDS
            self.edns_lost = 0


@dataclass(slots=True, eq=False)
class KnownQuestion:
    """A question that a server has answered well."""

    key: Key
    question: bytes
    options: bytes
    client: bytes
    at: float  # monotonic seconds


@dataclass(slots=True, eq=False)
class Member:
    """A server in a group, and how it has behaved there."""

    upstream: Upstream
    unanswered: int = 0  # overdue queries that were sent after the last response
    silent_since: float = 0.0  # monotonic seconds; when the first of these was sent
    poor: int = 0
    poor_since: float = 0.0
    responded: float = -math.inf  # last
    good: float = -math.inf  # last good response
    probe_at: float = 0.0
    probed_for: bytes = b""  # the client whose query was the last probe
    known: dict[bytes, KnownQuestion] = field(default_factory=dict)  # by network of the client; the oldest is the first
    verified_at: float = -math.inf  # when the last verification began
    failed_verification: bool = False  # it has failed the verification, and has behaved no better since

    def fails_since(self, now: float) -> float:
        """Return since when it has given no good response; infinity: it behaves well enough."""
        if self.poor >= POOR_AFTER and now - self.poor_since >= FAILS_SECONDS:
            return self.poor_since
        if self.unanswered >= SILENT_AFTER and now - self.silent_since >= FAILS_SECONDS:
            return self.silent_since
        return math.inf

    def note_overdue(self, sent: float) -> None:
        """Note that a query is unanswered for longer than a server may take."""
        if sent < self.responded:  # the server is there: it does not know this name, or not yet
            return
        if not self.unanswered:
            self.silent_since = sent
        self.unanswered += 1

    def note_unreachable(self, now: float) -> None:
        """Note that the kernel reports that no server listens, or that there is no route.

        Anyone who finds an open port can forge such a report, so a server that has just responded is not judged by one.
        """
        if now - self.responded < PROBE_SECONDS:
            self.note_overdue(now)
            return
        self.unanswered = max(self.unanswered + 1, SILENT_AFTER)
        self.silent_since = min(self.silent_since, now - 2 * FAILS_SECONDS)
        self.probe_at = now + PROBE_SECONDS

    def note_response(self, now: float, good: bool) -> None:
        """Note a response. ``good``: useful, and in time."""
        self.responded, self.unanswered = now, 0
        if good:
            self.good, self.poor, self.failed_verification = now, 0, False
            return
        if self.poor < POOR_AFTER:  # it was silent, and is no longer
            self.failed_verification = False
        if not self.poor:
            self.poor_since = now
        self.poor += 1

    def remember(self, attempt: Attempt, now: float) -> None:
        """Remember a question that it has answered well."""
        known, network = self.known, network_of(attempt.client)
        mine = known.get(network)
        if mine is not None:
            if now - mine.at < RENEW_SECONDS:
                return
            del known[network]
        elif len(known) >= KNOWN_QUESTIONS:
            oldest = next(iter(known))
            if now - known[oldest].at < KNOWN_SECONDS:
                return
            del known[oldest]
        known[network] = KnownQuestion(attempt.key, attempt.question, attempt.options, attempt.client, now)

    def is_to_verify(self, now: float) -> bool:
        """Return whether a verification is to begin, and note it. None is possible without a known question."""
        if self.failed_verification or not self.known or now - self.verified_at < FAILS_SECONDS:
            return False
        self.verified_at = now
        return True

    def is_to_probe(self, now: float, client: bytes) -> bool:
        """Return whether a query of this client is the next probe, and note it.

        Clients take turns: one that asks for names that the server cannot resolve must not use up all probes.
        """
        if now < self.probe_at - (OTHER_CLIENT_SOONER if client != self.probed_for else 0):
            return False
        self.probe_at, self.probed_for = now + PROBE_SECONDS, client
        return True


@dataclass(slots=True, eq=False)
class Group:
    """The servers of a domain, in their configured order."""

    members: tuple[Member, ...]
    queries: int = 0  # in flight
    waiting: int = 0  # clients, each once for a query

    def is_suspect(self, member: Member, now: float) -> bool:
        """Whether it fails, and another one has given a good response meanwhile.

        A healthy server is silent, too, for names whose own servers are: a client may own such a domain.
        """
        since = member.fails_since(now)
        return since < math.inf and any(each.good >= since for each in self.members if each is not member)

    def is_demoted(self, member: Member, now: float) -> bool:
        """Whether others are queried first: it is suspect, and does not answer what it has answered well before.

        A server that is suspect because of one client's names still answers what others have asked.
        """
        return (member.failed_verification or not member.known) and self.is_suspect(member, now)


@dataclass(slots=True, eq=False)
class Attempt:
    """One query to one server."""

    member: Member
    key: Key
    question: bytes  # name, type and class as sent
    edns: bool
    sent: float  # monotonic seconds
    repeated: bool = False  # without EDNS, because the same query with EDNS was not answered
    options: bytes = b""  # EDNS options: see edns.py
    client: bytes = b""  # the first that asked
    resolution: Resolution | None = None  # None: only its server is judged
    overdue: bool = False
    counted: bool = False  # as a failure
    ident: bytes = b""
    socket: PooledSocket | None = None
    cancel: Callable[[], None] | None = None  # while it continues over TCP


@dataclass(slots=True, eq=False)
class Resolution:
    """A query in flight."""

    key: Key
    question: bytes
    group: Group
    client: bytes = b""  # the first that asked
    attempts: list[Attempt] = field(default_factory=list)  # without a result yet
    options: bytes = b""  # EDNS options that servers get
    plan: tuple[Member, ...] = ()  # to query, in this order, more than once
    begun: int = 0  # how many queries of the plan
    rcode: int = 0  # for the client if all fail
    ticks: int = 0
    is_late: bool = False  # its clients have got SERVFAIL; a response is only cached


class PooledSocket:
    """A socket, and the queries that wait for a response on it."""

    __slots__ = ("_connection", "_port", "attempts", "is_pooled", "left", "mismatches", "receive", "send", "upstream")

    send: Callable[[bytes], None]
    receive: Callable[[int], bytes]

    def __init__(self, upstream: Upstream, left: int) -> None:
        """``left``: how many queries it may still send."""
        self.upstream, self.left = upstream, left
        self.attempts: dict[bytes, Attempt] = {}  # by id
        self.mismatches = 0
        self.is_pooled = False
        self._connection: UdpConnection | None = None
        self._port = 0

    def open(self, connection: UdpConnection, port: int = 0) -> None:
        """Take the connection. ``port``: its source port; 0: the kernel has chosen one."""
        self._connection, self._port = connection, port
        if port:
            self.upstream.ports.add(port)
        self.send, self.receive = connection.send, connection.receive

    def close(self) -> bool:
        """Close the socket. Return whether it was open."""
        if not self._connection:
            return False
        self._connection.close()
        self._connection = None
        self.upstream.ports.discard(self._port)
        return True
