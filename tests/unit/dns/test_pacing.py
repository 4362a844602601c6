"""Queries on their way to the forwarder, in virtual time."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import Any

import dns_messages as m
import pytest
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import now, run

from udpwatch.dns.budget import BURST_SECONDS, FORWARD_SHARE, MAX_DEBT_SECONDS, UNLIMITED, Budget
from udpwatch.dns.message import parse_query
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.pacing import MAX_QUEUED, MAX_QUEUED_PER_CLIENT, PACE_SECONDS, TAKEN_AT_ONCE, PacedQueue
from udpwatch.dns.responder import Forward
from udpwatch.dns.udp import UdpQuery
from udpwatch.dns.udp_socket import BATCH

A, B = (ipaddress.ip_address(text).packed for text in ("192.0.2.1", "192.0.2.2"))
RATE = FORWARD_SHARE * 0.5  # CPU seconds per second, with the quota of these tests


class Case:
    """A queue under a quota of half a CPU. Each query that is submitted takes ``cost`` seconds of CPU time."""

    def __init__(self, cost: float = 0.0, budget: Budget | None = None) -> None:
        self.metrics = Metrics()
        self.taken: list[UdpQuery] = []
        self.at: list[float] = []  # when
        self.used, self._cost = 0.0, cost
        loop: Any = VirtualPacketLoop()
        limited = Budget(lambda: 0.5, FORWARD_SHARE, asyncio.get_running_loop().time, lambda: self.used)
        self.queue = PacedQueue(loop, self.metrics, self.submit, budget or limited)

    def submit(self, query: UdpQuery) -> None:
        self.taken.append(query)
        self.at.append(now())
        self.used += self._cost

    def put(self, client: bytes, *numbers: int) -> None:
        """Let queries of a client arrive."""
        for first in range(0, len(numbers), BATCH):
            self.queue.put([query(client, number) for number in numbers[first : first + BATCH]])

    def clients(self) -> list[bytes]:
        return [each.client for each in self.taken]

    def rejects(self) -> dict[str, int]:
        return {reason: cell[0] for reason, cell in self.metrics.forward_rejects.items() if cell[0]}

    async def all_taken(self) -> None:
        """Wait until nothing waits."""
        while self.queue._waiting:
            await asyncio.sleep(PACE_SECONDS)


def query(client: bytes, number: int) -> UdpQuery:
    parsed = parse_query(m.query(f"n{number}.example", ident=number & 0xFFFF))
    nothing: Any = None
    return UdpQuery(nothing, nothing, b"", b"", client, Forward(parsed, 512), 0.0)


def play(story: Callable[[Case], Any], cost: float = 0.0) -> None:
    """Run a scenario with a queue."""

    async def begin() -> None:
        await story(Case(cost))

    run(begin())


def is_empty(queue: PacedQueue) -> bool:
    return (len(queue._waiting), len(queue._pace)) == (0, 0)


@pytest.mark.parametrize("cpus", [1.0, 4.0, None])
def test_without_a_quota_nothing_waits(cpus: float | None) -> None:
    async def flood() -> None:
        budget = UNLIMITED if cpus is None else Budget(lambda: cpus, FORWARD_SHARE, lambda: 0.0, lambda: 1e6)
        case = Case(budget=budget)
        case.put(A, *range(2 * MAX_QUEUED))
        case.put(B, 1)
        assert case.clients() == [A] * (2 * MAX_QUEUED) + [B]
        assert not case.rejects()
        assert is_empty(case.queue)

    run(flood())


def test_quota_that_is_lifted_lets_what_waits_go_first() -> None:
    async def flood() -> None:
        cpus = 0.5
        case = Case(budget=Budget(lambda: cpus, FORWARD_SHARE, asyncio.get_running_loop().time, lambda: 0.0))
        case.put(A, 1, 2)
        cpus = 1.0
        case.put(A, 3)
        assert not case.taken
        await asyncio.sleep(2 * PACE_SECONDS)
        assert [each.forward.query.id for each in case.taken] == [1, 2, 3]
        case.put(A, 4)
        assert len(case.taken) == 4

    run(flood())


def test_one_client_cannot_fill_the_queue() -> None:
    async def flood(case: Case) -> None:
        case.put(A, *range(3_000))
        case.put(B, *range(10))
        assert case.rejects() == {"queue_share": 3_000 - MAX_QUEUED_PER_CLIENT}
        await case.all_taken()
        assert Counter(case.clients()) == {A: MAX_QUEUED_PER_CLIENT, B: 10}
        assert max(Counter(case.at).values()) == TAKEN_AT_ONCE, "a turn takes no more"
        assert is_empty(case.queue)
        case.put(A, 1)  # its slots are free again
        await case.all_taken()
        assert case.clients()[-1] == A
        assert case.rejects() == {"queue_share": 3_000 - MAX_QUEUED_PER_CLIENT}

    play(flood)


def test_addresses_of_one_64_share_its_slots() -> None:
    async def flood(case: Case) -> None:
        networks = [ipaddress.ip_address(f"2001:db8:0:{number}::").packed[:8] for number in range(2)]
        for number in range(MAX_QUEUED_PER_CLIENT + 5):
            case.put(networks[0] + number.to_bytes(8, "big"), number)
        case.put(networks[1] + bytes(8), 1)
        assert case.rejects() == {"queue_share": 5}
        await case.all_taken()
        assert case.clients().index(networks[1] + bytes(8)) == 1, "its turn is the second"

    play(flood)


def test_clients_take_turns() -> None:
    async def flood(case: Case) -> None:
        case.put(A, *range(BATCH))
        case.put(B, *range(3))
        await case.all_taken()
        assert case.clients() == [A, B] * 3 + [A] * (BATCH - 3)
        for client in (A, B):
            numbers = [each.forward.query.id for each in case.taken if each.client == client]
            assert numbers == sorted(numbers), "the oldest first"

    play(flood)


def test_queries_wait_while_the_cpu_quota_is_used_up() -> None:
    async def flood(case: Case) -> None:
        case.put(A, *range(100))
        await asyncio.sleep(60)
        assert len(case.taken) == 100
        assert max(Counter(case.at).values()) == TAKEN_AT_ONCE, "one turn takes few"
        assert 0.3 / RATE < case.at[-1] < 0.4 / RATE

    play(flood, cost=0.004)


def test_queries_do_not_wait_while_there_is_cpu_time_left() -> None:
    async def flood(case: Case) -> None:
        case.put(A, *range(4 * TAKEN_AT_ONCE))
        await case.all_taken()
        assert case.at[-1] == pytest.approx(4 * PACE_SECONDS)

    play(flood, cost=BURST_SECONDS / (4 * TAKEN_AT_ONCE))


def test_work_that_cannot_wait_does_not_stop_queries() -> None:
    async def flood() -> None:
        time = asyncio.get_running_loop().time
        case = Case(budget=Budget(lambda: 0.5, FORWARD_SHARE, time, time))  # other work keeps the thread busy
        await asyncio.sleep(600)
        case.put(A, *range(TAKEN_AT_ONCE + 1))
        longest = MAX_DEBT_SECONDS / RATE + 2 * PACE_SECONDS
        await asyncio.sleep(longest)
        assert len(case.taken) == TAKEN_AT_ONCE
        await asyncio.sleep(longest)
        assert len(case.taken) == TAKEN_AT_ONCE + 1

    run(flood())


def test_queue_is_bounded_for_all_clients_together() -> None:
    async def flood(case: Case) -> None:
        for number in range(MAX_QUEUED + 7):
            case.put(number.to_bytes(4, "big"), number)
        assert case.rejects() == {"queue": 7}
        assert len(case.queue._waiting) == MAX_QUEUED
        await case.all_taken()
        assert case.clients() == [number.to_bytes(4, "big") for number in range(7, MAX_QUEUED + 7)]
        assert is_empty(case.queue)

    play(flood)


def test_full_queue_drops_the_oldest_of_the_client_with_the_most() -> None:
    """Four clients fill it; a fifth one is served all the same. Of clients with one query each, the oldest loses it."""

    async def flood(case: Case) -> None:
        case.put(B, *range(10))  # whose turn is the next one
        greedy = [number.to_bytes(4, "big") for number in range(MAX_QUEUED // MAX_QUEUED_PER_CLIENT)]
        for each in greedy:
            case.put(each, *range(MAX_QUEUED_PER_CLIENT))
        case.put(B, *range(10, 20))
        await case.all_taken()
        taken = Counter(case.clients())
        assert taken[B] == 20
        assert taken.total() == MAX_QUEUED
        assert case.rejects() == {"queue": 20}
        for each in greedy:
            assert taken[each] == MAX_QUEUED_PER_CLIENT - 20 // len(greedy)
            first = next(query for query in case.taken if query.client == each)
            assert first.forward.query.id == MAX_QUEUED_PER_CLIENT - taken[each], "its oldest ones were dropped"

        case.taken.clear()
        for number in range(MAX_QUEUED):
            case.put(number.to_bytes(4, "big"), number)
        case.put(B, 0)
        await case.all_taken()
        taken = Counter(case.clients())
        assert (taken[B], taken[bytes(4)]) == (1, 0)

    play(flood)
