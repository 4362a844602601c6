"""With healing on for every port: what was right stays right, and no send fails that succeeded before."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from address_changes import AddressChanges, ask_new
from healing import OFF, ON, Healing
from scene import V4, Family, ask, both, bound, picked_source, source_control
from wire import Wire

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

UDP_SEGMENT, SOL_UDP = 103, 17
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
RIGHT_REPLIES = "packet and not_a_finding and not masqueraded and not cpus"


@pytest.fixture(scope="module")
def healing(host: ContainerHost) -> Iterator[Healing]:
    with Healing(host.node) as programs:
        yield programs


@dataclass
class Sent:
    """What one socket sent: the sources on the wire, and the errors."""

    sources: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def to(self, server: socket.socket, peer: tuple[str, int], data: bytes = b"reply", flags: int = 0) -> None:
        """Send a reply without a source."""
        try:
            server.sendto(data, flags, peer)
        except OSError as error:
            self.errors.append(errno.errorcode[error.errno or 0])


@contextmanager
def on_the_wire(client: Namespace, port: int) -> Iterator[Sent]:
    """Yield what is sent during the body, with its sources when that ends."""
    sent = Sent()
    with Wire(client) as wire:
        yield sent
        sent.sources = [each.source for each in wire.read() if each.source_port == port]


def test_right_replies_of_all_scenes_stay_right(tmp_path: Path) -> None:
    """NAT, groups, PKTINFO, bound and connected sockets, link-local peers, several addresses: each scene is the test
    of the sensor, run with healing in each of its namespaces.
    """
    files = [str(Path(__file__).with_name(name)) for name in ("test_scenes.py", "test_lookalikes.py")]
    options = ["-p", "heal_everywhere", "-p", "no:cacheprovider", "-q", f"--basetemp={tmp_path / 'base'}"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, *files, "-k", RIGHT_REPLIES],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-5_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed.group(1)) >= 35


# ---- sources that are left alone ----


@both
def test_reply_of_a_transparent_socket_is_left_alone(
    healing: Healing, host: ContainerHost, port: int, family: Family
) -> None:
    option = (socket.IPPROTO_IP, IP_TRANSPARENT, 1) if family is V4 else (socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    before = healing.refused().get("transparent", 0)
    healing.set_mode(port, ON)
    with (
        bound(host.node, family.inet, family.wildcard, port, option) as server,
        host.container.socket(family.inet) as client,
    ):
        _, peer = ask(client, family.eth0, port, server)
        with on_the_wire(host.container, port) as sent:
            sent.to(server, peer)
    assert (sent.sources, sent.errors) == ([family.docker0], [])
    assert healing.refused()["transparent"] == before + 1


@both
def test_reply_from_an_address_that_only_a_route_makes_local_is_left_alone(
    healing: Healing, port: int, family: Family
) -> None:
    """AnyIP: the address belongs to no device."""
    network, asked = ("10.77.0.0/24", "10.77.0.5") if family is V4 else ("fd00:77::/64", "fd00:77::5")
    with ContainerHost() as lab:
        healing.follow(lab.node)
        lab.node.ip(f"route add local {network} dev lo")
        with (
            bound(lab.node, family.inet, family.wildcard, port) as server,
            lab.container.socket(family.inet) as client,
        ):
            healing.set_mode(port, ON)
            _, peer = ask(client, asked, port, server)
            with on_the_wire(lab.container, port) as sent:
                sent.to(server, peer)
        healing.leave(lab.node)
    assert (sent.sources, sent.errors) == ([family.docker0], [])


@both
def test_reply_to_a_client_of_several_addresses_is_left_alone(
    healing: Healing, host: ContainerHost, port: int, family: Family
) -> None:
    healing.set_mode(port, ON)
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        ask(client, family.docker0, port, server)
        _, peer = ask(client, family.eth0, port, server)
        with on_the_wire(host.container, port) as sent:
            sent.to(server, peer)
    assert (sent.sources, sent.errors) == ([family.docker0], [])


def test_reply_is_left_alone_where_a_request_for_another_address_may_have_been_forgotten(port: int) -> None:
    """A flood of other clients, who get no answer, has pushed the first request of this one out of the table."""
    picked, other = "10.1.0.1", "10.1.0.2"
    with (
        Lab() as lab,
        Healing(limits=Limits(max_peers=64)) as healing,
    ):
        node, clients = lab.pair("server", [picked, other], "client", ["10.1.0.9"])
        healing.follow(node)
        healing.set_mode(port, ON)
        with bound(node, socket.AF_INET, "0.0.0.0", port) as server, clients.socket() as client:
            _, peer = ask(client, picked, port, server)
            for number in range(1_000):
                with bound(clients, socket.AF_INET, "10.1.0.9", 10_000 + number) as another:
                    ask(another, picked, port, server)
            ask(client, other, port, server)
            with on_the_wire(clients, port) as sent:
                sent.to(server, peer)  # to the first request
    assert (sent.sources, sent.errors) == ([picked], [])


def test_reply_from_loopback_to_another_machine_is_left_alone(healing: Healing, port: int) -> None:
    """The kernel refuses to send it, unless `route_localnet` is set for the device."""
    with ContainerHost() as lab:
        healing.follow(lab.node)
        lab.node.sysctl("net/ipv4/conf/docker0/route_localnet", "1")
        lab.node.nft(
            "table ip service { chain d { type nat hook prerouting priority dstnat;"
            f" udp dport {port} dnat to 127.0.0.1; }}; }}"
        )
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.container.socket() as client:
            healing.set_mode(port, ON)
            _, peer = ask(client, lab.ETH0, port, server)
            lab.node.sysctl("net/ipv4/conf/docker0/route_localnet", "0")
            with on_the_wire(lab.container, port) as sent:
                sent.to(server, peer)
        healing.leave(lab.node)
    assert (sent.sources, sent.errors) == ([lab.DOCKER0], [])


# ---- what is healed ----


def test_reply_from_another_address_of_loopback_is_healed_for_this_machine(
    healing: Healing, host: ContainerHost, port: int
) -> None:
    healing.set_mode(port, ON)
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server:
        for client_address in ("127.0.0.1", host.ETH0):
            with bound(host.node, socket.AF_INET, client_address, 0) as client:
                server.sendto(*ask(client, "127.0.0.53", port, server))
                assert client.recvfrom(100)[1][0] == "127.0.0.53"


@both
def test_healed_datagrams_are_counted_one_by_one(
    healing: Healing, host: ContainerHost, port: int, family: Family
) -> None:
    """Segmented by the kernel, put together with MSG_MORE, in fragments."""
    healing.set_mode(port, ON)
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        _, peer = ask(client, family.eth0, port, server)
        with on_the_wire(host.container, port) as sent:
            sent.to(server, peer, b"one", socket.MSG_MORE)
            sent.to(server, peer, b"datagram")
            sent.to(server, peer, bytes(6000))
            server.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
            sent.to(server, peer, bytes(4500))
        assert [len(client.recv(9000)) for _ in range(7)] == [11, 6000, 1000, 1000, 1000, 1000, 500]
    assert (set(sent.sources), sent.errors) == ({family.eth0}, [])
    assert healing.healed(port) == 7


@both
def test_reply_of_a_socket_bound_to_a_device_is_healed(
    healing: Healing, host: ContainerHost, port: int, family: Family
) -> None:
    option = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"docker0")
    with (
        host.node.socket(family.inet) as server,
        host.container.socket(family.inet) as client,
    ):
        server.setsockopt(*option)
        server.bind((family.wildcard, port))
        for mode, source in ((OFF, family.docker0), (ON, family.eth0)):
            healing.set_mode(port, mode)
            _, peer = ask(client, family.eth0, port, server)
            with on_the_wire(host.container, port) as sent:
                sent.to(server, peer)
            assert (sent.sources, sent.errors) == ([source], [])


@both
def test_failed_or_explicit_send_is_not_counted_as_healed(
    healing: Healing, host: ContainerHost, port: int, family: Family
) -> None:
    """A rule drops the healed reply before it leaves; the next send of this thread names its source."""
    healing.set_mode(port, ON)
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
        host.container.socket(family.inet) as other,
    ):
        _, peer = ask(client, family.eth0, port, server)
        _, second = ask(other, family.docker0, port, server)
        host.node.nft(
            f"table inet here {{ chain o {{ type filter hook output priority 0; udp sport {port} drop; }}; }}"
        )
        with on_the_wire(host.container, port) as sent:
            sent.to(server, peer)
        host.node.nft("delete table inet here")
        server.sendmsg([b"x"], [source_control(family, family.docker0)], 0, second)
        assert other.recvfrom(100)[1][0] == family.docker0
    assert (sent.sources, sent.errors) == ([], ["EPERM"])  # as without healing
    assert healing.healed(port) == 0


# ---- policy routing ----


@pytest.mark.parametrize(
    ("route", "sources", "errors"),
    [
        ("", [V4.eth0], []),  # an empty table: the next rule decides
        (f"route add default via {V4.outside} dev eth0 table 100", [], []),  # it leaves there, as those of TCP
        ("route add unreachable default table 100", [], ["EHOSTUNREACH"]),
    ],
)
def test_healed_reply_takes_the_route_of_its_source(
    healing: Healing, port: int, route: str, sources: list[str], errors: list[str]
) -> None:
    """As the reply of a server that is bound to this address; docs/heal.md says so."""
    with ContainerHost() as lab:
        healing.follow(lab.node)
        lab.node.ip(f"rule add from {V4.eth0} lookup 100", *filter(None, [route]))
        with bound(lab.node, socket.AF_INET, V4.eth0, port) as server, lab.container.socket() as client:
            _, peer = ask(client, V4.eth0, port, server)
            with on_the_wire(lab.container, port) as bound_server:
                bound_server.to(server, peer)
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.container.socket() as client:
            healing.set_mode(port, ON)
            _, peer = ask(client, V4.eth0, port, server)
            with on_the_wire(lab.container, port) as sent:
                sent.to(server, peer)
        healing.leave(lab.node)
    assert sent == bound_server
    assert (sent.sources, sent.errors) == (sources, errors)


# ---- addresses that change ----


@both
def test_address_of_a_device_that_is_down_is_not_used(healing: Healing, port: int, family: Family) -> None:
    asked, length = ("10.98.1.1", 32) if family is V4 else ("fd00:98:1::1", 128)
    with ContainerHost() as lab:
        lab.node.ip("link add service type bridge", "link set service up")
        lab.node.ip(f"addr add {asked}/{length} dev service{'' if family is V4 else ' nodad'}")
        healing.follow(lab.node)
        healing.set_mode(port, ON)
        with (
            bound(lab.node, family.inet, family.wildcard, port) as server,
            lab.container.socket(family.inet) as client,
        ):
            peer = ask_new(lab.node, client, asked, port, server)
            with on_the_wire(lab.container, port) as sent:
                sent.to(server, peer)
                lab.node.ip("link set service down")
                sent.to(server, peer)
                lab.node.ip("link del service")
                sent.to(server, peer)
        healing.leave(lab.node)
    assert (sent.sources, sent.errors) == ([asked, family.docker0, family.docker0], [])


@both
def test_address_that_moved_to_another_machine_is_not_used(healing: Healing, port: int, family: Family) -> None:
    """As keepalived moves it."""
    asked = "10.98.2.1" if family is V4 else "fd00:98:2::1"
    with ContainerHost() as lab, AddressChanges(lab.node, "lo") as here, AddressChanges(lab.outside, "lo") as there:
        here.add(asked)
        healing.follow(lab.node)
        healing.set_mode(port, ON)
        with (
            bound(lab.node, family.inet, family.wildcard, port) as server,
            lab.container.socket(family.inet) as client,
        ):
            peer = ask_new(lab.node, client, asked, port, server)
            with on_the_wire(lab.container, port) as sent:
                sent.to(server, peer)
                here.remove(asked)
                there.add(asked)
                sent.to(server, peer)
        healing.leave(lab.node)
    assert (sent.sources, sent.errors) == ([asked, family.docker0], [])


def test_namespace_that_is_no_longer_healed_leaves_no_address_behind(healing: Healing) -> None:
    with ContainerHost() as lab:
        healing.follow(lab.node)
        inode = lab.node.inode
        assert healing.addresses(inode) >= 6
        healing.leave(lab.node)
        assert healing.addresses(inode) == 0


# ---- hostile clients and tenants ----


def raw_socket(namespace: Namespace) -> socket.socket:
    with namespace.entered():
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)


def spoofed(source: str, source_port: int, destination: str, port: int) -> bytes:
    """Return an IPv4 packet; the kernel fills in the checksum of the header (raw(7))."""
    udp = source_port.to_bytes(2) + port.to_bytes(2) + (12).to_bytes(2) + bytes(2) + b"fake"
    header = bytes([0x45, 0, 0, 20 + len(udp), 0, 0, 0, 0, 64, 17, 0, 0])
    return header + socket.inet_aton(source) + socket.inet_aton(destination) + udp


def test_spoofed_request_takes_no_right_reply_away(healing: Healing, host: ContainerHost, port: int) -> None:
    """A container claims to be another client: that one's replies then leave as without healing."""
    healing.set_mode(port, ON)
    with (
        bound(host.node, socket.AF_INET, "0.0.0.0", port) as server,
        host.outside.socket() as client,
        raw_socket(host.container) as raw,
    ):
        picked = picked_source(host.node, V4, V4.outside)
        _, peer = ask(client, picked, port, server)
        raw.sendto(spoofed(*peer, host.DOCKER0, port), (host.DOCKER0, 0))
        assert server.recvfrom(100)[1] == peer
        server.sendto(b"reply", peer)
        assert client.recvfrom(100)[1][0] == picked
