"""Names that are computed from addresses, and back."""

from __future__ import annotations

import pytest

from udpwatch.dns.names import name_from_text, name_to_text, pack_address, unpack_address
from udpwatch.dns.settings import SynthDomain
from udpwatch.dns.synth import SynthDomains


def domain(first: str, last: str, prefix: str = "", numbered: bool = False, name: str = "a.example") -> SynthDomain:
    return SynthDomain(name_from_text(name), pack_address(first), pack_address(last), prefix, numbered)


DASHES = SynthDomains((domain("192.0.2.0", "192.0.2.255", "h-"), domain("2001:db8::", "2001:db8::ffff", "h-")))
NUMBERS = SynthDomains(
    (domain("192.0.2.250", "192.0.3.5", "n", True), domain("2001:db8::fffe", "2001:db8::1:1", "s", True))
)
BARE = SynthDomains((domain("::", "::ffff:ffff:ffff"),))


@pytest.mark.parametrize(
    ("domains", "name", "address"),
    [
        (DASHES, "h-192-0-2-0.a.example", "192.0.2.0"),
        (DASHES, "h-2001-db8--7.a.example", "2001:db8::7"),
        (NUMBERS, "n0.a.example", "192.0.2.250"),
        (NUMBERS, "n11.a.example", "192.0.3.5"),
        (NUMBERS, "s3.a.example", "2001:db8::1:1"),
        (BARE, "0--1.a.example", "::1"),
    ],
)
def test_both_ways(domains: SynthDomains, name: str, address: str) -> None:
    assert [unpack_address(each) for each in domains.addresses(name_from_text(name))] == [address]
    assert name_to_text(domains.pointer(pack_address(address)) or b"\0") == name


@pytest.mark.parametrize(
    ("domains", "name"),
    [
        (DASHES, "h-192-0-3-0.a.example"),
        (DASHES, "h-192-0-2.a.example"),
        (DASHES, "h-192-0-2-007.a.example"),
        (DASHES, "h-.a.example"),
        (DASHES, "192-0-2-1.a.example"),
        (DASHES, "h-192-0-2-1.b.example"),
        (DASHES, "h-192-0-2-1.x.a.example"),
        (DASHES, "h-192.0-2-1.a.example"),
        (DASHES, "h-2001-db9--7.a.example"),
        (DASHES, "h-192\\.0\\.2\\.1.a.example"),
        (DASHES, "a.example"),
        (DASHES, "."),
        (NUMBERS, "n12.a.example"),
        (NUMBERS, "n.a.example"),
        (NUMBERS, "n-1.a.example"),
        (NUMBERS, "n" + "9" * 62 + ".a.example"),
        (NUMBERS, "s4.a.example"),
    ],
)
def test_other_names_have_no_address(domains: SynthDomains, name: str) -> None:
    assert domains.addresses(name_from_text(name)) == []


def test_address_outside_the_range_has_no_name() -> None:
    for address in ("192.0.1.255", "192.0.3.0", "2001:db8::1:0", "::"):
        assert DASHES.pointer(pack_address(address)) is None


def test_mapped_address_has_dashes_for_its_dots() -> None:
    domains = SynthDomains((domain("::ffff:0:0", "::ffff:ffff:ffff", "h-"),))
    name = domains.pointer(pack_address("::ffff:192.0.2.1"))
    assert name == name_from_text("h---ffff-192-0-2-1.a.example")
    assert domains.addresses(name) == [pack_address("::ffff:192.0.2.1")]


def test_later_option_counts() -> None:
    domains = SynthDomains((domain("192.0.2.0", "192.0.2.9", "a"), domain("192.0.2.5", "192.0.2.9", "b")))
    assert domains.pointer(pack_address("192.0.2.1")) == name_from_text("a192-0-2-1.a.example")
    assert domains.pointer(pack_address("192.0.2.5")) == name_from_text("b192-0-2-5.a.example")
