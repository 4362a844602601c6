"""The TCP server (RFC 7766): pipelined queries, responses as soon as they are ready. No client can lock others out.

An idle connection is closed when its slot is needed: the client with the most connections loses the one that has been
idle longest. So a thousand connections of one client cost another client nothing.

Total memory is bounded: at most MAX_HELD_BYTES of responses are kept for slow clients, over all connections. Beyond
that, the client that holds the most loses the connection that holds the most. The kernel's buffers are small, and the
bytes of a query beyond MAX_QUERY_BYTES are dropped. A response that costs the event loop about a millisecond gets a
turn of its own. With a CPU quota (budget.py) queries may have to wait, because queries over UDP need the event loop,
too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from udpwatch.dns.admission import Admission
from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.forwarder import ClientQuery
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import pack_address
from udpwatch.dns.responder import Drop, Forward, LogQuery, Reply, Responder
from udpwatch.dns.udp_socket import LAYOUTS

MAX_CONNECTIONS = 512  # the default of --max-tcp-connections
MAX_CONNECTIONS_PER_CLIENT = 64  # an eighth of more; an IPv6 client is its /64
IDLE_SECONDS = 10.0  # without a complete query, or without taking a response
MAX_UNANSWERED = 16  # per connection; above that it is not read
MAX_HELD_BYTES = 16 << 20  # of responses that slow clients have not taken, over all connections
MAX_QUERY_BYTES = 4096  # the rest of a query is read and dropped; the same as over UDP
READ_AHEAD_BYTES = 4096  # per connection; asyncio takes twice as much
KERNEL_BUFFER_BYTES = 16 << 10  # per connection and direction; the kernel doubles it: 32 MB for all connections
LARGE_RESPONSE_BYTES = 4096  # from this size on a response gets a turn of the event loop of its own
BACKLOG = 256
ACCEPTED_IN_A_ROW = 64  # before other events get their turn
EXHAUSTED_SECONDS = 0.1  # until the next attempt to accept when no descriptor is free

#: level, IP_PKTINFO or IPV6_RECVPKTINFO, IP_PKTOPTIONS or IPV6_2292PKTOPTIONS
_PKTOPTIONS = {socket.AF_INET: (socket.IPPROTO_IP, 8, 9), socket.AF_INET6: (socket.IPPROTO_IPV6, 49, 6)}

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, address: str, port: int, asked: bytes) -> None:
        self.writer, self.address, self.port = writer, address, port
        self.family = "2" if ":" in address else "1"  # metric label
        self.packed = pack_address(address.partition("%")[0])
        self.asked = asked  # the address of this host, 4 or 16 octets
        self.active = asyncio.get_running_loop().time()
        self.unanswered: set[asyncio.Task[None]] = set()
        self.slots = asyncio.Semaphore(MAX_UNANSWERED)
        self.writing = asyncio.Lock()
        self.held = 0  # octets of responses that the client has not taken
        writer.transport.set_write_buffer_limits(high=0)  # drain() waits for all that the kernel does not take

    def touch(self) -> None:
        self.active = asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True, eq=False)
class TcpQuery:
    """A query that needs an upstream server. It is a `forwarder.ClientQuery`."""

    connection: _Connection
    forward: Forward
    received: float  # monotonic seconds
    response: asyncio.Future[Reply]

    @property
    def client(self) -> bytes:
        """The client's address, 4 or 16 octets."""
        return self.connection.packed

    @property
    def origin(self) -> TcpQuery:
        """Each query is one of its own."""
        return self

    @property
    def must_answer(self) -> bool:
        """The client does not repeat its query."""
        return True

    def peer(self) -> tuple[str, int]:
        """Return the client's address and port."""
        return self.connection.address, self.connection.port

    def deliver(self, reply: Reply) -> None:
        """Hand the response to the event loop; any thread may call this."""

        def set_response() -> None:
            if not self.response.done():
                self.response.set_result(reply)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.response.get_loop().call_soon_threadsafe(set_response)


