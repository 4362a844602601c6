"""Which servers of a group are queried, in which order and when. Over a network double, in virtual time."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import Any

import dns_messages as m
import pytest
from upstream_double import ADDRESS, Script, Sent, UpstreamNetwork, honest, silent
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import now, run

from udpwatch.dns.failover import (
    IGNORED_SECONDS,
    MAX_ATTEMPTS,
    MAX_UNANSWERED,
    ROUNDS,
    STALE_SECONDS,
    TICK_SECONDS,
    TICKS,
    Failover,
    doubling,
)
from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.resolution import (
    FAILS_SECONDS,
    KNOWN_QUESTIONS,
    KNOWN_SECONDS,
    OTHER_CLIENT_SOONER,
    PLAIN_SECONDS,
    POOR_AFTER,
    PROBE_SECONDS,
    SILENT_AFTER,
    Attempt,
    Resolution,
)
from udpwatch.dns.settings import Server
from udpwatch.dns.upstream import ATTEMPT_SECONDS, UpstreamClient
from udpwatch.dns.upstream_tcp import TcpClient

FIRST, SECOND, THIRD = (Server(f"192.0.2.{number}") for number in (1, 2, 3))
NAME = m.name("www.example")
KEY = (NAME, m.A, m.IN, 0)
QUESTION = NAME + bytes((0, m.A, 0, m.IN))
TOTAL_SECONDS = TICKS * TICK_SECONDS
MANY = 20  # queries that leave no doubt
VICTIM, HOSTILE = b"\x0a\0\0\1", b"\x0a\0\0\2"  # clients


def no_direct(*_: object) -> None:
    """Have each response parsed."""


def servfail(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    return [(0.0, sent.respond(rcode=Rcode.SERVFAIL))]


def refused(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    return [(0.0, sent.respond(rcode=Rcode.REFUSED))]


def without_edns(sent: Sent) -> list[tuple[float, bytes | OSError]]:
    """A firewall drops queries with OPT."""
    return [] if sent.edns else honest(sent)


def after(seconds: float) -> Script:
    """An honest server that takes its time."""
    return lambda sent: [(seconds, sent.respond(ADDRESS))]


def except_evil(script: Script) -> Script:
    """An honest server, and what it does for names below evil.example."""
    return lambda sent: script(sent) if b"\4evil" in sent.question else honest(sent)


class Group:
    """Some servers that follow scripts. Create it in the event loop."""

    def __init__(self, *scripts: Script, servers: tuple[Server, ...] = (FIRST, SECOND, THIRD), **options: Any) -> None:
        self.servers = servers[: len(scripts)]
        self.network = UpstreamNetwork(dict(zip(self.servers, scripts, strict=True)))
        self.metrics = Metrics()
        self.loop, tcp = VirtualPacketLoop(), TcpClient(self.network)
        tcp.start()
        self.client = UpstreamClient(self.loop, self.metrics, self.network, tcp, no_direct)
        self.failover = Failover(self.loop, self.client, self.metrics, **options)
        self.failover.owner = self
        self.futures: dict[Resolution, asyncio.Future[int]] = {}
        self.slow: list[float] = []
        self.late: list[tuple[float, Response]] = []

    def on_response(self, resolution: Resolution, response: Response) -> None:
        if resolution.is_late:
            self.late.append((now(), response))
        else:
            self.futures.pop(resolution).set_result(Rcode.NOERROR)

    def on_failure(self, resolution: Resolution, rcode: int) -> None:
        self.futures.pop(resolution).set_result(rcode)

    def on_slow(self, resolution: Resolution) -> None:
        self.slow.append(now())

    def start(self, servers: tuple[Server, ...] = ()) -> Resolution:
        resolution = Resolution(KEY, QUESTION, self.failover.group(servers or self.servers))
        self.futures[resolution] = asyncio.get_running_loop().create_future()
        self.failover.start(resolution)
        return resolution

    async def query(self, servers: tuple[Server, ...] = ()) -> tuple[int, float]:
        """Query the group. Return the code, and how long it took."""
        begun = now()
        resolution = Resolution(KEY, QUESTION, self.failover.group(servers or self.servers))
        future = self.futures[resolution] = asyncio.get_running_loop().create_future()
        self.failover.start(resolution)
        return await future, pytest.approx(now() - begun)

    async def query_as(self, client: bytes, text: str) -> int:
        """Query the group for a name of a client. Return the code."""
        name = m.name(text)
        key, question = (name, *KEY[1:]), name + QUESTION[-4:]
        resolution = Resolution(key, question, self.failover.group(self.servers), client)
        future = self.futures[resolution] = asyncio.get_running_loop().create_future()
        self.failover.start(resolution)
        return await future

    def sent(self) -> list[tuple[Server, float]]:
        """Servers and times of the queries so far."""
        return [(sent.server, pytest.approx(sent.at)) for sent in self.network.sent]

    def sent_to(self) -> list[Server]:
        """The servers that were queried since the last call."""
        servers = [sent.server for sent in self.network.sent]
        self.network.sent.clear()
        return servers

    def failures(self, server: Server) -> dict[str, int]:
        found = self.metrics.upstream_failed.items()
        return {reason: cell[0] for (name, reason), cell in found if name == str(server) and cell[0]}

    def order(self) -> list[Server]:
        return [each.upstream.server for each in self.failover.order(self.failover.group(self.servers))]

    def end(self) -> None:
        """Nothing is left."""
        self.client.close()
        assert not self.network.open_udp_connections
        assert not self.futures


def test_one_response_is_enough() -> None:
    async def query() -> None:
        group = Group(after(TICK_SECONDS / 2), honest)
        assert await group.query() == (Rcode.NOERROR, TICK_SECONDS / 2)
        assert group.sent() == [(FIRST, 0.0)]
        group.end()

    run(query())


def test_next_server_is_queried_at_once_after_a_failure() -> None:
    async def query() -> None:
        group = Group(servfail, honest, honest)
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.sent() == [(FIRST, 0.0), (SECOND, 0.0)]
        assert group.failures(FIRST) == {"refused": 1}

    run(query())


def test_next_server_is_queried_beside_a_silent_one() -> None:
    async def query() -> None:
        group = Group(silent, after(0.2), honest)
        assert await group.query() == (Rcode.NOERROR, TICK_SECONDS + 0.2)
        assert group.sent() == [(FIRST, 0.0), (SECOND, TICK_SECONDS)]

    run(query())


def test_late_response_counts_while_the_next_server_is_queried() -> None:
    async def query() -> None:
        group = Group(after(TICK_SECONDS + 0.1), silent)
        assert await group.query() == (Rcode.NOERROR, TICK_SECONDS + 0.1)
        assert group.sent() == [(FIRST, 0.0), (SECOND, TICK_SECONDS)]

    run(query())


# ---- servers that are silent, slow or of no use ----


def test_silent_server_soon_costs_nothing_and_is_counted() -> None:
    """Also while another domain has a server of its own that responds: the chart's layout."""

    async def query() -> None:
        group = Group(silent, honest, honest)
        times = []
        for _ in range(MANY):
            assert await group.query((THIRD,)) == (Rcode.NOERROR, 0.0)
            times.append((await group.query((FIRST, SECOND)))[1])
        assert times == [TICK_SECONDS] * SILENT_AFTER + [0.0] * (MANY - SILENT_AFTER)
        await asyncio.sleep(ATTEMPT_SECONDS)
        assert group.failures(FIRST)["timeout"] >= SILENT_AFTER
        group.end()

    run(query())


