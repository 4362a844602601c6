"""Find the container of a cgroup by its path: every runtime writes the container id into the path.

Paths look as follows. ID stands for 64 hexadecimal digits. If containers are nested, the innermost ID counts.

    /docker/ID                                                              Docker, cgroupfs driver
    /system.slice/docker-ID.scope                                           Docker, systemd driver
    /kubepods.slice/kubepods-podUID.slice/cri-containerd-ID.scope           containerd; UID with _ for -
    /system.slice/containerd.service/kubepods-podUID.slice:cri-containerd:ID  the same, without the systemd driver
    /kubepods/burstable/podUID/ID                                           kubelet's cgroupfs driver, any runtime
    /kubepods.slice/kubepods-podUID.slice/crio-ID.scope                     CRI-O; crun adds /container
    /machine.slice/libpod-ID.scope                                          podman; it may add /container
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_PATHS = 4096
MAX_PATH = 1024  # bytes of a cgroup's path; Kubernetes in Docker needs 350
MAX_LABEL = 253  # characters of a name: Kubernetes' limit; Docker and podman have none
MAX_DEPTH = 32  # directories of a path that are searched for its tenant
TENANT_DEPTH = 3  # directories that identify the tenant if no container, pod, user or service is in the path
RUNTIME_SERVICES = {  # services whose child cgroups are containers
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
    """The container that a path names; "": unknown."""

    id: str = ""
    runtime: str = ""
    pod_uid: str = ""
    cgroup: str = ""  # the pod's directory, else the container's; it is removed when the pod or container ends


@lru_cache(MAX_PATHS)
def parse(path: str) -> Container:
    """Return the innermost container in a cgroup's path; all fields are "" if there is none."""
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
    """Return the cgroup that belongs to a tenant as a whole, or "" if it is unknown.

    ``paths``: the path of one of its processes in each hierarchy. The outermost pod, container, user or service counts,
    because below it the tenant may create cgroups and choose their names.
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
    """Return the first cgroup in a path that is named after a container, or "" if there is none.

    Its name is the id, with or without a runtime's prefix and ".scope". The id need not be hexadecimal.
    """
    names = {container_id, *(f"{runtime}-{container_id}" for runtime in RUNTIMES)} if container_id else set()
    parts = path.split("/")
    for end, part in enumerate(parts, 1):
        if _name(part).removesuffix(".scope") in names:
            return "/".join(parts[:end])
    return ""


def _name(part: str) -> str:
    """Return a directory's name; for SLICE:RUNTIME:ID, return RUNTIME-ID."""
    *front, name = part.split(":")
    return f"{front[-1]}-{name}" if front and front[-1] else name


def _pod(parts: list[str]) -> tuple[str, str]:
    """Return the pod's uid in a path, and the directory that belongs to the pod alone; "": none."""
    for end in range(len(parts), 0, -1):
        name, *behind = parts[end - 1].split(":")
        found = _POD.fullmatch(name)
        if found:
            return found["uid"].replace("_", "-"), "" if behind else "/".join(parts[:end])
    return "", ""
