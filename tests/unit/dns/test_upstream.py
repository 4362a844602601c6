"""Queries to one upstream server, over a network double: the client's real code, no sockets, virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_network

import dns_messages as m
import pytest
from upstream_double import ADDRESS, Script, Sent, UpstreamNetwork, honest, silent
from virtual_time import now, run, turns

from udpwatch.dns.message import Rcode
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.settings import Server
from udpwatch.dns.upstream import (
    ATTEMPT_SECONDS,
    MAX_MISMATCHES,
    MAX_TCP_ANSWERS,
    MAX_TCP_ANSWERS_PER_SERVER,
    MAX_TCP_WAITING,
    MAX_UDP_ANSWER_BYTES,
    TCP_SECONDS,
    UDP_ANSWERS_PER_TURN,
    AttemptFailed,
    UpstreamClient,
)

SERVER, OTHER, THIRD, FOURTH = (Server(f"192.0.2.{number}") for number in (53, 54, 55, 56))
KEY = (m.name("www.example"), m.A, m.IN, 0)


class Case:
    """A client and its network."""

    def __init__(self, script: Script = honest) -> None:
        self.network = UpstreamNetwork({SERVER: script})
        self.metrics = Metrics()
        self.client = UpstreamClient(self.metrics, self.network)

    async def query(self, server: Server = SERVER) -> bytes:
        """Query; the response's bytes. Every socket is closed afterwards."""
        try:
            return (await self.client.query(server, KEY)).message
        finally:
            assert not self.network.open_udp_connections
            assert not self.network.open_tcp[server]

    def transports(self) -> list[str]:
        return ["tcp" if sent.tcp else "udp" for sent in self.network.sent]


def failure(script: Script, key: tuple[bytes, int, int, int] = KEY) -> tuple[str, int, float]:
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
    run(UpstreamClient(Metrics(), network, proxy_dnssec=True).query(SERVER, KEY))
    assert m.flags_of(network.sent[0].data) == m.RD | m.AD


def test_response_with_an_ignored_address_is_not_the_last() -> None:
    forged = m.record(m.A, bytes((203, 0, 113, 9)), 300)
    network = UpstreamNetwork({SERVER: lambda sent: [(0.0, sent.respond(forged)), (0.1, sent.respond(ADDRESS))]})
    metrics = Metrics()
    client = UpstreamClient(metrics, network, ignored=(ip_network("203.0.113.0/24"),))
    assert run(client.query(SERVER, KEY)).message.endswith(ADDRESS)
    assert metrics.mismatched[0] == 1
    network.scripts[SERVER] = lambda sent: [(0.0, sent.respond(forged))]

    async def attempt() -> str:
        with pytest.raises(AttemptFailed) as raised:
            await client.query(SERVER, KEY)
        return raised.value.reason

    assert run(attempt()) == "timeout"


def test_each_attempt_has_a_random_id() -> None:
    case = Case()

    async def many() -> None:
        for _ in range(100):
            await case.query()

    run(many())
    assert len({sent.id for sent in case.network.sent}) > 90


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
    assert (case.metrics.mismatched[0], case.transports()) == (1, ["udp"])


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
    assert case.metrics.mismatched[0] == MAX_MISMATCHES


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
    assert case.metrics.mismatched[0] == 0


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
    """Ten servers send 19 wrong responses each, all in the same turn of the event loop."""
    servers = [Server(f"192.0.2.{number}") for number in range(10)]

    def script(sent: Sent) -> list[tuple[float, bytes | OSError]]:
        wrong = [(0.1, sent.respond(ident=sent.id ^ 1))] * (MAX_MISMATCHES - 1)
        return [*wrong, (0.1, sent.respond(ADDRESS))]

    async def flood() -> UpstreamNetwork:
        network = UpstreamNetwork(dict.fromkeys(servers, script))
        client = UpstreamClient(Metrics(), network)
        await asyncio.gather(*(client.query(server, KEY) for server in servers))
        return network

    network = run(flood())
    assert sum(network.received_in_turn) == 10 * MAX_MISMATCHES
    assert max(network.received_in_turn) == UDP_ANSWERS_PER_TURN


# ---- responses over TCP ----


def over_tcp(answer: Script) -> Script:
    """A server whose responses do not fit into UDP."""
    return lambda sent: answer(sent) if sent.tcp else [(0.0, sent.respond(flags=m.RD | m.TC))]


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
        client = UpstreamClient(Metrics(), network)
        tasks = [asyncio.create_task(client.query(SERVER, KEY)) for _ in range(MAX_TCP_ANSWERS_PER_SERVER + 10)]
        await turns()
        assert network.open_tcp[SERVER] == MAX_TCP_ANSWERS_PER_SERVER
        assert (await client.query(THIRD, KEY)).records
        assert now() == 0.0
        for server in (OTHER, FOURTH):
            tasks += [asyncio.create_task(client.query(server, KEY)) for _ in range(MAX_TCP_ANSWERS_PER_SERVER + 10)]
        await turns()
        assert network.open_tcp.total() == MAX_TCP_ANSWERS
        results = await asyncio.gather(*tasks, return_exceptions=True)
        reasons = sorted(result.reason for result in results if isinstance(result, AttemptFailed))
        assert len(reasons) == len(tasks)
        assert set(reasons) <= {"busy", "timeout"}
        assert network.open_tcp.total() == 0

    run(block())


def test_queries_above_the_waiting_limit_are_refused_at_once() -> None:
    async def block() -> None:
        metrics = Metrics()
        client = UpstreamClient(metrics, UpstreamNetwork({SERVER: over_tcp(silent)}))
        most = MAX_TCP_ANSWERS_PER_SERVER + MAX_TCP_WAITING
        tasks = [asyncio.create_task(client.query(SERVER, KEY)) for _ in range(most)]
        await turns(40)
        with pytest.raises(AttemptFailed) as raised:
            await client.query(SERVER, KEY)
        assert (raised.value.reason, raised.value.rcode, now()) == ("busy", Rcode.REFUSED, 0.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await asyncio.gather(client.query(OTHER, KEY)))[0].records

    run(block())
