"""Look up and list routes over netlink."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Self

from udpwatch.agent.kernel.records import printable
from udpwatch.dns.netlink import Netlink, attribute, attributes

_GET_ROUTE = 26  # RTM_GETROUTE
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_DESTINATION, _OUTPUT, _GATEWAY, _PREFERRED, _MULTIPATH, _VIA, _PROTOCOL = 1, 4, 5, 7, 9, 18, 27  # RTA_*
_UNICAST, _LOCAL, _BROADCAST, _MULTICAST = 1, 2, 3, 5  # RTN_*, include/uapi/linux/rtnetlink.h
_BY_KERNEL = 2  # RTPROT_KERNEL
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop


@dataclass(frozen=True, slots=True)
class Route:
    """The route of a packet in one namespace."""

    is_local: bool
    is_group: bool  # broadcast or multicast
    interface: str  # "": it was deleted meanwhile


@dataclass(frozen=True, slots=True)
class Path:
    """The way of a UDP packet for which the sender sets no source."""

    index: int  # of the interface by which it leaves
    source: str  # "": the kernel has no address for it
    is_unicast: bool  # not to this host, a group or a broadcast address
    is_local: bool = False  # to this host


@dataclass(frozen=True, slots=True)
class Entry:
    """A unicast route of any routing table, or one that makes a network local without its being an address (AnyIP)."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    index: int  # of its interface, 0: it has several
    gateway: str  # "": the network is attached
    preferred: str  # source address that the route sets, "": none
    paths: int  # next hops
    is_local: bool = False


class Lookup:
    """Asks for the routes of one namespace: that of the thread that creates it."""

    def __init__(self) -> None:
        """Open a netlink socket. Raises OSError."""
        self._netlink = Netlink(socket.NETLINK_ROUTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._netlink.close()

    def path(self, destination: str, device: int = 0) -> Path | None:
        """Return the way of a UDP packet to ``destination``, or None if there is no route.

        ``device``: index of the interface that the socket is bound to, 0 for none.
        """
        address = ipaddress.ip_address(destination)
        body = _request(address) + attribute(_PROTOCOL, bytes([socket.IPPROTO_UDP]))
        if device:
            body += attribute(_OUTPUT, device.to_bytes(4, sys.byteorder))
        try:
            (content,) = self._netlink.ask(_GET_ROUTE, body)
        except OSError:
            return None
        found = dict(attributes(content[_ROUTE.size :]))
        source = found.get(_PREFERRED)
        return Path(
            int.from_bytes(found.get(_OUTPUT, b""), sys.byteorder),
            str(ipaddress.ip_address(bytes(source))) if source else "",
            content[7] == _UNICAST,
            content[7] == _LOCAL,
        )


def route_to(address: str, device: int = 0) -> Route | None:
    """Return the route in the namespace of the calling thread, or None if there is none; raises OSError.

    ``device``: index of a VRF in whose table to look.
    """
    body = _request(ipaddress.ip_address(address))
    if device:
        body += attribute(_OUTPUT, device.to_bytes(4, sys.byteorder))
    with Netlink(socket.NETLINK_ROUTE) as netlink:
        try:
            (content,) = netlink.ask(_GET_ROUTE, body)
        except OSError:
            return None
    kind = content[7]
    index = next((value for name, value in attributes(content[_ROUTE.size :]) if name == _OUTPUT), bytes(4))
    try:
        # A tenant may choose the name.
        interface = printable(os.fsencode(socket.if_indextoname(int.from_bytes(index, sys.byteorder))))
    except OSError:
        interface = ""
    return Route(kind == _LOCAL, kind in (_BROADCAST, _MULTICAST), interface)


def entries(family: int, most: int) -> list[Entry]:
    """Return at most ``most`` routes of all tables, in the namespace of the calling thread.

    ``family``: 4 or 6. Raises OSError.
    """
    inet = socket.AF_INET if family == 4 else socket.AF_INET6
    with Netlink(socket.NETLINK_ROUTE) as netlink:
        found = netlink.ask(_GET_ROUTE, _ROUTE.pack(inet, 0, 0, 0, 0, 0, 0, 0, 0), dump=True)
        return list(islice(_entries(found), most))


def _request(destination: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    header = _ROUTE.pack(family, len(destination.packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    return header + attribute(_DESTINATION, destination.packed)


def _entries(contents: Iterator[memoryview]) -> Iterator[Entry]:
    for content in contents:
        family, prefix, _, _, _, protocol, _, kind, _ = _ROUTE.unpack_from(content)
        is_local = kind == _LOCAL and protocol != _BY_KERNEL  # the kernel adds one for each address
        if kind != _UNICAST and not is_local:
            continue
        found = dict(attributes(content[_ROUTE.size :]))
        raw = bytes(found.get(_DESTINATION, bytes(4 if family == socket.AF_INET else 16)))
        gateway, preferred = found.get(_GATEWAY), found.get(_PREFERRED)
        yield Entry(
            ipaddress.ip_network((raw, prefix)),
            int.from_bytes(found.get(_OUTPUT, b""), sys.byteorder),
            # RTA_VIA is a gateway of the other family.
            str(ipaddress.ip_address(bytes(gateway))) if gateway else "via" if _VIA in found else "",
            str(ipaddress.ip_address(bytes(preferred))) if preferred else "",
            _next_hops(found[_MULTIPATH]) if _MULTIPATH in found else 1,
            is_local,
        )


def _next_hops(raw: memoryview) -> int:
    count = at = 0
    while at + _NEXT_HOP.size <= len(raw):
        (length, _, _, _) = _NEXT_HOP.unpack_from(raw, at)
        if length < _NEXT_HOP.size:
            break
        count, at = count + 1, at + (length + 3 & ~3)
    return count
