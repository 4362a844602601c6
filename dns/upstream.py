"""Asking other servers, so that nobody else can answer in their place.

Each attempt has a socket of its own, connected to its server (the kernel then delivers nothing else, and says at once
when nobody listens), with a source port that the kernel draws and a random id; an answer counts when id, question and
shape are right (RFC 5452, section 9.1). Of several servers the next one is asked when the one before has failed, or was
silent for STAGGER_SECONDS: it may still answer.

What servers send is bounded in sum: MAX_TCP_ANSWERS long answers are read at the same time, of 64 KB at the most, and
one of them is parsed per turn of the event loop; of UDP's, UDP_ANSWERS_PER_TURN. What waits is in the kernel's buffers,
which are small.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from udpwatch.dns import wire
from udpwatch.dns.cache import Circle, follow
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.settings import Server
from udpwatch.dns.wire import CD, DO, RD, Answer, Malformed, Rcode

ATTEMPT_SECONDS = 3.0
STAGGER_SECONDS = 0.8
TOTAL_SECONDS = 4.5  # below the 5 s after which a stub resolver asks again
ROUNDS = 2  # how often a server is asked at most
MAX_ATTEMPTS = 8
MAX_MISMATCHES = 20  # then somebody is guessing: TCP cannot be guessed
DOWN_AFTER = 2  # time-outs in a row
DOWN_SECONDS = 10.0  # for which such a server is asked last
TCP_SECONDS = 3.0
MAX_UDP_ANSWER_BYTES = 4096  # we ask for 1,232 at the most; a longer one is fetched over TCP
UDP_ANSWERS_PER_TURN = 32  # of the event loop: some milliseconds
MAX_TCP_ANSWERS = 128  # read at the same time: 8 MB
MAX_TCP_ANSWERS_PER_SERVER = 64
MAX_TCP_WAITING = 512  # for one of these places
TCP_BUFFER_BYTES = 32 << 10  # of the kernel's, per connection, which doubles it
MAX_NAMESERVERS = 15
MAX_RESOLV_BYTES = 1 << 20

Key = tuple[bytes, int, int, int]

_ANSWERS = {Rcode.NOERROR, Rcode.NXDOMAIN}
#: what a server says that does not know EDNS (RFC 6891, section 7)
_NO_EDNS = {Rcode.FORMERR, Rcode.NOTIMP}
_SO_BINDTODEVICE = 25


class NoAnswer(Exception):
    """No server gave an answer that can be passed on; ``rcode`` is what the client is told."""

    def __init__(self, rcode: int = Rcode.SERVFAIL) -> None:
        super().__init__(rcode)
        self.rcode = rcode


class _Failed(Exception):
    def __init__(self, reason: str, rcode: int = Rcode.SERVFAIL) -> None:
        super().__init__(reason)
        self.reason, self.rcode = reason, rcode


class _Busy(_Failed):
    """Too many long answers are under way. It is our limit: the server is as healthy as before, and the client is told
    REFUSED, as beyond our other limits."""

    def __init__(self) -> None:
        super().__init__("busy", Rcode.REFUSED)


@dataclass(slots=True)
class _Health:
    timeouts: int = 0
    down_until: float = 0.0


class Upstream:
    """Asks servers. All of it runs in the event loop's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._health: dict[Server, _Health] = {}
        self._last_good: Server | None = None
        self._udp_answers = 0  # read in this turn of the event loop
        self._tcp_waiting = 0  # for a place
        self._tcp_places = asyncio.Semaphore(MAX_TCP_ANSWERS)
        self._tcp_places_of: dict[Server, asyncio.Semaphore] = {}
        self._parsing = asyncio.Lock()

    def forget(self) -> None:
        """The servers have changed."""
        self._health.clear()
        self._last_good = None
        self._tcp_places_of = {}  # who is in the middle of it has the old one in hand

    def order(self, servers: tuple[Server, ...]) -> list[Server]:
        """The server that answered last first, those that are silent last."""
        now = time.monotonic()

        def rank(server: Server) -> tuple[bool, bool]:
            health = self._health.get(server)
            return bool(health and health.down_until > now), server != self._last_good

        return sorted(servers, key=rank)

    async def ask(self, key: Key, servers: tuple[Server, ...]) -> Answer:
        """The answer of the first server that has one. Raises NoAnswer, within TOTAL_SECONDS."""
        end = time.monotonic() + TOTAL_SECONDS
        ordered = self.order(servers)
        plan = (ordered * ROUNDS)[: max(MAX_ATTEMPTS, len(ordered))]
        running: dict[asyncio.Task[Answer], Server] = {}
        rcode = int(Rcode.SERVFAIL)
        try:
            while True:
                left = end - time.monotonic()
                if plan and left > 0:
                    server = plan.pop(0)
                    running[asyncio.create_task(self._attempt(server, key))] = server
                if not running or left <= 0:
                    raise NoAnswer(rcode)
                wait = min(left, STAGGER_SECONDS) if plan else left
                await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in [each for each in running if each.done()]:
                    server = running.pop(task)
                    # Not raised again, in this frame: that would tie the frame, the task and its answer together in a
                    # circle, and keep them until the garbage collector comes by.
                    error = task.exception()
                    if error is None:
                        self._health.pop(server, None)
                        self._last_good = server
                        return task.result()
                    if not isinstance(error, _Failed):
                        raise error
                    self._note_failure(server, error)
                    rcode = Rcode.REFUSED if error.rcode == Rcode.REFUSED else Rcode.SERVFAIL
                    del error
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.gather(*running, return_exceptions=True)

    def _note_failure(self, server: Server, failed: _Failed) -> None:
        self._metrics.upstream_failed[str(server), failed.reason][0] += 1
        health = self._health.setdefault(server, _Health())
        if failed.reason in ("timeout", "network"):
            health.timeouts += 1
            if health.timeouts >= DOWN_AFTER:
                health.down_until = time.monotonic() + DOWN_SECONDS
        if server == self._last_good and not isinstance(failed, _Busy):
            self._last_good = None

    async def _attempt(self, server: Server, key: Key) -> Answer:
        begun = time.perf_counter()
        self._metrics.upstream_asked[str(server)][0] += 1
        try:
            try:
                answer = await self._exchange(server, key, wire.opt(0, bool(key[3] & DO)))
            except _Failed as failed:
                if failed.rcode not in _NO_EDNS:
                    raise
                answer = await self._exchange(server, key, b"")
            with contextlib.suppress(Circle):  # passed on as it came, and not kept
                follow(answer)
        except OSError as error:
            raise _Failed("timeout" if isinstance(error, TimeoutError) else "network") from None
        except Malformed:
            raise _Failed("malformed") from None
        self._metrics.upstream_duration[str(server)].observe(time.perf_counter() - begun)
        return answer

    async def _exchange(self, server: Server, key: Key, edns: bytes) -> Answer:
        """An answer that can be passed on. Raises OSError, TimeoutError among them, and _Failed."""
        name, kind, klass, wants = key
        ident = int.from_bytes(os.urandom(2), "big")
        question = name + struct.pack("!HH", kind, klass)
        message = wire.question_message(ident, question, RD | (wants & CD), edns)
        answer = await self._over_udp(server, ident, key, message)
        if answer is None or answer.truncated:
            answer = await self._over_tcp(server, ident, key, message)
        if answer.rcode not in _ANSWERS:
            raise _Failed("refused", answer.rcode)
        if answer.truncated:
            raise _Failed("truncated")
        return answer

    def _judge(self, data: bytes, ident: int, key: Key) -> Answer | None:
        """The answer to what was asked, or None: then it is somebody else's, or nobody's. Raises _Failed for a server's
        word that it could not read the question."""
        if data[:2] == ident.to_bytes(2, "big"):
            if (rcode := wire.refusal_of(data, ident)) is not None:
                raise _Failed("refused", rcode)
            try:
                answer = wire.parse_answer(data)
            except Malformed:
                pass
            else:
                if (answer.name, answer.type, answer.klass) == key[:3] and not answer.flags & wire.OPCODE_MASK:
                    return answer
        self._metrics.mismatched[0] += 1
        return None

    async def _over_udp(self, server: Server, ident: int, key: Key, message: bytes) -> Answer | None:
        """The answer; None after too many wrong ones. Raises OSError, TimeoutError among them."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | None] = loop.create_future()
        wrong = 0

        def readable() -> None:
            nonlocal wrong
            try:
                while not future.done() and self._may_read_udp():  # else it is readable in the next turn, too
                    data = link.recv(MAX_UDP_ANSWER_BYTES + 1)
                    answer = self._judge(data, ident, key) if len(data) <= MAX_UDP_ANSWER_BYTES else None
                    if answer:
                        future.set_result(answer)
                        return
                    wrong += 1
                    if wrong >= MAX_MISMATCHES or len(data) > MAX_UDP_ANSWER_BYTES:
                        future.set_result(None)
            except BlockingIOError:
                return
            except (OSError, _Failed) as error:  # OSError: ICMP says that nobody listens there
                if not future.done():
                    future.set_exception(error)

        with connected(server, socket.SOCK_DGRAM) as link:
            link.send(message)
            loop.add_reader(link, readable)
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    return await future
            finally:
                loop.remove_reader(link)

    def _may_read_udp(self) -> bool:
        """Whether this turn of the event loop has time for one more answer: so many at once must not stall it."""
        if not self._udp_answers:
            asyncio.get_running_loop().call_soon(self._next_turn)  # it runs before sockets are read again
        self._udp_answers += 1
        return self._udp_answers <= UDP_ANSWERS_PER_TURN

    def _next_turn(self) -> None:
        self._udp_answers = 0

    async def _over_tcp(self, server: Server, ident: int, key: Key, message: bytes) -> Answer:
        async with self._tcp_place(server):
            with unconnected(server, socket.SOCK_STREAM) as link:
                async with asyncio.timeout(TCP_SECONDS):
                    data = await _ask_over_tcp(link, server, message)
            async with self._parsing:
                answer = self._judge(bytes(data), ident, key)
                await asyncio.sleep(0)  # a turn for each
        if not answer:
            raise _Failed("malformed")
        return answer

    @contextlib.asynccontextmanager
    async def _tcp_place(self, server: Server) -> AsyncIterator[None]:
        """One of the places for long answers; raises _Busy where too many wait for one already. A server that holds on
        to all that it may have leaves as many to the others."""
        if self._tcp_waiting >= MAX_TCP_WAITING:
            raise _Busy
        own = self._tcp_places_of.setdefault(server, asyncio.Semaphore(MAX_TCP_ANSWERS_PER_SERVER))
        async with contextlib.AsyncExitStack() as places:
            self._tcp_waiting += 1
            try:
                async with asyncio.timeout(TCP_SECONDS):
                    await places.enter_async_context(own)
                    await places.enter_async_context(self._tcp_places)
            except TimeoutError:
                raise _Busy from None
            except asyncio.CancelledError:
                self._metrics.upstream_failed[str(server), "busy"][0] += 1
                raise
            finally:
                self._tcp_waiting -= 1
            yield


async def _ask_over_tcp(link: socket.socket, server: Server, message: bytes) -> bytearray:
    """What comes back, unread. Raises OSError."""
    loop = asyncio.get_running_loop()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TCP_BUFFER_BYTES)
    await loop.sock_connect(link, _sockaddr(server))
    await loop.sock_sendall(link, struct.pack("!H", len(message)) + message)
    size = int.from_bytes(await _receive(link, 2), "big")
    return await _receive(link, size)


async def _receive(link: socket.socket, size: int) -> bytearray:
    loop, data = asyncio.get_running_loop(), bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        more = await loop.sock_recv_into(link, view[at:])
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "closed in the middle of an answer")
        at += more
    return data


@contextlib.contextmanager
def _closing_on_error(link: socket.socket):  # type: ignore[no-untyped-def]
    try:
        yield link
    except BaseException:
        link.close()
        raise


def unconnected(server: Server, kind: socket.SocketKind) -> socket.socket:
    """A socket from which this server may be asked; raises OSError."""
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    link = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    with _closing_on_error(link):
        if server.interface:
            link.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, server.interface.encode() + b"\0")
        if server.source:
            link.bind((server.source, 0))
    return link


def connected(server: Server, kind: socket.SocketKind) -> socket.socket:
    """The same, connected (UDP); raises OSError."""
    link = unconnected(server, kind)
    with _closing_on_error(link):
        link.connect(_sockaddr(server))
    return link


def _sockaddr(server: Server) -> tuple[str, int] | tuple[str, int, int, int]:
    address, _, zone = server.address.partition("%")
    if ":" not in address:
        return address, server.port
    return address, server.port, 0, socket.if_nametoindex(zone) if zone else 0


# ---- the resolv file ----

_NAMESERVER = re.compile(r"^\s*nameserver\s+(\S+)", re.MULTILINE)


def _read(path: Path) -> tuple[int, str]:
    """When a file was changed, and what is in it; never waits, as for a FIFO's other end. Raises OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISCHR(status.st_mode):  # /dev/null is one of these
            raise OSError(0, "it is no regular file")
        return status.st_mtime_ns, file.read(MAX_RESOLV_BYTES).decode(errors="replace")


def read_resolv(files: tuple[Path, ...], complain: Callable[[str], None]) -> tuple[tuple[Server, ...] | None, bool]:
    """The servers of the newest file (dnsmasq's rule for several), None where none could be read; whether all could."""
    newest, text, complete = -1, "", True
    for path in files:
        try:
            changed, content = _read(path)
        except OSError as error:
            complain(f"cannot read {path}: {error.strerror}")
            complete = False
            continue
        if changed > newest:
            newest, text = changed, content
    if newest < 0 and not complete:
        return None, False
    servers = []
    for word in _NAMESERVER.findall(text)[:MAX_NAMESERVERS]:
        address = word.partition("%")[0]
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        except OSError:
            complain(f"ignoring nameserver {word!r}: no numeric address")
            continue
        if Server(word) not in servers:
            servers.append(Server(word))
    return tuple(servers), complete
