"""Queries to one upstream server, over a network double: the client's real code, no sockets, virtual time."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_network
from itertools import count, cycle

import dns_messages as m
import pytest
from upstream_double import ADDRESS, Script, Sent, UpstreamNetwork, honest, silent
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import now, run, turns

from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.resolution import EDNS_LOST_AFTER, PLAIN_SECONDS, Attempt, Member
from udpwatch.dns.settings import Ports, Server
from udpwatch.dns.tcp_connection import READ_BYTES, Failure
from udpwatch.dns.upstream import (
    ATTEMPT_SECONDS,
    MAX_MISMATCHES,
    MAX_UDP_ANSWER_BYTES,
    UDP_ANSWERS_PER_TURN,
    UpstreamClient,
)
from udpwatch.dns.upstream_socket import POOL_SOCKETS, RENEWED_RANGE, SOCKET_QUERIES, SOCKET_SECONDS
from udpwatch.dns.upstream_tcp import (
    CONNECTIONS_PER_SERVER,
    IDLE_SECONDS,
    MAX_TCP_ANSWERS,
    MAX_TCP_ANSWERS_PER_SERVER,
    MAX_TCP_WAITING,
    TCP_SECONDS,
    TcpClient,
)

SERVER, OTHER, THIRD, FOURTH = (Server(f"192.0.2.{number}") for number in (53, 54, 55, 56))
NAME = m.name("www.example")
KEY = (NAME, m.A, m.IN, 0)
QUESTION = NAME + bytes((0, m.A, 0, m.IN))


def no_direct(*_: object) -> None:
    """Have each response parsed."""


class AttemptFailed(Exception):
    """A failure, as an exception."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.reason, self.rcode = failure.reason, failure.rcode


class Client:
    """An `UpstreamClient` whose results are awaited. Create it in the event loop."""

    def __init__(self, network: UpstreamNetwork, **options: object) -> None:
        self.network, self.metrics = network, Metrics()
        self.loop, self.tcp = VirtualPacketLoop(), TcpClient(network)
        self.tcp.start()
        self.client = UpstreamClient(self.loop, self.metrics, network, self.tcp, no_direct, **options)  # type: ignore[arg-type]
        self.client.results = self
        self.futures: dict[Attempt, asyncio.Future[Response]] = {}
        self._addresses = count()

    def on_response(self, attempt: Attempt, response: Response) -> None:
        self.futures.pop(attempt).set_result(response)

    def on_failure(self, attempt: Attempt, failure: Failure) -> None:
        self.futures.pop(attempt).set_exception(AttemptFailed(failure))

    def send(
        self, server: Server = SERVER, *, edns: bool = True, question: bytes = QUESTION, address: bytes = b""
    ) -> Attempt:
        """Send a query of the client with this address; without one, of a client that has sent no other."""
        client = address or struct.pack("!I", next(self._addresses))
        member = Member(self.client.upstream(server))
        attempt = Attempt(member, (question[:-4], *KEY[1:]), question, edns, self.loop.now, client=client)
        self.futures[attempt] = asyncio.get_running_loop().create_future()
        self.client.query(attempt)
        return attempt

    async def query(self, server: Server = SERVER) -> Response:
        """Query. Raises AttemptFailed."""
        return await self.futures[self.send(server)]

    def end(self) -> None:
        """Every socket is closed afterwards."""
        self.client.close()
        self.tcp.close()
        assert not self.network.open_udp_connections
        assert not self.network.open_tcp_connections


class Case:
    """A server and one query to it."""

    def __init__(self, script: Script = honest) -> None:
        self.network = UpstreamNetwork({SERVER: script})
        self.mismatched = 0

    async def query(self) -> bytes:
        """Query; the response's bytes."""
        client = Client(self.network)
        try:
            return (await client.query()).message
        finally:
            self.mismatched = client.metrics.mismatched[0]
            client.end()

    def transports(self) -> list[str]:
        return ["tcp" if sent.tcp else "udp" for sent in self.network.sent]


def failure(script: Script) -> tuple[str, int, float]:
    """Reason, code and time of the failure that a script leads to."""

    async def attempt() -> tuple[str, int, float]:
        with pytest.raises(AttemptFailed) as raised:
            await Case(script).query()
        return raised.value.reason, raised.value.rcode, now()

    return run(attempt())


