"""The cache: lifetimes, memory, and the responses built from it."""

from __future__ import annotations

import random
import struct
import threading
import tracemalloc
from array import array
from ipaddress import ip_network
from typing import Any

import dns.message
import dns_messages as m
import pytest

from udpwatch.dns.cache import STALE_RETRY_SECONDS, Cache
from udpwatch.dns.cache_entry import (
    ENTRY_BYTES,
    FAILURE_SECONDS,
    MAX_NEGATIVE_TTL,
    MAX_TTL,
    STALE_TTL,
    Entry,
    Key,
    entry_of,
    failure,
)
from udpwatch.dns.cname import CnameLoop, follow
from udpwatch.dns.message import Rcode, parse_query, parse_response
from udpwatch.dns.names import lower, name_from_text
from udpwatch.dns.responder import Forward, Reply, Responder, from_entry
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import build

NAME, OTHER = "www.example", m.name("other.example")
ADDRESS = bytes((192, 0, 2, 1))
KEY = (m.name(NAME), m.A, m.IN, 0)


def entry(data: bytes, now: float = 0.0, neg_ttl: int = 0, max_ttl: int = 0, negcache: bool = True) -> Entry:
    return entry_of(parse_response(data), now, neg_ttl, max_ttl, negcache)


def lifetime(data: bytes, **settings: Any) -> float:
    made = entry(data, 100.0, **settings)
    return made.expires - made.stored


def address(ttl: int, owner: bytes = m.TO_QUESTION, klass: int = m.IN) -> bytes:
    return m.record(m.A, ADDRESS, ttl, owner, klass)


def alias(ttl: int, target: bytes, owner: bytes = m.TO_QUESTION) -> bytes:
    return m.record(m.CNAME, target, ttl, owner)


def positive(*records: bytes, **more: Any) -> bytes:
    return m.response(NAME, m.A, records or (address(300),), **more)


def negative(*authorities: bytes, rcode: int = 0, answers: tuple[bytes, ...] = ()) -> bytes:
    return m.response(NAME, m.A, answers, authorities, rcode=rcode)


def ttls(data: bytes) -> list[int]:
    return [record.ttl for record in parse_response(data).records]


def of_size(size: int, expires: float = 1e9, number: int = 0) -> Entry:
    return Entry(0, bytes(size), (0, 0, 0), array("H", [0] * number), 0.0, expires)


def key(number: int) -> Key:
    return (b"\x08%08d\0" % number, m.A, m.IN, 0)


def counted(kept: Cache) -> tuple[int, int]:
    """The expected `bytes` of both queues and of the second one."""
    first, second = (sum(each.size for each in queue.values()) for queue in (kept._first, kept._second))
    return first + second, second


def responder(kept: Cache, **changes: Any) -> Responder:
    settings = Settings(hosts=False, **changes)
    made = Responder(settings, build(settings, pytest.fail), kept)
    made.routes = Routes((Server("192.0.2.53"),))
    return made


def respond(made: Responder, data: bytes, now: float, tcp: bool = False) -> Reply:
    found = made.respond(data, now, tcp)
    assert isinstance(found, Reply)
    return found


