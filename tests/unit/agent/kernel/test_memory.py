"""The memory limit of a process's cgroups, from files as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from udpwatch.agent.kernel.memory import read_memory
from udpwatch.agent.model import Memory

NO_LIMIT = f"{(1 << 63) - 4096}\n"  # of v1


def v2(folder: Path, limits: dict[str, tuple[str, int, int]], cgroup: str = "0::/kube/pod\n") -> Path:
    """Write a /proc/self and a mount of v2; ``limits``: cgroup -> memory.max, memory.current, inactive files."""
    (folder / "mountinfo").write_text(f"1 1 0:1 / {folder}/fs rw - cgroup2 cgroup2 rw\n")
    (folder / "cgroup").write_text(cgroup)
    for name, (limit, used, files) in limits.items():
        at = folder / "fs" / name
        at.mkdir(parents=True, exist_ok=True)
        (at / "memory.max").write_text(f"{limit}\n")
        (at / "memory.current").write_text(f"{used}\n")
        (at / "memory.stat").write_text(f"anon 5\nfile 9\ninactive_file {files}\n")
    return folder


def v1(folder: Path, limit: str, used: int, files: int) -> Path:
    (folder / "mountinfo").write_text(
        f"1 1 0:1 / {folder}/memory rw - cgroup cgroup rw,memory\n2 1 0:2 / {folder}/fs rw - cgroup2 cgroup2 rw\n"
    )
    (folder / "cgroup").write_text("4:memory:/pod\n0::/\n")
    at = folder / "memory" / "pod"
    at.mkdir(parents=True)
    (at / "memory.limit_in_bytes").write_text(limit)
    (at / "memory.usage_in_bytes").write_text(f"{used}\n")
    (at / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {files}\n")
    return folder


def test_v2_files_that_can_be_dropped_are_not_in_use(tmp_path: Path) -> None:
    assert read_memory(v2(tmp_path, {"kube/pod": ("1000", 700, 100)})) == Memory(600, 1000)


def test_v2_cgroup_nearest_to_its_limit_counts(tmp_path: Path) -> None:
    limits = {"kube": ("4000", 3900, 0), "kube/pod": ("1000", 700, 0)}
    assert read_memory(v2(tmp_path, limits)) == Memory(3900, 4000)


def test_v1_beside_an_empty_v2(tmp_path: Path) -> None:
    assert read_memory(v1(tmp_path, "1000\n", 900, 300)) == Memory(600, 1000)


@pytest.mark.parametrize("limit", ["max", "", "words", "0"])
def test_v2_without_a_limit(tmp_path: Path, limit: str) -> None:
    assert read_memory(v2(tmp_path, {"kube/pod": (limit, 700, 0)})) is None


def test_v1_without_a_limit(tmp_path: Path) -> None:
    assert read_memory(v1(tmp_path, NO_LIMIT, 900, 300)) is None


def test_nothing_readable_is_no_limit(tmp_path: Path) -> None:
    assert read_memory(tmp_path / "nothing") is None
