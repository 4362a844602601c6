"""The datagrams that a tap counts at the devices of a namespace."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from waiting import wait_for

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import packet_tap
from udpwatch.agent.kernel.packet_tap import Tap, Traffic
from udpwatch.agent.testing.lab import Lab, Namespace

SERVER, SERVER_6, CLIENT, CLIENT_6 = "10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    with Lab() as lab:
        yield lab.pair("server", [SERVER, SERVER_6], "client", [CLIENT, CLIENT_6])


def tapped(where: Namespace, port: int) -> Tap:
    with where.entered():
        return Tap(port)


def exchange(server: Namespace, client: Namespace, address: str, port: int, times: int = 1) -> None:
    """Ask and reply."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with server.socket(family) as theirs, client.socket(family) as ours:
        theirs.bind((address, port))
        for _ in range(times):
            ours.sendto(b"question", (address, port))
            data, peer = theirs.recvfrom(100)
            theirs.sendto(data, peer)
            assert ours.recv(100) == data


def counts(traffic: Traffic) -> list[tuple[str, str, int, int]]:
    return [(each.peer, each.address, each.requests, each.replies) for each in traffic.conversations]


@pytest.mark.parametrize(("address", "peer"), [(SERVER, CLIENT), (SERVER_6, CLIENT_6)])
def test_requests_and_replies_are_counted_once(
    pair: tuple[Namespace, Namespace], port: int, address: str, peer: str
) -> None:
    server, client = pair
    with tapped(server, port) as tap, tapped(client, port) as other:
        exchange(server, client, address, port, 23)
        exchange(server, client, address, port + 1, 5)
        assert counts(tap.finish()) == [(peer, address, 23, 23)]
        assert counts(other.finish()) == []  # the client's requests leave, and its replies arrive


def test_loopback_is_counted_once(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    with tapped(server, port) as tap:
        exchange(server, server, "127.0.0.1", port, 7)
        assert counts(tap.finish()) == [("127.0.0.1", "127.0.0.1", 7, 7)]


def test_ports_of_a_bridge_are_not_counted_again(port: int) -> None:
    with Lab() as lab:
        server, client = lab.namespace("server"), lab.namespace("client")
        lab.link(server, "port0", client, "eth0")
        # As a bridge without an address of its own, it has the link address of its port.
        server.ip("link add br0 type bridge forward_delay 0", "link set port0 master br0", "link set br0 up")
        server.add_addresses("br0", SERVER)
        client.add_addresses("eth0", CLIENT)
        with tapped(server, port) as tap:
            exchange(server, client, SERVER, port, 9)
            assert counts(tap.finish()) == [(CLIENT, SERVER, 9, 9)]


def test_tagged_frames_of_a_vlan_are_counted_once(pair: tuple[Namespace, Namespace], port: int) -> None:
    try:
        for host, address in zip(pair, ("10.7.0.1", "10.7.0.2"), strict=True):
            host.ip("link add link eth0 name eth0.7 type vlan id 7", "link set eth0.7 up")
            host.add_addresses("eth0.7", address)
    except UdpwatchError as error:
        pytest.skip(f"needs VLAN devices (CONFIG_VLAN_8021Q): {error}")
    with tapped(pair[0], port) as tap:
        exchange(*pair, "10.7.0.1", port, 4)
        assert counts(tap.finish()) == [("10.7.0.2", "10.7.0.1", 4, 4)]


def test_datagrams_that_a_firewall_drops_are_counted(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    server.nft("table inet t { chain i { type filter hook prerouting priority -400; drop; }; }")
    with tapped(server, port) as tap, client.socket() as asker:
        for _ in range(3):
            asker.sendto(b"question", (SERVER, port))

        def three() -> bool:
            tap.read()
            return tap.requests == 3

        wait_for(three, "three requests")
        assert counts(tap.finish()) == [(CLIENT, SERVER, 3, 0)]


def test_requests_to_a_group_may_be_answered_from_any_address(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with tapped(server, port) as tap, server.socket() as theirs, client.socket() as ours:
        theirs.bind(("", port))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        ours.sendto(b"question", ("10.0.0.255", port))
        data, peer = theirs.recvfrom(100)
        theirs.sendto(data, peer)
        assert ours.recv(100)
        (found,) = tap.finish().conversations
        assert (found.group, found.requests, found.replies, found.wrong) == (True, 1, 1, {})


def test_peer_that_asks_thousands_of_addresses(pair: tuple[Namespace, Namespace], port: int) -> None:
    """One socket asks 2,000 addresses of an AnyIP route, three times each; the first reply has a wrong source."""
    server, client = pair
    server.ip("route add local 10.5.0.0/16 dev lo")
    client.ip(f"route add 10.5.0.0/16 via {SERVER}")
    asked = [f"10.5.{number // 250}.{number % 250 + 1}" for number in range(2_000)]
    with tapped(server, port) as tap, client.socket() as ours, server.socket() as theirs:
        theirs.bind(("", port))
        ours.bind(("", port + 1))
        spent = 0.0
        for _ in range(3):
            for number, each in enumerate(asked):
                ours.sendto(b"question", (each, port))
                if number % 100 == 0:
                    begin = time.process_time()
                    tap.read()
                    spent += time.process_time() - begin
        theirs.sendto(b"reply", (CLIENT, port + 1))
        begin = time.process_time()
        traffic = tap.finish()
        spent += time.process_time() - begin
    assert [(each.address, each.requests) for each in traffic.conversations] == [(each, 3) for each in asked]
    assert [each.wrong for each in traffic.conversations if each.wrong] == [{SERVER: 1}]
    assert spent < 0.5


def test_what_is_beyond_the_limits_counts_as_missed(
    pair: tuple[Namespace, Namespace], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair
    monkeypatch.setattr(packet_tap, "MAX_CONVERSATIONS", 2)
    with tapped(server, port) as tap:
        for _ in range(5):
            exchange(server, client, SERVER, port)
        traffic = tap.finish()
        assert (traffic.requests, traffic.missed) == (2, 3)
    monkeypatch.setattr(packet_tap, "MAX_PACKETS", 4)
    with tapped(server, port) as tap:
        exchange(server, client, SERVER, port, 10)
        traffic = tap.finish()
        assert traffic.requests + sum(each.replies for each in traffic.conversations) == 4
        assert traffic.missed == 16
