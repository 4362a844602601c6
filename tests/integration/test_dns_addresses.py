"""Responses leave from the address that was asked, on every address of a node, also as addresses come and go."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dns.message
import pytest
from dns_server import (
    ANSWER_SECONDS,
    PORT,
    Asked,
    FakeServer,
    Responder,
    ask,
    bare_query,
    connected,
    rcode,
    right,
    sockaddr,
    texts,
    write,
)
from scene import SECOND, SECOND_6, VIP, VIP_6, host_with_more_addresses
from sensors import Watch
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

NODE = ContainerHost
ADDRESSES = [
    *(NODE.ETH0, NODE.DOCKER0, SECOND, VIP),
    *(NODE.ETH0_6, NODE.DOCKER0_6, SECOND_6, VIP_6),
]
LOOPBACKS = ["127.0.0.1", "127.0.0.2", "127.9.9.9", "::1"]


@pytest.fixture(scope="module")
def scene() -> Iterator[ContainerHost]:
    """A node with all kinds of addresses, its upstream server outside."""
    with host_with_more_addresses() as lab:
        yield lab


@pytest.fixture(scope="module")
def upstream(scene: ContainerHost) -> Iterator[FakeServer]:
    with FakeServer(scene.outside, NODE.OUTSIDE) as server:
        yield server


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dns") / "hosts", "10.0.0.1 host.test", "fd00::1 host.test")


@pytest.fixture(scope="module")
def responder(scene: ContainerHost, upstream: FakeServer, hosts: Path) -> Iterator[Responder]:
    """A responder that listens on every address."""
    with Responder(scene.node, f"--addn-hosts={hosts}", f"--server={NODE.OUTSIDE}") as running:
        yield running


def link_local(namespace: Namespace, interface: str) -> str:
    """An interface's fe80:: address, once it is usable."""

    def found() -> str | None:
        line = namespace.run(["ip", "-6", "-o", "addr", "show", "dev", interface, "scope", "link", "-tentative"])
        return line.split()[3].partition("/")[0] if line else None

    address: str = wait_for(found, f"the link-local address of {interface}")
    return address


def check_all(client: Namespace, address: str, serial: str) -> None:
    """From local names, from the cache and from upstream, over UDP and TCP: the client's socket is connected, so an
    answer from elsewhere would never arrive."""
    for tcp in (False, True):
        assert texts(ask(client, address, "host.test", tcp=tcp)) == ["10.0.0.1"]
        assert texts(ask(client, address, "host.test", "AAAA", tcp=tcp)) == ["fd00::1"]
        assert texts(ask(client, address, f"new-{serial}-{int(tcp)}.example", tcp=tcp)) == ["192.0.2.80"]
        assert texts(ask(client, address, f"new-{serial}-{int(tcp)}.example", tcp=tcp)) == ["192.0.2.80"]


@pytest.fixture
def all_right(packet_watch: Watch) -> Iterator[None]:
    """The sensor finds nothing more during the test. Other tests' servers have replied wrongly from this port."""
    before = packet_watch.findings(PORT)
    yield
    assert packet_watch.findings(PORT) == before


def test_container_on_every_address(scene: ContainerHost, responder: Responder, all_right: None) -> None:
    asked = [*ADDRESSES, f"{link_local(scene.node, 'docker0')}%eth0"]
    link_local(scene.container, "eth0")
    for number, address in enumerate(asked):
        check_all(scene.container, address, f"c{number}")


def test_outside_on_every_address(scene: ContainerHost, responder: Responder, all_right: None) -> None:
    asked = [*ADDRESSES, f"{link_local(scene.node, 'eth0')}%eth0"]
    link_local(scene.outside, "eth0")
    for number, address in enumerate(asked):
        check_all(scene.outside, address, f"o{number}")


def test_node_itself(scene: ContainerHost, responder: Responder, all_right: None) -> None:
    for number, address in enumerate([*LOOPBACKS, *ADDRESSES]):
        check_all(scene.node, address, f"n{number}")
    assert responder.metric("dropped_total") == 0


