"""Names with the addresses of interfaces."""

from __future__ import annotations

from ipaddress import ip_interface

from udpwatch.dns.addresses import Local
from udpwatch.dns.interfaces import HostInterfaces
from udpwatch.dns.names import MAX_ADDRESSES, name_from_text, pack_address, unpack_address
from udpwatch.dns.settings import InterfaceName, Settings

A, B = name_from_text("a.example"), name_from_text("b.example")


def local(text: str, label: str = "eth0", preferred: bool = True) -> Local:
    """An address of this host, as ADDRESS/PREFIX."""
    parsed = ip_interface(text)
    interface = label.partition(":")[0]
    return Local(parsed.ip.packed, parsed.network, 1, interface, True, label, preferred)


def host(*names: InterfaceName, addresses: tuple[Local, ...] = ()) -> HostInterfaces:
    interfaces = HostInterfaces(Settings(interface_names=names))
    interfaces.update(addresses)
    return interfaces


def addresses(interfaces: HostInterfaces, name: bytes = A) -> list[str]:
    table = interfaces.addresses(name)
    assert table is not None
    return [unpack_address(each) for size in (4, 16) for each in table[size]]


def test_name_has_the_addresses_of_its_interface() -> None:
    every = (
        local("192.0.2.1/24"),
        local("2001:db8::1/64"),
        local("198.51.100.1/24", "eth1"),
        local("192.0.2.9/24", "eth0:1"),
    )
    interfaces = host(InterfaceName(A, "eth0"), InterfaceName(B, "eth0:1"), addresses=every)
    assert addresses(interfaces) == ["192.0.2.1", "2001:db8::1"]
    assert addresses(interfaces, B) == ["192.0.2.9"]
    assert interfaces.pointer(pack_address("192.0.2.1")) == A
    assert interfaces.pointer(pack_address("198.51.100.1")) is None
    assert interfaces.addresses(name_from_text("c.example")) is None


def test_name_with_one_family() -> None:
    every = local("192.0.2.1/24"), local("2001:db8::1/64")
    assert addresses(host(InterfaceName(A, "eth0", ipv6=None), addresses=every)) == ["192.0.2.1"]
    assert addresses(host(InterfaceName(A, "eth0", ipv4=None), addresses=every)) == ["2001:db8::1"]


def test_name_of_a_missing_interface_has_no_address() -> None:
    assert addresses(host(InterfaceName(A, "eth0"))) == []


def test_host_part_is_joined_with_each_network() -> None:
    every = local("192.0.2.1/24"), local("198.51.100.130/25"), local("192.0.2.2/24"), local("2001:db8:0:5::1/60")
    interfaces = host(InterfaceName(A, "eth0", "10.0.0.8", "::a:b:c:d:e"), addresses=every)
    assert addresses(interfaces) == ["192.0.2.8", "198.51.100.136", "2001:db8:0:a:b:c:d:e"]
    assert interfaces.pointer(pack_address("198.51.100.136")) == A


def test_temporary_addresses_have_reverse_names_only() -> None:
    interfaces = host(InterfaceName(A, "eth0"), addresses=(local("2001:db8::7/64", preferred=False),))
    assert addresses(interfaces) == []
    assert interfaces.pointer(pack_address("2001:db8::7")) == A


def test_first_name_of_an_address_is_its_reverse_name() -> None:
    interfaces = host(InterfaceName(A, "eth0"), InterfaceName(B, "eth0"), addresses=(local("192.0.2.1/24"),))
    assert interfaces.pointer(pack_address("192.0.2.1")) == A
    assert addresses(interfaces) == addresses(interfaces, B) == ["192.0.2.1"]


def test_update_reports_changes_of_responses_only() -> None:
    interfaces = host(InterfaceName(A, "eth0"))
    assert interfaces.update([local("192.0.2.1/24")])
    assert not interfaces.update([local("192.0.2.1/24"), local("198.51.100.1/24", "eth1")])
    assert interfaces.update([local("192.0.2.2/24")])
    assert not HostInterfaces(Settings()).update([local("192.0.2.1/24")])


def test_addresses_in_the_network_of_the_address_asked() -> None:
    interfaces = HostInterfaces(Settings(localise_queries=True))
    assert not interfaces.update([local("192.0.2.1/24"), local("10.0.0.1/8", "eth1"), local("2001:db8::1/64")])
    data = tuple(pack_address(text) for text in ("192.0.2.7", "198.51.100.7", "192.0.2.8"))
    assert interfaces.near(data, pack_address("192.0.2.1")) == (data[0], data[2])
    assert interfaces.near(data, pack_address("10.0.0.1")) == data, "none of them is there"
    selects = [interfaces.selects(pack_address(text)) for text in ("192.0.2.1", "192.0.2.2", "2001:db8::1")]
    assert selects == [True, False, False]
    assert not interfaces.selects(b"")
    assert not host(InterfaceName(A, "eth0"), addresses=(local("192.0.2.1/24"),)).selects(pack_address("192.0.2.1"))


def test_number_of_addresses_is_bounded() -> None:
    every = tuple(local(f"10.0.{number // 250}.{number % 250}/16") for number in range(MAX_ADDRESSES + 9))
    assert len(addresses(host(InterfaceName(A, "eth0"), addresses=every))) == MAX_ADDRESSES
