"""Right replies that look wrong, wrong replies that look right, and many at once that could confuse the programs.

Each was a bug once, found by attack.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from scene import PATIENCE_SECONDS, SECOND, V4, Family, ask, both, bound, finding_of, source_control
from sensors import Watch

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Cause, Verdict
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    """A server with three addresses on one cable and a client, without conntrack."""
    with Lab() as lab:
        yield lab.pair("server", ADDRESSES, "client", ["10.1.0.9"])


ADDRESSES = A, B, C = "10.1.0.1", "10.1.0.2", "10.1.0.3"


def answer_from(server: socket.socket, request: tuple[bytes, tuple[str, int]], source: str) -> None:
    data, peer = request
    server.sendmsg([data], [source_control(V4, source)], 0, peer)


def on_cpu(number: int, function: Callable[[], object]) -> None:
    """Run on one CPU: a packet over veth or loopback is received on the CPU that sent it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        function()
    finally:
        os.sched_setaffinity(0, before)


# ---- NAT ----


def test_replies_to_a_client_here_behind_source_nat_are_not_requests(
    watch: Watch, host: ContainerHost, port: int
) -> None:
    """A resolver on this host sends its queries from a fixed address."""
    with ContainerHost() as lab:
        lab.node.ip(f"addr add {SECOND}/24 dev eth0")
        lab.node.nft(
            "table ip own { chain p { type nat hook postrouting priority srcnat - 5;"
            f" udp sport {port} snat to {SECOND}; }}; }}"
        )
        with (
            bound(lab.node, socket.AF_INET, "0.0.0.0", port) as client,
            bound(lab.outside, socket.AF_INET, "0.0.0.0", port) as server,
        ):
            for _ in range(5):
                data, peer = ask(client, lab.OUTSIDE, port, server)
                assert peer[0] == SECOND
                server.sendto(data, peer)
                client.recvfrom(100)
            assert watch.count(port) == 0


def test_wrong_reply_whose_address_but_not_port_source_nat_restores_is_found(watch: Watch, port: int) -> None:
    """Conntrack has a new entry for the reply; the asked address's port is in use, so NAT picks another."""
    with ContainerHost() as lab:
        lab.node.ip(f"addr add {SECOND}/24 dev eth0")
        lab.node.nft(
            "table ip own { chain p { type nat hook postrouting priority srcnat - 5;"
            f" oifname eth0 udp sport {port} snat to {SECOND}; }}; }}"
        )
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.outside.socket() as client:
            server.sendto(*ask(client, SECOND, port, server))
            address, source_port = client.recvfrom(100)[1]
            assert address == SECOND
            assert source_port != port
            assert watch.count(port) == 1
            finding = finding_of(watch, port)
            assert (finding.expected, finding.actual) == (SECOND, SECOND)


def test_source_nat_of_a_reply_to_a_broadcast_is_not_a_finding(watch: Watch, port: int) -> None:
    """NAT changes the port of the reply, which is right all the same."""
    with ContainerHost() as lab:
        lab.node.nft(
            "table ip own { chain p { type nat hook postrouting priority srcnat - 5;"
            f" oifname eth0 udp sport {port} snat to {lab.ETH0}:5999; }}; }}"
        )
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.outside.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            server.sendto(*ask(client, "255.255.255.255", port, server))
            assert client.recvfrom(100)[1] == (lab.ETH0, 5999)
            assert watch.count(port) == 0


def test_reply_through_nat_in_another_zone_is_not_a_finding(watch: Watch, port: int) -> None:
    with ContainerHost() as lab:
        lab.node.nft(
            f"""table ip zone {{
              chain r {{ type filter hook prerouting priority raw; udp dport 7999 ct zone set 5; }};
              chain o {{ type filter hook output priority raw; udp sport {port} ct zone set 5; }};
              chain d {{ type nat hook prerouting priority dstnat;
                ip daddr 10.99.0.9 udp dport 7999 dnat to {lab.ETH0}:{port}; }}; }}"""
        )
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.outside.socket() as client:
            for _ in range(3):
                server.sendto(*ask(client, "10.99.0.9", 7999, server))
                assert client.recvfrom(100)[1] == ("10.99.0.9", 7999)
            assert watch.count(port) == 0


