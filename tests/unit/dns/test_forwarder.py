"""Questions on their way from the UDP thread to upstream servers, and who waits for them. No server answers here."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Iterator

import dns_messages as m
import pytest

from udpwatch.dns import forwarder as module
from udpwatch.dns.cache import Cache
from udpwatch.dns.failover import Failover
from udpwatch.dns.forwarder import MAX_REPEATS_PER_CLIENT, ClientQuery, Forwarder
from udpwatch.dns.handover import MAX_QUEUED, MAX_QUEUED_PER_CLIENT, HandoverQueue
from udpwatch.dns.message import Rcode, parse_query
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.responder import Forward, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.udp import Pending
from udpwatch.dns.udp_socket import BATCH, UdpSocket, open_socket
from udpwatch.dns.upstream import UpstreamClient
from udpwatch.dns.zone import build

A, B = (ipaddress.ip_address(text).packed for text in ("192.0.2.1", "192.0.2.2"))
LIMIT = 10


@pytest.fixture
def link() -> Iterator[UdpSocket]:
    link = open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False)
    yield link
    link.close()


def pending(link: UdpSocket, client: bytes, number: int) -> Pending:
    query = parse_query(m.query(f"n{number}.example", ident=number & 0xFFFF))
    name = b"\2\0" + (1024 + number).to_bytes(2, "big") + client + bytes(8)
    return Pending(link, name, bytes(32), Forward(query, 512), 0.0)


def test_one_client_cannot_fill_the_way_to_the_loop(link: UdpSocket) -> None:
    async def run() -> None:
        metrics, taken = Metrics(), Counter[bytes]()
        turns: list[int] = []

        def take(each: ClientQuery) -> None:
            taken[each.client] += 1
            turns[-1] += 1

        hand_over = HandoverQueue(metrics, take)
        hand_over.start()
        for first in range(0, 3_000, BATCH):
            hand_over.put([pending(link, A, first + number) for number in range(BATCH)])
        hand_over.put([pending(link, B, number) for number in range(10)])
        while taken.total() < MAX_QUEUED_PER_CLIENT + 10:
            turns.append(0)
            await asyncio.sleep(0)
        assert taken == {A: MAX_QUEUED_PER_CLIENT, B: 10}
        assert metrics.forward_rejects["queue_share"][0] >= 3_000 - MAX_QUEUED_PER_CLIENT
        assert metrics.forward_rejects["queue"][0] == 0
        assert max(turns) == BATCH, "a turn of the loop takes no more"
        hand_over.put([pending(link, A, 1)])  # its places are free again
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert taken[A] == MAX_QUEUED_PER_CLIENT + 1

    asyncio.run(asyncio.wait_for(run(), 60))


def test_all_clients_together_have_a_limit(link: UdpSocket) -> None:
    async def run() -> None:
        metrics = Metrics()
        hand_over = HandoverQueue(metrics, lambda each: None)
        hand_over.start()
        hand_over.put([pending(link, number.to_bytes(4, "big"), number) for number in range(MAX_QUEUED + 7)])
        assert metrics.forward_rejects["queue"][0] == 7

    asyncio.run(run())


class Clients:
    """A forwarder whose upstream server is a socket that never answers, and what its clients get."""

    def __init__(self, silent: socket.socket) -> None:
        settings = Settings(hosts=False, forward_max=LIMIT)
        self.metrics, cache = Metrics(), Cache(0, 0)
        responder = Responder(settings, build(settings, print), cache)
        responder.routes = Routes((Server(*silent.getsockname()),))
        failover = Failover(UpstreamClient(self.metrics), self.metrics)
        self.forwarder = Forwarder(settings, responder, cache, failover, self.metrics, None)
        self.got: list[tuple[bytes, int, int]] = []  # client, id, code

    def ask(self, client: bytes, name: str, ident: int = 0, tcp: bool = False) -> ClientQuery:
        query = parse_query(m.query(f"{name}.example", ident=ident))

        def deliver(reply: Reply) -> None:
            self.got.append((client, ident, reply.rcode))

        ask = ClientQuery(Forward(query, 512), client, (client, ident), lambda: ("", 0), deliver, tcp)
        self.forwarder.submit(ask)
        return ask

    def rejects(self) -> dict[str, int]:
        return {reason: cell[0] for reason, cell in self.metrics.forward_rejects.items() if cell[0]}


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind(("127.0.0.1", 0))
        yield link


def test_the_greediest_clients_oldest_question_gives_way(silent: socket.socket) -> None:
    async def run() -> None:
        clients = Clients(silent)
        for number in range(LIMIT):
            clients.ask(A, f"a{number}", number)
        clients.ask(A, "one-more", 99)
        assert (clients.got, clients.rejects()) == ([(A, 99, Rcode.REFUSED)], {"servers": 1}), "all of its are fresh"
        clients.ask(B, "b", 1)
        assert clients.got[1:] == [(A, 0, Rcode.REFUSED)]
        assert clients.rejects() == {"servers": 1, "shed": 1}
        assert len(clients.forwarder) == LIMIT
        await clients.forwarder.stop()
        assert len(clients.forwarder) == 0
        assert Counter(code for _, _, code in clients.got) == {Rcode.REFUSED: 2, Rcode.SERVFAIL: LIMIT}

    asyncio.run(run())


def test_an_old_question_gives_way_to_a_new_one_of_the_same_client(
    silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be behind the same address."""
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)

    async def run() -> None:
        clients = Clients(silent)
        for number in range(LIMIT + 1):
            clients.ask(A, f"a{number}", number)
        assert (clients.got, clients.rejects()) == ([(A, 0, Rcode.REFUSED)], {"shed": 1})
        await clients.forwarder.stop()

    asyncio.run(run())


