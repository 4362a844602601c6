"""What an agent knows outlives it (--state): restarts, kills and upgrades lose no reply and count none twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import Agent, before_all, run_cli
from repository import AGENT, BPF, DNS
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.kernel.mounts import open_private
from udpwatch.agent.testing.lab import ContainerHost

WINDOW = 3  # seconds: how long another version's programs learn


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder in a bpffs of its own, which ends with this process."""
    fd = open_private("bpf")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}/udpwatch")
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with other layouts of the records that the programs and the agent share."""
    tree = tmp_path_factory.mktemp("next")
    for source, name in ((AGENT, "agent"), (BPF, "bpf"), (DNS, "dns")):
        shutil.copytree(source, tree / "udpwatch" / name, ignore=shutil.ignore_patterns("__pycache__"))
    header, mirror = tree / "udpwatch/bpf/records.h", tree / "udpwatch/agent/kernel/records.py"
    changes = {
        header: {
            "struct finding {\n": "struct finding {\n    __u64 novelty;\n",
            "struct finding_key {\n": "struct finding_key {\n    __u64 novelty;\n",
            "struct event {\n": "struct event {\n    __u64 novelty;\n",
            "struct server_counts {\n": "struct server_counts {\n    __u64 novelty[2];\n",
            "struct server_key {\n": "struct server_key {\n    __u64 novelty;\n",
            "struct conversation {\n": "struct conversation {\n    __u64 novelty;\n",
        },
        mirror: {
            r"class FindingValue\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64),',
            r"class FindingKey\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64),',
            r"class EventRecord\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64),',
            r"class ServerCounts\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64 * 2),',
            r"class ServerKey\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64),',
            r"class ConversationRecord\(.*?_fields_ = \[": '\\g<0>("novelty", c_uint64),',
        },
    }
    for path, replacements in changes.items():
        text = path.read_text()
        for pattern, replacement in replacements.items():
            text, times = re.subn(pattern if path == mirror else re.escape(pattern), replacement, text, flags=re.DOTALL)
            assert times == 1, pattern
        path.write_text(text)
    text = mirror.read_text()
    for attribute in ("words, numbers = SERVER_COUNTS_BYTES // 8",):
        assert attribute in text
    return tree


class Stream:
    """Wrong replies in the background, until the block ends: `sent` then says how many."""

    def __init__(self, host: ContainerHost, port: int) -> None:
        self.sent = 0
        self._host, self._port = host, port
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopping.is_set():
            wrong_replies(self._host, self._port, 2_000)
            self.sent += 2_000

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()


def more_are_counted(agent: Agent, port: int) -> None:
    """Wait until an agent counts wrong replies."""
    before = agent.wrong(port)
    wait_for(lambda: agent.wrong(port) > before, "more wrong replies")


def settled(state: Path) -> None:
    """Wait until one generation of programs is left."""
    wait_for(lambda: len(list(state.glob("*/manifest"))) == 1, "the end of the other version's programs")


def test_replies_are_counted_while_no_agent_runs(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    with Agent(folder, f"--state={state}") as agent:
        wrong_replies(host, port, 10)
        agent.counted(port, 10)
        assert agent.stop() == 0
    wrong_replies(host, port, 7)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, 17) == 17
        wrong_replies(host, port, 3)
        assert agent.counted(port, 20) == 20
        agent.stop(signal.SIGKILL)
    wrong_replies(host, port, 5)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, 25) == 25
    assert "were removed" in run_cli("detach", f"--state={state}").stdout
    assert not state.exists()


def test_restarts_under_load_lose_nothing_and_count_nothing_twice(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    with Agent(folder, f"--state={state}") as agent, Stream(host, port) as stream:
        more_are_counted(agent, port)
        agent.stop()
        for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            with Agent(folder, f"--state={state}") as another:
                more_are_counted(another, port)
                another.stop(end)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, stream.sent) == stream.sent


def test_upgrade_to_another_layout_loses_nothing_and_counts_nothing_twice(
    host: ContainerHost, folder: Path, port: int, state: Path, next_version: Path
) -> None:
    flags = (f"--state={state}", f"--window={WINDOW}")
    env = os.environ | before_all(next_version)
    with Agent(folder, *flags) as agent, Stream(host, port) as stream:
        more_are_counted(agent, port)
        agent.stop()
        with Agent(folder, *flags, env=env) as another:
            more_are_counted(another, port)
            settled(state)
            more_are_counted(another, port)
            another.stop(signal.SIGKILL)
        with Agent(folder, *flags) as another:
            settled(state)
            more_are_counted(another, port)
    with Agent(folder, *flags) as agent:
        assert agent.counted(port, stream.sent) == stream.sent
