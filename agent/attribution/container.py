"""From a cgroup's path to the container: every runtime writes its container's id into it.

Paths look like these (64 hexadecimal digits stand for ID, and the innermost one counts: containers are nested):

    /docker/ID                                                              Docker, cgroupfs driver
    /system.slice/docker-ID.scope                                           Docker, systemd driver
    /kubepods.slice/kubepods-podUID.slice/cri-containerd-ID.scope           containerd; UID with _ for -
    /system.slice/containerd.service/kubepods-podUID.slice:cri-containerd:ID  the same, when it has no systemd driver
    /kubepods/burstable/podUID/ID                                           kubelet's cgroupfs driver, any runtime
    /kubepods.slice/kubepods-podUID.slice/crio-ID.scope                     CRI-O; crun adds /container
    /machine.slice/libpod-ID.scope                                          podman; it may add /container
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_PATHS = 4096
MAX_PATH = 1024  # bytes of a cgroup's path; Kubernetes in Docker has 350
MAX_LABEL = 253  # letters of a name, as many as Kubernetes allows; Docker and podman take any number
MAX_DEPTH = 32  # folders of a path that are looked at for its tenant
TENANT_DEPTH = 3  # folders of a path that names no container, pod, user or service
RUNTIME_SERVICES = {  # with a container in each of their cgroups
    *("containerd.service", "crio.service", "docker.service"),
    *("k3s.service", "k3s-agent.service", "rke2-agent.service", "rke2-server.service"),
}
RUNTIMES = {
    "docker": "docker",
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod": "podman",
    "libpod-payload": "podman",
}
_CONTAINER = re.compile(r"(?:(?P<runtime>[a-z-]+)-)?(?P<id>[0-9a-f]{64})(?:\.scope)?")
_POD = re.compile(r"(?:.*-)?pod(?P<uid>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?")
_USER = re.compile(r"user-\d+\.slice")
_MONITOR = "conmon"  # the process beside the container, in a cgroup of its own: crio-conmon-ID.scope


@dataclass(frozen=True, slots=True)
class Container:
    """What a path tells of a container; "": nothing."""

    id: str = ""
    runtime: str = ""
    pod_uid: str = ""
    cgroup: str = ""  # the pod's folder, else the container's: what ends with it


@lru_cache(MAX_PATHS)
def parse(path: str) -> Container:
    """The innermost container of a cgroup's path; an empty one where the path names none."""
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        found = _CONTAINER.fullmatch(_name(parts[end - 1]))
        if not found:
            continue
        prefix = found["runtime"] or ("docker" if parts[end - 2] == "docker" else "")
        if prefix.endswith(_MONITOR):
            return Container()
        uid, cgroup = _pod(parts[:end])
        return Container(found["id"], RUNTIMES.get(prefix, ""), uid, cgroup or "/".join(parts[:end]))
    return Container()


def tenant(paths: tuple[str, ...]) -> str:
    """The folder that a process's tenant has as a whole, by its path in each hierarchy; "": not known.

    It is the outermost pod, container, user or service, since below it the tenant may make cgroups and choose their
    names.
    """
    found = [_tenant(path) for path in paths]
    return next((folder for folder in found if folder.strip("/")), "")


@lru_cache(MAX_PATHS)
def _tenant(path: str) -> str:
    parts = path.split("/")
    for end, part in enumerate(parts[: MAX_DEPTH + 1], 1):
        of_a_service = part.endswith(".service") and part not in RUNTIME_SERVICES
        pod, container = _POD.fullmatch(part.split(":")[0]), _CONTAINER.fullmatch(_name(part))
        if of_a_service or pod or container or _USER.fullmatch(part):
            return "/".join(parts[:end])
    return "/".join(parts[: TENANT_DEPTH + 1])


def folder(path: str, container_id: str) -> str:
    """The first cgroup on a path that is called like a container; "": none is.

    It is called by the id, which need not be a number, with a runtime's prefix and ".scope" or without.
    """
    names = {container_id, *(f"{runtime}-{container_id}" for runtime in RUNTIMES)} if container_id else set()
    parts = path.split("/")
    for end, part in enumerate(parts, 1):
        if _name(part).removesuffix(".scope") in names:
            return "/".join(parts[:end])
    return ""


def _name(part: str) -> str:
    """A folder's name, of SLICE:RUNTIME:ID the last two as RUNTIME-ID."""
    *front, name = part.split(":")
    return f"{front[-1]}-{name}" if front and front[-1] else name


def _pod(parts: list[str]) -> tuple[str, str]:
    """(uid of the pod that a path leads through, the folder that is the pod's alone); "": none."""
    for end in range(len(parts), 0, -1):
        name, *behind = parts[end - 1].split(":")
        found = _POD.fullmatch(name)
        if found:
            return found["uid"].replace("_", "-"), "" if behind else "/".join(parts[:end])
    return "", ""
