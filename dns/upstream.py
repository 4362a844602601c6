"""Query one upstream server, and accept a response from no other host.

Rules
1. Each attempt has its own socket, connected to its server: the kernel then delivers nothing from other addresses and
   reports at once if no server listens. The kernel picks the source port, and the id is random; a response is accepted
   only when id, question and format match (RFC 5452, section 9.1).
2. Too many mismatches suggest an attempt to guess: the query continues over TCP, where guessing does not work.
3. Memory for responses is bounded: at most MAX_TCP_ANSWERS responses over TCP, of up to 64 KB each, are read at the
   same time, and one of them is parsed per turn of the event loop; of those over UDP, UDP_ANSWERS_PER_TURN. The rest
   waits in the kernel's buffers, which are small.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Collection

from udpwatch.dns import message
from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.cache_entry import Key
from udpwatch.dns.cname import CnameLoop, follow
from udpwatch.dns.message import AD, CD, DO, RD, Malformed, Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import Network
from udpwatch.dns.policy import has_address_in
from udpwatch.dns.settings import Server
from udpwatch.dns.transport import SocketTransport, Transport

ATTEMPT_SECONDS = 3.0
MAX_MISMATCHES = 20  # then the query continues over TCP
TCP_SECONDS = 3.0
MAX_UDP_ANSWER_BYTES = 4096  # queries ask for at most 1,232; a longer response is fetched over TCP
UDP_ANSWERS_PER_TURN = 32  # of the event loop: a few milliseconds
MAX_TCP_ANSWERS = 128  # read at the same time: 8 MB
MAX_TCP_ANSWERS_PER_SERVER = 64
MAX_TCP_WAITING = 512  # queries that wait for one of these slots

_ACCEPTED = {Rcode.NOERROR, Rcode.NXDOMAIN}
#: Response codes of a server that does not support EDNS (RFC 6891, section 7).
_NO_EDNS = {Rcode.FORMERR, Rcode.NOTIMP}


class AttemptFailed(Exception):
    """A server gave no usable response. ``reason`` is a metric label; ``rcode`` is for the client."""

    def __init__(self, reason: str, rcode: int = Rcode.SERVFAIL) -> None:
        super().__init__(reason)
        self.reason, self.rcode = reason, rcode


class Busy(AttemptFailed):
    """Too many responses over TCP are being read. The limit is ours: the server still counts as healthy, and the
    client gets REFUSED, as it does above other limits."""

    def __init__(self) -> None:
        super().__init__("busy", Rcode.REFUSED)


class UpstreamClient:
    """Queries single servers. Runs in the event loop's thread."""

    def __init__(
        self,
        metrics: Metrics,
        transport: Transport | None = None,
        budget: Budget = UNLIMITED,
        proxy_dnssec: bool = False,
        ignored: Collection[Network] = (),
    ) -> None:
        """``transport``: None for real sockets. ``proxy_dnssec``: ask for AD. A response with an address in ``ignored``
        counts as a mismatch."""
        self._metrics, self._budget, self._ignored = metrics, budget, ignored
        self._flags = RD | AD if proxy_dnssec else RD  # RFC 6840, section 5.7
        self._transport = transport or SocketTransport()
        self._udp_answers = 0  # received in this turn of the event loop
        self._tcp_waiting = 0  # queries that wait for a slot
        self._tcp_slots = asyncio.Semaphore(MAX_TCP_ANSWERS)
        self._tcp_slots_of: dict[Server, asyncio.Semaphore] = {}
        self._parsing = asyncio.Lock()

    def forget_servers(self) -> None:
        """Drop per-server state because the servers have changed."""
        self._tcp_slots_of = {}  # queries in progress keep their reference to the old one

    async def query(self, server: Server, key: Key) -> Response:
        """Return the server's response. Raises AttemptFailed.

        It must not leave reference cycles behind, such as a task and the frames of its exception: the garbage collector
        walks all objects while it holds the GIL, and a flood of failing queries would start it again and again.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._metrics.upstream_asked[str(server)][0] += 1
        try:
            try:
                response = await self._exchange(server, key, message.opt(0, bool(key[3] & DO)))
            except AttemptFailed as failed:
                if failed.rcode not in _NO_EDNS:
                    raise
                response = await self._exchange(server, key, b"")
            with contextlib.suppress(CnameLoop):  # forwarded as received, but not cached
                follow(response)
        except OSError as error:
            reason = "timeout" if isinstance(error, TimeoutError) else "network"
        except Malformed:
            reason = "malformed"
        else:
            self._metrics.upstream_duration[str(server)].observe(loop.time() - begun)
            return response
        raise AttemptFailed(reason)  # not above: the timeout would become its context, which refers to this task

    async def _exchange(self, server: Server, key: Key, edns: bytes) -> Response:
        """Return a response that can be forwarded. Raises AttemptFailed and OSError, including TimeoutError."""
        name, kind, klass, wants = key
        ident = int.from_bytes(os.urandom(2), "big")
        question = name + struct.pack("!HH", kind, klass)
        data = message.build_query(ident, question, self._flags | (wants & CD), edns)
        response = await self._over_udp(server, ident, key, data)
        if response is None or response.truncated:
            response = await self._over_tcp(server, ident, key, data)
        if response.rcode not in _ACCEPTED:
            raise AttemptFailed("refused", response.rcode)
        if response.truncated:
            raise AttemptFailed("truncated")
        return response

    def _match(self, data: bytes, ident: int, key: Key) -> Response | None:
        """Return the response if it matches the query, else None. Raises AttemptFailed when the server reports that it
        could not read the query."""
        if data[:2] == ident.to_bytes(2, "big"):
            if (rcode := message.error_without_question(data, ident)) is not None:
                raise AttemptFailed("refused", rcode)
            try:
                response = message.parse_response(data)
            except Malformed:
                pass
            else:
                matches = (response.name, response.type, response.klass) == key[:3] and not response.opcode
                if matches and not (self._ignored and has_address_in(self._ignored, response)):
                    return response
        self._metrics.mismatched[0] += 1
        return None

    async def _over_udp(self, server: Server, ident: int, key: Key, data: bytes) -> Response | None:
        """Return the response, or None after too many mismatches. Raises OSError, including TimeoutError."""
        future: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        mismatches = 0

        def receive() -> None:
            nonlocal mismatches
            try:
                while not future.done() and self._may_read_udp():  # else the socket is still readable next turn
                    received = connection.receive(MAX_UDP_ANSWER_BYTES + 1)
                    too_long = len(received) > MAX_UDP_ANSWER_BYTES
                    response = None if too_long else self._match(received, ident, key)
                    if response:
                        future.set_result(response)
                        return
                    mismatches += 1
                    if mismatches >= MAX_MISMATCHES or too_long:
                        future.set_result(None)
            except BlockingIOError:
                return
            except (OSError, AttemptFailed) as error:  # OSError: ICMP reports that no server listens
                if not future.done():
                    future.set_exception(error)

        connection = self._transport.open_udp(server, receive)
        try:
            connection.send(data)
            async with asyncio.timeout(ATTEMPT_SECONDS):
                return await future
        finally:
            connection.close()

    def _may_read_udp(self) -> bool:
        """Return whether this turn of the event loop has time for another response: a flood must not stall it."""
        if not self._udp_answers:
            asyncio.get_running_loop().call_soon(self._next_turn)  # runs before sockets are polled again
        self._udp_answers += 1
        return self._udp_answers <= UDP_ANSWERS_PER_TURN

    def _next_turn(self) -> None:
        self._udp_answers = 0

    async def _over_tcp(self, server: Server, ident: int, key: Key, data: bytes) -> Response:
        async with self._tcp_slot(server):
            async with asyncio.timeout(TCP_SECONDS):
                received = await self._transport.exchange_tcp(server, data)
            async with self._parsing:
                if delay := self._budget.delay():
                    await asyncio.sleep(delay)
                response = self._match(received, ident, key)
                await asyncio.sleep(0)  # one turn of the event loop for each
        if not response:
            raise AttemptFailed("malformed")
        return response

    @contextlib.asynccontextmanager
    async def _tcp_slot(self, server: Server) -> AsyncIterator[None]:
        """Hold a slot for a response over TCP. Raises Busy when too many queries wait for one.

        A server that blocks all its own slots leaves the others theirs.
        """
        if self._tcp_waiting >= MAX_TCP_WAITING:
            raise Busy
        own = self._tcp_slots_of.setdefault(server, asyncio.Semaphore(MAX_TCP_ANSWERS_PER_SERVER))
        async with contextlib.AsyncExitStack() as slots:
            self._tcp_waiting += 1
            try:
                async with asyncio.timeout(TCP_SECONDS):
                    await slots.enter_async_context(own)
                    await slots.enter_async_context(self._tcp_slots)
            except TimeoutError:
                raise Busy from None
            except asyncio.CancelledError:
                self._metrics.upstream_failed[str(server), "busy"][0] += 1
                raise
            finally:
                self._tcp_waiting -= 1
            yield
