"""Talk to conntrack over netlink: look up an entry, dump a table, listen to new entries, read the counters.

Messages are decoded here because there are thousands: pyroute2 needs 89 us per entry, this code about 5. Layouts are
those of include/uapi/linux/netfilter/nfnetlink_conntrack.h. A socket belongs to the network namespace of the thread
that creates it. Everything needs CAP_NET_ADMIN, and the first request makes the kernel load the modules of conntrack.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from udpwatch.agent.model import ConntrackHealth, Tuple
from udpwatch.dns.netlink import BUFFER, HEADER, NESTED, Netlink, attribute, attributes, messages

SEEN_REPLY = 2  # IPS_SEEN_REPLY, include/uapi/linux/netfilter/nf_conntrack_common.h
EXPECTED = 1  # IPS_EXPECTED

_NETLINK_NETFILTER = 12
_NEW, _GET, _GET_STATS_CPU, _GET_STATS = 0x100, 0x101, 0x104, 0x105  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_GROUP_NEW = 1  # NFNLGRP_CONNTRACK_NEW
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_SO_ATTACH_FILTER = 26
_GENERAL = struct.Struct("=BBH")  # struct nfgenmsg
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _TIMEOUT, _ZONE = 1, 2, 3, 7, 18  # enum ctattr_type
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3  # enum ctattr_tuple
_GLOBAL_ENTRIES, _MAX_ENTRIES = 1, 2  # enum ctattr_stats_global
_INSERT_FAILED, _DROP, _EARLY_DROP = 9, 10, 11  # enum ctattr_stats_cpu
_BODY = HEADER.size + _GENERAL.size  # where the attributes begin


@dataclass(frozen=True, slots=True)
class Entry:
    """One UDP entry of conntrack."""

    original: Tuple
    reply: Tuple
    status: int
    zone: int
    timeout: int | None  # seconds left; None in an event

    @property
    def family(self) -> int:
        return 6 if ":" in self.original.source else 4


class Overrun(OSError):
    """The kernel dropped events because the buffer of the socket was full."""


def _tuple(raw: memoryview) -> tuple[Tuple | None, int]:
    """Return (tuple, its own zone); the tuple is None if it is not UDP."""
    source = destination = b""
    source_port = destination_port = protocol = zone = 0
    for kind, value in attributes(raw):
        if kind == _TUPLE_IP:
            for which, address in attributes(value):  # CTA_IP_V4_SRC, V4_DST, V6_SRC, V6_DST
                if which in (1, 3):
                    source = bytes(address)
                else:
                    destination = bytes(address)
        elif kind == _TUPLE_PROTO:
            for which, number in attributes(value):  # CTA_PROTO_NUM, SRC_PORT, DST_PORT
                if which == 1:
                    protocol = number[0]
                elif which == 2:
                    source_port = int.from_bytes(number, "big")
                elif which == 3:
                    destination_port = int.from_bytes(number, "big")
        elif kind == _TUPLE_ZONE:
            zone = int.from_bytes(value, "big")
    if protocol != socket.IPPROTO_UDP or not source or not destination:
        return None, zone
    ends = (str(ipaddress.ip_address(address)) for address in (source, destination))
    return Tuple(next(ends), source_port, next(ends), destination_port), zone


def decode(body: memoryview) -> Entry | None:
    """Decode the entry in a message (after struct nfgenmsg); return None if it is not UDP or lacks a direction."""
    tuples: dict[int, Tuple] = {}
    status = zone = 0
    timeout = None
    for kind, value in attributes(body):
        if kind in (_TUPLE_ORIGINAL, _TUPLE_REPLY):
            found, own_zone = _tuple(value)
            if found is None:
                return None
            tuples[kind] = found
            zone = zone or own_zone
        elif kind == _STATUS:
            status = int.from_bytes(value, "big")
        elif kind == _TIMEOUT:
            timeout = int.from_bytes(value, "big")
        elif kind == _ZONE:
            zone = int.from_bytes(value, "big")
    if len(tuples) != 2:
        return None
    return Entry(tuples[_TUPLE_ORIGINAL], tuples[_TUPLE_REPLY], status, zone, timeout)


def _encode_tuple(wanted: Tuple, zone: int) -> bytes:
    source, destination = ipaddress.ip_address(wanted.source), ipaddress.ip_address(wanted.destination)
    first = 1 if source.version == 4 else 3
    addresses = attribute(first, source.packed) + attribute(first + 1, destination.packed)
    protocol = (
        attribute(1, bytes([socket.IPPROTO_UDP]))
        + attribute(2, wanted.source_port.to_bytes(2, "big"))
        + attribute(3, wanted.destination_port.to_bytes(2, "big"))
    )
    both = attribute(_TUPLE_IP | NESTED, addresses) + attribute(_TUPLE_PROTO | NESTED, protocol)
    body = attribute(_TUPLE_ORIGINAL | NESTED, both)
    return body + attribute(_ZONE, zone.to_bytes(2, "big")) if zone else body


class Table:
    """Send requests to the conntrack of one namespace."""

    def __init__(self) -> None:
        """Open a socket in the namespace of the calling thread; raises OSError."""
        self._netlink = Netlink(_NETLINK_NETFILTER)

    def close(self) -> None:
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, wanted: Tuple, zone: int = 0) -> Entry | None:
        """Return the UDP entry that has this tuple in either direction, or None; raises OSError."""
        family = socket.AF_INET6 if ":" in wanted.source else socket.AF_INET
        try:
            for body in self._ask(_GET, family, _encode_tuple(wanted, zone)):
                return decode(body)
        except FileNotFoundError:
            pass
        return None

    def dump(self) -> Iterator[Entry]:
        """Yield every UDP entry of the namespace; raises OSError."""
        for body in self._ask(_GET, socket.AF_UNSPEC, dump=True):
            entry = decode(body)
            if entry:
                yield entry

    def health(self) -> ConntrackHealth:
        """Return the number of entries, their limit and the loss counters (32 bits per CPU); raises OSError."""
        entries, limit = self._size()
        failed = dropped = early = 0
        for body in self._ask(_GET_STATS_CPU, socket.AF_UNSPEC, dump=True):
            values = {kind: int.from_bytes(value, "big") for kind, value in attributes(body)}
            failed += values.get(_INSERT_FAILED, 0)
            dropped += values.get(_DROP, 0)
            early += values.get(_EARLY_DROP, 0)
        return ConntrackHealth(entries, limit, failed, dropped, early)

    def entries(self) -> int:
        """Return the number of entries of the namespace; raises OSError."""
        return self._size()[0]

    def _size(self) -> tuple[int, int]:
        (body,) = self._ask(_GET_STATS, socket.AF_UNSPEC)
        values = {kind: int.from_bytes(value, "big") for kind, value in attributes(body)}
        return values.get(_GLOBAL_ENTRIES, 0), values.get(_MAX_ENTRIES, 0)

    def _ask(self, kind: int, family: int, body: bytes = b"", dump: bool = False) -> Iterator[memoryview]:
        for content in self._netlink.ask(kind, _GENERAL.pack(family, 0, 0) + body, dump):
            yield content[_GENERAL.size :]


def _udp_only() -> bytes:
    """Return a classic BPF filter that accepts only entries whose original tuple is UDP.

    SKF_AD_NLATTR and SKF_AD_NLATTR_NEST find an attribute from the offset in A by the type in X (net/core/filter.c).
    """
    find, nest = 0xFFFFF000 + 12, 0xFFFFF000 + 16  # SKF_AD_OFF + SKF_AD_NLATTR, SKF_AD_NLATTR_NEST
    program = [
        (0x00, 0, 0, _BODY),  # ld #20
        (0x01, 0, 0, _TUPLE_ORIGINAL),  # ldx #CTA_TUPLE_ORIG
        (0x20, 0, 0, find),  # ld nlattr
        (0x15, 7, 0, 0),  # jeq #0, keep: not an entry
        (0x01, 0, 0, _TUPLE_PROTO),
        (0x20, 0, 0, nest),
        (0x01, 0, 0, 1),  # ldx #CTA_PROTO_NUM
        (0x20, 0, 0, nest),
        (0x07, 0, 0, 0),  # tax
        (0x50, 0, 0, 4),  # ldb [x + 4]
        (0x15, 0, 1, socket.IPPROTO_UDP),  # jeq #17, keep, drop
        (0x06, 0, 0, 0xFFFFFFFF),  # keep: ret #-1
        (0x06, 0, 0, 0),  # drop: ret #0
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class Listener:
    """Receive the new UDP entries of one namespace."""

    def __init__(self, buffer_bytes: int) -> None:
        """Listen in the namespace of the calling thread; raises OSError."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 0))
            self.resize(buffer_bytes)
            code = _udp_only()
            held = ctypes.create_string_buffer(code, len(code))
            program = struct.pack("HL", len(code) // 8, ctypes.addressof(held))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NEW)
        except OSError:
            self._socket.close()
            raise

    def resize(self, buffer_bytes: int) -> None:
        """Set the size of the receive buffer, which the kernel doubles; raises OSError."""
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[Entry]:
        """Yield the waiting entries. Raise Overrun if events were dropped; waiting entries can still be read."""
        while True:
            try:
                raw = self._socket.recv(BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overrun(error.errno, "conntrack sent events faster than they were read") from None
                raise
            for kind, content in messages(raw):
                if kind == _NEW:
                    entry = decode(content[_GENERAL.size :])
                    if entry:
                        yield entry
