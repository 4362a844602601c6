"""`udpwatch explain PORT` without a finding: each statement, provoked for real in namespaces, without an agent."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from agents import COMMAND, Agent, as_nobody, run_cli
from sensors import IN_MATRIX
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace, Process

SERVER, SECOND, SERVER_6 = "10.0.0.1", "10.0.0.3", "fd00::1"
CLIENT, CLIENT_6 = "10.0.0.2", "fd00::2"
SECONDS = 1
_PAUSE = 0.02


@dataclass(frozen=True)
class Told:
    """What the command printed."""

    status: int
    report: dict[str, Any]

    @property
    def kinds(self) -> set[str]:
        """The kinds of what is wrong."""
        return {each["kind"] for each in self.report["statements"] if each["wrong"]}

    def get(self, kind: str) -> dict[str, Any]:
        """Return the only statement of a kind."""
        (found,) = (each for each in self.report["statements"] if each["kind"] == kind)
        return dict(found)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    """Return a server's and a client's namespace."""
    return lab.pair("server", [SERVER, SECOND, SERVER_6], "client", [CLIENT, CLIENT_6])


def explain(where: Namespace, port: int, *words: str, seconds: float = SECONDS) -> Told:
    """Run the command in a namespace; what it says must agree with its exit status."""
    done = run_cli(
        *("explain", str(port), "--json", f"--seconds={seconds}", "--connect=/none", *words),
        preexec_fn=where.enter_in_child,
    )
    assert done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == int(report["wrong"])
    return Told(done.returncode, report)


def serve(
    where: Namespace,
    port: int,
    address: str = "0.0.0.0",
    answer: bool = True,
    prepare: Callable[[socket.socket], None] = lambda _: None,
) -> Process:
    """Run a server, which answers or only reads; returns when its socket is bound."""
    ready, told = os.pipe()

    def run() -> None:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        prepare(made)
        made.bind((address, port))
        os.write(told, b"1")
        while True:
            data, peer = made.recvfrom(2048)
            if answer:
                with suppress(OSError):  # a firewall drops it
                    made.sendto(data, peer)

    process = where.spawn("test-server", run)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return process


@contextmanager
def asking(
    where: Namespace, address: str, port: int, source: str = "", pause: float = _PAUSE, packet: bytes = b"question"
) -> Iterator[None]:
    """Ask every few milliseconds, from one socket."""

    def run() -> None:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as made:
            if source:
                made.bind((source, 0))
            made.setblocking(False)
            while True:
                with suppress(OSError):  # the error of an earlier datagram
                    made.sendto(packet, (address, port))
                time.sleep(pause)

    client = where.spawn("test-client", run)
    try:
        yield
    finally:
        client.stop()


@contextmanager
def dropping_everything(where: Namespace, device: str) -> Iterator[None]:
    """Attach an XDP program to a device. It ends with its link's descriptor."""
    drop = bytes.fromhex("b700000001000000" + "9500000000000000")  # r0 = XDP_DROP; exit
    type_xdp, attach_xdp, generic = 6, 37, 2  # BPF_PROG_TYPE_XDP, BPF_XDP, XDP_FLAGS_SKB_MODE
    program = bpf.program_load(type_xdp, attach_xdp, drop)  # type: ignore[arg-type]
    try:
        with where.entered():
            target = struct.pack("=IIII", program, socket.if_nametoindex(device), attach_xdp, generic)
            link = bpf.bpf(bpf.Command.LINK_CREATE, ctypes.create_string_buffer(target, 128))
    finally:
        os.close(program)
    try:
        yield
    finally:
        os.close(link)


# 1: nothing listens --------------------------------------------------------------------------------------------------


def test_port_without_a_socket_is_asked_in_vain(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"not-listening"}
    text = told.get("not-listening")["text"]
    assert f"No socket listens on port {port}/udp here." in text
    assert f"requests arrived for {SERVER} in 1 s and found none; the kernel counted" in text
    assert "ICMP port unreachable" in text


def test_port_without_a_socket_and_without_requests(pair: tuple[Namespace, Namespace], port: int) -> None:
    told = explain(pair[0], port)
    assert told.kinds == {"not-listening"}
    assert "found none" not in told.get("not-listening")["text"]