class TcpServer:
    """Answers queries on all TCP sockets. Runs in the event loop's thread."""

    def __init__(
        self,
        responder: Responder,
        metrics: Metrics,
        admission: Admission,
        submit: Callable[[ClientQuery], None],
        cancel: Callable[[ClientQuery], None],
        log_query: LogQuery | None,
        budget: Budget = UNLIMITED,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """``submit`` and ``cancel`` hand queries to the forwarder, in its own thread."""
        self._responder, self._metrics, self._admission = responder, metrics, admission
        self._submit, self._cancel, self._log_query, self._budget = submit, cancel, log_query, budget
        self._max_connections = max_connections
        self._max_per_client = max(MAX_CONNECTIONS_PER_CLIENT, max_connections // 8)
        self._by_client: defaultdict[bytes, set[_Connection]] = defaultdict(set)
        self._listeners: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, listener: socket.socket) -> None:
        """Serve a bound socket; the server owns it from now on."""
        self._listeners.add(listener)
        self._listen(listener)

    def remove(self, listener: socket.socket) -> None:
        """Stop listening. Open connections continue."""
        if listener in self._listeners:
            self._listeners.discard(listener)
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    async def stop(self, grace: float) -> None:
        """Stop listening, wait up to ``grace`` seconds for responses in progress, then close everything."""
        for listener in list(self._listeners):
            self.remove(listener)
        waiting = {task for group in self._by_client.values() for each in group for task in each.unanswered}
        if waiting:
            await asyncio.wait(waiting, timeout=grace)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- connections ----

    def _listen(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections. asyncio's server is not used: when descriptors run out, it logs hundreds of tracebacks a
        second and frees no descriptor."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTED_IN_A_ROW):
            try:
                link, _ = listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._free_descriptor(error)
                    loop.remove_reader(listener)
                    loop.call_later(EXHAUSTED_SECONDS, self._listen, listener)
                return  # no connection waits, or it has been closed meanwhile
            link.setblocking(False)
            task = loop.create_task(self._serve_socket(link))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _free_descriptor(self, error: OSError) -> None:
        LIMITED.write(log, logging.WARNING, "dns: cannot accept a connection: %s", error.strerror)
        if self._by_client:
            self._close_idlest(max(self._by_client.values(), key=len))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            LIMITED.write(log, logging.ERROR, "dns: a connection ended with %r", error, error=error)

    async def _serve_socket(self, link: socket.socket) -> None:
        index, asked = _arrival(link)
        if not self._admission.admits_ingress(index, asked):
            self._metrics.dropped["policy"][0] += 1
            link.close()
            return
        try:
            reader, writer = await asyncio.open_connection(sock=link, limit=READ_AHEAD_BYTES)
        except BaseException:
            link.close()
            raise
        await self.serve(reader, writer, asked)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytes = b"") -> None:
        """Answer the queries of one connection until it ends, then close it. ``asked``: the address of this host."""
        peer = writer.get_extra_info("peername")
        try:
            if not peer:  # it has been closed already
                return
            connection = _Connection(writer, peer[0], peer[1], asked)
            if not self._admission.admits_client(connection.packed):
                self._metrics.dropped["policy"][0] += 1
                return
            with self._registered(connection):
                await self._converse(reader, connection)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it was closed, or idle for too long
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # the client does not take the rest
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @contextlib.contextmanager
    def _registered(self, connection: _Connection) -> Iterator[None]:
        """Count a connection while it is open; make room for it first."""
        client = connection.packed if len(connection.packed) == 4 else connection.packed[:8]
        self._make_room(client)
        self._by_client[client].add(connection)
        self._metrics.tcp_connections += 1
        try:
            yield
        finally:
            for task in connection.unanswered:
                task.cancel()
            self._hold(connection, -connection.held)
            self._metrics.tcp_connections -= 1
            self._by_client[client].discard(connection)
            if not self._by_client[client]:
                del self._by_client[client]

    def _make_room(self, client: bytes) -> None:
        mine = self._by_client.get(client, set())
        if len(mine) >= self._max_per_client:
            self._close_idlest(mine)
        elif self._metrics.tcp_connections >= self._max_connections:
            self._close_idlest(max(self._by_client.values(), key=len))

    def _close_idlest(self, connections: set[_Connection]) -> None:
        idlest = min(connections, key=lambda each: (bool(each.unanswered), each.active))
        connections.discard(idlest)  # its slot is free at once
        self._close(idlest, "room")

    def _close(self, connection: _Connection, reason: str) -> None:
        self._metrics.tcp_closed[reason][0] += 1
        log.debug("dns: closing the connection of %s port %d: %s", connection.address, connection.port, reason)
        self._hold(connection, -connection.held)
        connection.writer.transport.abort()

    # ---- queries and responses ----

    async def _converse(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while (data := await _read_query(reader)) is not None:
            connection.touch()
            if delay := self._budget.delay():
                await asyncio.sleep(delay)
            now = asyncio.get_running_loop().time()
            found = self._responder.respond(data, now, tcp=True, asked=connection.asked)
            if isinstance(found, Drop):
                self._metrics.malformed[found.reason][0] += 1
                break  # what follows cannot be trusted
            if self._log_query:
                self._log_query(found, connection.address, connection.port)
            if isinstance(found, Reply):
                writing = self._write(connection, found)
                del found, data  # while it waits, only one copy of the response is kept
                await writing
                continue
            async with asyncio.timeout(IDLE_SECONDS):
                await connection.slots.acquire()
            task = asyncio.get_running_loop().create_task(self._forward(connection, found))
            connection.unanswered.add(task)
            task.add_done_callback(connection.unanswered.discard)
            task.add_done_callback(self._done)
        if connection.unanswered:  # a half-closed connection still gets its responses (RFC 7766, section 6.2.1)
            await asyncio.wait(connection.unanswered)

    async def _forward(self, connection: _Connection, forward: Forward) -> None:
        try:
            writing = self._write(connection, await self._resolve(connection, forward))
            with contextlib.suppress(OSError, TimeoutError):
                await writing
        finally:
            connection.slots.release()

    async def _resolve(self, connection: _Connection, forward: Forward) -> Reply:
        loop = asyncio.get_running_loop()
        query = TcpQuery(connection, forward, loop.time(), loop.create_future())
        self._submit(query)
        try:
            return await query.response
        except asyncio.CancelledError:
            self._cancel(query)
            raise

    async def _write(self, connection: _Connection, reply: Reply) -> None:
        """Send a response. Raises OSError if the connection is closed, TimeoutError if the client is slow."""
        if connection.writer.transport.is_closing():
            raise ConnectionAbortedError  # asyncio would log every write from the fifth on
        if reply.query is None:
            self._metrics.malformed[reply.source][0] += 1
        else:
            metrics, query = self._metrics, reply.query
            metrics.cell("tcp", connection.family, query.type, reply.rcode, reply.source)[0] += 1
        size = len(reply.data)
        self._hold(connection, size)
        self._limit_held_bytes()
        try:
            async with connection.writing:
                if connection.writer.transport.is_closing():
                    raise ConnectionAbortedError
                connection.writer.write(struct.pack("!H", size) + reply.data)
                del reply  # what the kernel did not take is in the transport's buffer
                try:
                    async with asyncio.timeout(IDLE_SECONDS):
                        await connection.writer.drain()
                except TimeoutError:
                    self._close(connection, "slow")
                    raise
        except OSError:
            connection.writer.transport.abort()
            raise
        finally:
            if connection.held:  # else all of it was released when the connection was closed
                self._hold(connection, -size)
        connection.touch()
        if size >= LARGE_RESPONSE_BYTES:
            await asyncio.sleep(0)

    def _hold(self, connection: _Connection, change: int) -> None:
        connection.held += change
        self._metrics.tcp_held_bytes += change

    def _limit_held_bytes(self) -> None:
        """Close connections of the client that holds the most, not of the one that comes when memory is full."""
        while self._metrics.tcp_held_bytes > MAX_HELD_BYTES:
            greediest = max(self._by_client.values(), key=lambda group: sum(each.held for each in group))
            victim = max(greediest, key=lambda each: each.held)
            assert victim.held, "held octets belong to open connections"
            self._close(victim, "held")


async def _read_query(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next query, cut at MAX_QUERY_BYTES; None when the client sends no more. Raises TimeoutError."""
    async with asyncio.timeout(IDLE_SECONDS):
        try:
            size = int.from_bytes(await reader.readexactly(2), "big")
            data = await reader.readexactly(min(size, MAX_QUERY_BYTES))
            for left in range(size - len(data), 0, -READ_AHEAD_BYTES):
                await reader.readexactly(min(left, READ_AHEAD_BYTES))
        except asyncio.IncompleteReadError:
            return None
    return data if size else None


def _arrival(link: socket.socket) -> tuple[int, bytes]:
    """Return the interface index (0 if the kernel does not report it) and the local address of a connection."""
    level, pktinfo, pktoptions = _PKTOPTIONS[link.family]
    index = LAYOUTS[link.family].index
    try:
        link.setsockopt(level, pktinfo, 1)
        # One control message, as from recvmsg(2); dnsmasq does the same.
        control = link.getsockopt(level, pktoptions, index.stop + 16)
    except OSError:
        control = b""
    address = pack_address(link.getsockname()[0].partition("%")[0])
    return int.from_bytes(control[index], sys.byteorder), address


def open_socket(address: tuple[str, int] | tuple[str, int, int, int], family: socket.AddressFamily) -> socket.socket:
    """Bind a socket and listen. Raises OSError."""
    link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # accepted connections inherit them
            link.setsockopt(socket.SOL_SOCKET, option, KERNEL_BUFFER_BYTES)
        link.bind(address)
        link.listen(BACKLOG)
    except BaseException:
        link.close()
        raise
    return link
