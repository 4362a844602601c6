"""Which client gives way when a shared resource is full."""

from __future__ import annotations

import ipaddress
import random
import time
from collections import Counter

import pytest

from udpwatch.dns.shares import Counts, LazyShares, Shares, Turns, network_of


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


# ---- LazyShares ----

THRESHOLD = 16


def added(lazy: LazyShares[int], clients: bytes, first: int = 0) -> None:
    """Add one item per client, an octet each."""
    for number, client in enumerate(clients, first):
        lazy.add(bytes((192, 0, 2, client)), number)


def test_counting_starts_at_the_threshold_and_stops_below_half() -> None:
    lazy: LazyShares[int] = LazyShares(THRESHOLD)
    added(lazy, bytes(range(THRESHOLD - 1)))
    assert lazy._shares is None
    added(lazy, bytes((100,)), THRESHOLD - 1)
    assert lazy._shares is not None
    for number in range(THRESHOLD // 2):
        lazy.remove(bytes((192, 0, 2, number)), number)
    assert len(lazy) == len(lazy._shares) == THRESHOLD // 2, "few enough that counting would not start, but not half"
    lazy.remove(bytes((192, 0, 2, THRESHOLD // 2)), THRESHOLD // 2)
    assert lazy._shares is None
    added(lazy, bytes(range(200, 200 + THRESHOLD)), 1000)
    assert lazy._shares is not None
    assert len(lazy) == len(lazy._shares) == 2 * THRESHOLD - THRESHOLD // 2 - 1


def test_items_below_the_threshold_are_counted_when_one_must_give_way() -> None:
    lazy: LazyShares[int] = LazyShares(1_000)
    added(lazy, bytes((1, 2, 2, 2, 1)))
    lazy.remove(bytes((192, 0, 2, 2)), 1)
    assert lazy._shares is None
    assert lazy.to_give_way(C) == (2, True), "2 and 2: the one that has had its count longest"
    lazy.add(A, 5)
    assert lazy.to_give_way(C) == (0, True)


@pytest.mark.parametrize("size", [1, 5, THRESHOLD - 1, THRESHOLD, 3 * THRESHOLD])
def test_same_item_gives_way_as_if_all_had_been_counted(size: int) -> None:
    draw = random.Random(size)  # noqa: S311
    for _ in range(200):
        clients = [packed(f"2001:db8:0:{draw.randrange(3)}::{draw.randrange(3)}") for _ in range(size)]
        plain, lazy = made(*clients), LazyShares[int](THRESHOLD)
        for number, client in enumerate(clients):
            lazy.add(client, number)
        for newcomer in {*clients, A}:
            assert lazy.to_give_way(newcomer) == plain.to_give_way(newcomer)


def test_decisions_agree_with_shares_whatever_came_and_went() -> None:
    """Counting anew may choose another one of several clients with the most; the claims are the same."""
    draw = random.Random(7)  # noqa: S311
    plain, lazy, items = Shares[int](), LazyShares[int](THRESHOLD), dict[int, bytes]()
    clients = [packed(f"2001:db8:0:{number % 4}::{number}") for number in range(9)]
    counted = Counter[bool]()

    def rank(item: int) -> tuple[int, int]:
        """How many items the owner's network has, and the owner; only the owner's oldest item gives way."""
        owner = items[item]
        assert item == min(each for each, client in items.items() if client == owner)
        networks = Counter(map(network_of, items.values()))
        return networks[network_of(owner)], sum(client == owner for client in items.values())

    for number in range(10_000):
        wanted = 3 * THRESHOLD if number // 200 % 2 else THRESHOLD // 4
        if len(items) < 2 or draw.random() < (0.7 if len(items) < wanted else 0.3):
            client = items[number] = draw.choice(clients)
            plain.add(client, number)
            lazy.add(client, number)
        else:
            item = draw.choice(list(items))
            client = items.pop(item)
            plain.remove(client, item)
            lazy.remove(client, item)
        assert len(lazy) == len(plain) == len(items)
        counted[lazy._shares is not None] += 1
        if items and number % 10 == 0:
            newcomer = draw.choice([*clients, A])
            (mine, greedier), (expected, is_greedier) = lazy.to_give_way(newcomer), plain.to_give_way(newcomer)
            assert greedier == is_greedier
            assert rank(mine)[0] == rank(expected)[0]
    assert min(counted[True], counted[False]) > 500, "the test has seen both"


# ---- turns ----


def test_clients_take_turns_however_many_items_each_has() -> None:
    turns: Turns[int] = Turns()
    for item in range(5):
        turns.add(A, item)
    turns.add(B, 10)
    turns.add(C, 20)
    turns.add(B, 11)
    assert [turns.of(each) for each in (A, B, C)] == [5, 2, 1]
    assert [turns.take() for _ in range(len(turns))] == [0, 10, 20, 1, 11, 2, 3, 4]


def test_addresses_of_one_64_take_one_turn() -> None:
    turns: Turns[int] = Turns()
    for item, client in enumerate([*(packed(f"2001:db8::{last}") for last in range(1, 4)), A]):
        turns.add(client, item)
    assert [turns.take() for _ in range(4)] == [0, 3, 1, 2]


def test_item_that_is_removed_or_taken_out_of_turn_does_not_come_again() -> None:
    turns: Turns[int] = Turns()
    for item in range(3):
        turns.add(A, item)
    turns.add(B, 10)
    turns.remove(A, 1)
    assert turns.take_from_greediest() == 0
    assert list(turns.networks()) == [A, B]
    assert turns.take_from(B) == 10
    assert (turns.take(), len(turns), list(turns.networks())) == (2, 0, [])