def test_reply_through_nat_whose_entry_was_deleted_is_not_a_finding(watch: Watch, port: int) -> None:
    """kube-proxy deletes entries when an endpoint goes: nothing is claimed, then or later."""
    with ContainerHost() as lab:
        lab.node.nft(
            "table ip service { chain d { type nat hook prerouting priority dstnat;"
            f" ip daddr 10.99.0.9 udp dport 7999 dnat to {lab.ETH0}:{port}; }}; }}"
        )
        with (
            bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server,
            lab.outside.socket() as client,
            lab.outside.socket() as other,
        ):
            other.sendto(b"tracked", (lab.ETH0, 9))
            server.sendto(*ask(client, "10.99.0.9", 7999, server))
            lab.node.run(["conntrack", "-D", "-p", "udp", "--orig-port-dst", "7999"])
            assert watch.count(port) == 0
            for _ in range(3):
                server.sendto(*ask(client, "10.99.0.9", 7999, server))
                assert watch.count(port) == 0


# ---- groups ----


@pytest.mark.parametrize("group", ["172.16.13.255", "255.255.255.255", "239.1.2.3"])
@pytest.mark.parametrize("group_first", [False, True])
def test_reply_to_a_client_that_asks_an_address_and_a_group_is_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, group: str, group_first: bool
) -> None:
    """As in NetBIOS, BACnet and games; nobody can reply from the group's address."""
    with (
        bound(host.node, socket.AF_INET, "0.0.0.0", port) as server,
        host.outside.socket() as client,
    ):
        index = struct.pack("=4s4si", socket.inet_aton("239.1.2.3"), bytes(4), _interface(host.node))
        server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, index)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        if group_first:
            request = ask(client, group, port, server)
            answer_from(server, ask(client, SECOND, port, server), SECOND)
            server.sendto(*request)
        else:
            answer_from(server, ask(client, SECOND, port, server), SECOND)
            server.sendto(*ask(client, group, port, server))
        assert watch.count(port) == 0


def _interface(namespace: Namespace) -> int:
    with namespace.entered():
        return socket.if_nametoindex("eth0")


def test_reply_to_a_broadcast_over_a_tun_device_is_not_a_finding(watch: Watch, port: int) -> None:
    """No frame shows that it was a broadcast; only the route does."""
    with ContainerHost() as lab:
        with lab.node.entered():
            tun = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH14s", b"tun9", 0x1001, b""))  # TUNSETIFF, IFF_TUN|IFF_NO_PI
        try:
            lab.node.ip("addr add 10.8.0.1/24 brd + dev tun9", "link set tun9 up")
            with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server:
                server.settimeout(PATIENCE_SECONDS)
                os.write(tun, datagram("10.8.0.2", 5555, "10.8.0.255", port))
                server.sendto(*server.recvfrom(100))
                assert watch.count(port) == 0
        finally:
            os.close(tun)


def datagram(source: str, source_port: int, destination: str, port: int) -> bytes:
    """Return an IPv4 packet with a UDP datagram and valid checksums (RFC 791; RFC 768: none for UDP)."""
    udp = struct.pack("!HHHH", source_port, port, 10, 0) + b"hi"
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + udp


def test_reply_to_a_broadcast_on_loopback_is_not_a_finding(watch: Watch, host: ContainerHost, port: int) -> None:
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.node.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.sendto(*ask(client, "127.255.255.255", port, server))
        assert watch.count(port) == 0


def test_wrong_reply_to_a_request_in_a_broadcast_frame_is_found(packet_watch: Watch, port: int) -> None:
    """Frames to a cluster go to all machines, but the packet is for one address."""
    with ContainerHost() as lab:
        lab.node.ip(f"addr add {SECOND}/24 dev eth0")
        lab.outside.ip(f"neigh replace {SECOND} lladdr ff:ff:ff:ff:ff:ff dev eth0 nud permanent")
        with bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server, lab.outside.socket() as client:
            server.sendto(*ask(client, SECOND, port, server))
            assert packet_watch.count(port) == 1


# ---- sockets ----


def test_right_replies_of_listener_and_connected_socket_are_not_a_finding(
    watch: Watch, pair: tuple[Namespace, Namespace], port: int
) -> None:
    server, client = pair
    with (
        bound(server, socket.AF_INET, A, port) as listener,
        bound(server, socket.AF_INET, B, port) as worker,
        bound(client, socket.AF_INET, "10.1.0.9", 0) as asking,
    ):
        worker.connect(("10.1.0.9", asking.getsockname()[1]))
        listener.sendto(*ask(asking, A, port, listener))
        asking.sendto(b"x", (B, port))
        worker.settimeout(PATIENCE_SECONDS)
        worker.send(worker.recv(100))
        assert watch.count(port) == 0


