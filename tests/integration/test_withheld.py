"""A process that withholds its command line delays nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import Agent, temporary
from scene import ask
from withheld import withheld

from udpwatch.agent.attribution import command_line
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.testing.lab import ContainerHost

PORT = 4100  # of the server; the tests' own ports are below


@pytest.fixture(scope="module")
def server(host: ContainerHost) -> Iterator[int]:
    """Its process id; its memory lock is held."""
    with temporary() as folder, withheld(host.node, Path(folder), PORT) as pid:
        yield pid


def returns(function: Callable[[], object]) -> bool:
    """Whether a call returns within 2 s. Of one that does not, the thread waits until the server ends."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(2)
    return not thread.is_alive()


def test_cmdline_alone_needs_the_memory_lock(server: int) -> None:
    folder = Path(f"/proc/{server}")
    assert not returns((folder / "cmdline").read_bytes)
    for name in ("comm", "cgroup", "stat", f"task/{server}/comm"):
        assert returns((folder / name).read_bytes), name
    assert returns((folder / "exe").readlink)
    assert returns(lambda: list((folder / "task").iterdir()))


def test_a_withheld_command_line_is_waited_for_once(server: int) -> None:
    lines = CommandLines()
    path = Path(f"/proc/{server}/cmdline")
    begun = time.monotonic()
    assert [lines.read(path, 100, "/a", now) for now in range(0, 600, 2)] == [None] * 300
    assert time.monotonic() - begun < 2 * command_line.WAIT_SECONDS
    assert lines.left_out == 300
    assert lines.read(Path("/proc/self/cmdline"), 100, "/b", 0)


def test_the_agent_with_a_withheld_command_line(agent: Agent, server: int, host: ContainerHost, port: int) -> None:
    """Others' wrong replies are found, it stays healthy, and it stops when it is told to."""
    with host.container.socket() as client, host.node.socket() as other:
        client.sendto(b"request", (host.ETH0, PORT))
        agent.counted(PORT, 1)
        other.bind(("0.0.0.0", port))
        other.sendto(*ask(client, host.ETH0, port, other))
    agent.counted(port, 1)
    assert agent.get("/healthz")[0] == 200
    (row,) = [row for row in agent.snapshot()["rows"] if row["port"] == PORT]
    assert (row["sender"]["pid"], row["sender"]["command"]) == (server, "")
    begun = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - begun < 5
