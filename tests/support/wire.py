"""What leaves a namespace, captured where it arrives, with the time of each packet."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from udpwatch.agent.testing.lab import Namespace

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35  # include/uapi/asm-generic/socket.h; the type of its message is the same
_RECEIVE_BYTES = 64 << 20
_IP, _IPV6 = 0x0800, 0x86DD
_UDP, _FRAGMENT = 17, 44


@dataclass(frozen=True, slots=True)
class Datagram:
    """A UDP packet, or its first fragment."""

    time: float  # seconds since the epoch, when the device received it
    source: str
    source_port: int
    destination: str
    port: int


class Wire:
    """Captures all packets that arrive at a device; a context manager."""

    def __init__(self, namespace: Namespace, device: str = "eth0") -> None:
        with namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            self._socket.setsockopt(socket.SOL_SOCKET, 33, _RECEIVE_BYTES)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.bind((device, _ETH_P_ALL))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def read(self) -> Iterator[Datagram]:
        """Yield what has arrived since the last call; raises AssertionError if packets were lost."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, control, _, sender = self._socket.recvmsg(128, 128)
                if sender[2] == socket.PACKET_OUTGOING:
                    continue
                (found,) = [value for _, kind, value in control if kind == _SO_TIMESTAMPNS]
                seconds, nanoseconds = struct.unpack("=qq", found)
                datagram = _datagram(frame, seconds + nanoseconds / 1e9)
                if datagram:
                    yield datagram
        statistics = self._socket.getsockopt(263, 6, 8)  # PACKET_STATISTICS, which it sets to 0
        assert not struct.unpack("=II", statistics)[1], "the capture lost packets"


def _datagram(frame: bytes, time: float) -> Datagram | None:
    kind, ip = int.from_bytes(frame[12:14]), frame[14:]
    if kind == _IP:
        if ip[9] != _UDP or int.from_bytes(ip[6:8]) & 0x1FFF:
            return None
        source, destination = (socket.inet_ntop(socket.AF_INET, ip[at : at + 4]) for at in (12, 16))
        udp = ip[(ip[0] & 0xF) * 4 :]
    elif kind == _IPV6:
        source, destination = (socket.inet_ntop(socket.AF_INET6, ip[at : at + 16]) for at in (8, 24))
        protocol, udp = ip[6], ip[40:]
        if protocol == _FRAGMENT and not int.from_bytes(udp[2:4]) & 0xFFF8:
            protocol, udp = udp[0], udp[8:]
        if protocol != _UDP:
            return None
    else:
        return None
    source_port, port = struct.unpack_from("!HH", udp)
    return Datagram(time, source, source_port, destination, port)
