"""One container against the node: what it may not take from others, as an unprivileged process without a capability."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from agents import Agent
from attacks import (
    LONG_RECORD,
    ask_names,
    attacking,
    delegated,
    flood_of_flows,
    greedy,
    in_container,
    keep_asking,
    let_go_at_once,
    send_headers,
    take_nothing,
)
from dns_server import Responder, bare_query, write
from load import compile_load
from machine import AGENT_MEMORY, inside_own_cgroup, limited, memory_kib
from router import Router
from scene import ask, bound
from sensors import Watch
from waiting import PATIENCE_SECONDS, wait_for
from withheld import withheld

from udpwatch.agent.kernel.routes import route_to
from udpwatch.agent.model import Forwarded, Hooks
from udpwatch.agent.sources import flow_events
from udpwatch.agent.testing.lab import Lab, Namespace

SECONDS = 8
APART = 30_000  # these tests' ports from those of others, whose sensors see the greedy as well
NAME = "udpwatch_reply_source_mismatch_total"


@pytest.fixture
def tree() -> Iterator[Path]:
    """A cgroup for this process and all containers."""
    with inside_own_cgroup() as path:
        yield path


@pytest.fixture
def cgroups(tree: Path) -> Iterator[Callable[[str], Path]]:
    """Makes cgroups, one for each container."""
    made: list[Path] = []

    def make(name: str) -> Path:
        folder = tree / name
        folder.mkdir()
        made.append(folder)
        return folder

    yield make
    for folder in [each for parent in made for each in (*parent.glob("*/"), parent)]:
        wait_for(lambda folder=folder: _is_removed(folder), f"{folder} to be empty")


def _is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


@pytest.fixture
def port(port: int) -> int:
    return APART + port


def test_greedy_container(folder: Path, tree: Path, cgroups: Callable[[str], Path], port: int) -> None:
    """Its wrong replies fill neither the agent's memory, nor the kernel's table, nor the series: another container's
    wrong reply is named while they go on, and the agent answers.
    """
    with Lab() as lab:
        theirs, ours = lab.namespace("greedy"), lab.namespace("innocent")
        with (
            Agent(folder, "--max-series=100", f"--cgroup={tree}") as agent,
            bound(ours, socket.AF_INET, "0.0.0.0", port + 100) as server,
            ours.socket() as client,
        ):
            before = agent.resident_kib()
            with limited(agent.pid, AGENT_MEMORY) as kept, greedy(theirs, cgroups("greedy"), port):
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
                assert kept.oom_kills() == 0
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
                """Nothing else in this cgroup is asked and answers but the agent's own test."""
                checked = agent.metric("udpwatch_replies_checked_total")
                return checked - 10 <= agent.metric(NAME) <= checked

            wait_for(is_exact, "all wrong replies to be counted", 10)


def test_namespaces_that_flood_conntracks_events(folder: Path, tmp_path: Path, port: int) -> None:
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
                words = [str(load), "flood", "127.0.0.1", "1", "127.0.0.2", "9", "0", str(2 * PATIENCE_SECONDS)]
                held.callback(held.enter_context(each.popen(words)).kill)
            watch = held.enter_context(closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)))
            source = watch.sensor._flows._source
            slowest, begin, listened = 0.0, time.monotonic(), 0
            # All of them are found once each process has had a turn to enter its namespace, and the next search is due.
            while (passed := time.monotonic() - begin) < SECONDS / 2 or listened < 21:
                assert passed < PATIENCE_SECONDS, f"{listened} namespaces of 21 are listened to"
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
            assert slowest < 2 * (flow_events.READ_SECONDS + flow_events.TABLE_SECONDS)
            assert source.overruns > 0
            held.pop_all().close()
        with ExitStack() as held:
            agent = held.enter_context(Agent(folder, "--forwarded", preexec_fn=router.node.enter_in_child))
            kept = held.enter_context(limited(agent.pid, AGENT_MEMORY))
            for each in floods:
                held.enter_context(flood_of_flows(each, load, PATIENCE_SECONDS))
            wait_for(lambda: agent.snapshot()["lost"]["conntrack_overrun"] > 0, "the agent to have lost events")
            print(f"agent's peak {memory_kib(agent.pid, 'VmHWM')} KiB")
            assert kept.oom_kills() == 0


