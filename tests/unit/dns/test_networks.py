"""Sets of networks give what the standard library gives for each network."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from udpwatch.dns.names import pack_address
from udpwatch.dns.networks import NetworkSet, network_set
from udpwatch.dns.policy import LOOPBACK, PRIVATE, contains


@pytest.mark.parametrize("networks", [PRIVATE, LOOPBACK, ()], ids=["private", "loopback", "none"])
def test_same_as_each_network(networks: tuple[object, ...]) -> None:
    choose, given = random.Random(1), NetworkSet(networks)  # type: ignore[arg-type]  # noqa: S311
    edges = [edge for each in PRIVATE for edge in (each[0], each[-1])]
    near = [int(edge) + step for edge in edges for step in (-1, 0, 1)]
    v4 = [number for number in near if 0 <= number < 1 << 32] + [choose.randrange(1 << 32) for _ in range(2000)]
    v6 = [number for number in near if 0 <= number < 1 << 128] + [choose.randrange(1 << 128) for _ in range(2000)]
    packed = [IPv4Address(each).packed for each in v4] + [IPv6Address(each).packed for each in v6]
    packed += [b"\0" * 10 + b"\xff\xff" + IPv4Address(each).packed for each in v4]
    for each in packed:
        assert (each in given) == contains(networks, each), each  # type: ignore[arg-type]


def test_overlapping_and_adjacent_networks() -> None:
    texts = ("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "255.255.255.255/32", "0.0.0.0/32")
    given = NetworkSet([ip_network(text) for text in texts])
    inside = (
        "10.0.0.0",
        "10.1.2.3",
        "10.255.255.255",
        "11.255.255.255",
        "255.255.255.255",
        "0.0.0.0",
        "::ffff:10.0.0.1",
    )
    outside = ("9.255.255.255", "12.0.0.0", "255.255.255.254", "0.0.0.1", "::10.0.0.1", "::")
    assert all(pack_address(text) in given for text in inside)
    assert not any(pack_address(text) in given for text in outside)


def test_set_is_built_once() -> None:
    assert network_set(PRIVATE) is network_set(tuple(PRIVATE))
