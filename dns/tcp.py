"""The TCP path (RFC 7766): pipelined questions, answers as they are ready, and no way to keep others out.

A connection that does nothing is closed when its place is wanted: the client with the most connections gives up the
one that is idle for longest. So a thousand of one client cost another client nothing.

Memory is bounded in sum: of responses that their clients do not take MAX_HELD_BYTES are kept for all connections, then
the client with most of them loses the connection with most; the kernel's buffers are small; of a query no more is kept
than a query can be long. A response that costs the event loop a millisecond or so has a turn of the loop for itself.
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
from collections.abc import Awaitable, Callable

from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.responder import Drop, Forward, Reply, Responder
from udpwatch.dns.udp import LAYOUTS
from udpwatch.dns.zone import pack_address

MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_CLIENT = 64  # an IPv6 client is its /64
IDLE_SECONDS = 10.0  # without a whole question, or without taking an answer
MAX_UNANSWERED = 16  # per connection; then it is not read
MAX_HELD_BYTES = 16 << 20  # of responses that wait for their clients to take them, over all connections
MAX_QUERY_BYTES = 4096  # what follows is read and dropped; the same over UDP
READ_AHEAD_BYTES = 4096  # per connection; asyncio takes twice as much
KERNEL_BUFFER_BYTES = 16 << 10  # per connection and direction; the kernel doubles it: 32 MB for all connections
LARGE_RESPONSE_BYTES = 4096  # from here on a response has a turn of the event loop for itself
BACKLOG = 256
ACCEPTED_IN_A_ROW = 64  # before others have their turn
EXHAUSTED_SECONDS = 0.1  # until the next try to accept, where descriptors have run out

#: level, IP_PKTINFO or IPV6_RECVPKTINFO, IP_PKTOPTIONS or IPV6_2292PKTOPTIONS
_PKTOPTIONS = {socket.AF_INET: (socket.IPPROTO_IP, 8, 9), socket.AF_INET6: (socket.IPPROTO_IPV6, 49, 6)}

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger(__name__)

#: takes a question that is not in memory and the client's address and port; what it gets in the end
Ask = Callable[[Forward, str, int], Awaitable[Reply]]


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, client: str, port: int, family: str) -> None:
        self.writer, self.client, self.port, self.family = writer, client, port, family
        self.active = asyncio.get_running_loop().time()
        self.unanswered: set[asyncio.Task[None]] = set()
        self.room = asyncio.Semaphore(MAX_UNANSWERED)
        self.writing = asyncio.Lock()
        self.held = 0  # octets of responses that wait for the client to take them
        writer.transport.set_write_buffer_limits(high=0)  # what the kernel does not take is waited for

    def touch(self) -> None:
        self.active = asyncio.get_running_loop().time()


class TcpServer:
    """Answers on all TCP sockets; lives in the event loop's thread."""

    def __init__(
        self,
        responder: Responder,
        metrics: Metrics,
        admits: Callable[[bytes], bool],
        serves: Callable[[int, bytes], bool],
        ask: Ask,
        tell: Callable[[Reply | Forward, str, int], None] | None,
    ) -> None:
        """``admits``, ``serves``, ``tell``: as `UdpThread` takes them."""
        self._responder, self._metrics, self._admits, self._serves = responder, metrics, admits, serves
        self._ask, self._tell = ask, tell
        self._by_client: defaultdict[bytes, set[_Connection]] = defaultdict(set)
        self._listeners: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, listener: socket.socket) -> None:
        """Serve a bound socket; it is ours from now on."""
        self._listeners.add(listener)
        self._listen(listener)

    def remove(self, listener: socket.socket) -> None:
        """Stop listening; open connections go on."""
        if listener in self._listeners:
            self._listeners.discard(listener)
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    async def stop(self, grace: float) -> None:
        """Stop listening, let answers that are under way go out for ``grace`` seconds, close everything."""
        for listener in list(self._listeners):
            self.remove(listener)
        waiting = {task for group in self._by_client.values() for each in group for task in each.unanswered}
        if waiting:
            await asyncio.wait(waiting, timeout=grace)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Not asyncio's way: without descriptors it logs hundreds of tracebacks a second, and frees nobody's place."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTED_IN_A_ROW):
            try:
                link, _ = listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._without_descriptors(error)
                    loop.remove_reader(listener)
                    loop.call_later(EXHAUSTED_SECONDS, self._listen, listener)
                return  # nobody is waiting, or who did went away
            link.setblocking(False)
            task = loop.create_task(self._serve(link))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _without_descriptors(self, error: OSError) -> None:
        LIMITED.write(log, logging.WARNING, "dns: cannot accept a connection: %s", error.strerror)
        if self._by_client:
            self._close_idlest(max(self._by_client.values(), key=len))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            LIMITED.write(log, logging.ERROR, "dns: a connection ended with %r", error, error=error)

    async def _serve(self, link: socket.socket) -> None:
        if not self._serves(*_arrival(link)):
            self._metrics.dropped["policy"][0] += 1
            link.close()
            return
        try:
            reader, writer = await asyncio.open_connection(sock=link, limit=READ_AHEAD_BYTES)
        except BaseException:
            link.close()
            raise
        peer = writer.get_extra_info("peername")
        try:
            if not peer:  # it has gone already
                return
            packed = pack_address(peer[0].partition("%")[0])
            if not self._admits(packed):
                self._metrics.dropped["policy"][0] += 1
                return
            client = packed if len(packed) == 4 else packed[:8]
            connection = _Connection(writer, peer[0], peer[1], "2" if ":" in peer[0] else "1")
            self._make_room(client)
            self._by_client[client].add(connection)
            self._metrics.tcp_connections += 1
            try:
                await self._converse(reader, connection)
            finally:
                for task in connection.unanswered:
                    task.cancel()
                self._hold(connection, -connection.held)
                self._metrics.tcp_connections -= 1
                self._by_client[client].discard(connection)
                if not self._by_client[client]:
                    del self._by_client[client]
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it went away, or was silent for too long
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # nobody takes what is left
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _make_room(self, client: bytes) -> None:
        mine = self._by_client.get(client, set())
        if len(mine) >= MAX_CONNECTIONS_PER_CLIENT:
            self._close_idlest(mine)
        elif self._metrics.tcp_connections >= MAX_CONNECTIONS:
            self._close_idlest(max(self._by_client.values(), key=len))

    def _close_idlest(self, connections: set[_Connection]) -> None:
        idlest = min(connections, key=lambda each: (bool(each.unanswered), each.active))
        connections.discard(idlest)  # its place is free at once
        self._close(idlest, "room")

    def _close(self, connection: _Connection, reason: str) -> None:
        self._metrics.tcp_closed[reason][0] += 1
        self._hold(connection, -connection.held)
        connection.writer.transport.abort()

    def _hold(self, connection: _Connection, change: int) -> None:
        connection.held += change
        self._metrics.tcp_held_bytes += change

    def _make_room_for_response(self) -> None:
        """The client that takes least of what it asks for gives way, not the one that comes when memory is full."""
        while self._metrics.tcp_held_bytes > MAX_HELD_BYTES:
            greediest = max(self._by_client.values(), key=lambda group: sum(each.held for each in group))
            victim = max(greediest, key=lambda each: each.held)
            assert victim.held, "every octet that is held belongs to an open connection"
            self._close(victim, "held")

    async def _converse(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                try:
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    data = await reader.readexactly(min(size, MAX_QUERY_BYTES))
                    for left in range(size - len(data), 0, -READ_AHEAD_BYTES):
                        await reader.readexactly(min(left, READ_AHEAD_BYTES))
                except asyncio.IncompleteReadError:  # the client has asked all that it will
                    break
            if not size:
                break
            connection.touch()
            found = self._responder.respond(data, asyncio.get_running_loop().time(), tcp=True)
            if isinstance(found, Drop):
                self._metrics.malformed[found.reason][0] += 1
                break  # nothing that follows can be trusted
            if self._tell:
                self._tell(found, connection.client, connection.port)
            if isinstance(found, Reply):
                writing = self._write(connection, found)
                del found, data  # while it waits, only one copy of the response is kept
                await writing
                continue
            async with asyncio.timeout(IDLE_SECONDS):
                await connection.room.acquire()
            task = asyncio.get_running_loop().create_task(self._finish(connection, found))
            connection.unanswered.add(task)
            task.add_done_callback(connection.unanswered.discard)
            task.add_done_callback(self._done)
        if connection.unanswered:  # a half-closed connection still gets its answers (RFC 7766, section 6.2.1)
            await asyncio.wait(connection.unanswered)

    async def _finish(self, connection: _Connection, forward: Forward) -> None:
        try:
            writing = self._write(connection, await self._ask(forward, connection.client, connection.port))
            with contextlib.suppress(OSError, TimeoutError):
                await writing
        finally:
            connection.room.release()

    async def _write(self, connection: _Connection, reply: Reply) -> None:
        """Send a response. Raises OSError where the connection has ended, TimeoutError where its client is slow."""
        if connection.writer.transport.is_closing():
            raise ConnectionAbortedError  # asyncio would log every write from the fifth on
        if reply.query is None:
            self._metrics.malformed[reply.source][0] += 1
        else:
            metrics, query = self._metrics, reply.query
            metrics.cell("tcp", connection.family, query.type, reply.rcode, reply.source)[0] += 1
        size = len(reply.data)
        self._hold(connection, size)
        self._make_room_for_response()
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
            if connection.held:  # else all of it was let go when the connection was closed
                self._hold(connection, -size)
        connection.touch()
        if size >= LARGE_RESPONSE_BYTES:
            await asyncio.sleep(0)


def _arrival(link: socket.socket) -> tuple[int, bytes]:
    """By which interface (its index; 0: the kernel does not say) a connection came, and for which address."""
    level, pktinfo, pktoptions = _PKTOPTIONS[link.family]
    index = LAYOUTS[link.family].index
    try:
        link.setsockopt(level, pktinfo, 1)
        # One control message, as recvmsg(2) would give it; so dnsmasq asks, too.
        told = link.getsockopt(level, pktoptions, index.stop + 16)
    except OSError:
        told = b""
    address = pack_address(link.getsockname()[0].partition("%")[0])
    return int.from_bytes(told[index], sys.byteorder), address


def open_socket(address: tuple[str, int] | tuple[str, int, int, int], family: socket.AddressFamily) -> socket.socket:
    """A bound socket to listen on; raises OSError."""
    link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # accepted ones inherit them
            link.setsockopt(socket.SOL_SOCKET, option, KERNEL_BUFFER_BYTES)
        link.bind(address)
        link.listen(BACKLOG)
    except BaseException:
        link.close()
        raise
    return link
