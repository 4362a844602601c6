"""Notifications to systemd, received by a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import GOLDEN

from udpwatch.agent.config import resolve
from udpwatch.agent.daemon import app, sensor_thread, systemd
from udpwatch.agent.daemon.app import App, Starting
from udpwatch.agent.sources.replay import Replay

RECORDING = GOLDEN / "replay.jsonl"


class Manager:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(10)

    def receive(self) -> str:
        return self._socket.recv(4096).decode()

    def received(self) -> list[str]:
        """Return the notifications that are there, without waiting."""
        self._socket.setblocking(False)
        found = []
        try:
            while True:
                found.append(self.receive())
        except BlockingIOError:
            return found
        finally:
            self._socket.settimeout(10)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield made
    made.close()


def test_notification_is_sent(manager: Manager) -> None:
    systemd.notify("READY=1")
    assert manager.receive() == "READY=1"


def test_notification_is_sent_to_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"udpwatch-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    systemd.notify("READY=1")
    assert manager.receive() == "READY=1"
    manager.close()


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    for address in ("", "vsock:2:1", str(tmp_path / "gone"), "/" + "a" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        systemd.notify("READY=1")


def test_notification_does_not_wait_for_a_manager_that_does_not_read(manager: Manager) -> None:
    begun = time.monotonic()
    for _ in range(2000):  # a socket holds 10 to 512 datagrams, by net.unix.max_dgram_qlen
        systemd.notify("WATCHDOG=1")
    assert time.monotonic() - begun < 10
    assert 0 < len(manager.received()) < 2000


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
    ids=["off", "on", "this process", "another process", "zero", "no number"],
)
def test_watchdog_interval_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: float | None
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert systemd.watchdog_seconds() == seconds


def test_only_samples_feed_the_watchdog(manager: Manager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While the sensor stands still, the event loop alone does not feed the watchdog."""
    go = threading.Event()
    sample = Replay.sample

    def sample_when_allowed(self: Replay, expire_ns: int) -> object:
        if threading.current_thread().name == "sensor":
            go.wait()
        return sample(self, expire_ns)

    monkeypatch.setattr(Replay, "sample", sample_when_allowed)
    monkeypatch.setattr(sensor_thread, "SAMPLE_SECONDS", 0.01)
    # The agent runs in the tests' own process, which must keep its capabilities for the tests that follow.
    monkeypatch.setattr(app.capabilities, "drop_all_but", lambda keep: None)
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)

    async def watch() -> None:
        flags = {"replay": str(RECORDING), "metrics_listen": "off", "socket": str(tmp_path / "s")}
        agent = App(resolve(flags, {}, None), Starting())
        running = asyncio.create_task(agent.run())
        receive = lambda: asyncio.to_thread(manager.receive)  # noqa: E731
        try:
            assert [await receive(), await receive()] == ["READY=1", "WATCHDOG=1"]  # the first sample is the start's
            await asyncio.sleep(0.5)
            assert manager.received() == []
            go.set()
            assert [await receive() for _ in range(3)] == ["WATCHDOG=1"] * 3
        finally:
            go.set()
            agent._done.set()
            await running
        assert "STOPPING=1" in manager.received()

    asyncio.run(watch())
