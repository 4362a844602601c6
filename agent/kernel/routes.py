"""Look up routes over netlink."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass

from udpwatch.dns.netlink import Netlink, attribute, attributes

_GET_ROUTE = 26  # RTM_GETROUTE
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_DESTINATION, _OUTPUT = 1, 4  # RTA_DST, RTA_OIF
_LOCAL, _BROADCAST, _MULTICAST = 2, 3, 5  # RTN_*, include/uapi/linux/rtnetlink.h


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
    with Netlink(socket.NETLINK_ROUTE) as netlink:
        try:
            (content,) = netlink.ask(_GET_ROUTE, body + attribute(_DESTINATION, destination.packed))
        except OSError:
            return None
    kind = content[7]
    index = next((value for name, value in attributes(content[_ROUTE.size :]) if name == _OUTPUT), bytes(4))
    try:
        interface = socket.if_indextoname(int.from_bytes(index, sys.byteorder))
    except OSError:
        interface = ""
    return Route(kind == _LOCAL, kind in (_BROADCAST, _MULTICAST), interface)
