"""`udpwatch explain PORT` without a finding: what loses requests and replies on the way; provoked for real."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from looks import PAUSE_SECONDS, SECOND, SERVER, SERVER_6, asking, explain, serve, server_and_client
from sensors import IN_MATRIX

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    return server_and_client(lab)


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


# 3: the socket drops them ---------------------------------------------------------------------------------------------


def test_filter_of_the_socket_drops_requests(pair: tuple[Namespace, Namespace], port: int) -> None:
    """The kernel counts what a filter drops among the drops of the socket; its receive buffer was not full."""

    def drop_all(made: socket.socket) -> None:
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # ret #0
        made.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(code)))  # SO_ATTACH_FILTER

    server, client = pair
    serve(server, port, prepare=drop_all)
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert "socket-filter" in told.kinds and not told.kinds & {"receive-buffer", "lost"}, told.report["statements"]
    text = told.get("socket-filter")["text"]
    assert "test-server's socket does not take its requests" in text
    assert "while no receive buffer was full (RcvbufErrors)" in text


def test_drops_are_those_of_the_look(pair: tuple[Namespace, Namespace], port: int) -> None:
    """A known rate: what was dropped while lists and rules were read is not part of "in 1 s"."""
    server, client = pair
    process = serve(server, port, prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304))
    os.kill(process.pid, signal.SIGSTOP)
    with asking(client, SERVER, port, pause=0.01):
        told = explain(server, port)
    found = re.search(r"was full: (\d+) datagrams? dropped in 1 s", told.get("receive-buffer")["text"])
    assert found
    assert 30 <= int(found[1]) <= 115, "at most 100 datagrams a second"


def test_thousands_of_sockets_and_clients(pair: tuple[Namespace, Namespace], port: int) -> None:
    """3,000 connected sockets, asked by 3,000 other clients."""
    server, client = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_192), hard))
    try:
        with contextlib.ExitStack() as opened:
            for number in range(3_000):
                made = opened.enter_context(server.socket())
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind((SERVER, port))
                made.connect((SECOND, 10_000 + number))

            def ask_from_all() -> None:
                with contextlib.ExitStack() as held:
                    clients = [
                        held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3_000)
                    ]
                    while True:
                        for each in clients:
                            with contextlib.suppress(OSError):
                                each.sendto(b"question", (SERVER, port))
                            time.sleep(0.0002)

            process = client.spawn("clients", ask_from_all)
            begin = resource.getrusage(resource.RUSAGE_CHILDREN)
            told = explain(server, port)
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            process.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert told.kinds == {"other-peer"}
    assert len(told.report["statements"]) < 5
    assert spent.ru_utime + spent.ru_stime - begin.ru_utime - begin.ru_stime < 8, "seconds of CPU time"


# 5: conntrack, and the way out ---------------------------------------------------------------------------------------


def test_full_table_of_conntrack(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    server.nft("table inet t { chain c { type filter hook input priority 0; ct state new counter; }; }")
    with server.entered():
        limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    if limit > 300_000:
        pytest.skip(f"filling conntrack's table of {limit} entries takes too long; 262,144 is the kernel's default")
    # A busy machine may take longer to fill the table than an entry lives.
    with server.entered():
        Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout").write_text("600")
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
    assert "fully-random" in told.get("conntrack-insert-failed")["fix"]


def test_two_questions_at_once_from_one_socket_are_not_lost(lab: Lab, port: int) -> None:
    """Both make a new flow, and destination NAT sends them to different servers. Old kernels dropped one of them; since
    then, the kernel resolves the clash, and explain must not say that such questions are lost.
    """
    router, server, client = lab.namespace("router"), lab.namespace("server"), lab.namespace("client")
    lab.link(router, "out", server, "eth0")
    lab.link(router, "in", client, "eth0")
    router.ip("addr add 10.2.0.1/24 dev out", "addr add 10.1.0.1/24 dev in")
    server.ip("addr add 10.2.0.2/24 dev eth0", "addr add 10.2.0.3/24 dev eth0", "route add default via 10.2.0.1")
    client.ip("addr add 10.1.0.2/24 dev eth0", "route add default via 10.1.0.1")
    router.sysctl("net/ipv4/ip_forward", "1")
    to = "dnat to numgen inc mod 2 map { 0 : 10.2.0.2, 1 : 10.2.0.3 }"
    slow = "".join(f"ip saddr 192.0.2.1 udp sport {number} drop; " for number in range(1, 2000))
    router.nft(
        f"table ip n {{ chain p {{ type nat hook prerouting priority dstnat; ip daddr 10.9.9.9 {to}; }}; }}\n"
        f"table ip s {{ chain p {{ type filter hook postrouting priority 200; {slow} }}; }}"
    )
    for address in ("10.2.0.2", "10.2.0.3"):
        serve(server, port, address)
    turns = mmap.mmap(-1, 16)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs: two questions at the same moment")
    with contextlib.ExitStack() as opened:
        asking = [opened.enter_context(client.socket()) for _ in range(500)]
        for number in range(2):

            def ask(number: int = number) -> None:
                os.sched_setaffinity(0, {cpus[number]})
                for turn, asker in enumerate(asking, start=1):
                    struct.pack_into("=Q", turns, 8 * number, turn)
                    while struct.unpack_from("=Q", turns, 8 * (1 - number))[0] < turn:
                        pass
                    asker.sendto(b"question", ("10.9.9.9", port))
                    time.sleep(0.002)

            client.spawn(f"client{number}", ask)
        told = explain(router, port, seconds=2)
    with router.entered():
        columns = [line.split() for line in Path("/proc/net/stat/nf_conntrack").read_text().splitlines()]
    clashes = sum(int(line[columns[0].index("clashres")], 16) for line in columns[1:])
    assert clashes, "no two questions met"
    assert told.kinds == set(), told.report


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
                time.sleep(PAUSE_SECONDS)

    sender = client.spawn("raw", run)
    told = explain(server, port)
    sender.stop()
    assert told.kinds == {"checksum"}
    assert "(InCsumErrors)" in told.get("checksum")["text"]


@pytest.mark.parametrize("address", [SERVER, SERVER_6])
def test_servers_in_a_vrf(lab: Lab, port: int, address: str) -> None:
    """A socket that is bound to a VRF or to its device gets the requests, another one only if it is told to."""
    server, client = server_and_client(lab)
    wildcard = "::" if ":" in address else "0.0.0.0"
    try:
        server.ip("link add red type vrf table 10", "link set red up")
    except UdpwatchError as error:
        pytest.skip(f"this kernel has no VRF: {error}")
    server.ip("link set eth0 master red", f"addr replace {SERVER_6}/64 dev eth0 nodad")
    server.ip(f"addr replace {SERVER}/24 dev eth0")

    def bind_to(device: str) -> Callable[[socket.socket], None]:
        return lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())

    for number, device in enumerate(("red", "eth0")):
        serve(server, port + number, wildcard, prepare=bind_to(device))
        with asking(client, address, port + number):
            told = explain(server, port + number)
        assert told.kinds == set(), told.report
        assert told.get("replies")["text"].endswith(f"at {address}.")
    serve(server, port + 2, wildcard)
    with asking(client, address, port + 2):
        told = explain(server, port + 2)
        assert told.kinds == {"other-device"}, told.report
        assert "while they came through eth0 in the VRF red" in told.get("other-device")["text"]
        setting, _, value = told.get("other-device")["fix"].rpartition(" ")[2].partition("=")
        server.sysctl(setting.replace(".", "/"), value)
        told = explain(server, port + 2)
    assert not told.kinds & {"other-device", "not-local", "lost"}, told.report


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


def test_memory_of_all_udp_sockets_is_used_up(pair: tuple[Namespace, Namespace], port: int) -> None:
    if not IN_MATRIX:
        pytest.skip("needs a machine whose net.ipv4.udp_mem may be tiny for all: `make test-kernels` has such guests")
    server, client = pair
    # A socket may always hold net.ipv4.udp_rmem_min bytes, and a CPU 1 MB before the kernel looks at the limit.
    large = 33, 8 << 20  # SO_RCVBUFFORCE
    process = serve(server, port, prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, *large))
    os.kill(process.pid, signal.SIGSTOP)
    setting = Path("/proc/sys/net/ipv4/udp_mem")
    before = setting.read_text()
    try:
        setting.write_text("0 0 0")
        with asking(client, SERVER, port, packet=bytes(1400), pause=0.001):
            told = explain(server, port)
    finally:
        setting.write_text(before)
    assert "no-memory" in told.kinds
