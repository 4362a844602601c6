"""This network namespace's addresses, and notification of their changes.

Raw rtnetlink: pyroute2 takes 20 MB of memory, and the agent's budget is 45 MB.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from udpwatch.dns.names import Network

_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TENTATIVE, _IFA_F_DADFAILED = 0x40, 0x08
_RECEIVE_BYTES = 1 << 16

_header = struct.Struct("=IHHII")
_ifaddrmsg = struct.Struct("=BBBBI")
_attribute = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Local:
    """An address of this host."""

    packed: bytes  # 4 or 16 octets
    network: Network  # the directly connected network
    index: int  # interface index
    interface: str
    usable: bool  # False while duplicate address detection runs, or if it failed

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
    found: list[Local] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.bind((0, 0))
        length = _header.size + _ifaddrmsg.size
        link.send(
            _header.pack(length, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0)
            + _ifaddrmsg.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        )
        while True:
            for kind, payload in _messages(link.recv(_RECEIVE_BYTES)):
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", payload)[0]
                    raise OSError(number, os.strerror(number))
                if kind == _RTM_NEWADDR and (local := _read(payload, names)):
                    found.append(local)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _header.size <= len(data):
        length, kind, *_ = _header.unpack_from(data, at)
        if length < _header.size:
            return
        yield kind, data[at + _header.size : at + length]
        at += length + 3 & ~3


def _read(payload: bytes, names: dict[int, str]) -> Local | None:
    family, prefix, flags, _scope, index = _ifaddrmsg.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attributes: dict[int, bytes] = {}
    at = _ifaddrmsg.size
    while at + _attribute.size <= len(payload):
        length, kind = _attribute.unpack_from(payload, at)
        if length < _attribute.size:
            break
        attributes[kind] = payload[at + _attribute.size : at + length]
        at += length + 3 & ~3
    peer = attributes.get(_IFA_ADDRESS)
    packed = attributes.get(_IFA_LOCAL, peer)  # they differ on a point-to-point link
    if packed is None:
        return None
    if _IFA_FLAGS in attributes:
        flags = struct.unpack("=I", attributes[_IFA_FLAGS])[0]
    return Local(
        packed=packed,
        network=ipaddress.ip_network((peer or packed, prefix), strict=False),
        index=index,
        interface=names.get(index, f"if{index}"),
        usable=not flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED),
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
            link.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
