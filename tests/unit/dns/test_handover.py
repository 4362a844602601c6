"""Queries on their way from the UDP thread to the event loop."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Iterator

import dns_messages as m
import pytest
from virtual_time import now, run, turns

from udpwatch.dns.budget import MAX_DEBT_SECONDS, SHARE, Budget
from udpwatch.dns.forwarder import ClientQuery
from udpwatch.dns.handover import MAX_QUEUED, MAX_QUEUED_PER_CLIENT, TAKEN_WHERE_LIMITED, HandoverQueue
from udpwatch.dns.message import parse_query
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.responder import Forward, Reply
from udpwatch.dns.udp import Pending
from udpwatch.dns.udp_socket import BATCH, UdpSocket, open_socket

A, B = (ipaddress.ip_address(text).packed for text in ("192.0.2.1", "192.0.2.2"))


@pytest.fixture
def link() -> Iterator[UdpSocket]:
    link = open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False)
    yield link
    link.close()


def pending(link: UdpSocket, client: bytes, number: int) -> Pending:
    query = parse_query(m.query(f"n{number}.example", ident=number & 0xFFFF))
    name = b"\2\0" + (1024 + number).to_bytes(2, "big") + client + bytes(8)
    return Pending(link, name, bytes(32), Forward(query, 512), 0.0)


def test_one_client_cannot_fill_the_queue(link: UdpSocket) -> None:
    async def flood() -> None:
        metrics, taken = Metrics(), Counter[bytes]()
        in_turn: list[int] = []

        def take(query: ClientQuery) -> None:
            taken[query.client] += 1
            in_turn[-1] += 1

        queue = HandoverQueue(metrics, take)
        queue.start()
        for first in range(0, 3_000, BATCH):
            queue.put([pending(link, A, first + number) for number in range(BATCH)])
        queue.put([pending(link, B, number) for number in range(10)])
        for _ in range(100):
            in_turn.append(0)
            await asyncio.sleep(0)
        assert taken == {A: MAX_QUEUED_PER_CLIENT, B: 10}
        assert metrics.forward_rejects["queue_share"][0] >= 3_000 - MAX_QUEUED_PER_CLIENT
        assert metrics.forward_rejects["queue"][0] == 0
        assert max(in_turn) == BATCH, "a turn of the event loop takes no more"
        in_turn.append(0)
        queue.put([pending(link, A, 1)])  # its slots are free again
        await turns()
        assert taken[A] == MAX_QUEUED_PER_CLIENT + 1

    run(flood())


def test_clients_take_turns(link: UdpSocket) -> None:
    async def flood() -> None:
        taken: list[bytes] = []
        queue = HandoverQueue(Metrics(), lambda query: taken.append(query.client))
        queue.start()
        queue.put([pending(link, A, number) for number in range(BATCH)])
        queue.put([pending(link, B, number) for number in range(3)])
        await turns()
        assert taken == [A, B] * 3 + [A] * (BATCH - 3)

    run(flood())


def test_queries_wait_while_the_cpu_quota_is_used_up(link: UdpSocket) -> None:
    async def flood() -> None:
        taken: list[float] = []
        used = 0.0

        def submit(_: ClientQuery) -> None:
            nonlocal used
            used += 0.004
            taken.append(now())

        budget = Budget(lambda: 0.5, SHARE, asyncio.get_running_loop().time, lambda: used)
        queue = HandoverQueue(Metrics(), submit, budget)
        queue.start()
        queue.put([pending(link, A, number) for number in range(100)])
        await asyncio.sleep(60)
        assert len(taken) == 100
        assert max(Counter(taken).values()) == TAKEN_WHERE_LIMITED, "one turn takes few"
        assert 0.3 / (SHARE * 0.5) < taken[-1] < 0.4 / (SHARE * 0.5)

    run(flood())


def test_work_that_cannot_wait_does_not_stop_queries(link: UdpSocket) -> None:
    async def flood() -> None:
        taken: list[float] = []
        loop = asyncio.get_running_loop()
        budget = Budget(lambda: 0.5, SHARE, loop.time, loop.time)  # other work keeps the thread busy all the time
        queue = HandoverQueue(Metrics(), lambda _: taken.append(now()), budget)
        queue.start()
        await asyncio.sleep(600)
        queue.put([pending(link, A, number) for number in range(TAKEN_WHERE_LIMITED + 1)])
        longest = MAX_DEBT_SECONDS / (SHARE * 0.5)
        await asyncio.sleep(longest)
        assert len(taken) == TAKEN_WHERE_LIMITED
        await asyncio.sleep(longest)
        assert len(taken) == TAKEN_WHERE_LIMITED + 1

    run(flood())


def test_queue_is_bounded_for_all_clients_together(link: UdpSocket) -> None:
    async def flood() -> None:
        metrics = Metrics()
        queue = HandoverQueue(metrics, lambda query: None)
        queue.start()
        queue.put([pending(link, number.to_bytes(4, "big"), number) for number in range(MAX_QUEUED + 7)])
        assert metrics.forward_rejects["queue"][0] == 7

    run(flood())


def test_full_queue_drops_the_oldest_of_the_client_with_the_most(link: UdpSocket) -> None:
    """Four clients fill it; a fifth one is served all the same. Of clients with one query each, the oldest loses it."""

    async def flood() -> None:
        metrics, taken = Metrics(), Counter[bytes]()
        queue = HandoverQueue(metrics, lambda query: taken.update([query.client]))
        queue.start()
        greedy = [number.to_bytes(4, "big") for number in range(MAX_QUEUED // MAX_QUEUED_PER_CLIENT)]
        for each in greedy:
            queue.put([pending(link, each, number) for number in range(MAX_QUEUED_PER_CLIENT)])
        queue.put([pending(link, B, number) for number in range(10)])
        await turns(2 * MAX_QUEUED)
        assert taken[B] == 10
        assert taken.total() == MAX_QUEUED
        assert metrics.forward_rejects["queue"][0] == 10

        queue.put([pending(link, number.to_bytes(4, "big"), number) for number in range(MAX_QUEUED)])
        queue.put([pending(link, B, 0)])
        taken.clear()
        await turns(2 * MAX_QUEUED)
        assert (taken[B], taken[bytes(4)]) == (1, 0)

    run(flood())


def test_response_goes_back_to_its_client(link: UdpSocket) -> None:
    async def forward() -> bytes:
        metrics = Metrics()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind(("127.0.0.1", 0))
            address, port = client.getsockname()
            name = b"\2\0" + port.to_bytes(2, "big") + socket.inet_aton(address) + bytes(8)
            control = bytes(20) + socket.inet_aton("127.0.0.1") + bytes(8)
            query = parse_query(m.query("www.example"))
            queue = HandoverQueue(metrics, lambda each: each.deliver(Reply(b"response", "forward", 0, query)))
            queue.start()
            queue.put([Pending(link, name, control, Forward(query, 512), 0.0)])
            await turns()
            client.settimeout(5)
            assert metrics.dropped["send"][0] == 0
            assert sum(metrics.duration["forward"].counts) == 1
            return client.recv(100)

    assert run(forward()) == b"response"


def test_response_for_a_closed_socket_is_counted(link: UdpSocket) -> None:
    async def forward() -> int:
        metrics = Metrics()
        queue = HandoverQueue(metrics, lambda each: each.deliver(Reply(b"response", "forward", 0)))
        queue.start()
        queue.put([pending(link, A, 1)])
        link.close()
        await turns()
        return metrics.dropped["send"][0]

    assert run(forward()) == 1
