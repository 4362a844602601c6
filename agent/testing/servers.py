"""Small UDP and TCP servers, wrong and right ones, for the demo and the tests."""

from __future__ import annotations

import socket
import struct

IP_PKTINFO = 8  # include/uapi/linux/in.h; the socket module has no name for it


def plain(server: socket.socket) -> None:
    """Answer as most programs do: recvfrom, sendto. On a wildcard socket, routing picks the source."""
    while True:
        data, peer = server.recvfrom(65535)
        server.sendto(b"answer to " + data, peer)


def want_pktinfo(server: socket.socket) -> None:
    """Ask for the address that each datagram was sent to: IP_PKTINFO (ip(7)), IPV6_RECVPKTINFO (RFC 3542, 6.1).

    To be done before the bind: a datagram that came earlier carries no address.
    """
    if server.family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def with_pktinfo(server: socket.socket) -> None:
    """Answer from the address that was asked; the socket has been through `want_pktinfo`."""
    while True:
        data, control, _flags, peer = server.recvmsg(65535, socket.CMSG_SPACE(32))
        level, kind, asked = control[0]
        server.sendmsg([b"answer to " + data], [(level, kind, answer_from(asked))], 0, peer)


def answer_from(asked: bytes) -> bytes:
    """The control message that answers a received one: its address as the source, the way out left to routing."""
    if len(asked) == 20:  # struct in6_pktinfo: address, interface
        return asked[:16] + bytes(4)
    # struct in_pktinfo: interface, ipi_spec_dst (the source to use), ipi_addr (what the packet was sent to)
    return struct.pack("=i4s4s", 0, asked[4:8], bytes(4))


def tcp(server: socket.socket) -> None:
    """Answer over TCP, where the kernel keeps both addresses."""
    server.listen()
    while True:
        connection, _peer = server.accept()
        with connection:
            connection.sendall(b"answer to " + connection.recv(65535))
