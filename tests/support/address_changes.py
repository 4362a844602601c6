"""Add and remove addresses of a namespace without a process for each, thousands a second."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Self

from scene import ask
from waiting import wait_for

from udpwatch.agent.testing.lab import Namespace
from udpwatch.dns.netlink import BUFFER, HEADER, attribute, messages

_NEW, _DELETE = 20, 21  # RTM_NEWADDR, RTM_DELADDR
_REQUEST, _ACKNOWLEDGE, _CREATE, _EXCLUSIVE = 0x1, 0x4, 0x400, 0x200  # NLM_F_*
_LOCAL, _ADDRESS = 2, 1  # IFA_LOCAL, IFA_ADDRESS
_NODAD = 0x02  # IFA_F_NODAD
_ERROR = 2  # NLMSG_ERROR


class AddressChanges:
    """A netlink socket in a namespace; a context manager. Prefixes are of /32 and /128, so nothing else changes."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with namespace.entered():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self._index = socket.if_nametoindex(device)
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add(self, address: str) -> None:
        """Add an address without duplicate address detection. Raises OSError."""
        self._change(_NEW, _CREATE | _EXCLUSIVE, address)

    def remove(self, address: str) -> None:
        """Remove an address; it is gone when this returns. Raises OSError."""
        self._change(_DELETE, 0, address)

    def _change(self, kind: int, flags: int, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        raw = socket.inet_pton(family, address)
        body = struct.pack("=BBBBI", family, len(raw) * 8, _NODAD, 0, self._index)
        body += attribute(_LOCAL, raw) + attribute(_ADDRESS, raw)
        flags |= _REQUEST | _ACKNOWLEDGE
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
        for what, content in messages(self._socket.recv(BUFFER)):
            code = struct.unpack_from("=i", content)[0] if what == _ERROR else 0
            if code:
                raise OSError(-code, os.strerror(-code))
        self.count += 1


def ask_new(node: Namespace, client: socket.socket, address: str, port: int, server: socket.socket) -> tuple[str, int]:
    """Ask at a new address; returns the client's. The kernel routes to a new IPv6 address only after a moment, and NAT
    would remember where it has forwarded the first request.
    """

    def is_heard(probe: socket.socket) -> bool:
        probe.sendto(b"request", (address, port))
        return bool(select.select([server], [], [], 0.2)[0])

    with node.socket(client.family) as probe:
        wait_for(lambda: is_heard(probe), "the node to hear itself")
    while select.select([server], [], [], 0)[0]:
        server.recvfrom(100)
    return ask(client, address, port, server)[1]
