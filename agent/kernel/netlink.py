"""Frame netlink messages (netlink(7)), and look up routes."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

NESTED = 0x8000  # NLA_F_NESTED
BUFFER = 1 << 16
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_REQUEST, _DUMP = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_NETLINK_ROUTE, _GET_ROUTE = 0, 26  # RTM_GETROUTE
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_DESTINATION, _OUTPUT = 1, 4  # RTA_DST, RTA_OIF
_LOCAL, _BROADCAST, _MULTICAST = 2, 3, 5  # RTN_*, include/uapi/linux/rtnetlink.h


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute with its padding."""
    return _ATTRIBUTE.pack(len(value) + 4, kind) + value + bytes(-len(value) % 4)


def attributes(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type without flags, value) of each attribute, up to the first invalid length."""
    at, end = 0, len(raw)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if length < 4 or at + length > end:
            return
        yield kind & ~NESTED, raw[at + 4 : at + length]
        at += length + 3 & ~3


def messages(raw: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, content) of each message in a datagram."""
    view, at = memoryview(raw), 0
    while at + HEADER.size <= len(raw):
        length, kind = struct.unpack_from("=IH", raw, at)
        if length < HEADER.size or at + length > len(raw):
            return
        yield kind, view[at + HEADER.size : at + length]
        at += length + 3 & ~3


class Netlink:
    """A socket for requests, in the namespace of the thread that creates it."""

    def __init__(self, protocol: int) -> None:
        """Open the socket; raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))

    def close(self) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes, dump: bool = False) -> Iterator[memoryview]:
        """Send a request; yield the content of each message of the answer. The caller must read all of them; raises
        OSError.
        """
        flags = _REQUEST | (_DUMP if dump else 0)
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
        while True:
            for what, content in messages(self._socket.recv(BUFFER)):
                if what == _DONE:
                    return
                if what == _ERROR:
                    (code,) = struct.unpack_from("=i", content)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return
                yield content
            if not dump:
                return


@dataclass(frozen=True, slots=True)
class Route:
    """The route of a packet in one namespace."""

    is_local: bool
    is_group: bool  # broadcast or multicast
    interface: str  # "": it was deleted meanwhile


def route_to(address: str) -> Route | None:
    """Return the route in the namespace of the calling thread, or None if there is none; raises OSError."""
    destination = ipaddress.ip_address(address)
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, len(destination.packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    netlink = Netlink(_NETLINK_ROUTE)
    try:
        (content,) = netlink.ask(_GET_ROUTE, body + attribute(_DESTINATION, destination.packed))
    except OSError:
        return None
    finally:
        netlink.close()
    kind = content[7]
    index = next((value for name, value in attributes(content[_ROUTE.size :]) if name == _OUTPUT), bytes(4))
    try:
        interface = socket.if_indextoname(int.from_bytes(index, sys.byteorder))
    except OSError:
        interface = ""
    return Route(kind == _LOCAL, kind in (_BROADCAST, _MULTICAST), interface)
