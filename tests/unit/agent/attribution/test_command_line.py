"""Command lines that cannot be read: /proc/PID/cmdline is a FIFO that nobody writes to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.attribution import command_line
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.process import Process, Processes
from udpwatch.agent.attribution.runtime import Runtime, Runtimes

ID = "3f2a" * 16


class Withheld:
    """A file whose readers wait until it is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._writer = os.open(path, os.O_RDWR)

    def release(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
        self._writer = -1


@pytest.fixture
def withhold() -> Iterator[Callable[[Path], Withheld]]:
    made: list[Withheld] = []

    def make(path: Path) -> Withheld:
        made.append(Withheld(path))
        return made[-1]

    yield make
    for each in made:
        each.release()
    wait_for_readers(0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "WAIT_SECONDS", 0.02)


def readers() -> int:
    return sum(thread.name == "command line" for thread in threading.enumerate())


def wait_for_readers(number: int) -> None:
    wait_for(lambda: readers() == number, f"{number} threads")


def test_each_tenant_that_withholds_command_lines_blocks_one_thread(
    tmp_path: Path, withhold: Callable[[Path], Withheld]
) -> None:
    lines = CommandLines()
    path = withhold(tmp_path / "cmdline").path
    for _ in range(100):
        assert lines.read(path, 10, "/a", 0) is None
    assert readers() == 1
    assert lines.left_out == 100
    (tmp_path / "other").write_bytes(b"server\0-v\0")
    assert lines.read(tmp_path / "other", 10, "/b", 0) == b"server\0-v\0"
    assert lines.left_out == 100


def test_the_number_of_threads_is_bounded(tmp_path: Path, withhold: Callable[[Path], Withheld]) -> None:
    lines = CommandLines()
    path = withhold(tmp_path / "cmdline").path
    for number in range(3 * command_line.MAX_ABANDONED):
        assert lines.read(path, 10, f"/{number}", 0) is None
    assert readers() == command_line.MAX_ABANDONED
    assert lines.left_out == 3 * command_line.MAX_ABANDONED
    assert lines.read(path, 10, "/a", 1e6) is None  # however long it takes
    assert readers() == command_line.MAX_ABANDONED


def test_tenant_that_withheld_is_read_again_after_a_pause(tmp_path: Path, withhold: Callable[[Path], Withheld]) -> None:
    """A tenant that withholds for a moment at a time delays the agent once a minute."""
    lines = CommandLines()
    withheld = withhold(tmp_path / "cmdline")
    assert lines.read(withheld.path, 10, "/a", 0) is None
    withheld.release()
    wait_for_readers(0)
    (tmp_path / "other").write_bytes(b"server")
    assert lines.read(tmp_path / "other", 10, "/a", command_line.REST_SECONDS - 1) is None
    assert lines.read(tmp_path / "other", 10, "/a", command_line.REST_SECONDS + 1) == b"server"
    assert lines.left_out == 2


def test_no_descriptors_are_left_open(tmp_path: Path, withhold: Callable[[Path], Withheld]) -> None:
    withheld = withhold(tmp_path / "cmdline")
    (tmp_path / "other").write_bytes(b"server")
    lines = CommandLines()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(command_line.MAX_ABANDONED):
        lines.read(withheld.path, 10, f"/{number}", 0)
        lines.read(tmp_path / "other", 10, "/other", 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + command_line.MAX_ABANDONED
    withheld.release()
    wait_for_readers(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_command_line_is_unknown_when_no_thread_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup's process limit counts threads, too."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "cmdline").write_bytes(b"server")
    lines = CommandLines()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert lines.read(tmp_path / "cmdline", 10, "/a", 0) is None
    assert lines.read(tmp_path / "cmdline", 10, "/a", command_line.REST_SECONDS) == b"server"


def make(root: Path, pid: int, name: str, cgroup: str, parent: int = 1) -> Path:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "comm").write_text(f"{name}\n")
    (folder / "cgroup").write_text(f"0::{cgroup}\n")
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} {pid}")
    return folder


def test_process_that_withholds_its_command_line_is_named_all_the_same(
    tmp_path: Path, withhold: Callable[[Path], Withheld]
) -> None:
    lines = CommandLines()
    withhold(make(tmp_path, 7, "server", f"/docker/{ID}") / "cmdline")
    found = Processes(tmp_path, lines).lookup(7, "server", 1, 0)
    assert found == Process("server", cgroups=(f"/docker/{ID}",), unified=f"/docker/{ID}")
    assert lines.left_out == 1


def test_other_processes_of_a_tenant_that_withholds_are_not_read(
    tmp_path: Path, withhold: Callable[[Path], Withheld]
) -> None:
    """A tenant can name the cgroups below its own, and gets no share for each of them."""
    processes = Processes(tmp_path, CommandLines())
    withhold(make(tmp_path, 7, "server", f"/docker/{ID}/1") / "cmdline")
    (make(tmp_path, 8, "server", f"/docker/{ID}/2") / "cmdline").write_bytes(b"server")
    (make(tmp_path, 9, "server", "/system.slice/named.service") / "cmdline").write_bytes(b"server")
    assert [processes.lookup(pid, "server", 1, 0).command for pid in (7, 8, 9)] == ["", "", "server"]


def test_runtime_is_found_above_a_process_that_claims_to_be_one_and_withholds(
    tmp_path: Path, withhold: Callable[[Path], Withheld]
) -> None:
    place = f"/docker/{ID}"
    shim = make(tmp_path, 10, "containerd-shim", "/system.slice/containerd.service")
    (shim / "cmdline").write_text(f"containerd-shim\0-namespace\0moby\0-id\0{ID}\0")
    withhold(make(tmp_path, 11, "conmon", f"{place}/below", 10) / "cmdline")
    make(tmp_path, 12, "server", place, 11)
    assert Runtimes(tmp_path, CommandLines()).lookup(12, place, 0) == Runtime("docker", ID)
