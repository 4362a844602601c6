"""How queries reach upstream servers: options that choose ports, repeat, and find loops; beside dnsmasq."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from dns_server import Asked, FakeServer, Responder, ask, rcode, right, texts
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

FIRST, SECOND, SIXTH = "127.0.0.2", "127.0.0.3", "fd00::53"
GOOD = ["192.0.2.80"]
LISTEN = ("--listen-address=127.0.0.1", "--bind-interfaces", "--cache-size=0")


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A node whose upstream servers are addresses of its own."""
    with Lab() as lab:
        place = lab.namespace("node")
        place.ip("link set lo up", f"addr add {SIXTH}/64 dev lo nodad")
        yield place


@contextlib.contextmanager
def running(program: str, node: Namespace, *options: str) -> Iterator[Responder | None]:
    """`udpwatch dns` or dnsmasq."""
    if program == "dnsmasq":
        with dnsmasq(node, "--user=root", *LISTEN, *options):
            yield None
    else:
        with Responder(node, *LISTEN, *options) as responder:
            yield responder


def ask_many(node: Namespace, number: int = 200) -> None:
    for each in range(number):
        assert texts(ask(node, "127.0.0.1", f"n{each}.example")) == GOOD


def ports_of(*servers: FakeServer) -> set[int]:
    """The source ports of the queries for names of `ask_many`."""
    return {asked.peer[1] for server in servers for asked in server.asked if asked.name.startswith("n")}


BOTH = pytest.mark.parametrize("program", ["udpwatch", "dnsmasq"])


@BOTH
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        (("--min-port=61000",), 61000, 65535),
        (("--max-port=1400",), 1024, 1400),
        (("--min-port=200", "--max-port=900"), 200, 900),
        (("--min-port=0", "--max-port=0"), 32768, 60999),
    ],
)
def test_random_ports_in_a_range(node: Namespace, program: str, options: tuple[str, ...], low: int, high: int) -> None:
    with FakeServer(node, FIRST) as server, running(program, node, f"--server={FIRST}", *options):
        ask_many(node)
        ports = ports_of(server)
    assert low <= min(ports) and max(ports) <= high
    assert len(ports) > 100


@BOTH
@pytest.mark.parametrize("option", ["--query-port=4444", "--query-port=0"])
def test_fixed_port(node: Namespace, program: str, option: str) -> None:
    """Two IPv4 servers and one over IPv6, each with responses over this port."""
    servers = (f"--server={FIRST}", f"--server={SECOND}", f"--server=/six.example/{SIXTH}")
    with FakeServer(node, FIRST) as first, FakeServer(node, SECOND) as second, FakeServer(node, SIXTH) as sixth:
        with running(program, node, *servers, "--all-servers", option, "--min-port=60000"):
            ask_many(node, 20)
            assert texts(ask(node, "127.0.0.1", "n.six.example")) == GOOD
            # The first server's response is enough, so the second may not have read its queries yet.
            wait_for(lambda: all(each.asked for each in (first, second, sixth)), "a query at each server")
        ports = [ports_of(each) for each in (first, second, sixth)]
    assert [len(each) for each in ports] == [1, 1, 1]
    if option == "--query-port=4444":
        assert ports == [{4444}] * 3
    elif program == "dnsmasq":
        assert ports[0] == ports[1]
    else:
        assert ports[0] != ports[1]


def test_fixed_port_with_a_source_address(node: Namespace) -> None:
    with FakeServer(node, FIRST) as server:
        with Responder(node, *LISTEN, f"--server={FIRST}@127.0.0.77", "--query-port=4444"):
            ask_many(node, 10)
        assert {asked.peer for asked in server.asked} == {("127.0.0.77", 4444)}


def test_small_range_is_shared_by_servers(node: Namespace) -> None:
    """Three ports, one of them another program's; the responses of each server arrive at its own sockets."""
    with FakeServer(node, FIRST) as first, FakeServer(node, SECOND) as second, node.socket() as other:
        other.bind(("0.0.0.0", 5001))
        servers = (f"--server={FIRST}", f"--server={SECOND}")
        with Responder(node, *LISTEN, *servers, "--all-servers", "--min-port=5000", "--max-port=5002") as responder:
            ask_many(node)
            assert responder.metric("upstream_mismatched_responses_total") == 0
        assert ports_of(first) == ports_of(second) == {5000, 5002}


