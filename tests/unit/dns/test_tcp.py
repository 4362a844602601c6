"""The TCP server's real code over asyncio streams with a transport double, in virtual time."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import dns_messages as m
import pytest
from local_addresses import local
from tcp_double import TcpDouble
from upstream_double import ADDRESS, Script, UpstreamNetwork, honest, silent
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import now, run, turns

from udpwatch.dns import tcp as module
from udpwatch.dns.admission import Admission
from udpwatch.dns.budget import TCP_SHARE, UNLIMITED, Budget
from udpwatch.dns.cache import Cache
from udpwatch.dns.failover import Failover
from udpwatch.dns.forwarder import Forwarder
from udpwatch.dns.message import Rcode
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import name_from_text
from udpwatch.dns.responder import Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.tcp import (
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_CLIENT,
    MAX_QUERY_BYTES,
    MAX_UNANSWERED,
    TcpServer,
)
from udpwatch.dns.upstream import UpstreamClient
from udpwatch.dns.upstream_socket import SOCKET_SECONDS
from udpwatch.dns.upstream_tcp import TcpClient
from udpwatch.dns.zone import build

A, B = "10.1.0.2", "10.1.0.3"
KNOWN, LARGE = m.query("host.test"), m.query("large.test", m.TXT)
LARGE_BYTES = 60_000
SERVER = Server("198.51.100.53")


class Case:
    """A server that knows host.test and large.test."""

    def __init__(self, script: Script = honest, budget: Budget = UNLIMITED, **settings: object) -> None:
        large = StaticRecord(name_from_text("large.test"), m.TXT, b"\xff" * LARGE_BYTES)
        host = HostRecord((name_from_text("host.test"),), ("192.0.2.1",))
        settings = {"local_service": False, **settings}
        made = Settings(hosts=False, records=(large,), host_records=(host,), **settings)  # type: ignore[arg-type]
        self.metrics, cache = Metrics(), Cache(0, 0)
        responder = Responder(made, build(made, pytest.fail), cache)
        responder.routes = Routes((SERVER,))
        self.network = UpstreamNetwork({SERVER: script})
        self.admission = Admission(made)
        loop: Any = VirtualPacketLoop()
        upstream_tcp = TcpClient(self.network)
        upstream_tcp.start()
        self.upstream = UpstreamClient(loop, self.metrics, self.network, upstream_tcp, responder.direct_entry)
        failover = Failover(loop, self.upstream, self.metrics)
        self.forwarder = Forwarder(loop, made, responder, cache, failover, self.metrics, None)
        self.server = TcpServer(
            responder,
            self.metrics,
            self.admission,
            lambda query: loop.post(lambda: self.forwarder.submit(query)),
            lambda query: loop.post(lambda: self.forwarder.cancel(query)),
            None,
            budget,
            made.max_tcp_connections,
        )
        self.tasks: dict[TcpDouble, asyncio.Task[None]] = {}

    async def connect(self, client: str = A, window: int = 1 << 30) -> TcpDouble:
        """A new connection that is being served."""
        connection = TcpDouble(client, 4000 + len(self.tasks), window)
        self.tasks[connection] = asyncio.create_task(self.server.serve(connection.reader, connection.writer))
        await turns(3)
        return connection

    async def ended(self, connection: TcpDouble) -> float:
        """Wait for the end of a connection; the time."""
        await self.tasks[connection]
        return now()

    def closed(self) -> dict[str, int]:
        return {reason: cell[0] for reason, cell in self.metrics.tcp_closed.items() if cell[0]}

    async def nothing_is_left(self) -> None:
        """After the last connection has ended."""
        await asyncio.gather(*self.tasks.values())
        await turns()
        assert (self.metrics.tcp_connections, self.metrics.tcp_held_bytes, len(self.forwarder)) == (0, 0, 0)
        assert not self.server._by_client


def answers(*idents: int) -> list[bytes]:
    """Responses for host.test."""
    record = m.record(m.A, bytes((192, 0, 2, 1)))
    return [m.response("host.test", m.A, (record,), flags=m.AA | m.RD | m.RA, ident=ident) for ident in idents]


# ---- queries and responses ----


def test_pipelined_queries() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        connection.send(*(m.query("host.test", ident=ident) for ident in range(100)))
        connection.end()
        await case.nothing_is_left()
        assert connection.responses() == answers(*range(100))
        assert connection.closing

    run(converse())


def test_query_in_single_octets() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        for octet in len(KNOWN).to_bytes(2, "big") + KNOWN:
            connection.send_raw(bytes((octet,)))
            await asyncio.sleep(0.1)
        assert connection.responses() == answers(m.ID)
        connection.end()
        await case.nothing_is_left()

    run(converse())


def test_response_does_not_wait_for_a_slower_one() -> None:
    async def converse() -> None:
        case = Case(lambda sent: [(0.5 if b"slow" in sent.data else 0.1, sent.respond(ADDRESS))])
        connection = await case.connect()
        connection.send(*(m.query(name, ident=ident) for ident, name in enumerate(("slow.x", "fast.x", "host.test"))))
        connection.end()
        await case.nothing_is_left()
        assert [int.from_bytes(data[:2], "big") for data in connection.responses()] == [2, 1, 0]

    run(converse())


def test_connection_with_many_unanswered_queries_is_not_read() -> None:
    async def converse() -> None:
        case = Case(lambda sent: [(1.0, sent.respond(ADDRESS))])
        connection = await case.connect()
        connection.send(*(m.query(f"n{ident}.x", ident=ident) for ident in range(3 * MAX_UNANSWERED)))
        connection.end()
        await asyncio.sleep(0.5)
        assert len(case.forwarder) == MAX_UNANSWERED
        await asyncio.sleep(1.0)
        assert len(connection.responses()) == MAX_UNANSWERED
        assert len(case.forwarder) == MAX_UNANSWERED
        await case.nothing_is_left()
        assert len(connection.responses()) == 3 * MAX_UNANSWERED

    run(converse())


def test_half_closed_connection_gets_its_responses() -> None:
    async def converse() -> None:
        case = Case(lambda sent: [(2.0, sent.respond(ADDRESS))])
        connection = await case.connect()
        connection.send(m.query("www.x"))
        connection.end()
        await case.nothing_is_left()
        (response,) = connection.responses()
        assert m.flags_of(response) & 0xF == Rcode.NOERROR

    run(converse())


def test_end_of_a_long_query_is_dropped() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        long = m.query("host.test", m.A, m.opt(m.option(12, bytes(60_000))))
        assert len(long) > MAX_QUERY_BYTES

        async def send() -> None:
            for at in range(0, len(data), 4096):
                connection.send_raw(data[at : at + 4096])
                await asyncio.sleep(0)

        data = len(long).to_bytes(2, "big") + long
        await send()
        connection.send(KNOWN)
        connection.end()
        await case.nothing_is_left()
        first, second = connection.responses()
        assert m.flags_of(first) & 0xF == Rcode.FORMERR
        assert [second] == answers(m.ID)

    run(converse())


@pytest.mark.parametrize("data", [b"\0\0", b"\0\x05short", b"\0\x0c" + m.header(0, flags=m.QR)])
def test_connection_with_nonsense_is_closed(data: bytes) -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        connection.send_raw(data)
        connection.send(KNOWN)
        assert await case.ended(connection) == 0.0
        assert not connection.responses()
        await case.nothing_is_left()

    run(converse())


def test_disconnected_client_s_queries_are_cancelled() -> None:
    async def converse() -> None:
        case = Case(silent)
        connection = await case.connect()
        connection.send(m.query("www.x"))
        await turns()
        assert len(case.forwarder) == 1
        case.tasks[connection].cancel()
        await asyncio.gather(case.tasks.pop(connection), return_exceptions=True)
        await turns()
        assert len(case.forwarder) == 0
        assert case.upstream.waiting == 0
        await case.nothing_is_left()
        await asyncio.sleep(SOCKET_SECONDS)
        assert not case.network.open_udp_connections

    run(converse())


# ---- slow clients ----


@pytest.mark.parametrize("begun", [b"", b"\0", b"\0\x40\x12\x34"])
def test_idle_connection_is_closed(begun: bytes) -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        connection.send_raw(begun)
        assert await case.ended(connection) == IDLE_SECONDS
        await case.nothing_is_left()

    run(converse())


def test_each_query_starts_the_idle_time_again() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect()
        for _ in range(5):
            await asyncio.sleep(IDLE_SECONDS - 1)
            connection.send(KNOWN)
        assert await case.ended(connection) == 5 * (IDLE_SECONDS - 1) + IDLE_SECONDS
        assert len(connection.responses()) == 5

    run(converse())


def test_client_that_takes_no_response_is_disconnected() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect(window=10_000)
        connection.send(LARGE)
        await turns()
        assert case.metrics.tcp_held_bytes > LARGE_BYTES
        assert await case.ended(connection) == IDLE_SECONDS
        assert (case.closed(), connection.aborted) == ({"slow": 1}, True)
        await case.nothing_is_left()

    run(converse())


def test_client_that_takes_its_response_slowly_gets_it() -> None:
    async def converse() -> None:
        case = Case()
        connection = await case.connect(window=0)
        connection.send(LARGE)
        for _ in range(7):
            await asyncio.sleep(1)
            connection.take(10_000)
        connection.end()
        await case.nothing_is_left()
        (response,) = connection.responses()
        assert len(response) > LARGE_BYTES
        assert not case.closed()

    run(converse())


def test_slow_client_s_next_query_waits() -> None:
    """Only one response of a connection is in memory, however many queries it has pipelined."""

    async def converse() -> None:
        case = Case()
        connection = await case.connect(window=0)
        connection.send(*[LARGE] * 20)
        await turns()
        assert LARGE_BYTES < case.metrics.tcp_held_bytes < 2 * LARGE_BYTES
        await case.ended(connection)
        await case.nothing_is_left()

    run(converse())


def test_greediest_client_loses_a_connection_when_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 5 * (LARGE_BYTES + 100))

    async def converse() -> None:
        case = Case()
        greedy = [await case.connect(A, window=0) for _ in range(4)]
        other = await case.connect(B, window=0)
        for connection in (*greedy, other):
            connection.send(LARGE)
        await turns()
        assert not case.closed()
        last = await case.connect(B, window=0)
        last.send(LARGE)
        await turns()
        assert case.closed() == {"held": 1}
        assert sum(connection.aborted for connection in greedy) == 1
        assert not other.aborted
        assert not last.aborted
        for connection in (other, last):
            connection.take(1 << 20)
        await case.nothing_is_left()
        assert len(last.responses()) == len(other.responses()) == 1

    run(converse())


# ---- connections ----


def test_client_s_idlest_connection_gives_way() -> None:
    async def converse() -> None:
        case = Case()
        connections = []
        for _ in range(MAX_CONNECTIONS_PER_CLIENT):
            connections.append(await case.connect())
            await asyncio.sleep(0.01)
        connections[0].send(KNOWN)  # now the second one has been idle for longest
        await asyncio.sleep(0.01)
        new = await case.connect()
        await turns()
        assert [connection.aborted for connection in connections] == [number == 1 for number in range(len(connections))]
        assert (new.aborted, case.closed()) == (False, {"room": 1})
        await case.nothing_is_left()

    run(converse())


def test_connection_with_unanswered_queries_gives_way_last() -> None:
    async def converse() -> None:
        case = Case(silent)
        first = await case.connect()
        first.send(m.query("www.x"))
        await asyncio.sleep(0.01)
        others = [await case.connect() for _ in range(MAX_CONNECTIONS_PER_CLIENT)]
        await turns()
        assert not first.aborted
        assert sum(connection.aborted for connection in others) == 1
        await case.nothing_is_left()

    run(converse())


def test_ipv6_client_is_its_64() -> None:
    async def converse() -> None:
        case = Case()
        for number in range(MAX_CONNECTIONS_PER_CLIENT):
            await case.connect(f"fd01::{number:x}")
        await case.connect("fd01:0:0:1::1")
        assert not case.closed()
        await case.connect("fd01::ffff:1")
        assert case.closed() == {"room": 1}
        await case.nothing_is_left()

    run(converse())


def test_client_with_most_connections_gives_way_when_all_slots_are_taken() -> None:
    async def converse() -> None:
        case = Case()
        first = [await case.connect(B) for _ in range(2)]
        clients = [str(ipaddress.ip_address("10.2.0.0") + number // 50) for number in range(MAX_CONNECTIONS - 2)]
        others = [await case.connect(client) for client in clients]
        assert not case.closed()
        new = await case.connect(B)
        assert case.closed() == {"room": 1}
        assert not any(connection.aborted for connection in (*first, new))
        assert sum(connection.aborted for connection in others) == 1
        await turns()
        assert case.metrics.tcp_connections == MAX_CONNECTIONS
        await case.nothing_is_left()

    run(converse())


@pytest.mark.parametrize(("limit", "per_client"), [(1, 1), (20, 20), (512, 64), (4000, 500)])
def test_number_of_connections_is_configured(limit: int, per_client: int) -> None:
    async def converse() -> None:
        case = Case(max_tcp_connections=limit)
        for _ in range(per_client):
            await case.connect()
        assert not case.closed()
        new = await case.connect()
        assert case.closed() == {"room": 1}
        await turns()
        assert (new.aborted, case.metrics.tcp_connections) == (False, per_client)
        await case.nothing_is_left()

    assert Settings().max_tcp_connections == MAX_CONNECTIONS
    run(converse())


def test_only_connected_networks_are_served() -> None:
    async def converse() -> None:
        case = Case(local_service=True)
        case.admission.update([local("10.1.0.1/24")])
        served, stranger = await case.connect(A), await case.connect("192.0.2.7")
        for connection in (served, stranger):
            if not connection.closing:
                connection.send(KNOWN)
        await turns()
        assert (len(served.responses()), len(stranger.responses())) == (1, 0)
        assert stranger.closing
        assert case.metrics.dropped["policy"][0] == 1
        await case.nothing_is_left()

    run(converse())


def test_stop_waits_for_responses_in_progress() -> None:
    async def converse() -> None:
        case = Case(lambda sent: [(1.0, sent.respond(ADDRESS))])
        connection = await case.connect()
        connection.send(m.query("www.x"))
        await turns()
        await case.server.stop(5.0)
        assert now() == 1.0
        assert len(connection.responses()) == 1
        connection.end()
        await case.nothing_is_left()

    run(converse())


def test_queries_wait_while_the_cpu_quota_is_used_up() -> None:
    async def converse() -> None:
        used = 0.0

        def use() -> float:
            nonlocal used
            used += 0.004  # by each query
            return used

        case = Case(budget=Budget(lambda: 0.5, TCP_SHARE, asyncio.get_running_loop().time, use))
        connection = await case.connect()
        connection.send(*[KNOWN] * 100)
        connection.end()
        await case.nothing_is_left()
        assert len(connection.responses()) == 100
        assert now() > 0.9 * used / (TCP_SHARE * 0.5)

    run(converse())
