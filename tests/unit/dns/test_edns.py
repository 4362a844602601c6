"""EDNS options of upstream queries, byte by byte. What dnsmasq sends is in tests/integration/test_dns_edns.py."""

from __future__ import annotations

import time

import dns.message
import dns_messages as m
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udpwatch.dns.edns import ClientOptions, are_added, depend_on_client, has_same_subnet, option, with_options
from udpwatch.dns.message import opt, parse_response
from udpwatch.dns.names import pack_address
from udpwatch.dns.settings import Settings, Subnet, Umbrella

CLIENT4, CLIENT6 = pack_address("198.51.100.215"), pack_address("2001:db8:1:2:aaaa:bbbb:cccc:dddd")
NONE = Subnet()


def subnets(ipv4: Subnet = NONE, ipv6: Subnet = NONE) -> ClientOptions:
    return ClientOptions(Settings(subnets=(ipv4, ipv6)))


def test_nothing_is_added_without_an_option() -> None:
    assert not are_added(Settings())
    assert not depend_on_client(Settings())
    assert ClientOptions(Settings()).of(CLIENT4) == b""


@pytest.mark.parametrize(
    ("subnet", "client", "data"),
    [
        (Subnet(), CLIENT4, "0001 00 00"),
        (Subnet(), CLIENT6, "0002 00 00"),
        (Subnet(32), CLIENT4, "0001 20 00 c63364d7"),
        (Subnet(24), CLIENT4, "0001 18 00 c63364"),
        (Subnet(25), CLIENT4, "0001 19 00 c6336480"),
        (Subnet(1), CLIENT4, "0001 01 00 80"),
        (Subnet(56), CLIENT6, "0002 38 00 20010db8000100"),
        (Subnet(57), CLIENT6, "0002 39 00 20010db800010000"),
        (Subnet(128), CLIENT6, "0002 80 00 20010db800010002aaaabbbbccccdddd"),
        (Subnet(23, "192.0.3.255"), CLIENT4, "0001 17 00 c00002"),
        (Subnet(23, "192.0.3.255"), CLIENT6, "0001 17 00 c00002"),
        (Subnet(33, "2001:db8:ffff::1"), CLIENT4, "0002 21 00 20010db880"),
        (Subnet(0, "2001:db8::1"), CLIENT4, "0002 00 00"),
    ],
)
def test_subnet(subnet: Subnet, client: bytes, data: str) -> None:
    assert subnets(subnet, subnet).of(client) == option(8, bytes.fromhex(data))


def test_cpe_id_comes_before_the_subnet() -> None:
    both = Settings(cpe_id=b"home 7", subnets=(NONE, NONE))
    assert ClientOptions(both).of(CLIENT4) == option(65074, b"home 7") + option(8, b"\0\1\0\0")
    assert are_added(Settings(cpe_id=b"home 7"))
    assert not depend_on_client(both)


MAC = bytes.fromhex("020000abcdef")


@pytest.mark.parametrize(
    ("formats", "options"),
    [
        (("binary",), option(65001, MAC)),
        (("base64",), option(65073, b"AgAAq83v")),
        (("text",), option(65073, b"02:00:00:ab:cd:ef")),
        (("text", "base64", "binary"), option(65001, MAC) + option(65073, b"02:00:00:ab:cd:ef")),
    ],
)
def test_mac_address(formats: tuple[str, ...], options: bytes) -> None:
    made = Settings(mac_formats=formats, cpe_id=b"x")
    known = ClientOptions(made, lambda client: MAC if client == CLIENT4 else b"")
    assert known.of(CLIENT4) == options + option(65074, b"x")
    assert known.of(CLIENT6) == option(65074, b"x"), "unknown"
    assert are_added(Settings(mac_formats=formats))
    assert depend_on_client(Settings(mac_formats=formats))


