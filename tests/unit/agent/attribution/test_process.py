"""From a thread's name and a process id to the process, on a /proc that the tests write."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from udpwatch.agent.attribution import process
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.process import Process, Processes

JAVA = Process("java", cgroups=("/pods/a",), unified="/pods/a")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    make(tmp_path, 7, "java", {7: "java", 8: "worker-1"}, "0::/pods/a\n")
    return tmp_path


def make(root: Path, pid: int, name: str, threads: dict[int, str], cgroup: str, cmdline: bytes = b"") -> Path:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "comm").write_text(name + "\n")
    (folder / "cgroup").write_text(cgroup)
    (folder / "cmdline").write_bytes(cmdline)
    for thread, comm in threads.items():
        (folder / "task" / str(thread)).mkdir(parents=True)
        (folder / "task" / str(thread) / "comm").write_text(comm + "\n")
    return folder


def look(root: Path, pid: int, comm: str) -> Process:
    return Processes(root, CommandLines()).lookup(pid, comm, 1, 0)


def test_process_has_the_name_of_its_main_thread(proc: Path) -> None:
    assert look(proc, 7, "java") == JAVA
    assert look(proc, 7, "worker-1") == JAVA


def test_name_is_read_from_proc_when_the_kernel_gave_none(proc: Path) -> None:
    assert look(proc, 7, "").name == "java"


def test_reused_process_id_gives_nothing_of_the_new_process(proc: Path) -> None:
    assert look(proc, 7, "named") == Process("named")


def test_name_from_the_kernel_stands_when_there_are_too_many_threads_to_read(tmp_path: Path) -> None:
    """Reading thousands of names would delay events for too long."""
    read: list[str] = []
    make(tmp_path, 7, "java", {number: f"t{number}" for number in range(7, 7 + 4 * process.MAX_THREADS)}, "0::/a\n")
    with pytest.MonkeyPatch.context() as patch:
        name = process._name
        patch.setattr(process, "_name", lambda path: read.append(path.parent.name) or name(path))
        assert look(tmp_path, 7, "gone") == Process("gone")
    assert len(read) == 1 + process.MAX_THREADS
    assert look(tmp_path, 7, f"t{read[1]}") == Process("java", cgroups=("/a",), unified="/a")


def test_process_that_has_ended_is_unknown(proc: Path) -> None:
    assert look(proc, 99, "named") == Process("named")
    assert look(proc, 0, "") == Process("unknown")


def test_process_that_ends_during_the_lookup_keeps_what_was_read(tmp_path: Path) -> None:
    folder = make(tmp_path, 7, "java", {7: "java"}, "")
    (folder / "cgroup").unlink()
    assert look(tmp_path, 7, "java") == Process("java")
    (folder / "cgroup").write_text("0::/a\n")
    (folder / "cmdline").unlink()
    assert look(tmp_path, 7, "java") == Process("java", cgroups=("/a",), unified="/a")


@pytest.mark.parametrize(
    ("lines", "paths"),
    [
        ("0::/a\n", ("/a",)),
        ("", ()),
        ("0::/\n", ("/",)),
        ("5:memory:/docker/x\n0::/unified/y\n", ("/unified/y", "/docker/x")),
        ("9:memory:/m\n1:name=systemd:/s\n2:cpu,cpuacct:/m\n", ("/s", "/m")),
        ("0::/a:b:c\n", ("/a:b:c",)),
        ("0::/a (deleted)\n", ("/a",)),
        ("nonsense\n0::/a\n", ("/a",)),
        *((f"0::/a{end}0::/docker/x\n", (f"/a{end}0::/docker/x",)) for end in "\r\v\f\x1c\x1d\x1e\x85\u2028"),
    ],
    ids=[
        "v2",
        "none",
        "root",
        "hybrid",
        "v1",
        "colons",
        "removed cgroup",
        "invalid line",
        *(f"one name {end}" for end in range(8)),
    ],
)
def test_cgroups_of_all_hierarchies_are_read(tmp_path: Path, lines: str, paths: tuple[str, ...]) -> None:
    make(tmp_path, 7, "a", {7: "a"}, lines)
    assert look(tmp_path, 7, "a").cgroups == paths


def test_command_line_is_quoted(tmp_path: Path) -> None:
    folder = make(tmp_path, 7, "a", {7: "a"}, "", b"/usr/sbin/a\0--name\0two words\0\0")
    (folder / "exe").symlink_to("/opt/a-1.2")
    found = look(tmp_path, 7, "a")
    assert found.command == "/usr/sbin/a --name 'two words'"
    assert found.executable == "/opt/a-1.2"


def test_executable_falls_back_to_the_command_line(tmp_path: Path) -> None:
    """Without permission to read the link, the first argument is taken if it is a path."""
    make(tmp_path, 7, "a", {7: "a"}, "", b"/usr/sbin/a\0-x\0")
    make(tmp_path, 8, "b", {8: "b"}, "", b"b: worker process")
    assert look(tmp_path, 7, "a").executable == "/usr/sbin/a"
    assert look(tmp_path, 8, "b").executable == ""


def test_replaced_executable_keeps_its_path(tmp_path: Path) -> None:
    (make(tmp_path, 7, "a", {7: "a"}, "") / "exe").symlink_to("/opt/a (deleted)")
    assert look(tmp_path, 7, "a").executable == "/opt/a"


def test_long_command_lines_are_cut(tmp_path: Path) -> None:
    make(tmp_path, 7, "a", {7: "a"}, "", b"java\0" + b"x" * 100_000)
    command = look(tmp_path, 7, "a").command
    assert len(command) <= process.MAX_COMMAND_BYTES + len("java '…'")
    assert "…" in command


def test_memory_for_a_hostile_process_is_bounded(tmp_path: Path) -> None:
    """Its names may have any length and content."""
    line = f"0::/{'a' * process.MAX_PATH}\n"
    folder = make(tmp_path, 7, "a", {7: "a"}, line + "1:cpu:/docker/x\n", b"'" * 5000)
    target = tmp_path
    for _ in range(15):
        target /= "\x1b" * 100
    (folder / "exe").symlink_to(target)
    found = look(tmp_path, 7, "a")
    assert len(found.command) == process.MAX_COMMAND_CHARACTERS + 1
    assert len(found.executable) == process.MAX_PATH
    assert (found.cgroups, found.unified) == (("/docker/x",), "")


def test_cache_ages_and_is_bounded(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(proc, CommandLines())
    assert processes.lookup(7, "java", 1, 0).name == "java"
    (proc / "7" / "comm").write_text("renamed\n")
    assert processes.lookup(7, "java", 1, process.KEEP_SECONDS - 1).name == "java"
    assert processes.lookup(7, "java", 2, 0).name == "renamed"
    assert processes.lookup(7, "java", 1, process.KEEP_SECONDS + 1).name == "renamed"
    monkeypatch.setattr(process, "MAX_PROCESSES", 5)
    processes = Processes(proc, CommandLines())
    for pid in range(100, 200):
        processes.lookup(pid, "x", 1, 100)
    assert len(processes._cache) == 5


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    make(tmp_path, 7, "a\x1b]0;x\x07", {7: "a"}, "", b"a\x1b[2J\0\xff\0")
    found = look(tmp_path, 7, "")
    assert found.name == "a\\x1b]0;x\\x07"
    assert found.command == r"'a\x1b[2J' '\xff'"


def test_process_that_proc_hides_is_counted(tmp_path: Path) -> None:
    """As hidepid=invisible does for processes of other users; one that has ended is not counted."""
    processes = Processes(tmp_path, CommandLines())
    assert processes.lookup(os.getpid(), "hidden", 1, 0) == Process("hidden")
    assert processes.hidden == 1
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert processes.lookup(ended.pid, "ended", 1, 0) == Process("ended")
    assert processes.hidden == 1
