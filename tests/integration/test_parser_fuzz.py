"""The packet parser in the kernel (BPF_PROG_TEST_RUN) on hostile packets, beside dpkt's.

Each difference is a failure unless EXPLAINED names it. `UDPWATCH_FUZZ=1` (`make fuzz`) compares a million packets;
UDPWATCH_FUZZ_SEED=N repeats a run.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count, islice

import dpkt
import pytest
from fuzzing import LONG
from hostile_packets import Packets
from kernel_parser import BATCH, Feed, KernelParser, Parsed, gives_a_packet
from sensors import IN_MATRIX

NUMBER = 1_000_000 if LONG else 4_000 if IN_MATRIX else 10_000
SEED = int(os.environ.get("UDPWATCH_FUZZ_SEED") or secrets.randbits(32))
MAX_EXTENSIONS = 32  # IP6_EXTENSIONS in bpf/packet.h
LINEAR = 48  # the kernel has the headers of each UDP packet in its linear part before it comes to a hook

Found = tuple[bytes, int, bytes, int]  # source, its port, destination, its port


@pytest.fixture(scope="module", params=[True, False], ids=["reads memory", "does not read memory"])
def parser(request: pytest.FixtureRequest) -> Iterator[KernelParser]:
    """The parser as compiled for kernels whose memory the programs may read, and for others."""
    if not gives_a_packet():
        pytest.skip("by design: this kernel's BPF_PROG_TEST_RUN gives cgroup_skb programs no packet")
    with KernelParser(request.param) as made:
        yield made


class _Ip(dpkt.ip.IP):  # type: ignore[misc]
    _protosw = {17: dpkt.udp.UDP}  # noqa: RUF012  dpkt's way


class _Ip6(dpkt.ip6.IP6):  # type: ignore[misc]
    _protosw = _Ip._protosw


# dpkt asks the last extension header for this if the first one is a fragment header.
dpkt.ip6.IP6ExtensionHeader.frag_off = 0


def by_dpkt(packet: bytes) -> Found | None:
    """Return what dpkt finds of a UDP datagram."""
    try:
        ip = _read(packet)
    except dpkt.UnpackError:
        return None
    if ip is None or not isinstance(ip.data, dpkt.udp.UDP):
        return None
    # dpkt looks at the fragment's offset only if the fragment header comes first.
    if any(each.frag_off for each in _extensions(ip)):
        return None
    return _mapped(ip.src), ip.data.sport, _mapped(ip.dst), ip.data.dport


def _read(packet: bytes) -> dpkt.Packet | None:
    version = packet[0] >> 4
    return _Ip(packet) if version == 4 else _Ip6(packet) if version == 6 else None


def _extensions(ip: dpkt.Packet) -> list[dpkt.Packet]:
    return getattr(ip, "all_extension_headers", [])


def _mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


def _without_length(packet: bytes) -> bytes:
    """Set the length field of IP to 0: dpkt then reads all that there is."""
    at = 2 if packet[0] >> 4 == 4 else 4
    return packet[:at] + bytes(2) + packet[at + 2 :]


def has_wrong_length(packet: bytes, ours: Parsed) -> bool:
    """The length of IP ends before the UDP header. The kernel drops or trims such packets before the hook."""
    return ours.is_udp and by_dpkt(_without_length(packet)) == _found(ours)


def has_many_extensions(packet: bytes, ours: Parsed) -> bool:
    """The parser stops, and counts the packet as one that it cannot parse."""
    ip = _read(packet)
    return not ours.is_udp and ours.unparsed == 1 and ip is not None and len(_extensions(ip)) > MAX_EXTENSIONS


#: a difference -> whether it is the one
EXPLAINED: dict[str, Callable[[bytes, Parsed], bool]] = {
    "wrong length": has_wrong_length,
    "more than 32 extension headers": has_many_extensions,
}


def _found(ours: Parsed) -> Found | None:
    return (ours.source, ours.source_port, ours.destination, ours.destination_port) if ours.is_udp else None


def feeds_of(seed: int, makes_pages: bool) -> Iterator[Feed]:
    """Yield packets for ever; some of GSO, and, where the kernel can make them, some that are partly in pages."""
    packets = Packets(seed)
    for index in count():
        packet = packets.packet()[:2000]
        segments = index % 70 if index % 7 == 0 else 0
        linear = LINEAR + index % 30 if makes_pages and index % 4 == 0 else 0
        yield Feed(packet, segments, linear if linear < len(packet) else 0)


def _compare(feed: Feed, ours: Parsed, seed: int) -> str:
    """Return how both agree, or the explained difference."""
    theirs = by_dpkt(feed.packet)
    assert ours.unparsed <= (not ours.is_udp)
    if theirs == _found(ours):
        assert not ours.is_udp or ours.segments == (feed.segments or 1), feed
        return "udp" if theirs else "not udp"
    for reason, applies in EXPLAINED.items():
        if applies(feed.packet, ours):
            return reason
    raise AssertionError(f"seed {seed}, packet {feed.packet.hex()} ({feed}): dpkt finds {theirs}, the kernel {ours}")


@pytest.mark.parametrize("seed", [SEED] if LONG else [19, SEED], ids=["random"] if LONG else ["fixed", "random"])
def test_parser_agrees_with_dpkt(parser: KernelParser, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    source, compared = feeds_of(seed, parser.makes_pages), 0
    while compared < NUMBER:
        feeds = list(islice(source, BATCH))
        for feed, ours in zip(feeds, parser.parse(feeds), strict=True):
            if ours is None:  # newer kernels do not even begin with less than an IP header
                assert len(feed.packet) < 40, feed
                continue
            compared += 1
            counts[_compare(feed, ours, seed)] += 1
            counts["unparsed"] += ours.unparsed
            counts["in pages"] += bool(feed.linear)
    rate = compared / (time.monotonic() - begin)
    with capsys.disabled() if LONG else nullcontext():  # else it is shown if the test fails
        print(f"\nUDPWATCH_FUZZ_SEED={seed}: {compared:,} packets compared, {rate:,.0f} a second: {dict(counts)}")
    # Without these, parsers that never find anything would pass.
    assert counts["udp"] > compared / 4
    assert counts["not udp"] > compared / 4
    assert all(counts[reason] for reason in (*EXPLAINED, "unparsed")), counts
    assert bool(counts["in pages"]) == parser.makes_pages


V4, V6 = "0a0000090a000001", "fd00" + "00" * 13 + "09" + "fd00" + "00" * 13 + "01"


@pytest.mark.parametrize(
    ("packet", "unparsed"),
    [
        ("44000028000100004011" + "0000" + V4 + "115c003500080000" * 3, 0),  # a header of 16 bytes
        ("4900002b000100004011" + "0000" + V4 + "01" * 16 + "115c0035000800", 1),
        ("60000000000f3c40" + V6 + "1100010400000000" + "115c0035000800", 1),
        ("6000000000113c40" + V6 + "1102010400000000" + "115c003500080000", 1),  # 24 bytes of options
    ],
)
def test_packet_without_a_whole_header_is_no_datagram(parser: KernelParser, packet: str, unparsed: int) -> None:
    """A raw socket may send them."""
    assert list(parser.parse([Feed(bytes.fromhex(packet))])) == [Parsed(False, unparsed)]


def test_headers_in_pages_are_read(parser: KernelParser) -> None:
    """Extension headers reach beyond the part of a packet that the program can read itself."""
    if not parser.makes_pages:
        pytest.skip("by design: this kernel's BPF_PROG_TEST_RUN makes no packets with pages (since Linux 6.19)")
    options, datagram = "1110" + "00" * 134, "115c003500080000"
    packet = bytes.fromhex("6000000000903c40" + V6 + options + datagram)
    (whole, split) = parser.parse([Feed(packet), Feed(packet, linear=LINEAR)])
    assert whole == split
    assert split is not None and split.is_udp and split.destination_port == 53
