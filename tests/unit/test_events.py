"""The event writer: what cannot be written is counted, never waited for."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.views import events
from udpwatch.agent.views.events import EventWriter


class Losses:
    """Counts what a writer loses."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.broken = threading.Event()

    def writer(self, target: str) -> EventWriter:
        return EventWriter(target, self.stages.append, self.broken.set)


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_writes_lines_and_drains_on_stop(tmp_path: Path) -> None:
    losses = Losses()
    writer = losses.writer(str(tmp_path / "events"))
    writer.start()
    for number in range(100):
        writer.put({"n": number})
    writer.stop()
    assert [json.loads(line)["n"] for line in (tmp_path / "events").read_text().splitlines()] == list(range(100))
    assert losses.stages == []


def test_appends_to_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("before\n")
    writer = Losses().writer(str(tmp_path / "events"))
    writer.start()
    writer.put({})
    writer.stop()
    assert (tmp_path / "events").read_text() == "before\n{}\n"


def test_full_device_is_counted() -> None:
    losses = Losses()
    writer = losses.writer("/dev/full")
    writer.start()
    for _ in range(10):
        writer.put({})
    writer.stop()
    assert losses.stages == ["output"] * 10


def test_slow_reader_fills_the_queue_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads: put() must return at once, always."""
    monkeypatch.setattr(events, "MAX_QUEUED", 50)
    monkeypatch.setattr(events, "STOP_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    losses = Losses()
    writer = losses.writer(str(pipe))
    writer.start()
    line = {"filler": "x" * 4000}
    for _ in range(200):
        writer.put(line)
    assert losses.stages.count("queue") > 100
    writer.stop()
    # The reader wakes up: everything that was not counted as lost arrives.
    os.set_blocking(reader, False)
    received = b""

    def drain() -> bool:
        nonlocal received
        with contextlib.suppress(BlockingIOError):
            received += os.read(reader, 1 << 20)
        return received.count(b"\n") + losses.stages.count("queue") == 200

    eventually(drain)
    os.close(reader)


def test_fifo_whose_reader_goes_away_and_comes_back(tmp_path: Path) -> None:
    """A log shipper is restarted: what it missed is counted, what comes later arrives."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    losses = Losses()
    writer = losses.writer(str(pipe))
    writer.start()
    os.close(reader)
    writer.put({"n": 1})
    writer.put({"n": 2})
    eventually(lambda: losses.stages == ["output"] * 2)
    assert not losses.broken.is_set()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.put({"n": 3})
    writer.stop()
    assert os.read(reader, 100) == b'{"n":3}\n'
    os.close(reader)


def test_fifo_that_nobody_reads_does_not_hold_up_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UdpwatchError, match="cannot write events"):
        Losses().writer(str(tmp_path / "pipe"))


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """The kernel writes what fits: a size limit of the process is as full as a disk."""
    path = tmp_path / "events"
    losses = Losses()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        writer = losses.writer(str(path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
        writer.start()
        writer.put({"n": 1})
        writer.put({"long": "x" * 100})
        eventually(lambda: losses.stages == ["output"])
        assert path.read_text() == '{"n":1}\n'
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.put({"n": 2})
        writer.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == '{"n":1}\n{"n":2}\n'


def test_file_that_is_deleted_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "events"
    writer = Losses().writer(str(path))
    writer.start()
    writer.put({"n": 1})
    eventually(path.read_text)
    path.unlink()
    writer.put({"n": 2})
    eventually(path.exists)
    writer.stop()
    assert path.read_text() == '{"n":2}\n'


def test_folder_that_vanishes_is_counted_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    losses = Losses()
    writer = losses.writer(str(folder / "events"))
    writer.start()
    (folder / "events").unlink()
    folder.rmdir()
    writer.put({"n": 1})
    eventually(lambda: losses.stages == ["output"])
    folder.mkdir()
    writer.put({"n": 2})
    writer.stop()
    assert (folder / "events").read_text() == '{"n":2}\n'


def test_a_target_that_cannot_be() -> None:
    with pytest.raises(UdpwatchError, match="cannot write events to '/nowhere/x'"):
        Losses().writer("/nowhere/x")


def test_stopped_before_it_began(tmp_path: Path) -> None:
    """The agent closes what it opened, also when it never came to start it."""
    Losses().writer(str(tmp_path / "events")).stop()
