"""Sockets to upstream servers. `UpstreamClient` uses the network only through `Transport`, so tests can replace it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

from udpwatch.dns.settings import Server

TCP_BUFFER_BYTES = 32 << 10  # kernel receive buffer per connection; the kernel doubles it

_SO_BINDTODEVICE = 25


class UdpConnection(Protocol):
    """A UDP socket connected to one server."""

    def send(self, message: bytes) -> None:
        """Send one query. Raises OSError."""

    def receive(self, max_bytes: int) -> bytes:
        """Return the next datagram, cut at ``max_bytes``. Raises BlockingIOError when there is none, else OSError."""

    def close(self) -> None:
        """Close the socket; ``on_readable`` is not called again."""


class Transport(Protocol):
    """How queries reach upstream servers."""

    def open_udp(self, server: Server, on_readable: Callable[[], None]) -> UdpConnection:
        """Open a socket; ``on_readable`` runs in the event loop while there is something to receive. Raises OSError."""

    async def exchange_tcp(self, server: Server, message: bytes) -> bytes:
        """Send one query over a new TCP connection and return the response, unparsed. Raises OSError."""


class SocketUdpConnection:
    """`UdpConnection` over a real socket."""

    __slots__ = ("_loop", "_socket")

    def __init__(self, server: Server, on_readable: Callable[[], None]) -> None:
        self._socket = _open_socket(server, socket.SOCK_DGRAM)
        with _close_on_error(self._socket):
            self._socket.connect(_sockaddr(server))
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, on_readable)

    def send(self, message: bytes) -> None:
        """Send one query. Raises OSError."""
        self._socket.send(message)

    def receive(self, max_bytes: int) -> bytes:
        """Return the next datagram. Raises BlockingIOError, or OSError when ICMP reports that no one listens."""
        return self._socket.recv(max_bytes)

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove_reader(self._socket)
        self._socket.close()


class SocketTransport:
    """`Transport` over real sockets, with the source address and interface that the server's settings name."""

    def open_udp(self, server: Server, on_readable: Callable[[], None]) -> UdpConnection:
        """Open a connected socket; the kernel picks a random source port."""
        return SocketUdpConnection(server, on_readable)

    async def exchange_tcp(self, server: Server, message: bytes) -> bytes:
        """Send a query and receive one response."""
        loop = asyncio.get_running_loop()
        with _open_socket(server, socket.SOCK_STREAM) as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TCP_BUFFER_BYTES)
            await loop.sock_connect(link, _sockaddr(server))
            await loop.sock_sendall(link, struct.pack("!H", len(message)) + message)
            size = int.from_bytes(await _receive(link, 2), "big")
            return bytes(await _receive(link, size))


async def _receive(link: socket.socket, size: int) -> bytearray:
    loop, data = asyncio.get_running_loop(), bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        more = await loop.sock_recv_into(link, view[at:])
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "connection closed in the middle of a response")
        at += more
    return data


@contextlib.contextmanager
def _close_on_error(link: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        link.close()
        raise


def _open_socket(server: Server, kind: socket.SocketKind) -> socket.socket:
    """Return an unconnected socket, bound as the server's settings say. Raises OSError."""
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    link = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    with _close_on_error(link):
        if server.interface:
            link.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, server.interface.encode() + b"\0")
        if server.source:
            link.bind((server.source, 0))
    return link


def _sockaddr(server: Server) -> tuple[str, int] | tuple[str, int, int, int]:
    address, _, zone = server.address.partition("%")
    if ":" not in address:
        return address, server.port
    return address, server.port, 0, socket.if_nametoindex(zone) if zone else 0
