"""The TCP path (RFC 7766): pipelined questions, answers as they are ready, and no way to keep others out.

A connection that does nothing is closed when its place is wanted: the client with the most connections gives up the
one that is idle for longest. So a thousand of one client cost another client nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable

from udpwatch.dns.metrics import Metrics
from udpwatch.dns.responder import Drop, Forward, Reply, Responder
from udpwatch.dns.zone import pack_address

MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_CLIENT = 64
IDLE_SECONDS = 10.0  # without a whole question, or without taking an answer
MAX_QUESTIONS = 1_000  # per connection
MAX_UNANSWERED = 16  # per connection; then it is not read
BACKLOG = 256

log = logging.getLogger(__name__)

#: takes a question that is not in memory and the client's address and port; what it gets in the end
Ask = Callable[[Forward, str, int], Awaitable[Reply]]


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, client: str, port: int, family: str) -> None:
        self.writer, self.client, self.port, self.family = writer, client, port, family
        self.active = asyncio.get_running_loop().time()
        self.unanswered: set[asyncio.Task[None]] = set()
        self.room = asyncio.Semaphore(MAX_UNANSWERED)

    def touch(self) -> None:
        self.active = asyncio.get_running_loop().time()


class TcpServer:
    """Answers on all TCP sockets; lives in the event loop's thread."""

    def __init__(
        self,
        responder: Responder,
        metrics: Metrics,
        admits: Callable[[bytes], bool],
        ask: Ask,
        tell: Callable[[Reply | Forward, str, int], None] | None,
    ) -> None:
        self._responder, self._metrics, self._admits = responder, metrics, admits
        self._ask, self._tell = ask, tell
        self._by_client: defaultdict[str, set[_Connection]] = defaultdict(set)
        self._servers: dict[socket.socket, asyncio.Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, listener: socket.socket) -> None:
        """Serve a bound socket; it is ours from now on."""
        self._servers[listener] = await asyncio.start_server(self._accepted, sock=listener, backlog=BACKLOG)

    def remove(self, listener: socket.socket) -> None:
        """Stop listening; open connections go on."""
        if server := self._servers.pop(listener, None):
            server.close()

    async def stop(self, grace: float) -> None:
        """Stop listening, let answers that are under way go out for ``grace`` seconds, close everything."""
        for listener in list(self._servers):
            self.remove(listener)
        waiting = {task for group in self._by_client.values() for each in group for task in each.unanswered}
        if waiting:
            await asyncio.wait(waiting, timeout=grace)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            if not peer or not self._admits(pack_address(peer[0].partition("%")[0])):
                self._metrics.dropped["policy"][0] += 1
                return
            connection = _Connection(writer, peer[0], peer[1], "2" if ":" in peer[0] else "1")
            self._make_room(connection.client)
            self._by_client[connection.client].add(connection)
            self._metrics.tcp_connections += 1
            try:
                await self._converse(reader, connection)
            finally:
                for task in connection.unanswered:
                    task.cancel()
                self._metrics.tcp_connections -= 1
                self._by_client[connection.client].discard(connection)
                if not self._by_client[connection.client]:
                    del self._by_client[connection.client]
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it went away, or was silent for too long
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # nobody takes what is left
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _make_room(self, client: str) -> None:
        mine = self._by_client.get(client, set())
        if len(mine) >= MAX_CONNECTIONS_PER_CLIENT:
            self._close_idlest(mine)
        elif self._metrics.tcp_connections >= MAX_CONNECTIONS:
            self._close_idlest(max(self._by_client.values(), key=len))

    def _close_idlest(self, connections: set[_Connection]) -> None:
        idlest = min(connections, key=lambda each: (bool(each.unanswered), each.active))
        self._metrics.tcp_closed[0] += 1
        connections.discard(idlest)  # its place is free at once
        idlest.writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        for _ in range(MAX_QUESTIONS):
            async with asyncio.timeout(IDLE_SECONDS):
                try:
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    data = await reader.readexactly(size)
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
                await self._write(connection, found)
                continue
            async with asyncio.timeout(IDLE_SECONDS):
                await connection.room.acquire()
            task = asyncio.get_running_loop().create_task(self._finish(connection, found))
            connection.unanswered.add(task)
            task.add_done_callback(connection.unanswered.discard)
        if connection.unanswered:  # a half-closed connection still gets its answers (RFC 7766, section 6.2.1)
            await asyncio.wait(connection.unanswered)

    async def _finish(self, connection: _Connection, forward: Forward) -> None:
        try:
            reply = await self._ask(forward, connection.client, connection.port)
            with contextlib.suppress(OSError, TimeoutError):
                await self._write(connection, reply)
        finally:
            connection.room.release()

    async def _write(self, connection: _Connection, reply: Reply) -> None:
        if reply.query is None:
            self._metrics.malformed[reply.source][0] += 1
        else:
            metrics, query = self._metrics, reply.query
            metrics.cell("tcp", connection.family, query.type, reply.rcode, reply.source)[0] += 1
        connection.writer.write(struct.pack("!H", len(reply.data)) + reply.data)
        async with asyncio.timeout(IDLE_SECONDS):
            await connection.writer.drain()
        connection.touch()


def open_socket(address: tuple[str, int] | tuple[str, int, int, int], family: socket.AddressFamily) -> socket.socket:
    """A bound socket to listen on; raises OSError."""
    link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        link.bind(address)
        link.listen(BACKLOG)
    except BaseException:
        link.close()
        raise
    return link
