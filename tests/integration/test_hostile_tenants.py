"""One container against the node: what it may not take from others, as an unprivileged process without a capability."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest
from agents import Agent, wait_for
from conftest import ask
from machine import own_cgroup
from test_scenes import bound

from udpwatch.agent.lab import Lab, Namespace

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