def test_query_over_udp() -> None:
    case = Case()
    data = run(case.query())
    (sent,) = case.network.sent
    assert data == sent.respond(ADDRESS)
    assert sent.data == m.header(1, additional=1, flags=m.RD, ident=sent.id) + m.question("www.example") + m.opt()


def test_proxy_dnssec_asks_for_ad() -> None:
    """RFC 6840, section 5.7."""
    network = UpstreamNetwork()

    async def query() -> None:
        await Client(network, proxy_dnssec=True).query()

    run(query())
    assert m.flags_of(network.sent[0].data) == m.RD | m.AD


def test_response_with_an_ignored_address_is_not_the_last() -> None:
    forged = m.record(m.A, bytes((203, 0, 113, 9)), 300)
    network = UpstreamNetwork({SERVER: lambda sent: [(0.0, sent.respond(forged)), (0.1, sent.respond(ADDRESS))]})

    async def attempts() -> str:
        client = Client(network, ignored=(ip_network("203.0.113.0/24"),))
        assert (await client.query()).message.endswith(ADDRESS)
        assert client.metrics.mismatched[0] == 1
        network.scripts[SERVER] = lambda sent: [(0.0, sent.respond(forged))]
        with pytest.raises(AttemptFailed) as raised:
            await client.query()
        return raised.value.reason

    assert run(attempts()) == "timeout"


def test_each_attempt_has_a_random_id() -> None:
    network = UpstreamNetwork()

    async def many() -> None:
        client = Client(network)
        for _ in range(200):
            await client.query()
        client.end()

    run(many())
    assert len({sent.id for sent in network.sent}) > 190


