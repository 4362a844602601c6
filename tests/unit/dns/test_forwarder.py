"""Queries in flight and the clients that wait for them. Upstream servers are a network double, time is virtual."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import dns_messages as m
import pytest
from upstream_double import ADDRESS, Script, Sent, UpstreamNetwork, honest, silent
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import now, run, turns

from udpwatch.dns import forwarder as module
from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import FAILURE_SECONDS
from udpwatch.dns.edns import ClientOptions
from udpwatch.dns.failover import STALE_SECONDS, TICK_SECONDS, TICKS, Failover
from udpwatch.dns.forwarder import (
    ALL_ASKED,
    ALL_WAITING,
    DELIVERED_PER_TURN,
    FRESH_SECONDS,
    MAX_REPEATS_PER_CLIENT,
    MAX_SHED,
    WAITING,
    Forwarder,
)
from udpwatch.dns.message import Rcode, parse_query
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import name_from_text
from udpwatch.dns.responder import Forward, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import DomainServers, Server, Settings, StaticRecord, Subnet
from udpwatch.dns.upstream import ATTEMPT_SECONDS, UpstreamClient
from udpwatch.dns.upstream_tcp import TcpClient
from udpwatch.dns.zone import build

A, B, C = (ipaddress.ip_address(text).packed for text in ("192.0.2.1", "192.0.2.2", "192.0.2.3"))
SERVER = Server("198.51.100.53")
LIMIT = 10
TOTAL_SECONDS = TICKS * TICK_SECONDS


@dataclass(eq=False)
class Asked:
    """A client's query; a `ClientQuery`."""

    clients: Clients
    forward: Forward
    client: bytes
    ident: int
    must_answer: bool
    received: float

    @property
    def origin(self) -> tuple[bytes, int]:
        return self.client, self.ident

    def peer(self) -> tuple[str, int]:
        return "", 0

    def deliver(self, reply: Reply) -> None:
        self.clients.got.append((self.client, self.ident, reply.rcode))
        self.clients.replies.append((now(), reply))


