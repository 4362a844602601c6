"""The list of UDP sockets: by the agent in all namespaces, by a command, and by sock_diag."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel import sock_diag
from udpwatch.agent.kernel.loader import Limits, load_inventory
from udpwatch.agent.kernel.records import decode_socket
from udpwatch.agent.model import UdpSocket
from udpwatch.agent.servers import inventory
from udpwatch.agent.servers.inventory import Inventory, list_all
from udpwatch.agent.testing.lab import Lab, Namespace, die_with_parent

SUPPORT = Path(__file__).resolve().parents[1] / "support"

FOREVER_NS = 1 << 62
IP_TRANSPARENT, IPV6_RECVPKTINFO, IP_PKTINFO = 19, 49, 8
MANY_SOCKETS, MANY_NAMESPACES = 5_000, 300


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as built:
        yield built


@pytest.fixture(scope="module")
def node(lab: Lab) -> Namespace:
    return lab.namespace("node")


@pytest.fixture(scope="module")
def older(node: Namespace) -> Iterator[socket.socket]:
    """A socket that is bound before the agent starts."""
    with node.socket() as link:
        link.bind(("0.0.0.0", 4900))
        yield link


@pytest.fixture(scope="module")
def watch(older: socket.socket) -> Iterator[Watch]:
    with contextlib.closing(Watch(Limits(max_peers=4_096))) as found:
        yield found


def listed(watch: Watch, port: int) -> UdpSocket:
    """Return the socket of a port, as the agent lists it."""
    assert watch.sensor._inventory
    (found,) = (each for each in watch.sensor._inventory.read() if each.port == port)
    return found


def by_command(port: int) -> UdpSocket:
    (found,) = (each for each in list_all().sockets if each.port == port)
    return found


def by_netlink(node: Namespace, port: int) -> UdpSocket:
    with node.entered():
        inode = Path("/proc/thread-self/ns/net").stat().st_ino
        (found,) = (each for each in sock_diag.list_sockets(inode) if each.port == port)
    return found


def everywhere(watch: Watch, node: Namespace, port: int) -> list[UdpSocket]:
    return [listed(watch, port), by_command(port), by_netlink(node, port)]


def test_socket_is_described_alike_by_all(watch: Watch, node: Namespace) -> None:
    with node.entered():
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    with node.socket() as link:
        link.bind(("127.0.0.1", 4901))
        for found in everywhere(watch, node, 4901):
            assert (found.address, found.family, found.netns) == ("127.0.0.1", 4, namespace)
            assert (found.inode, found.uid, found.peer) == (os.fstat(link.fileno()).st_ino, os.getuid(), "")
            assert (found.queue, found.queue_limit) == (0, link.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
            assert (found.device, found.drops, found.transparent) == (0, 0, False)
        for found in (listed(watch, 4901), by_command(4901)):
            assert (found.pid, found.process) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
            assert (found.named, found.reuseport, found.pktinfo) == (True, False, False)


def test_options_that_are_set_after_bind_are_seen(watch: Watch, node: Namespace) -> None:
    with node.socket(socket.AF_INET6) as link:
        link.bind(("::", 4902))
        assert (listed(watch, 4902).pktinfo, listed(watch, 4902).pktinfo6) == (False, False)
        link.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        link.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        for found in (listed(watch, 4902), by_command(4902)):
            assert (found.pktinfo, found.pktinfo6, found.only_ipv6) == (False, True, False)
            assert (found.reuseport, found.transparent) == (True, True)
        assert by_netlink(node, 4902).transparent
        link.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        assert listed(watch, 4902).pktinfo


def test_ipv6_only_device_and_peer(watch: Watch, node: Namespace) -> None:
    with node.socket(socket.AF_INET6) as only, node.socket() as connected:
        only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        only.bind(("::1", 4903))
        connected.bind(("127.0.0.1", 4904))
        connected.connect(("127.0.0.2", 5353))
        for found in everywhere(watch, node, 4903):
            assert (found.address, found.family, found.only_ipv6, found.device) == ("::1", 6, True, 1)
        for found in everywhere(watch, node, 4904):
            assert (found.peer, found.peer_port) == ("127.0.0.2", 5353)


def test_drops_and_queue_are_those_of_the_kernels_own_list(watch: Watch, node: Namespace) -> None:
    with node.socket() as server, node.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_304)
        server.bind(("127.0.0.1", 4905))
        for _ in range(50):
            client.sendto(bytes(500), ("127.0.0.1", 4905))
        with node.entered():
            lines = Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]
        (fields,) = (line.split() for line in lines if line.split()[1].endswith(f":{4905:04X}"))
        for found in everywhere(watch, node, 4905):
            assert (found.drops, found.queue) == (int(fields[12]), int(fields[4].split(":")[1], 16))
            assert found.drops and found.queue


def test_socket_older_than_the_agent_is_listed_with_its_process(watch: Watch, older: socket.socket) -> None:
    if "adopt_sockets" in watch.sensor._attached._refused:
        pytest.skip("by design: before Linux 5.11, sockets older than the agent are listed in its own namespace only")
    found = listed(watch, 4900)
    assert (found.pid, found.inode) == (os.getpid(), os.fstat(older.fileno()).st_ino)


def test_closed_socket_is_no_longer_listed(watch: Watch, node: Namespace) -> None:
    with node.socket() as link:
        link.bind(("127.0.0.1", 4906))
        assert listed(watch, 4906)
    assert watch.sensor._inventory
    assert all(each.port != 4906 for each in watch.sensor._inventory.read())


def test_client_is_not_listed_as_a_server(watch: Watch, node: Namespace) -> None:
    with node.socket() as chosen, node.socket() as bound:
        chosen.sendto(b"x", ("127.0.0.1", 9))
        bound.bind(("127.0.0.1", 0))
        ports = {chosen.getsockname()[1], bound.getsockname()[1]}
        assert watch.sensor._inventory
        assert not ports & {each.port for each in watch.sensor._inventory.read()}
        assert all(by_command(port).named is False for port in ports)


def test_without_iterators_the_own_namespace_is_listed_by_sock_diag(node: Namespace) -> None:
    with node.socket() as link, node.entered():
        link.bind(("127.0.0.1", 4907))
        (found,) = (each for each in Inventory({}).read() if each.port == 4907)
    assert (found.pktinfo, found.named, found.pid) == (None, None, os.getpid())


def test_sample_has_the_sockets_every_two_seconds(watch: Watch, node: Namespace) -> None:
    with node.socket() as link:
        link.bind(("127.0.0.1", 4908))

        def has_it() -> bool:
            sockets = watch.sensor.sample(FOREVER_NS).sockets
            return sockets is not None and any(each.port == 4908 for each in sockets)

        wait_for(has_it, "the socket in a sample")


CHART = "-all,+bpf,+net_admin,+perfmon"
#: a port here, one elsewhere: both bound before the agent began; one here, one elsewhere: bound since
HERE, ELSEWHERE, NEW_HERE, NEW_ELSEWHERE = PORTS = range(4910, 4914)


@pytest.mark.parametrize(
    ("capabilities", "listed", "with_process", "pktinfo"),
    [
        (CHART, {HERE, NEW_HERE, NEW_ELSEWHERE}, {NEW_HERE, NEW_ELSEWHERE}, False),
        (f"{CHART},+sys_ptrace", {HERE, NEW_HERE, NEW_ELSEWHERE}, {HERE, NEW_HERE, NEW_ELSEWHERE}, False),
        (f"{CHART},+sys_ptrace,+sys_admin", set(PORTS), set(PORTS), False),
        ("-all,+bpf,+net_admin", {HERE, NEW_HERE}, set(), None),
    ],
    ids=["chart", "chart and SYS_PTRACE", "chart, SYS_PTRACE and SYS_ADMIN", "without PERFMON"],
)
def test_what_each_privilege_level_sees(
    lab: Lab, tmp_path: Path, capabilities: str, listed: set[int], with_process: set[int], pktinfo: bool | None
) -> None:
    """The table in docs/audit.md. The tests' process stands for the host."""
    other = lab.namespace(f"other{capabilities.count(',')}")

    def bound(where: int, link: socket.socket) -> None:
        link.bind(("127.0.0.1", where))

    tmp_path.chmod(0o700)
    words = [sys.executable, str(SUPPORT / "inventory_child.py"), str(tmp_path), str(PORTS[0]), str(PORTS[-1] + 1)]
    with contextlib.ExitStack() as opened:
        sockets = {
            port: opened.enter_context(other.socket() if port in (ELSEWHERE, NEW_ELSEWHERE) else socket.socket(type=2))
            for port in PORTS
        }
        for port in (HERE, ELSEWHERE):
            bound(port, sockets[port])
        child = subprocess.Popen(
            ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(SUPPORT)},
            preexec_fn=die_with_parent,
        )
        opened.enter_context(child)
        assert child.stdin and child.stdout
        if child.stdout.readline() != "ready\n":
            pytest.skip("this kernel does not load the programs with these capabilities (before 6.8: CAP_PERFMON)")
        for port in (NEW_HERE, NEW_ELSEWHERE):
            bound(port, sockets[port])
        found = {int(port): value for port, value in json.loads(child.communicate("\n")[0]).items()}
    assert found.keys() == listed
    assert {port for port, (_, is_known) in found.items() if is_known} == with_process
    assert {value for value, _ in found.values()} == {pktinfo}


