"""A UDP socket without a kernel: the server reads datagrams that a test puts in, and the test reads what it sends."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections import deque
from dataclasses import dataclass
from itertools import count

from udpwatch.dns.udp_socket import (
    BATCH,
    CONTROL_BYTES,
    HEADER_WORDS,
    LAYOUTS,
    LEN_WORD,
    NAME_BYTES,
    SLOT,
    Batch,
    UdpSocket,
)

_descriptors = count(1_000_000)  # none of this process


@dataclass(frozen=True)
class Datagram:
    """A query from a client, as recvmmsg(2) reports it."""

    data: bytes
    client: str
    port: int = 5353
    asked: str = "10.1.0.1"  # the address in the packet
    index: int = 2  # of the interface
    source: str = ""  # ipi_spec_dst; "": the address that was asked


@dataclass(frozen=True)
class Sent:
    """A response, as sendmmsg(2) would send it."""

    data: bytes
    client: str
    port: int
    source: str  # the address it leaves from
    index: int


class UdpDouble(UdpSocket):
    """Implements the calls of `UdpSocket` that `UdpServer` uses."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET, checked: bool = False) -> None:
        self.family, self.checked, self.layout = family, checked, LAYOUTS[family]
        self.inbox: deque[Datagram] = deque()
        self.sent: list[Sent] = []
        self.batches: list[int] = []  # datagrams per call of receive
        self.sends: list[int] = []  # responses per call of send_batch
        self.failing = 0  # so many sends fail
        self.fd = next(_descriptors)
        self.closed = False

    def put(self, *datagrams: Datagram) -> None:
        """Let datagrams arrive."""
        self.inbox += datagrams

    def receive(self, batch: Batch) -> int:
        arrived = min(len(self.inbox), BATCH)
        for slot in range(arrived):
            datagram = self.inbox.popleft()
            data = datagram.data[:SLOT]
            batch.data[slot * SLOT : slot * SLOT + len(data)] = data
            batch.lengths[slot * HEADER_WORDS + LEN_WORD] = len(data)
            name, control = self._name(datagram), self._control(datagram)
            batch.names[slot * NAME_BYTES : slot * NAME_BYTES + len(name)] = name
            batch.control[slot * CONTROL_BYTES : slot * CONTROL_BYTES + len(control)] = control
        if arrived:
            self.batches.append(arrived)
        return arrived

    def send_batch(self, batch: Batch, first: int, count: int) -> int:
        failed = min(self.failing, count)
        self.failing -= failed
        self.sends.append(count)
        for slot in range(first + failed, first + count):
            length = batch.answer_lengths[4 * slot + 3]
            data = batch.data[slot * SLOT :][:2] + batch.answers[slot * SLOT :][:length]
            name = batch.names[slot * NAME_BYTES :][: self.layout.name_bytes]
            control = batch.control[slot * CONTROL_BYTES :][: self.layout.control_bytes]
            self._record(data, name, control)
        return failed

    def close(self) -> None:
        self.closed = True

    def _name(self, datagram: Datagram) -> bytes:
        packed = ipaddress.ip_address(datagram.client).packed
        if self.family == socket.AF_INET:
            return struct.pack("=H", socket.AF_INET) + struct.pack("!H", datagram.port) + packed + bytes(8)
        return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", datagram.port, 0) + packed + bytes(4)

    def _control(self, datagram: Datagram) -> bytes:
        asked = ipaddress.ip_address(datagram.asked).packed
        index = struct.pack("=i", datagram.index)
        if self.family == socket.AF_INET:
            source = ipaddress.ip_address(datagram.source or datagram.asked).packed
            return struct.pack("=Qii", 28, socket.IPPROTO_IP, 8) + index + source + asked + bytes(4)
        return struct.pack("=Qii", 36, socket.IPPROTO_IPV6, 50) + asked + index + bytes(4)

    def _record(self, data: bytes, name: bytes, control: bytes) -> None:
        client = str(ipaddress.ip_address(name[self.layout.address]))
        (port,) = struct.unpack("!H", name[2:4])
        (index,) = struct.unpack("=i", control[self.layout.index])
        # IPv4 leaves from ipi_spec_dst, IPv6 from ipi6_addr (ip(7), ipv6(7)).
        source = control[20:24] if self.family == socket.AF_INET else control[16:32]
        self.sent.append(Sent(data, client, port, str(ipaddress.ip_address(source)), index))
