"""Choosing among upstream servers: silent, slow and old ones, through real sockets. Faulty ones: test_dns_upstream."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from dns_server import PORT, Asked, FakeServer, Responder, ask, bare_query, rcode, right, texts
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace
from udpwatch.dns.failover import TICK_SECONDS, TICKS
from udpwatch.dns.resolution import POOR_AFTER, SILENT_AFTER
from udpwatch.dns.upstream import ATTEMPT_SECONDS

FIRST, SECOND, CLUSTER = "127.0.0.11", "127.0.0.12", "127.0.0.13"
SERVER_PORT = 5300
GOOD = ["192.0.2.80"]
PROMPT = TICK_SECONDS / 2  # seconds: nobody was waited for


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.namespace("node")


def upstream(node: Namespace, address: str, script: object = right) -> FakeServer:
    return FakeServer(node, address, script, SERVER_PORT)  # type: ignore[arg-type]


def servers(*addresses: str) -> list[str]:
    return [f"--server={each}#{SERVER_PORT}" for each in addresses]


def silent(_: Asked) -> None:
    return None


def timed(node: Namespace, name: str) -> float:
    """How long a good response takes, in seconds."""
    begin = time.monotonic()
    assert texts(ask(node, "127.0.0.1", name)) == GOOD
    return time.monotonic() - begin


@pytest.mark.parametrize("order", [[], ["--strict-order"]], ids=["default", "strict-order"])
def test_silent_server_beside_a_domain_with_a_server_of_its_own(node: Namespace, order: list[str]) -> None:
    """The chart's layout. The silent server costs the first queries time, then none, and it is counted."""
    options = [*servers(FIRST, SECOND), f"--server=/cluster.local/{CLUSTER}#{SERVER_PORT}", *order]
    with upstream(node, FIRST, silent) as first, upstream(node, SECOND), upstream(node, CLUSTER):
        with Responder(node, *options) as running:
            times = []
            for number in range(20):
                assert timed(node, f"n{number}.cluster.local") < PROMPT
                times.append(timed(node, f"n{number}.example"))
            slow = [number for number, seconds in enumerate(times) if seconds > PROMPT]
            assert slow == list(range(SILENT_AFTER)), times
            wait_for(
                lambda: running.metric("upstream_failures_total", server=f"{FIRST}#{SERVER_PORT}", reason="timeout"),
                "the silence to be counted",
                2 * ATTEMPT_SECONDS,
            )
            first.script = right
            probes = len(first.asked)
            wait_for(lambda: timed(node, f"p{time.monotonic()}.example") and len(first.asked) >= probes + 3, "it back")


def test_one_slow_response_does_not_move_all_names_to_the_next_server(node: Namespace) -> None:
    """The company's server knows its names, the public one denies them."""

    def company(asked: Asked) -> bytes:
        if asked.name.startswith("slow"):
            time.sleep(TICK_SECONDS + 0.4)  # the behaviour under test
        return right(asked)

    def public(asked: Asked) -> bytes:
        return asked.answer(rcode=3)

    with upstream(node, FIRST, company), upstream(node, SECOND, public), Responder(node, *servers(FIRST, SECOND)):
        ask(node, "127.0.0.1", "slow.example")
        time.sleep(0.5)  # the server answers one query after the other
        for number in range(120):
            assert timed(node, f"n{number}.example") < PROMPT


