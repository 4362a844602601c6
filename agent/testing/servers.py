"""Small UDP and TCP servers, with and without the bug, for the demo and the tests."""

from __future__ import annotations

import socket
import struct

IP_PKTINFO = 8  # include/uapi/linux/in.h; the socket module does not define it


def plain(server: socket.socket) -> None:
    """Reply as most programs do: recvfrom(), sendto(). On a wildcard socket, routing chooses the source."""
    while True:
        data, peer = server.recvfrom(65535)
        server.sendto(b"reply to " + data, peer)


def enable_pktinfo(server: socket.socket) -> None:
    """Receive the destination address of each datagram: IP_PKTINFO (ip(7)), IPV6_RECVPKTINFO (RFC 3542, 6.1).

    Call this before bind(): a datagram that is already queued has no address.
    """
    if server.family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def with_pktinfo(server: socket.socket) -> None:
    """Reply from the address that was asked. Call `enable_pktinfo` first."""
    while True:
        data, control, _flags, peer = server.recvmsg(65535, socket.CMSG_SPACE(32))
        level, kind, asked = control[0]
        server.sendmsg([b"reply to " + data], [(level, kind, reply_control(asked))], 0, peer)


def reply_control(asked: bytes) -> bytes:
    """Return the control message for a reply: the received address as the source, and no interface."""
    if len(asked) == 20:  # struct in6_pktinfo: address, interface
        return asked[:16] + bytes(4)
    # struct in_pktinfo: interface, ipi_spec_dst (the source to use), ipi_addr (what the packet was sent to)
    return struct.pack("=i4s4s", 0, asked[4:8], bytes(4))


def tcp(server: socket.socket) -> None:
    """Reply over TCP, where the kernel keeps both addresses of the connection."""
    server.listen()
    while True:
        connection, _peer = server.accept()
        with connection:
            connection.sendall(b"reply to " + connection.recv(65535))
