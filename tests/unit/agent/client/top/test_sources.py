"""Where `udpwatch top` takes its snapshots from: an agent's socket, or an agent of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from repository import GOLDEN
from top_snapshots import NOW, row, snapshot
from waiting import wait_for

from udpwatch.agent.cli import main
from udpwatch.agent.client.top import sources
from udpwatch.agent.client.top.sources import AgentSource, open_agent
from udpwatch.agent.errors import CannotRun, UdpwatchError

EVENTS = GOLDEN / "events.jsonl"


class FakeAgent:
    """Responds on a socket, one connection at a time, until it is closed."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any]], bytes]) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answer = answer
        self._connection: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self._connection = self._listener.accept()[0]
            except OSError:
                return
            with self._connection, self._connection.makefile("rb") as lines:
                try:
                    for line in lines:
                        self._connection.sendall(self._answer(json.loads(line)) + b"\n")
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._connection:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)


def whole(_: dict[str, Any]) -> bytes:
    return json.dumps({"v": 1, "snapshot": asdict(snapshot(row(count=7))), "events": [{"port": 1}]}).encode()


def test_restarted_agent_is_reconnected(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    agent = FakeAgent(path, whole)
    source = AgentSource(path)
    assert source.read().snapshots[0].rows[0].count == 7
    assert source.events(5) == [{"port": 1}]
    agent.close()
    with pytest.raises(OSError):
        source.read()
    with pytest.raises(OSError):
        source.read()
    agent = FakeAgent(path, whole)
    assert source.read().time == NOW
    source.close()
    agent.close()


@pytest.mark.parametrize(
    "answer", [b"220 mail ready", b"[]", b"7", b'{"v": 1, "snapshot": {}}', b'{"v": 2}', b'{"v": 1}']
)
def test_response_that_is_not_an_agents_is_a_temporary_error(tmp_path: Path, answer: bytes) -> None:
    agent = FakeAgent(tmp_path / "a.sock", lambda _: answer)
    with pytest.raises(OSError):
        AgentSource(tmp_path / "a.sock").read()
    agent.close()


def test_missing_agent_is_an_error_that_says_what_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEFAULT_SOCKET", tmp_path / "default.sock")
    with pytest.raises(UdpwatchError, match=r"cannot connect to .*other\.sock: .*start an agent with `udpwatch run`"):
        open_agent(str(tmp_path / "other.sock"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CannotRun, match="run this as root"):
        open_agent(None)


def test_private_agent_writes_no_events_and_serves_no_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVENTS", "DNS", "CGROUP", "HEAL"):
        monkeypatch.setenv(f"UDPWATCH_{name}", "x")
    told = {name: value for name, value in sources._environment().items() if name.startswith("UDPWATCH_")}
    assert told == {"UDPWATCH_CGROUP": "x", "UDPWATCH_MAX_SERIES": "10000", "UDPWATCH_MAX_SERVERS": "2000"}


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this process and its children make temporary folders; at first it is empty."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:  # pytest's paths are too long for a Unix socket
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_replay_prints_the_recording_and_leaves_no_files(
    capsys: pytest.CaptureFixture[str], temporary_folder: Path
) -> None:
    assert main(["top", "--replay", str(EVENTS), "--once", "--json", "--interval", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(each["total"] for each in told["findings"]) > 0
    assert told["nodes"][0]["mode"] == "replay"
    assert list(temporary_folder.iterdir()) == []


def test_replay_of_a_missing_file_is_an_error_that_names_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["top", "--replay", str(tmp_path / "none.jsonl"), "--once"]) == 1
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--interval", "0"], ["--interval", "x"], ["--connect", "a", "--prometheus", "b"]])
def test_wrong_usage_ends_with_status_2(words: list[str]) -> None:
    assert main(["top", *words]) == 2


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "udpwatch.agent.cli", "top", "--replay", str(EVENTS), "--interval", "0.2", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_private_agent_ends_with_top(number: signal.Signals, temporary_folder: Path) -> None:
    with start("--json") as process:
        assert process.stdout
        json.loads(process.stdout.readline())
        (agent,) = children_of(process.pid)
        process.send_signal(number)
        status = process.wait(20)
        assert process.stderr
        assert process.stderr.read() == ""
    assert status == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(number, 0)
    wait_for(lambda: ended(agent), "the end of the private agent")
    assert list(temporary_folder.iterdir()) == []


def test_closed_output_ends_top_quietly() -> None:
    with start() as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr
        assert process.stderr.read() == ""


def test_top_ends_with_an_error_when_its_private_agent_ends() -> None:
    with start("--json") as process:
        assert process.stdout
        json.loads(process.stdout.readline())
        (agent,) = children_of(process.pid)
        os.kill(agent, signal.SIGKILL)
        assert process.wait(20) == 1
        assert process.stderr
        assert "replay of events.jsonl has ended" in process.stderr.read()


def test_plain_output_does_not_import_textual() -> None:
    code = "import sys, udpwatch.agent.client.top.prometheus; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
