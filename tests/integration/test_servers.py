"""What the agent counts of each server: requests, replies, peers that got no datagram."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import ServerCount
from udpwatch.agent.testing.lab import Lab, Namespace

SECONDS = 1
FOREVER_NS = 1 << 62


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    found = Watch(Limits(window_ns=SECONDS * 1_000_000_000, max_peers=4_096))
    yield found
    found.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.namespace("node")


def count_of(watch: Watch, port: int) -> ServerCount:
    (found,) = (each for each in watch.sensor.sample(FOREVER_NS).servers if each.port == port)
    return found


def test_requests_and_replies_are_counted_exactly(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client, node.socket() as other:
        server.bind(("127.0.0.1", 4701))
        for each in (client, other):
            each.connect(("127.0.0.1", 4701))
        for number in range(1000):
            asking = client if number % 2 else other
            asking.send(b"x")
            _, peer = server.recvfrom(10)
            if number % 5:
                for _ in range(2):
                    server.sendto(b"y", peer)
                    asking.recv(10)
        found = count_of(watch, 4701)
        assert (found.requests, found.replies, found.address) == (1000, 1600, "127.0.0.1")
        print(found)


def test_unanswered_requests_are_counted_when_the_window_is_over(watch: Watch, node: Namespace) -> None:
    with node.socket() as server:
        server.bind(("0.0.0.0", 4702))
        for number in range(10):
            with node.socket() as client:
                client.sendto(b"x", ("127.0.0.1", 4702))
                client.sendto(b"again", ("127.0.0.1", 4702))
                _, peer = server.recvfrom(10)
                server.recvfrom(10)
                if number < 3:
                    server.sendto(b"y", peer)
        assert count_of(watch, 4702).unanswered == 0
        wait_for(lambda: count_of(watch, 4702).unanswered == 7, "7 unanswered requests")
        found = count_of(watch, 4702)
        assert (found.requests, found.replies) == (20, 3)


def test_client_is_no_server(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client:
        server.bind(("127.0.0.1", 4703))
        client.sendto(b"x", ("127.0.0.1", 4703))
        _, peer = server.recvfrom(10)
        server.sendto(b"y", peer)
        client.recv(10)
        ports = {each.port for each in watch.sensor.sample(FOREVER_NS).servers}
        assert 4703 in ports and peer[1] not in ports