def refuses_edns(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    """A server that does not know EDNS."""
    return [(0.0, sent.respond(rcode=Rcode.FORMERR if sent.edns else Rcode.NOERROR))]


class Clients:
    """A forwarder with one upstream server, and what its clients get."""

    def __init__(self, script: Script = silent, cache: int = 100, limit: int = LIMIT, **settings: object) -> None:
        made = Settings(hosts=False, forward_max=limit, **settings)  # type: ignore[arg-type]
        self.metrics, self.cache = Metrics(), Cache(cache, 86_400)
        self.responder = Responder(made, build(made, pytest.fail), self.cache)
        self.responder.routes = Routes((SERVER,), made.domain_servers)
        self.network = UpstreamNetwork({SERVER: script})
        loop, tcp = VirtualPacketLoop(), TcpClient(self.network)
        tcp.start()
        self.client = UpstreamClient(loop, self.metrics, self.network, tcp, self.responder.direct_entry)
        self.failover = Failover(loop, self.client, self.metrics)
        options = ClientOptions(made)
        self.forwarder = Forwarder(loop, made, self.responder, self.cache, self.failover, self.metrics, None, options)
        self.got: list[tuple[bytes, int, int]] = []  # client, id, code
        self.replies: list[tuple[float, Reply]] = []

    def ask(self, client: bytes, name: str, ident: int = 0, tcp: bool = False) -> Asked:
        query = parse_query(m.query(f"{name}.example", ident=ident))
        asked = Asked(self, Forward(query, 512), client, ident, tcp, now())
        self.forwarder.submit(asked)
        return asked

    def rejects(self) -> dict[str, int]:
        return {reason: cell[0] for reason, cell in self.metrics.forward_rejects.items() if cell[0]}

    async def all_served(self) -> None:
        await self.forwarder.drain(60)
        await turns()
        assert len(self.forwarder) == 0

    async def end(self) -> None:
        """Stop; nothing is left."""
        self.forwarder.stop()
        self.client.close()
        assert len(self.forwarder) == 0
        assert not self.network.open_udp_connections


# ---- memory ----


@pytest.mark.parametrize("ending", ["timeout", "shed", "response"])
def test_queries_leave_no_work_for_the_garbage_collector(ending: str) -> None:
    """A collection of all objects stops every thread for as long as it takes, and a flood of queries would order it."""

    async def ask() -> None:
        clients = Clients(honest if ending == "response" else silent)
        for number in range(LIMIT * (2 if ending == "shed" else 1)):
            clients.ask(A, f"n{number}")
            await asyncio.sleep(FRESH_SECONDS / LIMIT)
        await clients.all_served()
        await asyncio.sleep(ATTEMPT_SECONDS)
        await clients.end()

    run(ask())  # imports, and fills caches
    gc.collect()
    gc.disable()
    try:
        run(ask())
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = Counter(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found.keys() & {"_InFlight", "_Waiter", "Attempt", "Asked", "Response"}, found


# ---- responses ----


def test_clients_that_ask_the_same_get_one_query_s_response() -> None:
    async def ask() -> None:
        clients = Clients(lambda sent: [(0.1, sent.respond(ADDRESS))])
        for ident, client in enumerate((A, B, C)):
            clients.ask(client, "www", ident)
        await clients.all_served()
        assert len(clients.network.sent) == 1
        assert clients.metrics.coalesced[0] == 2
        assert clients.got == [(A, 0, 0), (B, 1, 0), (C, 2, 0)]
        for ident, (_, reply) in enumerate(clients.replies):
            assert reply.data == m.response("www.example", m.A, (ADDRESS,), ident=ident)
            assert reply.source == "forward"

    run(ask())


@pytest.mark.parametrize(("prefix", "asked"), [(0, 1), (24, 1), (32, 3)])
def test_only_clients_of_one_subnet_share_a_query(prefix: int, asked: int) -> None:
    async def test() -> None:
        clients = Clients(honest, cache=0, subnets=(Subnet(prefix), Subnet()))
        for ident, client in enumerate((A, B, C, A, B, C)):
            clients.ask(client, "same", ident)
        assert len(clients.network.sent) == asked
        await clients.all_served()
        assert [code for _, _, code in clients.got] == [Rcode.NOERROR] * 6
        subnets = [sent.data[-4 - (prefix + 7) // 8 :] for sent in clients.network.sent]
        expected = [bytes((0, 1, prefix, 0)) + client[: prefix // 8] for client in (A, B, C)]
        assert subnets == expected[:asked]
        clients.client.close()

    run(test())


def test_client_with_a_subnet_of_its_own_can_cancel() -> None:
    async def test() -> None:
        clients = Clients(subnets=(Subnet(32), Subnet()))
        mine, other = clients.ask(A, "same", tcp=True), clients.ask(B, "same", tcp=True)
        clients.forwarder.cancel(mine)
        assert len(clients.forwarder) == 1
        clients.forwarder.cancel(other)
        assert len(clients.forwarder) == 0
        clients.client.close()

    run(test())


@pytest.mark.parametrize("script", [silent, refuses_edns], ids=["silent", "formerr"])
def test_query_with_options_is_never_sent_without_them(script: Script) -> None:
    async def test() -> None:
        clients = Clients(script, subnets=(Subnet(32), Subnet()))
        clients.ask(A, "a")
        await clients.all_served()
        sent = clients.network.sent
        assert len(sent) > 1
        assert all(each.data.endswith(A) for each in sent)
        clients.client.close()

    run(test())


def test_response_is_cached() -> None:
    async def ask() -> None:
        clients = Clients(honest)
        key = clients.ask(A, "www").forward.query.key
        await clients.all_served()
        entry = clients.cache.get(key, now())
        assert entry
        assert entry.expires == entry.stored + 300

    run(ask())


@pytest.mark.parametrize("name", ["text", "above", "other"])
def test_denial_of_a_name_with_local_records_becomes_nodata(name: str) -> None:
    """Also if the response is a usual one, which is not parsed: NXDOMAIN would deny these records, too."""
    soa = m.record(m.SOA, m.name("ns.example") + m.name("a.example") + bytes(16) + b"\0\0\1\0", 300, m.name("example"))

    def denial(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        head = m.header(1, authorities=1, flags=m.QR | m.RD | m.RA | Rcode.NXDOMAIN, ident=sent.id)
        return [(0.0, head + sent.question + soa)]

    async def ask() -> None:
        records = (
            StaticRecord(m.name("text.example"), m.TXT, b"\1x"),
            StaticRecord(m.name("a.above.example"), m.TXT, b"\1x"),
        )
        clients = Clients(denial, records=records)
        for _ in range(2):  # the second one from the cache
            clients.ask(A, name)
            await clients.all_served()
        assert {code for _, _, code in clients.got} == {Rcode.NXDOMAIN if name == "other" else Rcode.NOERROR}

    run(ask())


def test_failure_is_cached_briefly() -> None:
    async def ask() -> None:
        clients = Clients(lambda sent: [(0.0, sent.respond(rcode=Rcode.SERVFAIL))])
        key = clients.ask(A, "www").forward.query.key
        await clients.all_served()
        assert clients.got == [(A, 0, Rcode.SERVFAIL)]
        assert clients.cache.get(key, FAILURE_SECONDS - 0.01)
        assert not clients.cache.get(key, FAILURE_SECONDS)

    run(ask())


def test_silent_servers_end_with_servfail() -> None:
    async def ask() -> None:
        clients = Clients()
        clients.ask(A, "www")
        await clients.all_served()
        ((at, reply),) = clients.replies
        assert reply.rcode == Rcode.SERVFAIL
        assert at == pytest.approx(TOTAL_SECONDS)

    run(ask())


def answers_once(first: float) -> Script:
    """Responds to the first query with a TTL of 5 s after ``first`` seconds, then never again."""
    seen: list[Sent] = []

    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        seen.append(sent)
        return [(first, sent.respond(m.record(m.A, bytes(4), 5)))] if len(seen) == 1 else []

    return script


def test_stale_response_is_sent_when_servers_are_slow() -> None:
    async def ask() -> None:
        clients = Clients(answers_once(0.0))
        clients.ask(A, "www", 1)
        await clients.all_served()
        await asyncio.sleep(10)
        begun = now()
        clients.ask(A, "www", 2)
        clients.ask(B, "www", 3)
        await asyncio.sleep(STALE_SECONDS + 0.01)
        assert [(round(at - begun, 3), reply.source) for at, reply in clients.replies[1:]] == [
            (STALE_SECONDS, "stale"),
            (STALE_SECONDS, "stale"),
        ]
        assert len(clients.forwarder) == 1, "the query continues"
        await clients.all_served()
        assert len(clients.replies) == 3, "each client gets one response"

    run(ask())


def test_no_stale_response_before_the_servers_had_their_time() -> None:
    async def ask() -> None:
        delays = iter((0.0, STALE_SECONDS - 0.1))
        clients = Clients(lambda sent: [(next(delays, 9.0), sent.respond(m.record(m.A, bytes(4), 5)))])
        clients.ask(A, "www", 1)
        await clients.all_served()
        await asyncio.sleep(10)
        clients.ask(A, "www", 2)
        await clients.all_served()
        assert [reply.source for _, reply in clients.replies] == ["forward", "forward"]

    run(ask())


@pytest.mark.parametrize("stop", [False, True])
def test_private_address_from_upstream_is_refused(stop: bool) -> None:
    async def ask() -> None:
        private = m.record(m.A, bytes((10, 0, 0, 1)), 300)
        clients = Clients(lambda sent: [(0.0, sent.respond(private))], stop_dns_rebind=stop)
        clients.ask(A, "www")
        await clients.all_served()
        assert clients.got == [(A, 0, Rcode.REFUSED if stop else Rcode.NOERROR)]
        assert len(clients.cache) == (0 if stop else 1)

    run(ask())


def test_responses_to_many_clients_are_spread_over_turns() -> None:
    async def ask() -> None:
        clients = Clients(lambda sent: [(0.0, sent.respond(ADDRESS))], limit=1_000)
        for number in range(100):
            clients.ask(number.to_bytes(4, "big"), "www", number)
        in_turn = []
        while len(clients.got) < 100:
            before = len(clients.got)
            await asyncio.sleep(0)
            in_turn.append(len(clients.got) - before)
        assert max(in_turn) == DELIVERED_PER_TURN

    run(ask())


def test_internal_error_ends_with_servfail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        clients = Clients(lambda sent: [(0.0, sent.respond(rcode=Rcode.NXDOMAIN))])
        monkeypatch.setattr(clients.responder, "entry_of", lambda *_: 1 / 0)
        clients.ask(A, "www")
        await clients.all_served()
        assert clients.got == [(A, 0, Rcode.SERVFAIL)]

    run(ask())


def test_name_without_servers_is_refused() -> None:
    async def ask() -> None:
        clients = Clients(honest)
        clients.responder.routes = Routes()
        clients.ask(A, "www")
        assert clients.got == [(A, 0, Rcode.REFUSED)]

    run(ask())


# ---- limits and shares ----


def test_greediest_client_s_oldest_query_gives_way() -> None:
    async def ask() -> None:
        clients = Clients()
        for number in range(LIMIT):
            clients.ask(A, f"a{number}", number)
        clients.ask(A, "one-more", 99)
        assert (clients.got, clients.rejects()) == ([(A, 99, Rcode.REFUSED)], {"servers": 1}), "its queries are fresh"
        clients.ask(B, "b", 1)
        assert clients.got[1:] == [(A, 0, Rcode.REFUSED)]
        assert clients.rejects() == {"servers": 1, "shed": 1}
        assert len(clients.forwarder) == LIMIT
        await clients.end()
        assert len(clients.forwarder) == 0
        assert Counter(code for _, _, code in clients.got) == {Rcode.REFUSED: 2, Rcode.SERVFAIL: LIMIT}

    run(ask())


@pytest.mark.parametrize(
    ("seconds", "refused", "reason"), [(FRESH_SECONDS - 0.01, LIMIT, "servers"), (FRESH_SECONDS, 0, "shed")]
)
def test_query_gives_way_to_an_equally_greedy_client_once_it_is_old(seconds: float, refused: int, reason: str) -> None:
    """Other users may be behind the same address."""

    async def ask() -> None:
        clients = Clients()
        for number in range(LIMIT):
            clients.ask(A, f"a{number}", number)
        await asyncio.sleep(seconds)
        clients.ask(A, "new", LIMIT)
        assert (clients.got, clients.rejects()) == ([(A, refused, Rcode.REFUSED)], {reason: 1})
        await clients.end()

    run(ask())


def test_query_that_another_client_waits_for_continues() -> None:
    async def ask() -> None:
        clients = Clients()
        for number in range(LIMIT):
            clients.ask(A, f"n{number}", number)
        clients.ask(B, "n0", 50)  # waits for the oldest one, too
        clients.ask(C, "c", 60)
        assert clients.got == [(A, 0, Rcode.REFUSED), (A, 1, Rcode.REFUSED)], "shedding the first freed no slot"
        assert clients.metrics.coalesced[0] == 1
        await clients.end()
        assert (B, 50, Rcode.SERVFAIL) in clients.got

    run(ask())


def test_shed_query_is_cancelled_upstream() -> None:
    async def ask() -> None:
        clients = Clients()
        for number in range(LIMIT):
            clients.ask(A, f"a{number}", number)
        await turns()
        assert clients.client.waiting == LIMIT
        clients.ask(B, "b")
        assert clients.client.waiting == LIMIT
        await clients.end()

    run(ask())


def test_few_clients_give_way_for_one_query() -> None:
    """Two clients wait for each query: refusing the first of them frees no slot."""

    async def ask() -> None:
        clients = Clients()
        for number in range(2 * LIMIT):
            clients.ask(number.to_bytes(4, "big"), f"n{number % LIMIT}", number)
        await asyncio.sleep(FRESH_SECONDS)
        clients.ask(A, "new", 77)
        assert [ident for _, ident, _ in clients.got] == [*range(MAX_SHED), 77]
        assert clients.rejects() == {"shed": MAX_SHED, "servers": 1}
        await clients.end()

    run(ask())


def test_clients_that_wait_for_one_query_are_bounded() -> None:
    async def ask() -> None:
        clients = Clients()
        for number in range(WAITING * LIMIT):
            clients.ask(number.to_bytes(4, "big"), "same", number)
        assert not clients.got
        clients.ask(A, "same", 77)
        assert (clients.got, clients.rejects()) == ([(A, 77, Rcode.REFUSED)], {"servers": 1})
        await clients.end()

    run(ask())


def test_dead_servers_of_one_domain_leave_room_for_the_others() -> None:
    dead = [Server(f"203.0.113.{number}") for number in range(ALL_ASKED + 1)]
    domains = tuple(DomainServers(name_from_text(f"d{number}.example"), (each,)) for number, each in enumerate(dead))

    async def ask() -> None:
        clients = Clients(honest, domain_servers=domains)
        clients.network.scripts |= dict.fromkeys(dead, silent)
        for number in range(2 * LIMIT):
            clients.ask(A, f"n{number}.d0", number)
        assert clients.rejects() == {"servers": LIMIT}
        clients.ask(B, "www", 1)
        await turns()
        assert clients.got[-1] == (B, 1, Rcode.NOERROR)
        for domain in range(1, ALL_ASKED):
            for number in range(LIMIT):
                clients.ask(A, f"n{number}.d{domain}", number)
        assert clients.rejects() == {"servers": LIMIT}
        clients.ask(A, f"n.d{ALL_ASKED}", 1)
        assert clients.rejects() == {"servers": LIMIT, "all": 1}
        await clients.end()

    run(ask())


@pytest.mark.parametrize("tcp", [False, True])
def test_repeats_take_no_slots(tcp: bool) -> None:
    async def ask() -> None:
        clients = Clients()
        most = min(MAX_REPEATS_PER_CLIENT, ALL_WAITING * LIMIT)
        for ident in range(most + 6):
            clients.ask(A, "same", ident, tcp)
        assert clients.rejects() == {"repeat": 5}
        assert len(clients.got) == (5 if tcp else 0), "over UDP the client retries and finds it in the cache"
        clients.ask(A, "same", 1, tcp)  # the same again, from the same port
        assert clients.rejects() == {"repeat": 5}
        assert len(clients.forwarder) == 1
        for number in range(LIMIT - 1):
            clients.ask(B, f"b{number}", number)
        assert clients.rejects() == {"repeat": 5}
        await clients.end()
        assert Counter(client for client, _, code in clients.got if code == Rcode.SERVFAIL) == {
            A: most + 1,
            B: LIMIT - 1,
        }

    run(ask())


def test_repeats_are_bounded_per_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPEATS_PER_CLIENT", 3)

    async def ask() -> None:
        clients = Clients()
        for ident in range(10):
            clients.ask(A, "same", ident)
        assert clients.rejects() == {"repeat": 6}
        clients.ask(B, "same", 1)
        clients.ask(B, "same", 2)
        assert clients.rejects() == {"repeat": 6}, "another client has its own"
        await clients.end()
        for ident in range(4):  # what was held is free again
            clients.ask(A, "other", ident)
        assert clients.rejects() == {"repeat": 6}
        await clients.end()

    run(ask())


def test_client_that_disconnects_frees_its_slot() -> None:
    async def ask() -> None:
        clients = Clients()
        first, second = clients.ask(A, "a", 1, tcp=True), clients.ask(A, "a", 2, tcp=True)
        clients.forwarder.cancel(first)
        assert len(clients.forwarder) == 1
        clients.forwarder.cancel(second)
        clients.forwarder.cancel(second)
        assert len(clients.forwarder) == 0
        await clients.end()
        assert not clients.got

    run(ask())


@pytest.mark.parametrize(
    "end",
    [
        lambda clients, asked: clients.forwarder.cancel(asked[0]),
        lambda clients, asked: [clients.ask(B, f"b{number}", number) for number in range(LIMIT)],
    ],
    ids=["cancelled", "shed"],
)
def test_books_are_empty_when_nothing_is_in_flight(end: Callable[[Clients, list[Asked]], None]) -> None:
    async def ask() -> None:
        clients = Clients()
        asked = [clients.ask(A, f"a{number}", number) for number in range(LIMIT)]
        end(clients, asked)
        await clients.end()
        await turns()
        forwarder = clients.forwarder
        assert (len(forwarder), len(forwarder._all_waiting)) == (0, 0)
        assert not forwarder._waiting
        (group,) = clients.failover._groups.values()
        assert (group.queries, group.waiting) == (0, 0)
        assert not forwarder._repeats
        assert not clients.network.open_udp_connections

    run(ask())
