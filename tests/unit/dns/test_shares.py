"""Which client gives way when a shared resource is full."""

from __future__ import annotations

import ipaddress
import random
import time
from collections import Counter

import pytest

from udpwatch.dns.shares import Counts, Shares, network_of


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


A, B, C = packed("192.0.2.1"), packed("192.0.2.2"), packed("192.0.2.3")


def made(*clients: bytes) -> Shares[int]:
    """One item per client, numbered in order."""
    shares: Shares[int] = Shares()
    for number, client in enumerate(clients):
        shares.add(client, number)
    return shares


def test_ipv6_client_counts_as_its_64() -> None:
    assert (
        network_of(packed("2001:db8:0:1::5"))
        == network_of(packed("2001:db8:0:1:ffff::"))
        == packed("2001:db8:0:1::")[:8]
    )
    assert network_of(A) == A
    assert network_of(packed("fe80::1")) != network_of(packed("fe80::2")), "hosts on a link are separate clients"


@pytest.mark.parametrize(
    ("clients", "newcomer", "expected"),
    [
        ((A, A, A), B, (0, True)),
        ((B, A, A, A), B, (1, True)),  # 2 would be less than 3
        ((B, B, A, A, A), B, (2, False)),  # 3 and 3: an equal claim
        ((A, A, A), A, (0, False)),
        ((A, B, C), packed("192.0.2.9"), (0, False)),  # the one that has had its count longest
        ((B, A, A, C, A, B), C, (1, True)),
    ],
)
def test_greediest_client_gives_way(clients: tuple[bytes, ...], newcomer: bytes, expected: tuple[int, bool]) -> None:
    assert made(*clients).to_give_way(newcomer) == expected


def test_addresses_of_one_64_count_as_one_client() -> None:
    many = [packed(f"2001:db8:0:1::{each:x}") for each in range(1, 11)]
    victim = packed("2001:db8:0:2::1")
    shares = made(victim, victim, *many)
    assert shares.to_give_way(victim) == (2, True)
    assert shares.to_give_way(packed("192.0.2.1")) == (2, True)


def test_addresses_of_one_64_have_separate_shares() -> None:
    """The pods of a node often share one /64."""
    attacker, victim = packed("fd00::bad"), packed("fd00::1")
    shares = made(victim, *[attacker] * 10)
    assert shares.to_give_way(victim) == (1, True)
    assert shares.to_give_way(attacker) == (1, False)
    other = made(victim, *[attacker] * 10, *[A] * 3)
    assert other.to_give_way(A) == (1, True)


def test_removed_item_no_longer_counts() -> None:
    shares = made(A, A, B)
    shares.remove(A, 0)
    shares.remove(A, 1)
    assert (len(shares), shares.to_give_way(C)) == (1, (2, False))
    shares.remove(B, 2)
    assert (len(shares), vars(shares)["_items"], vars(shares)["_clients"]) == (0, {}, {})


def test_counts_agree_with_a_simple_model() -> None:
    draw, counts, plain = random.Random(4), Counts[int](), Counter[int]()  # noqa: S311
    for _ in range(20_000):
        name = draw.randrange(50)
        change = 1 if not plain[name] or draw.random() < 0.5 else -1
        counts.add(name, change)
        plain[name] += change
        if any(plain.values()):
            assert plain[counts.greediest()] == max(plain.values())
        assert counts[name] == plain[name]
    assert len(counts) == sum(1 for count in plain.values() if count)


def test_cost_does_not_depend_on_the_number_of_clients() -> None:
    """Addresses can be forged: ten times as many must not take nearly ten times as long."""

    def seconds(clients: int) -> float:
        shares = made(*(struct.to_bytes(4, "big") for struct in range(clients)))
        begun = time.perf_counter()
        for number in range(2_000):
            item, _ = shares.to_give_way(C)
            shares.remove(item.to_bytes(4, "big"), item)
            shares.add(item.to_bytes(4, "big"), item)
            assert number is not None
        return time.perf_counter() - begun

    assert seconds(40_000) < 5 * min(seconds(400) for _ in range(3))
