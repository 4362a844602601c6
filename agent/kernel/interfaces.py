"""List the interfaces and addresses of a network namespace over netlink."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from itertools import islice

from udpwatch.dns.netlink import Netlink, attribute, attributes

_GET_LINK, _GET_ADDRESS = 18, 22  # RTM_*
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ANY_FAMILY = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
_NAME, _MASTER, _LINK_INFO, _EXT_MASK, _XDP = 3, 10, 18, 29, 43  # IFLA_*
_XDP_ATTACHED = 2  # IFLA_XDP_ATTACHED
_INFO_KIND = 1  # IFLA_INFO_KIND
_SKIP_STATS = struct.pack("=I", 1 << 3)  # RTEXT_FILTER_SKIP_STATS
_UP, _LOOPBACK = 0x1, 0x8  # IFF_*
_PEER_ADDRESS, _LOCAL_ADDRESS, _FLAGS, _PROTOCOL = 1, 2, 8, 11  # IFA_*
_SECONDARY, _DAD_FAILED, _DEPRECATED, _TENTATIVE, _PERMANENT = 0x01, 0x08, 0x20, 0x40, 0x80  # IFA_F_*
_OPTIMISTIC = 0x04  # IFA_F_OPTIMISTIC: may be used before duplicate address detection has ended


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str  # "bridge", "veth", "dummy", ...; "": a real device, or loopback
    master: int  # index of the bridge, bond or VRF that it belongs to, 0: none
    is_up: bool
    is_loopback: bool
    has_xdp: bool = False  # an XDP program runs on its packets before anything else sees them


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of an interface."""

    address: str
    family: int  # 4 or 6
    prefix: int
    index: int  # of the interface
    scope: int  # RT_SCOPE_*: 0 global, 253 link, 254 host
    is_usable: bool  # duplicate address detection is not pending and has not failed
    is_secondary: bool  # IPv4: another address of the same network was added before
    is_temporary: bool  # IPv6: a privacy address
    is_deprecated: bool  # IPv6: not used for new conversations
    is_permanent: bool  # it has no lifetime: it does not come from DHCPv6 or a router
    protocol: int  # the program that added it, as IFA_PROTO; 0: unknown


def links(most: int) -> list[Link]:
    """Return at most ``most`` interfaces of the namespace of the calling thread. Raises OSError."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_EXT_MASK, _SKIP_STATS)
    with Netlink(socket.NETLINK_ROUTE) as netlink:
        return [_link(content) for content in islice(netlink.ask(_GET_LINK, body, dump=True), most)]


def addresses(most: int, netlink: Netlink | None = None) -> list[LinkAddress]:
    """Return at most ``most`` addresses of the namespace of ``netlink``, else of the calling thread. Raises OSError."""
    found: list[LinkAddress] = []
    with contextlib.nullcontext(netlink) if netlink else Netlink(socket.NETLINK_ROUTE) as route:
        for content in route.ask(_GET_ADDRESS, _ANY_FAMILY, dump=True):  # all of them must be read
            each = read_address(content)
            if each and len(found) < most:
                found.append(each)
    return found


def _link(content: memoryview) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(content)
    found = dict(attributes(content[_LINK.size :]))
    kind = dict(attributes(found[_LINK_INFO])).get(_INFO_KIND, b"") if _LINK_INFO in found else b""
    return Link(
        index,
        bytes(found.get(_NAME, b"")).rstrip(b"\0").decode(errors="backslashreplace"),
        bytes(kind).rstrip(b"\0").decode(errors="backslashreplace"),
        int.from_bytes(found.get(_MASTER, b""), sys.byteorder),
        bool(flags & _UP),
        bool(flags & _LOOPBACK),
        any(dict(attributes(found[_XDP])).get(_XDP_ATTACHED, b"\0")) if _XDP in found else False,
    )


def read_address(content: memoryview) -> LinkAddress | None:
    """Decode an RTM_NEWADDR or RTM_DELADDR message; None: it is of another family."""
    family, prefix, flags, scope, index = _ADDRESS.unpack_from(content)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = dict(attributes(content[_ADDRESS.size :]))
    # IFA_ADDRESS is the other end of a point-to-point link; IFA_LOCAL is absent in IPv6 without such an end.
    raw = found.get(_LOCAL_ADDRESS) or found.get(_PEER_ADDRESS)
    if raw is None:
        return None
    flags = int.from_bytes(found.get(_FLAGS, flags.to_bytes(1, sys.byteorder)), sys.byteorder)
    return LinkAddress(
        str(ipaddress.ip_address(bytes(raw))),
        4 if family == socket.AF_INET else 6,
        prefix,
        index,
        scope,
        not flags & _DAD_FAILED and (not flags & _TENTATIVE or bool(flags & _OPTIMISTIC)),
        family == socket.AF_INET and bool(flags & _SECONDARY),
        family == socket.AF_INET6 and bool(flags & _SECONDARY),
        bool(flags & _DEPRECATED),
        bool(flags & _PERMANENT),
        int.from_bytes(found.get(_PROTOCOL, b""), sys.byteorder),
    )
