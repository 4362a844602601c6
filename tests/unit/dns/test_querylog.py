"""The query log, line for line in dnsmasq 2.90's format (compared with it), plus lines that dnsmasq does not have."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import dns_messages as m
import pytest

from udpwatch.dns import querylog
from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import Entry, entry_of, failure
from udpwatch.dns.message import Rcode, parse_query, parse_response
from udpwatch.dns.names import name_from_text
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Drop, Forward, Responder, from_entry
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import DomainAddress, DomainServers, HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import build

CLIENT, PORT = "192.0.2.99", 40000
FROM = f"from {CLIENT}"

Lines = Callable[..., list[str]]


def wire(text: str) -> bytes:
    return name_from_text(text)


@pytest.fixture
def responder(tmp_path: Path) -> Responder:
    (tmp_path / "hosts").write_text("10.0.0.1 a.lan alias.lan\n10.0.0.2 a.lan\n2001:db8::1 a.lan\n")
    settings = Settings(
        hosts=False,
        addn_hosts=(tmp_path / "hosts",),
        log_queries=True,
        host_records=(HostRecord((wire("record.lan"),), ("10.0.0.3",)),),
        records=(
            StaticRecord(wire("w.lan"), m.CNAME, wire("a.lan")),
            StaticRecord(wire("t.lan"), m.TXT, b"\2hi"),
            StaticRecord(wire("long.lan"), m.TXT, b"\xff" + bytes(255)),
            StaticRecord(wire("long.lan"), m.TXT, b"\xfe" + bytes(254)),
        ),
        addresses=(DomainAddress(wire("nx.example"), None), DomainAddress(wire("wild.example"), "192.0.2.1")),
        domain_servers=(DomainServers(wire("lan"), ()),),
    )
    made = Responder(settings, build(settings, pytest.fail), Cache(10, 100))
    made.routes = Routes((), settings.domain_servers)
    return made


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines since the last call."""
    caplog.set_level(logging.INFO, querylog.__name__)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert all(line.isprintable() and line.isascii() for line in found), "one line each, whatever is in a name"
        return found

    return lines


def told(responder: Responder, data: bytes, log: QueryLog | None = None, now: float = 1.0) -> None:
    found = responder.respond(data, now)
    assert not isinstance(found, Drop)
    (log or QueryLog(False)).log_query(found, CLIENT, PORT)


LOCAL = [
    ("a.lan", m.A, ["query[A] a.lan", "HOSTS a.lan is 10.0.0.1", "HOSTS a.lan is 10.0.0.2"]),
    ("A.Lan", m.AAAA, ["query[AAAA] A.Lan", "HOSTS A.Lan is 2001:db8::1"]),
    ("alias.lan", m.AAAA, ["query[AAAA] alias.lan", "config alias.lan is NODATA-IPv6"]),
    ("a.lan", m.TXT, ["query[TXT] a.lan", "config a.lan is NODATA"]),
    ("a.lan", 257, ["query[CAA] a.lan", "config a.lan is NODATA"]),
    ("a.lan", m.HTTPS, ["query[HTTPS] a.lan", "config a.lan is NODATA"]),
    ("a.lan", 65280, ["query[type=65280] a.lan", "config a.lan is NODATA"]),
    ("t.lan", m.A, ["query[A] t.lan", "config t.lan is NODATA-IPv4"]),
    ("t.lan", m.TXT, ["query[TXT] t.lan", "config t.lan is <TXT>"]),
    ("long.lan", m.TXT, ["query[TXT] long.lan", "config long.lan is truncated"]),
    ("w.lan", m.AAAA, ["query[AAAA] w.lan", "config w.lan is <CNAME>", "HOSTS a.lan is 2001:db8::1"]),
    ("record.lan", m.A, ["query[A] record.lan", "config record.lan is 10.0.0.3"]),
    ("1.0.0.10.in-addr.arpa", m.PTR, ["query[PTR] 1.0.0.10.in-addr.arpa", "HOSTS 10.0.0.1 is a.lan"]),
    ("3.0.0.10.in-addr.arpa", m.PTR, ["query[PTR] 3.0.0.10.in-addr.arpa", "config 10.0.0.3 is record.lan"]),
    ("zz.lan", m.A, ["query[A] zz.lan", "config zz.lan is NXDOMAIN"]),
    ("x.nx.example", m.A, ["query[A] x.nx.example", "config x.nx.example is NXDOMAIN"]),
    ("x.wild.example", m.A, ["query[A] x.wild.example", "config x.wild.example is 192.0.2.1"]),
    ("lan", m.A, ["query[A] lan", "config lan is NODATA-IPv4"]),
    ("other.example", m.A, ["query[A] other.example", "config error is REFUSED"]),
    (".", m.NS, ["query[NS] .", "config error is REFUSED"]),
    ("a.lan", 252, ["query[AXFR] a.lan", "config error is REFUSED"]),
]