# ---- lifetimes ----


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (positive(address(300)), 300),
        (positive(address(300), address(20)), 20),
        (positive(address(0)), 0),
        (positive(address(300), address(0)), 0),
        (positive(address(0x80000000)), 0),
        (positive(address(0xFFFFFFFF)), 0),
        (positive(address(0x7FFFFFFF)), MAX_TTL),
        (positive(alias(50, OTHER), address(300, OTHER)), 50),
        (positive(alias(500, OTHER), address(300, OTHER)), 300),
        (positive(address(300, OTHER), alias(500, OTHER)), 300),
        (positive(alias(500, OTHER), address(300, m.name("OTHER.example"))), 300),
        # records that do not answer the question do not count
        (positive(address(300), address(5, OTHER)), 300),
        (m.response(NAME, m.A, (address(300),), (m.record(m.NS, OTHER, 5),), (address(5, OTHER),)), 300),
        (positive(address(300), address(5, klass=m.CH)), 300),
        (positive(address(300, OTHER)), 0),
        (positive(address(300, klass=m.CH)), 0),
        (m.response(NAME, m.A, (), (), (address(300),)), 0),
        (positive(alias(300, OTHER), address(300)), 300),
        (positive(alias(300, m.name(NAME))), 0),
        # not kept
        (positive(flags=m.TC), 0),
        (positive(rcode=Rcode.SERVFAIL), 0),
        (positive(rcode=Rcode.REFUSED), 0),
        (positive(rcode=Rcode.FORMERR), 0),
        (m.response(NAME, m.A, (address(300),), (), (m.record(m.OPT, b"", 1 << 24, b"\0", 1232),)), 0),
        # negative: the SOA's TTL or MINIMUM
        (negative(m.soa(300, 60)), 60),
        (negative(m.soa(30, 60)), 30),
        (negative(m.soa(300, 60), rcode=Rcode.NXDOMAIN), 60),
        (negative(m.soa(300, 60, m.name("example")), rcode=Rcode.NXDOMAIN), 60),
        (negative(m.soa(300, 60, b"\0"), rcode=Rcode.NXDOMAIN), 60),
        (negative(m.soa(900_000, 900_000)), MAX_NEGATIVE_TTL),
        (negative(m.soa(0x80000001, 60)), 0),
        (negative(m.soa(300, 0x80000001)), 0),
        (negative(), 0),
        (negative(m.soa(300, 60, OTHER), rcode=Rcode.NXDOMAIN), 0),
        (negative(m.record(m.SOA, bytes(21), 300)), 0),
        (negative(m.record(m.NS, OTHER, 300)), 0),
        (negative(m.soa(300, 60), answers=(alias(40, m.name("x.example")),)), 0),
        (negative(m.soa(300, 60, m.name("example")), answers=(alias(40, m.name("x.example")),)), 40),
        (negative(m.soa(300, 60, m.name("example")), answers=(alias(90, m.name("x.example")),), rcode=3), 60),
        # an SOA in the answer or additional section does not count
        (m.response(NAME, m.A, (m.soa(300, 60),)), 0),
        (m.response(NAME, m.A, (), (), (m.soa(300, 60),)), 0),
        # other questions
        (m.response(NAME, m.ANY, (address(300), m.record(m.TXT, b"\1x", 40))), 40),
        (m.response(NAME, m.CNAME, (alias(30, OTHER),)), 30),
        (m.response(NAME, m.SOA, (m.soa(30, 5),)), 30),
    ],
)
def test_lifetime_of_responses(data: bytes, expected: int) -> None:
    assert lifetime(data) == expected


def test_neg_ttl_applies_to_responses_without_soa() -> None:
    assert lifetime(negative(), neg_ttl=40) == 40
    assert lifetime(negative(rcode=Rcode.NXDOMAIN), neg_ttl=40) == 40
    assert lifetime(negative(m.soa(300, 60)), neg_ttl=40) == 60
    assert lifetime(negative(m.soa(0x80000000, 60)), neg_ttl=40) == 0
    assert lifetime(positive(), neg_ttl=40) == 300


def test_no_negcache_keeps_no_negative_response() -> None:
    for data in (negative(m.soa(300, 60)), negative(rcode=Rcode.NXDOMAIN)):
        assert lifetime(data, negcache=False, neg_ttl=40) == 0
    assert lifetime(positive(), negcache=False) == 300


def test_max_ttl_limits_what_clients_see() -> None:
    """As in dnsmasq, it does not limit how long a response is cached."""
    kept = Cache(10, 1000)
    kept.put(KEY, entry(positive(address(300), address(20)), max_ttl=5))
    assert ttls(from_entry(parse_query(m.query(NAME)), entry(positive(), max_ttl=60), 512, 0.0, "forward").data) == [60]
    made = responder(kept)
    for now, expected in ((0.0, [5, 5]), (16.0, [5, 4]), (19.5, [5, 1])):
        reply = respond(made, m.query(NAME), now)
        assert (ttls(reply.data), reply.source) == (expected, "cache")
    assert kept.get_stale(KEY, 400.0)
    assert ttls(respond(made, m.query(NAME), 400.0).data) == [5, 5], "a stale one, too"
    assert lifetime(positive(address(300)), max_ttl=60) == 300
    assert lifetime(negative(m.soa(300, 200)), max_ttl=60) == 200
    assert lifetime(positive(address(0x7FFFFFFF)), max_ttl=0x7FFFFFFF) == MAX_TTL


@pytest.mark.parametrize("length", [1, 10, 15, 16, 17, 60, 120])
def test_cname_chains_are_followed(length: int) -> None:
    names = [m.name(NAME), *(m.name(f"n{each}.example") for each in range(length))]
    links = [alias(100 + each, names[each + 1], names[each]) for each in range(length)]
    random.Random(1).shuffle(links)  # noqa: S311
    data = positive(*links, address(300, names[-1]))
    assert lifetime(data) == 100
    assert [len(part) for part in follow(parse_response(data))[::2]] == [length, 1]


