"""Query single upstream servers, and accept a response from no other host. Runs in the packet loop.

Rules
1. A response is accepted only on the socket of its query, from its server, with its id and question, in a valid format
   (RFC 5452, section 9.1); upstream_socket.py says how many bits an attacker must guess.
2. Too many mismatches on a socket suggest an attempt to guess: its queries continue over TCP, where guessing does not
   work.
3. With 0x20 encoding (`--do-0x20-encode`), the letters of a query over UDP have a random case, which a response must
   have, too: a bit more to guess for each letter. A server that changes the case is queried over TCP.
4. A flood of responses gets a limited share of a turn: UDP_ANSWERS_PER_TURN. The rest waits in the kernel's buffers,
   which are small.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Collection
from typing import Protocol

from udpwatch.dns import message
from udpwatch.dns.cache_entry import Entry
from udpwatch.dns.cname import CnameLoop, follow
from udpwatch.dns.edns import has_same_subnet, with_options
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.message import AD, CD, DO, OPCODE_MASK, RD, TC, Malformed, Rcode, Response
from udpwatch.dns.metrics import UPSTREAM_FAILURES, Metrics
from udpwatch.dns.names import Network, mix_case
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.policy import has_address_in
from udpwatch.dns.resolution import Attempt, PooledSocket, Upstream
from udpwatch.dns.settings import ANY_PORTS, Ports, Server
from udpwatch.dns.tcp_connection import Failure, Result
from udpwatch.dns.transport import Transport
from udpwatch.dns.upstream_socket import MAX_SOCKETS, SOCKET_SECONDS, Sockets
from udpwatch.dns.upstream_tcp import TcpClient

ATTEMPT_SECONDS = 8.0  # how long a response may take: longer than clients wait, because it is cached
MAX_MISMATCHES = 20  # on one socket; then its queries continue over TCP
MAX_UDP_ANSWER_BYTES = 4096  # queries ask for at most 1,232; a longer response is fetched over TCP
UDP_ANSWERS_PER_TURN = 32  # a few milliseconds

_ACCEPTED = {int(Rcode.NOERROR), int(Rcode.NXDOMAIN)}
#: Response codes of a server that does not support EDNS (RFC 6891, section 7).
_NO_EDNS = {int(Rcode.FORMERR), int(Rcode.NOTIMP)}
log = logging.getLogger(__name__)
_rest_of_header = struct.Struct("!5H")  # after the id


#: (octets, question, monotonic seconds): the entry of a usual response, or None; see direct.py.
ReadDirect = Callable[[bytes, bytes, float], Entry | None]


class Results(Protocol):
    """Takes the results of attempts."""

    def on_response(self, attempt: Attempt, response: Response | Entry) -> None:
        """A server gave a response that can be forwarded."""

    def on_failure(self, attempt: Attempt, failure: Failure) -> None:
        """A server gave none."""


class UpstreamClient:
    """Queries single servers."""

    results: Results

    def __init__(
        self,
        loop: PacketLoop,
        metrics: Metrics,
        transport: Transport,
        tcp: TcpClient,
        read_direct: ReadDirect,
        *,
        proxy_dnssec: bool = False,
        ignored: Collection[Network] = (),
        ports: Ports = ANY_PORTS,
        mixes_case: bool = False,
        only_tcp: bool = False,
        max_sockets: int = MAX_SOCKETS,
    ) -> None:
        """``proxy_dnssec``: ask for AD. A response with an address in ``ignored`` counts as a mismatch."""
        self._loop, self._metrics, self._tcp, self._ignored = loop, metrics, tcp, ignored
        self._read_direct, self._mixes_case, self._only_tcp = read_direct, mixes_case, only_tcp
        flags = RD | AD if proxy_dnssec else RD  # RFC 6840, section 5.7
        #: What comes before and after the question, by what the client wants (CD, DO) and whether there is EDNS.
        self._around = {
            (wants, edns): (
                _rest_of_header.pack(flags | wants & CD, 1, 0, 0, int(edns)),
                message.opt(0, bool(wants & DO)) if edns else b"",
            )
            for wants in (0, CD, DO, CD | DO)
            for edns in (False, True)
        }
        self._timeouts = loop.delay_queue(ATTEMPT_SECONDS, self._on_timeout)
        self._ages = loop.delay_queue(SOCKET_SECONDS, self._on_age)
        self._sockets = Sockets(transport, self._receive, self._on_open, ports, max_sockets)
        self._upstreams: dict[Server, Upstream] = {}
        self._received = 0  # in this turn

    def upstream(self, server: Server) -> Upstream:
        """Return what is known of a server."""
        if (found := self._upstreams.get(server)) is None:
            name, metrics = str(server), self._metrics
            for reason in UPSTREAM_FAILURES:  # a rate needs the 0 before the first one
                metrics.upstream_failed[name, reason][0] += 0
            found = Upstream(server, metrics.upstream_asked[name], metrics.upstream_duration[name])
            self._upstreams[server] = found
            self._sockets.share_among(len(self._upstreams))
        return found

    def forget_servers(self) -> None:
        """Drop what is known of servers because they have changed. Queries in flight continue."""
        for upstream in self._upstreams.values():
            for link in list(upstream.pool):
                self._retire(link)
        self._upstreams.clear()
        self._tcp.forget_servers()

    def close(self) -> None:
        """Close all sockets."""
        while len(self._timeouts):
            self.forget(self._timeouts.oldest())
        while len(self._ages):
            self._retire(self._ages.oldest())

    @property
    def waiting(self) -> int:
        """The number of queries without a result."""
        return len(self._timeouts)

    def forget_oldest(self) -> Attempt:
        """Drop the oldest query, to bound their number, and return it."""
        attempt = self._timeouts.oldest()
        self.forget(attempt)
        return attempt

    def query(self, attempt: Attempt) -> None:
        """Send a query; its result comes later. Raises OSError."""
        attempt.member.upstream.asked[0] += 1
        if self._only_tcp:
            self._over_tcp(attempt)
        else:
            if self._mixes_case:
                question, size = attempt.question, len(attempt.question) - 4
                attempt.question = mix_case(question[:size], self._sockets.random(size)) + question[size:]
            before, after = self._around[attempt.key[3], attempt.edns]
            if attempt.options:
                after = with_options(after, attempt.options)
            self._sockets.send(attempt, before + attempt.question + after)
        self._timeouts.start(attempt, attempt.sent)

    def forget(self, attempt: Attempt) -> None:
        """Drop a query; there is no result."""
        self._timeouts.stop(attempt)
        self._sockets.release(attempt)
        if attempt.cancel:
            attempt.cancel()
            attempt.cancel = None

    # ---- timers ----

    def _on_timeout(self, attempt: Attempt) -> None:
        self.forget(attempt)
        self.results.on_failure(attempt, Failure("timeout"))

    def _on_open(self, link: PooledSocket) -> None:
        self._ages.start(link, self._loop.now)

    def _on_age(self, link: PooledSocket) -> None:
        renewed = self._sockets.renews and self._sockets.has_room(link.upstream)
        if renewed or link.upstream is not self._upstreams.get(link.upstream.server):
            self._sockets.retire(link)
        else:
            self._on_open(link)

    def _retire(self, link: PooledSocket) -> None:
        self._ages.stop(link)
        self._sockets.retire(link)

    # ---- responses over UDP ----

    def _receive(self, link: PooledSocket) -> None:
        """Read one datagram; if there are more, the socket is readable again in the next turn."""
        if not self._received:
            self._loop.call_soon(self._next_turn)
        self._received += 1
        if self._received > UDP_ANSWERS_PER_TURN:  # a flood must not stall clients
            return
        try:
            data = link.receive(MAX_UDP_ANSWER_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:  # ICMP reports that no server listens
            self._retire(link)
            for attempt in list(link.attempts.values()):
                self._fail(attempt, Failure("network"))
            return
        attempt = link.attempts.get(data[:2])  # type: ignore[assignment]
        if attempt is None:
            self._mismatch(link)
        elif len(data) > MAX_UDP_ANSWER_BYTES:
            self._over_tcp(attempt)
        elif (entry := self._read_direct(data, attempt.question, self._loop.now)) is not None:
            self._accept(attempt, entry)
        elif (found := self._match(data, attempt)) is None:
            self._mismatch(link)
        elif self._mixes_case and isinstance(found, Response) and found.question != attempt.question:
            self._other_case(link, attempt)
        else:
            self._judge(attempt, found)

    def _other_case(self, link: PooledSocket, attempt: Attempt) -> None:
        """Repeat a query over TCP whose response may be a forged one, or from a server that changes the case."""
        text = "dns: a response of %s has the name in another case; repeating the query over TCP"
        LIMITED.write(log, logging.WARNING, text, attempt.member.upstream.server)
        self._over_tcp(attempt)
        self._mismatch(link)

    def _next_turn(self) -> None:
        self._received = 0

    def _match(self, data: bytes, attempt: Attempt) -> Result | None:
        """Return the response if it matches the query, else None. It may be a server's report that it could not read
        the query."""
        if data[:2] != attempt.ident:
            return None
        if data[4:6] == b"\0\0" and (rcode := message.error_without_question(data)) is not None:
            return Failure("refused", rcode)
        try:
            response = message.parse_response(data)
        except Malformed:
            return None
        if (response.name, response.type, response.klass) != attempt.key[:3]:
            return None
        is_other = (
            response.flags & OPCODE_MASK
            or (self._ignored and has_address_in(self._ignored, response))
            or (attempt.options and not has_same_subnet(attempt.options, data, response.body_end))
        )
        return None if is_other else response

    def _mismatch(self, link: PooledSocket) -> None:
        self._metrics.mismatched[0] += 1
        link.mismatches += 1
        if self._sockets.renews or link.mismatches >= MAX_MISMATCHES:
            self._retire(link)
        if link.mismatches >= MAX_MISMATCHES:
            for attempt in list(link.attempts.values()):
                self._over_tcp(attempt)

    def _judge(self, attempt: Attempt, found: Result, over_tcp: bool = False) -> None:
        """Decide what a response means; it has matched the query."""
        if found.rcode in _NO_EDNS and attempt.edns and not attempt.options:
            self._repeat_without_edns(attempt)
        elif isinstance(found, Failure):
            self._fail(attempt, found)
        elif found.rcode not in _ACCEPTED:
            self._fail(attempt, Failure("refused", found.rcode))
        elif not found.flags & TC:
            try:
                with contextlib.suppress(CnameLoop):  # forwarded as received, but not cached
                    follow(found)
            except Malformed:
                self._fail(attempt, Failure("malformed"))
            else:
                self._accept(attempt, found)
        elif over_tcp:
            self._fail(attempt, Failure("truncated"))
        else:
            self._over_tcp(attempt)

    def _accept(self, attempt: Attempt, response: Response | Entry) -> None:
        self._timeouts.stop(attempt)
        self._sockets.release(attempt)
        upstream, now = attempt.member.upstream, self._loop.now
        upstream.duration.observe(now - attempt.sent)
        if attempt.edns:
            upstream.knows_edns, upstream.edns_lost = True, 0
        elif attempt.repeated:
            upstream.note_edns_lost(now)
        self.results.on_response(attempt, response)

    def _repeat_without_edns(self, attempt: Attempt) -> None:
        self.forget(attempt)
        attempt.edns, attempt.repeated = False, True
        try:
            self.query(attempt)
        except OSError:
            self._fail(attempt, Failure("network"))

    def _fail(self, attempt: Attempt, failure: Failure) -> None:
        self.forget(attempt)
        self.results.on_failure(attempt, failure)

    # ---- responses over TCP ----

    def _over_tcp(self, attempt: Attempt) -> None:
        """Repeat a query over TCP."""
        self._sockets.release(attempt)
        attempt.ident = attempt.ident or self._sockets.ident()
        post = self._loop.post

        def done(result: Result) -> None:
            post(lambda: self._on_tcp(attempt, cancel, result))

        before, after = self._around[attempt.key[3], attempt.edns]
        if attempt.options:
            after = with_options(after, attempt.options)
        cancel = self._tcp.query(
            attempt.member.upstream.server,
            attempt.client,
            attempt.ident + before + attempt.question + after,
            lambda data: self._match(data, attempt),
            done,
        )
        attempt.cancel = cancel

    def _on_tcp(self, attempt: Attempt, cancel: Callable[[], None], result: Result) -> None:
        if attempt.cancel is not cancel:  # dropped meanwhile
            return
        attempt.cancel = None
        if isinstance(result, Failure) and result.reason != "refused":
            self._fail(attempt, result)
            return
        self._judge(attempt, result, over_tcp=True)
