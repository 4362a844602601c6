"""One container against the node: what it may not take from others, as an unprivileged process without a capability."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path

import pytest
from agents import Agent, wait_for
from conftest import Watch, ask
from load import compile_load
from machine import own_cgroup
from router import Router
from test_scenes import bound

from udpwatch.agent.kernel import flows
from udpwatch.agent.lab import Lab, Namespace
from udpwatch.agent.model import Forwarded, Hooks

GREEDY_PROCESSES = 8
SECONDS = 8
NOBODY = 65534
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
    """Run a function as nobody in a cgroup."""

    def run() -> None:
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
            assert slowest < 5
            assert named < 5
            lines = [line for line in agent.said if "wrong reply:" in line or "not logged" in line]
            assert 20 < len(lines) < 100
            lost = agent.snapshot()["lost"]
            assert lost["findings_full"] > 0
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
        with closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)) as watch, ExitStack() as held:
            source = watch.sensor._flows._source
            for each in floods:
                words = [str(load), "flood", "127.0.0.1", "1", "127.0.0.2", "9", "0", str(SECONDS)]
                held.enter_context(each.popen(words))
            slowest, begin = 0.0, time.monotonic()
            while time.monotonic() - begin < SECONDS / 2:
                before = time.monotonic()
                watch.read()
                slowest = max(slowest, time.monotonic() - before)
            router.ask("10.1.0.9", 4444, "10.2.0.5", port)
            router.answer("10.2.0.6", port, "10.1.0.9", 4444)
            wait_for(lambda: watch.count(port) == 1, "the router's wrong reply", 20)
            assert len(source._namespaces) >= 22
            waiting = sum(
                each.listener._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                for each in source._namespaces.values()
            )
            print(f"buffers {waiting >> 20} MiB, slowest reading {slowest:.1f} s, overruns {source.overruns}")
            assert waiting <= 2 * flows.RECEIVE_BYTES
            assert slowest < 5
            assert source.overruns > 0
