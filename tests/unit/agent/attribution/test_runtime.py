"""The container runtime behind a process, on a /proc that the tests write."""

from __future__ import annotations

from pathlib import Path

import pytest

from udpwatch.agent.attribution import runtime
from udpwatch.agent.attribution.command_line import CommandLines
from udpwatch.agent.attribution.runtime import Runtime, Runtimes

ID = "3f2a" * 16

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
    """Write systemd, the runtime's process, the container's first process with a hostile name, and the server."""
    process(root, 1, 0, "systemd", ["/sbin/init"])
    process(root, 10, 1, Path(watcher[0]).name[:15], watcher, f"/machine.slice/libpod-conmon-{ID}.scope")
    process(root, 11, 10, "a) S 1 (b", ["sh"])
    process(root, 12, 11, "server", ["server"])
    return root


@pytest.mark.parametrize(("watcher", "path", "told"), WATCHERS.values(), ids=WATCHERS)
def test_runtime_is_found_above_the_process(tmp_path: Path, watcher: list[str], path: str, told: Runtime) -> None:
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
def test_runtime_of_another_container_is_ignored(tmp_path: Path, watcher: list[str], path: str) -> None:
    assert Runtimes(host(tmp_path, watcher), CommandLines()).lookup(12, path, 0) == Runtime()


LIE = ["conmon", "-c", ID, "-n", "billing-db"]


@pytest.mark.parametrize("place", [DOCKER, f"{DOCKER}/below", f"/../docker-{ID}.scope"])
def test_process_in_the_container_that_claims_to_be_a_runtime_is_ignored(tmp_path: Path, place: str) -> None:
    """Neither it nor its child gets the name that it claims; the real runtime is found."""
    process(tmp_path, 13, 12, "conmon", LIE, place)
    process(tmp_path, 14, 13, "server", ["server"], place)
    for pid in (13, 14):
        root = host(tmp_path, SHIM) if pid == 13 else tmp_path
        assert Runtimes(root, CommandLines()).lookup(pid, place, 0) == Runtime("docker", ID)


def test_service_that_claims_to_be_a_runtime_is_ignored(tmp_path: Path) -> None:
    """It cannot choose a name from the folders above it."""
    for number in ("system.slice", "web.service"):
        root = tmp_path / number
        root.mkdir()
        place = "/system.slice/web.service"
        process(root, 2, 1, "containerd-shim", [SHIM[0], "-namespace", "default", "-id", number], place)
        process(root, 3, 2, "server", ["server"], place)
        assert Runtimes(root, CommandLines()).lookup(3, place, 0) == Runtime()


def test_missing_runtime_is_looked_up_again(tmp_path: Path) -> None:
    """A process too far below, or another process's child, does not decide for its container."""
    process(tmp_path, 20, 1, "server", ["server"])
    runtimes = Runtimes(host(tmp_path, SHIM), CommandLines())
    assert runtimes.lookup(20, DOCKER, 0) == Runtime()
    assert runtimes.lookup(12, DOCKER, runtime.RETRY_SECONDS + 1) == Runtime("docker", ID)


def test_long_name_is_cut(tmp_path: Path) -> None:
    watcher = [*CONMON, "a" * 5000]
    found = Runtimes(host(tmp_path, watcher), CommandLines()).lookup(12, f"/a/libpod-{ID}.scope/container", 0)
    assert found == Runtime("podman", ID, "a" * 253)


def test_process_without_a_runtime_has_none(tmp_path: Path) -> None:
    host(tmp_path, ["/usr/bin/supervisor"])
    assert Runtimes(tmp_path, CommandLines()).lookup(12, "/a", 0) == Runtime()
    assert Runtimes(tmp_path, CommandLines()).lookup(99, "/b", 0) == Runtime()
    process(tmp_path, 20, 20, "own parent", [])
    assert Runtimes(tmp_path, CommandLines()).lookup(20, "/c", 0) == Runtime()


def test_runtime_is_remembered_after_the_process_has_ended(tmp_path: Path) -> None:
    runtimes = Runtimes(host(tmp_path, SHIM), CommandLines())
    assert runtimes.lookup(12, f"/docker/{ID}", 0).name == "docker"
    assert runtimes.lookup(99, f"/docker/{ID}", 1).name == "docker"
