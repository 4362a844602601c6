"""Docker's names, the runtime's watching process, and cgroups by their ids: on trees of our own making."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from udpwatch.agent.attribution import cgroups, docker, runtime
from udpwatch.agent.attribution.cgroups import Cgroups
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.docker import DockerNames
from udpwatch.agent.attribution.runtime import Runtime, Runtimes

ID = "3f2a" * 16

# ---- Docker's names ----


def state(root: Path, content: bytes, number: str = ID) -> Path:
    folder = root / "containers" / number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.v2.json").write_bytes(content)
    return root


def test_docker_name(tmp_path: Path) -> None:
    names = DockerNames(state(tmp_path, json.dumps({"ID": ID, "Name": "/web-1"}).encode()))
    assert names.lookup(ID, 0) == "web-1"
    state(tmp_path, b'{"Name": "/web-2"}')
    assert names.lookup(ID, docker.KEEP_SECONDS - 1) == "web-1"
    assert names.lookup(ID, docker.KEEP_SECONDS + 1) == "web-2"
    assert names.lookup("4" * 64, 0) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"Name": 7}', b'{"Name": null}', b"\xff\xfe", b"[" * 200_000],
    ids=["empty", "cut", "list", "null", "nameless", "number", "null name", "bytes", "deep"],
)
def test_docker_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    assert DockerNames(state(tmp_path, content)).lookup(ID, 0) == ""


def test_docker_file_too_large(tmp_path: Path) -> None:
    content = {"Name": "/web-1", "Env": "x" * docker.MAX_FILE_BYTES}
    assert DockerNames(state(tmp_path, json.dumps(content).encode())).lookup(ID, 0) == ""


def test_docker_name_that_would_write_to_the_terminal(tmp_path: Path) -> None:
    content = json.dumps({"Name": "/a\x1b[2J\ud800\u202e"}).encode()
    assert DockerNames(state(tmp_path, content)).lookup(ID, 0) == r"a\x1b[2J\ud800\x202e"


# ---- the process that watches over a container ----

SHIM = ["/usr/bin/containerd-shim-runc-v2", "-namespace", "moby", "-id", ID, "-address", "/run/containerd/c.sock"]
CONMON = ["/usr/bin/conmon", "--api-version", "1", "-c", ID, "-u", ID, "-r", "/usr/bin/crun", "-n"]
DOCKER, POD = f"/docker/{ID}", "/kubepods/pod0d6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a89"
WATCHERS = {
    "docker": (SHIM, DOCKER, Runtime("docker", ID)),
    "docker by systemd": (SHIM, f"/system.slice/docker-{ID}.scope", Runtime("docker", ID)),
    "ctr": ([*SHIM[:2], "default", "-id", "five"], "/default/five", Runtime("containerd", "five")),
    "kubernetes": ([*SHIM[:2], "k8s.io", "-id", "5" * 64], f"{POD}/{ID}", Runtime("containerd")),
    "podman": ([*CONMON, "web", "--full-attach"], f"/a/libpod-{ID}.scope/container", Runtime("podman", ID, "web")),
    "cri-o": ([*CONMON, "k8s_dns_dns-7c9_shop_uid_0"], f"{POD}/{ID}", Runtime("cri-o", ID)),
    "namespace": (SHIM, f"/../docker-{ID}.scope", Runtime("docker", ID)),
}


def process(root: Path, pid: int, parent: int, name: str, arguments: list[str], cgroup: str = "/a.service") -> None:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194560")
    (folder / "cmdline").write_text("\0".join(arguments) + "\0")
    (folder / "cgroup").write_text(f"0::{cgroup}\n")


def host(root: Path, watcher: list[str]) -> Path:
    """systemd, the watching process, the container's first process with a hostile name, the server."""
    process(root, 1, 0, "systemd", ["/sbin/init"])
    process(root, 10, 1, Path(watcher[0]).name[:15], watcher, f"/machine.slice/libpod-conmon-{ID}.scope")
    process(root, 11, 10, "a) S 1 (b", ["sh"])
    process(root, 12, 11, "server", ["server"])
    return root