MISMATCHES: dict[str, Callable[[Sent], bytes]] = {
    "id": lambda sent: sent.respond(ADDRESS, ident=sent.id ^ 1),
    "name": lambda sent: m.response("xww.example", m.A, (ADDRESS,), ident=sent.id),
    "type": lambda sent: m.response("www.example", m.AAAA, ident=sent.id),
    "class": lambda sent: m.response("www.example", m.A, klass=m.CH, ident=sent.id),
    "opcode": lambda sent: sent.respond(ADDRESS, flags=m.RD | 4 << 11),
    "a query, not a response": lambda sent: sent.data,
    "malformed": lambda sent: sent.respond(ADDRESS)[:-1],
    "empty": lambda sent: b"",
    "an error with another id": lambda sent: m.header(0, flags=m.QR | 1, ident=sent.id ^ 1),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatched_response_is_ignored(kind: str) -> None:
    case = Case(lambda sent: [(0.1, MISMATCHES[kind](sent)), (0.2, sent.respond(ADDRESS))])
    data = run(case.query())
    assert data == case.network.sent[0].respond(ADDRESS)
    assert (case.mismatched, case.transports()) == (1, ["udp"])


def test_guessing_moves_the_query_to_tcp() -> None:
    def guesses(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        if sent.tcp:
            return honest(sent)
        wrong = [sent.respond(ADDRESS, ident=sent.id + number & 0xFFFF) for number in range(1, 100)]
        return [(0.1, each) for each in (*wrong, sent.respond(m.record(m.A, b"evil", 300)))]

    case = Case(guesses)
    data = run(case.query())
    assert case.transports() == ["udp", "tcp"]
    assert data == case.network.sent[1].respond(ADDRESS)
    assert case.mismatched == MAX_MISMATCHES


def test_mismatches_of_a_slow_server_do_not_extend_the_timeout() -> None:
    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        return [(number * 0.3, sent.respond(ident=sent.id ^ 1)) for number in range(1, 15)]

    assert failure(script) == ("timeout", Rcode.SERVFAIL, ATTEMPT_SECONDS)


@pytest.mark.parametrize("seconds", [ATTEMPT_SECONDS - 0.01, ATTEMPT_SECONDS + 0.01])
def test_attempt_ends_after_its_timeout(seconds: float) -> None:
    async def attempt() -> bool:
        try:
            await Case(lambda sent: [(seconds, sent.respond(ADDRESS))]).query()
        except AttemptFailed as failed:
            assert (failed.reason, now()) == ("timeout", ATTEMPT_SECONDS)
            return False
        return True

    assert run(attempt()) == (seconds < ATTEMPT_SECONDS)


def test_icmp_error_fails_at_once() -> None:
    assert failure(lambda sent: [(0.01, ConnectionRefusedError())]) == ("network", Rcode.SERVFAIL, 0.01)


def test_truncated_response_is_fetched_over_tcp() -> None:
    case = Case(lambda sent: [(0.0, sent.respond(ADDRESS) if sent.tcp else sent.respond(flags=m.RD | m.TC))])
    data = run(case.query())
    assert case.transports() == ["udp", "tcp"]
    assert data == case.network.sent[1].respond(ADDRESS)
    assert case.network.sent[0].data == case.network.sent[1].data
    assert case.mismatched == 0


def test_response_truncated_over_tcp_is_a_failure() -> None:
    assert failure(lambda sent: [(0.0, sent.respond(flags=m.RD | m.TC))])[:2] == ("truncated", Rcode.SERVFAIL)


@pytest.mark.parametrize("size", [MAX_UDP_ANSWER_BYTES, MAX_UDP_ANSWER_BYTES + 1])
def test_response_too_long_for_udp_is_fetched_over_tcp(size: int) -> None:
    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        empty = len(sent.respond(m.record(m.TXT)))
        return [(0.0, sent.respond(m.record(m.TXT, bytes(size - empty))))]

    case = Case(script)
    assert len(run(case.query())) == size
    assert case.transports() == (["udp"] if size == MAX_UDP_ANSWER_BYTES else ["udp", "tcp"])


@pytest.mark.parametrize("rcode", [Rcode.FORMERR, Rcode.NOTIMP])
@pytest.mark.parametrize("with_question", [False, True])
def test_server_without_edns_is_queried_without_it(rcode: Rcode, with_question: bool) -> None:
    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        bare = m.header(0, flags=m.QR | rcode, ident=sent.id)
        refused = sent.respond(rcode=rcode) if with_question else bare
        return [(0.0, refused)] if sent.edns else honest(sent)

    case = Case(script)
    run(case.query())
    assert [sent.edns for sent in case.network.sent] == [True, False]


@pytest.mark.parametrize("rcode", [Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED, 9])
def test_error_response_is_a_failure(rcode: int) -> None:
    assert failure(lambda sent: [(0.0, sent.respond(rcode=rcode))]) == ("refused", rcode, 0.0)


def test_nxdomain_is_a_response() -> None:
    case = Case(lambda sent: [(0.0, sent.respond(rcode=Rcode.NXDOMAIN))])
    assert run(case.query())


def test_cname_that_cannot_be_read_is_a_failure() -> None:
    alias = m.record(m.CNAME, b"\xc0\xff")
    assert failure(lambda sent: [(0.0, sent.respond(alias))])[0] == "malformed"


def test_cname_loop_is_forwarded() -> None:
    case = Case(lambda sent: [(0.0, sent.respond(m.record(m.CNAME, m.TO_QUESTION)))])
    assert run(case.query())


def test_flood_gets_a_limited_share_of_each_turn() -> None:
    """Fifty servers send 19 wrong responses each, all in the same turn."""
    servers = [Server(f"192.0.2.{number}") for number in range(50)]

    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        wrong = [(0.1, sent.respond(ident=sent.id ^ 1))] * (MAX_MISMATCHES - 1)
        return [*wrong, (0.1, sent.respond(ADDRESS))]

    async def flood() -> UpstreamNetwork:
        network = UpstreamNetwork(dict.fromkeys(servers, script))
        client = Client(network)
        await asyncio.gather(*(client.query(server) for server in servers))
        client.end()
        return network

    network = run(flood())
    assert sum(network.received_in_turn) == 50 * MAX_MISMATCHES
    assert max(network.received_in_turn) == UDP_ANSWERS_PER_TURN


# ---- responses over TCP ----


def over_tcp(answer: Script) -> Script:
    """A server whose responses do not fit into UDP."""
    return lambda sent: answer(sent) if sent.tcp else [(0.0, sent.respond(flags=m.RD | m.TC))]


def over_tcp_to(network: UpstreamNetwork, *servers: Server) -> int:
    """The number of queries that servers have got over TCP."""
    return sum(sent.tcp and sent.server in servers for sent in network.sent)


def test_tcp_timeout() -> None:
    assert failure(over_tcp(silent)) == ("timeout", Rcode.SERVFAIL, TCP_SECONDS)


def test_mismatched_response_over_tcp_is_a_failure() -> None:
    assert failure(over_tcp(lambda sent: [(0.0, sent.respond(ident=sent.id ^ 1))]))[0] == "malformed"


def test_connection_closed_in_the_middle_is_a_failure() -> None:
    assert failure(over_tcp(lambda sent: [(0.5, ConnectionResetError())])) == ("network", Rcode.SERVFAIL, 0.5)


def test_server_that_blocks_its_tcp_slots_leaves_the_others_theirs() -> None:
    async def block() -> None:
        blocking = over_tcp(silent)
        network = UpstreamNetwork({SERVER: blocking, OTHER: blocking, FOURTH: blocking, THIRD: over_tcp(honest)})
        client = Client(network)
        tasks = [asyncio.create_task(client.query(SERVER)) for _ in range(MAX_TCP_ANSWERS_PER_SERVER + 10)]
        await turns()
        assert over_tcp_to(network, SERVER) == MAX_TCP_ANSWERS_PER_SERVER
        assert (await client.query(THIRD)).records
        assert now() == 0.0
        for server in (OTHER, FOURTH):
            tasks += [asyncio.create_task(client.query(server)) for _ in range(MAX_TCP_ANSWERS_PER_SERVER + 10)]
        await turns()
        assert over_tcp_to(network, SERVER, OTHER, FOURTH) == MAX_TCP_ANSWERS
        results = await asyncio.gather(*tasks, return_exceptions=True)
        reasons = sorted(result.reason for result in results if isinstance(result, AttemptFailed))
        assert len(reasons) == len(tasks)
        assert set(reasons) <= {"busy", "timeout"}
        client.end()

    run(block())


@pytest.mark.parametrize("attackers", (1, 2, 3))
@pytest.mark.parametrize("sent_first", (20, 400))
def test_client_with_names_that_never_get_a_response_leaves_others_slots(attackers: int, sent_first: int) -> None:
    """Nor does another's query follow such a name on a connection: many servers respond in order."""
    hanging = m.name("hang.example")

    async def queries() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [] if hanging in sent.data else honest(sent)})
        client = Client(network, only_tcp=True)

        def attack(number: int) -> asyncio.Future[Response]:
            address = bytes((10, 0, 0, number % attackers))
            return client.futures[client.send(question=hanging + QUESTION[-4:], address=address)]

        attacks = [attack(number) for number in range(sent_first)]
        await turns(60)
        for number in range(100):
            started = now()
            assert (await client.futures[client.send(address=b"good")]).records
            assert now() == started
            sent = next(each for each in reversed(network.sent) if hanging not in each.data)
            (followed,) = (each.queries for each in network.tcp_connections if sent in each.queries)
            assert not any(hanging in each.data for each in followed[: followed.index(sent)])
            attacks.append(attack(number))
            await asyncio.sleep(0.05)
        await asyncio.gather(*attacks, return_exceptions=True)
        client.end()

    run(queries())


