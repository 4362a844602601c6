"""One TCP connection to an upstream server, several queries on it at a time (RFC 7766). In the event loop's thread.

Memory is bounded: a connection holds one response, of at most 64 KB, and READ_BYTES beside it. Nothing is read while
its owner has not taken a response.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.settings import Server
from udpwatch.dns.shares import Client, Counts, Turns, network_of

READ_BYTES = 4096  # one system call reads several usual responses

_length = struct.Struct("!H")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a server gave no usable response. ``reason`` is a metric label; ``rcode`` is for the client."""

    reason: str
    rcode: int = Rcode.SERVFAIL


Result = Response | Failure
#: Parses a response: None if it does not match the query.
Match = Callable[[bytes], Result | None]


class ServerState:
    """A server's connections, and the queries that wait for a slot."""

    __slots__ = ("active", "connections", "idle", "server", "single_until", "slots", "strikes", "waiting")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.active = 0  # queries with a slot
        self.slots: Counts[bytes] = Counts()  # of each client
        self.waiting: Turns[TcpQuery] = Turns()
        self.connections: set[Connection] = set()
        self.idle: dict[Connection, None] = {}  # the one that was used last is the last
        self.strikes = 0  # connections in a row that were closed after their first response, with queries on them
        self.single_until = 0.0  # until then, one query at a time is sent on a connection


class TcpQuery:
    """A query over TCP."""

    __slots__ = (
        *("client", "connection", "done", "has_ended", "ident", "is_retried", "match", "message", "network", "state"),
    )

    def __init__(
        self, state: ServerState, client: Client, message: bytes, match: Match, done: Callable[[Result], None]
    ) -> None:
        self.state, self.client, self.message, self.match, self.done = state, client, message, match, done
        self.network = network_of(client)
        self.ident = message[:2]  # on its connection
        self.connection: Connection | None = None  # None: it waits for a slot
        self.is_retried = self.has_ended = False

    def end(self, result: Result | None) -> None:
        """Report the result; None: nobody waits for it."""
        done, self.has_ended = self.done, True
        del self.done, self.match  # break the cycle: no work for the garbage collector
        if result is not None:
            done(result)


class Owner(Protocol):
    """Takes what happens on a connection."""

    def on_data(self, connection: Connection) -> None:
        """Octets have arrived: `Connection.take` may return a response."""

    def on_lost(self, connection: Connection) -> None:
        """The server has closed the connection, or it has failed."""


class Connection(asyncio.BufferedProtocol):
    """Frames queries and responses."""

    def __init__(self, owner: Owner, state: ServerState, network: bytes) -> None:
        self._owner, self.state = owner, state
        self.network = network  # of the client that it was opened, or taken while idle, for
        self.pending: dict[bytes, TcpQuery] = {}  # by id
        self.dropped: set[bytes] = set()  # ids of queries that were cancelled; their responses are ignored
        self.queries = self.responses = 0  # in its lifetime
        self.is_retired = False  # no further query is sent on it
        self.opening: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []  # until it is established
        self._buffer, self._start, self._end = bytearray(READ_BYTES), 0, 0

    @property
    def is_open(self) -> bool:
        """Whether it is established."""
        return self._transport is not None

    @property
    def load(self) -> int:
        """The number of queries without a response, including cancelled ones."""
        return len(self.pending) + len(self.dropped)

    def send(self, query: TcpQuery) -> None:
        """Send a query with an id that no other one on this connection has."""
        while query.ident in self.pending or query.ident in self.dropped:
            query.ident = (int.from_bytes(query.ident, "big") + 1 & 0xFFFF).to_bytes(2, "big")
        self.pending[query.ident] = query
        query.connection = self
        self.queries += 1
        data = _length.pack(len(query.message)) + query.ident + query.message[2:]
        if self._transport:
            self._transport.write(data)
        else:
            self._unsent.append(data)

    def drop(self, query: TcpQuery) -> None:
        """Forget a query. Its response will be ignored."""
        del self.pending[query.ident]
        self.dropped.add(query.ident)

    def close(self) -> None:
        """Close the connection; `on_lost` is not called."""
        self.is_retired = True
        self._buffer, self._start, self._end = bytearray(1), 0, 0
        if self._transport:
            self._transport.abort()
        elif self.opening:
            self.opening.cancel()

    def pause(self) -> None:
        """Read nothing until `resume`."""
        if self._transport:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue to read."""
        if self._transport and not self._transport.is_closing():
            self._transport.resume_reading()

    def take(self) -> bytes | None:
        """Return the next response, or None if no complete one has arrived."""
        start, have = self._start, self._end - self._start
        size = 2 if have < 2 else 2 + int.from_bytes(self._buffer[start : start + 2], "big")
        if 2 <= size <= have and have >= 2:
            message = bytes(self._buffer[start + 2 : start + size])
            self._start += size
            if self._start == self._end:
                self._start = self._end = 0
                if len(self._buffer) > READ_BYTES:
                    self._buffer = bytearray(READ_BYTES)
            return message
        if start or size > len(self._buffer):  # make room for the rest
            room = bytearray(max(size, READ_BYTES))
            room[:have] = self._buffer[start : self._end]
            self._buffer, self._start, self._end = room, 0, have
        return None

    # ---- asyncio.BufferedProtocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the queries that have waited for the connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        for data in self._unsent:
            transport.write(data)
        self._unsent.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to write received octets."""
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Octets have been received."""
        self._end += nbytes
        self._owner.on_data(self)

    def eof_received(self) -> None:
        """Have the transport closed."""
        self.is_retired = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._transport = None
        self._owner.on_lost(self)