@pytest.mark.parametrize(("watcher", "path", "told"), WATCHERS.values(), ids=WATCHERS)
def test_runtimes(tmp_path: Path, watcher: list[str], path: str, told: Runtime) -> None:
    assert Runtimes(host(tmp_path, watcher), CommandLines()).lookup(12, path, 0) == told


ALIEN = {
    "another container's": (SHIM, f"/docker/{'4' * 64}"),
    "no id": (["conmon", "-n", "billing-db"], DOCKER),
    "empty id": (["conmon", "-c", "", "-n", "billing-db"], DOCKER),
    "a part of the id": (["conmon", "-c", ID[:12], "-n", "billing-db"], DOCKER),
    "a folder above": (["conmon", "-c", "docker", "-n", "billing-db"], DOCKER),
    "a service": (["conmon", "-c", "web.service", "-n", "billing-db"], "/system.slice/web.service"),
    "a container in the container": (["conmon", "-c", ID, "-n", "billing-db"], f"{DOCKER}/docker/{'4' * 64}"),
    "a prefix that no runtime has": (["conmon", "-c", ID, "-n", "billing-db"], f"/x/odd-{ID}.scope"),
}


@pytest.mark.parametrize(("watcher", "path"), ALIEN.values(), ids=ALIEN)
def test_who_speaks_of_something_else(tmp_path: Path, watcher: list[str], path: str) -> None:
    assert Runtimes(host(tmp_path, watcher), CommandLines()).lookup(12, path, 0) == Runtime()


LIE = ["conmon", "-c", ID, "-n", "billing-db"]


@pytest.mark.parametrize("place", [DOCKER, f"{DOCKER}/below", f"/../docker-{ID}.scope"])
def test_a_process_inside_that_calls_itself_so(tmp_path: Path, place: str) -> None:
    """Neither it nor its child gets the name that it tells; the one outside is heard in spite of it."""
    process(tmp_path, 13, 12, "conmon", LIE, place)
    process(tmp_path, 14, 13, "server", ["server"], place)
    for pid in (13, 14):
        root = host(tmp_path, SHIM) if pid == 13 else tmp_path
        assert Runtimes(root, CommandLines()).lookup(pid, place, 0) == Runtime("docker", ID)


def test_a_service_that_calls_itself_so(tmp_path: Path) -> None:
    """The names of the folders above are not for it to choose from."""
    for number in ("system.slice", "web.service"):
        root = tmp_path / number
        root.mkdir()
        place = "/system.slice/web.service"
        process(root, 2, 1, "containerd-shim", [SHIM[0], "-namespace", "default", "-id", number], place)
        process(root, 3, 2, "server", ["server"], place)
        assert Runtimes(root, CommandLines()).lookup(3, place, 0) == Runtime()


def test_not_found_is_not_remembered_for_long(tmp_path: Path) -> None:
    """A process that is too far below, or somebody else's child, does not speak for its container."""
    process(tmp_path, 20, 1, "server", ["server"])
    runtimes = Runtimes(host(tmp_path, SHIM), CommandLines())
    assert runtimes.lookup(20, DOCKER, 0) == Runtime()
    assert runtimes.lookup(12, DOCKER, runtime.RETRY_SECONDS + 1) == Runtime("docker", ID)


def test_a_name_without_end(tmp_path: Path) -> None:
    watcher = [*CONMON, "a" * 5000]
    found = Runtimes(host(tmp_path, watcher), CommandLines()).lookup(12, f"/a/libpod-{ID}.scope/container", 0)
    assert found == Runtime("podman", ID, "a" * 253)


def test_no_container(tmp_path: Path) -> None:
    host(tmp_path, ["/usr/bin/supervisor"])
    assert Runtimes(tmp_path, CommandLines()).lookup(12, "/a", 0) == Runtime()
    assert Runtimes(tmp_path, CommandLines()).lookup(99, "/b", 0) == Runtime()
    process(tmp_path, 20, 20, "own parent", [])
    assert Runtimes(tmp_path, CommandLines()).lookup(20, "/c", 0) == Runtime()