def test_client_with_the_most_queries_that_wait_for_a_slot_gives_way() -> None:
    async def queries() -> None:
        network = UpstreamNetwork({SERVER: over_tcp(silent)})
        client = Client(network)
        attempts = [client.send(address=b"bad!") for _ in range(2 * MAX_TCP_WAITING)]
        greedy = [client.futures[each] for each in attempts]
        await turns(60)
        others = [client.futures[client.send()] for _ in range(MAX_TCP_ANSWERS_PER_SERVER)]
        await turns(60)
        assert not any(each.done() for each in others)
        assert sum(not each.done() for each in greedy) < MAX_TCP_WAITING + MAX_TCP_ANSWERS_PER_SERVER // 2
        await asyncio.gather(*greedy, *others, return_exceptions=True)
        client.end()

    run(queries())


def test_queries_above_the_waiting_limit_are_refused_at_once() -> None:
    async def block() -> None:
        network = UpstreamNetwork({SERVER: over_tcp(silent)})
        client = Client(network)
        attempts = [client.send() for _ in range(MAX_TCP_ANSWERS_PER_SERVER + MAX_TCP_WAITING)]
        await turns(60)
        with pytest.raises(AttemptFailed) as raised:
            await client.query()
        assert (raised.value.reason, raised.value.rcode, now()) == ("busy", Rcode.REFUSED, 0.0)
        for attempt in attempts:
            client.client.forget(attempt)
        await turns(60)
        network.scripts[SERVER] = over_tcp(honest)
        assert (await client.query()).records, "what is dropped gives its slot back"
        assert (await client.query(OTHER)).records
        client.end()

    run(block())


def test_queries_over_tcp_only() -> None:
    network = UpstreamNetwork()

    async def query() -> None:
        client = Client(network, only_tcp=True)
        assert (await client.query()).message.endswith(ADDRESS)
        client.end()

    run(query())
    assert [sent.tcp for sent in network.sent] == [True]