# ---- all at once ----

ALL_SECONDS = float(os.environ.get("UDPWATCH_ATTACK_SECONDS", "15"))  # 120 in a thorough run
CONTROL_SECONDS = 5.0
CPUS = 0.5
DELEGATED = 9_000
IN_TIME = 0.05  # seconds, for what is in the cache
NODE, ATTACKED = "10.2.0.1", "10.3.0.1"  # as the victim has it, and as the attacker has it
GOOD_SERVER, LONG_SERVER = "10.1.0.9", "10.1.0.10"
#: what each of the attacks loses, and is counted
LOST = (
    'events_lost_total{stage="findings_full"}',
    'events_lost_total{stage="ring_full"}',
    'events_lost_total{stage="conntrack_overrun"}',
    'events_lost_total{stage="attribution"}',
    'http_connections_closed_total{reason="size"}',
    'dns_forward_rejects_total{reason="queue_share"}',
    f'dns_upstream_failures_total{{reason="timeout",server="{LONG_SERVER}',
    'dns_tcp_connections_closed_total{reason="held"}',
)
MANY = tuple(f"10.3.1.{each}" for each in range(20))
CONTAINER = "c0ffee" * 10 + "cafe"


@dataclass(frozen=True)
class Seen:
    """What clients of the agent's DNS and of its health page got, from an address of their own."""

    cached: list[float]  # seconds; inf: none
    uncached: list[float]
    health: list[float]
    beside: list[float]  # from another responder on this machine, without limits, that nobody attacks

    @property
    def answered(self) -> float:
        """Which share of the uncached questions was answered."""
        return sum(each < math.inf for each in self.uncached) / len(self.uncached)

    def __str__(self) -> str:
        return (
            f"cached {_quantiles(self.cached)}, {in_time(self.cached):.1%} in {IN_TIME * 1e3:.0f} ms; beside"
            f" {_quantiles(self.beside)}, {in_time(self.beside):.1%}; uncached answered {self.answered:.1%},"
            f" {_quantiles(self.uncached)}; health {_quantiles(self.health)}"
        )


def in_time(values: list[float]) -> float:
    """Which share of the questions was answered in time."""
    return sum(each <= IN_TIME for each in values) / len(values)


