"""Queries to upstream servers over TCP, for responses that do not fit into UDP. Runs in the event loop's thread.

Rules
1. Connections stay open for IDLE_SECONDS. A query uses an idle one, else a new one; with CONNECTIONS_PER_SERVER in use
   it is sent behind others (RFC 7766, section 6.2.1.1). Responses may come in any order.
2. A server may close a connection at any time. A query that was not the only one of its connection is then repeated
   once, on a connection of its own.
3. A client may ask for names that never get a response. So it gets a further slot, or connection, only while it has
   fewer than are free: several such clients leave others some. Queries that wait for a slot take turns by client.
4. Memory for responses is bounded: at most MAX_TCP_ANSWERS queries have a slot, and so many connections are open; each
   holds one response of up to 64 KB. A turn of the event loop parses TURN_BYTES, or one response that is longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.message import Rcode
from udpwatch.dns.settings import Server
from udpwatch.dns.shares import Client, Counts, Shares
from udpwatch.dns.tcp_connection import Connection, Failure, Match, Result, ServerState, TcpQuery
from udpwatch.dns.timers import DelayQueue
from udpwatch.dns.transport import Transport

TCP_SECONDS = 3.0
IDLE_SECONDS = 10.0
MAX_TCP_ANSWERS = 128  # queries with a slot, and connections: 8 MB
MAX_TCP_ANSWERS_PER_SERVER = 64
MAX_TCP_WAITING = 512  # queries that wait for one of these slots; then the client with the most gives way
CONNECTIONS_PER_SERVER = 16  # many servers respond in order, so one slow response delays those behind it
MAX_DROPPED = 8  # cancelled queries without a response; then a connection gets no further query
TURN_BYTES = 4096  # of responses
STRIKES = 3  # see ServerState
SINGLE_SECONDS = 600.0

#: Too many responses over TCP are being read. The limit is ours: the client gets REFUSED, as above other limits.
BUSY = Failure("busy", Rcode.REFUSED)

_Item = TypeVar("_Item", bound=Hashable)


class TcpClient:
    """Queries servers over TCP."""

    def __init__(self, transport: Transport, budget: Budget = UNLIMITED) -> None:
        self._transport, self._budget = transport, budget
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._states: dict[Server, ServerState] = {}
        self._active = 0  # queries with a slot
        self._slots: Counts[bytes] = Counts()  # of each client, as `network_of` names it
        self._waiting: Shares[TcpQuery] = Shares()  # for a slot, of all servers
        self._hungry: dict[ServerState, None] = {}  # servers with queries that wait, and perhaps a free slot
        self._connections: set[Connection] = set()
        self._ready: deque[tuple[Connection, bytes]] = deque()  # responses for the next turns
        self._turn_bytes = 0

    def start(self) -> None:
        """Start in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._timeouts = _Timers(self._loop, TCP_SECONDS, self._on_timeout)
        self._idle = _Timers(self._loop, IDLE_SECONDS, self._close)

    def query(
        self, server: Server, client: Client, message: bytes, match: Match, done: Callable[[Result], None]
    ) -> Callable[[], None]:
        """Query a server for a client; any thread may call this. Return how to cancel it.

        ``match`` and ``done`` are called in the event loop; after a cancellation, ``done`` may still be called.
        """
        queries: list[TcpQuery] = []  # empty: not begun yet, or cancelled before
        is_cancelled: list[bool] = []

        def begin() -> None:
            if not is_cancelled:
                query = TcpQuery(self._state(server), client, message, match, done)
                queries.append(query)
                self._submit(query)

        def end() -> None:
            is_cancelled.append(True)
            if queries:
                self._cancel(queries.pop())

        self._call(begin)
        return lambda: self._call(end)

    def forget_servers(self) -> None:
        """Drop per-server state because the servers have changed; any thread may call this."""
        self._call(self._forget_servers)

    def close(self) -> None:
        """Cancel all queries and close the connections."""
        while len(self._timeouts):
            self._cancel(self._timeouts.oldest())
        for connection in list(self._connections):
            self._close(connection)

    async def stop(self) -> None:
        """Cancel all queries and close the connections."""
        tasks = [connection.opening for connection in self._connections if connection.opening]
        if self._loop:
            self.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close their sockets in the next turn

    def _call(self, call: Callable[[], None]) -> None:
        """Run ``call`` in the event loop. Waking it up is a system call, so many calls share one."""
        self._posted.append(call)
        if self._loop and not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._run_posted)

    def _run_posted(self) -> None:
        self._is_woken = False
        for _ in range(len(self._posted)):
            self._posted.popleft()()

    # ---- slots ----

    def _state(self, server: Server) -> ServerState:
        if (state := self._states.get(server)) is None:
            state = self._states[server] = ServerState(server)
        return state

    def _forget_servers(self) -> None:
        """Queries in progress keep their state."""
        for state in self._states.values():
            for connection in list(state.connections):
                connection.is_retired = True
                self._settle(connection)
        self._states.clear()

    def _submit(self, query: TcpQuery) -> None:
        state = query.state
        if self._may_begin(state, query.network):
            self._begin(query)
        elif self._make_room(query.client):
            self._waiting.add(query.client, query)
            state.waiting.add(query.client, query)
            self._hungry[state] = None
            self._timeouts.start(query)
        else:
            query.end(BUSY)

    def _may_begin(self, state: ServerState, network: bytes) -> bool:
        """Return whether a client may have one more slot."""
        return (
            self._slots[network] < MAX_TCP_ANSWERS - self._active
            and state.slots[network] < MAX_TCP_ANSWERS_PER_SERVER - state.active
        )

    def _make_room(self, client: Client) -> bool:
        """Make room for another query that waits: of the client with the most, the oldest one gives way."""
        if len(self._waiting) < MAX_TCP_WAITING:
            return True
        query, is_greedier = self._waiting.to_give_way(client)
        if is_greedier:
            self._end(query, BUSY)
        return is_greedier

    def _begin(self, query: TcpQuery) -> None:
        """Give a query a slot, and send it."""
        self._count_slot(query, 1)
        self._timeouts.start(query)
        self._choose(query).send(query)

    def _end(self, query: TcpQuery, result: Result | None) -> None:
        """Free what a query uses. ``result``: None if nobody waits for it."""
        self._timeouts.stop(query)
        if query.connection:
            self._count_slot(query, -1)
            query.connection = None
        else:
            self._waiting.remove(query.client, query)
            query.state.waiting.remove(query.client, query)
        if query.state.waiting:
            self._hungry[query.state] = None
        query.end(result)
        self._fill()

    def _count_slot(self, query: TcpQuery, change: int) -> None:
        self._active += change
        query.state.active += change
        self._slots.add(query.network, change)
        query.state.slots.add(query.network, change)

    def _fill(self) -> None:
        """Give free slots to queries that wait, one server after the other: one that blocks all its own slots leaves
        the others theirs."""
        skipped = 0  # servers in a row
        while skipped < len(self._hungry) and self._active < MAX_TCP_ANSWERS:
            state = next(iter(self._hungry))
            del self._hungry[state]
            if not state.waiting:
                continue
            self._hungry[state] = None
            query = self._take_waiting(state)
            skipped = 0 if query else skipped + 1
            if query:
                self._waiting.remove(query.client, query)
                self._timeouts.stop(query)
                self._begin(query)

    def _take_waiting(self, state: ServerState) -> TcpQuery | None:
        """Remove and return the query that gets a server's next slot, if there is one.

        Each client that must wait has as many slots as are free, so there are not many.
        """
        if state.active >= MAX_TCP_ANSWERS_PER_SERVER:
            return None
        for network in state.waiting.networks():
            if self._may_begin(state, network):
                return state.waiting.take_from(network)
        return None

    def _cancel(self, query: TcpQuery) -> None:
        if query.has_ended:
            return
        connection = query.connection
        if connection:
            connection.drop(query)
            connection.is_retired |= len(connection.dropped) > MAX_DROPPED
        self._end(query, None)
        if connection:
            self._settle(connection)

    def _on_timeout(self, query: TcpQuery) -> None:
        connection = query.connection
        if connection:
            connection.drop(query)
            connection.is_retired = True
        self._end(query, Failure("timeout") if connection else BUSY)
        if connection:
            self._settle(connection)

    # ---- connections ----

    def _choose(self, query: TcpQuery) -> Connection:
        """Return the connection for a query."""
        state = query.state
        if query.is_retried:
            return self._open(state, query.network)
        if state.connections and self._now() >= state.single_until:
            busy = [each for each in state.connections if each.pending and not each.is_retired]
            own = [each for each in busy if each.network == query.network]
            free = CONNECTIONS_PER_SERVER - len(busy)
            if len(own) >= free and (own or not free):
                return min(own or busy, key=lambda each: each.load)
        while state.idle:
            connection, _ = state.idle.popitem()
            self._idle.stop(connection)
            if not connection.is_retired:
                connection.network = query.network
                return connection
        return self._open(state, query.network)

    def _open(self, state: ServerState, network: bytes) -> Connection:
        if len(self._connections) >= MAX_TCP_ANSWERS and len(self._idle):
            self._close(self._idle.oldest())
        connection = Connection(self, state, network)
        self._connections.add(connection)
        state.connections.add(connection)
        connection.opening = asyncio.get_running_loop().create_task(self._connect(connection))
        return connection

    async def _connect(self, connection: Connection) -> None:
        """Connect. An exception must not leave this frame: a task and the frames of its exception are a cycle, which
        lives until the garbage collector runs."""
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await self._transport.open_tcp(connection.state.server, connection)
            except OSError:
                self.on_lost(connection)
        connection.opening = None

    def _close(self, connection: Connection) -> None:
        self._remove(connection)
        connection.close()

    def _remove(self, connection: Connection) -> None:
        connection.is_retired = True
        self._idle.stop(connection)
        self._connections.discard(connection)
        connection.state.connections.discard(connection)
        connection.state.idle.pop(connection, None)

    def _settle(self, connection: Connection) -> None:
        """Close a connection without queries, or keep it for a while."""
        if connection.pending or connection not in self._connections:
            return
        state = connection.state
        if connection.is_retired or not connection.is_open or len(state.connections) > CONNECTIONS_PER_SERVER:
            self._close(connection)
        else:
            state.idle[connection] = None
            self._idle.stop(connection)
            self._idle.start(connection)

    def on_lost(self, connection: Connection) -> None:
        """Repeat the queries of a connection that the server has closed; see the rules."""
        if connection not in self._connections:
            return  # closed here
        state = connection.state
        if connection.responses > 1:
            state.strikes = 0
        elif connection.responses and connection.pending:
            state.strikes += 1
            if state.strikes >= STRIKES:
                state.single_until = self._now() + SINGLE_SECONDS
        self._break(connection, Failure("network"))

    def _break(self, connection: Connection, failure: Failure) -> None:
        """End a connection. Its queries are repeated, or end with this failure."""
        self._close(connection)
        queries = list(connection.pending.values())
        connection.pending.clear()
        for query in queries:
            if query.is_retried or connection.queries == 1:
                self._end(query, failure)
            else:
                query.is_retried = True
                self._choose(query).send(query)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- responses ----

    def on_data(self, connection: Connection) -> None:
        """Take the responses that have arrived, as many as this turn may parse."""
        while (message := connection.take()) is not None:
            delay = self._budget.delay()
            if delay or self._ready or self._turn_bytes >= TURN_BYTES:
                connection.pause()
                self._ready.append((connection, message))
                if len(self._ready) == 1:
                    asyncio.get_running_loop().call_later(delay, self._take_ready)
                return
            self._on_message(connection, message)

    def _take_ready(self) -> None:
        loop = asyncio.get_running_loop()
        while self._ready:
            if self._turn_bytes >= TURN_BYTES:
                loop.call_soon(self._take_ready)
                return
            connection, message = self._ready.popleft()
            self._on_message(connection, message)
            if (following := connection.take()) is not None:
                self._ready.append((connection, following))
            else:
                connection.resume()
            if self._ready and (delay := self._budget.delay()):
                loop.call_later(delay, self._take_ready)
                return

    def _on_message(self, connection: Connection, message: bytes) -> None:
        if not self._turn_bytes:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._turn_bytes += len(message) + 1
        ident = message[:2]
        query = connection.pending.pop(ident, None)
        if query is not None:
            connection.responses += 1
            mine = query.message[:2]
            found = query.match(message if ident == mine else mine + message[2:])
            connection.is_retired |= found is None
            self._end(query, found or Failure("malformed"))
            self._settle(connection)
        elif ident in connection.dropped:
            connection.dropped.discard(ident)
        elif connection in self._connections:
            self._break(connection, Failure("malformed"))

    def _next_turn(self) -> None:
        self._turn_bytes = 0


class _Timers(Generic[_Item]):
    """A `DelayQueue` in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, delay: float, action: Callable[[_Item], None]) -> None:
        self._loop, self._queue = loop, DelayQueue(delay, action)
        self._is_armed = False
        self.stop, self.oldest = self._queue.stop, self._queue.oldest

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, item: _Item) -> None:
        """Start the timer of an item that has none."""
        self._queue.start(item, self._loop.time())
        if not self._is_armed:
            self._arm()

    def _arm(self) -> None:
        self._is_armed = len(self._queue) > 0
        if self._is_armed:
            self._loop.call_at(self._queue.next(), self._run)

    def _run(self) -> None:
        self._queue.run(self._loop.time())
        self._arm()
