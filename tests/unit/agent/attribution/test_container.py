"""Container ids in paths of cgroups, as each runtime writes them."""

from __future__ import annotations

import pytest

from udpwatch.agent.attribution.container import Container, parse, tenant

ID = "3f2a" * 16
OUTER = "0b1c" * 16
UID = "0d6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a89"
UNDERSCORED = UID.replace("-", "_")
STATIC = "9b0f3c2d" * 4  # of a pod from a file on the node: a hash
SLICE = f"kubepods-besteffort-pod{UNDERSCORED}.slice"
IN_SLICE = f"/kubepods.slice/kubepods-besteffort.slice/{SLICE}"

CONTAINERS = {
    "docker, cgroupfs": (f"/docker/{ID}", "docker", "", f"/docker/{ID}"),
    "docker, systemd": (f"/system.slice/docker-{ID}.scope", "docker", "", f"/system.slice/docker-{ID}.scope"),
    "docker, systemd's path for cgroupfs": (f"/system.slice:docker:{ID}", "docker", "", f"/system.slice:docker:{ID}"),
    "docker, another parent": (f"/build/{ID}", "", "", f"/build/{ID}"),
    "docker, a cgroup inside": (f"/docker/{ID}/init.scope", "docker", "", f"/docker/{ID}"),
    "docker, rootless": (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
        "docker",
        "",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
    ),
    "ecs": (f"/ecs/7d2f-task/{ID}", "", "", f"/ecs/7d2f-task/{ID}"),
    "kubelet, cgroupfs": (f"/kubepods/burstable/pod{UID}/{ID}", "", UID, f"/kubepods/burstable/pod{UID}"),
    "kubelet, cgroupfs, guaranteed": (f"/kubepods/pod{UID}/{ID}", "", UID, f"/kubepods/pod{UID}"),
    "kubelet, cgroupfs, crio": (
        f"/kubepods/besteffort/pod{UID}/crio-{ID}",
        "cri-o",
        UID,
        f"/kubepods/besteffort/pod{UID}",
    ),
    "containerd, systemd": (f"{IN_SLICE}/cri-containerd-{ID}.scope", "containerd", UID, IN_SLICE),
    "containerd, guaranteed": (
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        "containerd",
        UID,
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice",
    ),
    "containerd without a systemd driver": (
        f"/system.slice/containerd.service/{SLICE}:cri-containerd:{ID}",
        "containerd",
        UID,
        f"/system.slice/containerd.service/{SLICE}:cri-containerd:{ID}",
    ),
    "static pod": (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{ID}.scope",
        "containerd",
        STATIC,
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice",
    ),
    "docker under kubelet": (f"{IN_SLICE}/docker-{ID}.scope", "docker", UID, IN_SLICE),
    "nerdctl": (f"/system.slice/nerdctl-{ID}.scope", "containerd", "", f"/system.slice/nerdctl-{ID}.scope"),
    "nerdctl, cgroupfs": (f"/default/{ID}", "", "", f"/default/{ID}"),
    "cri-o, systemd": (f"{IN_SLICE}/crio-{ID}.scope", "cri-o", UID, IN_SLICE),
    "cri-o, crun": (f"{IN_SLICE}/crio-{ID}.scope/container", "cri-o", UID, IN_SLICE),
    "podman": (f"/machine.slice/libpod-{ID}.scope/container", "podman", "", f"/machine.slice/libpod-{ID}.scope"),
    "podman, cgroupfs": (f"/libpod_parent/libpod-{ID}", "podman", "", f"/libpod_parent/libpod-{ID}"),
    "podman in a unit": (
        f"/system.slice/web.service/libpod-payload-{ID}",
        "podman",
        "",
        f"/system.slice/web.service/libpod-payload-{ID}",
    ),
    "podman, rootless": (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
        "podman",
        "",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
    ),
    "kind": (
        f"/docker/{OUTER}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-{SLICE}"
        f"/cri-containerd-{ID}.scope",
        "containerd",
        UID,
        f"/docker/{OUTER}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-{SLICE}",
    ),
    "docker in docker": (f"/docker/{OUTER}/docker/{ID}", "docker", "", f"/docker/{OUTER}/docker/{ID}"),
    "docker in a pod": (f"{IN_SLICE}/cri-containerd-{OUTER}.scope/docker/{ID}", "docker", UID, IN_SLICE),
    "systemd in docker": (f"/docker/{ID}/system.slice/named.service", "docker", "", f"/docker/{ID}"),
    "seen from a cgroup namespace": (
        f"/../cri-containerd-{ID}.scope",
        "containerd",
        "",
        f"/../cri-containerd-{ID}.scope",
    ),
}


