"""What the agent counts of each server: requests, replies, peers that got no datagram."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from machine import own_cgroup
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import ServerCount
from udpwatch.agent.testing.lab import Lab, Namespace

SECONDS = 1
FOREVER_NS = 1 << 62
SLOTS = 40


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


def test_peer_that_repeats_its_request_for_long_is_unanswered(watch: Watch, node: Namespace) -> None:
    """Each request that comes a second or more after the one that began the wait begins another wait."""
    with node.socket() as server, node.socket() as client:
        server.bind(("0.0.0.0", 4711))
        client.connect(("127.0.0.1", 4711))
        for _ in range(25):
            client.send(b"x")
            time.sleep(0.2)  # shorter than the window, so that the conversation never expires
        before = count_of(watch, 4711)
        _, peer = server.recvfrom(10)
        server.sendto(b"y", peer)
    assert before.requests == 25
    assert 3 <= before.unanswered <= 4  # 5 seconds, of which the last is not over
    wait_for(lambda: watch.sensor.sample(FOREVER_NS).tracked_peers == 0, "the window to be over")
    found = count_of(watch, 4711)
    assert (found.replies, found.unanswered) == (1, before.unanswered)


def test_client_is_no_server(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client:
        server.bind(("127.0.0.1", 4703))
        client.sendto(b"x", ("127.0.0.1", 4703))
        _, peer = server.recvfrom(10)
        server.sendto(b"y", peer)
        client.recv(10)
        ports = {each.port for each in watch.sensor.sample(FOREVER_NS).servers}
        assert 4703 in ports and peer[1] not in ports


def test_counts_are_exact_on_all_cpus(watch: Watch, node: Namespace) -> None:
    """Several threads of the server and of its clients."""
    number, clients = 5_000, 4

    def serve(server: socket.socket) -> None:
        while True:
            data, peer = server.recvfrom(10)
            if data == b"end":
                return
            server.sendto(data, peer)

    def ask() -> None:
        with node.socket() as link:
            link.settimeout(5)
            link.connect(("127.0.0.1", 4704))
            for _ in range(number):
                link.send(b"x")
                link.recv(10)

    with node.socket() as server:
        server.bind(("0.0.0.0", 4704))
        threads = [threading.Thread(target=serve, args=(server,)) for _ in range(2)]
        asking = [threading.Thread(target=ask) for _ in range(clients)]
        for each in (*threads, *asking):
            each.start()
        for each in asking:
            each.join()
        with node.socket() as last:
            for _ in threads:
                last.sendto(b"end", ("127.0.0.1", 4704))
        for each in threads:
            each.join()
    found = count_of(watch, 4704)
    assert (found.requests, found.replies) == (number * clients + len(threads), number * clients)


def test_peer_that_asks_several_addresses_is_never_unanswered(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client:
        server.bind(("0.0.0.0", 4705))
        for last in (1, 2, 3, 1):
            client.sendto(b"x", (f"127.0.0.{last}", 4705))
            _, peer = server.recvfrom(10)
        server.sendto(b"y", peer)
        client.sendto(b"x", ("127.0.0.1", 4705))
    time.sleep(2 * SECONDS)  # the window
    wait_for(lambda: watch.sensor.sample(FOREVER_NS).tracked_peers == 0, "the window to be over")
    found = count_of(watch, 4705)
    assert (found.requests, found.replies, found.unanswered) == (5, 1, 0)


def test_peer_that_asks_one_address_again_may_be_unanswered(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client:
        server.bind(("0.0.0.0", 4712))
        client.sendto(b"x", ("127.0.0.2", 4712))
        for _ in range(8):
            client.sendto(b"x", ("127.0.0.1", 4712))
            time.sleep(0.2)
            _, peer = server.recvfrom(10)
        server.sendto(b"y", peer)
        assert client.recv(10) == b"y"
        client.sendto(b"x", ("127.0.0.1", 4712))
    wait_for(lambda: count_of(watch, 4712).unanswered == 1, "the last request to be unanswered")


def test_wrong_reply_leaves_its_request_unanswered(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as other, node.socket() as client:
        for address, link in (("127.0.0.1", server), ("127.0.0.2", other)):
            link.bind((address, 4706))
        client.sendto(b"x", ("127.0.0.1", 4706))
        _, peer = server.recvfrom(10)
        other.sendto(b"y", peer)
        wait_for(lambda: count_of_address(watch, "127.0.0.1", 4706).unanswered == 1, "the request to be unanswered")
        assert count_of_address(watch, "127.0.0.1", 4706).replies == 1


def count_of_address(watch: Watch, address: str, port: int) -> ServerCount:
    servers = watch.sensor.sample(FOREVER_NS).servers
    (found,) = (each for each in servers if (each.address, each.port) == (address, port))
    return found


@pytest.fixture
def small() -> Iterator[Watch]:
    """Room for few servers, and no others on the machine."""
    limits = Limits(window_ns=SECONDS * 1_000_000_000, max_peers=4_096, max_servers=SLOTS)
    with own_cgroup() as folder, contextlib.closing(Watch(limits, watched=folder)) as found:
        (folder / "cgroup.procs").write_text("0")  # this process, whose sockets are then watched
        try:
            yield found
        finally:
            (folder.parent / "cgroup.procs").write_text("0")


def test_namespace_with_many_ports_leaves_others_room() -> None:
    with Lab() as lab, contextlib.ExitStack() as stack:
        small = stack.enter_context(contextlib.closing(Watch(Limits(max_peers=4_096, max_servers=SLOTS))))
        greedy, modest = lab.namespace("greedy"), lab.namespace("modest")
        for node, ports in ((greedy, range(5000, 5000 + 3 * SLOTS)), (modest, range(6000, 6003))):
            for port in ports:
                server = stack.enter_context(node.socket())
                server.bind(("127.0.0.1", port))
                with node.socket() as client:
                    client.sendto(b"x", ("127.0.0.1", port))
        sample = small.sensor.sample(FOREVER_NS)
        ports = {each.port for each in sample.servers}
        assert set(range(6000, 6003)) < ports
        assert len(ports) <= SLOTS
        assert sample.other_servers
        total = sum(each.requests for each in sample.servers) + sample.other_servers.requests
        assert total >= 3 * SLOTS + 3


def test_slots_of_idle_servers_are_used_again(small: Watch, node: Namespace) -> None:
    """More servers than slots, one generation after the other; nothing that they do is lost."""
    begin = small.sensor.counters().checked
    seen: dict[int, int] = {}
    for generation in range(3):
        for port in range(7000 + generation * 14, 7014 + generation * 14):
            with node.socket() as server, node.socket() as client:
                server.bind(("127.0.0.1", port))
                client.connect(("127.0.0.1", port))
                for _ in range(port % 5 + 1):
                    client.send(b"x")
                    _, peer = server.recvfrom(10)
                    server.sendto(b"y", peer)
        found = {each.port: each.requests for each in small.sensor.sample(SECONDS * 1_000_000_000).servers}
        seen |= found
        wait_for(lambda: not small.sensor.sample(SECONDS * 1_000_000_000).servers, "the servers to expire")
        time.sleep(2 * SECONDS)  # the slots rest
    assert seen == {port: port % 5 + 1 for port in seen} and len(seen) == 42
    assert small.sensor.counters().checked - begin == sum(seen.values())
