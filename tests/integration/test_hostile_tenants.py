"""One container against the node: what it may not take from others, as an unprivileged process without a capability."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from agents import Agent
from dns_server import Responder, bare_query, write
from load import compile_load
from machine import limited, own_cgroup
from router import Router
from scene import ask, bound
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel import netns
from udpwatch.agent.model import Forwarded, Hooks
from udpwatch.agent.sources import flow_events
from udpwatch.agent.testing.lab import Lab, Namespace, die_with_parent

GREEDY_PROCESSES = 8
SECONDS = 8
NOBODY = 65534
APART = 30_000  # these tests' ports from those of others, whose sensors see the greedy as well
PR_SET_NAME = 15  # include/uapi/linux/prctl.h
NAME = "udpwatch_reply_source_mismatch_total"
_libc = ctypes.CDLL(None)


@pytest.fixture
def cgroups() -> Iterator[Callable[[str], Path]]:
    """Makes cgroups, one for each container."""
    made: list[Path] = []

    def make(name: str) -> Path:
        folder = parent / name
        folder.mkdir()
        made.append(folder)
        return folder

    with own_cgroup() as parent:
        yield make
        for folder in made:
            wait_for(lambda folder=folder: _is_removed(folder), f"{folder} to be empty")


def _is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def in_container(cgroup: Path, function: Callable[[], None]) -> Callable[[], None]:
    """Run a function as nobody in a cgroup, with a pod's small share of the CPU that has requested none."""

    def run() -> None:
        os.nice(19)
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        function()

    return run


@contextmanager
def greedy(namespace: Namespace, cgroup: Path, port: int) -> Iterator[None]:
    """Processes that answer wrongly as fast as they can, each time under another name: a finding each, with events."""
    with ExitStack() as opened:
        children = []
        for number in range(GREEDY_PROCESSES):
            server = opened.enter_context(bound(namespace, socket.AF_INET, "0.0.0.0", port + number))
            client = opened.enter_context(namespace.socket())
            _, peer = ask(client, "127.0.0.2", port + number, server)

            def pour(server: socket.socket = server, peer: tuple[str, int] = peer) -> None:
                for turn in count():
                    _libc.prctl(PR_SET_NAME, f"greedy-{turn % 5000}".encode(), 0, 0, 0)
                    for _ in range(4):
                        server.sendto(b"x", peer)

            children.append(namespace.spawn("greedy", in_container(cgroup, pour)))
        try:
            yield
        finally:
            for child in children:
                child.stop()


@pytest.fixture
def port(port: int) -> int:
    return APART + port


def test_greedy_container(folder: Path, cgroups: Callable[[str], Path], port: int) -> None:
    """Its wrong replies fill neither the agent's memory, nor the kernel's table, nor the series: another container's
    wrong reply is named while they go on, and the agent answers.
    """
    with Lab() as lab:
        theirs, ours = lab.namespace("greedy"), lab.namespace("innocent")
        with (
            Agent(folder, "--max-series=100") as agent,
            bound(ours, socket.AF_INET, "0.0.0.0", port + 100) as server,
            ours.socket() as client,
        ):
            before = agent.resident_kib()
            with greedy(theirs, cgroups("greedy"), port):
                begin = time.monotonic()
                slowest = 0.0
                while (now := time.monotonic()) - begin < SECONDS:
                    assert agent.get("/healthz")[0] == 200
                    slowest = max(slowest, time.monotonic() - now)
                    time.sleep(0.2)
                question = ask(client, "127.0.0.2", port + 100, server)
                send = in_container(cgroups("innocent"), lambda: server.sendto(*question) and None)
                asked = time.monotonic()
                assert ours.spawn("innocent", send).wait() == 0
                wait_for(lambda: agent.metric(NAME, port=str(port + 100), process="innocent") == 1, "its finding")
                named = time.monotonic() - asked
            print(f"RSS {before} -> {agent.resident_kib()} KiB, slowest answer {slowest:.2f} s, named in {named:.1f} s")
            assert agent.resident_kib() - before < 40 * 1024
            assert named < 30
            lines = [line for line in agent.log if "wrong reply:" in line or "not logged" in line]
            assert 20 < len(lines) < 100
            lost = agent.snapshot()["lost"]
            assert lost["findings_full"] > 0
            assert lost["attribution"] > 0
            assert lost["ring_full"] + lost["queue"] + lost["rate_limit"] > 0

            def is_exact() -> bool:
                """Nothing else on this node is asked and answers meanwhile but the agent's own test."""
                checked = agent.metric("udpwatch_replies_checked_total")
                return checked - 10 <= agent.metric(NAME) <= checked

            wait_for(is_exact, "all wrong replies to be counted", 10)