def test_port_in_use(node: Namespace) -> None:
    """A query fails with a reason in the log, and succeeds once the port is free."""
    with FakeServer(node, FIRST), Responder(node, *LISTEN, f"--server={FIRST}", "--query-port=4444") as responder:
        with node.socket() as other:
            other.bind(("0.0.0.0", 4444))
            assert rcode(ask(node, "127.0.0.1", "used.example")) == "SERVFAIL"
            assert responder.has_logged(f"dns: cannot query {FIRST}#53 from port 4444: Address already in use")
        wait_for(lambda: texts(ask(node, "127.0.0.1", "free.example")) == GOOD, "a response")


# ---- repeated queries ----


@BOTH
def test_fast_retries(node: Namespace, program: str) -> None:
    """A server loses the first three queries for a name; the client asks once."""
    arrived: list[float] = []

    def loses(asked: Asked) -> bytes | None:
        if not asked.name.startswith("lost"):
            return right(asked)
        arrived.append(time.monotonic())
        return right(asked) if len(arrived) > 3 else None

    options = (f"--server={FIRST}", "--fast-dns-retry=150,4000")
    with FakeServer(node, FIRST, loses), running(program, node, *options):
        assert texts(ask(node, "127.0.0.1", "lost.example")) == GOOD
    gaps = [later - earlier for earlier, later in pairwise(arrived)]
    assert len(gaps) == 3
    for gap, expected in zip(gaps, (0.15, 0.3, 0.6), strict=True):
        assert 0.8 * expected < gap < 2 * expected


def test_total_time_of_retries(node: Namespace) -> None:
    with (
        FakeServer(node, FIRST, lambda asked: None),
        Responder(node, *LISTEN, f"--server={FIRST}", "--fast-dns-retry=100,700"),
    ):
        begun = time.monotonic()
        assert rcode(ask(node, "127.0.0.1", "silent.example")) == "SERVFAIL"
        assert 0.6 < time.monotonic() - begun < 1.2


# ---- 0x20 encoding ----


def lowers(asked: Asked) -> bytes:
    """A server that does not keep the case of the question."""
    message = right(asked)
    return message[:12] + message[12:].replace(asked.data[12:-15], asked.data[12:-15].lower())


def test_random_case_and_a_server_that_changes_it(node: Namespace) -> None:
    """Clients get the question in the case that they have sent, also from the cache."""
    options = ("--listen-address=127.0.0.1", "--bind-interfaces", "--do-0x20-encode", f"--server={FIRST}")
    with FakeServer(node, FIRST) as server, Responder(node, *options) as responder:
        for script, transports in ((right, 20), (lowers, 40)):
            server.script = script
            server.asked.clear()
            for number in range(20):
                name = f"Www.{number}.{script.__name__}.eXample."
                for _ in range(2):
                    response = ask(node, "127.0.0.1", name)
                    assert (response.question[0].name.to_text(), texts(response)) == (name, GOOD)
                    assert {rrset.name.to_text() for rrset in response.answer} == {name}
            assert len(server.asked) == transports
            assert (
                len({asked.name for asked in server.asked if not asked.tcp} - {each.lower() for each in server.names()})
                == 20
            )
        assert responder.metric("upstream_mismatched_responses_total") == 20
        assert responder.has_logged(f"dns: a response of {FIRST}#53 has the name in another case")


# ---- TCP only ----


def test_queries_over_tcp_share_connections(node: Namespace) -> None:
    """Also when the server closes its connections in between, and one that takes a single query."""
    closes = False

    def once(asked: Asked) -> bytes | None:
        if closes:
            message = right(asked)
            asked.link.sendall(len(message).to_bytes(2, "big") + message)
            return None  # the connection is closed
        return right(asked)

    with FakeServer(node, FIRST, once) as server, Responder(node, *LISTEN, f"--server={FIRST}", "--upstream-tcp"):
        ask_many(node)
        assert {asked.tcp for asked in server.asked} == {True}
        assert len({asked.peer for asked in server.asked}) == 1
        closes = True
        ask_many(node)
        assert len({asked.peer for asked in server.asked}) == 200
