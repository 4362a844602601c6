"""The usual response, read at once: the same as when it is parsed, or left to the parser."""

from __future__ import annotations

import random
import struct

import dns_messages as m
import pytest

from udpwatch.dns.cache_entry import MAX_TTL, Entry, entry_of
from udpwatch.dns.direct import MAX_ANSWERS, read_direct
from udpwatch.dns.message import Malformed, parse_response

NAME = m.name("www.example")
QUESTION = NAME + struct.pack("!HH", m.A, m.IN)
NOW = 1000.0
LIMITS = 0, MAX_TTL


def address(number: int, ttl: int = 300) -> bytes:
    return m.record(m.A, bytes((192, 0, 2, number)), ttl)


def parsed(data: bytes, limits: tuple[int, int] = LIMITS) -> Entry:
    return entry_of(parse_response(data), NOW, 0, 0, negcache=True, cache_ttl=limits)


def soa(owner: bytes = b"\xc0\x10", ttl: int = 600, minimum: int = 900) -> bytes:
    """By default of example, a pointer into the question."""
    return m.record(
        m.SOA, m.name("ns.example") + m.name("a.example") + struct.pack("!5I", 1, 2, 3, 4, minimum), ttl, owner
    )


def denial(record: bytes, rcode: int = 3) -> bytes:
    head = m.header(1, authorities=1, flags=m.QR | m.RD | m.RA | rcode)
    return head + QUESTION + record


def aliases(*kinds: int) -> bytes:
    """CNAME records, each for the one before, and others for the last one."""
    data, owner = m.header(1, len(kinds), flags=m.QR | m.RD | m.RA) + QUESTION, b"\xc0\x0c"
    for number, kind in enumerate(kinds):
        rdata = m.name(f"a{number}.example") if kind == m.CNAME else bytes(4)
        data += m.record(kind, rdata, 300 + number, owner)
        if kind == m.CNAME:
            owner = (0xC000 | len(data) - len(rdata)).to_bytes(2, "big")
    return data


USUAL = {
    "one": m.response("www.example", m.A, (address(1),)),
    "several": m.response("www.example", m.A, (address(1, 60), address(2, 30), address(3, 90))),
    "most": m.response("www.example", m.A, tuple(address(number) for number in range(MAX_ANSWERS))),
    "TTL 0": m.response("www.example", m.A, (address(1, 0),)),
    "alias": aliases(m.CNAME, m.A),
    "aliases": aliases(m.CNAME, m.CNAME, m.CNAME, m.A, m.A),
    "NXDOMAIN": denial(soa()),
    "NXDOMAIN, long": denial(soa(ttl=20_000, minimum=20_000)),
    "NXDOMAIN, short minimum": denial(soa(minimum=5)),
    "NODATA": denial(soa(), 0),
    "denied by the root": denial(soa(b"\0")),
    "denied by its own domain": denial(soa(b"\xc0\x0c")),
}
OTHER = {
    "none": m.response("www.example", m.A),
    "too many": m.response("www.example", m.A, tuple(address(number) for number in range(MAX_ANSWERS + 1))),
    "TTL above the limit": m.response("www.example", m.A, (address(1, MAX_TTL + 1),)),
    "negative TTL": m.response("www.example", m.A, (address(1, 1 << 31),)),
    "an alias alone": aliases(m.CNAME),
    "an alias after an address": aliases(m.A, m.CNAME),
    "an alias that is no name": m.response("www.example", m.A, (m.record(m.CNAME, b"\x01", 300), address(1))),
    "denied by another domain": denial(soa(m.name("other.example"))),
    "denied with a negative TTL": denial(soa(ttl=1 << 31)),
    "denied with a negative minimum": denial(soa(minimum=1 << 31)),
    "denied without a SOA": denial(address(1)),
    "short SOA": denial(m.record(m.SOA, bytes(21), 300)),
    "SERVFAIL": denial(soa(), 2),
    "another name": m.response("www.example", m.A, (m.record(m.A, bytes(4), 300, owner=m.name("a.example")),)),
    "another question": m.response("xww.example", m.A, (address(1),)),
    "octets at the end": m.response("www.example", m.A, (address(1),)) + b"x",
    "cut": m.response("www.example", m.A, (address(1),))[:-1],
    "cut in the fixed part": m.response("www.example", m.A, (address(1),))[:-6],
}


def with_flags(data: bytes, flags: int) -> bytes:
    return data[:2] + struct.pack("!H", flags) + data[4:]


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("edns", [False, True])
def test_usual_response(kind: str, edns: bool) -> None:
    data = USUAL[kind]
    if edns:
        data = data[:10] + b"\0\1" + data[12:] + m.opt()
    found = read_direct(data, QUESTION, NOW, LIMITS)
    assert found is not None
    assert found == parsed(data)


@pytest.mark.parametrize("kind", OTHER)
def test_other_response(kind: str) -> None:
    assert read_direct(OTHER[kind], QUESTION, NOW, LIMITS) is None


@pytest.mark.parametrize(
    ("flags", "usual"),
    [
        *((flags, True) for flags in (0x8000, 0x8180, 0x8580, 0x8190)),
        *((flags, False) for flags in (0x0180, 0x8380, 0x8181, 0x8183, 0x9980, 0x81A0)),
    ],
)
def test_flags(flags: int, usual: bool) -> None:
    data = with_flags(USUAL["one"], flags)
    assert (read_direct(data, QUESTION, NOW, LIMITS) is not None) == usual


@pytest.mark.parametrize("octet", [5, 0], ids=["code", "owner"])
def test_unusual_opt(octet: int) -> None:
    """A response code with upper bits, and an owner that is not the root."""
    opt = bytearray(m.opt())
    opt[octet] = 1
    data = USUAL["one"][:10] + b"\0\1" + USUAL["one"][12:] + bytes(opt)
    assert read_direct(data, QUESTION, NOW, LIMITS) is None


def test_limits_of_ttls() -> None:
    assert read_direct(USUAL["one"], QUESTION, NOW, (0, 299)) is None
    assert read_direct(USUAL["one"], QUESTION, NOW, (301, MAX_TTL)) is None
    assert read_direct(USUAL["one"], QUESTION, NOW, (300, 300)) == parsed(USUAL["one"], (300, 300))


def test_changed_octets_give_the_same_as_the_parser_or_nothing() -> None:
    chance, usual = random.Random(1), 0  # noqa: S311  not for secrets
    for _ in range(20_000):
        data = bytearray(chance.choice([*USUAL.values(), *OTHER.values()]))
        if chance.random() < 0.5:
            data[10:12] = b"\0\1"
            data += m.opt()
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0xC0, 0x0C, 0xFF, chance.randrange(256)))
        del data[len(data) - chance.choice((0, 0, 0, 1, 7, 20)) :]
        found = read_direct(bytes(data), QUESTION, NOW, LIMITS)
        if found is not None:
            usual += 1
            try:
                assert found == parsed(bytes(data))
            except Malformed:
                pytest.fail(f"the parser rejects {bytes(data).hex()}")
    assert usual > 1_000