def test_connection_is_used_again_until_it_is_idle_for_long() -> None:
    async def queries() -> None:
        network = UpstreamNetwork()
        client = Client(network, only_tcp=True)
        for _ in range(50):
            await client.query()
            await asyncio.sleep(IDLE_SECONDS / 2)
        (connection,) = network.tcp_connections
        assert len(connection.queries) == 50
        await asyncio.sleep(IDLE_SECONDS)
        assert connection.closed
        assert (await client.query()).records
        assert len(network.tcp_connections) == 2
        client.end()

    run(queries())


def test_responses_in_any_order() -> None:
    """More queries than connections; the later a query comes, the earlier its response."""
    delays = iter(range(1000, 0, -1))

    async def queries() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [(next(delays) / 1000, sent.respond(ADDRESS))]})
        client = Client(network, only_tcp=True)
        attempts = [client.futures[client.send()] for _ in range(MAX_TCP_ANSWERS_PER_SERVER)]
        assert all([(await each).records for each in attempts])
        assert len(network.tcp_connections) == CONNECTIONS_PER_SERVER
        for connection in network.tcp_connections:
            assert len(connection.queries) == len({sent.id for sent in connection.queries}) > 1
        client.end()

    run(queries())


def test_equal_ids_differ_on_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def queries() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [(0.1, sent.respond(ADDRESS))]})
        client = Client(network, only_tcp=True)
        monkeypatch.setattr(client.client._sockets, "ident", lambda: b"\xff\xff")
        attempts = [client.futures[client.send()] for _ in range(MAX_TCP_ANSWERS_PER_SERVER)]
        for each in attempts:
            assert (await each).id == 0xFFFF
        assert {sent.id for sent in network.sent} > {0xFFFF, 0}
        client.end()

    run(queries())


def test_idle_connection_that_the_server_closes_is_replaced() -> None:
    """Before the next query, and at the same time as it is sent."""

    async def queries() -> None:
        network = UpstreamNetwork()
        client = Client(network, only_tcp=True)
        await client.query()
        network.tcp_connections[0].lose()
        await client.query()
        network.scripts[SERVER] = lambda sent: [(0.1, ConnectionResetError())] if first else honest(sent)
        first = True
        future = client.futures[client.send()]
        await asyncio.sleep(0.05)
        first = False
        assert (await future).records
        assert len(network.tcp_connections) == 3
        client.end()

    run(queries())


def test_server_that_closes_after_each_response_gets_single_queries() -> None:
    delays = cycle(number / 50 for number in range(1, MAX_TCP_ANSWERS_PER_SERVER + 1))  # one response after the other

    async def queries() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [(next(delays), sent.respond(ADDRESS))]})
        client = Client(network, only_tcp=True)

        async def close_connections() -> None:
            while True:
                await asyncio.sleep(0.01)
                for each in network.open_tcp_connections:
                    if each.answered:
                        each.lose()

        closing = asyncio.create_task(close_connections())
        for _ in range(3):
            attempts = [client.futures[client.send()] for _ in range(MAX_TCP_ANSWERS_PER_SERVER)]
            assert all([(await each).records for each in attempts])
        single = network.tcp_connections[-MAX_TCP_ANSWERS_PER_SERVER:]
        assert [len(each.queries) for each in single] == [1] * MAX_TCP_ANSWERS_PER_SERVER
        closing.cancel()
        client.end()

    run(queries())


def test_server_that_never_responds_loses_its_connections() -> None:
    async def queries() -> None:
        network = UpstreamNetwork({SERVER: silent})
        client = Client(network, only_tcp=True)
        attempts = [client.futures[client.send()] for _ in range(MAX_TCP_ANSWERS_PER_SERVER)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert {result.reason for result in results if isinstance(result, AttemptFailed)} == {"timeout"}
        assert now() == TCP_SECONDS
        assert not network.open_tcp_connections
        client.end()

    run(queries())


def test_response_to_a_cancelled_query_is_ignored() -> None:
    async def queries() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [(0.1, sent.respond(ADDRESS))]})
        client = Client(network, only_tcp=True)
        attempt = client.send()
        await turns(5)
        client.client.forget(attempt)
        assert (await client.query()).records
        assert len(network.tcp_connections) == 1
        client.end()

    run(queries())


