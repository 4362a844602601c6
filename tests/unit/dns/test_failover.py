"""Which servers of a group are queried, in which order and when. Over a network double, in virtual time."""

from __future__ import annotations

import asyncio

import dns_messages as m
import pytest
from upstream_double import ADDRESS, Script, Sent, UpstreamNetwork, honest, silent
from virtual_time import now, run

from udpwatch.dns.failover import (
    DOWN_AFTER,
    DOWN_SECONDS,
    MAX_ATTEMPTS,
    ROUNDS,
    STAGGER_SECONDS,
    TOTAL_SECONDS,
    Failover,
    ResolutionFailed,
)
from udpwatch.dns.message import Rcode
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.settings import Server
from udpwatch.dns.upstream import ATTEMPT_SECONDS, UpstreamClient

FIRST, SECOND, THIRD = (Server(f"192.0.2.{number}") for number in (1, 2, 3))
KEY = (m.name("www.example"), m.A, m.IN, 0)


def servfail(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    return [(0.0, sent.respond(rcode=Rcode.SERVFAIL))]


def refused(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    return [(0.0, sent.respond(rcode=Rcode.REFUSED))]


def after(seconds: float) -> Script:
    """An honest server that takes its time."""
    return lambda sent: [(seconds, sent.respond(ADDRESS))]


class Group:
    """Three servers that follow scripts."""

    def __init__(self, *scripts: Script, servers: tuple[Server, ...] = (FIRST, SECOND, THIRD), **options: bool) -> None:
        self.servers = servers[: len(scripts)]
        self.network = UpstreamNetwork(dict(zip(self.servers, scripts, strict=True)))
        self.metrics = Metrics()
        self.failover = Failover(UpstreamClient(self.metrics, self.network), self.metrics, **options)

    async def query(self) -> None:
        """Query the group; every socket is closed afterwards."""
        try:
            await self.failover.query(KEY, self.servers)
        finally:
            assert not self.network.open_udp_connections

    def sent(self) -> list[tuple[Server, float]]:
        """Servers and times of the queries so far."""
        return [(sent.server, sent.at) for sent in self.network.sent]

    def failures(self, server: Server) -> dict[str, int]:
        found = self.metrics.upstream_failed.items()
        return {reason: cell[0] for (name, reason), cell in found if name == str(server) and cell[0]}


def test_one_response_is_enough() -> None:
    group = Group(after(STAGGER_SECONDS / 2), honest)
    run(group.query())
    assert group.sent() == [(FIRST, 0.0)]


def test_next_server_is_queried_at_once_after_a_failure() -> None:
    group = Group(servfail, honest, honest)
    run(group.query())
    assert group.sent() == [(FIRST, 0.0), (SECOND, 0.0)]
    assert group.failures(FIRST) == {"refused": 1}


def test_next_server_is_queried_beside_a_silent_one() -> None:
    async def query() -> float:
        await group.query()
        return now()

    group = Group(silent, after(0.2), honest)
    assert run(query()) == STAGGER_SECONDS + 0.2
    assert group.sent() == [(FIRST, 0.0), (SECOND, STAGGER_SECONDS)]


def test_late_response_counts_while_the_next_server_is_queried() -> None:
    async def query() -> float:
        await group.query()
        return now()

    group = Group(after(STAGGER_SECONDS + 0.1), silent)
    assert run(query()) == pytest.approx(STAGGER_SECONDS + 0.1)
    assert group.sent() == [(FIRST, 0.0), (SECOND, STAGGER_SECONDS)]


def test_strict_order_queries_the_first_server_first_each_time() -> None:
    for strict, expected in ((True, [FIRST, SECOND] * 3), (False, [FIRST, SECOND, SECOND, SECOND])):
        group = Group(servfail, honest, strict_order=strict)

        async def query(group: Group = group) -> None:
            for _ in range(3):
                await group.query()

        run(query())
        assert [server for server, _ in group.sent()] == expected


def test_strict_order_of_silent_servers() -> None:
    """Also after the first one has counted as down."""
    group = Group(silent, honest, strict_order=True)

    async def query() -> float:
        for _ in range(DOWN_AFTER + 1):
            await group.query()
        return now()

    assert run(query()) == pytest.approx((DOWN_AFTER + 1) * STAGGER_SECONDS)


def test_all_servers_are_queried_at_the_same_time() -> None:
    async def query() -> float:
        await group.query()
        return now()

    group = Group(silent, servfail, after(0.2), all_servers=True)
    assert run(query()) == pytest.approx(0.2)
    assert group.sent()[:3] == [(FIRST, 0.0), (SECOND, 0.0), (THIRD, 0.0)]


def test_failure_of_all_servers_at_the_same_time() -> None:
    group = Group(servfail, refused, servfail, all_servers=True)
    assert failed(group)[1] == 0.0
    assert len(group.sent()) == ROUNDS * 3


def failed(group: Group) -> tuple[int, float]:
    """The code and the time of a failure."""

    async def query() -> tuple[int, float]:
        with pytest.raises(ResolutionFailed) as raised:
            await group.query()
        return raised.value.rcode, now()

    return run(query())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_silence_of_all_servers_ends_with_servfail(number: int) -> None:
    group = Group(*[silent] * number)
    attempts = min(ROUNDS * number, 1 + int(TOTAL_SECONDS / STAGGER_SECONDS))
    end = min(TOTAL_SECONDS, (attempts - 1) * STAGGER_SECONDS + ATTEMPT_SECONDS)
    assert failed(group) == (Rcode.SERVFAIL, pytest.approx(end))
    early = [at for _, at in group.sent() if at < ATTEMPT_SECONDS]  # later, a timeout starts the next attempt at once
    assert early == pytest.approx([each * STAGGER_SECONDS for each in range(min(attempts, len(early)))])
    assert len(group.sent()) == attempts


def test_attempts_are_limited() -> None:
    servers = tuple(Server(f"192.0.2.{number}") for number in range(5))
    group = Group(*[servfail] * 5, servers=servers)
    assert failed(group) == (Rcode.SERVFAIL, 0.0)
    assert len(group.sent()) == MAX_ATTEMPTS


def test_every_server_gets_an_attempt() -> None:
    servers = tuple(Server(f"192.0.2.{number}") for number in range(MAX_ATTEMPTS + 4))
    group = Group(*[servfail] * len(servers), servers=servers)
    failed(group)
    assert [server for server, _ in group.sent()] == list(servers)


def test_refusal_of_the_last_server_reaches_the_client() -> None:
    assert failed(Group(refused))[0] == Rcode.REFUSED
    assert failed(Group(refused, servfail))[0] == Rcode.SERVFAIL


def test_server_that_responded_last_is_queried_first() -> None:
    group = Group(servfail, honest)

    async def queries() -> list[Server]:
        await group.query()
        group.network.sent.clear()
        await group.query()
        return [server for server, _ in group.sent()]

    assert run(queries()) == [SECOND]


def test_silent_server_is_queried_last_for_a_while() -> None:
    group = Group(silent, honest, honest)

    async def queries() -> None:
        with pytest.raises(ResolutionFailed):
            await group.failover.query(KEY, (FIRST,))
        assert group.failures(FIRST) == {"timeout": DOWN_AFTER}
        assert group.failover.order(group.servers) == [SECOND, THIRD, FIRST]
        await asyncio.sleep(DOWN_SECONDS - 0.01)
        assert group.failover.order(group.servers) == [SECOND, THIRD, FIRST]
        await asyncio.sleep(0.02)
        assert group.failover.order(group.servers) == [FIRST, SECOND, THIRD]

    run(queries())


def test_timeouts_before_a_response_do_not_count() -> None:
    first = iter([silent, after(1.5), silent, silent])
    group = Group(lambda sent: next(first)(sent), after(2.5))  # noqa: PLW0108  each query takes the next one

    async def queries() -> None:
        await group.query()  # the first attempt times out at 3.0 s, the second one to FIRST succeeds at 3.1 s
        await group.query()  # FIRST times out at 3.0 s, SECOND succeeds at 3.3 s
        assert group.failures(FIRST) == {"timeout": 2}
        assert group.failover.order((FIRST, THIRD)) == [FIRST, THIRD], "not two in a row"

    run(queries())


def test_one_response_ends_the_silence() -> None:
    responses = iter([silent, honest, silent])
    group = Group(lambda sent: next(responses)(sent))  # noqa: PLW0108  each query takes the next one

    async def queries() -> None:
        await group.query()  # the first attempt is still silent when the second one responds
        assert group.failover.order((FIRST, SECOND)) == [FIRST, SECOND]

    run(queries())
    assert not group.failures(FIRST)


def test_changed_servers_start_without_a_history() -> None:
    group = Group(silent, honest)

    async def queries() -> None:
        with pytest.raises(ResolutionFailed):
            await group.failover.query(KEY, (FIRST,))
        await group.failover.query(KEY, (SECOND,))
        assert group.failover.order(group.servers) == [SECOND, FIRST]
        group.failover.forget_servers()
        assert group.failover.order(group.servers) == [FIRST, SECOND]

    run(queries())


def test_cancelled_query_leaves_no_socket() -> None:
    group = Group(silent, silent)

    async def cancel() -> None:
        task = asyncio.create_task(group.query())
        await asyncio.sleep(STAGGER_SECONDS + 0.1)
        assert len(group.network.open_udp_connections) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not group.network.open_udp_connections

    run(cancel())