def test_a_runtime_is_remembered_after_the_process_has_gone(tmp_path: Path) -> None:
    runtimes = Runtimes(host(tmp_path, SHIM), CommandLines())
    assert runtimes.lookup(12, f"/docker/{ID}", 0).name == "docker"
    assert runtimes.lookup(99, f"/docker/{ID}", 1).name == "docker"


# ---- cgroups by their ids ----


def test_path_of_an_id(tmp_path: Path) -> None:
    (tmp_path / "docker" / ID).mkdir(parents=True)
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker").stat().st_ino, 0) == "/docker"
    assert tree.path((tmp_path / "docker" / ID).stat().st_ino, 0) == f"/docker/{ID}"


def test_a_cgroup_that_has_gone_since(tmp_path: Path) -> None:
    folder = tmp_path / ID
    folder.mkdir()
    number = folder.stat().st_ino
    tree = Cgroups(tmp_path)
    assert tree.path(number, 0) == f"/{ID}"
    folder.rmdir()
    assert tree.path(number, 1e6) == f"/{ID}"


def test_unknown_ids_cost_one_walk_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    monkeypatch.setattr(Cgroups, "_walk", None)
    assert tree.path(1 << 60, 1e6) == ""
    assert tree.path(0, 1e6) == ""


def test_walks_take_a_tenth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 101.0, 200.0, 201.0))  # a walk takes a second
    monkeypatch.setattr(cgroups.time, "monotonic", lambda: next(clock))
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 100) == ""
    (tmp_path / "new").mkdir()
    number = (tmp_path / "new").stat().st_ino
    assert tree.path(number, 108) == ""
    assert tree.path(number, 109) == "/new"


def test_a_tree_too_large_to_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MAX_CGROUPS", 10)
    for number in range(50):
        (tmp_path / str(number)).mkdir()
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    assert len(tree._paths) <= 10


def make_tree(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).mkdir(parents=True)


def test_a_subtree_of_9000_cgroups_hides_no_container(tmp_path: Path) -> None:
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
def test_a_large_subtree_leaves_the_others_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    """Wherever it comes in the order, and within the same parent."""
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


def test_nothing_is_left_out_of_a_tree_that_has_room(tmp_path: Path) -> None:
    make_tree(tmp_path, *(f"{number % 10}/{number}/a/b" for number in range(1000)))
    tree = Cgroups(tmp_path)
    assert tree.path(1 << 60, 0) == ""
    assert (tree.left_out, len(tree._paths)) == (0, 10 + 3000 + 1)  # and the one that is not there


def test_a_tree_too_deep_to_walk(tmp_path: Path) -> None:
    make_tree(tmp_path, "/".join(["x"] * (cgroups.MAX_DEPTH + 5)), "docker/a")
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker/a").stat().st_ino, 0) == "/docker/a"
    assert len(tree._paths) == cgroups.MAX_DEPTH + 2
    assert tree.left_out == 1


def test_paths_too_long_to_keep(tmp_path: Path) -> None:
    make_tree(tmp_path, "/".join(["x" * 250] * 10), "docker/a")
    tree = Cgroups(tmp_path)
    assert tree.path((tmp_path / "docker/a").stat().st_ino, 0) == "/docker/a"
    assert max(len(path) for _, path in tree._paths._values.values()) <= cgroups.MAX_PATH + 255
    assert tree.left_out == 1


def test_a_cgroup_that_goes_while_its_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others in that folder are noted all the same."""
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


def test_no_cgroups_here() -> None:
    for root in (None, Path("/nowhere")):
        assert Cgroups(root).path(7, 0) == ""
        assert not Cgroups(root).is_removed("/a", 0)


def test_whether_a_cgroup_has_ended(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tree = Cgroups(tmp_path)
    for path in ("/a", "/b", "/../a", "/\0"):
        tree.watch(path, 0)
    assert not tree.is_removed("/a", 1)
    (tmp_path / "a").rmdir()
    assert tree.is_removed("/a", 2)
    # Of what was never seen nobody knows.
    assert not any(tree.is_removed(path, 2) for path in ("/b", "/../a", "/\0", "/never"))
    (tmp_path / "a").mkdir()
    assert not tree.is_removed("/a", 3)