@pytest.mark.parametrize("kind", ["servfail", "silent"])
def test_names_that_only_the_next_server_resolves_do_not_move_other_clients_names(node: Namespace, kind: str) -> None:
    """A client asks for names at which the company's server fails; the public server denies those of others."""

    def company(asked: Asked) -> bytes | None:
        if "evil" not in asked.name:
            return right(asked)
        return asked.answer(rcode=2) if kind == "servfail" else None

    def public(asked: Asked) -> bytes:
        return right(asked) if "evil" in asked.name else asked.answer(rcode=3)

    with upstream(node, FIRST, company) as first, upstream(node, SECOND, public):
        with Responder(node, *servers(FIRST, SECOND)):
            assert timed(node, "www.example") < PROMPT
            with node.socket(socket.AF_INET) as hostile:
                hostile.bind(("127.0.0.99", 0))
                for number in range(60):
                    hostile.sendto(bare_query(f"n{number}.evil.example"), ("127.0.0.1", PORT))
                    time.sleep(0.1)  # the attack goes on for longer than FAILS_SECONDS
            assert len(first.asked) > 2 * POOR_AFTER
            for number in range(4):
                assert timed(node, f"n{number}.example") < PROMPT


@pytest.mark.parametrize(("seconds", "code"), [(4.2, "NOERROR"), (6.0, "SERVFAIL")])
def test_late_response_is_used_and_cached(node: Namespace, seconds: float, code: str) -> None:
    """A cold name: the client that waits gets it, one that asks again has it from the cache."""

    def cold(asked: Asked) -> bytes:
        time.sleep(seconds)  # the behaviour under test
        return right(asked)

    with upstream(node, FIRST, cold) as server, Responder(node, *servers(FIRST)):
        begin = time.monotonic()
        assert rcode(ask(node, "127.0.0.1", "cold.example")) == code
        took = time.monotonic() - begin
        assert took == pytest.approx(min(seconds, TICKS * TICK_SECONDS), abs=0.3)
        time.sleep(max(seconds - took, 0) + 0.3)
        asked = len(server.asked)
        assert timed(node, "cold.example") < PROMPT
        assert len(server.asked) == asked


@pytest.mark.parametrize("ours", [True, False], ids=["udpwatch", "dnsmasq"])
def test_server_that_drops_queries_with_edns(node: Namespace, ours: bool) -> None:
    """The first response comes late; what was learned is kept. dnsmasq asks with EDNS only if the client does."""

    def old(asked: Asked) -> bytes | None:
        return None if asked.message.edns >= 0 else right(asked)

    with upstream(node, FIRST, old):
        with Responder(node, *servers(FIRST)) if ours else dnsmasq(node, *servers(FIRST)):
            times = [timed(node, f"n{number}.example") for number in range(3)]
            assert [seconds > PROMPT for seconds in times] == [ours, False, False], times


def test_dead_servers_come_back(node: Namespace) -> None:
    """No order is known to be better while all are dead, so the first query after that may still be one of patience."""
    with upstream(node, FIRST, silent), upstream(node, SECOND, silent) as second:
        with Responder(node, *servers(FIRST, SECOND), "--cache-size=0"):
            for number in range(2):
                assert rcode(ask(node, "127.0.0.1", f"n{number}.example")) == "SERVFAIL"
            second.script = right
            assert timed(node, "first.example") < TICK_SECONDS + PROMPT
            assert timed(node, "next.example") < PROMPT


@pytest.mark.parametrize("ours", [True, False], ids=["udpwatch", "dnsmasq"])
def test_server_that_sends_queries_back_is_not_used(node: Namespace, ours: bool) -> None:
    """Two responders that forward to each other."""
    back = ("--server=127.0.0.1", "--port=5301", "--listen-address=127.0.0.2", "--metrics-listen=off")
    options = ["--dns-loop-detect", "--server=127.0.0.2#5301", "--address=/ready.example/192.0.2.80"]
    with Responder(node, *back), Responder(node, *options) if ours else dnsmasq(node, *options):
        wait_for(lambda: rcode(ask(node, "127.0.0.1", f"n{time.monotonic()}.example")) == "REFUSED", "the loop's end")


def test_server_without_a_loop_is_used(node: Namespace) -> None:
    with upstream(node, FIRST) as server, Responder(node, *servers(FIRST), "--dns-loop-detect") as running:
        assert timed(node, "www.example") < PROMPT
        assert [name for name in server.names() if name.endswith(".test.")]
        assert not running.has_logged("sends queries back")