def test_lost_race_counts_against_the_loser_once_its_time_is_over() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        await group.query()
        assert group.failures(FIRST) == {}
        await asyncio.sleep(ATTEMPT_SECONDS)
        assert group.failures(FIRST) == {"timeout": 1}

    run(query())


def test_silence_of_a_burst_is_not_enough() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        await asyncio.gather(*(group.query() for _ in range(MANY)))
        assert now() < FAILS_SECONDS
        assert group.order() == [FIRST, SECOND]

    run(query())


def test_silent_server_is_probed_and_restored() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        for _ in range(SILENT_AFTER):
            await group.query()
        group.sent_to()
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.sent_to() == [SECOND, FIRST], "the first probe"
        for _ in range(3):
            assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.sent_to() == [SECOND] * 3
        group.network.scripts[FIRST] = honest
        await asyncio.sleep(PROBE_SECONDS)
        await group.query()
        assert group.sent_to() == [SECOND, FIRST]
        await asyncio.sleep(0)
        await group.query()
        assert group.sent_to() == [FIRST]

    run(query())


def test_response_to_a_probe_is_not_used() -> None:
    """The spare may not know the company's names."""

    async def query() -> None:
        group = Group(silent, after(0.2))
        for _ in range(SILENT_AFTER):
            await group.query()
        group.network.scripts[FIRST] = honest
        assert await group.query() == (Rcode.NOERROR, 0.2)
        assert group.sent()[-2:] == [(SECOND, now() - 0.2), (FIRST, now() - 0.2)]
        assert group.order() == [FIRST, SECOND]

    run(query())


