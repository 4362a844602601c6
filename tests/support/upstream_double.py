"""A network of upstream servers without sockets: implements `udpwatch.dns.transport.Transport`, follows scripts."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import dns_messages as m
from virtual_time import now

from udpwatch.dns.settings import Server


@dataclass(frozen=True)
class Sent:
    """A query that reached a server."""

    server: Server
    data: bytes
    tcp: bool
    at: float

    @property
    def id(self) -> int:
        return int.from_bytes(self.data[:2], "big")

    @property
    def edns(self) -> bool:
        return self.data[10:12] != b"\0\0"

    @property
    def question(self) -> bytes:
        end = self.data.index(b"\0", 12) + 5
        return self.data[12:end]

    def respond(self, *answers: bytes, flags: int = m.RD | m.RA, rcode: int = 0, ident: int | None = None) -> bytes:
        """A response with these records; ``ident``: instead of the right one."""
        head = m.header(1, len(answers), flags=m.QR | flags | rcode, ident=self.id if ident is None else ident)
        return head + self.question + b"".join(answers)


#: What a server sends for a query: (seconds later, datagram or error) each. TCP: the first one only.
Script = Callable[[Sent], Sequence[tuple[float, bytes | OSError]]]
ADDRESS = m.record(m.A, bytes((192, 0, 2, 80)), 300)


def honest(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    """One address, at once."""
    return [(0.0, sent.respond(ADDRESS))]


def silent(_: Sent) -> list[tuple[float, bytes | OSError]]:
    """Nothing."""
    return []


class UpstreamNetwork:
    """Servers by address; those without a script are honest."""

    def __init__(self, scripts: dict[Server, Script] | None = None) -> None:
        self.scripts = scripts or {}
        self.sent: list[Sent] = []
        self.open_udp_connections: set[_Connection] = set()
        self.tcp_connections: list[_TcpConnection] = []  # all that have been opened
        self.received_in_turn: list[int] = []  # datagrams read in each turn of the event loop
        self.ports_in_use: set[int] = set()  # by other programs
        self._turn_open = False

    def open_udp(self, server: Server, port: int, shared: bool, on_readable: Callable[[], None]) -> _Connection:
        others = {each.port for each in self.open_udp_connections if not (shared and each.shared)}
        same = {each.port for each in self.open_udp_connections if each.server == server}
        if port and port in self.ports_in_use | others:
            raise OSError(errno.EADDRINUSE, "in use")
        assert not port or port not in same, "two sockets with the same addresses and ports"
        connection = _Connection(self, server, port, shared, on_readable)
        self.open_udp_connections.add(connection)
        return connection

    async def open_tcp(self, server: Server, protocol: asyncio.BufferedProtocol) -> None:
        await asyncio.sleep(0)
        _TcpConnection(self, server, protocol)

    @property
    def open_tcp_connections(self) -> list[_TcpConnection]:
        return [each for each in self.tcp_connections if not each.closed]

    def _play(self, server: Server, data: bytes, tcp: bool) -> Sequence[tuple[float, bytes | OSError]]:
        sent = Sent(server, data, tcp, now())
        self.sent.append(sent)
        return self.scripts.get(server, honest)(sent)

    def count_received(self) -> None:
        """Count a datagram for the present turn."""
        if not self._turn_open:
            self._turn_open = True
            self.received_in_turn.append(0)
            asyncio.get_running_loop().call_soon(self._end_turn)
        self.received_in_turn[-1] += 1

    def _end_turn(self) -> None:
        self._turn_open = False


class _Connection:
    """Readable for as long as there is a datagram, as a socket is: its callback runs once per turn of the loop."""

    def __init__(
        self, network: UpstreamNetwork, server: Server, port: int, shared: bool, on_readable: Callable[[], None]
    ) -> None:
        self.network, self.server, self.on_readable = network, server, on_readable
        self.port, self.shared = port, shared
        self.inbox: deque[bytes | OSError] = deque()
        self.closed = self.notifying = False

    def send(self, message: bytes) -> None:
        # One timer for all that come at the same time: timers do not keep their order.
        for delay, items in groupby(self.network._play(self.server, message, tcp=False), key=lambda each: each[0]):
            asyncio.get_running_loop().call_later(delay, self._arrive, [item for _, item in items])

    def _arrive(self, items: list[bytes | OSError]) -> None:
        self.inbox += items
        if not self.notifying:
            self.notifying = True
            asyncio.get_running_loop().call_soon(self._notify)

    def _notify(self) -> None:
        self.notifying = False
        if self.closed or not self.inbox:
            return
        self.on_readable()
        if self.inbox and not self.closed and not self.notifying:
            self.notifying = True
            asyncio.get_running_loop().call_soon(self._notify)

    def receive(self, max_bytes: int) -> bytes:
        assert not self.closed
        if not self.inbox:
            raise BlockingIOError
        item = self.inbox.popleft()
        self.network.count_received()
        if isinstance(item, OSError):
            raise item
        return item[:max_bytes]

    def close(self) -> None:
        self.closed = True
        self.network.open_udp_connections.remove(self)


class _TcpConnection(asyncio.Transport):
    """The server's end of a TCP connection: plays the script of each query when it arrives."""

    def __init__(self, network: UpstreamNetwork, server: Server, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self.network, self.server, self.protocol = network, server, protocol
        self.queries: list[Sent] = []
        self.closed = self.paused = False
        self.answered = 0
        self._arrived = bytearray()
        network.tcp_connections.append(self)
        protocol.connection_made(self)

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.closed
        assert int.from_bytes(data[:2], "big") == len(data) - 2
        answers = self.network._play(self.server, data[2:], tcp=True)
        self.queries.append(self.network.sent[-1])
        for delay, item in answers[:1]:
            asyncio.get_running_loop().call_later(delay, self._answer, item)

    def _answer(self, item: bytes | OSError) -> None:
        if isinstance(item, OSError):
            self.lose(item)
        else:
            self.answered += 1
            self.feed(len(item).to_bytes(2, "big") + item)

    def feed(self, data: bytes) -> None:
        """Octets arrive at the client."""
        self._arrived += data
        while self._arrived and not (self.closed or self.paused):
            buffer = self.protocol.get_buffer(-1)
            size = min(len(buffer), len(self._arrived))
            assert size, "no room"
            buffer[:size] = self._arrived[:size]
            del self._arrived[:size]
            buffer.release()
            self.protocol.buffer_updated(size)

    def lose(self, error: OSError | None = None) -> None:
        """The server closes the connection."""
        if not self.closed:
            self.closed = True
            self.protocol.connection_lost(error)

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        self.feed(b"")
