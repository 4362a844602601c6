"""Which names are not forwarded, which servers are queried, and which responses are rejected."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import dns_messages as m
import pytest

from udpwatch.dns.alias import rewritten
from udpwatch.dns.cache import Cache
from udpwatch.dns.message import Rcode, parse_response
from udpwatch.dns.names import is_single_label, is_subdomain, label_count, name_from_text, unpack_address
from udpwatch.dns.policy import LOOPBACK, PRIVATE, contains, never_forwarded, rebinds
from udpwatch.dns.responder import Forward, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import Alias, DomainServers, HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import build

DEFAULT, CORP, DEEP = Server("192.0.2.53"), Server("10.0.0.2"), Server("10.0.0.3")


def wire(text: str) -> bytes:
    return name_from_text(text)


def asked(settings: Settings, text: str, kind: int = m.A) -> int | str:
    """The response code, or "forward"."""
    responder = Responder(settings, build(settings, pytest.fail), Cache(0, 0))
    responder.routes = Routes((DEFAULT,), settings.domain_servers)
    found = responder.respond(m.query(wire(text), kind), 0.0)
    if isinstance(found, Forward):
        return "forward"
    assert isinstance(found, Reply)
    return found.rcode


# ---- --bogus-priv ----

PRIVATE_NAMES = [
    *(
        ip_address(text).reverse_pointer
        for text in ("10.0.0.1", "10.255.255.255", "127.0.0.1", "0.0.0.0", "169.254.9.9")
    ),
    *(ip_address(text).reverse_pointer for text in ("172.16.0.1", "172.31.255.255", "192.168.1.1", "192.0.2.1")),
    *(ip_address(text).reverse_pointer for text in ("198.51.100.1", "203.0.113.1", "255.255.255.255")),
    *(
        ip_address(text).reverse_pointer
        for text in ("::", "::1", "fd00::1", "fc00::1", "fe80::1", "febf::1", "2001:db8::1")
    ),
    # below an address: queries of DNS service discovery
    "b._dns-sd._udp.0.1.168.192.in-addr.arpa",
    "lb._dns-sd._udp." + ip_address("fd00::").reverse_pointer,
]
PUBLIC_NAMES = [
    *(
        ip_address(text).reverse_pointer
        for text in ("9.255.255.255", "11.0.0.0", "172.15.0.1", "172.32.0.1", "192.167.0.1")
    ),
    *(ip_address(text).reverse_pointer for text in ("193.168.0.1", "8.8.8.8", "255.255.255.254", "100.64.0.1")),
    *(ip_address(text).reverse_pointer for text in ("2001:db9::1", "fec0::1", "::2", "2a00::1")),
    "b._dns-sd._udp.8.8.8.8.in-addr.arpa",
    # parts of a reverse name: zones that exist
    *("arpa", "in-addr.arpa", "10.in-addr.arpa", "168.192.in-addr.arpa", "1.168.192.in-addr.arpa", "ip6.arpa"),
    *("1.0.0.10.in-addr.arpa.example", "1.0.0.10.xin-addr.arpa", "01.0.0.10.in-addr.arpa", "x.arpa"),
    *("1.0.0.10.ip6.arpa", "10.0.0.1", "e164.arpa"),
]


@pytest.mark.parametrize("text", PRIVATE_NAMES)
def test_private_reverse_names_are_not_forwarded(text: str) -> None:
    for kind in (m.PTR, m.A, m.TXT):
        assert asked(Settings(hosts=False, bogus_priv=True), text, kind) == Rcode.NXDOMAIN
    assert asked(Settings(hosts=False), text, m.PTR) == "forward"


@pytest.mark.parametrize("text", PUBLIC_NAMES)
def test_other_reverse_names_are_forwarded(text: str) -> None:
    assert asked(Settings(hosts=False, bogus_priv=True), text, m.PTR) == "forward"


def test_local_private_names_are_answered() -> None:
    hosts = (HostRecord((wire("a"),), ("10.0.0.1",)),)
    settings = Settings(hosts=False, bogus_priv=True, host_records=hosts)
    assert asked(settings, "1.0.0.10.in-addr.arpa", m.PTR) == Rcode.NOERROR
    assert asked(settings, "2.0.0.10.in-addr.arpa", m.PTR) == Rcode.NXDOMAIN


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((("168.192.in-addr.arpa", (CORP,), False),), {"1.1.168.192": "forward", "1.1.0.10": Rcode.NXDOMAIN}),
        ((("in-addr.arpa", (CORP,), False),), {"1.1.168.192": "forward", "1.1.0.10": "forward"}),
        ((("168.192.in-addr.arpa", (), True),), {"1.1.168.192": Rcode.NXDOMAIN}),
        ((("168.192.in-addr.arpa", (), False),), {"1.1.168.192": Rcode.NXDOMAIN}),
        (
            (("168.192.in-addr.arpa", (CORP,), False), ("1.168.192.in-addr.arpa", (), True)),
            {"1.1.168.192": Rcode.NXDOMAIN, "1.2.168.192": "forward"},
        ),
    ],
)
def test_private_reverse_names_go_to_servers_of_their_domain(
    told: tuple[tuple[str, tuple[Server, ...], bool], ...], expected: dict[str, int | str]
) -> None:
    """Servers of its own: the default servers (`--server=/DOMAIN/#`) do not know them, as in dnsmasq."""
    domains = tuple(DomainServers(wire(text), servers, standard) for text, servers, standard in told)
    settings = Settings(hosts=False, bogus_priv=True, domain_servers=domains)
    assert {text: asked(settings, f"{text}.in-addr.arpa", m.PTR) for text in expected} == expected


def test_long_reverse_name_is_read_quickly() -> None:
    settings = Settings(bogus_priv=True)
    assert not never_forwarded(settings, b"\x011" * 120 + b"\x07in-addr\x04arpa\x00", m.PTR)
    assert never_forwarded(settings, b"\x011" * 117 + b"\x0210\x07in-addr\x04arpa\x00", m.PTR)
    assert not never_forwarded(settings, b"\x03xxx" * 60 + b"\x04arpa\x00", m.PTR)


# ---- --domain-needed ----


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("plain", m.A, Rcode.NXDOMAIN),
        ("plain", m.AAAA, Rcode.NXDOMAIN),
        ("plain", m.TXT, "forward"),
        ("plain", m.HTTPS, "forward"),
        ("two.labels", m.A, "forward"),
        ("com", m.NS, "forward"),
    ],
)
def test_domain_needed_keeps_single_labels(text: str, kind: int, expected: int | str) -> None:
    assert asked(Settings(hosts=False, domain_needed=True), text, kind) == expected
    assert asked(Settings(hosts=False), text, kind) == "forward"


def test_is_single_label() -> None:
    assert [is_single_label(name) for name in (b"\0", b"\1a\0", b"\3a.b\0", b"\1a\1b\0")] == [True, True, True, False]


# ---- --stop-dns-rebind ----


def believed(settings: Settings, *records: bytes, name: str = "www.example", section: int = 1) -> bool:
    sections: list[tuple[bytes, ...]] = [(), (), ()]
    sections[section - 1] = records
    return not rebinds(settings, parse_response(m.response(name, m.A, *sections)))


def address(text: str, owner: bytes = m.TO_QUESTION) -> bytes:
    packed = ip_address(text).packed
    return m.record(m.A if len(packed) == 4 else m.AAAA, packed, 60, owner)


STOP = Settings(stop_dns_rebind=True)
LOCAL = ["127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "::1", "::", "::ffff:127.0.0.1"]
INSIDE = ["10.0.0.1", "172.16.5.5", "192.168.0.1", "169.254.169.254", "255.255.255.255"]
INSIDE += ["fd00::1", "fe80::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"]
OUTSIDE = ["8.8.8.8", "172.32.0.1", "2a00::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("text", LOCAL + INSIDE)
def test_private_addresses_are_rejected(text: str) -> None:
    assert not believed(STOP, address(text))
    assert not believed(STOP, address("8.8.8.8"), address(text)), "not even beside others"
    assert not believed(STOP, m.record(m.CNAME, m.name("x"), 60), address(text, m.name("x"))), "by way of an alias"
    assert believed(Settings(), address(text)), "off by default"


@pytest.mark.parametrize("text", OUTSIDE)
def test_public_addresses_are_accepted(text: str) -> None:
    assert believed(STOP, address(text))


def test_loopback_may_be_allowed() -> None:
    ok = Settings(stop_dns_rebind=True, rebind_localhost_ok=True)
    assert [believed(ok, address(text)) for text in LOCAL] == [True] * len(LOCAL)
    assert [believed(ok, address(text)) for text in INSIDE] == [False] * len(INSIDE)
    assert not believed(ok, address("127.0.0.1"), address("10.0.0.1"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("corp.example", True),
        ("a.b.corp.example", True),
        ("A.Corp.Example", True),
        ("xcorp.example", False),
        ("corp.example.com", False),
        ("example", False),
    ],
)
def test_domains_may_be_allowed(name: str, expected: bool) -> None:
    ok = Settings(stop_dns_rebind=True, rebind_domains_ok=(wire("corp.example"),))
    assert believed(ok, address("10.0.0.1"), name=name) == expected


def test_only_addresses_in_the_answer_section_count() -> None:
    for section in (2, 3):
        assert believed(STOP, address("10.0.0.1"), section=section)
    assert believed(STOP, m.record(m.A, bytes((10, 0, 0, 1, 0)), 60))
    assert believed(STOP, m.record(m.A, bytes(16), 60))
    assert believed(STOP, m.record(m.TXT, bytes((10, 0, 0, 1)), 60))
    assert believed(STOP, m.record(65280, bytes(4), 60)), "an unknown type"


def test_contains() -> None:
    assert contains((ip_network("10.0.0.0/8"),), ip_address("::ffff:10.1.1.1").packed)
    assert not contains(LOOPBACK, ip_address("10.1.1.1").packed)
    assert len(set(PRIVATE)) == len(PRIVATE)


# ---- routes ----


def upstreams(*domains: tuple[str, tuple[Server, ...], bool]) -> Routes:
    made = (
        DomainServers(wire(text) if text != "//" else b"", servers, standard) for text, servers, standard in domains
    )
    return Routes((DEFAULT,), tuple(made))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("google.com", (CORP,)),
        ("www.google.com", (CORP,)),
        ("supergoogle.com", (DEFAULT,)),
        ("google.com.example", (DEFAULT,)),
        ("com", ()),
        ("a.deep.google.com", (DEEP,)),
        ("xdeep.google.com", (CORP,)),
        ("std.deep.google.com", (DEFAULT,)),
        ("x.std.deep.google.com", (DEFAULT,)),
        ("ours.example", ()),
        ("x.ours.example", ()),
        ("example", ()),
        (".", (DEFAULT,)),
    ],
)
def test_most_specific_domain_wins_by_whole_labels(text: str, expected: tuple[Server, ...]) -> None:
    made = upstreams(
        ("google.com", (CORP,), False),
        ("deep.google.com", (DEEP,), False),
        ("std.deep.google.com", (), True),
        ("ours.example", (), False),
        ("//", (), False),
    )
    assert made.for_name(wire(text)) == expected


def test_octets_within_a_label_are_not_a_domain() -> None:
    made = upstreams(("google.com", (CORP,), False))
    assert made.for_name(b"\x0dxx\x06google\x03com\x00") == (DEFAULT,)
    assert made.for_name(b"\x0agoogle.com\x00") == (DEFAULT,)


def test_no_servers() -> None:
    assert Routes().for_name(wire("a.example")) is None
    standard = Routes((), (DomainServers(wire("example"), (), True),))
    assert standard.for_name(wire("a.example")) is None, "# means the default servers"


def test_servers_of_single_labels() -> None:
    made = upstreams(("//", (CORP,), False), ("lan", (DEEP,), False), ("ours", (), False), ("std", (), True))
    asked = {text: made.for_name(wire(text)) for text in ("host", "lan", "ours", "std")}
    assert asked == {"host": (CORP,), "lan": (DEEP,), "ours": (), "std": (CORP,)}
    assert made.for_name(wire("host.lan")) == (DEEP,)
    assert made.for_name(wire("host.std")) == (DEFAULT,)
    assert made.for_name(wire("host.example")) == (DEFAULT,)
    assert made.for_name(b"\0") == (DEFAULT,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ours", Rcode.NXDOMAIN), ("a.ours", Rcode.NXDOMAIN), ("a.corp", "forward"), ("b", "forward")],
)
def test_local_only_domain(text: str, expected: int | str) -> None:
    domains = (DomainServers(wire("ours"), ()), DomainServers(wire("corp"), (CORP,)))
    assert asked(Settings(hosts=False, domain_servers=domains), text) == expected


def test_is_subdomain() -> None:
    assert is_subdomain(wire("a.b"), wire("b"))
    assert is_subdomain(wire("b"), wire("b"))
    assert is_subdomain(wire("b"), b"\0")
    assert not is_subdomain(wire("ab"), wire("b"))
    assert not is_subdomain(b"\x04xx\x01b\x00", wire("b"))
    assert [label_count(name) for name in (b"\0", wire("a"), wire("a.b"))] == [0, 1, 2]


# ---- --alias ----


def aliased(*options: Alias, records: tuple[bytes, ...], additional: tuple[bytes, ...] = ()) -> list[str]:
    """The addresses of a response after --alias."""
    answer = parse_response(m.response("a.example", m.A, records, additional=additional))
    changed = rewritten(options, answer)
    return [unpack_address(changed.message[each.data : each.end]) for each in changed.records if each.type == m.A]


def number(text: str) -> int:
    return int(ip_address(text))


NETWORK = Alias(number("192.0.2.0"), number("192.0.2.0"), number("10.0.0.9"), number("255.255.255.0"), 0xFFFFFF00)
RANGE = Alias(number("192.0.2.4"), number("192.0.2.6"), number("10.1.0.0"), number("255.255.255.0"), 0xFFFFFFFF)
TWO = tuple(m.record(m.A, ip_address(text).packed) for text in ("192.0.2.5", "198.51.100.5"))


def test_alias_rewrites_the_bits_of_its_mask() -> None:
    assert aliased(NETWORK, records=TWO) == ["10.0.0.5", "198.51.100.5"]
    assert aliased(RANGE, records=TWO) == ["10.1.0.5", "198.51.100.5"]
    assert aliased(RANGE, records=(m.record(m.A, b"\xc0\0\2\7"), m.record(m.A, b"\xc0\0\2\3"))) == [
        "192.0.2.7",
        "192.0.2.3",
    ]


def test_last_alias_that_applies_counts() -> None:
    assert aliased(NETWORK, RANGE, records=TWO)[0] == "10.1.0.5"
    assert aliased(RANGE, NETWORK, records=TWO)[0] == "10.0.0.5"


def test_alias_rewrites_additional_records_but_nothing_else() -> None:
    assert aliased(NETWORK, records=TWO[1:], additional=TWO[:1]) == ["198.51.100.5", "10.0.0.5"]
    odd = (m.record(m.TXT, b"\xc0\0\2\5"), m.record(m.A, b"\xc0\0\2\5", klass=3), m.record(m.A, b"\xc0\0\2\5\0"))
    answer = parse_response(m.response("a.example", m.A, odd))
    assert rewritten((NETWORK,), answer) is answer
    assert rewritten((), answer) is answer


def test_rewritten_address_is_the_one_that_is_checked() -> None:
    answer = parse_response(m.response("a.example", m.A, TWO[:1]))
    settings = Settings(stop_dns_rebind=True, bogus_addresses=(ip_network("10.0.0.5"),))
    public = Alias(number("192.0.2.5"), number("192.0.2.5"), number("8.8.8.8"), 0xFFFFFFFF, 0xFFFFFFFF)
    assert rebinds(settings, answer)
    assert not rebinds(replace(settings, aliases=(public,)), answer)
    for aliases, rcode in (((), Rcode.NOERROR), ((NETWORK,), Rcode.NXDOMAIN)):
        changed = replace(settings, aliases=aliases)
        assert Responder(changed, build(changed, pytest.fail), Cache(0, 0)).entry_of(answer, 0.0).rcode == rcode


# ---- --filterwin2k ----


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("example", m.SOA, Rcode.NOERROR),
        ("_ldap._tcp.example", m.SRV, Rcode.NOERROR),
        ("example", m.SRV, Rcode.NOERROR),
        ("a_b.example", m.ANY, Rcode.NOERROR),
        ("example", m.ANY, "forward"),
        ("_x.example", m.TXT, "forward"),
        ("_x.example", m.A, "forward"),
    ],
)
def test_filterwin2k(name: str, kind: int, expected: int | str) -> None:
    assert asked(Settings(filter_windows=True), name, kind) == expected
    assert asked(Settings(), name, kind) == "forward"


def test_filterwin2k_leaves_local_services() -> None:
    local = (StaticRecord(wire("_ldap._tcp.example"), m.SRV, b"\0\1\0\1\0\1\1a\0"),)
    settings = Settings(filter_windows=True, records=local)
    responder = Responder(settings, build(settings, pytest.fail), Cache(0, 0))
    found = responder.respond(m.query("_ldap._tcp.example", m.SRV), 0.0)
    assert isinstance(found, Reply) and parse_response(found.data).counts == (1, 0, 0)