def test_namespaces_that_flood_conntracks_events(tmp_path: Path, port: int) -> None:
    """20 namespaces of one user book flows as fast as they can: what waits in the kernel is bounded, each reading ends
    soon, and a wrong reply that a router forwards is found.
    """
    load = compile_load(tmp_path)
    with Lab() as lab, Router() as router:
        floods = [lab.namespace(f"flood{number}") for number in range(20)]
        for each in floods:
            each.nft(
                "table inet t { chain c { type filter hook input priority filter; ct state established accept; }; }"
            )
        with ExitStack() as held:
            # Namespaces are found by their processes.
            for each in floods:
                words = [str(load), "flood", "127.0.0.1", "1", "127.0.0.2", "9", "0", str(2 * SECONDS)]
                held.enter_context(each.popen(words))
            watch = held.enter_context(closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)))
            source = watch.sensor._flows._source
            slowest, begin, listened = 0.0, time.monotonic(), 0
            while time.monotonic() - begin < SECONDS / 2:
                before = time.thread_time()  # the floods leave a tenth of a CPU
                watch.read()
                slowest = max(slowest, time.thread_time() - before)
                listened = max(listened, len(source._namespaces))
                waiting = sum(
                    each.listener._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                    for each in source._namespaces.values()
                )
                assert waiting <= 2 * flow_events.RECEIVE_BYTES
            router.ask("10.1.0.9", 4444, "10.2.0.5", port)
            router.answer("10.2.0.6", port, "10.1.0.9", 4444)
            wait_for(lambda: watch.count(port) == 1, "the router's wrong reply", 20)
            print(f"longest reading {slowest:.1f} s of CPU, overruns {source.overruns}, namespaces {listened}")
            assert listened >= 21
            assert slowest < 2 * (flow_events.READ_SECONDS + flow_events.TABLE_SECONDS)
            assert source.overruns > 0


# ---- all at once ----

ALL_SECONDS = float(os.environ.get("UDPWATCH_ATTACK_SECONDS", "15"))  # 120 in a thorough run
MEMORY, CPUS = 256 << 20, 0.5  # as the chart limits the agent's memory


@dataclass
class Victim:
    """A client of the agent's DNS and of its health page, from an address of its own."""

    namespace: Namespace
    server: str
    cached: list[float] = field(default_factory=list)  # seconds; inf: none within a second
    uncached: list[bool] = field(default_factory=list)
    healthy: list[float] = field(default_factory=list)

    def look(self, until: float) -> None:
        """Ask what is cached, what is not, and how the agent is, in turn."""
        for number in count():
            if time.monotonic() > until:
                return
            self.cached.append(self._ask("cached.good.test", 1.0))
            self.uncached.append(self._ask(f"new{number}.good.test", 5.0) < math.inf)
            if number % 5 == 0:
                self.healthy.append(self._health())
            time.sleep(0.05)

    def _ask(self, name: str, patience: float) -> float:
        with self.namespace.socket() as client:
            client.settimeout(patience)
            begin = time.monotonic()
            client.sendto(bare_query(name, 7), (self.server, 53))
            try:
                answer = client.recv(1000)
            except TimeoutError:
                return math.inf
            return time.monotonic() - begin if answer[3] & 15 == 0 and answer[7] else math.inf

    def _health(self) -> float:
        with self.namespace.socket(kind=socket.SOCK_STREAM) as client:
            client.settimeout(10)
            begin = time.monotonic()
            try:
                client.connect((self.server, 9953))
                client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                good = client.recv(100).startswith(b"HTTP/1.0 200")
            except OSError:
                return math.inf
            return time.monotonic() - begin if good else math.inf


def ask_dead_names(namespace: Namespace, server: str) -> None:
    """1,000 random names a second of a zone whose server is dead."""
    os.nice(19)
    with namespace.socket() as client:
        client.setblocking(False)
        begin = time.monotonic()
        for number in count():
            while number > (time.monotonic() - begin) * 1000:
                time.sleep(0.005)
            with suppress(BlockingIOError):
                client.sendto(bare_query(f"x{number}.dead.test", number & 0xFFFF), (server, 53))
                client.recv(1000)


