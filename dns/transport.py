"""Sockets to upstream servers. `UpstreamClient` uses the network only through `Transport`, so tests can replace it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

from udpwatch.dns import libc
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.settings import Server

TCP_BUFFER_BYTES = 32 << 10  # kernel receive buffer per connection; the kernel doubles it
UDP_BUFFER_BYTES = 64 << 10  # per socket: a flood must not fill the kernel's memory

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

    def open_udp(self, server: Server, port: int, shared: bool, on_readable: Callable[[], None]) -> UdpConnection:
        """Open a socket on this source port (0: the kernel chooses a random one). ``shared``: sockets to other servers
        may use the same port. ``on_readable`` runs in the packet loop while there is something to receive. Raises
        OSError."""

    async def open_tcp(self, server: Server, protocol: asyncio.BufferedProtocol) -> None:
        """Open a TCP connection for this protocol. Raises OSError."""


class SocketUdpConnection:
    """`UdpConnection` over a real socket."""

    __slots__ = ("_descriptor", "_loop", "_socket")

    def __init__(
        self, loop: PacketLoop, server: Server, port: int, shared: bool, on_readable: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._socket = _open_socket(server, socket.SOCK_DGRAM, port, shared)
        with _close_on_error(self._socket):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER_BYTES)
            self._socket.connect(_sockaddr(server))
            self._descriptor = self._socket.fileno()
            loop.register(self._descriptor, on_readable)

    def send(self, message: bytes) -> None:
        """Send one query. Raises OSError."""
        if libc.send(self._descriptor, message, len(message), libc.DONTWAIT) < 0:
            raise libc.last_error()

    def receive(self, max_bytes: int) -> bytes:
        """Return the next datagram. Raises BlockingIOError, or OSError when ICMP reports that no one listens."""
        return libc.recv(self._descriptor, max_bytes)

    def close(self) -> None:
        """Close the socket."""
        self._loop.unregister(self._descriptor)
        self._socket.close()


class SocketTransport:
    """`Transport` over real sockets, with the source address and interface that the server's settings name."""

    def __init__(self, loop: PacketLoop) -> None:
        self._loop = loop

    def open_udp(self, server: Server, port: int, shared: bool, on_readable: Callable[[], None]) -> UdpConnection:
        """Open a connected socket."""
        return SocketUdpConnection(self._loop, server, port, shared, on_readable)

    async def open_tcp(self, server: Server, protocol: asyncio.BufferedProtocol) -> None:
        """Connect, with the event loop's own transport."""
        loop = asyncio.get_running_loop()
        link = _open_socket(server, socket.SOCK_STREAM)
        with _close_on_error(link):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TCP_BUFFER_BYTES)
            await loop.sock_connect(link, _sockaddr(server))
            await loop.create_connection(lambda: protocol, sock=link)


@contextlib.contextmanager
def _close_on_error(link: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        link.close()
        raise


def _open_socket(server: Server, kind: socket.SocketKind, port: int = 0, shared: bool = False) -> socket.socket:
    """Return an unconnected socket, bound as the server's settings say. Raises OSError."""
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    link = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    with _close_on_error(link):
        if server.interface:
            link.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, server.interface.encode() + b"\0")
        if shared and port:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port and family == socket.AF_INET6:  # IPv4 may use the same port
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if server.source or port:
            link.bind((server.source, port))
    return link


def _sockaddr(server: Server) -> tuple[str, int] | tuple[str, int, int, int]:
    address, _, zone = server.address.partition("%")
    if ":" not in address:
        return address, server.port
    return address, server.port, 0, socket.if_nametoindex(zone) if zone else 0