def test_cname_loop_is_not_cached() -> None:
    back = alias(300, m.name(NAME), OTHER)
    for data in (positive(alias(300, OTHER), back), positive(alias(300, OTHER), alias(300, OTHER, OTHER))):
        assert lifetime(data) == 0
        with pytest.raises(CnameLoop):
            follow(parse_response(data))
    soa = m.soa(300, 60, m.name("example"))
    assert lifetime(negative(soa, answers=(alias(300, OTHER), back))) == 0, "nor as NODATA"


def test_response_with_invalid_names_is_not_cached() -> None:
    cut = m.record(m.CNAME, b"\x05oth", 300)
    assert lifetime(positive(cut)) == 0
    assert lifetime(positive(m.record(m.CNAME, OTHER + b"x", 300))) == 0


# ---- responses to clients ----


def test_ttls_count_down_in_whole_seconds() -> None:
    kept = Cache(10, 0)
    kept.put(KEY, entry(positive(address(300), address(10)), 1000.7))
    made = responder(kept)
    for now, expected in ((1000.7, [300, 10]), (1001.6, [300, 10]), (1001.71, [299, 9]), (1010.6, [291, 1])):
        reply = respond(made, m.query(NAME), now)
        assert (ttls(reply.data), reply.source) == (expected, "cache"), now
    assert isinstance(made.respond(m.query(NAME), 1010.7), Forward), "expired"


def test_reply_is_valid_until_its_ttls_change() -> None:
    kept = Cache(10, 0)
    kept.put(KEY, entry(positive(address(3)), 1000.75))
    made = responder(kept)
    for now in (1000.75, 1000.9, 1001.5, 1001.75, 1002.0, 1003.7):
        reply = respond(made, m.query(NAME), now)
        assert now < reply.until <= now + 1
        assert respond(made, m.query(NAME), reply.until - 0.001).data == reply.data
        later = made.respond(m.query(NAME), reply.until)
        assert isinstance(later, Forward) or later.data != reply.data


def test_ttl_of_0_stays_0() -> None:
    made = entry(positive(address(0), address(0xFFFFFFFF)))
    assert ttls(from_entry(parse_query(m.query(NAME)), made, 512, 0.0, "forward").data) == [0, 0]


def test_opt_and_records_after_it_are_not_forwarded() -> None:
    behind = m.record(250, b"signature", 0)
    data = m.response(NAME, m.A, (address(300),), (), (address(30, OTHER), m.opt(m.option(10, bytes(16))), behind))
    made = entry(data + b"trailing")
    assert made.body == address(300) + address(30, OTHER)
    assert made.counts == (1, 0, 1)
    plain = from_entry(parse_query(m.query(NAME)), made, 512, 0.0, "cache").data
    assert plain == m.header(1, 1, 0, 1, m.QR | m.RD | m.RA) + m.question(NAME) + made.body
    with_edns = from_entry(parse_query(m.query(NAME, m.A, m.opt())), made, 512, 0.0, "cache").data
    assert with_edns == m.header(1, 1, 0, 2, m.QR | m.RD | m.RA) + m.question(NAME) + made.body + m.opt()


@pytest.mark.parametrize(
    ("ttl", "low", "high", "kept"),
    [
        *((0, 0, 0, 0), (60, 0, 0, 60), (100_000, 0, 0, MAX_TTL), (1 << 31, 0, 0, 0)),
        *((0, 30, 0, 30), (60, 30, 0, 60), (1 << 31, 30, 0, 30)),
        *((60, 0, 30, 30), (10, 0, 30, 10), (100_000, 0, 100_000, MAX_TTL), (5, 60, 30, 30)),
    ],
)
def test_smallest_and_largest_ttl_in_the_cache(ttl: int, low: int, high: int, kept: int) -> None:
    made = responder(Cache(0, 0), min_cache_ttl=low, max_cache_ttl=high)
    found = made.entry_of(parse_response(positive(address(ttl))), 0.0)
    assert found.expires == kept
    assert ttls(from_entry(parse_query(m.query(NAME)), found, 512, 0.0, "forward").data) == [kept]


def test_smallest_ttl_does_not_cache_negative_responses_without_soa() -> None:
    made = responder(Cache(0, 0), min_cache_ttl=60, max_cache_ttl=90)
    assert made.entry_of(parse_response(negative()), 0.0).expires == 0.0
    assert made.entry_of(parse_response(negative(m.soa(5, 5))), 0.0).expires == 60.0
    assert made.entry_of(parse_response(negative(m.soa(500, 500))), 0.0).expires == 90.0