def test_one_namespace_may_have_any_number_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the limit is counted, and not kept; a port's sockets are found behind any number of others."""
    monkeypatch.setattr(inventory, "MAX_SOCKETS", 64)
    with Lab() as lab, contextlib.ExitStack() as opened:
        node = lab.namespace("crowded")
        for number in range(200):
            opened.enter_context(node.socket()).bind(("127.0.0.1", 10_000 + number))
        link = load_inventory().links["sockets_here"]
        with node.entered():
            for sockets, more in (inventory._of_port(link, None), inventory._by_netlink(node.inode, None)):
                assert (len(sockets), more) == (64, 136)
            for number in (0, 199):
                for sockets, more in (
                    inventory._of_port(link, 10_000 + number),
                    inventory._by_netlink(node.inode, 10_000 + number),
                ):
                    assert ([each.port for each in sockets], more) == ([10_000 + number], 0)
        monkeypatch.setattr(inventory, "MAX_SOCKETS", 1)
        assert list_all(port=10_199).left_out == 0
        assert list_all().left_out >= 199


def test_sockets_beyond_the_limit_are_not_decoded(
    watch: Watch, node: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant with 50,000 sockets kept the agent busy for 0.4 s every two seconds."""
    decoded = []
    monkeypatch.setattr(inventory, "MAX_SOCKETS", 8)
    monkeypatch.setattr(inventory, "decode_socket", lambda raw: decoded.append(raw) or decode_socket(raw))
    assert watch.sensor._inventory
    with contextlib.ExitStack() as opened:
        for number in range(50):
            opened.enter_context(node.socket()).bind(("127.0.0.1", 10_000 + number))
        assert len(watch.sensor._inventory.read()) <= 8
        assert watch.sensor._inventory.left_out >= 42
        assert len(decoded) <= 8


def test_many_sockets_in_many_namespaces(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8_192:
        pytest.skip("needs 8,192 descriptors: raise the hard limit with ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_192), hard))
    try:
        with Lab() as many, contextlib.ExitStack() as opened:
            nodes = [many.namespace(f"n{number}") for number in range(MANY_NAMESPACES)]
            for number in range(MANY_SOCKETS):
                link = opened.enter_context(nodes[number % MANY_NAMESPACES].socket())
                link.bind(("127.0.0.1", 10_000 + number // MANY_NAMESPACES))
            with contextlib.closing(Watch(Limits(max_peers=4_096))) as watch:
                assert watch.sensor._inventory
                times = []
                for _ in range(3):
                    begin = time.perf_counter()
                    sockets = watch.sensor._inventory.read()
                    times.append(time.perf_counter() - begin)
                assert len(sockets) >= MANY_SOCKETS
            begin = time.perf_counter()
            found = list_all()
            command = time.perf_counter() - begin
            assert len(found.sockets) >= MANY_SOCKETS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with capsys.disabled():
        print(f" [agent: first {times[0] * 1000:.0f}, then {times[2] * 1000:.0f} ms; command {command:.1f} s]", end="")
