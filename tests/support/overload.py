"""Faults of the node itself, made for real, and what the agent reports of them."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from agents import Agent, run_cli
from scene import ask, bound
from waiting import PATIENCE_SECONDS, wait_for

from udpwatch.agent.testing.lab import Namespace

WRONG = "udpwatch_reply_source_mismatch_total"
#: The stages at which an event is lost; at others, names or undecided replies are.
EVENT_STAGES = ("rate_limit", "ring_full", "findings_full", "queue", "output")
LIVING = 300  # containers at a time
PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


def compiled(name: str, folder: Path, *flags: str) -> Path:
    """Compile a C file of this folder."""
    binary = folder / name
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(["gcc", "-O2", *flags, "-o", binary, source], check=True)
    return binary


def pour(namespace: Namespace, port: int, times: int, names: int = 1, name: str = "pour", uid: int = 0) -> None:
    """Have a process send so many wrong replies over loopback, under so many names in turn."""
    with bound(namespace, socket.AF_INET, "0.0.0.0", port) as server, namespace.socket() as client:
        _, peer = ask(client, "127.0.0.2", port, server)

        def send() -> None:
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            for turn in range(times):
                if names > 1:
                    _libc.prctl(PR_SET_NAME, f"{name}-{turn % names}".encode(), 0, 0, 0)
                server.sendto(b"x", peer)

        assert namespace.spawn(name, send).wait() == 0


def lines_of(agent: Agent) -> int:
    """Return how many events the agent has written."""
    return agent.events_file.read_text().count("\n") if agent.events_file.exists() else 0


def counted(agent: Agent) -> int:
    """Return how many wrong replies are in rows and under `other`."""
    snapshot = agent.snapshot()
    return int(sum(row["count"] for row in snapshot["rows"]) + snapshot["other"])


def all_is_accounted(agent: Agent, sent: int, lines: Callable[[Agent], int] = lines_of) -> dict[str, int]:
    """Wait until rows and `other` are all wrong replies that were sent, and delivered and lost events are, too; return
    what was lost by stage. Nothing else that the agent watches may send wrong replies.
    """

    def sums() -> tuple[int, int]:
        lost = agent.snapshot()["lost"]
        return counted(agent), lines(agent) + sum(lost[stage] for stage in EVENT_STAGES)

    with suppress(AssertionError):
        wait_for(lambda: min(sums()) >= sent, "all to be accounted for")
    assert sums() == (sent, sent), (sums(), agent.snapshot()["lost"])
    assert (exported_count := agent.metric(WRONG)) == sent, exported_count
    lost: dict[str, int] = agent.snapshot()["lost"]
    exported = {stage: agent.metric("udpwatch_events_lost_total", stage=stage) for stage in EVENT_STAGES}
    assert exported == {stage: lost[stage] for stage in EVENT_STAGES}, (exported, lost)
    return lost


def top(agent: Agent) -> tuple[str, dict[str, Any]]:
    """Return what `udpwatch top` shows of the agent, as text and as the JSON of its node."""
    flags = ("top", "--once", "--interval=0.2", "--connect", str(agent.socket))
    table, told = run_cli(*flags), run_cli(*flags, "--json")
    assert (table.returncode, told.returncode) == (0, 0), table.stderr + told.stderr
    (node,) = json.loads(told.stdout)["nodes"]
    return table.stdout, node


class Clocks:
    """The wall clock and CLOCK_BOOTTIME of a process that runs with `environment`."""

    def __init__(self, folder: Path) -> None:
        self._library = compiled("clocks", folder, "-shared", "-fPIC")
        self._file = folder / "clocks.added"
        self.add()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_PRELOAD": str(self._library), "UDPWATCH_TEST_CLOCKS": str(self._file)}

    def add(self, wall: int = 0, boot: int = 0) -> None:
        """Let the clocks show so many seconds more than they do."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=qq", wall, boot))


class ManyNamespaces:
    """Processes in network namespaces of their own, each with a server (namespaces.c). A context manager."""

    def __init__(self, binary: Path, count: int, port: int) -> None:
        self._process = subprocess.Popen(
            [binary, str(count), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("made")

    def send(self) -> None:
        """Have each server send a wrong reply."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._expect("sent")

    def _expect(self, word: str) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == f"{word}\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def containers_that_answer_once(agent: Agent, parent: Path, namespace: Namespace, port: int, count: int) -> None:
    """Have a process move into so many cgroups with names of containers, one after the other, and send a wrong reply in
    each from a new socket. LIVING of them exist at a time, until the agent has counted them.
    """
    for first in range(0, count, LIVING):
        numbers = range(first, min(count, first + LIVING))
        folders = [parent / f"docker-{number:012x}{0:052x}.scope" for number in numbers]  # 12 digits are shown

        def live(folders: list[Path] = folders) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                for folder in folders:
                    folder.mkdir()
                    (folder / "cgroup.procs").write_text(str(os.getpid()))
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
                        server.bind(("0.0.0.0", port))
                        server.sendto(*ask(client, "127.0.0.2", port, server))
            (parent / "cgroup.procs").write_text(str(os.getpid()))

        assert namespace.spawn("short-lived", live).wait() == 0
        wait_for(lambda so_far=first + len(folders): counted(agent) >= so_far, "them to be counted")
        for folder in folders:
            folder.rmdir()


@contextmanager
def many_sockets(namespace: Namespace, count: int) -> Iterator[None]:
    """A process with so many UDP servers."""
    ready, theirs = os.pipe()

    def hold() -> None:
        import resource  # noqa: PLC0415 only the child

        # The child has the descriptors of the test process, too.
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 2_000, count + 2_000))
        held = []
        for number in range(count):
            held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            held[-1].bind(("127.0.0.1", 1024 + number))
        os.write(theirs, b"x")
        wait_for(lambda: False, "the end", 10 * PATIENCE_SECONDS)

    child = namespace.spawn("many-sockets", hold)
    try:
        os.close(theirs)
        assert os.read(ready, 1) == b"x"
        yield
    finally:
        os.close(ready)
        child.stop()


def started_in(cgroup: Path) -> Sequence[str]:
    """Return a wrapper that runs a command in a cgroup."""
    return ["sh", "-e", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh"]