def test_socket_of_tcp_alone_is_named(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    with server.socket(kind=socket.SOCK_STREAM) as listener:
        listener.bind(("0.0.0.0", port))
        listener.listen()
        told = explain(server, port)
    assert told.kinds == {"only-tcp"}


# 2: it listens elsewhere ---------------------------------------------------------------------------------------------


def test_server_on_loopback_is_not_reached(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "127.0.0.1")
    told = explain(server, port)
    assert told.kinds == {"other-address"}
    assert f"let it listen on {SERVER}, {SECOND} and {SERVER_6}" in told.get("other-address")["text"]
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-address"}
    text = told.get("other-address")["text"]
    assert f"arrived for {SERVER} in 1 s, and the server listens only on 127.0.0.1:{port}; the kernel counted" in text


def test_server_on_loopback_that_is_asked_there_is_right(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    serve(server, port, "127.0.0.1")
    with asking(server, "127.0.0.1", port):
        assert explain(server, port).kinds == set()


def test_server_on_another_address(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, SERVER)
    with asking(client, SECOND, port), asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-address"}
    assert f"Let it listen on {SECOND}" in told.get("other-address")["text"]
    assert "replies" in {each["kind"] for each in told.report["statements"]}
    # Without a request, the address that the user names tells.
    assert explain(server, port, f"--address={SECOND}").kinds == {"other-address"}
    assert explain(server, port, f"--address={SERVER}").kinds == set()
    missing = explain(server, port, "--address=192.0.2.1")
    assert missing.kinds == {"not-local"}
    assert "192.0.2.1 is not an address of this machine" in missing.get("not-local")["text"]


def test_server_of_ipv4_asked_over_ipv6(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    with asking(client, SERVER_6, port):
        told = explain(server, port)
    assert told.kinds == {"other-family"}
    assert f"Let it listen on :: or {SERVER_6}, too." in told.get("other-family")["text"]


def test_server_of_ipv6_only_asked_over_ipv4(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "::", prepare=lambda made: made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1))
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-family"}
    assert "IPV6_V6ONLY limits to IPv6" in told.get("other-family")["text"]
    with asking(client, SERVER_6, port):
        assert explain(server, port).kinds == set()


def test_server_of_both_families(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "::", prepare=lambda made: made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0))
    with asking(client, SERVER, port), asking(client, SERVER_6, port):
        told = explain(server, port)
    assert told.kinds == set()
    assert (
        f"at {SERVER} and {SERVER_6}" in told.get("replies")["text"]
        or f"at {SERVER_6} and {SERVER}" in told.get("replies")["text"]
    )


def test_server_bound_to_another_device(pair: tuple[Namespace, Namespace], lab: Lab, port: int) -> None:
    server, client = pair
    other = lab.namespace("other")
    lab.link(server, "eth1", other, "eth0")
    serve(server, port, prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1"))
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-device"}
    text = told.get("other-device")["text"]
    assert f"0.0.0.0:{port} on device eth1" in text
    assert "they came through eth0" in text


def test_server_connected_to_one_peer(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with server.socket() as made:
        made.bind((SERVER, port))
        made.connect((CLIENT, 9))
        with asking(client, SERVER, port):
            told = explain(server, port)
    assert told.kinds == {"other-peer"}
    assert f"connected to {CLIENT}:9" in told.get("other-peer")["text"]


def test_server_in_another_namespace_is_named(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    told = explain(client, port)
    assert told.kinds == set()
    text = told.get("other-namespace")["text"]
    assert f"It listens elsewhere: test-server (pid {process.pid}) in the network namespace of test-server" in text
    with asking(client, "127.0.0.1", port):
        told = explain(client, port)
    assert told.kinds == {"other-namespace"}


# 3, 4: the receive buffer --------------------------------------------------------------------------------------------


def test_drops_in_a_tiny_receive_buffer_are_counted(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(
        server,
        port,
        answer=False,
        prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1),
    )
    os.kill(process.pid, signal.SIGSTOP)
    with asking(client, SERVER, port, pause=0.001, packet=bytes(1000)):
        told = explain(server, port)
    statement = told.get("receive-buffer")
    assert statement["wrong"]
    assert "The receive buffer of 2,304 bytes of test-server was full" in statement["text"]
    assert "The server sets the size itself (SO_RCVBUF)" in statement["text"]
    assert statement["fix"] is None


def test_drops_in_a_default_receive_buffer_name_the_sysctl(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    os.kill(process.pid, signal.SIGSTOP)
    with client.socket() as sender:
        for _ in range(1000):
            sender.sendto(bytes(1000), (SERVER, port))
    told = explain(server, port)
    statement = told.get("receive-buffer")
    assert not statement["wrong"]  # they are from before
    assert "dropped since the socket was opened, none in this look" in statement["text"]
    assert statement["fix"].startswith("sysctl -w net.core.rmem_default=")
    assert told.kinds == {"not-read"}


def test_stopped_server_does_not_read(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    os.kill(process.pid, signal.SIGSTOP)
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"not-read"}
    statement = told.get("not-read")
    assert "test-server does not read its requests:" in statement["text"]
    assert "The process is stopped (state T)." in statement["text"]
    assert statement["fix"] == f"kill -CONT {process.pid}"


def test_server_that_sleeps_does_not_read(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with server.socket() as made:
        made.bind((SERVER, port))
        with asking(client, SERVER, port):
            told = explain(server, port)
    assert told.kinds == {"not-read"}
    assert "(state S)" in told.get("not-read")["text"]


def test_server_that_reads_and_does_not_reply(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, answer=False)
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"no-reply"}
    text = told.get("no-reply")["text"]
    assert "arrived in 1 s and no reply left; the server reads them" in text


# 5: conntrack, and the way out ---------------------------------------------------------------------------------------


def test_full_table_of_conntrack(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft("table inet t { chain c { type filter hook input priority 0; ct state new counter; }; }")
    limit = int(server.run(["sysctl", "-n", "net.netfilter.nf_conntrack_max"]))
    if limit > 300_000:
        pytest.skip(f"filling conntrack's table of {limit} entries takes too long; 262,144 is the kernel's default")
    first = 0
    while first < 1.1 * limit:
        with client.socket() as sender:
            for number in range(1024, 65536):
                sender.sendto(b"", (SERVER, number))
                first += 1

    def begin_flows() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in cycle(range(1024, 65536)):
                sender.sendto(b"", (SECOND, number))
                time.sleep(0.001)

    flows = client.spawn("flows", begin_flows)
    with asking(client, SERVER, port):
        told = explain(server, port)
    flows.stop()
    statement = told.get("conntrack-full")
    assert statement["wrong"]
    assert f"of {limit:,} entries)" in statement["text"]
    assert f"nf_conntrack_max={2 * limit}" in statement["fix"]


def test_insertions_into_conntrack_fail(lab: Lab, port: int) -> None:
    """Two clients behind source NAT ask from the same port at once. Rules between NAT and conntrack's confirmation make
    the race long.
    """
    router, server = lab.namespace("router"), lab.namespace("server")
    lab.link(router, "out", server, "eth0")
    router.ip("addr add 10.2.0.1/24 dev out")
    server.ip("addr add 10.2.0.2/24 dev eth0")
    router.sysctl("net/ipv4/ip_forward", "1")
    slow = "".join(f"ip saddr 192.0.2.1 udp sport {number} drop; " for number in range(1, 2000))
    router.nft(
        "table ip n { chain p { type nat hook postrouting priority srcnat; oifname out masquerade; }; }\n"
        f"table ip s {{ chain p {{ type filter hook postrouting priority 200; {slow} }}; }}"
    )
    serve(server, port)
    turns = mmap.mmap(-1, 16)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs: two clients that send at the same moment")
    for number in range(2):
        client = lab.namespace(f"client{number}")
        lab.link(router, f"in{number}", client, "eth0")
        router.ip(f"addr add 10.1.{number}.1/24 dev in{number}")
        client.ip(f"addr add 10.1.{number}.2/24 dev eth0", f"route add default via 10.1.{number}.1")

        def ask(number: int = number) -> None:
            os.sched_setaffinity(0, {cpus[number]})
            for source in range(20_000, 65_000):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
                    asker.bind(("", source))
                    struct.pack_into("=Q", turns, 8 * number, source)
                    while struct.unpack_from("=Q", turns, 8 * (1 - number))[0] < source:
                        pass
                    asker.sendto(b"question", ("10.2.0.2", port))
                time.sleep(0.005)

        client.spawn(f"client{number}", ask)
    told = explain(router, port)
    assert told.kinds == {"conntrack-insert-failed"}
    text = told.get("conntrack-insert-failed")["text"]
    assert "because another new flow had taken the same addresses and ports (insert_failed)" in text
    assert "for other machines arrived in 1 s (10.2.0.2)" in told.get("other-namespace")["text"]
    assert "single-request-reopen" in told.get("conntrack-insert-failed")["fix"]


def test_replies_dropped_on_the_way_out(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft(
        f"table inet t {{ chain out {{ type filter hook output priority 0; udp sport {port} counter drop; }}; }}"
    )
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    text = told.get("firewall")["text"]
    assert f"A firewall rule drops replies from this port (inet t out: udp sport {port} counter drop):" in text


def test_replies_dropped_without_a_counter(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft(f"table inet t {{ chain out {{ type filter hook output priority 0; udp sport {port} drop; }}; }}")
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    assert "It has no counter, but no reply left" in told.get("firewall")["text"]


def test_full_queue_of_a_device(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    done = subprocess.run(
        ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "8kbit", "burst", "100", "limit", "100"],
        preexec_fn=server.enter_in_child,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"needs the queueing discipline tbf (CONFIG_NET_SCH_TBF): {done.stderr}")
    with asking(client, SERVER, port, packet=bytes(500)):
        told = explain(server, port)
    assert told.kinds == {"send-queue"}
    assert "(SndbufErrors)" in told.get("send-queue")["text"]


# 6: it does not arrive -----------------------------------------------------------------------------------------------


def test_nothing_arrives(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    serve(server, port)
    told = explain(server, port)
    assert told.kinds == set()
    text = told.get("nothing-arrives")["text"]
    assert "No request for this port arrived at a device of this machine in 1 s." in text
    assert f"({SERVER}, {SECOND} and {SERVER_6})" in text


def test_program_at_the_device_is_named(pair: tuple[Namespace, Namespace], port: int) -> None:
    """An XDP program drops everything, before the device's packets can be counted."""
    server, client = pair
    serve(server, port)
    with asking(client, SERVER, port):  # so that the link addresses are known
        assert explain(server, port).kinds == set()
    with dropping_everything(server, "eth0"), asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == set()
    assert "An XDP program on eth0 sees each packet first" in told.get("nothing-arrives")["text"]


@pytest.mark.parametrize("verdict", ["drop", "reject"])
def test_rule_of_nftables_with_a_counter(pair: tuple[Namespace, Namespace], port: int, verdict: str) -> None:
    server, client = pair
    serve(server, port)
    server.nft(
        f"table inet t {{ chain i {{ type filter hook input priority 0; udp dport {port} counter {verdict}; }}; }}"
    )
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    statement = told.get("firewall")
    assert f"A firewall rule {verdict}s requests for this port" in statement["text"]
    assert f"(inet t i: udp dport {port} counter {verdict}): " in statement["text"]
    server.run(statement["fix"].split())
    with asking(client, SERVER, port):
        assert explain(server, port).kinds == set()


def test_rule_of_nftables_without_a_counter(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft(
        f"table inet t {{ chain i {{ type filter hook input priority 0; udp dport {port - 1}-{port} drop; }}; }}"
    )
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    assert "It has no counter, but at least" in told.get("firewall")["text"]


def test_policy_of_nftables(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft("table inet t { chain i { type filter hook input priority 0; policy drop; udp dport 1 accept; }; }")
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    statement = told.get("firewall")
    assert "The firewall drops what no rule accepts (inet t i: policy drop)" in statement["text"]
    server.run(statement["fix"].split())
    with asking(client, SERVER, port):
        assert explain(server, port).kinds == set()


@pytest.mark.parametrize("rule", ["-p udp -m multiport --dports 1,{port} -j DROP", "-s 10.0.0.0/24 -j DROP", ""])
def test_rules_and_policy_of_iptables(pair: tuple[Namespace, Namespace], port: int, rule: str) -> None:
    server, client = pair
    serve(server, port)
    words = rule.format(port=port).split()
    server.run(["iptables", "-A", "INPUT", *words] if words else ["iptables", "-P", "INPUT", "DROP"])
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"firewall"}
    statement = told.get("firewall")
    assert "ip filter INPUT: " in statement["text"]
    assert " in all." in statement["text"]
    server.run(statement["fix"].split())
    with asking(client, SERVER, port):
        assert explain(server, port).kinds == set()


def test_rules_for_other_ports_are_not_blamed(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft(
        f"table inet t {{ chain i {{ type filter hook input priority 0; tcp dport {port} drop; "
        f"udp dport {port + 1} counter drop; meta l4proto icmp drop; ip saddr 192.0.2.1 counter drop; }}; }}"
    )
    with asking(client, SERVER, port), asking(client, SERVER, port + 1):
        told = explain(server, port)
    assert told.kinds == set()
    assert {each["kind"] for each in told.report["statements"]} == {"listens", "replies"}


def test_reverse_path_filter(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.sysctl("net/ipv4/conf/eth0/rp_filter", "1")
    client.ip("addr add 192.0.2.7/32 dev lo")
    with client.socket() as known:  # so that the server's link address is resolved: ARP is filtered, too
        known.sendto(b"question", (SERVER, port))
        assert known.recv(100)
    with asking(client, SERVER, port, source="192.0.2.7"):
        told = explain(server, port)
    assert told.kinds == {"reverse-path"}
    assert "(IPReversePathFilter)" in told.get("reverse-path")["text"]


def test_wrong_checksum(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    header = struct.pack("!HHHH", 4444, port, 12, 0x1234)
    stop = time.monotonic() + 60

    def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            while time.monotonic() < stop:
                raw.sendto(header + b"test", (SERVER, 0))
                time.sleep(_PAUSE)

    sender = client.spawn("raw", run)
    told = explain(server, port)
    sender.stop()
    assert told.kinds == {"checksum"}
    assert "(InCsumErrors)" in told.get("checksum")["text"]


def test_requests_for_an_address_that_is_not_here(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    client.ip(f"route add 192.0.2.9/32 via {SERVER}")
    with asking(client, "192.0.2.9", port):
        told = explain(server, port)
    assert told.kinds == {"not-local"}
    statement = told.get("not-local")
    assert "came for 192.0.2.9, which is no address here; the kernel dropped" in statement["text"]
    assert statement["fix"] == "ip address add 192.0.2.9 dev DEVICE"


@pytest.mark.parametrize("how", ["nft", "iptables"])
def test_port_that_a_rule_sends_to_a_container(port: int, how: str) -> None:
    with ContainerHost() as host:
        inside = port + 1000
        serve(host.container, inside)
        to = f"{host.CONTAINER}:{inside}"
        if how == "nft":
            rule = f"udp dport {port} counter dnat to {to}"
            host.node.nft(f"table ip d {{ chain pre {{ type nat hook prerouting priority dstnat; {rule}; }}; }}")
        else:
            words = f"-t nat -A PREROUTING -p udp --dport {port} -j DNAT --to-destination {to}"
            host.node.run(["iptables", *words.split()])
        with asking(host.outside, host.ETH0, port):
            told = explain(host.node, port)
            there = explain(host.node, inside)
        assert told.kinds == set()
        statement = told.get("redirected")
        assert f"A rule sends requests for this port to {to}" in statement["text"]
        assert statement["fix"] == f"udpwatch explain {inside}"
        assert there.kinds == set()
        assert f"at {host.CONTAINER}." in there.get("replies")["text"]


def test_published_port_of_docker_with_its_proxy(port: int) -> None:
    """docker-proxy holds the port on the host, and a rule takes the requests from it: nothing is lost."""
    with ContainerHost() as host:
        serve(host.node, port, answer=False)
        serve(host.container, port + 1000)
        words = f"-t nat -A PREROUTING -p udp --dport {port} -j DNAT --to-destination {host.CONTAINER}:{port + 1000}"
        host.node.run(["iptables", *words.split()])
        with asking(host.outside, host.ETH0, port):
            told = explain(host.node, port)
    assert told.kinds == set()
    assert {"listens", "redirected", "replies"} <= {each["kind"] for each in told.report["statements"]}


def test_requests_lost_where_no_counter_shows(pair: tuple[Namespace, Namespace], port: int) -> None:
    """A set of ports in a rule: udpwatch does not read it."""
    server, client = pair
    serve(server, port)
    server.nft(
        f"table inet t {{ set ports {{ type inet_service; elements = {{ {port} }}; }}; "
        f"chain i {{ type filter hook input priority 0; udp dport @ports drop; }}; }}"
    )
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"lost"}
    suspect = told.get("firewall")
    assert "udp dport @ports drop). It has no counter to tell which." in suspect["text"]
    assert suspect["fix"] is None


# 7: it works ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [SERVER, SERVER_6])
def test_server_that_replies_rightly(pair: tuple[Namespace, Namespace], port: int, address: str) -> None:
    server, client = pair
    serve(server, port, address)
    with asking(client, address, port):
        told = explain(server, port)
    assert told.kinds == set()
    assert f"in 1 s, at {address}." in told.get("replies")["text"]


def test_numbers_are_exact(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    command = subprocess.Popen(
        [*COMMAND, "explain", str(port), "--seconds=4", "--connect=/none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=server.enter_in_child,
    )

    def is_watched() -> bool:
        return str(port) in server.run(["ss", "-l", "-n", "-p", "--packet"]) or "p_dgr" in server.run(
            ["ss", "-0", "-n"]
        )

    wait_for(is_watched, "the packet socket")
    with client.socket() as asker:
        for _ in range(123):
            asker.sendto(b"question", (SERVER, port))
            asker.recv(100)
    text = " ".join(command.communicate()[0].split())
    assert command.returncode == 0
    assert "123 requests of 1 client socket, 123 replies in 4 s" in text


def test_wrong_source_without_an_agent(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    with asking(client, SECOND, port):
        told = explain(server, port)
    assert told.kinds == {"wrong-source"}
    statement = told.get("wrong-source")
    assert f"(asked at {SECOND}, replied from {SERVER})" in statement["text"]
    assert "sendmsg() with a control message" in statement["remedy"]["do"]  # of a Python program


# what it may see -----------------------------------------------------------------------------------------------------


def test_kernels_own_socket(pair: tuple[Namespace, Namespace]) -> None:
    """Packets of a tunnel count as requests; the kernel takes them without counting them as read."""
    port = 4789
    try:
        for host, own, other in ((pair[0], SERVER, CLIENT), (pair[1], CLIENT, SERVER)):
            host.ip(f"link add vx type vxlan id 7 local {own} remote {other} dstport {port}", "link set vx up")
            host.ip(f"addr add 10.7.0.{own[-1]}/24 dev vx")
    except UdpwatchError as error:
        pytest.skip(f"needs VXLAN devices (CONFIG_VXLAN): {error}")
    with asking(pair[1], "10.7.0.1", 5):
        told = explain(pair[0], port)
    assert told.kinds == set()
    (text, _) = (each["text"] for each in told.report["statements"] if each["kind"] == "listens")
    assert text.startswith("The kernel itself (a tunnel such as VXLAN), or a process of uid 0 that this user may not")


def test_without_privileges_it_names_what_it_could_not_look_at(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", port))
        done = run_cli("explain", str(port), "--json", "--seconds=1", "--connect=/none", wrapper=as_nobody())
    assert done.stderr == ""
    report = json.loads(done.stdout)
    listens = next(each["text"] for each in report["statements"] if each["kind"] == "listens")
    assert f"a process of uid {os.getuid()} that this user may not examine, listens on 127.0.0.1:{port}." in listens
    unseen = " ".join(report["unseen"])
    assert "datagrams were not counted at the devices of this network namespace (needs CAP_NET_RAW" in unseen
    assert re.search(r"the network namespaces of \d+ processes that this user may not open", unseen)
    assert "nft: " in unseen


def test_agents_counts_are_added(agent: Agent, host: ContainerHost, port: int) -> None:
    serve(host.node, port)

    def counted() -> bool:
        return any(each["port"] == port and each["requests"] for each in agent.snapshot()["servers"])

    with asking(host.outside, host.ETH0, port):
        wait_for(counted, "the agent's count")
        done = run_cli(
            *("explain", str(port), "--seconds=1", f"--connect={agent.socket}"), preexec_fn=host.node.enter_in_child
        )
    assert done.returncode == 0
    assert f"no wrong reply of '{port}' so far; looking at port {port}/udp for 1 s" in done.stderr
    text = " ".join(done.stdout.split())
    assert re.search(r"It replies from the address that was asked: .* The agent has counted [\d,]+ requests", text)


def test_finding_of_the_agent_comes_first(agent: Agent, host: ContainerHost, port: int) -> None:
    """Without a look, as before: the finding says more."""
    wrong_replies(host, port)
    agent.counted(port, 1)
    done = run_cli("explain", str(port), f"--connect={agent.socket}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "was asked at" in done.stdout


def test_memory_of_all_udp_sockets_is_used_up(pair: tuple[Namespace, Namespace], port: int) -> None:
    if not IN_MATRIX:
        pytest.skip("needs a machine whose net.ipv4.udp_mem may be tiny for all: `make test-kernels` has such guests")
    server, client = pair
    serve(server, port)
    setting = Path("/proc/sys/net/ipv4/udp_mem")
    before = setting.read_text()
    try:
        setting.write_text("0 0 0")
        with asking(client, SERVER, port, packet=bytes(1400), pause=0.001):
            told = explain(server, port)
    finally:
        setting.write_text(before)
    assert "no-memory" in told.kinds
