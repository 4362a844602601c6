"""Count the datagrams to and from one port at the devices of a network namespace, before any firewall sees them.

Rules
1. A packet socket with a filter of its own reads nothing but the headers of this port's datagrams.
2. A request counts where it arrives and a reply where it leaves. A packet that passes several devices counts once:
   devices that belong to another (ports of a bridge or a bond) and tagged packets of a VLAN are left out. A VRF is left
   out, and its devices are not: the kernel shows what arrives for a VRF only to sockets that are bound to it.
3. Memory is bounded: MAX_CONVERSATIONS, MAX_PACKETS. What is beyond counts as missed.
4. Not counted: fragments but the first, IPv6 datagrams with extension headers, and what a host asks itself in a VRF.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from udpwatch.agent.kernel.interfaces import links

MAX_PACKETS = 50_000  # read in one look: half a second of CPU time
MAX_CONVERSATIONS = 4_096
MAX_LINKS = 4_096
_BUFFER_BYTES = 4 << 20
_SNAP_BYTES = 128
_ALL = 3  # ETH_P_ALL
_ATTACH_FILTER, _RCVBUFFORCE, _SOL_PACKET, _STATISTICS = 26, 33, 263, 6
_BROADCAST, _MULTICAST, _OTHERHOST, _OUTGOING, _LOOPBACK = 1, 2, 3, 4, 5  # PACKET_*, include/uapi/linux/if_packet.h
_libc = ctypes.CDLL(None, use_errno=True)
_AUXILIARY = 0xFFFFF000  # SKF_AD_OFF


@dataclass(slots=True)
class Conversation:
    """The datagrams of one peer and one address that it asked."""

    peer: str
    peer_port: int
    address: str  # that the peer asked
    device: str  # on which its newest request arrived
    group: bool  # the address is a broadcast or multicast address
    requests: int = 0
    replies: int = 0  # from the address that was asked
    wrong: dict[str, int] = field(default_factory=dict)  # replies from other addresses, by address


@dataclass(slots=True)
class _Peer:
    """The conversations of one peer."""

    by_address: dict[str, Conversation] = field(default_factory=dict)  # the newest is the last
    group: Conversation | None = None  # the newest with a broadcast or multicast address


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a tap saw."""

    conversations: tuple[Conversation, ...]
    missed: int = 0  # datagrams of which only the number is known

    @property
    def requests(self) -> int:
        return sum(each.requests for each in self.conversations)


def _filter(port: int) -> bytes:
    """Return a classic BPF filter that accepts datagrams that arrive for the port or leave from it."""
    drop, keep = "drop", "keep"
    program = [  # label, code, jump if true, jump if false ("": the next one), operand
        ("", 0x20, "", "", _AUXILIARY + 48),  # ld vlan tag present
        ("", 0x15, "", drop, 0),
        ("", 0x20, "", "", _AUXILIARY + 0),  # ld protocol
        ("", 0x15, "v6", "", 0x86DD),
        ("", 0x15, "", drop, 0x0800),
        ("", 0x30, "", "", 9),  # ldb protocol of the datagram
        ("", 0x15, "", drop, socket.IPPROTO_UDP),
        ("", 0x28, "", "", 6),  # ldh fragment offset
        ("", 0x45, drop, "", 0x1FFF),
        ("", 0xB1, "", "", 0),  # ldxb 4 * (header length)
        ("", 0x20, "", "", _AUXILIARY + 0),
        ("", 0x15, "ports", "", 0x0800),
        ("v6", 0x30, "", "", 6),  # ldb next header
        ("", 0x15, "", drop, socket.IPPROTO_UDP),
        ("", 0x01, "", "", 40),  # ldx #40
        ("ports", 0x20, "", "", _AUXILIARY + 4),  # ld packet type
        ("", 0x15, drop, "", _OTHERHOST),
        ("", 0x15, drop, "", _LOOPBACK),
        ("", 0x15, "out", "", _OUTGOING),
        ("", 0x48, "", "", 2),  # ldh destination port
        ("", 0x15, keep, drop, port),
        ("out", 0x48, "", "", 0),  # ldh source port
        ("", 0x15, keep, drop, port),
        (keep, 0x06, "", "", _SNAP_BYTES),
        (drop, 0x06, "", "", 0),
    ]
    place = {label: index for index, (label, *_) in enumerate(program) if label}
    code = b""
    for index, (_, operation, yes, no, operand) in enumerate(program, start=1):
        jumps = (place[label] - index if label else 0 for label in (yes, no))
        code += struct.pack("=HBBI", operation, *jumps, operand)
    return code