def test_one_slow_response_does_not_move_names_to_the_spare() -> None:
    async def query() -> None:
        group = Group(after(TICK_SECONDS + 0.3), honest)
        await group.query()
        group.network.scripts[FIRST] = honest
        await asyncio.sleep(1)
        group.sent_to()
        for _ in range(MANY):
            await group.query()
        assert group.sent_to() == [FIRST] * MANY

    run(query())


@pytest.mark.parametrize("script", [after(TICK_SECONDS + 0.3), servfail], ids=["slow", "servfail"])
def test_server_of_no_use_comes_last_until_a_good_response(script: Script) -> None:
    async def query() -> None:
        group = Group(script, honest)
        for _ in range(POOR_AFTER):
            assert group.order() == [FIRST, SECOND]
            await group.query()
            await asyncio.sleep(1)
        assert group.order() == [SECOND, FIRST]
        group.network.scripts[FIRST] = honest
        await group.query()
        await asyncio.sleep(0.1)
        assert group.order() == [FIRST, SECOND]

    run(query())


def test_server_without_listener_comes_last_at_once() -> None:
    async def query() -> None:
        group = Group(lambda sent: [(0.0, ConnectionRefusedError())], honest)
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.failures(FIRST) == {"network": 1}
        assert group.order() == [SECOND, FIRST]

    run(query())


def test_forged_report_does_not_demote_a_server_that_has_just_responded() -> None:
    """Who finds an open port can forge an ICMP error; the query goes to the next server, the order stays."""

    async def query() -> None:
        group = Group(honest, honest)
        await group.query()
        group.network.scripts[FIRST] = lambda sent: [(0.0, ConnectionRefusedError())]
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.failures(FIRST) == {"network": 1}
        assert group.order() == [FIRST, SECOND]
        await asyncio.sleep(PROBE_SECONDS)
        await group.query()
        await group.query()
        await asyncio.sleep(TICK_SECONDS)
        assert group.order() == [SECOND, FIRST], "it has not responded for a while, nor to the verification"

    run(query())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS])