@pytest.mark.parametrize(("name", "kind", "expected"), LOCAL, ids=lambda value: str(value)[:40])
def test_local_responses(
    responder: Responder,
    written: Callable[[], list[str]],
    tmp_path: Path,
    name: str,
    kind: int,
    expected: list[str],
) -> None:
    told(responder, m.query(wire(name), kind))
    question, *answers = expected
    assert written() == [f"{question} {FROM}", *(line.replace("HOSTS", str(tmp_path / "hosts")) for line in answers)]


ANSWERS = [
    (m.response("b.example", m.A, (m.record(m.A, bytes((192, 0, 2, 1)), 60),)), ["b.example is 192.0.2.1"]),
    (m.response("b.example", m.AAAA, (m.record(m.AAAA, bytes(15) + b"\1", 60),)), ["b.example is ::1"]),
    (
        m.response(
            "b.example", m.A, (m.record(m.CNAME, b"\1c\xc0\x0c", 60), m.record(m.A, bytes(4), 60, b"\1c\xc0\x0c"))
        ),
        ["b.example is <CNAME>", "c.b.example is 0.0.0.0"],
    ),
    (m.response("b.example", m.A, (), (m.soa(),)), ["b.example is NODATA-IPv4"]),
    (m.response("b.example", m.MX, (), (m.soa(),)), ["b.example is NODATA"]),
    (m.response("b.example", m.A, (), (m.soa(),), rcode=3), ["b.example is NXDOMAIN"]),
    (
        m.response("b.example", m.A, (m.record(m.CNAME, m.name("d"), 60),), (m.soa(60, 60, b"\0"),), rcode=3),
        ["b.example is <CNAME>", "b.example is NXDOMAIN"],
    ),
    (m.response("b.example", m.TXT, (m.record(m.TXT, b"\1\n", 60),)), ["b.example is <TXT>"]),
    (m.response("b.example", 65280, (m.record(65280, b"\1\n", 60),)), ["b.example is <type=65280>"]),
    (m.response("b.example", m.A, (m.record(m.A, bytes(5), 60),)), ["b.example is <A>"]),
    (
        m.response(ip_address("192.0.2.1").reverse_pointer, m.PTR, (m.record(m.PTR, b"\4a\nb.\0", 60),)),
        ["192.0.2.1 is a\\010b\\."],
    ),
    (m.response("x.in-addr.arpa", m.PTR, (m.record(m.PTR, b"\1a\0", 60),)), ["x.in-addr.arpa is a"]),
    # invalid names are forwarded as received
    (m.response("b.example", m.PTR, (m.record(m.PTR, b"\5a", 60),)), ["b.example is <unreadable>"]),
]


@pytest.mark.parametrize(("data", "expected"), ANSWERS, ids=lambda value: str(value)[-60:])
@pytest.mark.parametrize(("source", "word"), [("forward", "reply"), ("cache", "cached"), ("stale", "cached-stale")])
def test_upstream_responses(
    written: Callable[[], list[str]], data: bytes, expected: list[str], source: str, word: str
) -> None:
    answer = parse_response(data)
    query = parse_query(m.header() + answer.question)
    reply = from_entry(query, entry_of(answer, 0.0, 0, 0, True), 512, 0.0, source)
    QueryLog(False).response(reply, CLIENT, PORT)
    assert written() == [f"{word} {line}" for line in expected]


def test_forwarded_query(responder: Responder, written: Callable[[], list[str]]) -> None:
    responder.routes = Routes((Server("192.0.2.53"),))
    found, log = responder.respond(m.query("b.example"), 1.0), QueryLog(False)
    assert isinstance(found, Forward)
    log.log_query(found, CLIENT, PORT)
    log.forwarded(found.query, "192.0.2.53#53", CLIENT, PORT)
    log.response(responder.refuse(found.query, Rcode.SERVFAIL), CLIENT, PORT)
    assert written() == [
        f"query[A] b.example {FROM}",
        "forwarded b.example to 192.0.2.53#53",
        "reply error is SERVFAIL",
    ]