@pytest.mark.parametrize(("path", "runtime", "uid", "cgroup"), CONTAINERS.values(), ids=CONTAINERS)
def test_container_id_is_found_in_the_path(path: str, runtime: str, uid: str, cgroup: str) -> None:
    assert parse(path) == Container(ID, runtime, uid, cgroup)


NONE = {
    "nothing": "",
    "root": "/",
    "systemd unit": "/system.slice/named.service",
    "unit from a template": "/system.slice/system-openvpn.slice/openvpn@server.service",
    "scope of a user": "/user.slice/user-1000.slice/session-3.scope",
    "docker itself": "/system.slice/docker.service",
    "containerd itself": "/system.slice/containerd.service",
    "kubelet": "/system.slice/kubelet.service",
    "monitor of cri-o": f"{IN_SLICE}/crio-conmon-{ID}.scope",
    "monitor of podman": f"/machine.slice/libpod-conmon-{ID}.scope",
    "too short": f"/docker/{ID[1:]}",
    "too long": f"/docker/{ID}0",
    "a name": "/default/five",
    "upper case": f"/docker/{ID.upper()}",
    "a line end": f"/docker/{ID}\n",
}


@pytest.mark.parametrize("path", NONE.values(), ids=NONE)
def test_other_paths_have_no_container(path: str) -> None:
    assert parse(path) == Container()


def test_hostile_path_is_matched_quickly() -> None:
    """Users can own cgroups and choose their names."""
    assert parse("/" + "/".join(["a-" * 120 + "pod" + "-" * 100] * 16)) == Container()


USER = "/user.slice/user-1000.slice"
TENANTS = {
    "container": (f"/docker/{ID}", f"/docker/{ID}"),
    "cgroups of a container's making": (f"/docker/{ID}/a/b/c/d", f"/docker/{ID}"),
    "container in a container": (f"/docker/{OUTER}/docker/{ID}", f"/docker/{OUTER}"),
    "pod": (f"{IN_SLICE}/cri-containerd-{ID}.scope", IN_SLICE),
    "pod, cgroupfs": (f"/kubepods/burstable/pod{UID}/{ID}", f"/kubepods/burstable/pod{UID}"),
    "pod deep down": (f"/a/b/c/kubepods/burstable/pod{UID}/{ID}", f"/a/b/c/kubepods/burstable/pod{UID}"),
    "pod in the runtime's cgroup": (
        f"/system.slice/containerd.service/{SLICE}:cri-containerd:{ID}",
        f"/system.slice/containerd.service/{SLICE}:cri-containerd:{ID}",
    ),
    "service": ("/system.slice/named.service", "/system.slice/named.service"),
    "containers of a service": (f"/system.slice/web.service/docker-{ID}.scope", "/system.slice/web.service"),
    "user": (f"{USER}/session-3.scope", USER),
    "containers of a user": (f"{USER}/user@1000.service/user.slice/docker-{ID}.scope", USER),
    "anything else": ("/a/b/c/d/e", "/a/b/c"),
    "a name that a user chose": ("/default/five", "/default/five"),
    "root": ("/", ""),
    "unknown": ("", ""),
}


@pytest.mark.parametrize(("path", "folder"), TENANTS.values(), ids=TENANTS)
def test_tenant_of_a_path(path: str, folder: str) -> None:
    assert tenant((path,)) == folder


def test_tenant_is_taken_from_cgroup_v1_when_v2_shows_none() -> None:
    assert tenant(("/", f"/docker/{ID}")) == f"/docker/{ID}"
    assert tenant(()) == ""
