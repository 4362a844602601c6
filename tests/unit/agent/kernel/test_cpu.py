"""The CPU quota of a process's cgroups, from files as kernels write them, and a thread's share of the quota."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from udpwatch.agent.kernel.cpu import MAX_PAUSE_SECONDS, SLICE_SECONDS, Pace, quota


def tree(folder: Path, mounts: dict[str, str], cgroup: str, files: dict[str, str]) -> Path:
    """Write a /proc/self and mounts below ``folder``; ``mounts``: "FOLDER" -> "ROOT TYPE OPTIONS"."""
    lines = []
    for number, (point, rest) in enumerate(mounts.items()):
        root, kind, options = rest.split(" ")
        lines.append(f"{number} 1 0:{number} {root} {folder / point} rw - {kind} {kind} {options}\n")
    (folder / "mountinfo").write_text("".join(lines))
    (folder / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_v2_quota_in_a_cgroup_namespace(tmp_path: Path) -> None:
    proc = tree(tmp_path, {"fs": "/ cgroup2 rw"}, "0::/\n", {"fs/cpu.max": "50000 100000\n"})
    assert quota(proc) == 0.5


def test_v2_quota_is_the_smallest_up_to_the_root(tmp_path: Path) -> None:
    files = {"fs/kube/cpu.max": "20000 100000\n", "fs/kube/pod/cpu.max": "max 100000\n"}
    assert quota(tree(tmp_path, {"fs": "/ cgroup2 rw"}, "0::/kube/pod\n", files)) == 0.2


def test_v2_quota_without_a_cgroup_namespace(tmp_path: Path) -> None:
    proc = tree(tmp_path, {"fs": "/kube/pod cgroup2 rw"}, "0::/kube/pod\n", {"fs/cpu.max": "150000 100000\n"})
    assert quota(proc) == 1.5


def test_v1_quota_beside_an_empty_v2(tmp_path: Path) -> None:
    files = {"cpu/pod/cpu.cfs_quota_us": "30000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}
    files |= {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    mounts = {"cpu": "/ cgroup rw,cpu,cpuacct", "unified": "/ cgroup2 rw", "memory": "/ cgroup rw,memory"}
    assert quota(tree(tmp_path, mounts, "3:memory:/x\n2:cpu,cpuacct:/pod\n0::/\n", files)) == 0.3


@pytest.mark.parametrize("text", ["max 100000\n", "", "words\n", "1 0\n"])
def test_no_quota_without_a_limit_or_a_readable_file(tmp_path: Path, text: str) -> None:
    assert quota(tree(tmp_path, {"fs": "/ cgroup2 rw"}, "0::/\n", {"fs/cpu.max": text})) == math.inf
    assert quota(tmp_path / "nothing") == math.inf


class Thread:
    """A thread whose work and pauses are numbers."""

    def __init__(self, share: float, cpus: float) -> None:
        self.now = self.used = 0.0
        self.pauses: list[float] = []
        self.pace = Pace(share, lambda: cpus, lambda: self.now, lambda: self.used)
        self.pace.start(self._pause)

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds
        self.pace()


@pytest.mark.parametrize(("cpus", "expected"), [(math.inf, 0.2), (4.0, 0.2), (0.5, 0.1)])
def test_thread_keeps_to_its_share_of_the_quota(cpus: float, expected: float) -> None:
    thread = Thread(0.2, cpus)
    for _ in range(10_000):
        thread.work(0.0003)
    assert thread.used / thread.now == pytest.approx(expected, rel=0.01)


def test_pause_after_one_long_piece_of_work_is_bounded() -> None:
    thread = Thread(0.2, 0.1)
    thread.work(1.0)
    assert thread.pauses == [MAX_PAUSE_SECONDS]


def test_pauses_come_after_slices_of_work(tmp_path: Path) -> None:
    thread = Thread(0.2, 0.5)
    for _ in range(4):
        thread.work(SLICE_SECONDS / 4)
    assert thread.pauses == [pytest.approx(SLICE_SECONDS * 9)]
    thread.now += 10  # nothing to do
    thread.work(SLICE_SECONDS)
    assert len(thread.pauses) == 1, "it has rested already"