def test_failure_from_the_cache(responder: Responder, written: Callable[[], list[str]]) -> None:
    responder.cache.put((wire("b.example"), m.A, m.IN, 0), failure(0.0))
    told(responder, m.query("b.example"))
    assert written()[1:] == ["cached b.example is SERVFAIL"]


def test_codes_without_a_name(written: Callable[[], list[str]]) -> None:
    query = parse_query(m.query("b.example", m.A, m.opt()))
    for rcode in (9, 23):
        reply = from_entry(query, Entry(rcode, b"", (0, 0, 0), array("H"), 0.0, 0.0), 512, 0.0, "forward")
        QueryLog(False).response(reply, CLIENT, PORT)
    assert written() == ["reply b.example is 9", "reply b.example is 23"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (m.query("a.lan", m.A, flags=4 << 11), ["query[type=0] .", "config error is NOTIMP"]),
        (m.query("a.lan", m.A, m.opt(version=1)), ["query[A] a.lan", "config error is BADVERS"]),
        (m.query("version.bind", m.TXT, klass=m.CH), ["query[TXT] version.bind", "config version.bind is <TXT>"]),
    ],
)
def test_unusual_queries(
    responder: Responder, written: Callable[[], list[str]], data: bytes, expected: list[str]
) -> None:
    told(responder, data)
    assert written() == [f"{expected[0]} {FROM}", *expected[1:]]


def test_malformed_query_is_not_logged(responder: Responder, written: Callable[[], list[str]]) -> None:
    told(responder, m.query("a.lan")[:-1])
    assert written() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"\x0ca\nquery[A] b\0", "a\\010query[A]\\032b"),
        (b"\x04\x1b[0m\0", "\\027[0m"),
        (b"\x03a\0b\0", "a\\000b"),
        (b"\x02\xc3\xbc\0", "\\195\\188"),
        (b"\x03a.b\x01\\\0", "a\\.b.\\\\"),
        (b"\x02\r\x7f\0", "\\013\\127"),
    ],
)
def test_names_are_escaped(responder: Responder, written: Callable[[], list[str]], name: bytes, text: str) -> None:
    told(responder, m.query(name))
    assert written() == [f"query[A] {text} {FROM}", "config error is REFUSED"]


# ---- extra ----


def test_extra_starts_with_serial_number_and_client(
    responder: Responder, written: Callable[[], list[str]], tmp_path: Path
) -> None:
    log = QueryLog(True)
    told(responder, m.query("alias.lan"), log)
    told(responder, m.query("zz.lan"), log)
    client = f"{CLIENT}/{PORT}"
    assert written() == [
        f"1 {client} query[A] alias.lan {FROM}",
        f"1 {client} {tmp_path / 'hosts'} alias.lan is 10.0.0.1",
        f"2 {client} query[A] zz.lan {FROM}",
        f"2 {client} config zz.lan is NXDOMAIN",
    ]


def test_two_queries_of_one_socket_keep_their_numbers(responder: Responder, written: Callable[[], list[str]]) -> None:
    """glibc asks for A and AAAA at once."""
    responder.routes, log = Routes((Server("192.0.2.53"),)), QueryLog(True)
    pair = [responder.respond(m.query("b.example", kind, ident=kind), 1.0) for kind in (m.A, m.AAAA)]
    for found in pair:
        assert isinstance(found, Forward)
        log.log_query(found, CLIENT, PORT)
    for found in pair:
        assert isinstance(found, Forward)
        log.response(responder.refuse(found.query, Rcode.SERVFAIL), CLIENT, PORT)
    assert [line.split()[0] for line in written()] == ["1", "2", "1", "2"]


def test_unanswered_queries_are_bounded(written: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(querylog, "MAX_OPEN", 3)
    log = QueryLog(True)
    for ident in range(10):
        log.query(parse_query(m.query("b.example", ident=ident)), CLIENT, PORT)
    assert len(log._open) == 3
    log.forwarded(parse_query(m.query("b.example", ident=0)), "192.0.2.53#53", CLIENT, PORT)
    assert written()[-1] == f"0 {CLIENT}/{PORT} forwarded b.example to 192.0.2.53#53"
