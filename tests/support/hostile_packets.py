"""Packets as no peer should send them: IPv4 and IPv6 with UDP in everything, then mutated.

The packets of one seed are always the same ones.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

UDP = 17
#: IPv6 extension headers, and what stands where one may: ESP, no next header, mobility, HIP, shim6, UDP-Lite, IP in IP
_EXTENSIONS = (0, 43, 44, 51, 60)
_ODD_HEADERS = (50, 59, 135, 139, 140, 136, 4, 41)
_PROTOCOLS = (*(UDP,) * 40, 1, 6, 58, 4, 41, 0, 255, *_EXTENSIONS, *_ODD_HEADERS)
#: bytes that parsers handle specially: versions with header lengths, protocols, flags and offsets of fragments
_ODD_BYTES = (0, 1, 2, 4, 7, 8, 17, 43, 44, 51, 60, 0x1F, 0x20, 0x40, 0x44, 0x45, 0x46, 0x4F, 0x60, 0x80, 0xFE, 0xFF)
_ODD_LENGTHS = (0, 1, 7, 8, 19, 20, 27, 28, 39, 40, 41, 47, 48, 0x7FFF, 0xFFFF)
_FRAGMENTS = (*(0,) * 12, 0x4000, 0x4000, 0x2000, 0x2001, 1, 0x1FFF, 0x8000, 0xFFFF)  # IPv4: flags and offset
_FRAGMENTS_6 = (*(0,) * 12, *(1,) * 8, 6, 8, 9, 0xFFF8, 0xFFFF)  # the same of IPv6: offset, then flags

Addresses = Sequence[bytes]


class Packets:
    """A source of packets, without link headers."""

    def __init__(self, seed: int, sources: Addresses = (), destinations: Addresses = (), ports: Sequence[int] = ()):
        """``sources``, ``destinations`` and ``ports`` (of the destination) are used most of the time."""
        self._random = random.Random(seed)  # noqa: S311  tests
        self._sources, self._destinations, self._ports = sources, destinations, ports

    def packet(self) -> bytes:
        """Return the next one: of any length from 1 byte."""
        draw = self._random.random()
        if draw < 0.02:
            return self._random.randbytes(self._random.randrange(1, 120))
        packet = self._ip(2)
        return self._mutated(packet) if draw < 0.6 else packet

    def _ip(self, depth: int) -> bytes:
        return self._ipv4(depth) if self._random.random() < 0.45 else self._ipv6(depth)

    def _ipv4(self, depth: int) -> bytes:
        pick = self._random
        options = pick.randbytes(4 * pick.randrange(1, 11)) if pick.random() < 0.3 else b""
        protocol = pick.choice(_PROTOCOLS)
        body = self._body(protocol, depth)
        whole = 20 + len(options) + len(body)
        source, destination = self._pair(4)
        header = struct.pack(
            "!BBHHHBBH4s4s",
            0x45 + len(options) // 4,
            pick.choice((0, 0, 0xB8, 0xFF)),
            self._length(whole),
            pick.getrandbits(16),
            pick.choice(_FRAGMENTS),
            pick.choice((64, 1, 255, 0)),
            protocol,
            0,
            source,
            destination,
        )
        checksum = checksum_of(header + options)
        return header[:10] + struct.pack("!H", checksum) + header[12:] + options + body

    def _ipv6(self, depth: int) -> bytes:
        pick = self._random
        draw = pick.random()
        count = 0 if draw < 0.3 else pick.randrange(1, 5) if draw < 0.9 else pick.choice((8, 16, 31, 32, 33, 40))
        chain = [pick.choice(_EXTENSIONS if pick.random() < 0.98 else _ODD_HEADERS) for _ in range(count)]
        last = pick.choice(_PROTOCOLS)
        headers = [self._extension(kind, next_) for kind, next_ in zip(chain, [*chain, last][1:], strict=True)]
        source, destination = self._pair(6)
        body = self._body(last, depth)
        if last == UDP and len(body) >= 8 and pick.random() < 0.3:  # IPv6 drops datagrams without a right checksum
            body = with_checksum(source, destination, body)
        body = b"".join(headers) + body
        first = chain[0] if chain else last
        length = self._length(len(body))
        if chain and first == 0 and pick.random() < 0.1:  # a jumbogram (RFC 2675)
            length, body = 0, bytes([body[0], 0, 0xC2, 4]) + struct.pack("!I", len(body)) + body[8:]
        flow = pick.choice((0, 0, pick.getrandbits(28)))
        return struct.pack("!IHBB16s16s", 6 << 28 | flow, length, first, 64, source, destination) + body

    def _extension(self, kind: int, next_: int) -> bytes:
        pick = self._random
        if kind == 44:
            return struct.pack("!BBHI", next_, 0, pick.choice(_FRAGMENTS_6), pick.getrandbits(32))
        units = pick.choice((0, 0, 0, 1, 2, 4))
        if kind == 51:
            return struct.pack("!BB", next_, units * 2 + 1) + pick.randbytes(units * 8 + 10)
        if kind == 43:
            return struct.pack("!BBBB", next_, units, pick.choice((0, 2, 3, 4)), 0) + pick.randbytes(units * 8 + 4)
        size = units * 8 + 6
        padding = b"\x01" + bytes([min(size - 2, 255)]) + bytes(size - 2)
        return struct.pack("!BB", next_, units) + (padding if pick.random() < 0.7 else pick.randbytes(size))

    def _body(self, protocol: int, depth: int) -> bytes:
        pick = self._random
        if protocol in (4, 41) and depth:
            return self._ip(depth - 1)
        data = pick.randbytes(pick.choice((0, 1, 4, 12, 40)))
        if protocol != UDP and pick.random() < 0.5:
            return data
        ports = pick.choice(self._ports) if self._ports and pick.random() < 0.8 else pick.getrandbits(16)
        checksum = pick.choice((0, 0, 0xFFFF, pick.getrandbits(16)))
        return struct.pack("!HHHH", pick.getrandbits(16), ports, self._length(8 + len(data)), checksum) + data

    def _pair(self, version: int) -> tuple[bytes, bytes]:
        size = 4 if version == 4 else 16
        pair = []
        for known in (self._sources, self._destinations):
            fitting = [each for each in known if len(each) == size]
            if fitting and self._random.random() < 0.9:
                pair.append(self._random.choice(fitting))
            else:
                pair.append(self._random.randbytes(size))
        return pair[0], pair[1]

    def _length(self, right: int) -> int:
        draw = self._random.random()
        if draw < 0.85:
            return min(right, 0xFFFF)
        if draw < 0.93:
            return self._random.choice(_ODD_LENGTHS)
        return max(0, min(0xFFFF, right + self._random.randrange(-40, 40)))

    def _mutated(self, packet: bytes) -> bytes:
        pick = self._random
        data = bytearray(packet)
        for _ in range(pick.randrange(1, 4)):
            at = pick.randrange(len(data)) if pick.random() < 0.5 else pick.randrange(min(len(data), 60))
            draw = pick.randrange(8)
            if draw < 3:
                data[at] = pick.choice(_ODD_BYTES)
            elif draw == 3:
                data[at] ^= 1 << pick.randrange(8)
            elif draw == 4:
                del data[max(at, 1) :]
            elif draw == 5 and len(data) > 8:
                del data[at : at + pick.randrange(1, 8)]
            elif draw == 6:
                data[at:at] = pick.randbytes(pick.randrange(1, 9))
            else:
                data[at:at] = data[at : at + pick.randrange(1, 40)]
        return bytes(data) or b"\0"


def request_packets(source: bytes, destination: bytes, ports: tuple[int, int], data: bytes, turn: int) -> list[bytes]:
    """Return a datagram as it may well be sent: every third one behind options, every fifth one in two fragments.

    ``data`` has 9 bytes or more.
    """
    datagram = with_checksum(source, destination, struct.pack("!HHHH", *ports, 8 + len(data), 0) + data)
    split = turn % 5 == 0
    parts = [(0, datagram[:16]), (2, datagram[16:])] if split else [(0, datagram)]
    packets = []
    for offset, part in parts:
        more = split and not offset
        if len(source) == 4:
            options = b"\x01" * (4 * (turn % 3 == 0))  # no operation
            first, length = 0x45 + len(options) // 4, 20 + len(options) + len(part)
            header = struct.pack("!BBHHHBB2x", first, 0, length, turn & 0xFFFF, more << 13 | offset, 64, UDP)
            header += source + destination + options
            packets.append(header[:10] + struct.pack("!H", checksum_of(header)) + header[12:] + part)
        else:
            chain, next_ = b"", UDP
            if split:
                chain, next_ = struct.pack("!BBHI", UDP, 0, offset << 3 | more, turn), 44
            if turn % 3 == 0:
                chain, next_ = destination_options(next_) + chain, 60
            header = struct.pack("!IHBB", 6 << 28, len(chain + part), next_, 64)
            packets.append(header + source + destination + chain + part)
    return packets


def deep_packet(source: bytes, destination: bytes, ports: tuple[int, int], data: bytes, headers: int) -> bytes:
    """Return an IPv6 packet with a datagram behind so many headers of destination options."""
    datagram = with_checksum(source, destination, struct.pack("!HHHH", *ports, 8 + len(data), 0) + data)
    chain = destination_options(60) * (headers - 1) + destination_options(UDP)
    header = struct.pack("!IHBB", 6 << 28, len(chain + datagram), 60, 64)
    return header + source + destination + chain + datagram


def destination_options(next_: int) -> bytes:
    """Return the smallest header of destination options: padding."""
    return bytes([next_, 0, 1, 4, 0, 0, 0, 0])


def with_checksum(source: bytes, destination: bytes, datagram: bytes) -> bytes:
    """Set the checksum of a UDP datagram."""
    datagram = datagram[:6] + bytes(2) + datagram[8:]
    checksum = checksum_of(source + destination + struct.pack("!II", len(datagram), UDP) + datagram)
    return datagram[:6] + struct.pack("!H", checksum or 0xFFFF) + datagram[8:]


def checksum_of(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) & 1 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