def test_sensor_finds_a_server_with_the_bug_in_the_same_scene(
    scene: ContainerHost, packet_watch: Watch, port: int
) -> None:
    """A server with the bug is found in the same scene."""
    wrong_replies(scene, port)
    wait_for(lambda: packet_watch.count(port), "the finding")
    assert packet_watch.count(port) == 1


def test_families_are_counted_separately(scene: ContainerHost, responder: Responder) -> None:
    """Also when both send the same octets and the response is remembered."""

    def asked(family: str) -> int:
        return responder.metric("requests_total", proto="udp", family=family, type="A")

    for address in (NODE.DOCKER0, NODE.DOCKER0_6):
        assert rcode(ask(scene.container, address, "host.test")) == "NOERROR"
    before = asked("1"), asked("2")
    for address in (NODE.DOCKER0, NODE.DOCKER0_6, NODE.DOCKER0, NODE.DOCKER0_6, NODE.DOCKER0_6):
        with connected(scene.container, address) as client:
            client.send(bare_query("host.test"))
            assert client.recv(100)
    assert (asked("1"), asked("2")) == (before[0] + 2, before[1] + 3)


def test_query_to_a_group_gets_no_response(scene: ContainerHost, responder: Responder) -> None:
    """A group's address cannot be a source, and any other source would be wrong."""
    before = responder.metric("dropped_total", reason="group")
    with scene.container.socket() as four, scene.container.socket(socket.AF_INET6) as six:
        four.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for address in ("172.17.255.255", "255.255.255.255", "224.0.0.1"):
            if address.startswith("2"):
                four.setsockopt(socket.SOL_SOCKET, 25, b"eth0\0")  # SO_BINDTODEVICE
            four.sendto(bare_query("host.test"), (address, PORT))
        six.sendto(bare_query("host.test"), sockaddr(scene.container, "ff02::1%eth0")[1])
        wait_for(lambda: responder.metric("dropped_total", reason="group") == before + 4, "four that are dropped")
        assert texts(ask(scene.container, NODE.DOCKER0, "host.test")) == ["10.0.0.1"]
        for client in (four, six):
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(100)


def test_address_disappears_while_a_query_is_in_flight(
    scene: ContainerHost, responder: Responder, upstream: FakeServer
) -> None:
    arrived, go = threading.Event(), threading.Event()

    def slow(asked: Asked) -> bytes:
        arrived.set()
        go.wait(10)
        return asked.answer("300 A 192.0.2.81")

    def is_lost(count: int) -> bool:
        return responder.metric("dropped_total", reason="send") == count

    before = responder.metric("dropped_total", reason="send")
    for address, size in (("172.16.13.99", 24), ("fd00:13::99", 64)):
        arrived.clear()
        go.clear()
        scene.node.ip(f"addr add {address}/{size} dev eth0 {'nodad' if size == 64 else ''}")
        try:
            upstream.script = slow
            with connected(scene.outside, address) as client:
                client.send(bare_query(f"slow-{size}.example"))
                assert arrived.wait(10)
                scene.node.ip(f"addr del {address}/{size} dev eth0")
                go.set()
                before += 1
                wait_for(partial(is_lost, before), "the lost answer")
        finally:
            go.set()
            upstream.script = right
    assert texts(ask(scene.outside, NODE.ETH0, "host.test")) == ["10.0.0.1"]


# ---- addresses that come and go ----


@pytest.fixture
def lab() -> Iterator[tuple[Namespace, Namespace]]:
    """A node 10.1.0.1, fd01::1 and a client 10.1.0.2, fd01::2."""
    with Lab() as built:
        node, client = built.pair("node", ["10.1.0.1", "fd01::1"], "client", ["10.1.0.2", "fd01::2"])
        client.ip("route add default via 10.1.0.1", "route add ::/0 via fd01::1")
        yield node, client