class Tap:
    """A packet socket in the namespace of the thread that creates it. `read` it often, or datagrams are missed."""

    def __init__(self, port: int) -> None:
        """Begin to count. Raises OSError (EPERM without CAP_NET_RAW)."""
        self._parts = _parts()
        self._by_peer: dict[tuple[str, int], _Peer] = {}
        self._read = self._conversations = self._missed = 0
        # Protocol 0: the socket receives nothing until it is bound, when its filter is in place.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
        try:
            code = _filter(port)
            held = ctypes.create_string_buffer(code, len(code))
            program = struct.pack("HL", len(code) // 8, ctypes.addressof(held))
            self._socket.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER_BYTES)
            _bind_to_all(self._socket.fileno())
        except BaseException:
            self._socket.close()
            raise

    @property
    def requests(self) -> int:
        """How many requests it has counted."""
        return sum(each.requests for each in self._found())

    def read(self) -> None:
        """Count what has arrived since the last call."""
        while self._read < MAX_PACKETS:
            try:
                data, (device, _, kind, _, _) = self._socket.recvfrom(_SNAP_BYTES)
            except BlockingIOError:
                return
            except OSError:
                return  # ENETDOWN: a device was removed or set down
            self._read += 1
            if device not in self._parts:
                self._count(data, device, kind)

    def finish(self) -> Traffic:
        """Count the rest, close the socket and return everything."""
        self.read()
        found = list(self._found())
        packets, dropped = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        self.close()
        # The kernel counts those that it dropped among the packets, too.
        return Traffic(tuple(found), self._missed + max(dropped, packets - self._read))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, data: bytes, device: str, kind: int) -> None:
        source, source_port, destination, port = _addresses(data)
        if kind == _OUTGOING:
            self._count_reply(source, destination, port)
            return
        peer = self._by_peer.get((source, source_port))
        found = peer.by_address.pop(destination, None) if peer else None
        if found is None:
            if self._conversations >= MAX_CONVERSATIONS:
                self._missed += 1
                return
            self._conversations += 1
            found = Conversation(source, source_port, destination, device, kind in (_BROADCAST, _MULTICAST))
        if peer is None:
            peer = self._by_peer[source, source_port] = _Peer()
        peer.by_address[destination] = found
        if found.group:
            peer.group = found
        found.device = device
        found.requests += 1

    def _count_reply(self, source: str, peer: str, peer_port: int) -> None:
        asked = self._by_peer.get((peer, peer_port))
        if not asked:
            return  # to a peer that did not ask while this looked
        right = asked.by_address.get(source, asked.group)
        if right:
            right.replies += 1
        else:
            newest = next(reversed(asked.by_address.values()))
            newest.wrong[source] = newest.wrong.get(source, 0) + 1

    def _found(self) -> Iterator[Conversation]:
        return (each for peer in self._by_peer.values() for each in peer.by_address.values())


def _bind_to_all(fd: int) -> None:
    """Receive from all devices. Before Python 3.12, socket.bind() requires the name of one."""
    address = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ALL), 0, 0, 0, 0)
    if _libc.bind(fd, address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _addresses(data: bytes) -> tuple[str, int, str, int]:
    if data[0] >> 4 == 4:
        ports = (data[0] & 15) * 4
        source, destination = (socket.inet_ntop(socket.AF_INET, data[at : at + 4]) for at in (12, 16))
    else:
        ports = 40
        source, destination = (str(ipaddress.IPv6Address(data[at : at + 16])) for at in (8, 24))
    source_port, port = struct.unpack_from("!HH", data, ports)
    return source, source_port, destination, port


def _parts() -> frozenset[str]:
    """Return the names of the devices whose packets also pass another device; raises OSError."""
    found = links(MAX_LINKS)
    vrfs = {link.index for link in found if link.kind == "vrf"}
    return frozenset(link.name for link in found if link.index in vrfs or (link.master and link.master not in vrfs))