def test_bogus_nxdomain() -> None:
    made = responder(Cache(0, 0), bogus_addresses=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")))
    aaaa = m.response(NAME, m.AAAA, (m.record(m.AAAA, bytes.fromhex("20010db8") + bytes(12), 300),))
    for data in (positive(address(300)), positive(m.record(m.A, bytes(4), 300), address(300)), aaaa):
        entry = made.entry_of(parse_response(data), 0.0)
        assert (entry.rcode, entry.body, entry.counts, entry.expires) == (Rcode.NXDOMAIN, b"", (0, 0, 0), 300.0)
    reply = from_entry(parse_query(m.query(NAME)), entry, 512, 100.0, "cache")
    assert reply.data == m.header(flags=m.QR | m.RD | m.RA | 3) + m.question(NAME)
    other = made.entry_of(parse_response(positive(m.record(m.A, bytes(4), 300))), 0.0)
    assert (other.rcode, other.counts) == (0, (1, 0, 0))


def test_filtered_types() -> None:
    """Aliases before the first filtered record stay; what follows it does not, since it may refer to it."""
    alias = m.record(m.CNAME, OTHER, 300)
    text, mail = m.record(m.TXT, b"\1x", 300), m.record(m.MX, b"\0\1" + OTHER, 300)
    made = responder(Cache(0, 0), filtered_types=(m.A, m.TXT), proxy_dnssec=True)

    def counts(*parts: tuple[bytes, ...], kind: int = m.A) -> tuple[tuple[int, int, int], int]:
        entry = made.entry_of(parse_response(m.response(NAME, kind, *parts, flags=m.RA | m.AD)), 0.0)
        data = from_entry(parse_query(m.query(NAME)), entry, 512, 0.0, "forward").data
        assert len(parse_response(data).records) == sum(entry.counts) == len(entry.ttls)
        assert entry.expires == 300.0
        assert entry.rcode == 0
        return entry.counts, entry.flags

    assert counts((alias, address(300, OTHER))) == ((1, 0, 0), 0)
    assert counts((address(300), address(300))) == ((0, 0, 0), 0)
    assert counts((address(300), alias), (m.soa(300, 300),)) == ((0, 0, 0), 0)
    assert counts((mail,), (), (text, mail), kind=m.MX) == ((1, 0, 0), 0)
    assert counts((mail,), (m.soa(300, 300),), (mail,), kind=m.MX) == ((1, 1, 1), m.AD)


def test_upstream_flags_are_not_passed_on() -> None:
    made = entry(positive(flags=m.AA | m.AD | m.CD | m.Z | m.RA))
    reply = from_entry(parse_query(m.query(NAME, flags=m.RD)), made, 512, 0.0, "cache")
    assert m.flags_of(reply.data) == m.QR | m.RD | m.RA


@pytest.mark.parametrize("upstream", [0, m.AD])
@pytest.mark.parametrize("proxy", [False, True])
def test_proxy_dnssec_passes_ad_to_clients_that_understand_it(proxy: bool, upstream: int) -> None:
    """RFC 6840, section 5.8. An expired response is no longer authentic."""
    made = entry_of(parse_response(positive(flags=m.RA | upstream)), 0.0, 0, 0, True, proxy)
    understand = m.query(NAME, flags=m.RD | m.AD), m.query(NAME, m.A, m.opt(flags=m.DO))
    expected = upstream if proxy else 0
    for data in understand:
        for source in ("forward", "cache"):
            assert m.flags_of(from_entry(parse_query(data), made, 512, 0.0, source).data) & m.AD == expected
        assert not m.flags_of(from_entry(parse_query(data), made, 512, 400.0, "stale").data) & m.AD
    for data in (m.query(NAME), m.query(NAME, m.A, m.opt())):
        assert not m.flags_of(from_entry(parse_query(data), made, 512, 0.0, "cache").data) & m.AD


def test_proxy_dnssec_of_the_responder() -> None:
    made = responder(Cache(0, 0), proxy_dnssec=True)
    assert made.entry_of(parse_response(positive(flags=m.RA | m.AD)), 0.0).flags == m.AD
    assert responder(Cache(0, 0)).entry_of(parse_response(positive(flags=m.RA | m.AD)), 0.0).flags == 0


@pytest.mark.parametrize("asked", ["www.example", "WWW.EXAMPLE", "wWw.ExAmPlE"])
def test_pointers_into_a_question_in_another_case_stay_valid(asked: str) -> None:
    kept = Cache(10, 0)
    below = b"\x03ftp\xc0\x10"  # ftp.example, by way of the question
    data = m.response("Www.exAmple", m.A, (alias(60, below), address(50, b"\xc0\x29")))
    answer = parse_response(data)
    kept.put((answer.name, m.A, m.IN, 0), entry_of(answer, 0.0, 0, 0, True))
    reply = respond(responder(kept), m.query(asked), 1.0)
    assert reply.data[12:].startswith(m.name(asked)), "the case of this client"
    read = dns.message.from_wire(reply.data)
    assert [str(rrset).lower() for rrset in read.answer] == [
        "www.example. 59 in cname ftp.example.",
        "ftp.example. 49 in a 192.0.2.1",
    ]
    assert reply.query
    assert reply.query.key == KEY


def test_do_and_cd_have_entries_of_their_own() -> None:
    queries = [
        m.query(NAME, m.A, *extra, flags=flags) for flags in (m.RD, m.RD | m.CD) for extra in ((m.opt(flags=m.DO),), ())
    ]
    keys = [parse_query(data).key for data in queries]
    assert len(set(keys)) == 4
    assert parse_query(m.query(NAME, m.A, m.opt())).key == KEY, "EDNS alone is not"
    kept = Cache(10, 0)
    kept.put(keys[0], entry(positive()))
    made = responder(kept)
    assert [isinstance(made.respond(data, 0.0), Reply) for data in queries] == [True, False, False, False]


# ---- sizes ----


@pytest.mark.parametrize(
    ("edns", "tcp", "most"),
    [
        (None, False, 512),
        (0, False, 512),
        (512, False, 512),
        (900, False, 900),
        (1232, False, 1232),
        (65535, False, 1232),
        (None, True, 65535),
        (512, True, 65535),
    ],
)
@pytest.mark.parametrize("cached", [False, True], ids=["forwarded", "cached"])
def test_response_too_long_is_truncated(edns: int | None, tcp: bool, most: int, cached: bool) -> None:
    """It has the first records, as many as fit, TC, the question, which stub resolvers compare, and OPT."""
    extra = () if edns is None else (m.opt(size=edns),)
    data, ours = m.query(NAME, m.A, *extra), b"" if edns is None else m.opt()
    room = most - 12 - len(m.question(NAME)) - len(ours)
    short = [m.record(m.A, (1 << 31 | number).to_bytes(4, "big"), 300) for number in range((room - 12) // 16)]
    rest = room - 16 * len(short) - 12  # what is left for the data of a last record
    for more in (0, 1) if ours or not tcp else (0,):  # a longer one never arrives
        records = (*short, m.record(m.TXT, bytes(rest + more), 300))
        made = entry(m.response(NAME, m.A, records), 0.0)
        if cached:
            kept = Cache(10, 0)
            kept.put(KEY, made)
            reply = respond(responder(kept), data, 1.0, tcp)
        else:
            reply = from_entry(parse_query(data), made, most, 0.0, "forward")
        present = records[: len(records) - more]
        body = b"".join(present)
        if cached:
            body = body.replace((300).to_bytes(4, "big"), (299).to_bytes(4, "big"))
        flags = m.QR | m.RD | m.RA | (m.TC if more else 0)
        assert reply.data == m.header(1, len(present), 0, len(extra), flags) + m.question(NAME) + body + ours


def test_truncated_response_keeps_the_order_of_sections() -> None:
    """Answers first, then authorities; a response without some additional records is not truncated (RFC 2181, section
    9)."""
    address, server = m.record(m.A, bytes(4), 300), m.record(m.NS, b"\2ns" + m.TO_QUESTION, 300)
    answer = entry(m.response(NAME, m.A, (address,) * 2, (server,) * 2, (address,) * 2))
    query = parse_query(m.query(NAME))
    sizes = [len(each) for each in (*(address,) * 2, *(server,) * 2, *(address,) * 2)]
    counts = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2)]
    for present, expected in enumerate(counts):
        for spare in (0, 15) if present < 6 else (0, 100):
            most = 12 + len(m.question(NAME)) + sum(sizes[:present]) + spare
            data = from_entry(query, answer, most, 0.0, "forward").data
            assert m.counts_of(data) == (1, *expected)
            assert bool(m.flags_of(data) & m.TC) == (present < 4)
            assert len(dns.message.from_wire(data, raise_on_truncation=False).sections[1]) == (expected[0] > 0)


def test_first_record_too_long_leaves_the_question() -> None:
    answer = entry(m.response(NAME, m.TXT, (m.record(m.TXT, b"\xff" + bytes(255)),) * 3))
    data = from_entry(parse_query(m.query(NAME, m.TXT)), answer, 200, 0.0, "forward").data
    assert data == m.header(1, flags=m.QR | m.RD | m.RA | m.TC) + m.question(NAME, m.TXT)


def test_stale_truncated_response_has_the_stale_ttl() -> None:
    answer = entry(m.response(NAME, m.A, (m.record(m.A, bytes(4), 300),) * 100))
    reply = from_entry(parse_query(m.query(NAME)), answer, 512, 400.0, "stale")
    rrset = dns.message.from_wire(reply.data, raise_on_truncation=False).answer[0]
    assert (rrset.ttl, m.counts_of(reply.data)) == (30, (1, 30, 0, 0))


def test_edns_packet_max_limits_responses() -> None:
    kept = Cache(10, 0)
    kept.put(KEY, entry(m.response(NAME, m.A, (m.record(m.A, bytes(4), 300),) * 200)))
    for limit, truncated in ((512, True), (4096, False), (65535, False)):
        reply = respond(responder(kept, edns_packet_max=limit), m.query(NAME, m.A, m.opt(size=65535)), 1.0)
        assert bool(m.flags_of(reply.data) & m.TC) == truncated


def test_more_records_than_the_header_can_count() -> None:
    """They never fit."""
    record = StaticRecord(name_from_text(NAME), m.TXT, b"\0")
    reply = respond(responder(Cache(0, 0), records=(record,) * 70_000), m.query(NAME, m.TXT), 0.0, True)
    assert m.flags_of(reply.data) & m.TC
    assert m.counts_of(reply.data)[1] == (65_535 - len(m.query(NAME))) // 13


def test_local_response_too_long_is_truncated() -> None:
    record = StaticRecord(name_from_text(NAME), m.TXT, b"\xff" + bytes(255))
    made = responder(Cache(0, 0), records=(record,) * 3)
    reply = respond(made, m.query(NAME, m.TXT), 0.0)
    assert m.flags_of(reply.data) == m.QR | m.AA | m.TC | m.RD | m.RA
    assert m.counts_of(reply.data) == (1, 1, 0, 0)
    assert len(dns.message.from_wire(reply.data, raise_on_truncation=False).answer[0]) == 1
    assert m.counts_of(respond(made, m.query(NAME, m.TXT), 0.0, True).data) == (1, 3, 0, 0)


def test_any_gets_records_of_one_type() -> None:
    """RFC 8482, section 4.1."""
    hosts = (HostRecord((name_from_text(NAME),), ("192.0.2.1", "192.0.2.2", "2001:db8::1")),)
    reply = respond(responder(Cache(0, 0), host_records=hosts), m.query(NAME, m.ANY), 0.0)
    assert [record.type for record in parse_response(reply.data).records] == [m.A, m.A]


def test_extended_response_code_needs_opt() -> None:
    """An upstream BADCOOKIE must not become NOERROR for a client without EDNS."""
    made = Entry(23, b"", (0, 0, 0), array("H"), 0.0, 0.0)
    plain = from_entry(parse_query(m.query(NAME)), made, 512, 0.0, "forward")
    assert (plain.rcode, m.flags_of(plain.data) & 0xF) == (Rcode.SERVFAIL, Rcode.SERVFAIL)
    reply = from_entry(parse_query(m.query(NAME, m.A, m.opt())), made, 512, 0.0, "forward")
    assert (reply.rcode, dns.message.from_wire(reply.data).rcode()) == (23, 23)


# ---- when servers are down ----


def test_failure_is_cached_briefly() -> None:
    kept = Cache(10, 3600)
    kept.put(KEY, failure(50.0))
    made = responder(kept)
    reply = respond(made, m.query(NAME), 50.0 + FAILURE_SECONDS - 0.1)
    assert reply.rcode == Rcode.SERVFAIL
    assert reply.until <= 50.0 + FAILURE_SECONDS
    assert isinstance(made.respond(m.query(NAME), 50.0 + FAILURE_SECONDS), Forward)
    assert kept.get_stale(KEY, 60.0) is None, "failures are not served stale"


def test_expired_response_is_served_stale() -> None:
    kept = Cache(10, 1000)
    kept.put(KEY, entry(positive(address(300), address(3000)), 0.0))
    made = responder(kept)
    assert isinstance(made.respond(m.query(NAME), 400.0), Forward)
    old = kept.get_stale(KEY, 400.0)
    assert old
    reply = from_entry(parse_query(m.query(NAME)), old, 512, 400.0, "stale")
    assert (ttls(reply.data), reply.until) == ([STALE_TTL, STALE_TTL], 0.0)
    again = respond(made, m.query(NAME), 400.0 + STALE_RETRY_SECONDS - 0.1)
    assert (again.source, ttls(again.data), again.until) == ("stale", [STALE_TTL, STALE_TTL], 0.0)
    assert isinstance(made.respond(m.query(NAME), 400.0 + STALE_RETRY_SECONDS), Forward), "queried again"
    assert kept.counts.stale == 2
    assert kept.get_stale(KEY, 1299.9)
    assert kept.get_stale(KEY, 1300.0) is None, "too old"
    kept.put(KEY, entry(positive(address(300)), 1400.0))
    assert respond(made, m.query(NAME), 1401.0).source == "cache"


def test_no_stale_response_when_disabled() -> None:
    kept = Cache(10, 0)
    kept.put(KEY, entry(positive(address(300)), 0.0))
    assert kept.get_stale(KEY, 300.0) is None
    assert Cache(10, 100).get_stale(KEY, 0.0) is None


# ---- bounds ----


def test_statistics() -> None:
    kept = Cache(2, 0)
    assert kept.get(KEY, 0.0) is None
    for number in range(3):
        kept.put(key(number), of_size(10))
    assert kept.get(key(2), 0.0)
    told = kept.counts
    assert (told.hits, told.misses, told.insertions, told.evictions) == (1, 1, 3, 1)


def test_cache_of_size_0_keeps_nothing() -> None:
    kept = Cache(0, 0)
    kept.put(KEY, of_size(1))
    assert (len(kept), kept.bytes, kept.get(KEY, 0.0)) == (0, 0, None)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_cache_of_size_1_keeps_the_newest(most: int) -> None:
    """Also after its entries were asked for."""
    kept = Cache(most, 0)
    for number in range(20):
        kept.put(key(number), of_size(1))
        assert kept.get(key(number), 0.0), number
        assert len(kept) <= most


def test_large_response_takes_little_more_than_its_octets() -> None:
    """A parsed response keeps offsets, not objects: hundreds of them may be in flight at the same time."""
    data = positive(*(m.record(m.A, struct.pack("!I", number), 300) for number in range(4_000)))
    assert len(data) > 64_000
    tracemalloc.start()
    try:
        answer = parse_response(data)
        made = entry_of(answer, 0.0, 0, 0, True)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(answer.records) == len(made.ttls) == 4_000
    assert held < 1.5 * len(data)  # the message is `data` itself; the entry has its own copy of the records
    assert made.size >= len(made.body) + 2 * len(made.ttls)


def test_response_that_would_fill_the_cache_is_not_cached() -> None:
    kept = Cache(10, 0, 80_000)
    kept.put(KEY, of_size(10_000))
    assert len(kept) == 0
    kept.put(KEY, of_size(10_000 - ENTRY_BYTES))
    assert len(kept) == 1


def test_cache_stays_within_its_bounds() -> None:
    """Random puts, replacements, hits and clears; the sums stay exact."""
    draw = random.Random(9)  # noqa: S311
    kept = Cache(500, 100, 400_000)
    for step in range(100_000):
        what, number = draw.random(), key(int(draw.expovariate(1 / 300)))
        if what < 0.7:
            kept.put(number, of_size(draw.choice((0, 50, 500, 5000)), draw.choice((0.0, 1e9)), draw.randrange(4)))
        elif what < 0.95:
            kept.get(number, 1.0)
        elif what < 0.9999:
            kept.get_stale(number, 1.0)
        else:
            kept.clear()
            assert (len(kept), kept.bytes) == (0, 0)
        assert len(kept) <= 500
        assert kept.bytes <= 400_000
        if step % 500 == 0:
            assert (kept.bytes, kept._second_bytes) == counted(kept)
            assert not kept._first.keys() & kept._second.keys()
            assert len(kept._second) <= 400
    assert (kept.bytes, kept._second_bytes) == counted(kept)
    assert kept.counts.evictions


@pytest.mark.parametrize("negatives", [False, True], ids=["positive", "negative"])
def test_flood_of_names_evicts_only_its_own_entries(negatives: bool) -> None:
    kept = Cache(1000, 0)
    for number in range(700):
        kept.put(key(number), entry(positive(), 0.0))
        assert kept.get(key(number), 1.0)
    flood = entry(negative(m.soa(300, 60), rcode=3) if negatives else positive(), 0.0)
    for number in range(10_000, 110_000):
        kept.put(key(number), flood)
    assert all(kept.get(key(number), 2.0) for number in range(700))
    assert len(kept) == 1000


def test_entries_asked_for_again_stay_longest() -> None:
    kept = Cache(10, 0)
    for number in range(12):
        kept.put(key(number), of_size(1))
        if number % 2:
            kept.get(key(number), 0.0)
    assert kept.keys(100)[-6:] == [key(number) for number in (1, 3, 5, 7, 9, 11)]
    assert kept.keys(2) == kept.keys(100)[:2]


def test_cache_is_thread_safe() -> None:
    kept, faults, stop = Cache(300, 100, 300_000), [], threading.Event()

    def reads() -> None:
        draw = random.Random(1)  # noqa: S311
        try:
            while not stop.is_set():
                found = kept.get(key(draw.randrange(500)), 1.0)
                if found:
                    found.aged(1.0, False)
                kept.get_stale(key(draw.randrange(500)), 1.0)
                kept.keys(10)
        except Exception as error:
            faults.append(error)

    reader = threading.Thread(target=reads)
    reader.start()
    draw = random.Random(2)  # noqa: S311
    for step in range(50_000):
        kept.put(key(draw.randrange(500)), of_size(draw.randrange(4, 3000), draw.choice((0.0, 1e9)), 1))
        if step % 10_000 == 0:
            kept.clear()
    stop.set()
    reader.join(10)
    assert faults == []
    assert (kept.bytes, kept._second_bytes) == counted(kept)


# ---- *.bind ----


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("version.bind", b"udpwatch"),
        ("VERSION.Bind", b"udpwatch"),
        ("cachesize.bind", b"2"),
        ("insertions.bind", b"3"),
        ("evictions.bind", b"1"),
        ("hits.bind", b"41"),
        ("misses.bind", b"7"),
        ("auth.bind", b"0"),
    ],
)
def test_chaos_names_report_statistics(asked: str, text: bytes) -> None:
    kept = Cache(2, 0)
    for number in range(3):
        kept.put(key(number), of_size(1))
    kept.get(key(2), 0.0), kept.get(key(77), 0.0)
    ours = responder(kept)
    ours.totals = lambda: (41, 7)
    reply = respond(ours, m.query(asked, m.TXT, klass=m.CH), 5.0)
    rdata = struct.pack("!B", len(text)) + text
    assert reply.data.endswith(m.record(m.TXT, rdata, 0, klass=m.CH))
    assert reply.until == 0.0, "statistics change"
    assert m.flags_of(reply.data) & m.AA