def send_headers(namespace: Namespace, server: str) -> None:
    """32 connections with headers without an end, again and again."""
    os.nice(19)
    lines = b"x: " + b"a" * 65_000 + b"\r\n"
    while True:
        with ExitStack() as opened:
            for _ in range(32):
                client = opened.enter_context(namespace.socket(kind=socket.SOCK_STREAM))
                client.settimeout(1)
                with suppress(OSError):
                    client.connect((server, 9953))
                    client.sendall(b"GET / HTTP/1.0\r\n" + lines * 99)


def test_all_attacks_at_once(folder: Path, cgroups: Callable[[str], Path], tmp_path: Path, port: int) -> None:
    """Half a CPU and 256 MB: the agent lives and answers, and what it loses is counted."""
    load = compile_load(tmp_path)
    with Lab() as lab, ExitStack() as held:
        node, upstream = lab.namespace("node"), lab.namespace("upstream")
        victim, attacker, theirs = lab.namespace("victim"), lab.namespace("attacker"), lab.namespace("greedy")
        for number, each in enumerate((upstream, victim, attacker), 1):
            lab.link(node, f"to{number}", each, "eth0")
            node.ip(f"addr add 10.{number}.0.1/24 dev to{number}")
            each.ip(f"addr add 10.{number}.0.9/24 dev eth0", f"route add default via 10.{number}.0.1")
        theirs.nft("table inet t { chain c { type filter hook input priority filter; ct state new accept; }; }")
        held.enter_context(Responder(upstream, "--address=/good.test/192.0.2.1", "--cache-size=0"))
        conf = write(folder / "dns.conf", "no-hosts", "no-resolv", "server=10.1.0.9", "server=/dead.test/10.1.0.77")

        def enter() -> None:
            with open(node.path, "rb") as file:  # noqa: PTH123  a child: as little as possible
                netns.setns(file.fileno())
            die_with_parent()

        flags = ("--dns", f"--dns-conf={conf}", "--forwarded", "--metrics-listen=0.0.0.0:9953")
        agent = held.enter_context(Agent(folder, *flags, preexec_fn=enter))
        held.enter_context(limited(agent.pid, MEMORY, CPUS))
        server = held.enter_context(bound(theirs, socket.AF_INET, "0.0.0.0", port + 100))
        client = held.enter_context(theirs.socket())
        client_of_dns = Victim(victim, "10.2.0.1")
        client_of_dns.look(time.monotonic() + 1)
        assert all(client_of_dns.uncached), agent.log

        before = agent.resident_kib()
        held.enter_context(greedy(theirs, cgroups("greedy"), port))
        attacker.spawn("dead names", lambda: ask_dead_names(attacker, "10.3.0.1"))
        attacker.spawn("headers", lambda: send_headers(attacker, "10.3.0.1"))
        words = ["nice", "-n19", str(load), "flood", "127.0.0.1", "1", "127.0.0.2", "9", "0", str(ALL_SECONDS)]
        held.enter_context(theirs.popen(words))
        seen = Victim(victim, "10.2.0.1")
        seen.look(time.monotonic() + ALL_SECONDS)
        question = ask(client, "127.0.0.2", port + 100, server)
        send = in_container(cgroups("innocent"), lambda: server.sendto(*question) and None)
        asked = time.monotonic()
        assert theirs.spawn("innocent", send).wait() == 0

        def is_named() -> bool:
            rows = agent.snapshot()["rows"]
            return any(row["port"] == port + 100 and row["sender"]["process"] == "innocent" for row in rows)

        wait_for(is_named, "the innocent one's finding", 30)
        named = time.monotonic() - asked
        lost = {stage: number for stage, number in agent.snapshot()["lost"].items() if number}
        cached = sorted(seen.cached)
        print(
            f"RSS {before} -> {agent.resident_kib()} KiB; cached: median {cached[len(cached) // 2] * 1e3:.0f} ms,"
            f" p95 {cached[len(cached) * 95 // 100] * 1e3:.0f} ms; uncached answered"
            f" {sum(seen.uncached)} of {len(seen.uncached)}; health {max(seen.healthy):.2f} s; named in {named:.1f} s;"
            f" lost {lost}"
        )
        assert agent.process.poll() is None
        assert agent.resident_kib() * 1024 < MEMORY / 2
        assert sum(seen.uncached) >= 0.9 * len(seen.uncached)
        assert cached[len(cached) // 2] < 0.5
        assert max(seen.healthy) < 10
        assert named < 30
        assert lost