def answers(namespace: Namespace, address: str, tcp: bool = False, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether a responder listens on this address."""
    try:
        return texts(ask(namespace, address, "host.test", tcp=tcp, seconds=seconds)) == ["10.0.0.1"]
    except TimeoutError:
        return False
    except dns.message.ShortHeader:  # an end of TCP without a word
        return False
    except OSError as error:
        assert error.errno in (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH), error
        return False


def comes(namespace: Namespace, address: str) -> None:
    """Wait until a responder listens on this address; before that, queries may be lost silently."""
    wait_for(lambda: answers(namespace, address, seconds=0.5), f"{address} to be listened on")


@pytest.mark.parametrize("address", ["10.98.0.1", "fd98::1"])
def test_listen_address_appears_and_disappears(lab: tuple[Namespace, Namespace], hosts: Path, address: str) -> None:
    node, client = lab
    size = 128 if ":" in address else 32
    with Responder(node, f"--addn-hosts={hosts}", f"--listen-address={address},127.0.0.1") as responder:
        assert responder.has_logged(f"{address} is not an address of this host yet")
        assert answers(node, "127.0.0.1")
        assert not answers(client, "10.1.0.1")  # not listened on
        for _ in range(2):
            node.ip(f"addr add {address}/{size} dev lo")
            comes(client, address)
            assert answers(client, address, tcp=True)
            node.ip(f"addr del {address}/{size} dev lo")
            wait_for(lambda: responder.log[-1].endswith(f"no longer listening on {address}"), "it to be let go")
            responder.log.append("")
        assert answers(node, "127.0.0.1", tcp=True)


def test_address_during_duplicate_address_detection(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    """A new IPv6 address cannot be bound for a second or two."""
    node, client = lab
    with Responder(node, f"--addn-hosts={hosts}", "--interface=eth0", "--bind-dynamic"):
        node.ip("addr add fd01::7/64 dev eth0")
        comes(client, "fd01::7")


def test_link_local_listen_address(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    """The same address may be on many interfaces (Calico's fe80::ecee:eeff:feee:eeee): each is served."""
    node, client = lab
    node.ip("addr add fe80::1/64 dev eth0 nodad", "link add br9 type bridge", "link set br9 up")
    node.ip("addr add fe80::1/64 dev br9 nodad")
    link_local(client, "eth0")
    with Responder(node, f"--addn-hosts={hosts}", "--listen-address=fe80::1"):
        assert answers(client, "fe80::1%eth0") and answers(client, "fe80::1%eth0", tcp=True)
        comes(node, "fe80::1%br9")
        assert not answers(client, "fd01::1")


def test_interface_appears_later(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    node, client = lab
    with Responder(
        node, f"--addn-hosts={hosts}", "--interface=br*", "--except-interface=br7", "--bind-dynamic"
    ) as responder:
        assert answers(node, "127.0.0.1")  # loopback is always served with --interface, as by dnsmasq
        assert not answers(client, "10.1.0.1")
        node.ip("link add br9 type bridge", "link set br9 up", "addr add 10.99.9.1/24 dev br9")
        node.ip("link add br7 type bridge", "link set br7 up", "addr add 10.99.7.1/24 dev br7")
        comes(node, "10.99.9.1")
        assert answers(node, "10.99.9.1", tcp=True)
        assert not answers(node, "10.99.7.1")
        assert not answers(client, "10.99.9.1", seconds=0.5)  # by eth0
        node.ip("link del br9")
        wait_for(lambda: responder.has_logged("no longer listening on 10.99.9.1"), "it to be let go")


def test_many_addresses_at_once(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    """A burst of changes, some undone at once: the final addresses are served, each once."""
    node, client = lab
    link_local(node, "eth0")
    with Responder(node, f"--addn-hosts={hosts}", "--interface=eth0", "--bind-interfaces") as responder:
        before = responder.descriptors()
        for _ in range(3):
            node.ip(*(f"addr add 10.1.1.{number}/32 dev eth0" for number in range(1, 101)))
            node.ip(*(f"addr del 10.1.1.{number}/32 dev eth0" for number in range(1, 101)))
        node.ip("addr add 10.1.1.100/32 dev eth0")
        comes(client, "10.1.1.100")
        wait_for(lambda: responder.descriptors() == before + 2, "the others to be let go")
        assert answers(client, "10.1.0.1") and answers(client, "fd01::1")


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_another_program_uses_one_address(
    lab: tuple[Namespace, Namespace], hosts: Path, kind: socket.SocketKind
) -> None:
    """systemd-resolved uses port 53 on 127.0.0.53: udpwatch must still start."""
    node, client = lab
    with node.socket(kind=kind) as other:
        other.bind(("127.0.0.53", PORT))
        if kind == socket.SOCK_STREAM:
            other.listen()
        with Responder(node, f"--addn-hosts={hosts}"):
            for address in ("10.1.0.1", "fd01::1"):
                assert answers(client, address) and answers(client, address, tcp=True)
            assert answers(node, "127.0.0.1") and answers(node, "::1")
            node.ip("addr add 10.1.0.9/24 dev eth0")  # each address has a socket now: new ones, too
            comes(client, "10.1.0.9")


def test_another_program_uses_a_real_address(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    """libvirt's dnsmasq uses its bridge's address and keeps it, also when it restarts."""
    node, client = lab
    node.ip("addr add 10.1.0.7/24 dev eth0")
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(node.socket())
        other.bind(("10.1.0.7", PORT))
        with Responder(node, f"--addn-hosts={hosts}") as responder:
            assert responder.has_logged("cannot listen on 10.1.0.7 port 53: Address already in use; stop the other")
            assert answers(client, "10.1.0.1")
            other.close()
            node.ip("addr add 10.1.0.8/24 dev eth0")
            comes(client, "10.1.0.8")
            assert not answers(client, "10.1.0.7", seconds=1.0)


def test_listen_address_in_use(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    node, _ = lab
    with node.socket() as other:
        other.bind(("10.1.0.1", PORT))
        responder = Responder(node, "--listen-address=10.1.0.1", ready=False)
        assert responder.process.wait(60) == 2
        responder.stop()
        assert responder.log == [
            "udpwatch: cannot listen on 10.1.0.1 port 53: Address already in use; stop the other program, or choose "
            "other addresses with --listen-address"
        ]


def test_every_address_in_use(lab: tuple[Namespace, Namespace]) -> None:
    node, _ = lab
    with node.socket() as four, node.socket(socket.AF_INET6) as six:
        four.bind(("0.0.0.0", PORT))
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::", PORT))
        responder = Responder(node, ready=False)
        assert responder.process.wait(60) == 2
        responder.stop()
        assert "other programs use it on every address" in responder.log[-1]


def test_metrics_port_in_use(lab: tuple[Namespace, Namespace]) -> None:
    node, _ = lab
    with node.socket(kind=socket.SOCK_STREAM) as other:
        other.bind(("127.0.0.1", 9953))
        other.listen()
        with Responder(node, "--address=/here.example/192.0.2.1") as responder:
            assert texts(ask(node, "127.0.0.1", "here.example")) == ["192.0.2.1"]
            (line,) = [line for line in responder.log if "9953" in line]
            assert line.startswith(
                "udpwatch: cannot listen on 127.0.0.1:9953 for metrics: Address already in use; retry"
            )
            other.close()
            wait_for(lambda: responder.has_logged("metrics on http://127.0.0.1:9953/metrics"), "the port to be bound")
            assert responder.get("/readyz") == (200, "ready\n")


# ---- who is served ----


def far(node: Namespace, client: Namespace) -> None:
    """Give the client an address in a network that is not connected to the node."""
    client.ip("addr add 192.0.2.7/32 dev lo")
    node.ip("route add 192.0.2.7 via 10.1.0.2")


def ask_from_afar(client: Namespace, tcp: bool = False) -> socket.socket:
    link = client.socket(kind=socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    link.bind(("192.0.2.7", 0))
    link.settimeout(6)
    link.connect(("10.1.0.1", PORT))
    return link


def test_only_connected_networks(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    node, client = lab
    far(node, client)
    with Responder(node, f"--addn-hosts={hosts}") as responder:
        with ask_from_afar(client) as link:
            link.send(bare_query("host.test"))
            wait_for(lambda: responder.metric("dropped_total", reason="policy") == 1, "it to be dropped")
            link.setblocking(False)
            with pytest.raises(BlockingIOError):
                link.recv(100)
            assert responder.has_logged("ignoring query from non-local network 192.0.2.7")
            assert answers(client, "10.1.0.1")
            node.ip("addr add 192.0.2.1/24 dev eth0")  # now it is connected
            link.setblocking(True)
            link.settimeout(0.2)

            def served() -> bool:
                link.send(bare_query("host.test"))
                with contextlib.suppress(TimeoutError):
                    return bool(link.recv(100))
                return False

            wait_for(served, "the new network to be served")
        node.ip("addr del 192.0.2.1/24 dev eth0")
        with ask_from_afar(client) as link:
            wait_for(lambda: _unserved(link), "the network to be served no more")
        with ask_from_afar(client, tcp=True) as link:
            assert link.recv(1) == b""


def _unserved(link: socket.socket) -> bool:
    link.settimeout(0.2)
    link.send(bare_query("host.test"))
    try:
        return not link.recv(100)
    except TimeoutError:
        return True


def test_explicit_listening_serves_everybody(lab: tuple[Namespace, Namespace], hosts: Path) -> None:
    node, client = lab
    far(node, client)
    with Responder(node, f"--addn-hosts={hosts}", "--interface=eth0"), ask_from_afar(client) as link:
        link.send(bare_query("host.test"))
        assert link.recv(100)


# ---- asking oneself ----


@pytest.mark.parametrize("server", ["127.0.0.1", "127.0.0.7", "10.1.0.1", "fd01::1", "0.0.0.0", "::ffff:127.0.0.1"])
def test_responder_does_not_query_itself(lab: tuple[Namespace, Namespace], server: str) -> None:
    node, client = lab
    options = (f"--server={server}", f"--server=/corp.example/{server}")
    with Responder(node, *options) as responder:
        assert responder.has_logged("#53: it is this responder itself")
        for name in ("www.example", "www.corp.example"):
            assert rcode(ask(client, "10.1.0.1", name)) == "REFUSED"
        assert "udpwatch_dns_upstream_requests_total{" not in responder.get("/metrics")[1]


def test_link_local_upstream_belongs_to_its_link(lab: tuple[Namespace, Namespace]) -> None:
    """Docker's bridge has fe80::1, and so have many routers."""
    node, client = lab
    node.ip("link add docker0 type bridge", "link set docker0 up", "addr add fe80::1/64 dev docker0 nodad")
    client.ip("addr add fe80::1/64 dev eth0 nodad")
    link_local(node, "eth0")
    with FakeServer(client, "fe80::1%eth0"), Responder(node, "--server=fe80::1%eth0", "--server=fe80::1%docker0") as us:
        assert us.has_logged("ignoring nameserver fe80::1%docker0#53")
        assert texts(ask(client, "10.1.0.1", "www.example")) == ["192.0.2.80"]


def test_upstream_address_becomes_our_own(lab: tuple[Namespace, Namespace]) -> None:
    node, client = lab
    with Responder(node, "--server=10.1.0.77") as responder:
        node.ip("addr add 10.1.0.77/24 dev eth0")
        wait_for(lambda: responder.has_logged("ignoring nameserver 10.1.0.77#53"), "it to be noticed")
        assert rcode(ask(client, "10.1.0.1", "www.example")) == "REFUSED"