def metrics(namespace: Namespace) -> list[str]:
    """The lines of the agent's page, asked for by the victim."""
    text = b""
    with namespace.socket(kind=socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect((NODE, 9953))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while data := client.recv(1 << 16):
            text += data
    return text.decode().splitlines()


def _quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    median, p95, p99 = (ordered[int(len(ordered) * each)] * 1e3 for each in (0.5, 0.95, 0.99))
    return f"median {median:.1f} p95 {p95:.0f} p99 {p99:.0f} max {ordered[-1] * 1e3:.0f} ms of {len(ordered)}"


def look(namespace: Namespace, folder: Path, seconds: float) -> Seen:
    """Ask what is cached, what is not, and how the agent is, each in a process of its own: none waits for another."""

    def ask_dns(name: str, patience: float, server: str = NODE) -> float:
        with namespace.socket() as client:
            client.settimeout(patience)
            begin = time.monotonic()
            client.sendto(bare_query(name, 7), (server, 53))
            try:
                answer = client.recv(1000)
            except TimeoutError:
                return math.inf
            return time.monotonic() - begin if answer[3] & 15 == 0 and answer[7] else math.inf

    def ask_health() -> float:
        with namespace.socket(kind=socket.SOCK_STREAM) as client:
            client.settimeout(10)
            begin = time.monotonic()
            try:
                client.connect((NODE, 9953))
                client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                good = client.recv(100).startswith(b"HTTP/1.0 200")
            except OSError:
                return math.inf
            return time.monotonic() - begin if good else math.inf

    def repeat(name: str, pause: float, once: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            found, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                found.append(once(len(found)))
                time.sleep(pause)
            (folder / name).write_text(json.dumps(found))

        return run

    mark = f"{time.monotonic_ns()}"
    jobs = {
        "cached": repeat("cached", 0.02, lambda _: ask_dns("cached.good.test", 1.0)),
        "uncached": repeat("uncached", 0.1, lambda turn: ask_dns(f"n{mark}-{turn}.good.test", 5.0)),
        "health": repeat("health", 0.5, lambda _: ask_health()),
        "beside": repeat("beside", 0.05, lambda _: ask_dns("cached.good.test", 1.0, GOOD_SERVER)),
    }
    children = [namespace.spawn(name, job) for name, job in jobs.items()]
    assert [child.wait() for child in children] == [0] * len(jobs)
    return Seen(*(json.loads((folder / name).read_text()) for name in jobs))


class Used:
    """The CPU that a process uses from now on."""

    def __init__(self, pid: int) -> None:
        self._pid, self._begin = pid, time.monotonic()
        self._before = self._threads()

    def _threads(self) -> Counter[str]:
        """Seconds of each thread by name, and of all, also of those that have ended."""
        used: Counter[str] = Counter()
        for stat in (Path(f"/proc/{self._pid}/stat"), *Path(f"/proc/{self._pid}/task").glob("*/stat")):
            with suppress(OSError):
                head, _, tail = stat.read_text().rpartition(")")
                seconds = sum(map(int, tail.split()[11:13])) / os.sysconf("SC_CLK_TCK")
                used["all" if stat.parent.parent.name == "proc" else head.partition("(")[2]] += seconds
        return used

    def since(self) -> dict[str, float]:
        """CPUs used since the beginning, by thread; those of a common name together."""
        seconds = time.monotonic() - self._begin
        now = self._threads()
        return {name: (now[name] - self._before[name]) / seconds for name in sorted(now)}


class Node:
    """A node with the agent, its DNS servers, and who is beside them: one who attacks, one who only asks."""

    def __init__(self, lab: Lab) -> None:
        self.node, self.upstream = lab.namespace("node"), lab.namespace("upstream")
        self.victim, self.attacker, self.theirs = map(lab.namespace, ("victim", "attacker", "greedy"))
        for number, each in enumerate((self.upstream, self.victim, self.attacker), 1):
            lab.link(self.node, f"to{number}", each, "eth0")
            self.node.ip(f"addr add 10.{number}.0.1/16 dev to{number}")
            each.ip(f"addr add 10.{number}.0.9/16 dev eth0", f"route add default via 10.{number}.0.1")
        self.node.sysctl("net/ipv4/ip_forward", "1")
        self.upstream.ip(f"addr add {LONG_SERVER}/16 dev eth0")
        self.attacker.ip(*(f"addr add {each}/16 dev eth0" for each in MANY))
        self.theirs.nft("table inet t { chain c { type filter hook input priority filter; ct state new accept; }; }")

    @contextmanager
    def attacked(self, cgroups: Callable[[str], Path], folder: Path, port: int, only: str = "") -> Iterator[None]:
        """All attacks at once; ``only`` one, for who looks for what it costs."""
        theirs, attacker = self.theirs, self.attacker
        long_names = partial(ask_names, attacker, ATTACKED, "long.test", 300)
        (folder / "withheld").mkdir()

        @contextmanager
        def withholding() -> Iterator[None]:
            with withheld(theirs, folder / "withheld", port + 50), theirs.socket() as client:
                with attacking(theirs, "asking", partial(keep_asking, client, port + 50)):
                    yield

        attacks: dict[str, Callable[[], AbstractContextManager[object]]] = {
            "cgroups": lambda: delegated(cgroups("delegated"), DELEGATED),
            "greedy": lambda: greedy(theirs, cgroups("greedy"), port),
            "dead": lambda: attacking(attacker, "dead", partial(ask_names, attacker, ATTACKED, "dead.test", 1000)),
            "server": lambda: attacking(
                self.upstream, "server", partial(let_go_at_once, self.upstream, LONG_SERVER, 2.0)
            ),
            "long": lambda: attacking(attacker, "long", long_names),
            "slow": lambda: attacking(attacker, "slow", partial(take_nothing, attacker, ATTACKED, MANY, 500)),
            "headers": lambda: attacking(attacker, "headers", partial(send_headers, attacker, ATTACKED)),
            "flows": lambda: flood_of_flows(theirs, compile_load(folder), 10 * ALL_SECONDS),
            "withheld": withholding,
        }
        with ExitStack() as held:
            for name, attack in attacks.items():
                if only in ("", name) or (name, only) == ("server", "long"):
                    held.enter_context(attack())
            yield


def test_all_attacks_at_once(folder: Path, cgroups: Callable[[str], Path], port: int) -> None:
    """Half a CPU and 256 MB: the agent lives and answers, names the innocent, and what it loses is counted."""
    only = os.environ.get("UDPWATCH_ATTACK", "")
    with Lab() as lab, ExitStack() as held:
        place = Node(lab)
        options = "--address=/good.test/192.0.2.1", "--local-ttl=600", "--cache-size=0"
        held.enter_context(Responder(place.upstream, f"--listen-address={GOOD_SERVER}", *options))
        servers = f"server={GOOD_SERVER}", "server=/dead.test/10.1.0.77", f"server=/long.test/{LONG_SERVER}"
        conf = write(folder / "dns.conf", "no-hosts", "no-resolv", *servers, *LONG_RECORD)
        flags = ("--dns", f"--dns-conf={conf}", "--forwarded", "--metrics-listen=0.0.0.0:9953")
        agent = held.enter_context(Agent(folder, *flags, preexec_fn=place.node.enter_in_child))
        kept = held.enter_context(limited(agent.pid, AGENT_MEMORY, CPUS))
        server = held.enter_context(bound(place.theirs, socket.AF_INET, "0.0.0.0", port + 100))
        client = held.enter_context(place.theirs.socket())
        innocent = cgroups("innocent") / CONTAINER
        innocent.mkdir()

        before = agent.resident_kib()
        control = look(place.victim, folder, CONTROL_SECONDS)
        with place.attacked(cgroups, folder, port, only):
            used, throttled = Used(agent.pid), kept.throttled()
            seen = look(place.victim, folder, ALL_SECONDS)
            cpu = used.since()
            periods, short, waited = (now - then for now, then in zip(kept.throttled(), throttled, strict=True))
            question = ask(client, "127.0.0.2", port + 100, server)
            asked = time.monotonic()
            send = in_container(innocent, lambda: server.sendto(*question) and None)
            assert place.theirs.spawn("innocent", send).wait() == 0

            def is_named() -> bool:
                time.sleep(0.25)  # each page takes the agent's CPU, too
                return any(f'port="{port + 100}"' in line and "other" not in line for line in metrics(place.victim))

            wait_for(is_named, "the innocent one's finding", 60)
            named = time.monotonic() - asked
            page = metrics(place.victim)
        stages = ("events_lost", "forward_rejects", "connections_closed", "upstream_failures", "evicted")
        lost = [line.removeprefix("udpwatch_") for line in page if any(each in line for each in stages)]
        peak = memory_kib(agent.pid, "VmHWM")
        print(f"without attacks: {control}\nunder attack: {seen}")
        print(f"CPUs: {', '.join(f'{name} {value:.3f}' for name, value in cpu.items())}")
        print(f"the quota ran out in {short} of {periods} periods, for {waited:.1f} s")
        print(f"RSS {before} -> {agent.resident_kib()} KiB, peak {peak}; named in {named:.1f} s; lost:")
        print(*(line for line in lost if line[0] != "#" and not line.endswith(" 0.0")), sep="\n")
        assert agent.process.poll() is None
        assert kept.oom_kills() == 0
        assert agent.resident_kib() << 10 < 0.75 * AGENT_MEMORY
        assert waited < ALL_SECONDS / 10, "its own threads use up the quota"
        assert seen.answered >= 0.9
        assert in_time(seen.cached) >= 0.8 * in_time(seen.beside)
        assert max(seen.health) < math.inf
        counted = [each for each in LOST if any(line.startswith(each) and not line.endswith(" 0.0") for line in lost)]
        assert only or counted == list(LOST)


def test_name_of_a_tenants_interface_is_made_printable() -> None:
    """The agent logs it; the kernel forbids only white space, colons and slashes."""
    with Lab() as lab:
        tenant = lab.namespace("tenant")
        tenant.run(["ip", "link", "set", "lo", "down"])
        tenant.run(["ip", "link", "set", "lo", "name", "\x1b[2J\x07"])
        tenant.run(["ip", "link", "set", "\x1b[2J\x07", "up"])
        with tenant.entered():
            route = route_to("127.0.0.2")
    assert route is not None and route.interface == "\\x1b[2J\\x07"
