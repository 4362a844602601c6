"""Paths of cgroups by their ids, on trees of folders that the tests make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udpwatch.agent.attribution import cgroups
from udpwatch.agent.attribution.cgroups import Cgroups

ID = "3f2a" * 16


def test_id_leads_to_the_path(tmp_path: Path) -> None:
    (tmp_path / "docker" / ID).mkdir(parents=True)
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker").stat().st_ino, 0) == "/docker"
    assert tree.path((tmp_path / "docker" / ID).stat().st_ino, 0) == f"/docker/{ID}"


def test_path_of_a_removed_cgroup_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / ID
    folder.mkdir()
    number = folder.stat().st_ino
    tree = Cgroups(tmp_path)
    assert tree.path(number, 0) == f"/{ID}"
    folder.rmdir()
    assert tree.path(number, 1e6) == f"/{ID}"


def test_unknown_id_costs_one_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    monkeypatch.setattr(Cgroups, "_walk", None)
    assert tree.path(1 << 60, 1e6) == ""
    assert tree.path(0, 1e6) == ""


def test_walks_take_at_most_a_tenth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 101.0, 200.0, 201.0))  # a walk takes a second
    monkeypatch.setattr(cgroups.time, "monotonic", lambda: next(clock))
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 100) == ""
    (tmp_path / "new").mkdir()
    number = (tmp_path / "new").stat().st_ino
    assert tree.path(number, 108) == ""
    assert tree.path(number, 109) == "/new"


def test_walk_of_a_large_tree_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MAX_CGROUPS", 10)
    for number in range(50):
        (tmp_path / str(number)).mkdir()
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    assert len(tree._paths) <= 10


def make_tree(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).mkdir(parents=True)


def test_subtree_of_9000_cgroups_hides_no_container(tmp_path: Path) -> None:
    delegated = [f"user.slice/user-1000.slice/user@1000.service/{number}" for number in range(9000)]
    pods = [f"kubepods.slice/kubepods-burstable.slice/pod{pod}.slice/{part}" for pod in range(110) for part in range(4)]
    containers = [f"docker/{number}" for number in range(1000)]
    make_tree(tmp_path, *delegated, *pods, *containers)
    tree = Cgroups(tmp_path)
    for path in (*pods, *containers):
        assert tree.path((tmp_path / path).stat().st_ino, 0) == f"/{path}"
    noted = sum(path.startswith("/user.slice") for _, path in tree._paths._values.values())
    assert noted > cgroups.MAX_CGROUPS / 2
    # Of the delegated tree's, 9,000 and three folders above.
    assert tree.left_out == 9003 - noted


@pytest.mark.parametrize("name", ["a", "z"])
@pytest.mark.parametrize("shape", ["wide", "deep", "both"])
def test_large_subtree_leaves_other_subtrees_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    """Its place in the order and its parent do not matter."""
    monkeypatch.setattr(cgroups, "MAX_CGROUPS", 200)
    hostile = {
        "wide": [f"docker/{name}/{number}" for number in range(1000)],
        "deep": [f"docker/{name}/" + "/".join(["x"] * 20 + [str(number)]) for number in range(1000)],
        "both": [f"docker/{name}/{number // 30}/{number % 30}" for number in range(900)],
    }[shape]
    others = [f"docker/m{number}/init.scope" for number in range(40)]
    make_tree(tmp_path, *hostile, *others)
    tree = Cgroups(tmp_path)
    for path in others:
        assert tree.path((tmp_path / path).stat().st_ino, 0) == f"/{path}"
    assert len(tree._paths) <= 200
    assert tree.left_out > 0


def test_no_cgroup_of_a_small_tree_is_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, *(f"{number % 10}/{number}/a/b" for number in range(1000)))
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    assert (tree.left_out, len(tree._paths)) == (0, 10 + 3000 + 1)  # and the one that is not there


def test_walk_ends_at_the_limit_of_depth(tmp_path: Path) -> None:
    make_tree(tmp_path, "/".join(["x"] * (cgroups.MAX_DEPTH + 5)), "docker/a")
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker/a").stat().st_ino, 0) == "/docker/a"
    assert len(tree._paths) == cgroups.MAX_DEPTH + 2
    assert tree.left_out == 1


def test_paths_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, "/".join(["x" * 250] * 10), "docker/a")
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker/a").stat().st_ino, 0) == "/docker/a"
    assert max(len(path) for _, path in tree._paths._values.values()) <= cgroups.MAX_PATH + 255
    assert tree.left_out == 1


def test_cgroup_removed_during_the_walk_does_not_hide_its_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path, *(f"docker/{number}" for number in range(10)))
    below = cgroups._below
    numbers = {number: (tmp_path / f"docker/{number}").stat().st_ino for number in range(10)}

    def remove_others(status: os.stat_result) -> int:
        for number in range(3):
            if status.st_ino != numbers[number] and (tmp_path / f"docker/{number}").exists():
                (tmp_path / f"docker/{number}").rmdir()
        return below(status)

    tree = Cgroups(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cgroups, "_below", remove_others)
        tree.path(1 << 60, 0)
    assert all(tree.path(numbers[number], 0) == f"/docker/{number}" for number in range(3, 10))
    assert tree.left_out == 0


def test_without_cgroup_v2_no_path_is_known() -> None:
    for root in (None, Path("/nowhere")):
        assert Cgroups(root).path(7, 0) == ""
        assert not Cgroups(root).is_removed("/a", 0)


def test_only_a_watched_cgroup_can_be_reported_as_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tree = Cgroups(tmp_path)
    for path in ("/a", "/b", "/../a", "/\0"):
        tree.watch(path, 0)
    assert not tree.is_removed("/a", 1)
    (tmp_path / "a").rmdir()
    assert tree.is_removed("/a", 2)
    # The end of a cgroup that was never seen is unknown.
    assert not any(tree.is_removed(path, 2) for path in ("/b", "/../a", "/\0", "/never"))
    (tmp_path / "a").mkdir()
    assert not tree.is_removed("/a", 3)
