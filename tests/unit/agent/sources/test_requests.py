"""The table of requests that conntrack's events fill: shares, eviction, and which replies are undecided afterwards."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from udpwatch.agent.kernel.records import Requester
from udpwatch.agent.sources.requests import Requests

WINDOW = 30_000_000_000


def client(number: int, port: int = 53, inode: int = 1) -> Requester:
    return Requester(inode, 0, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 4444, port)


def test_full_table_evicts_from_the_tenant_that_holds_most() -> None:
    table = Requests(WINDOW, size=100)
    for number in range(40):
        table.remember(client(number, port=53), "10.9.0.1", number)
    for number in range(10_000):
        table.remember(client(number, port=514), "10.9.0.1", 100 + number)
    assert len(table) == 100
    assert all(table.get(client(number, port=53)) for number in range(40))
    assert table.evicted == 10_000 - 60
    assert not table.may_be_evicted(client(77, port=53), 10_100)
    assert table.may_be_evicted(client(9_000, port=514), 10_100)


def test_same_port_of_another_namespace_is_another_tenant() -> None:
    table = Requests(WINDOW, size=10)
    table.remember(client(1, inode=7), "10.9.0.1", 1)
    for number in range(100):
        table.remember(client(number, inode=8), "10.9.0.1", 2 + number)
    assert table.get(client(1, inode=7))
    assert not table.may_be_evicted(client(1, inode=7), 200)


def test_port_scan_in_another_namespace_evicts_its_own_requests() -> None:
    """Each scanned port has one request; the server has several."""
    table = Requests(WINDOW, size=1000)
    for number in range(20):
        table.remember(client(number, port=53, inode=7), "10.9.0.1", number)
    for number in range(5_000):
        table.remember(client(1, port=number % 60_000, inode=8), "10.9.0.1", 100 + number)
    assert all(table.get(client(number, port=53, inode=7)) for number in range(20))


def test_refreshed_request_is_evicted_last() -> None:
    table = Requests(WINDOW, size=3)
    for number in range(3):
        table.remember(client(number), "10.9.0.1", number)
    table.remember(client(0), "10.9.0.1", 10)
    table.remember(client(3), "10.9.0.1", 11)
    assert table.get(client(0))
    assert table.get(client(1)) is None


def test_two_newest_servers_are_kept() -> None:
    table = Requests(WINDOW)
    for when, server in enumerate(("a", "b", "c", "b"), 1):
        table.remember(client(1), server, when)
    known = table.get(client(1))
    assert known
    assert known.servers == [("c", 3), ("b", 4)]
    table.remember(client(1), "b", 2)  # read late, from conntrack's table
    assert known.servers == [("c", 3), ("b", 4)]


def test_expired_requests_are_dropped_and_not_counted() -> None:
    table = Requests(WINDOW, size=2)
    table.remember(client(1), "a", 1)
    table.remember(client(2), "a", 2)
    table.remember(client(3), "a", 2 + 2 * WINDOW)
    assert table.evicted == 0
    table.expire(3 + 2 * WINDOW)
    assert len(table) == 0
    table.remember(client(4), "a", 5 + 2 * WINDOW)
    assert len(table) == 1


def test_evicted_request_is_undecided_for_a_window() -> None:
    table = Requests(WINDOW, size=1)
    table.remember(client(1), "a", 1)
    table.remember(client(2), "a", 2)
    assert table.may_be_evicted(client(1), 2 + WINDOW)
    assert not table.may_be_evicted(client(1), 3 + WINDOW)


def test_evicted_clients_are_bounded_and_then_the_whole_tenant_is_undecided() -> None:
    """With more evictions than can be remembered, every client of that tenant may be one of them."""
    table = Requests(WINDOW, size=10)
    for number in range(1000):
        table.remember(client(number, port=514), "a", number)
    assert table.may_be_evicted(client(500_000, port=514), 1000)
    assert not table.may_be_evicted(client(500_000, port=53), 1000)


@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_for_random_tenants(seed: int) -> None:
    """No tenant loses a request while another tenant holds more."""
    chance = random.Random(seed)  # noqa: S311
    table = Requests(WINDOW, size=50)
    ports = [chance.randrange(1, 9) for _ in range(2000)]
    held: Counter[int] = Counter()
    for number, port in enumerate(ports):
        before = {each for each in range(number) if table.get(client(each, ports[each]))}
        table.remember(client(number, port), "a", number)
        held[port] += 1
        for each in before:
            if table.get(client(each, ports[each])) is None:
                assert held[ports[each]] == max(held.values())
                held[ports[each]] -= 1
        if number > 300:
            break
