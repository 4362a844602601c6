"""Names of pods and containers, from names of folders as kubelet makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udpwatch.agent.attribution import pod
from udpwatch.agent.attribution.pod import Pod, Pods

ID, OTHER = "3f2a" * 16, "77aa" * 16
UID = "0d6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a89"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    add(tmp_path, "shop", "dns-7c9", UID, {"dns": ID})
    return tmp_path


def add(root: Path, namespace: str, name: str, uid: str, containers: dict[str, str]) -> None:
    """Make what kubelet makes for a pod."""
    (root / "containers").mkdir(exist_ok=True)
    for container, number in containers.items():
        folder = root / "pods" / f"{namespace}_{name}_{uid}" / container
        folder.mkdir(parents=True)
        (folder / "0.log").touch()
        (root / "containers" / f"{name}_{namespace}_{container}-{number}.log").symlink_to(folder / "0.log")


def test_pod_is_found_by_the_containers_id(log: Path) -> None:
    assert Pods(log).lookup(ID, "") == Pod("shop", "dns-7c9", "dns")
    assert Pods(log).lookup(OTHER, "") is None
    assert Pods(log).lookup("", "") is None


def test_pod_is_found_by_the_pods_id(log: Path) -> None:
    """The container's name is known only when the pod has one container."""
    assert Pods(log).lookup(OTHER, UID) == Pod("shop", "dns-7c9", "dns")
    add(log, "shop", "two", "9b0f3c2d" * 4, {"a": "1" * 64, "b": "2" * 64})
    assert Pods(log).lookup(OTHER, "9b0f3c2d" * 4) == Pod("shop", "two", "")


def test_names_may_have_hyphens(log: Path) -> None:
    add(log, "kube-system", "kube-proxy-x-1", "a" * 32, {"kube-proxy-2": OTHER})
    assert Pods(log).lookup(OTHER, "") == Pod("kube-system", "kube-proxy-x-1", "kube-proxy-2")


def test_without_kubernetes_no_pod_is_known(tmp_path: Path) -> None:
    assert Pods(tmp_path).lookup(ID, UID) is None
    assert Pods(Path("/dev/null")).lookup(ID, UID) is None


def test_names_that_kubelet_does_not_write_are_ignored(log: Path) -> None:
    for name in ("x", f"a_b_c_d-{OTHER}.log", f"-{OTHER}.log", f"a_b_c-{OTHER}.txt", f"a_b_c-{OTHER[:30]}.log"):
        (log / "containers" / name).touch()
    assert Pods(log).lookup(OTHER, "") is None


def test_new_and_removed_pods_are_noticed(log: Path) -> None:
    """Two changes within the resolution of the folder's time are noticed, too."""
    pods = Pods(log, clock=lambda: 0)
    assert pods.lookup(OTHER, "") is None
    add(log, "shop", "new", "b" * 32, {"new": OTHER})
    os.utime(log / "containers", ns=(1, 1))
    assert pods.lookup(OTHER, "") == Pod("shop", "new", "new")
    for path in (log / "containers").iterdir():
        path.unlink()
    assert pods.lookup(OTHER, "") == Pod("shop", "new", "new")
    assert pods.lookup("4" * 64, "") is None  # reads the folder again
    assert pods.lookup(OTHER, "") is None


def test_unchanged_folder_is_not_read_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = Pods(log, clock=lambda: 1e12)
    assert pods.lookup(OTHER, "") is None
    monkeypatch.setattr(os, "scandir", None)
    for _ in range(3):
        assert pods.lookup(OTHER, "") is None
    assert pods.lookup(ID, "") == Pod("shop", "dns-7c9", "dns")


def test_number_of_files_read_is_bounded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod, "MAX_NAMES", 10)
    for number in range(100):
        add(log, "shop", f"pod{number}", f"{number:032d}", {"c": f"{number:064d}"})
    pods = Pods(log)
    assert sum(pods.lookup(f"{number:064d}", "") is not None for number in range(100)) <= 10


def test_control_characters_in_names_are_escaped(log: Path) -> None:
    (log / "containers" / os.fsdecode(b"a\x1b[31m_[red]<b>\x9b_\xffc\xe2\x80\xae-" + OTHER.encode() + b".log")).touch()
    assert Pods(log).lookup(OTHER, "") == Pod(r"[red]<b>\x9b", r"a\x1b[31m", r"\xffc\x202e")