def test_chaos_servers() -> None:
    made = responder(Cache(2, 0))
    made.server_statistics = lambda: ["192.0.2.53#53 7 1", "fe80::1%é#53 1 0"]
    reply = respond(made, m.query("servers.bind", m.TXT, klass=m.CH), 0.0)
    strings = [b"192.0.2.53#53 7 1", "fe80::1%é#53 1 0".encode()]
    assert dns.message.from_wire(reply.data).answer[0][0].strings == tuple(strings)
    made.server_statistics = lambda: ["é" * 300] * 1000
    for tcp in (False, True):
        long = respond(made, m.query("servers.bind", m.TXT, klass=m.CH), 0.0, tcp)
        assert bool(m.flags_of(long.data) & m.TC) != tcp
        dns.message.from_wire(long.data, raise_on_truncation=False)
    made.server_statistics = list
    assert respond(made, m.query("servers.bind", m.TXT, klass=m.CH), 0.0).data.endswith(b"\0\1\0")


@pytest.mark.parametrize(
    ("asked", "ident", "rcode"),
    [
        ("version.bind", False, Rcode.REFUSED),
        ("unknown.bind", True, Rcode.NOTIMP),
        ("x.version.bind", True, Rcode.NOTIMP),
        ("bind", True, Rcode.NOTIMP),
        ("version.server", True, Rcode.REFUSED),
        ("xbind", True, Rcode.REFUSED),
    ],
)
def test_unknown_chaos_names_are_refused(asked: str, ident: bool, rcode: int) -> None:
    assert respond(responder(Cache(2, 0), ident=ident), m.query(asked, m.TXT, klass=m.CH), 0.0).rcode == rcode


def test_cache_key_is_in_lower_case() -> None:
    assert lower(m.name("WWW.Example")) == KEY[0]
