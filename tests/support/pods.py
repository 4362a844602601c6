"""Pods as a manifest describes them, run by podman beside a Docker daemon and in its namespaces.

Debian 12 has Docker 20.10, which knows neither CAP_BPF nor CAP_PERFMON (Docker 23.0 does); its podman knows both.
Containers and their watching processes end with the daemon.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from repository import DOCS
from runtimes import Docker
from waiting import wait_for

from udpwatch.agent.testing.lab import Namespace

Manifest = dict[str, Any]

CGROUP_PARENT = "/udpwatch-test"  # one of machine.CGROUP_PARENTS
#: what says nothing about what a container may do, or what a test asks for itself
_ELSEWHERE = {"name", "imagePullPolicy", "ports", "lifecycle", "startupProbe", "livenessProbe", "readinessProbe"}
_ELSEWHERE |= {"terminationMessagePolicy"}
_numbers = count()
COUNTER = "udpwatch_reply_source_mismatch_total"


class Podman:
    """podman's command line, in the namespaces of a daemon."""

    def __init__(self, folder: Path, docker: Docker) -> None:
        """Skips where there is no podman."""
        for program in ("podman", "conmon", "runc"):
            if not shutil.which(program):
                pytest.skip(f"no {program} here: apt-get install podman")
        self.folder = folder
        unshare = docker.process.pid
        (daemon,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        self._inside = ["nsenter", f"--target={daemon}", "--mount", "--pid", "--net"]
        self.seccomp = folder / "seccomp.json"
        self.seccomp.write_text(_seccomp_of_today())
        self.old_seccomp = folder / "old-seccomp.json"
        self.old_seccomp.write_text(_seccomp_of_old())

    def _podman(self, *arguments: str) -> list[str]:
        places = [f"--root={self.folder}/root", f"--runroot={self.folder}/run", f"--tmpdir={self.folder}/tmp"]
        ways = ["--cgroup-manager=cgroupfs", "--events-backend=none", "--storage-driver=overlay", "--runtime=runc"]
        return [*self._inside, "env", "CONTAINERS_CONF=/dev/null", "podman", *places, *ways, *arguments]

    def done(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands; returns the completed process."""
        return subprocess.run(
            self._podman(*arguments), capture_output=True, text=True, check=False, timeout=240, stdin=subprocess.DEVNULL
        )

    def call(self, *arguments: str) -> str:
        """Run one of its commands, which must succeed; returns its output."""
        done = self.done(*arguments)
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def mount(self, script: str) -> None:
        """Change mounts for the daemon, podman and their containers alone."""
        subprocess.run([*self._inside, "sh", "-ec", script], check=True, capture_output=True)

    def log(self, name: str) -> list[str]:
        """Return the lines that a container has written so far."""
        done = self.done("logs", name)
        return (done.stdout + done.stderr).splitlines()


def _seccomp_of_today() -> str:
    """Return podman's default profile as docs/docker.md changes it: CAP_BPF allows bpf(2), as in the default profiles
    of Docker and containerd since 2022 (moby/moby#43987, containerd/containerd#7301).
    """
    (command,) = (block for block in blocks(DOCS / "docker.md") if block.startswith("jq "))
    line, _, _file = command.partition(">")
    return subprocess.run(["sh", "-ec", line], capture_output=True, text=True, check=True).stdout


def _seccomp_of_old() -> str:
    """Return podman's default profile without a rule for CAP_BPF, as in podman 4."""
    profile = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    profile["syscalls"] = [
        each for each in profile["syscalls"] if "CAP_BPF" not in each.get("includes", {}).get("caps", [])
    ]
    return json.dumps(profile)


def blocks(page: Path) -> list[str]:
    """Return the code blocks of a page."""
    return [block.strip() for block in re.findall(r"^```\w+\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)]


class Pod:
    """The pod template of a workload as arguments of `podman run`."""

    def __init__(self, podman: Podman, folder: Path, manifests: Sequence[Manifest], fields: Mapping[str, str]) -> None:
        """``fields``: what the downward API would say, by fieldPath. The folder is for its volumes."""
        (workload,) = (manifest for manifest in manifests if manifest["kind"] == "DaemonSet")
        self.spec: Manifest = workload["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]
        self._podman, self._folder, self._fields = podman, folder, fields
        self._maps = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}

    @property
    def capabilities(self) -> list[str]:
        """Return the capabilities that its container gets; all others are dropped."""
        given = self.container["securityContext"]["capabilities"]
        assert given["drop"] == ["ALL"]
        added: list[str] = given["add"]
        return added

    def arguments(self, container: Manifest | None = None, without: str = "") -> list[str]:
        """Return options, image and command line of a container, without one capability if given. An unknown field is
        an error.
        """
        container = container or self.container
        rest = {key: value for key, value in container.items() if key not in _ELSEWHERE}
        security = self.spec.get("securityContext", {}) | rest.pop("securityContext")
        environment = self._environment(rest.pop("env", []))
        words = [f"--cgroup-parent={CGROUP_PARENT}", "--no-healthcheck"]
        words += self._security(security, without)
        words += [f"--network={'host' if self.spec.get('hostNetwork') else 'none'}"]
        words += ["--pid=host"] if self.spec.get("hostPID") else []
        words += [f"--memory={rest.pop('resources')['limits']['memory'].replace('Mi', 'm')}"]
        for mount in rest.pop("volumeMounts", []):
            words += self._mount(**mount)
        words += [f"--env={name}={value}" for name, value in environment.items()]
        command = rest.pop("command", [])
        words += [f"--entrypoint={json.dumps(command)}"] if command else []
        words += [rest.pop("image"), *rest.pop("args", [])]
        assert not rest, f"not understood: {rest}"
        return words

    @contextlib.contextmanager
    def running(self, without: str = "") -> Iterator[str]:
        """Run its container during the body; yields its name."""
        name = f"{self.container['name']}-{next(_numbers)}"
        self._podman.call("run", "--detach", f"--name={name}", *self.arguments(without=without))
        try:
            yield name
        finally:
            self._podman.call("rm", "--force", "--time=0", name)

    def to_its_end(self, container: Manifest | None = None, without: str = "") -> subprocess.CompletedProcess[str]:
        """Run a container until it ends."""
        return self._podman.done("run", "--rm", *self.arguments(container, without))

    def _security(self, context: Manifest, without: str) -> list[str]:
        context = dict(context)
        assert context.pop("privileged", False) is False
        assert context.pop("appArmorProfile", {"type": "RuntimeDefault"})["type"] == "RuntimeDefault"
        assert context.pop("seccompProfile") == {"type": "RuntimeDefault"}
        assert context.pop("allowPrivilegeEscalation") is False
        words = [f"--security-opt=seccomp={self._podman.seccomp}", "--security-opt=no-new-privileges"]
        words += [f"--security-opt=label={key}:{value}" for key, value in context.pop("seLinuxOptions", {}).items()]
        words += ["--read-only", "--read-only-tmpfs=false"] if context.pop("readOnlyRootFilesystem", False) else []
        words += [f"--user={context.pop('runAsUser')}:{context.pop('runAsGroup')}"]
        capabilities = context.pop("capabilities")
        words += [f"--cap-drop={name}" for name in capabilities["drop"]]
        words += [f"--cap-add={name}" for name in capabilities["add"] if name != without]
        assert not context, f"not understood: {context}"
        return words

    def _environment(self, variables: Sequence[Manifest]) -> dict[str, str]:
        values: dict[str, str] = {}
        for each in variables:
            given = self._fields[each["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in each else each["value"]
            values[each["name"]] = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], given)
        return values

    def _mount(self, name: str, mountPath: str, readOnly: bool = False) -> list[str]:  # Kubernetes' names
        (volume,) = (dict(each) for each in self.spec["volumes"] if each["name"] == name)
        how = ":ro" if readOnly else ""
        folder = self._folder / name
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            if volume["hostPath"].get("type") == "DirectoryOrCreate":
                self._podman.mount(f"mkdir -p {path}")
            return [f"--volume={path}:{mountPath}{how}"]
        if "configMap" in volume:
            folder.mkdir(exist_ok=True)
            for key, text in self._maps[volume["configMap"]["name"]].items():
                (folder / key).write_text(text)
            return [f"--volume={folder}:{mountPath}{how}"]
        empty = volume["emptyDir"]  # open to everybody, as kubelet makes it
        if empty.get("medium") == "Memory":
            return [f"--tmpfs={mountPath}:rw,exec,mode=0777,size={empty['sizeLimit'].replace('Mi', 'm')}"]
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        return [f"--volume={folder}:{mountPath}{how}"]


def get(node: Namespace, address: str, port: int, path: str) -> tuple[int, str]:
    """Send an HTTP request from a host of the lab; returns status and body."""
    with node.socket(kind=socket.SOCK_STREAM) as link:
        link.settimeout(30)
        link.connect((address, port))
        connection = http.client.HTTPConnection(address)
        connection.sock = link
        connection.request("GET", path)
        with connection.getresponse() as answer:
            return answer.status, answer.read().decode()


def counted(node: Namespace, port: int, address: str, times: int = 1) -> dict[str, str]:
    """Wait until the agent at this address counts wrong replies from a port; returns the labels of their series."""

    def find() -> list[dict[str, str]]:
        families = text_string_to_metric_families(get(node, address, 9953, "/metrics")[1])
        samples = [sample for family in families for sample in family.samples if sample.name == COUNTER]
        return [sample.labels for sample in samples if sample.labels["port"] == str(port) and sample.value == times]

    (labels,) = wait_for(find, "the finding")
    return labels
