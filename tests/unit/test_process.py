"""From a thread's name and a process id to the process, on a /proc of our own making."""

from __future__ import annotations

from pathlib import Path

import pytest

from udpwatch.agent.enrich import process
from udpwatch.agent.enrich.process import Process, Processes


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    make(tmp_path, 7, "java", {7: "java", 8: "worker-1"}, "0::/pods/a\n")
    return tmp_path


def make(root: Path, pid: int, name: str, threads: dict[int, str], cgroup: str) -> None:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "comm").write_text(name + "\n")
    (folder / "cgroup").write_text(cgroup)
    for thread, comm in threads.items():
        (folder / "task" / str(thread)).mkdir(parents=True)
        (folder / "task" / str(thread) / "comm").write_text(comm + "\n")


def test_main_thread_gives_the_name(proc: Path) -> None:
    assert Processes(proc).lookup(7, "java", 0) == Process("java", "/pods/a")
    assert Processes(proc).lookup(7, "worker-1", 0) == Process("java", "/pods/a")


def test_no_name_from_the_kernel(proc: Path) -> None:
    assert Processes(proc).lookup(7, "", 0).name == "java"


def test_an_id_that_belongs_to_somebody_else_by_now(proc: Path) -> None:
    assert Processes(proc).lookup(7, "named", 0) == Process("named", None)


def test_a_process_that_is_gone(proc: Path) -> None:
    assert Processes(proc).lookup(99, "named", 0) == Process("named", None)
    assert Processes(proc).lookup(0, "", 0) == Process("unknown", None)


def test_hybrid_hierarchy(tmp_path: Path) -> None:
    make(tmp_path, 7, "a", {7: "a"}, "5:memory:/docker/x\n0::/unified/y\n")
    make(tmp_path, 8, "b", {8: "b"}, "5:memory:/docker/x\n")
    assert Processes(tmp_path).lookup(7, "a", 0).cgroup == "/unified/y"
    assert Processes(tmp_path).lookup(8, "b", 0).cgroup is None


def test_cache_ages_and_is_bounded(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(proc)
    assert processes.lookup(7, "java", 0).name == "java"
    (proc / "7" / "comm").write_text("renamed\n")
    assert processes.lookup(7, "java", process.KEEP_SECONDS - 1).name == "java"
    assert processes.lookup(7, "java", process.KEEP_SECONDS + 1).name == "renamed"
    monkeypatch.setattr(process, "MAX_PROCESSES", 5)
    for pid in range(100, 200):
        processes.lookup(pid, "x", 100)
    assert len(processes._cache) <= 6


def test_names_that_would_write_to_the_terminal(tmp_path: Path) -> None:
    make(tmp_path, 7, "a\x1b]0;x\x07", {7: "a"}, "")
    assert Processes(tmp_path).lookup(7, "", 0).name == "a\\x1b]0;x\\x07"
