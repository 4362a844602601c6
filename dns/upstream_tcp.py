"""Queries to upstream servers over TCP, for responses that do not fit into UDP. Runs in the event loop's thread.

Memory for responses is bounded: at most MAX_TCP_ANSWERS, of up to 64 KB each, are read at the same time, and one of
them is parsed per turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from udpwatch.dns.budget import UNLIMITED, Budget
from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.settings import Server
from udpwatch.dns.transport import Transport

TCP_SECONDS = 3.0
MAX_TCP_ANSWERS = 128  # read at the same time: 8 MB
MAX_TCP_ANSWERS_PER_SERVER = 64
MAX_TCP_WAITING = 512  # queries that wait for one of these slots


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a server gave no usable response. ``reason`` is a metric label; ``rcode`` is for the client."""

    reason: str
    rcode: int = Rcode.SERVFAIL


#: Too many responses over TCP are being read. The limit is ours: the client gets REFUSED, as above other limits.
BUSY = Failure("busy", Rcode.REFUSED)

Result = Response | Failure
#: Parses a response: None if it does not match the query.
Match = Callable[[bytes], Result | None]


class TcpClient:
    """Queries servers over TCP; each query is a task."""

    def __init__(self, transport: Transport, budget: Budget = UNLIMITED) -> None:
        self._transport, self._budget = transport, budget
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0  # queries that wait for a slot
        self._slots = asyncio.Semaphore(MAX_TCP_ANSWERS)
        self._slots_of: dict[Server, asyncio.Semaphore] = {}
        self._parsing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start in the running event loop."""
        self._loop = asyncio.get_running_loop()

    def query(self, server: Server, message: bytes, match: Match, done: Callable[[Result], None]) -> Callable[[], None]:
        """Query a server; any thread may call this. Return how to cancel it.

        ``match`` and ``done`` are called in the event loop; after a cancellation, ``done`` may still be called.
        """
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            if not cancelled:
                task = asyncio.get_running_loop().create_task(self._run(server, message, match, done))
                tasks.append(task)
                self._tasks.add(task)
                task.add_done_callback(forget)

        def forget(task: asyncio.Task[None]) -> None:
            tasks.clear()  # break the cycle: no work for the garbage collector
            self._tasks.discard(task)

        def end() -> None:
            cancelled.append(True)
            for task in tasks:
                task.cancel()

        cancelled: list[bool] = []
        self._call(begin)
        return lambda: self._call(end)

    def forget_servers(self) -> None:
        """Drop per-server state because the servers have changed; any thread may call this."""
        self._call(self._slots_of.clear)  # queries in progress keep their reference to the old one

    async def stop(self) -> None:
        """Cancel all queries."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _call(self, call: Callable[[], None]) -> None:
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call)

    async def _run(self, server: Server, message: bytes, match: Match, done: Callable[[Result], None]) -> None:
        """Query, and report the result once. An exception must not leave this frame: a task and the frames of its
        exception are a cycle, which lives until the garbage collector runs."""
        result: Result
        try:
            result = await self._exchange(server, message, match)
        except TimeoutError:
            result = Failure("timeout")
        except OSError:
            result = Failure("network")
        except _BusyError:
            result = BUSY
        done(result)

    async def _exchange(self, server: Server, message: bytes, match: Match) -> Result:
        async with self._slot(server):
            async with asyncio.timeout(TCP_SECONDS):
                received = await self._transport.exchange_tcp(server, message)
            async with self._parsing:
                if delay := self._budget.delay():
                    await asyncio.sleep(delay)
                found = match(received)
                await asyncio.sleep(0)  # one turn of the event loop for each
        return found or Failure("malformed")

    @contextlib.asynccontextmanager
    async def _slot(self, server: Server) -> AsyncIterator[None]:
        """Hold a slot for a response. Raises _BusyError when too many queries wait for one.

        A server that blocks all its own slots leaves the others theirs.
        """
        if self._waiting >= MAX_TCP_WAITING:
            raise _BusyError
        own = self._slots_of.setdefault(server, asyncio.Semaphore(MAX_TCP_ANSWERS_PER_SERVER))
        async with contextlib.AsyncExitStack() as slots:
            self._waiting += 1
            try:
                async with asyncio.timeout(TCP_SECONDS):
                    await slots.enter_async_context(own)
                    await slots.enter_async_context(self._slots)
            except TimeoutError:
                raise _BusyError from None
            finally:
                self._waiting -= 1
            yield


class _BusyError(Exception):
    pass
