"""A network of upstream servers without sockets: implements `udpwatch.dns.transport.Transport`, follows scripts."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter, deque
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
        self.open_tcp: Counter[Server] = Counter()
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

    async def exchange_tcp(self, server: Server, message: bytes) -> bytes:
        self.open_tcp[server] += 1
        try:
            answers = self._play(server, message, tcp=True)
            if not answers:
                await asyncio.get_running_loop().create_future()
            delay, item = answers[0]
            await asyncio.sleep(delay)
            if isinstance(item, OSError):
                raise item
            return item
        finally:
            self.open_tcp[server] -= 1

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