def test_shortage_of_this_host_is_not_the_server_s(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    async def query() -> None:
        group = Group(honest, honest)

        def fail(*_: object) -> None:
            raise OSError(number, "none left")

        with monkeypatch.context() as shortage:
            shortage.setattr(group.network, "open_udp", fail)
            assert await group.query() == (Rcode.REFUSED, 0.0)
        assert group.failures(FIRST) == group.failures(SECOND) == {"busy": ROUNDS}
        assert group.order() == [FIRST, SECOND]
        assert await group.query() == (Rcode.NOERROR, 0.0)

    run(query())


def test_order_stays_if_no_server_behaves_well() -> None:
    """The probes find one that does."""

    async def query() -> None:
        group = Group(silent, silent, silent)
        for _ in range(2):
            await group.query()
        assert group.order() == [FIRST, SECOND, THIRD]
        group.network.scripts[THIRD] = honest
        await group.query()
        group.sent_to()
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.sent_to()[0] == THIRD

    run(query())


@pytest.mark.parametrize("script", [silent, servfail, after(TICK_SECONDS + 0.1)], ids=["silent", "servfail", "late"])
def test_names_that_no_server_can_resolve_demote_none(script: Script) -> None:
    """A client may own a domain whose servers are silent, wrong or slow: it must not move other clients' names to the
    next server, which may not know them."""

    async def query() -> None:
        group = Group(script, script)
        for _ in range(MANY):
            await group.query()
            await asyncio.sleep(0.5)
        group.network.scripts |= {FIRST: honest, SECOND: honest}
        group.sent_to()
        assert await group.query() == (Rcode.NOERROR, 0.0)
        assert group.sent_to()[0] == FIRST
        assert group.order() == [FIRST, SECOND]

    run(query())


@pytest.mark.parametrize("script", [silent, servfail], ids=["silent", "servfail"])
def test_names_that_only_the_next_server_resolves_do_not_demote_one_that_responds(script: Script) -> None:
    """Such as names with a wrong signature, if only the first server validates."""

    async def query() -> None:
        group = Group(honest, honest)
        for _ in range(MANY):
            await group.query()
            group.network.scripts[FIRST] = script
            for _ in range(POOR_AFTER):
                group.start()
            group.network.scripts[FIRST] = honest
            await asyncio.sleep(FAILS_SECONDS - 0.1)
            assert group.order() == [FIRST, SECOND]
        group.futures.clear()

    run(query())


# ---- verification ----


@pytest.mark.parametrize("ready", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("script", [silent, servfail, after(TICK_SECONDS + 0.1)], ids=["silent", "servfail", "late"])
def test_names_of_one_client_do_not_demote_a_server(script: Script, ready: bool) -> None:
    """They resolve at the second server only, maybe a public one, which denies the names of other clients. The client
    may have had good responses before."""

    async def query() -> None:
        group = Group(except_evil(script), honest)
        await group.query_as(VICTIM, "www.example")
        if ready:
            group.network.scripts[FIRST] = honest
            await group.query_as(HOSTILE, "n.evil.example")
            group.network.scripts[FIRST] = except_evil(script)
        group.sent_to()
        await asyncio.sleep(KNOWN_SECONDS)
        begin = now()
        for _ in range(3 * MANY):
            assert await group.query_as(HOSTILE, "n.evil.example") == Rcode.NOERROR
            await asyncio.sleep(0.2)
            assert group.order() == [FIRST, SECOND]
        times = [sent.at for sent in group.network.sent if b"\3www" in sent.question]
        assert {sent.server for sent in group.network.sent if b"\3www" in sent.question} == {FIRST}
        assert 1 <= len(times) <= (now() - begin) / FAILS_SECONDS + 1
        assert all(later - sooner >= FAILS_SECONDS for sooner, later in itertools.pairwise(times))
        group.sent_to()
        await group.query_as(VICTIM, "intern.example")
        assert group.sent_to()[0] == FIRST

    run(query())


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict-order"])
def test_server_that_does_not_answer_the_verification_is_demoted(strict: bool) -> None:
    """Until it gives a good response. The verification counts as queries and failures."""

    async def query() -> None:
        group = Group(honest, honest, strict_order=strict)
        for client in (VICTIM, HOSTILE):
            await group.query_as(client, "www.example")
        for _ in range(2):
            group.network.scripts[FIRST] = silent
            times = []
            for _ in range(MANY):
                begin = now()
                await group.query()
                times.append(pytest.approx(now() - begin))
            slow = SILENT_AFTER + 1  # and one during the verification
            assert times == [TICK_SECONDS] * slow + [0.0] * (MANY - slow)
            assert group.failover.group(group.servers).members[0].failed_verification
            group.network.scripts[FIRST] = honest
            await asyncio.sleep(PROBE_SECONDS)
            await group.query()
            await asyncio.sleep(0.1)
            assert not group.failover.group(group.servers).members[0].failed_verification
            assert group.order() == [FIRST, SECOND]
        await asyncio.sleep(ATTEMPT_SECONDS)
        sent = sum(sent.server == FIRST for sent in group.network.sent)
        assert group.metrics.upstream_asked[str(FIRST)][0] == sent
        assert group.failures(FIRST)["timeout"] >= 2 * (SILENT_AFTER + 3)
        group.end()

    run(query())


def test_any_response_of_a_silent_server_clears_its_failed_verification() -> None:
    """Next time it is verified again."""

    async def query() -> None:
        group = Group(honest, honest)
        await group.query()
        group.network.scripts[FIRST] = silent
        for _ in range(SILENT_AFTER + 1):
            await group.query()
        assert group.order() == [SECOND, FIRST]
        group.network.scripts[FIRST] = servfail
        await asyncio.sleep(PROBE_SECONDS)
        await group.query()
        await asyncio.sleep(0.1)
        assert group.order() == [FIRST, SECOND]
        assert not group.failover.group(group.servers).members[0].failed_verification

    run(query())


def test_shortage_of_this_host_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    async def query() -> None:
        group = Group(except_evil(servfail), honest)
        await group.query_as(VICTIM, "www.example")
        for _ in range(POOR_AFTER):
            await group.query_as(HOSTILE, "n.evil.example")
            await asyncio.sleep(FAILS_SECONDS / 4)
        group.client.forget_servers()  # closes the sockets

        def fail(*_: object) -> None:
            raise OSError(errno.EMFILE, "none left")

        with monkeypatch.context() as shortage:
            shortage.setattr(group.network, "open_udp", fail)
            await group.query_as(HOSTILE, "n.evil.example")
        await asyncio.sleep(TICK_SECONDS)
        assert group.order() == [FIRST, SECOND]

    run(query())


def test_known_questions_are_those_of_a_few_clients() -> None:
    """Further clients, and addresses of one IPv6 network, replace only old ones."""

    async def query() -> None:
        member = Group(honest, honest).failover.group((FIRST, SECOND)).members[0]

        def remember(client: bytes, at: float) -> None:
            member.remember(Attempt(member, KEY, QUESTION, True, at, client=client), at)

        for number in range(MANY):
            remember(b"\x20\1" + bytes(13) + bytes((number,)), number)
        assert len(member.known) == 1
        for number in range(MANY):
            remember(bytes((10, 0, 0, number)), MANY)
        kept = list(member.known)
        assert len(kept) == KNOWN_QUESTIONS
        remember(kept[1], 2 * MANY)
        remember(HOSTILE[:3] + b"\xff", MANY + KNOWN_SECONDS)
        assert list(member.known) == [kept[2], kept[3], kept[1], HOSTILE[:3] + b"\xff"]

    run(query())


def test_silence_before_a_response_does_not_count() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        waiting = [group.start() for _ in range(SILENT_AFTER)]
        await asyncio.sleep(0.1)
        group.network.scripts[FIRST] = honest
        await group.query()
        await asyncio.gather(*(group.futures[each] for each in waiting))
        assert group.failover.group(group.servers).members[0].unanswered == 0

    run(query())


def test_clients_take_turns_with_probes() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        for _ in range(SILENT_AFTER + 1):
            await group.query()
        (first, _), at = group.failover.group(group.servers).members, now()
        assert group.order() == [SECOND, FIRST]
        assert first.is_to_probe(at + PROBE_SECONDS, b"one")
        assert not first.is_to_probe(at + PROBE_SECONDS + 0.2 - OTHER_CLIENT_SOONER, b"one")
        assert first.is_to_probe(at + 2 * PROBE_SECONDS + 0.1 - OTHER_CLIENT_SOONER, b"two")
        assert not first.is_to_probe(at + 2 * PROBE_SECONDS + 0.1 - OTHER_CLIENT_SOONER, b"one")

    run(query())


def test_health_is_that_of_a_group() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        for _ in range(SILENT_AFTER):
            await group.query()
        assert group.order() == [SECOND, FIRST]
        other = group.failover.group((FIRST, THIRD))
        assert [each.upstream.server for each in group.failover.order(other)] == [FIRST, THIRD]

    run(query())


def test_changed_servers_start_without_a_history() -> None:
    async def query() -> None:
        group = Group(silent, honest)
        for _ in range(SILENT_AFTER):
            await group.query()
        assert group.order() == [SECOND, FIRST]
        group.failover.forget_servers()
        assert group.order() == [FIRST, SECOND]

    run(query())


# ---- strict order, all servers ----


def test_strict_order_queries_the_first_server_first_each_time() -> None:
    async def query() -> None:
        for strict, expected in ((True, [FIRST, SECOND]), (False, [SECOND])):
            group = Group(servfail, honest, strict_order=strict)
            for _ in range(POOR_AFTER + 1):  # with a probe
                await group.query()
                await asyncio.sleep(FAILS_SECONDS / POOR_AFTER)
            await group.query()
            group.sent_to()
            await group.query()
            assert group.sent_to() == expected

    run(query())


def test_strict_order_of_silent_servers() -> None:
    """A server that is known to be silent is still queried, but not waited for."""

    async def query() -> None:
        group = Group(silent, honest, honest, strict_order=True)
        times = [(await group.query())[1] for _ in range(SILENT_AFTER + 2)]
        assert times == [TICK_SECONDS] * SILENT_AFTER + [0.0] * 2
        assert group.sent_to()[-4:] == [FIRST, SECOND, FIRST, SECOND]

    run(query())


def test_all_servers_are_queried_at_the_same_time() -> None:
    async def query() -> None:
        group = Group(silent, servfail, after(0.2), all_servers=True)
        assert await group.query() == (Rcode.NOERROR, 0.2)
        assert group.sent()[:3] == [(FIRST, 0.0), (SECOND, 0.0), (THIRD, 0.0)]

    run(query())


def test_failure_of_all_servers_at_the_same_time() -> None:
    async def query() -> None:
        group = Group(servfail, refused, servfail, all_servers=True)
        assert (await group.query())[1] == 0.0
        assert len(group.sent()) == ROUNDS * 3

    run(query())


# ---- --fast-dns-retry ----


def test_delays_double() -> None:
    assert doubling(1.0, 10.0) == (1.0, 2.0, 4.0, 3.0)
    assert doubling(0.5, 0.5) == (0.5,)
    assert doubling(0.05, 60.0)[:3] == (0.05, 0.1, 0.2)
    assert sum(doubling(0.05, 60.0)) == pytest.approx(60.0)


@pytest.mark.parametrize("number", [1, 3])
def test_silent_servers_are_queried_at_doubling_times(number: int) -> None:
    async def query() -> None:
        group = Group(*[silent] * number, delays=doubling(0.05, 2.0))
        assert await group.query() == (Rcode.SERVFAIL, pytest.approx(2.0))
        times = [0.0, 0.05, 0.15, 0.35, 0.75, 1.55]
        expected = [(group.servers[each % number], pytest.approx(at)) for each, at in enumerate(times)]
        assert group.sent() == expected
        group.end()

    run(query())


def test_attempts_are_bounded_with_fast_retries() -> None:
    async def query() -> None:
        group = Group(silent, delays=doubling(0.05, 60.0))
        assert await group.query() == (Rcode.SERVFAIL, pytest.approx(ATTEMPT_SECONDS + 0.05 * (2**7 - 1)))
        assert len(group.sent()) == MAX_ATTEMPTS
        assert group.slow == [pytest.approx(0.05 * (2**6 - 1))]
        group.end()
        failing = Group(servfail, delays=doubling(0.05, 60.0))
        assert (await failing.query())[0] == Rcode.SERVFAIL
        assert len(failing.sent()) == ROUNDS, "an error is not repeated more often"
        failing.end()

    run(query())


def test_response_after_a_fast_retry_counts() -> None:
    async def query() -> None:
        group = Group(after(0.3), silent, delays=doubling(0.1, 1.0))
        assert await group.query() == (Rcode.NOERROR, 0.3)
        assert group.sent() == [(FIRST, 0.0), (SECOND, 0.1), (FIRST, pytest.approx(0.3))]
        group.end()

    run(query())


# ---- failure ----


@pytest.mark.parametrize("number", [1, 2, 3])
def test_silence_of_all_servers_ends_with_servfail(number: int) -> None:
    async def query() -> None:
        group = Group(*[silent] * number)
        assert await group.query() == (Rcode.SERVFAIL, TOTAL_SECONDS)
        attempts = min(ROUNDS * number, TICKS)
        servers = [group.servers[each % number] for each in range(attempts)]
        assert group.sent() == [(server, each * TICK_SECONDS) for each, server in enumerate(servers)]
        assert [group.failures(server) for server in group.servers] == [{"timeout": ROUNDS}] * number
        assert group.slow == [pytest.approx(STALE_SECONDS)]
        await asyncio.sleep(ATTEMPT_SECONDS)
        assert [group.failures(server) for server in group.servers] == [{"timeout": ROUNDS}] * number, "counted once"
        group.end()

    run(query())


def test_attempts_are_limited() -> None:
    async def query() -> None:
        group = Group(*[servfail] * 5, servers=tuple(Server(f"192.0.2.{number}") for number in range(5)))
        assert await group.query() == (Rcode.SERVFAIL, 0.0)
        assert len(group.sent()) == MAX_ATTEMPTS

    run(query())


def test_every_server_gets_an_attempt() -> None:
    async def query() -> None:
        servers = tuple(Server(f"192.0.2.{number}") for number in range(MAX_ATTEMPTS + 4))
        group = Group(*[servfail] * len(servers), servers=servers)
        await group.query()
        assert group.sent_to() == list(servers)

    run(query())


def test_refusal_of_the_last_server_reaches_the_client() -> None:
    async def query() -> None:
        assert (await Group(refused).query())[0] == Rcode.REFUSED
        assert (await Group(refused, servfail).query())[0] == Rcode.SERVFAIL

    run(query())


def test_server_that_cannot_be_reached_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def query() -> None:
        group = Group(honest, honest)

        def fail(*_: object) -> None:
            raise OSError(101, "Network is unreachable")

        monkeypatch.setattr(group.network, "open_udp", fail)
        assert await group.query() == (Rcode.SERVFAIL, 0.0)
        assert group.failures(FIRST) == group.failures(SECOND) == {"network": ROUNDS}

    run(query())


# ---- late responses ----


def test_last_attempt_runs_on_while_the_client_waits() -> None:
    async def query() -> None:
        group = Group(after(4.2))
        assert await group.query() == (Rcode.NOERROR, 4.2)

    run(query())


def test_response_after_the_failure_is_cached() -> None:
    async def query() -> None:
        group = Group(after(6.0))
        assert await group.query() == (Rcode.SERVFAIL, TOTAL_SECONDS)
        await asyncio.sleep(ATTEMPT_SECONDS)
        ((at, response),) = group.late
        assert at == pytest.approx(6.0)
        assert response.records
        assert not group.failover._late
        group.end()

    run(query())


def test_late_response_is_not_used_once_the_query_was_sent_again() -> None:
    """One query in flight per name."""

    async def query() -> None:
        group = Group(after(6.0))
        await group.query()
        resolution = group.start()
        assert group.client.waiting == 1
        await asyncio.sleep(3)
        assert not group.late
        assert resolution in group.futures
        group.failover.drop(resolution)
        group.futures.clear()
        group.end()

    run(query())


def test_dropped_query_leaves_nothing() -> None:
    async def drop() -> None:
        group = Group(silent, silent)
        resolution = group.start()
        await asyncio.sleep(TICK_SECONDS + 0.1)
        assert group.client.waiting == 2
        group.failover.drop(resolution)
        assert group.client.waiting == 0
        await asyncio.sleep(2 * ATTEMPT_SECONDS)
        group.futures.clear()
        assert not group.network.open_udp_connections

    run(drop())


@pytest.mark.parametrize(("seconds", "counted"), [(IGNORED_SECONDS - 0.01, {}), (IGNORED_SECONDS, {"timeout": 1})])
def test_silence_is_counted_although_the_query_is_dropped(seconds: float, counted: dict[str, int]) -> None:
    """A flood makes every query of a dead domain give way before its time is over."""

    async def drop() -> None:
        group = Group(silent)
        resolution = group.start()
        await asyncio.sleep(seconds)
        group.failover.drop(resolution)
        assert group.failures(FIRST) == counted
        assert group.failover.group(group.servers).members[0].unanswered == len(counted)
        group.futures.clear()
        group.end()

    run(drop())


def test_queries_that_are_listened_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udpwatch.dns.failover.MAX_UNANSWERED", 5)
    assert MAX_UNANSWERED > 1_000

    async def query() -> None:
        group = Group(silent)
        for _ in range(8):
            group.start()
        assert group.client.waiting == 5
        assert group.failures(FIRST) == {"timeout": 3}

    run(query())


# ---- EDNS ----


def test_silent_server_is_asked_without_edns_and_remembered() -> None:
    async def query() -> None:
        group = Group(without_edns)
        times = [(await group.query())[1] for _ in range(3)]
        assert times == [TICK_SECONDS, 0.0, 0.0]
        assert [sent.edns for sent in group.network.sent] == [True, False, False, False]
        await asyncio.sleep(PLAIN_SECONDS)
        await group.query()
        assert [sent.edns for sent in group.network.sent[4:]] == [True, False]

    run(query())


def test_lost_query_costs_a_server_that_knows_edns_nothing() -> None:
    async def query() -> None:
        group = Group(honest)
        await group.query()
        group.network.scripts[FIRST] = without_edns
        assert await group.query() == (Rcode.NOERROR, TICK_SECONDS)
        group.network.scripts[FIRST] = honest
        await group.query()
        assert [sent.edns for sent in group.network.sent] == [True, True, False, True]

    run(query())
