"""Wrong replies, and right replies that only look wrong: every scene with its own count, real sockets, both modes."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from machine import own_cgroup
from scene import (
    PATIENCE_SECONDS,
    SECOND,
    SECOND_6,
    V4,
    V6,
    Family,
    ask,
    both,
    bound,
    finding_of,
    picked_source,
    source_control,
    verdict_of,
)
from sensors import Watch

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Cause, Verdict
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

SO_REUSEPORT = socket.SO_REUSEPORT
UDP_SEGMENT = 103  # include/uapi/linux/udp.h
SOL_UDP = 17


# ---- wrong replies ----


@both
def test_wrong_reply_with_two_addresses_on_one_interface(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        picked = picked_source(host.node, family, family.outside)
        asked = family.second if picked == family.eth0 else family.eth0
        server.sendto(*ask(client, asked, port, server))
        finding = finding_of(watch, port)
        assert watch.count(port) == 1
        assert (finding.expected, finding.actual) == (asked, picked)
        assert finding.cause is Cause.KERNEL_CHOSEN
        assert finding.family == family.number


@both
def test_wrong_reply_from_the_bridge_instead_of_eth0(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        server.sendto(*ask(client, family.eth0, port, server))
        finding = finding_of(watch, port)
        assert watch.count(port) == 1
        assert (finding.expected, finding.actual) == (family.eth0, family.docker0)
        assert finding.verdict is verdict_of(watch, Verdict.NEW)
        (event,) = watch.events(port)
        assert event.peer_port == client.getsockname()[1]
        if watch.sensor.features.mode == "packet":
            assert event.netns_inode == host.node.inode
            assert event.original is not None
            assert event.original.source == family.docker0
            assert event.original.source_port == port
            assert event.reply is not None
            assert event.reply.destination == family.docker0
        # and asked at the address that routing picks anyway, it is right
        server.sendto(*ask(client, family.docker0, port, server))
        assert watch.count(port) == 1


@both
def test_wrong_reply_to_a_request_at_an_address_on_loopback(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        for _ in range(3):
            server.sendto(*ask(client, family.vip, port, server))
        assert watch.count(port) == 3
        assert finding_of(watch, port).expected == family.vip


def test_wrong_reply_of_an_ipv6_socket_to_an_ipv4_client(watch: Watch, host: ContainerHost, port: int) -> None:
    with (
        bound(host.node, socket.AF_INET6, "::", port, (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)) as server,
        host.container.socket() as client,
    ):
        server.sendto(*ask(client, V4.eth0, port, server))
        finding = finding_of(watch, port)
        assert watch.count(port) == 1
        assert (finding.expected, finding.actual, finding.family) == (V4.eth0, V4.docker0, 4)
        assert finding.cause is Cause.KERNEL_CHOSEN


@both
def test_wrong_replies_of_a_connected_server_socket(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """As iperf3: the socket that received the request is connected to the client and replies from there on."""
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.connect(peer)
        for _ in range(4):
            try:
                server.send(data)
            except ConnectionRefusedError:  # the client's kernel has said what it thinks of the one before
                server.send(data)
        finding = finding_of(watch, port)
        assert watch.count(port) == 4
        assert (finding.actual, finding.cause) == (family.docker0, Cause.CONNECTED)


def test_each_reply_has_the_cause_of_its_own_thread(packet_watch: Watch, port: int) -> None:
    """Two threads share a socket: one names its source, the other leaves it to routing, at the same time."""
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            _, peer = ask(client, "127.0.0.2", port, server)

            def send(controls: list[tuple[int, int, bytes]]) -> None:
                for _ in range(5_000):
                    server.sendmsg([b"x"], controls, 0, peer)

            threads = [
                threading.Thread(target=send, args=[controls]) for controls in ([], [source_control(V4, "127.0.0.3")])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            causes = {finding.cause: count for finding, count in packet_watch.findings(port).items()}
            assert causes == {Cause.KERNEL_CHOSEN: 5_000, Cause.EXPLICIT: 5_000}


def test_finding_has_the_cgroup_of_the_sending_process(packet_watch: Watch, port: int) -> None:
    """Another process, in another cgroup, made the socket (socket activation)."""
    with Lab() as lab, own_cgroup() as folder:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            request = ask(client, "127.0.0.2", port, server)

            def answer() -> None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))
                server.sendto(*request)

            number = folder.stat().st_ino
            assert alone.spawn("heir", answer).wait() == 0
            finding = finding_of(packet_watch, port)
            assert (finding.process, finding.cgroup) == ("heir", number)


def test_each_reply_has_its_own_cause(packet_watch: Watch, port: int) -> None:
    """A hundred sends of one kind, then a hundred of the other, in turns."""
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            _, peer = ask(client, "127.0.0.2", port, server)
            for _ in range(3):
                for controls in ([], [source_control(V4, "127.0.0.3")]):
                    for _ in range(100):
                        server.sendmsg([b"x"], controls, 0, peer)
            causes = {finding.cause: count for finding, count in packet_watch.findings(port).items()}
            assert causes == {Cause.KERNEL_CHOSEN: 300, Cause.EXPLICIT: 300}


@both
def test_wrong_reply_of_a_second_connected_socket(watch: Watch, host: ContainerHost, port: int, family: Family) -> None:
    """One socket for each client, connected after the listening one has received; it is not bound, so routing chose its
    source.
    """
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with (
        bound(host.node, family.inet, family.wildcard, port, reuse) as listener,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, listener)
        with bound(host.node, family.inet, family.wildcard, port, reuse) as second:
            second.connect(peer)
            second.send(data)
        assert watch.count(port) == 1
        assert finding_of(watch, port).cause is Cause.CONNECTED


@both
def test_wrong_replies_of_a_second_connected_socket_on_an_ephemeral_port(
    host: ContainerHost, port: int, family: Family
) -> None:
    """Most connected sockets on such a port are clients; this one replies, for longer than the window."""
    port += 20_000
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with (
        closing(Watch(Limits(window_ns=500_000_000))) as watch,
        bound(host.node, family.inet, family.wildcard, port, reuse) as listener,
        bound(host.outside, family.inet, family.wildcard, 0) as client,
    ):
        data, peer = ask(client, family.docker0, port, listener)
        with bound(host.node, family.inet, family.wildcard, port, reuse) as second:
            second.connect(peer)
            begin = time.monotonic()
            sent = 0
            while time.monotonic() - begin < 1.2:  # the scene itself: time goes by
                ask(client, family.docker0, port, listener)
                second.send(data)
                sent += 1
                time.sleep(0.1)
            assert watch.count(port) == sent
            time.sleep(0.8)
            second.send(data)
            assert watch.count(port) == sent


@both
def test_wrong_reply_of_a_reuseport_sibling(watch: Watch, host: ContainerHost, port: int, family: Family) -> None:
    reuse = (socket.SOL_SOCKET, SO_REUSEPORT, 1)
    with (
        bound(host.node, family.inet, family.wildcard, port, reuse) as one,
        bound(host.node, family.inet, family.wildcard, port, reuse) as other,
        host.container.socket(family.inet) as client,
    ):
        for _ in range(5):
            client.sendto(b"request", (family.eth0, port))
            (got,), _, _ = select.select([one, other], [], [], 5)
            data, peer = got.recvfrom(100)
            (other if got is one else one).sendto(data, peer)
        assert watch.count(port) == 5
        assert finding_of(watch, port).cause is Cause.KERNEL_CHOSEN


@both
def test_wrong_reply_through_the_socket_bound_to_the_other_address(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """The server has a socket for each address."""
    with (
        bound(host.node, family.inet, family.eth0, port) as asked,
        bound(host.node, family.inet, family.docker0, port) as other,
        host.container.socket(family.inet) as client,
    ):
        other.sendto(*ask(client, family.eth0, port, asked))
        assert watch.count(port) == 1
        assert finding_of(watch, port).cause is Cause.EXPLICIT


@both
def test_wrong_reply_with_another_address_in_pktinfo_is_explicit(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], [source_control(family, family.second)], 0, peer)
        finding = finding_of(watch, port)
        assert watch.count(port) == 1
        assert (finding.actual, finding.cause) == (family.second, Cause.EXPLICIT)


@both
def test_msg_more_is_one_datagram(watch: Watch, host: ContainerHost, port: int, family: Family) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendto(data, socket.MSG_MORE, peer)
        server.sendto(data, socket.MSG_MORE, peer)
        server.sendto(data, peer)
        assert watch.count(port) == 1
        assert finding_of(watch, port).cause is Cause.KERNEL_CHOSEN


@both
def test_segmentation_offload_is_counted_in_datagrams(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port, (SOL_UDP, UDP_SEGMENT, 1000)) as server,
        host.container.socket(family.inet) as client,
    ):
        _, peer = ask(client, family.eth0, port, server)
        server.sendto(bytes(4500), peer)
        assert watch.count(port) == 5
        assert [event.segments for event in watch.events(port)] == [5]


@both
def test_fragmented_wrong_reply_is_counted_once(watch: Watch, host: ContainerHost, port: int, family: Family) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        client.settimeout(PATIENCE_SECONDS)
        server.settimeout(PATIENCE_SECONDS)
        client.sendto(bytes(6000), (family.eth0, port))  # arrives in fragments, is judged whole
        data, peer = server.recvfrom(65535)
        assert len(data) == 6000
        server.sendto(data, peer)
        assert watch.count(port) == 1


@both
def test_wrong_reply_over_loopback_between_own_addresses(watch: Watch, port: int, family: Family) -> None:
    one, other = ("10.9.0.1", "10.9.1.1") if family is V4 else ("fd00:9::1", "fd00:9:0:1::1")
    length = 24 if family is V4 else 128
    with Lab() as lab:
        alone = lab.namespace("alone")
        # nodad: an IPv6 address is tentative for a moment, also on loopback, and takes no packets as long.
        usable = "" if family is V4 else " nodad"
        alone.ip(*(f"addr add {address}/{length} dev lo{usable}" for address in (one, other)))
        with bound(alone, family.inet, family.wildcard, port) as server:
            for address in (one, other, "127.0.0.1" if family is V4 else "::1"):
                with alone.socket(family.inet) as client:
                    server.sendto(*ask(client, address, port, server))
            assert watch.count(port) == 0
            # The client's own choice of source makes routing answer from there: a connected client refuses that.
            with bound(alone, family.inet, one, 0) as client:
                server.sendto(*ask(client, other, port, server))
            assert watch.count(port) == 1
            assert (finding_of(watch, port).expected, finding_of(watch, port).actual) == (other, one)


def test_wrong_reply_over_loopback_to_a_request_at_127_0_0_53(watch: Watch, host: ContainerHost, port: int) -> None:
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server:
        for address, wrong in (("127.0.0.1", 0), ("127.0.0.53", 1)):
            with host.node.socket() as client:
                server.sendto(*ask(client, address, port, server))
            assert watch.count(port) == wrong


def test_any_address_asked_is_a_right_source(watch: Watch, port: int) -> None:
    """Three requests come within one tick of the clock; routing replies to each from the first address."""
    with Lab() as lab:
        alone = lab.namespace("alone")  # without conntrack: what was asked is remembered here alone
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            for address in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
                server.sendto(*ask(client, address, port, server))
            assert watch.count(port) == 0


@both
def test_wrong_reply_after_the_asked_address_was_removed(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    extra = "172.16.13.77/24" if family is V4 else "fd00:13::77/64"
    address = extra.partition("/")[0]
    host.node.ip(f"addr add {extra} dev eth0{'' if family is V4 else ' nodad'}")
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        data, peer = ask(client, address, port, server)
        host.node.ip(f"addr del {extra} dev eth0")
        server.sendto(data, peer)
        assert watch.count(port) == 1
        assert finding_of(watch, port).expected == address


# ---- right replies ----


@both
def test_reply_of_a_pktinfo_server_is_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with host.node.socket(family.inet) as server, host.container.socket(family.inet) as client:
        servers.enable_pktinfo(server)
        server.bind((family.wildcard, port))
        process = host.node.spawn("pktinfo", lambda: servers.with_pktinfo(server))
        client.settimeout(PATIENCE_SECONDS)
        for address in (family.eth0, family.docker0, family.second, family.vip):
            client.sendto(b"x", (address, port))
            assert client.recvfrom(100)[1][0] == address
        process.stop()
        assert watch.count(port) == 0


@both
def test_reply_of_a_server_bound_to_the_address_is_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.eth0, port) as server,
        host.container.socket(family.inet) as client,
    ):
        server.sendto(*ask(client, family.eth0, port, server))
        assert client.recvfrom(100)[1][0] == family.eth0
        assert watch.count(port) == 0


@both
def test_right_replies_to_one_client_at_two_addresses_are_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """Both requests are out before the replies come, in the other order, each from its own address."""
    with (
        bound(host.node, family.inet, family.eth0, port) as one,
        bound(host.node, family.inet, family.docker0, port) as other,
        host.container.socket(family.inet) as client,
    ):
        for _ in range(3):
            first = ask(client, family.eth0, port, one)
            second = ask(client, family.docker0, port, other)
            other.sendto(*second)
            one.sendto(*first)
        assert watch.count(port) == 0


@both
def test_reply_from_another_port_is_not_a_finding(watch: Watch, host: ContainerHost, port: int, family: Family) -> None:
    """As in TFTP (RFC 1350, section 4): the server continues from a port of its choice."""
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        bound(host.node, family.inet, family.wildcard, 0) as transfer,
        host.container.socket(family.inet) as client,
    ):
        transfer.sendto(*ask(client, family.eth0, port, server))
        assert watch.count(port) == 0
        assert watch.count(transfer.getsockname()[1]) == 0


def test_reply_to_a_multicast_request_is_not_a_finding(watch: Watch, host: ContainerHost, port: int) -> None:
    group = "239.1.2.3"
    with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.outside.socket() as client:
        index = struct.pack("=4s4si", socket.inet_aton(group), bytes(4), _interface(host.node, "eth0"))
        server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, index)
        client.setsockopt(
            socket.IPPROTO_IP,
            socket.IP_MULTICAST_IF,
            struct.pack("=4s4si", bytes(4), bytes(4), _interface(host.outside, "eth0")),
        )
        server.sendto(*ask(client, group, port, server))
        assert client.recvfrom(100)[1][0] == V4.eth0
        assert watch.count(port) == 0


def test_reply_to_an_ipv6_multicast_request_is_not_a_finding(watch: Watch, host: ContainerHost, port: int) -> None:
    group = "ff15::1234"
    with bound(host.node, socket.AF_INET6, "::", port) as server, host.outside.socket(socket.AF_INET6) as client:
        membership = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=i", _interface(host.node, "eth0"))
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, _interface(host.outside, "eth0"))
        server.sendto(*ask(client, group, port, server))
        client.recvfrom(100)
        assert watch.count(port) == 0


def _interface(namespace: Namespace, name: str) -> int:
    with namespace.entered():
        return socket.if_nametoindex(name)


@pytest.mark.parametrize("address", ["172.16.13.255", "255.255.255.255"])
@pytest.mark.parametrize("sender", ["outside", "node"])
def test_reply_to_a_broadcast_request_is_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, address: str, sender: str
) -> None:
    """The sender's own machine gets a copy of its broadcast, too."""
    namespace = host.outside if sender == "outside" else host.node
    with (
        bound(host.node, socket.AF_INET, "0.0.0.0", port) as server,
        namespace.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        server.sendto(*ask(client, address, port, server))
        assert watch.count(port) == 0


@both
def test_hosts_with_the_same_addresses_are_distinguished(watch: Watch, port: int, family: Family) -> None:
    """Two namespaces, one with a wrong server and one with a right one."""
    with ContainerHost() as one, ContainerHost() as other, ExitStack() as sockets:

        def open_pair(lab: ContainerHost, address: str) -> tuple[socket.socket, socket.socket]:
            server = sockets.enter_context(bound(lab.node, family.inet, address, port))
            client = sockets.enter_context(bound(lab.container, family.inet, family.wildcard, 40_000))
            return server, client

        wrong_server, wrong_client = open_pair(one, family.wildcard)
        right_server, right_client = open_pair(other, family.eth0)
        requests = [
            (wrong_server, ask(wrong_client, family.eth0, port, wrong_server)),
            (right_server, ask(right_client, family.eth0, port, right_server)),
        ]
        for server, request in requests:
            server.sendto(*request)
        assert watch.count(port) == 1
        if watch.sensor.features.mode == "packet":
            assert [event.netns_inode for event in watch.events(port)] == [one.node.inode]


# ---- NAT ----


@pytest.fixture
def nat_host() -> Iterator[ContainerHost]:
    """A host whose service address 10.99.0.9 (fd00:99::9) exists only in its NAT rules."""
    with ContainerHost() as lab:
        lab.node.ip(f"addr add {SECOND}/24 dev eth0", f"addr add {SECOND_6}/64 dev eth0 nodad")
        lab.outside.ip("addr add 172.16.13.2/24 dev eth0", "addr add fd00:13::2/64 dev eth0 nodad")
        lab.node.nft(
            f"""
            table inet service {{
              chain prerouting {{
                type nat hook prerouting priority dstnat;
                ip daddr 10.99.0.9 udp dport 53 dnat ip to {V4.eth0}:53;
                ip daddr 10.99.0.9 udp dport 7777 dnat ip to {V4.eth0}:8888;
                ip6 daddr fd00:99::9 udp dport 53 dnat ip6 to [{V6.second}]:53;
                ip6 daddr fd00:99::9 udp dport 7777 dnat ip6 to [{V6.second}]:8888;
                udp dport 6000 redirect to :6001;
              }}
            }}
            """
        )
        yield lab


def served_at(family: Family) -> str:
    """Return the address that the rules lead to: the one that routing picks towards the outside, so that replies are
    right.
    """
    return family.eth0 if family is V4 else family.second


def service(family: Family) -> str:
    return "10.99.0.9" if family is V4 else "fd00:99::9"


@both
@pytest.mark.parametrize(("asked", "served"), [(53, 53), (7777, 8888)])
def test_reply_through_dnat_is_not_a_finding(
    watch: Watch, nat_host: ContainerHost, family: Family, asked: int, served: int
) -> None:
    before = watch.count(served)
    with (
        bound(nat_host.node, family.inet, family.wildcard, served) as server,
        nat_host.outside.socket(family.inet) as client,
    ):
        for _ in range(3):
            server.settimeout(PATIENCE_SECONDS)
            client.settimeout(PATIENCE_SECONDS)
            client.sendto(b"x", (service(family), asked))
            server.sendto(*server.recvfrom(100))
            assert client.recvfrom(100)[1][:2] == (service(family), asked)
    assert watch.count(served) == before


@both
@pytest.mark.parametrize("address", ["eth0", "second"])
def test_reply_through_redirect_is_not_a_finding(
    watch: Watch, nat_host: ContainerHost, family: Family, address: str
) -> None:
    before = watch.count(6001)
    with (
        bound(nat_host.node, family.inet, family.wildcard, 6001) as server,
        nat_host.outside.socket(family.inet) as client,
    ):
        asked = getattr(family, address)
        server.settimeout(PATIENCE_SECONDS)
        client.settimeout(PATIENCE_SECONDS)
        client.sendto(b"x", (asked, 6000))
        server.sendto(*server.recvfrom(100))
        assert client.recvfrom(100)[1][:2] == (asked, 6000)
    assert watch.count(6001) == before


@both
def test_wrong_reply_behind_dnat(watch: Watch, nat_host: ContainerHost, family: Family) -> None:
    """kubernetes/kubernetes#95565: a pod asks a service address that leads back to its own node."""
    before = watch.count(8888)
    with (
        bound(nat_host.node, family.inet, family.wildcard, 8888) as server,
        nat_host.container.socket(family.inet) as client,
    ):
        server.settimeout(PATIENCE_SECONDS)
        client.sendto(b"x", (service(family), 7777))
        server.sendto(*server.recvfrom(100))
        assert watch.count(8888) == before + 1
        findings = [finding for finding in watch.findings(8888) if finding.family == family.number]
        assert {(finding.expected, finding.actual) for finding in findings} == {(served_at(family), family.docker0)}


@both
def test_reply_to_a_masqueraded_client_is_not_a_finding(
    watch: Watch, nat_host: ContainerHost, port: int, family: Family
) -> None:
    other = "172.16.13.2" if family is V4 else "fd00:13::2"
    with (
        bound(nat_host.outside, family.inet, family.wildcard, port) as server,
        nat_host.container.socket(family.inet) as client,
    ):
        picked = picked_source(nat_host.outside, family, family.eth0)
        data, peer = ask(client, picked, port, server)
        assert peer[0] in (family.eth0, family.second), "not masqueraded"
        server.sendto(data, peer)
        assert client.recvfrom(100)[1][0] == picked
        assert watch.count(port) == 0
        wrong = other if picked == family.outside else family.outside
    with (
        bound(nat_host.outside, family.inet, family.wildcard, port) as server,
        nat_host.container.socket(family.inet) as client,
    ):
        server.sendto(*ask(client, wrong, port, server))
        assert watch.count(port) == 1
        assert finding_of(watch, port).expected == wrong


# ---- without conntrack ----


@both
def test_wrong_reply_without_tracking_is_untracked(watch: Watch, port: int, family: Family) -> None:
    """In mode netlink it may have been NAT where the namespace has conntrack: undecided."""
    with ContainerHost() as lab:
        lab.node.nft(
            f"table inet raw {{"
            f" chain in {{ type filter hook prerouting priority raw; udp dport {port} notrack; }};"
            f" chain out {{ type filter hook output priority raw; udp sport {port} notrack; }}; }}"
        )
        with (
            bound(lab.node, family.inet, family.wildcard, port) as server,
            lab.container.socket(family.inet) as client,
        ):
            client.sendto(b"tracked", (family.eth0, 9))
            server.sendto(*ask(client, family.eth0, port, server))
            if watch.sensor.features.mode == "netlink":
                assert watch.count(port) == 0
                return
            assert watch.count(port) == 1
            assert finding_of(watch, port).verdict is Verdict.UNTRACKED
            (event,) = watch.events(port)
            assert event.original is None
            assert event.reply is None


@both
def test_wrong_reply_in_a_namespace_without_conntrack_is_untracked(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """No rule there needs conntrack, so no packet has an entry."""
    server_address = "172.16.13.20" if family is V4 else "fd00:13::20"
    host.outside.ip(
        f"addr add {server_address}/{24 if family is V4 else 64} dev eth0{'' if family is V4 else ' nodad'}"
    )
    with (
        bound(host.outside, family.inet, family.wildcard, port) as server,
        bound(host.node, family.inet, family.eth0, 0) as client,
    ):
        picked = picked_source(host.outside, family, family.eth0)
        wrong = server_address if picked == family.outside else family.outside
        server.sendto(*ask(client, wrong, port, server))
        assert watch.count(port) == 1
        assert finding_of(watch, port).verdict is verdict_of(watch, Verdict.UNTRACKED)
    host.outside.ip(f"addr del {server_address}/{24 if family is V4 else 64} dev eth0")


# ---- time ----


@both
def test_datagram_after_the_window_is_not_a_reply(host: ContainerHost, port: int, family: Family) -> None:
    """A new request makes the next datagrams replies again."""
    with closing(Watch(Limits(window_ns=300_000_000))) as watch:
        with (
            bound(host.node, family.inet, family.wildcard, port) as server,
            host.container.socket(family.inet) as client,
        ):
            data, peer = ask(client, family.eth0, port, server)
            server.sendto(data, peer)
            assert watch.count(port) == 1
            time.sleep(0.5)  # the scene itself: time goes by
            server.sendto(data, peer)
            server.sendto(data, peer)
            assert watch.count(port) == 1
            server.sendto(*ask(client, family.eth0, port, server))
            assert watch.count(port) == 2


@both
def test_reply_to_a_request_from_before_the_start_is_not_a_finding(
    host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        with closing(Watch()) as watch:
            server.sendto(data, peer)  # its request was not seen: nothing is known, nothing is said
            assert watch.count(port) == 0
            server.sendto(*ask(client, family.eth0, port, server))
            assert watch.count(port) == 1


@both
def test_datagram_without_a_request_is_not_a_finding(
    watch: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        bound(host.outside, family.inet, family.wildcard, 0) as client,
    ):
        for _ in range(3):
            server.sendto(b"news", (family.outside, client.getsockname()[1]))
        assert watch.count(port) == 0


def test_failed_send_is_not_counted(watch: Watch, port: int) -> None:
    """It sends no packet."""
    with Lab() as lab:
        lonely = lab.namespace("lonely")
        with bound(lonely, socket.AF_INET, "0.0.0.0", port) as server:
            with pytest.raises(OSError, match="unreachable") as caught:
                server.sendto(b"x", ("192.0.2.9", 9))
            assert caught.value.errno == errno.ENETUNREACH
            assert watch.count(port) == 0