def test_a_question_that_another_client_waits_for_goes_on(silent: socket.socket) -> None:
    async def run() -> None:
        clients = Clients(silent)
        for number in range(LIMIT):
            clients.ask(A, f"n{number}", number)
        clients.ask(B, "n0", 50)  # waits for the oldest one, too
        third = ipaddress.ip_address("192.0.2.3").packed
        clients.ask(third, "c", 60)
        assert clients.got == [(A, 0, Rcode.REFUSED), (A, 1, Rcode.REFUSED)], "the first of them freed no place"
        assert clients.metrics.coalesced[0] == 1
        await clients.forwarder.stop()
        assert (B, 50, Rcode.SERVFAIL) in clients.got

    asyncio.run(run())


@pytest.mark.parametrize("tcp", [False, True])
def test_repeats_take_nobodys_place(silent: socket.socket, tcp: bool) -> None:
    async def run() -> None:
        clients = Clients(silent)
        most = min(MAX_REPEATS_PER_CLIENT, module.ALL_WAITING * LIMIT)
        for ident in range(most + 6):
            clients.ask(A, "same", ident, tcp)
        assert clients.rejects() == {"repeat": 5}
        assert len(clients.got) == (5 if tcp else 0), "over UDP the client asks again, and finds it in the cache"
        clients.ask(A, "same", 1, tcp)  # the same again, from the same port
        assert clients.rejects() == {"repeat": 5}
        assert len(clients.forwarder) == 1
        for number in range(LIMIT - 1):
            clients.ask(B, f"b{number}", number)
        assert clients.rejects() == {"repeat": 5}
        await clients.forwarder.stop()
        assert Counter(client for client, _, code in clients.got if code == Rcode.SERVFAIL) == {
            A: most + 1,
            B: LIMIT - 1,
        }

    asyncio.run(run())


def test_a_client_that_has_gone_leaves_its_place(silent: socket.socket) -> None:
    async def run() -> None:
        clients = Clients(silent)
        first, second = clients.ask(A, "a", 1, tcp=True), clients.ask(A, "a", 2, tcp=True)
        clients.forwarder.cancel(first)
        assert len(clients.forwarder) == 1
        clients.forwarder.cancel(second)
        clients.forwarder.cancel(second)
        assert len(clients.forwarder) == 0
        await clients.forwarder.stop()
        assert not clients.got

    asyncio.run(run())
