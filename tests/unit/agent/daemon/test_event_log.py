"""The event writer: events that cannot be written are counted, and nothing waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.daemon import event_log
from udpwatch.agent.daemon.event_log import EventWriter
from udpwatch.agent.errors import UdpwatchError


class Losses:
    """Counts the losses of a writer."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.broken = threading.Event()

    def writer(self, target: str) -> EventWriter:
        return EventWriter(target, self.stages.append, self.broken.set)


def test_stop_writes_all_queued_lines(tmp_path: Path) -> None:
    losses = Losses()
    writer = losses.writer(str(tmp_path / "events"))
    writer.start()
    for number in range(100):
        writer.put({"n": number})
    writer.stop()
    assert [json.loads(line)["n"] for line in (tmp_path / "events").read_text().splitlines()] == list(range(100))
    assert losses.stages == []


def test_events_are_appended_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("before\n")
    writer = Losses().writer(str(tmp_path / "events"))
    writer.start()
    writer.put({})
    writer.stop()
    assert (tmp_path / "events").read_text() == "before\n{}\n"


def test_losses_on_a_full_device_are_counted() -> None:
    losses = Losses()
    writer = losses.writer("/dev/full")
    writer.start()
    for _ in range(10):
        writer.put({})
    writer.stop()
    assert losses.stages == ["output"] * 10


def test_losses_to_a_slow_reader_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the pipe: put() must always return at once."""
    monkeypatch.setattr(event_log, "MAX_QUEUED", 50)
    monkeypatch.setattr(event_log, "STOP_SECONDS", 0.1)
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

    wait_for(drain, "all lines")
    os.close(reader)


def test_fifo_is_written_again_when_its_reader_returns(tmp_path: Path) -> None:
    """A log shipper is restarted: events that it missed are counted, later ones arrive."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    losses = Losses()
    writer = losses.writer(str(pipe))
    writer.start()
    os.close(reader)
    writer.put({"n": 1})
    writer.put({"n": 2})
    wait_for(lambda: losses.stages == ["output"] * 2, "two losses")
    assert not losses.broken.is_set()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.put({"n": 3})
    writer.stop()
    assert os.read(reader, 100) == b'{"n":3}\n'
    os.close(reader)


def test_fifo_without_a_reader_does_not_delay_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UdpwatchError, match="cannot write events"):
        Losses().writer(str(tmp_path / "pipe"))


def test_half_a_line_on_a_full_disk_is_removed(tmp_path: Path) -> None:
    """The kernel writes what fits; a size limit of the process acts like a full disk."""
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
        wait_for(lambda: losses.stages == ["output"], "a loss")
        assert path.read_text() == '{"n":1}\n'
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.put({"n": 2})
        writer.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == '{"n":1}\n{"n":2}\n'


def test_deleted_file_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "events"
    writer = Losses().writer(str(path))
    writer.start()
    writer.put({"n": 1})
    wait_for(path.read_text, "a line")
    path.unlink()
    writer.put({"n": 2})
    wait_for(path.exists, "a new file")
    writer.stop()
    assert path.read_text() == '{"n":2}\n'


def test_losses_are_counted_while_the_folder_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    losses = Losses()
    writer = losses.writer(str(folder / "events"))
    writer.start()
    (folder / "events").unlink()
    folder.rmdir()
    writer.put({"n": 1})
    wait_for(lambda: losses.stages == ["output"], "a loss")
    folder.mkdir()
    writer.put({"n": 2})
    writer.stop()
    assert (folder / "events").read_text() == '{"n":2}\n'


def test_invalid_target_is_refused() -> None:
    with pytest.raises(UdpwatchError, match="cannot write events to '/nowhere/x'"):
        Losses().writer("/nowhere/x")


def test_writer_can_be_stopped_before_its_start(tmp_path: Path) -> None:
    """The agent closes what it opened even when it never started it."""
    Losses().writer(str(tmp_path / "events")).stop()


# ---- folders that other users can write to ----


NOBODY = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's files are needed: run this as root")


def refused(target: Path | str) -> str:
    with pytest.raises(UdpwatchError) as error:
        Losses().writer(str(target))
    assert "; use a file in a folder that no other user can write to, or - for standard output" in str(error.value)
    return str(error.value)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def test_file_in_a_world_writable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert f"every user can write to the folder {tmp_path};" in refused(tmp_path / "events")
    (tmp_path / "inner").mkdir()
    assert f"every user can write to the folder {tmp_path};" in refused(tmp_path / "inner" / "events")
    assert not (tmp_path / "events").exists()


