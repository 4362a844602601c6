"""The packet parser, run in the kernel (BPF_PROG_TEST_RUN) on packets of every kind, and a model in Python."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_parser import gives_a_packet
from machine import own_cgroup

from udpwatch.agent.kernel import bpf, cgroup, loader, records

EXTENSIONS = {0, 43, 44, 51, 60}
MAX_EXTENSIONS = 32
GROUP = ipaddress.IPv6Address("::")  # a request that any address may answer

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
LOOPBACK = 1  # the device of a test run, by its index

Asked = tuple[str, int, str, int]  # peer, peer's port, local address, local port
Remembered = tuple[int, str, int]  # the conversation's tag, local address, local port


def _split(batch: bytes, size: int) -> list[bytes]:
    return [batch[at : at + size] for at in range(0, len(batch), size)]


class Programs:
    """The loaded programs, attached to an empty cgroup: they see only what the test feeds them."""

    def __init__(self, watched: cgroup.Cgroup) -> None:
        self._loaded = loader.load(watched, loader.Limits(max_peers=64, window_ns=1))
        words = struct.unpack("=12I", bpf.map_lookup(self._loaded.maps["hash_keys"], bytes(4), 48) or b"")
        self._keys = list(zip(words[:8:2], words[1:8:2], strict=True))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
            self._scope: int = struct.unpack("=Q", any_.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]

    def ingress(self, packet: bytes) -> Remembered | None:
        """Return what the ingress program remembers of one packet (without Ethernet header); raises on an invalid
        return value.
        """
        version = packet[0] >> 4 if packet else 0
        ethernet = bytes(12) + (b"\x86\xdd" if version == 6 else b"\x08\x00")
        try:
            returned, _ = bpf.program_test_run(self._loaded.programs["ingress"], ethernet + packet, 1)
        except OSError as error:
            if error.errno == errno.EINVAL and len(packet) < 40:
                return None  # newer kernels do not even begin with less than an IP header
            raise
        assert returned == 1
        found = None
        sets, size = self._loaded.maps["conversations"], records.CONVERSATION_SET_BYTES
        for index, raw in enumerate(raw for batch in bpf.array_values(sets, size) for raw in _split(batch, size)):
            each = records.ConversationSet.from_buffer_copy(raw)
            for tag, way in zip(each.tag, each.way, strict=True):
                if tag:
                    assert found is None
                    found = tag, records.decode_address(bytes(way.address)), way.tenant.port
                    bpf.map_update(sets, struct.pack("=I", index), bytes(size))
        return found

    def remembered(self, asked: Asked | None) -> Remembered | None:
        """Return the entry that a request must have: the tag is made from its key as conversations.h does."""
        if asked is None:
            return None
        peer, peer_port, address, port = asked
        words = struct.unpack("=4I", records.encode_address(peer))
        scope = self._scope
        pairs = (scope, scope >> 32), words[:2], words[2:], (peer_port << 16 | port, 0)
        if ipaddress.ip_address(peer).is_link_local and ":" in peer:
            pairs = *pairs[:3], (peer_port << 16 | port, LOOPBACK)
        mixed = sum((a + k) * (b + j) for (a, b), (k, j) in zip(pairs, self._keys, strict=True)) % (1 << 64)
        mixed = (mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 % (1 << 64)
        return (mixed ^ mixed >> 29) | 1, address, port

    def close(self) -> None:
        for group in (self._loaded.links, self._loaded.programs, self._loaded.maps):
            for descriptor in group.values():
                os.close(descriptor)


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    if not gives_a_packet():
        pytest.skip("by design: this kernel's BPF_PROG_TEST_RUN gives cgroup_skb programs no packet")
    with own_cgroup() as path, closing(cgroup.find(str(path))) as watched, closing(Programs(watched)) as made:
        yield made


def model(packet: bytes) -> Asked | None:  # noqa: PLR0911, PLR0912  a specification, one case a line
    """Return what must be remembered by RFC 791, 768 and 8200."""
    if len(packet) < 28:
        return None
    if packet[0] >> 4 == 4:
        if packet[9] != 17 or struct.unpack_from("!H", packet, 6)[0] & 0x1FFF:
            return None
        at = (packet[0] & 15) * 4
        if at < 20:
            return None
        source, destination = (ipaddress.ip_address(packet[i : i + 4]) for i in (12, 16))
        if int(destination) >> 28 >= 14 or destination == ipaddress.IPv4Address("127.255.255.255"):
            destination = GROUP
    elif packet[0] >> 4 == 6 and len(packet) >= 48:
        following, at = packet[6], 40
        for _ in range(MAX_EXTENSIONS):
            if following not in EXTENSIONS:
                break
            if at + 4 > len(packet):
                return None
            if following == 44 and struct.unpack_from("!H", packet, at + 2)[0] & 0xFFF8:
                return None
            length = (
                8
                if following == 44
                else (packet[at + 1] + (2 if following == 51 else 1)) * (4 if following == 51 else 8)
            )
            following, at = packet[at], at + length
        if following != 17:
            return None
        source, destination = (ipaddress.ip_address(packet[i : i + 16]) for i in (8, 24))
        if destination.is_multicast:
            destination = GROUP
    else:
        return None
    if at + 8 > len(packet):
        return None
    peer_port, port = struct.unpack_from("!HH", packet, at)
    return _text(source), peer_port, _text(destination), port


def _text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return records.decode_address(records.encode_address(str(address)))


udp = st.tuples(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=40)).map(
    lambda parts: struct.pack("!HHHH", parts[0], parts[1], 8 + len(parts[2]), 0) + parts[2]
)
protocol = st.one_of(st.just(17), st.integers(0, 255))


@st.composite
def ipv4(draw: st.DrawFn) -> bytes:
    options = draw(st.binary(max_size=40))
    options += bytes(-len(options) % 4)
    fragment = draw(st.one_of(st.just(0), st.just(0x4000), st.just(0x2000), st.integers(0, 0xFFFF)))
    body = draw(udp)
    source, destination = (draw(st.ip_addresses(v=4)).packed for _ in range(2))
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | 5 + len(options) // 4,
        0,
        20 + len(options) + len(body),
        1,
        fragment,
        64,
        draw(protocol),
        0,
        source,
        destination,
    )
    return header + options + body


@st.composite
def ipv6(draw: st.DrawFn) -> bytes:
    chain = draw(st.lists(st.sampled_from(sorted(EXTENSIONS)), max_size=40))
    last = draw(protocol)
    body = b""
    for kind, following in zip(chain, [*chain, last][1:], strict=True):
        units = draw(st.integers(0, 2))
        if kind == 44:
            offset = draw(st.one_of(st.just(0), st.just(1), st.integers(0, 0xFFFF)))
            body += struct.pack("!BBHI", following, 0, offset, 1)
        elif kind == 51:
            length = 4 + 2 * units
            body += struct.pack("!BB", following, length - 2) + bytes(length * 4 - 2)
        else:
            body += struct.pack("!BB", following, units) + bytes(units * 8 + 6)
    body += draw(udp)
    source, destination = (draw(st.ip_addresses(v=6)).packed for _ in range(2))
    first = chain[0] if chain else last
    return struct.pack("!IHBB16s16s", 6 << 28, len(body), first, 64, source, destination) + body


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    packet = bytearray(draw(st.one_of(ipv4(), ipv6())))
    for _ in range(draw(st.integers(0, 4))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    return bytes(packet[: draw(st.integers(1, len(packet)))])


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packet=st.one_of(ipv4(), ipv6(), damaged(), st.binary(min_size=1, max_size=120)))
@example(packet=bytes.fromhex("4500001c000100004011000001020304050607080035003500080000"))
def test_parser_agrees_with_the_model(programs: Programs, packet: bytes) -> None:
    assert programs.ingress(packet) == programs.remembered(model(packet))


def test_parser_remembers_a_request(programs: Programs) -> None:
    """Without this, a parser and a model that never find anything would pass the test above."""
    packet = (
        bytes.fromhex("4500001c0001000040110000") + bytes([10, 0, 0, 9, 10, 0, 0, 1]) + b"\x11\x5c\x00\x35\0\x08\0\0"
    )
    assert model(packet) == ("10.0.0.9", 4444, "10.0.0.1", 53)
    assert programs.ingress(packet) == programs.remembered(model(packet)) is not None
