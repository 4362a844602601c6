"""The servers of `udpwatch top` in a real terminal: of real agents, of thousands, and of a cluster in Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, run_cli
from scene import PATIENCE_SECONDS
from terminals import Prometheus, Terminal, search, top, widened
from top_snapshots import server, snapshot
from waiting import wait_for

from udpwatch.agent.daemon.api import Api, bind
from udpwatch.agent.model import Healing, Snapshot
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost

MANY = 5_000
NODES, SERVERS = 1_000, 10
_ports = count()


@pytest.fixture
def port() -> int:
    """Return a port that no other run of the tests on this machine uses: an agent sees all of them."""
    return 30_000 + (os.getpid() * 7 + next(_ports)) % 9_000


@contextlib.contextmanager
def serving(host: ContainerHost, port: int, name: str = "wide-server") -> Iterator[Callable[..., None]]:
    """Run a server on all addresses of the node. Yield a function that has the container ask it N times."""
    with host.node.socket() as listener:
        listener.bind(("0.0.0.0", port))
        process = host.node.spawn(name, lambda: servers.plain(listener))

        def ask(times: int, address: str = host.DOCKER0) -> None:
            with host.container.socket() as client:
                client.settimeout(PATIENCE_SECONDS)
                for _ in range(times):
                    client.sendto(b"request", (address, port))
                    assert client.recvfrom(100)[1][0] == host.DOCKER0

        try:
            yield ask
        finally:
            process.stop()


def listed(*words: str) -> list[dict[str, Any]]:
    done = run_cli("top", "--once", "--json", "--servers", *words)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)["servers"]
    return found


def row_of(terminal: Terminal, port: int) -> list[str]:
    """Return the words of the row of a port."""
    return next((line.split() for line in terminal.lines if f" {port} " in line and "/udp" not in line), [])


def test_server_of_this_node_is_shown(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    with serving(host, port) as ask, Terminal(folder, *top("--connect", str(agent.socket), "--servers")) as terminal:
        terminal.shows("risk▼", "q quit")
        search(terminal, str(port))  # the agent sees the whole machine
        ask(23)
        wait_for(lambda: row_of(terminal, port)[:4] == ["wide-server", "-", str(port), "0.0.0.0"], "its place")
        ask(2, host.ETH0)  # the reply leaves from docker0
        wait_for(lambda: row_of(terminal, port)[-1] == "wrong", "its risk")
        terminal.press("Enter")
        terminal.shows("bound to  0.0.0.0, without PKTINFO", "25 requests, 25 replies, 2 wrong")
        terminal.press("Tab")
        wait_for(lambda: row_of(terminal, port)[-2:-1] == ["2"], "its finding")
        terminal.press("Tab", "s")
        terminal.shows("req/s▼")
        terminal.resize(200, 50)
        terminal.shows("PKTINFO", "requests/s▼", "pod or container")
        terminal.press("q")
        assert terminal.ended() == 0
        (told,) = (each for each in listed("--connect", str(agent.socket)) if each["port"] == port)
        assert (told["requests"], told["replies"], told["wrong"], told["drops"]) == (25, 25, 2, 0)
        assert (told["risk"], told["sockets_at_risk"], told["pktinfo"]) == ("wrong", 1, False)
        assert told["command"]


def test_private_agent_lists_servers(host: ContainerHost, port: int) -> None:
    if Path("/run/udpwatch/udpwatch.sock").exists():
        pytest.skip("an agent runs here")
    stop = threading.Event()
    with serving(host, port) as ask:

        def keep_asking() -> None:
            while not stop.wait(0.05):
                ask(1)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            (told,) = (each for each in listed("--interval", "5") if each["port"] == port)
        finally:
            stop.set()
            asking.join()
    assert told["process"] == "wide-server"
    assert told["requests_per_second"] > 0
    assert told["addresses"] == ["0.0.0.0"]


# ---- many at once ----


@contextlib.contextmanager
def published(path: Path, snapshot_of: Callable[[], Snapshot]) -> Iterator[None]:
    """Serve snapshots as the agent does."""
    loop = asyncio.new_event_loop()
    api = Api(bind(path), path, snapshot_of, dict, lambda _on, _ports: Healing("no port", False, False))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(api.start(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(api.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_keys_work_with_thousands_of_busy_servers(folder: Path) -> None:
    plain = [server(f"srv-{number}", 1024 + number, 0, pod=f"pod-{number}") for number in range(MANY)]
    begin = time.time()

    def busy() -> Snapshot:
        now = time.time()
        passed = now - begin
        every = (replace(each, requests=int(passed * (1 + each.port % 9)), last=now) for each in plain)
        return snapshot(time=now, started=begin, servers=tuple(every))

    path = folder / "many.sock"
    with published(path, busy), Terminal(folder, *top("--connect", str(path), "--servers")) as terminal:
        terminal.shows(f"of {MANY}")
        took = []
        for order in ("req/s▼", "rep/s▼", "unans▼", "wrong▼", "drops▼", "process▲", "pod▲", "port▲", "risk▼"):
            begun = time.monotonic()
            terminal.press("s")
            terminal.shows(order)
            took.append(time.monotonic() - begun)
        print(f"a key is answered within {min(took):.2f} to {max(took):.2f} s with {MANY} servers")
        terminal.press("G")
        terminal.shows(f"{MANY - 18}-{MANY} of {MANY}")
        search(terminal, "pod-4321")
        terminal.shows("1-1 of 1", " 5345 ")
        terminal.press("q")
        assert terminal.ended() == 0


# ---- the cluster ----


def test_server_on_two_nodes_is_one_row(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    """Two real agents of this machine: both see the server."""
    second = folder / "second"
    second.mkdir()
    with Agent(second) as other, serving(host, port) as ask:
        ask(10)
        ask(1, host.ETH0)
        nodes = [each.url.removeprefix("http://") for each in (agent, other)]
        with Prometheus(folder, nodes) as prometheus:

            def row() -> dict[str, Any]:
                with contextlib.suppress(AssertionError):
                    return next((e for e in listed("--prometheus", prometheus.url) if e["port"] == port), {})
                return {}

            wait_for(lambda: row().get("requests") == 22, "the sum of both nodes", 60)
            told = row()
            assert (told["process"], told["node"], told["nodes"]) == ("wide-server", None, 2)
            assert (told["replies"], told["sockets_at_risk"], told["risk"]) == (22, 2, "wrong")
            with Terminal(folder, *top("--servers", "--prometheus", prometheus.url)) as terminal:
                terminal.shows("nodes", "q quit")
                search(terminal, str(port))
                wait_for(lambda: row_of(terminal, port)[:4] == ["wide-server", "-", str(port), "2"], "the row", 60)
                widened(terminal, 160)
                terminal.press("g")
                terminal.shows("g all nodes", *nodes)
                terminal.press("Enter")
                terminal.shows("11 requests, 11 replies, 1 wrong", "1 socket at risk")
                terminal.press("q")
                assert terminal.ended() == 0


def cluster_metrics(now: float) -> Iterator[str]:
    """Yield OpenMetrics text: three scrapes of NODES agents with SERVERS findings and servers each."""
    nodes = [f'node="node-{number}",instance="10.0.{number >> 8}.{number & 255}:9953"' for number in range(NODES)]
    counters = ("requests", "replies", "unanswered", "receive_drops")

    def samples(name: str, labels: str, step: int) -> Iterator[str]:
        for scrape in range(3):
            yield f"{name}{{{labels}}} {scrape * step} {now - 45 + 15 * scrape:.3f}"

    def of_servers(name: str, step: int, more: str = "") -> Iterator[str]:
        for number, node in enumerate(nodes):
            for each in range(SERVERS):
                own = f'process="srv-{each}",port="{1000 + each}",namespace="shop",pod="srv-{each}-{number}"'
                yield from samples(name, f"{node},{own}{more.replace('N', str(number % 250))}", step)

    yield "# TYPE udpwatch_build info"
    for node in nodes:
        yield from samples("udpwatch_build_info", f'{node},version="1",kernel="6.1",mode="packet"', 1)
    yield "# TYPE udpwatch_replies_checked counter"
    for node in nodes:
        yield from samples("udpwatch_replies_checked_total", node, 150)
    yield "# TYPE udpwatch_reply_source_mismatch counter"
    yield from of_servers("udpwatch_reply_source_mismatch_total", 15, ',expected="10.1.0.N",actual="172.17.0.1"')
    for name in counters:
        yield f"# TYPE udpwatch_server_{name} counter"
        yield from of_servers(f"udpwatch_server_{name}_total", 30)
    for name in ("udpwatch_server_receive_queue_bytes", "udpwatch_sockets_at_risk"):
        yield f"# TYPE {name} gauge"
        yield from of_servers(name, 1)
    yield "# EOF"


def test_thousand_nodes_are_tens_of_rows(folder: Path) -> None:
    """Prints how long a look takes."""
    if not shutil.which("promtool"):
        pytest.skip("needs prometheus: apt-get install prometheus")
    (folder / "metrics").write_text("\n".join(cluster_metrics(time.time())) + "\n")
    create = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(folder / "metrics"), str(folder / "tsdb")]
    subprocess.run(create, check=True, capture_output=True)
    with Prometheus(folder, []) as prometheus:
        prometheus.ready()
        for words in ((), ("--servers",)):
            begun = time.monotonic()
            done = run_cli("top", "--once", "--prometheus", prometheus.url, *words)
            assert done.returncode == 0, done.stderr
            print(f"top --once {' '.join(words)}: {time.monotonic() - begun:.2f} s for {NODES * SERVERS} rows")
            lines = done.stdout.splitlines()
            assert len(lines) == 3 + SERVERS
            assert f"{NODES} nodes" in lines[0]
            assert f"findings {NODES * SERVERS}" in lines[1]
            assert all(str(NODES) in line.split() for line in lines[3:])
        (first, *_) = listed("--prometheus", prometheus.url)
        assert (first["requests"], first["requests_per_second"]) == (60 * NODES, 2.0 * NODES)
        assert (first["wrong_per_second"], first["unanswered_share"]) == (float(NODES), 1.0)
        with Terminal(folder, *top("--prometheus", prometheus.url)) as terminal:
            terminal.shows(f"1-{SERVERS} of {SERVERS}")
            search(terminal, "1003")
            widened(terminal, 160)
            terminal.press("g")
            terminal.shows(f"of {NODES}", "node-1", "10.1.0.")
            terminal.press("q")
            assert terminal.ended() == 0