@as_root
def test_file_in_another_users_folder_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    assert f"the folder {tmp_path} belongs to another user (uid {NOBODY})" in refused(tmp_path / "events")


def test_link_in_a_folder_that_others_can_write_to_is_refused(shared: Path, tmp_path: Path) -> None:
    """Through it, the agent would append to any file that root can write."""
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    (shared / "events").symlink_to(precious)
    assert f"{shared}/events is a symbolic link in a folder that others can write to" in refused(shared / "events")
    (shared / "events").unlink()
    (shared / "folder").symlink_to(tmp_path)
    assert f"{shared}/folder is a symbolic link" in refused(shared / "folder" / "precious")
    os.link(precious, shared / "hard")
    assert f"{shared}/hard is a hard link, in a folder that" in refused(shared / "hard")
    assert precious.read_text() == "precious\n"


@as_root
def test_another_users_file_in_a_shared_folder_is_refused(shared: Path) -> None:
    (shared / "events").touch()
    os.chown(shared / "events", NOBODY, NOBODY)
    refused(shared / "events")


@as_root
def test_file_in_a_group_writable_folder_of_root_is_accepted(tmp_path: Path) -> None:
    """On some distributions /var/log belongs to root:syslog with mode 0775."""
    tmp_path.chmod(0o775)
    os.chown(tmp_path, 0, NOBODY)
    write_one(tmp_path / "events")
    (tmp_path / "link").symlink_to(tmp_path / "events")
    assert "is a symbolic link" in refused(tmp_path / "link")


def write_one(target: Path | str) -> None:
    writer = Losses().writer(str(target))
    writer.start()
    writer.put({"n": 1})
    writer.stop()


def test_own_file_in_a_sticky_folder_is_accepted(shared: Path) -> None:
    write_one(shared / "events")
    assert (shared / "events").read_text() == '{"n":1}\n'


def test_links_that_only_root_could_make_are_followed(tmp_path: Path) -> None:
    """For example a folder and a file that root has moved elsewhere."""
    (tmp_path / "data" / "logs").mkdir(parents=True)
    (tmp_path / "logs").symlink_to("data/logs")
    (tmp_path / "data" / "logs" / "events").symlink_to(tmp_path / "data" / "real")
    write_one(tmp_path / "logs" / "events")
    write_one(tmp_path / "data" / ".." / "data" / "real")
    assert (tmp_path / "data" / "real").read_text() == '{"n":1}\n' * 2


def test_endless_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert "Too many levels of symbolic links" in refused(tmp_path / "one")


@pytest.mark.parametrize("target", ["/", "/proc/self/root", "/tmp/.."])
def test_folder_as_target_is_refused(target: str) -> None:
    assert "Is a directory" in refused(target)


def test_own_descriptors_are_accepted() -> None:
    """/dev/stdout and `>(command)`, which is /dev/fd/N, are links that lead to no path."""
    reading, writing = os.pipe()
    write_one(f"/dev/fd/{writing}")
    assert os.read(reading, 100) == b'{"n":1}\n'
    os.close(reading)
    os.close(writing)
    script = """
from udpwatch.agent.daemon.event_log import EventWriter

writer = EventWriter("/dev/stdout", print, print)
writer.start()
writer.put({"n": 1})
writer.stop()
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, check=True, timeout=60)
    assert done.stdout == b'{"n":1}\n'


def test_link_in_place_of_a_rotated_file_is_not_followed(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """logrotate moved the file and another user was faster: events go to the moved file, which is logged once."""
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    writer = Losses().writer(str(shared / "events"))
    (shared / "events").rename(shared / "events.1")
    (shared / "events").symlink_to(precious)
    writer.start()
    writer.put({"n": 1})
    writer.put({"n": 2})
    writer.stop()
    assert precious.read_text() == "precious\n"
    assert (shared / "events.1").read_text() == '{"n":1}\n{"n":2}\n'
    assert [record.message for record in caplog.records if "symbolic link" in record.message] == [
        f"cannot open {shared}/events again: {shared}/events is a symbolic link in a folder that others can write to; "
        "writing to the former file"
    ]
