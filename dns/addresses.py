"""This network namespace's addresses, and notification of their changes."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from udpwatch.dns.names import Network
from udpwatch.dns.netlink import BUFFER, Netlink, attributes

_RTM_GETADDR = 22
_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_FLAGS = 1, 2, 3, 8
_IFA_F_TENTATIVE, _IFA_F_DADFAILED = 0x40, 0x08
_IFA_F_TEMPORARY, _IFA_F_DEPRECATED = 0x01, 0x20  # of IPv6; for IPv4, 0x01 means secondary

_ifaddrmsg = struct.Struct("=BBBBI")


@dataclass(frozen=True, slots=True)
class Local:
    """An address of this host."""

    packed: bytes  # 4 or 16 octets
    network: Network  # the directly connected network
    index: int  # interface index
    interface: str
    usable: bool  # False while duplicate address detection runs, or if it failed
    label: str  # the interface, or its label (eth0:1)
    is_preferred: bool  # False for an IPv6 address that is temporary, deprecated or tentative

    @property
    def text(self) -> str:
        """The numeric address, with its zone if it is link-local."""
        address = ipaddress.ip_address(self.packed)
        return f"{address}%{self.interface}" if self.is_link_local else str(address)

    @property
    def is_link_local(self) -> bool:
        """Whether it is an IPv6 link-local address, which needs its interface."""
        return len(self.packed) == 16 and ipaddress.ip_address(self.packed).is_link_local


def snapshot() -> list[Local]:
    """Return all addresses. Raises OSError."""
    names = dict(socket.if_nameindex())
    body = _ifaddrmsg.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    with Netlink(socket.NETLINK_ROUTE) as link:
        messages = link.ask(_RTM_GETADDR, body, dump=True)
        return [local for message in messages if (local := _read(message, names))]


def _read(payload: memoryview, names: dict[int, str]) -> Local | None:
    family, prefix, flags, _scope, index = _ifaddrmsg.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = {kind: bytes(value) for kind, value in attributes(payload[_ifaddrmsg.size :])}
    peer = found.get(_IFA_ADDRESS)
    packed = found.get(_IFA_LOCAL, peer)  # they differ on a point-to-point link
    if packed is None:
        return None
    if _IFA_FLAGS in found:
        flags = struct.unpack("=I", found[_IFA_FLAGS])[0]
    name = names.get(index, f"if{index}")
    secondary = _IFA_F_TEMPORARY | _IFA_F_DEPRECATED | _IFA_F_TENTATIVE
    return Local(
        packed=packed,
        network=ipaddress.ip_network((peer or packed, prefix), strict=False),
        index=index,
        interface=name,
        usable=not flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED),
        label=found[_IFA_LABEL].rstrip(b"\0").decode(errors="replace") if _IFA_LABEL in found else name,
        is_preferred=family == socket.AF_INET or not flags & secondary,
    )


def changes() -> socket.socket:
    """Return a socket that becomes readable when addresses or links change. Its contents do not matter."""
    link = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    link.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
    return link


def drain(link: socket.socket) -> None:
    """Read and discard everything. ENOBUFS means that a message was lost, which counts as a change. Raises OSError."""
    while True:
        try:
            link.recv(BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