@pytest.mark.parametrize(
    ("umbrella", "client", "fields"),
    [
        (Umbrella(), CLIENT4, "0010 c63364d7"),
        (Umbrella(), CLIENT6, "0020 20010db800010002aaaabbbbccccdddd"),
        (Umbrella(1, 2, bytes(range(8))), CLIENT4, "0008 00000001 0010 c63364d7 0040 0001020304050607 0004 00000002"),
    ],
)
def test_umbrella(umbrella: Umbrella, client: bytes, fields: str) -> None:
    made = Settings(umbrella=umbrella, cpe_id=b"x")
    expected = option(65074, b"x") + option(20292, b"ODNS\1\0" + bytes.fromhex(fields))
    assert ClientOptions(made).of(client) == expected
    assert are_added(Settings(umbrella=umbrella))
    assert depend_on_client(Settings(umbrella=umbrella))


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "depends"),
    [
        (NONE, NONE, False),
        (Subnet(24), NONE, True),
        (NONE, Subnet(1), True),
        (Subnet(24, "192.0.2.1"), NONE, False),
        (Subnet(24, "192.0.2.1"), Subnet(64), True),
        (Subnet(24, "192.0.2.1"), Subnet(24, "192.0.2.2"), False),
    ],
)
def test_constant_subnets_do_not_depend_on_the_client(ipv4: Subnet, ipv6: Subnet, depends: bool) -> None:
    assert depend_on_client(Settings(subnets=(ipv4, ipv6))) is depends
    assert subnets(ipv4, ipv6).vary is depends


@pytest.mark.parametrize(
    "options", [b"", option(8, b"\0\1\0\0"), option(8, b"\0\1\x18\0abc") + option(65074, b"x" * 255)]
)
def test_record_with_options_is_valid(options: bytes) -> None:
    data = m.query("a.example", m.A, with_options(opt(0, True), options))
    parsed = dns.message.from_wire(data)
    assert b"".join(option(each.otype, each.to_wire()) for each in parsed.options) == options
    assert parsed.payload == 1232
    assert with_options(b"", options) == b""


def has_same(sent: bytes, *received: bytes, records: int = 1) -> bool:
    data = m.header(1, records, additional=1, flags=m.QR) + m.question("a.example")
    data += m.record(m.A, bytes(4), 300) * records + with_options(opt(), b"".join(received))
    return has_same_subnet(sent, data, parse_response(data).body_end)


SENT = option(8, bytes.fromhex("0001 18 00 c63364"))


@pytest.mark.parametrize(
    ("received", "same"),
    [
        ([], True),
        ([SENT], True),
        ([option(8, bytes.fromhex("0001 18 20 c63364"))], True),
        ([option(10, b"cookies!"), SENT], True),
        ([option(8, bytes.fromhex("0001 18 00 c63365"))], False),
        ([option(8, bytes.fromhex("0001 17 00 c63364"))], False),
        ([option(8, bytes.fromhex("0002 18 00 c63364"))], False),
        ([option(8, bytes.fromhex("0001 18 00 c6336400"))], False),
        ([option(8, b"")], False),
        ([option(10, b""), option(8, b"")], False),
    ],
)
def test_subnet_of_a_response_must_be_that_of_its_query(received: list[bytes], same: bool) -> None:
    assert has_same(SENT, *received) is same
    assert has_same(option(65074, b"x"), *received), "a query without a subnet"


def test_response_without_opt_has_no_subnet() -> None:
    data = m.header(1, 1, flags=m.QR) + m.question("a.example") + m.record(m.A, bytes(4), 300)
    assert has_same_subnet(SENT, data, parse_response(data).body_end)


@given(st.binary(max_size=200))
def test_any_octets_are_read(data: bytes) -> None:
    assert isinstance(has_same_subnet(SENT, b"\0\0\x29" + data, 0), bool)


def test_response_full_of_options_takes_little_time() -> None:
    data = b"\0" * 3 + with_options(opt(), option(10, b"") * 16_000)
    begin = time.thread_time()
    assert has_same_subnet(SENT, data, 3)
    assert time.thread_time() - begin < 0.001
