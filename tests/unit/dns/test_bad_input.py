"""Responses to invalid queries: every row of the table in docs/dns.md, over UDP and TCP.

Where there was a choice it is named beside the case. What all cases share is asserted for all: an error is never longer
than its question, and no flag of the question comes back but those that are to be copied.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import dns_messages as m
import pytest

from udpwatch.dns.cache import Cache
from udpwatch.dns.message import Rcode
from udpwatch.dns.names import name_from_text
from udpwatch.dns.responder import Drop, Forward, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import build

KNOWN, UNKNOWN = "known.example", "unknown.example"
ADDRESS = bytes((192, 0, 2, 7))
QUESTION = m.question(KNOWN)
TSIG = m.record(
    250,
    m.name("hmac-sha256") + struct.pack("!HIHH", 0, 1, 300, 32) + bytes(32) + struct.pack("!3H", m.ID, 0, 0),
    owner=m.name("nobodys.key"),
    klass=255,
)


def raw(name: bytes) -> bytes:
    """A query whose name is these octets."""
    return m.header() + name + struct.pack("!HH", m.A, m.IN)


def labels(*lengths: int) -> bytes:
    return b"".join(bytes([length]) + b"a" * length for length in lengths) + b"\0"


def queries(count: int) -> bytes:
    return m.header(count) + QUESTION * count


@dataclass(frozen=True)
class Case:
    label: str
    data: bytes
    rcode: int | None = None  # None: nothing is sent
    bare: bool = False  # twelve octets
    edns: int | None = None  # the version in our OPT; None: no OPT
    answers: int | None = None
    reason: str = ""  # of Drop, or of what could not be read


def formerr(label: str, data: bytes, reason: str = "") -> Case:
    return Case(label, data, Rcode.FORMERR, bare=True, reason=reason)


def answered(label: str, data: bytes, edns: int | None = None, count: int = 1) -> Case:
    return Case(label, data, Rcode.NOERROR, edns=edns, answers=count)


def refused(label: str, data: bytes, edns: int | None = None) -> Case:
    return Case(label, data, Rcode.REFUSED, edns=edns, answers=0)


NAME_255, NAME_256 = labels(63, 63, 63, 61), labels(63, 63, 63, 62)
assert len(NAME_255) == 255

CASES = [
    # less than a header; a response: nothing, counted
    Case("empty", b"", reason="short"),
    Case("one octet", b"\x12", reason="short"),
    Case("eleven octets", m.header()[:11], reason="short"),
    Case("a response", m.response(KNOWN), reason="response"),
    Case("a response that is a header", m.header(0, flags=m.QR), reason="response"),
    Case("a response of another opcode", m.header(0, flags=m.QR | 0x2800), reason="response"),
    # cut off
    formerr("header only, QD=1", m.header(), "name"),
    *(formerr(f"cut after {size} octets", m.query(KNOWN)[:size]) for size in range(13, len(m.query(KNOWN)))),
    formerr("label longer than the rest", raw(b"\x3fabc"), "name"),
    # QDCOUNT. A cookie without a question would be valid with cookies (RFC 7873, section 5.4), which are unsupported.
    formerr("QD=0", m.header(0), "question"),
    formerr("QD=0 with a cookie", m.header(0, additional=1) + m.opt(m.option(10, bytes(8))), "question"),
    formerr("QD=2", queries(2), "question"),
    formerr("QD=65535", m.header(65535) + QUESTION, "question"),
    # opcodes: also with the sections of an UPDATE or NOTIFY, or with nothing after the header
    *(Case(f"opcode {code}", m.query(KNOWN, flags=code << 11), Rcode.NOTIMP, bare=True) for code in range(1, 16)),
    Case("UPDATE", m.header(1, 0, 1, flags=5 << 11) + m.question(KNOWN, m.SOA) + m.record(m.A, ADDRESS), 4, bare=True),
    Case("NOTIFY", m.header(1, 1, flags=4 << 11) + m.question(KNOWN, m.SOA) + m.soa(), Rcode.NOTIMP, bare=True),
    Case("STATUS, header only", m.header(0, flags=2 << 11), Rcode.NOTIMP, bare=True),
    # classes. CH other than TXT *.bind: REFUSED; an unknown *.bind: NOTIMP, as in dnsmasq.
    *(refused(f"class {klass}", m.query(KNOWN, klass=klass)) for klass in (0, 2, m.HS, 5, 254, 255, 65535)),
    refused("class CH", m.query(KNOWN, klass=m.CH)),
    refused("class CH, TXT", m.query(KNOWN, m.TXT, klass=m.CH)),
    refused("class CH, version.bind A", m.query("version.bind", m.A, klass=m.CH)),
    Case("class CH, unknown.bind", m.query("unknown.bind", m.TXT, klass=m.CH), Rcode.NOTIMP, answers=0),
    # ANY: one RRset of addresses, else HINFO (RFC 8482); no artificial TC over UDP
    answered("ANY, addresses", m.query(KNOWN, m.ANY)),
    answered("ANY, none", m.query("text.example", m.ANY)),
    # zone transfers, MAILA, MAILB; an IXFR with its SOA has records in a query, and that row is before
    *(refused(f"type {kind}", m.query(KNOWN, kind)) for kind in (251, 252, 253, 254)),
    formerr("IXFR with SOA", m.header(1, 0, 1) + m.question(KNOWN, 251) + m.soa(), "sections"),
    # meta types; type 0 (reserved, RFC 6895, section 3.1): REFUSED
    *(Case(f"type {kind}", m.query(KNOWN, kind), Rcode.FORMERR, answers=0) for kind in (41, 249, 250)),
    refused("type 0", m.query(KNOWN, 0)),
    # pointers in the question
    formerr("pointer to itself", raw(b"\xc0\x0c"), "name"),
    formerr("pointer loop", raw(b"\x01a\xc0\x0c"), "name"),
    formerr("pointer forward", raw(b"\xc0\x20"), "name"),
    formerr("pointer to the header", raw(b"\xc0\x00"), "name"),
    formerr("pointer behind the end", raw(b"\xff\xff"), "name"),
    formerr("half a pointer", m.header() + b"\x01a\xc0", "name"),
    # label types (RFC 6891, section 5)
    formerr("label type 0x40", raw(b"\x41" + bytes(65) + b"\0"), "name"),
    formerr("label type 0x80", raw(b"\x81" + bytes(129) + b"\0"), "name"),
    formerr("label of 64", raw(b"\x40" + b"a" * 64 + b"\0"), "name"),
    # lengths
    refused("a name of 255", raw(NAME_255)),
    refused("127 labels", raw(labels(*[1] * 127))),
    formerr("a name of 256", raw(NAME_256), "name"),
    formerr("128 labels", raw(labels(*[1] * 128)), "name"),
    formerr("a name without end", m.header() + b"\x01a" * 30_000, "name"),
    # octets: an ordinary unknown name
    refused("non-ASCII", raw(b"\x04\xff\xfe\x80\xc3\x00")),
    refused("NUL in a label", raw(b"\x03a\0b\x07example\0")),
    refused("a dot in a label", raw(b"\x0dknown.example\0")),
    refused("line feeds", raw(b"\x03\r\n\t\x07example\0")),
    refused("the root", raw(b"\0")),
    # EDNS
    Case("EDNS version 1", m.query(KNOWN, m.A, m.opt(version=1)), Rcode.BADVERS, edns=0, answers=0),
    Case("EDNS version 255", m.query(KNOWN, m.A, m.opt(version=255)), Rcode.BADVERS, edns=0, answers=0),
    formerr("two OPT", m.query(KNOWN, m.A, m.opt(), m.opt()), "opt"),
    formerr("OPT with an owner", m.query(KNOWN, m.A, m.opt(owner=m.name("a"))), "opt"),
    formerr("OPT with a pointer as its owner", m.query(KNOWN, m.A, m.opt(owner=m.TO_QUESTION)), "opt"),
    formerr("OPT longer than the message", m.query(KNOWN, m.A, m.opt()[:-2] + b"\0\x08abcd"), "record"),
    formerr("option longer than OPT", m.query(KNOWN, m.A, m.opt(struct.pack("!HH", 3, 9) + b"abcd")), "opt"),
    formerr("half an option", m.query(KNOWN, m.A, m.opt(b"\0\x03\0")), "opt"),
    answered("unknown option", m.query(KNOWN, m.A, m.opt(m.option(65001, b"x"))), edns=0),
    answered("unknown flags", m.query(KNOWN, m.A, m.opt(flags=0x7FFF)), edns=0),
    answered("NSID", m.query(KNOWN, m.A, m.opt(m.option(3))), edns=0),
    answered("client subnet", m.query(KNOWN, m.A, m.opt(m.option(8, bytes((0, 1, 24, 0, 192, 0, 2))))), edns=0),
    # cookies are not implemented: of any length, ignored
    *(answered(f"cookie of {n}", m.query(KNOWN, m.A, m.opt(m.option(10, bytes(n)))), edns=0) for n in (8, 7, 0, 40)),
    answered("a size of 0", m.query(KNOWN, m.A, m.opt(size=0)), edns=0),
    # other sections
    formerr("AN=1", m.header(1, 1) + QUESTION + m.record(m.A, ADDRESS), "sections"),
    formerr("NS=1", m.header(1, 0, 1) + QUESTION + m.record(m.NS, m.name("a")), "sections"),
    formerr("OPT as answer", m.header(1, 1) + QUESTION + m.opt(), "sections"),
    formerr("AR=1 but nothing there", m.header(additional=1) + QUESTION),
    formerr("AR=2 but one there", m.header(additional=2) + QUESTION + m.opt()),
    formerr("AR=65535", m.header(additional=65535) + QUESTION + b"\0\0\1\0\1\0\0\0\0\0\0" * 5000, "record"),
    answered("another record as additional", m.query(KNOWN, m.A, m.record(m.A, ADDRESS))),
    # after the last record: ignored
    answered("trailing octets", m.query(KNOWN) + b"garbage"),
    answered("trailing octets behind OPT", m.query(KNOWN, m.A, m.opt()) + b"\0" * 300, edns=0),
    # TSIG with an unknown key: REFUSED, unsigned
    refused("TSIG", m.query(KNOWN, m.A, TSIG)),
    refused("TSIG behind OPT", m.query(KNOWN, m.A, m.opt(), TSIG), edns=0),
    # flags without meaning in a query
    *(
        answered(f"flags {bits:04x}", m.query(KNOWN, flags=m.RD | bits))
        for bits in (m.TC, m.AA, m.Z, m.AD, m.CD, m.RA, 0x000F, 0x07FF)
    ),
    # RD=0: local names only
    answered("RD=0, known", m.query(KNOWN, flags=0)),
    refused("RD=0, unknown", m.query(UNKNOWN, flags=0)),
    refused("unknown, no upstream", m.query(UNKNOWN)),
    refused("unknown, no upstream, with EDNS", m.query(UNKNOWN, m.A, m.opt()), edns=0),
]


def responder(*servers: Server) -> Responder:
    settings = Settings(
        hosts=False,
        host_records=(HostRecord((name_from_text(KNOWN),), ("192.0.2.7",)),),
        records=(StaticRecord(name_from_text("text.example"), m.TXT, b"\1x"),),
    )
    made = Responder(settings, build(settings, pytest.fail), Cache(100, 0))
    made.routes = Routes(servers)
    return made


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_query_gets_the_response_of_the_table(case: Case, tcp: bool) -> None:
    found = responder().respond(case.data, 0.0, tcp)
    if case.rcode is None:
        assert found == Drop(case.reason)
        return
    assert isinstance(found, Reply)
    data, flags, sent = found.data, m.flags_of(found.data), m.flags_of(case.data)
    assert (found.rcode, flags & 0xF) == (case.rcode, case.rcode & 0xF)
    assert data[:2] == case.data[:2], "the question's id"
    assert flags & m.QR
    assert flags & 0x7800 == (sent & 0x7800 if case.rcode == Rcode.NOTIMP else 0), "the opcode"
    assert not flags & (m.Z | m.AD | m.TC)
    assert bool(flags & m.AA) == bool(case.answers or found.source == "hosts"), "ours to give"
    if sent & 0x7800 and case.rcode == Rcode.NOTIMP:
        assert flags == m.QR | sent & 0x7800 | Rcode.NOTIMP, "RD, RA and CD are flags of standard queries"
    else:
        assert flags & m.RA
        assert flags & m.RD == sent & m.RD
    if case.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        assert len(data) <= len(case.data), "no amplification"
        assert found.until == 0.0
    if case.bare:
        assert len(data) == 12
        assert m.counts_of(data) == (0, 0, 0, 0)
        if case.rcode == Rcode.FORMERR:
            assert found.query is None
            assert found.source == case.reason or not case.reason
        return
    assert flags & m.CD == sent & m.CD
    questions, answers, authorities, additional = m.counts_of(data)
    assert (questions, authorities) == (1, 0)
    assert case.answers is None or answers == case.answers
    assert data[12:].startswith(case.data[12:][: len(found.query.question)] if found.query else b"")
    assert additional == (0 if case.edns is None else 1)
    if case.edns is not None:
        assert data[-11:-8] == b"\0\0\x29", "OPT of the root, without options"
        assert data[-6:-4] == bytes((case.rcode >> 4, case.edns))
        assert data[-2:] == b"\0\0"


def test_cases_have_unique_names() -> None:
    assert len({case.label for case in CASES}) == len(CASES)


@pytest.mark.parametrize("bits", [m.TC, m.AA, m.Z, m.AD, m.RA, 0xF, 0x6EF])
@pytest.mark.parametrize(
    "data", [m.query(UNKNOWN), m.query(KNOWN, 252), m.query(KNOWN)[:-1], m.query(KNOWN, flags=0x7800)]
)
def test_error_does_not_echo_flags(data: bytes, bits: int) -> None:
    """The errors are the same with and without these flags."""
    with_bits = data[:2] + struct.pack("!H", m.flags_of(data) | bits) + data[4:]
    plain, other = (responder().respond(each, 0.0) for each in (data, with_bits))
    assert isinstance(plain, Reply) and isinstance(other, Reply)
    assert plain.data == other.data


@pytest.mark.parametrize("data", [m.query(UNKNOWN), m.query(b"\x04\xff\0.\x80\x00"), raw(NAME_255), raw(b"\0")])
def test_unusual_but_valid_query_is_forwarded(data: bytes) -> None:
    assert isinstance(responder(Server("192.0.2.1")).respond(data, 0.0), Forward)


def test_any_without_addresses_gets_hinfo() -> None:
    """HINFO (RFC 8482, section 4.2) replaces records of other types; a name without records gets none."""
    text = responder().respond(m.query("text.example", m.ANY), 0.0)
    assert isinstance(text, Reply)
    assert text.data.endswith(m.record(m.HINFO, b"\x07RFC8482\x00"))
    settings = Settings(hosts=False, host_records=(HostRecord((name_from_text(KNOWN),), ()),))
    empty = Responder(settings, build(settings, pytest.fail), Cache(0, 0)).respond(m.query(KNOWN, m.ANY), 0.0)
    assert isinstance(empty, Reply)
    assert m.counts_of(empty.data) == (1, 0, 0, 0)


@pytest.mark.parametrize("flags", [0, m.DO])
def test_do_flag_is_copied(flags: int) -> None:
    """RFC 3225, section 3."""
    found = responder().respond(m.query(KNOWN, m.A, m.opt(flags=flags)), 0.0)
    assert isinstance(found, Reply)
    assert struct.unpack("!H", found.data[-4:-2]) == (flags,)