@both
def test_wrong_reply_of_the_listener_to_a_request_at_the_connected_socket_is_found(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with (
        bound(host.node, family.inet, family.wildcard, port, reuse) as listener,
        bound(host.node, family.inet, family.eth0, port, reuse) as worker,
        host.container.socket(family.inet) as client,
    ):
        client.connect((family.eth0, port))
        peer = client.getsockname()
        worker.connect(peer[:2])
        worker.settimeout(PATIENCE_SECONDS)
        client.send(b"x")
        listener.sendto(worker.recv(100), peer)
        assert watch.count(port) == 1
        assert finding_of(watch, port).cause is Cause.KERNEL_CHOSEN


@both
def test_connected_socket_with_another_source_in_pktinfo_is_explicit(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.eth0, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.connect(peer)
        server.sendmsg([data], [source_control(family, family.second)])
        assert watch.count(port) == 1
        assert finding_of(watch, port).cause is Cause.EXPLICIT


def test_link_local_peers_on_three_links_are_distinguished(watch: Watch, port: int) -> None:
    """fe80::1 is another machine on each link."""
    with Lab() as lab:
        node = lab.namespace("node")
        requests = []
        with bound(node, socket.AF_INET6, "::", port) as server:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            server.settimeout(PATIENCE_SECONDS)
            for number in range(3):
                peer = lab.namespace(f"peer{number}")
                lab.link(node, f"eth{number}", peer, "eth0")
                node.ip(f"addr add fe80::a{number}/64 dev eth{number} nodad")
                peer.ip("addr add fe80::1/64 dev eth0 nodad")
                index = _interface(peer)
                with bound(peer, socket.AF_INET6, "::", 40_000) as client:
                    client.sendto(b"x", (f"fe80::a{number}", port, 0, index))
                    data, control, _, sender = server.recvmsg(100, 100)
                    requests.append((data, control, sender))
            for data, control, sender in requests:
                server.sendmsg([data], control, 0, sender)
        assert watch.count(port) == 0


# ---- many at once ----


def test_newest_of_requests_seen_by_two_cpus_is_expected(
    watch: Watch, pair: tuple[Namespace, Namespace], port: int
) -> None:
    """B, C, B, C arrive on two CPUs in turn: C is the newest."""
    server, client = pair
    with bound(server, socket.AF_INET, "0.0.0.0", port) as serving, client.socket() as asking:
        request = None
        for number, address in enumerate((B, C, B, C)):

            def put(address: str = address) -> None:
                nonlocal request
                request = ask(asking, address, port, serving)

            on_cpu(number % 2, put)
        assert request
        serving.sendto(*request)  # from A, which was never asked
        assert watch.count(port) == 1
        assert finding_of(watch, port).expected == C
        on_cpu(0, lambda: ask(asking, A, port, serving))
        answer_from(serving, request, C)
        assert watch.count(port) == 1


def test_first_requests_on_two_cpus_at_once_are_both_kept(
    packet_watch: Watch, pair: tuple[Namespace, Namespace], port: int
) -> None:
    """A new client asks A on one CPU and B on the other."""
    server, client = pair
    with bound(server, socket.AF_INET, A, port) as at_a, bound(server, socket.AF_INET, B, port) as at_b:
        at_a.settimeout(PATIENCE_SECONDS)
        at_b.settimeout(PATIENCE_SECONDS)
        for _ in range(2_000):
            with client.socket() as asking:
                barrier = threading.Barrier(2)

                def put(cpu: int, address: str, via: socket.socket = asking, at: threading.Barrier = barrier) -> None:
                    os.sched_setaffinity(0, {cpu})  # of this thread alone
                    at.wait()
                    via.sendto(b"x", (address, port))

                threads = [threading.Thread(target=put, args=each) for each in ((0, A), (1, B))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for serving in (at_a, at_b):
                    serving.sendto(*serving.recvfrom(100))
        assert packet_watch.count(port) == 0


def test_reply_to_an_evicted_peer_is_undecided(pair: tuple[Namespace, Namespace], port: int) -> None:
    """Without conntrack, the reply may have been right: counted, not reported."""
    server, client = pair
    with (
        closing(Watch(Limits(max_peers=64))) as watch,
        bound(server, socket.AF_INET, "0.0.0.0", port) as serving,
        client.socket() as asking,
    ):
        for _ in range(5):
            first = ask(asking, A, port, serving)
            for number in range(200):
                with bound(client, socket.AF_INET, "10.1.0.9", 10_000 + number) as other:
                    ask(other, A, port, serving)
            second = ask(asking, B, port, serving)
            answer_from(serving, first, A)
            answer_from(serving, second, B)
        assert watch.count(port) == 0
        assert watch.sensor.counters().undecided > 0


def flood(server: socket.socket, peer: tuple[str, int], times: int) -> None:
    for _ in range(times):
        with contextlib.suppress(ConnectionRefusedError):
            server.sendto(b"x", peer)


def test_workers_that_share_a_socket_are_distinguished(packet_watch: Watch, host: ContainerHost, port: int) -> None:
    """Both processes of a preforked server send through one socket at the same time, 20,000 replies each."""
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
        _, peer = ask(client, host.ETH0, port, server)
        workers = [host.node.spawn(f"worker{n}", lambda: flood(server, peer, 20_000)) for n in range(2)]
        assert [worker.wait() for worker in workers] == [0, 0]
    counts = {finding.process: count for finding, count in packet_watch.findings(port).items()}
    assert counts == {"worker0": 20_000, "worker1": 20_000}


def test_sockets_whose_cookies_collide_are_distinguished(packet_watch: Watch, host: ContainerHost, port: int) -> None:
    """A table of 4096 slots by cookie would confuse them."""

    def cookie(of: socket.socket) -> int:
        value: int = struct.unpack("=Q", of.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0]
        return value

    with contextlib.ExitStack() as held:
        one = held.enter_context(bound(host.node, socket.AF_INET, "0.0.0.0", port))
        with host.node.entered():
            other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            while (cookie(other) - cookie(one)) % 4096:
                other.close()
                other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.enter_context(other)
        other.bind(("0.0.0.0", port + 10_000))
        client = held.enter_context(host.container.socket())
        processes = []
        for name, server, at in (("alpha", one, port), ("beta", other, port + 10_000)):
            _, peer = ask(client, host.ETH0, at, server)
            processes.append(host.node.spawn(name, lambda server=server, peer=peer: flood(server, peer, 20_000)))
        assert [process.wait() for process in processes] == [0, 0]
    for name, at in (("alpha", port), ("beta", port + 10_000)):
        ((finding, count),) = packet_watch.findings(at).items()
        assert (finding.process, finding.cause, count) == (name, Cause.KERNEL_CHOSEN, 20_000)


def test_each_reply_has_the_process_name_of_its_time(packet_watch: Watch, host: ContainerHost, port: int) -> None:
    """The process calls exec between two replies on one socket."""
    code = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.sendto(*s.recvfrom(100))"
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
        os.set_inheritable(server.fileno(), True)

        def become() -> None:
            server.sendto(*server.recvfrom(100))
            os.execv("/usr/bin/python3", ["python3", "-c", code, str(server.fileno())])  # noqa: S606

        process = host.node.spawn("before-exec", become)
        client.settimeout(PATIENCE_SECONDS)
        for _ in range(2):
            client.sendto(b"x", (host.ETH0, port))
            client.recvfrom(100)
        process.wait()
    counts = {finding.process: count for finding, count in packet_watch.findings(port).items()}
    assert counts == {"before-exec": 1, "python3": 1}


def test_checked_replies_are_counted_in_datagrams_like_wrong_ones(
    packet_watch: Watch, host: ContainerHost, port: int
) -> None:
    """The share of wrong replies never exceeds one."""
    before = packet_watch.sensor.counters()
    with (
        bound(host.node, socket.AF_INET, "0.0.0.0", port, (17, 103, 1000)) as server,
        host.container.socket() as client,
    ):
        _, peer = ask(client, host.ETH0, port, server)
        server.sendto(bytes(4500), peer)
    after = packet_watch.sensor.counters()
    assert after.checked - before.checked >= after.wrong - before.wrong >= 5


# ---- mode netlink ----


def test_undecided_replies_are_counted_while_the_server_never_pauses(port: int, tmp_path: Path) -> None:
    """No process is in the namespace, so its conntrack cannot be asked."""
    (tmp_path / "empty").touch()
    with (
        closing(Watch(Limits(window_ns=200_000_000), btf=tmp_path / "empty")) as watch,
        ContainerHost() as lab,
        lab.container.socket() as client,
        bound(lab.node, socket.AF_INET, "0.0.0.0", port) as server,
    ):
        _, peer = ask(client, lab.ETH0, port, server)
        sent = undecided = 0
        end = time.monotonic() + 10
        while not undecided:
            assert time.monotonic() < end
            ask(client, lab.ETH0, port, server)  # the window is short
            lab.node.spawn("gone", lambda: flood(server, peer, 1)).wait()
            sent += 1
            undecided = watch.sensor.sample(1 << 62).undecided
        assert undecided == sent
        assert watch.count(port) == 0


def test_wrong_reply_without_conntrack_is_untracked(
    packet_watch: Watch, pair: tuple[Namespace, Namespace], port: int
) -> None:
    server, client = pair
    with bound(server, socket.AF_INET, "0.0.0.0", port) as serving, client.socket() as asking:
        serving.sendto(*ask(asking, B, port, serving))
    assert finding_of(packet_watch, port).verdict is Verdict.UNTRACKED