def test_response_with_another_id_ends_the_connection() -> None:
    """The other queries on it are repeated once, each on a connection of its own."""

    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        wrong = sent is network.tcp_connections[0].queries[0] if network.tcp_connections[0].queries else True
        return [(0.1, sent.respond(ident=sent.id ^ 0x8000))] if wrong else [(0.2, sent.respond(ADDRESS))]

    network = UpstreamNetwork({SERVER: script})

    async def queries() -> None:
        client = Client(network, only_tcp=True)
        attempts = [client.futures[client.send()] for _ in range(CONNECTIONS_PER_SERVER + 8)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        failed = [result for result in results if isinstance(result, AttemptFailed)]
        assert {each.reason for each in failed} <= {"malformed"}
        assert len(failed) <= 1
        client.end()

    run(queries())


def test_long_and_split_responses() -> None:
    """Octet by octet, several at once, and of 64 KB."""

    async def queries() -> None:
        network = UpstreamNetwork({SERVER: silent})
        client = Client(network, only_tcp=True)
        for size in (3, READ_BYTES - 20, READ_BYTES + 5, 60_000):
            futures = [client.futures[client.send()] for _ in range(CONNECTIONS_PER_SERVER + 3)]
            await turns(5)
            for connection in network.open_tcp_connections:
                data = b""
                for sent in connection.queries:
                    message = sent.respond(m.record(m.TXT, bytes(size)))
                    data += len(message).to_bytes(2, "big") + message
                connection.queries.clear()
                if size == 3:
                    for octet in data:
                        connection.feed(bytes((octet,)))
                else:
                    connection.feed(data)
            for future in futures:
                assert len((await future).message) > size
        assert len(network.tcp_connections) == CONNECTIONS_PER_SERVER
        client.end()

    run(queries())


# ---- sockets ----


def test_each_query_has_a_new_socket_until_the_pool_is_full() -> None:
    async def many() -> None:
        network = UpstreamNetwork({SERVER: silent})
        client = Client(network)
        for _ in range(POOL_SOCKETS):
            client.send()
        assert len(network.open_udp_connections) == POOL_SOCKETS
        for _ in range(3 * POOL_SOCKETS):
            client.send()
        assert len(network.open_udp_connections) == POOL_SOCKETS
        client.end()

    run(many())


def test_sockets_are_renewed() -> None:
    async def many() -> None:
        network = UpstreamNetwork()
        client = Client(network)
        links = set()
        for _ in range(2 * POOL_SOCKETS * SOCKET_QUERIES):
            attempt = client.send()
            links.add(attempt.socket)
            await turns(3)
        assert len(links) > 1.9 * POOL_SOCKETS
        assert len(network.open_udp_connections) <= POOL_SOCKETS
        await asyncio.sleep(SOCKET_SECONDS)
        assert not network.open_udp_connections

    run(many())


@pytest.mark.parametrize("broken", [1, POOL_SOCKETS])
def test_socket_that_cannot_send_is_replaced(monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    """Its source address has disappeared, or it reports the fate of an earlier query."""

    async def many() -> None:
        network = UpstreamNetwork()
        client = Client(network)
        for _ in range(POOL_SOCKETS):
            await client.query()
        old = list(client.client.upstream(SERVER).pool)

        def fail(_: bytes) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        for link in old[:broken]:
            monkeypatch.setattr(link, "send", fail)
        for _ in range(16 * POOL_SOCKETS):
            assert (await client.query()).records
        assert not {id(link) for link in old[:broken]} & {id(link) for link in client.client.upstream(SERVER).pool}
        client.end()

    run(many())


def test_error_of_this_host_leaves_the_socket() -> None:
    async def many() -> None:
        network = UpstreamNetwork()
        client = Client(network)
        await client.query()
        (link,) = client.client.upstream(SERVER).pool

        def fail(_: bytes) -> None:
            raise OSError(errno.ENOBUFS, "No buffer space available")

        client.client._sockets.share_among(10_000)  # so that it is this socket's turn
        send, link.send = link.send, fail
        with pytest.raises(OSError, match="buffer"):
            client.send()
        link.send = send
        assert (await client.query()).records
        assert client.client.upstream(SERVER).pool == [link]
        client.end()

    run(many())


def test_sockets_are_bounded_and_shared_among_servers() -> None:
    """Black holes: each query occupies its socket for seconds."""

    async def many() -> None:
        network = UpstreamNetwork(dict.fromkeys((SERVER, OTHER), silent))
        client = Client(network, max_sockets=8)
        client.client.upstream(OTHER)
        for _ in range(20 * SOCKET_QUERIES):
            client.send(SERVER)
        assert len(network.open_udp_connections) == 4
        for _ in range(20 * SOCKET_QUERIES):
            client.send(OTHER)
        assert len(network.open_udp_connections) == 8
        client.send(THIRD)
        assert len(network.open_udp_connections) == 9, "each server has one"
        await asyncio.sleep(SOCKET_SECONDS / 2)
        for _ in range(20 * SOCKET_QUERIES):
            client.send(SERVER)
        await asyncio.sleep(SOCKET_SECONDS / 2 + 0.1)
        assert len(network.open_udp_connections) <= 9
        network.scripts[THIRD] = honest
        assert (await client.query(THIRD)).records
        client.end()
        assert all(client.client.upstream(server).opened == 0 for server in (SERVER, OTHER, THIRD))

    run(many())


def test_socket_takes_no_query_after_a_mismatch() -> None:
    async def many() -> None:
        network = UpstreamNetwork({SERVER: lambda sent: [(0.1, sent.respond(ident=sent.id ^ 1))]})
        client = Client(network)
        for _ in range(POOL_SOCKETS):
            client.send()
        await asyncio.sleep(0.2)
        before = set(network.open_udp_connections)
        network.scripts[SERVER] = honest
        for _ in range(POOL_SOCKETS):
            await client.query()
        assert len(network.open_udp_connections - before) == POOL_SOCKETS
        client.end()

    run(many())


def test_icmp_error_fails_all_queries_of_its_socket() -> None:
    async def many() -> None:
        network = UpstreamNetwork({SERVER: silent})
        client = Client(network, ports=Ports(5000, 5000, single=True))
        attempts = [client.futures[client.send()] for _ in range(3)]
        (connection,) = network.open_udp_connections
        connection._arrive([ConnectionRefusedError()])
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert [result.reason for result in results if isinstance(result, AttemptFailed)] == ["network"] * 3
        client.end()

    run(many())


def test_fixed_port_keeps_its_socket() -> None:
    async def many() -> None:
        network = UpstreamNetwork()
        client = Client(network, ports=Ports(5000, 5000, single=True))
        links = set()
        for _ in range(2 * SOCKET_QUERIES):
            attempt = client.send()
            links.add(attempt.socket)
            await asyncio.sleep(SOCKET_SECONDS / 10)
        assert len(links) == 1
        client.client.forget_servers()
        await asyncio.sleep(SOCKET_SECONDS)
        assert not network.open_udp_connections

    run(many())


def test_small_range_of_ports() -> None:
    """Each server has its own sockets on the same ports, except on one that another program uses."""

    async def many() -> None:
        network = UpstreamNetwork({SERVER: silent})
        network.ports_in_use = {5001}
        client = Client(network, ports=Ports(5000, 5003))
        sockets = {server: [client.send(server).socket for _ in range(100)] for server in (SERVER, OTHER)}
        for server, used in sockets.items():
            assert sorted(each.port for each in network.open_udp_connections if each.server == server) == [
                5000,
                5002,
                5003,
            ]
            assert min(Counter(used).values()) > 10
        client.end()
        assert not any(client.client.upstream(server).ports for server in sockets)

    run(many())


@pytest.mark.parametrize("ports", [Ports(5000, 5000, single=True), Ports(5000, 5127)])
def test_no_port_is_free(ports: Ports) -> None:
    async def send() -> None:
        network = UpstreamNetwork()
        network.ports_in_use = set(range(5000, 5128))
        client = Client(network, ports=ports)
        with pytest.raises(OSError, match="in use"):
            client.send()
        network.ports_in_use.clear()
        assert (await client.query()).records
        client.end()

    run(send())


def test_large_range_of_ports_is_renewed() -> None:
    async def many() -> None:
        network = UpstreamNetwork()
        client = Client(network, ports=Ports(5000, 5000 + RENEWED_RANGE - 1))
        seen = set()
        for _ in range(2 * POOL_SOCKETS * SOCKET_QUERIES):
            client.send()
            seen |= {each.port for each in network.open_udp_connections}
            await turns(3)
        assert len(seen) > 1.5 * POOL_SOCKETS
        client.end()

    run(many())


def test_fixed_port_keeps_its_socket_until_there_are_many_mismatches() -> None:
    """A second socket would have the same port, and get the responses to both."""

    def late(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        wrong = [(0.1, sent.respond(ident=sent.id ^ 1))] * (MAX_MISMATCHES - 1)
        return [*wrong, (0.2, sent.respond(ADDRESS))]

    async def many() -> None:
        network = UpstreamNetwork({SERVER: late})
        client = Client(network, ports=Ports(0, 0, single=True))
        link = client.send().socket
        await asyncio.sleep(0.15)
        network.scripts[SERVER] = honest
        attempt = client.send()
        assert attempt.socket is link
        await client.futures[attempt]
        await asyncio.sleep(0.1)
        assert not client.futures
        network.scripts[SERVER] = lambda sent: [(0.1, sent.respond(ident=sent.id ^ 1))]
        assert client.send().socket is link
        await asyncio.sleep(0.1)
        network.scripts[SERVER] = honest
        assert client.send().socket is not link
        client.end()

    run(many())


def test_other_case_of_the_name_is_the_same_question() -> None:
    case = Case(lambda sent: [(0.0, sent.respond(ADDRESS).replace(b"www", b"wWw"))])
    run(case.query())
    assert case.mismatched == 0


# ---- 0x20 encoding ----


def test_letters_have_a_random_case() -> None:
    network = UpstreamNetwork()

    async def many() -> None:
        client = Client(network, mixes_case=True)
        for _ in range(100):
            response = await client.query()
            assert (response.name, response.question) == (NAME, network.sent[-1].question)
        client.end()

    run(many())
    asked = [sent.question for sent in network.sent]
    assert {each.lower() for each in asked} == {QUESTION}
    assert len(set(asked)) > 80
    upper = [sum(each[at] != QUESTION[at] for each in asked) for at in range(len(QUESTION))]
    for octet, times in zip(QUESTION, upper, strict=True):
        assert 20 < times < 80 if bytes((octet,)).isalpha() else not times


def test_type_and_class_keep_their_value() -> None:
    """Type 99 (SPF) and class 97 are letters in ASCII."""
    network = UpstreamNetwork()
    question = NAME + b"\0\x63\0\x61"

    async def many() -> None:
        client = Client(network, mixes_case=True)
        for _ in range(20):
            client.send(question=question)
        client.end()

    run(many())
    assert {sent.question[-4:] for sent in network.sent} == {question[-4:]}


def test_server_that_changes_the_case_is_queried_over_tcp() -> None:
    def folds(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        return [(0.0, sent.respond(ADDRESS).replace(sent.question, QUESTION))]

    async def many() -> tuple[int, int]:
        network = UpstreamNetwork({SERVER: folds})
        client = Client(network, mixes_case=True)
        for _ in range(50):
            assert (await client.query()).name == NAME
        assert now() == 0.0
        assert client.metrics.mismatched[0] == sum(sent.tcp for sent in network.sent)
        client.end()
        in_other_case = sum(not sent.tcp and sent.question != QUESTION for sent in network.sent)
        return in_other_case, sum(sent.tcp for sent in network.sent)

    changed, over_tcp = run(many())
    assert changed == over_tcp > 40


def test_query_without_edns_has_a_random_case() -> None:
    async def query() -> None:
        network = UpstreamNetwork({SERVER: refuses_edns})
        client = Client(network, mixes_case=True)
        for _ in range(10):
            await client.query()
        assert len({sent.question for sent in network.sent}) > 11
        client.end()

    run(query())


# ---- EDNS ----


def refuses_edns(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    return [(0.0, sent.respond(rcode=Rcode.FORMERR))] if sent.edns else honest(sent)


def test_server_is_remembered_that_answers_only_without_edns() -> None:
    async def ask() -> None:
        client = Client(UpstreamNetwork({SERVER: refuses_edns}))
        await client.query()
        assert client.client.upstream(SERVER).plain_until == PLAIN_SECONDS
        client.end()

    run(ask())


def test_server_that_knows_edns_loses_it_after_several_failures_only() -> None:
    async def ask() -> None:
        network = UpstreamNetwork()
        client = Client(network)
        upstream = client.client.upstream(SERVER)
        await client.query()
        network.scripts[SERVER] = refuses_edns
        for _ in range(EDNS_LOST_AFTER - 1):
            await client.query()
        assert not upstream.plain_until
        network.scripts[SERVER] = honest
        await client.query()
        network.scripts[SERVER] = refuses_edns
        for _ in range(EDNS_LOST_AFTER - 1):
            await client.query()
        assert not upstream.plain_until, "not in a row"
        await client.query()
        assert upstream.plain_until
        client.end()

    run(ask())
