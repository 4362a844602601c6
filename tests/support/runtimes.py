"""Real container runtimes with nothing outside a folder and namespaces of their own.

Each daemon is process 1 of a process namespace: whatever ends it ends its shims and containers too. Its mounts, links,
addresses and firewall rules are in namespaces that end with it; what it writes to /run and /etc it writes to a copy
in its folder. Cgroups alone are the machine's own: machine.py removes those that were made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from machine import ip_in, listening, processes_of
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace, die_with_parent

SERVER = "wrong-server"
INSIDE = "10.99.0.1"  # the second address of a container
IMAGE = "docker.io/library/udpwatch-test:latest"
_SOURCE = r"""
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
/* PORT [TIMES]: sends each datagram back, from the address that routing picks. */
int main(int argc, char **argv) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))}, peer;
    int fd = socket(AF_INET, SOCK_DGRAM, 0), times = argc > 2 ? atoi(argv[2]) : -1;
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)))
        return 1;
    while (times--) {
        char data[512];
        socklen_t size = sizeof(peer);
        ssize_t length = recvfrom(fd, data, sizeof(data), 0, (struct sockaddr *)&peer, &size);
        if (length >= 0)
            sendto(fd, data, length, 0, (struct sockaddr *)&peer, size);
    }
    return 0;
}
"""
# Kernel settings that no namespace has are not for a test to change.
_ISOLATE = """
mount -t tmpfs none /run
mkdir -p {folder}/etc {folder}/etc-work
mount -t overlay -o lowerdir=/etc,upperdir={folder}/etc,workdir={folder}/etc-work none /etc
mount --bind /proc/sys/kernel /proc/sys/kernel
mount -o remount,ro,bind /proc/sys/kernel
exec "$@"
"""


def build_server(folder: Path) -> Path:
    """Compile a static UDP server with recvfrom and sendto, which runs in an empty image and on the host."""
    source, program = folder / "server.c", folder / SERVER
    source.write_text(_SOURCE)
    subprocess.run(["gcc", "-static", "-Os", "-o", program, source], check=True, capture_output=True)
    return program


def image_tar(folder: Path, server: Path) -> Path:
    """Write the root file system of an image: the server, and busybox as a shell."""
    busybox = shutil.which("busybox")
    if not busybox or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        pytest.skip("no static busybox for the image: apt-get install busybox-static")
    path = folder / "image.tar"
    with tarfile.open(path, "w") as tar:
        for name, program in ((SERVER, server), ("bin/busybox", Path(busybox))):
            tar.add(program, name)
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    return path


class RuntimeHost(Lab):
    """``outside`` 172.16.13.1 -- eth0 172.16.13.13, 172.16.13.14 ``node``, where runtimes make their bridges."""

    NODE, SECOND, OUTSIDE = "172.16.13.13", "172.16.13.14", "172.16.13.1"

    def __init__(self) -> None:
        super().__init__()
        self.node, self.outside = self.pair("node", [self.NODE, self.SECOND], "outside", [self.OUTSIDE])


def answered_from(client: Namespace, asked: str, port: int) -> str:
    """Send a request; returns the address that the reply came from."""
    with client.socket() as socket:
        socket.settimeout(10)
        socket.sendto(b"x", (asked, port))
        source: str = socket.recvfrom(100)[1][0]
        return source


def ask_inside(node: Namespace, pid: int, first: str, port: int) -> None:
    """Have the node ask a container at a second address, which it gets here; the reply comes from its first."""
    ip_in(pid, f"addr add {INSIDE}/32 dev lo")
    node.ip(f"route replace {INSIDE}/32 via {first}")
    listening(pid, port)
    assert answered_from(node, INSIDE, port) == first


class Daemon:
    """A runtime's daemon in a namespace of the lab. A context manager."""

    name: ClassVar[str]
    package: ClassVar[str]
    client: ClassVar[str]

    def __init__(self, folder: Path, node: Namespace) -> None:
        """Start it; skips the test where that cannot be."""
        for program in (self.name, self.client, "runc"):
            if not shutil.which(program):
                pytest.skip(f"no {program} here: apt-get install {self.package}")
        self.folder, self._node = folder, node
        self._log = (folder / f"{self.name}.log").open("wb")
        isolate = _ISOLATE.format(folder=shlex.quote(str(folder)))
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-e", "-c", isolate, "sh"]
        self.process = subprocess.Popen(
            [*own, *self.command()],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            preexec_fn=self._enter,
        )
        try:
            wait_for(lambda: self.process.poll() is not None or self.answers(), f"{self.name} to answer")
            if self.process.poll() is not None:
                said = (folder / f"{self.name}.log").read_text(errors="replace").strip().splitlines()
                pytest.skip(f"{self.name} does not run on this machine: {said[-1] if said else 'it said nothing'}")
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        self._node.enter_in_child()
        die_with_parent()

    def command(self) -> Sequence[str]:
        """How it is started."""
        raise NotImplementedError

    def call(self, *arguments: str) -> str:
        """Its client's output."""
        done = subprocess.run(self._client(*arguments), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{self.client} {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def answers(self) -> bool:
        """Whether its client can reach it."""
        done = subprocess.run(self._client("version"), capture_output=True, check=False, timeout=120)
        return done.returncode == 0

    def _client(self, *arguments: str) -> list[str]:
        raise NotImplementedError

    def close(self) -> None:
        """End it with all of its processes; their cgroups stay."""
        self.process.kill()
        self.process.wait()
        self._log.close()
        wait_for(lambda: not processes_of(self.folder), f"the end of {self.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Docker(Daemon):
    """Docker, with its bridge docker0 in the lab's namespace."""

    name, package, client = "dockerd", "docker.io", "docker"

    def command(self) -> Sequence[str]:
        places = (
            f"--data-root={self.root_in(self.folder)}",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/dockerd.pid",
        )
        return ["dockerd", *places, f"--host={self._address}", "--containerd="]

    @staticmethod
    def root_in(folder: Path) -> Path:
        """Return the folder in place of /var/lib/docker."""
        root = folder / "root"
        root.mkdir(mode=0o710, exist_ok=True)
        return root

    @property
    def _address(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def _client(self, *arguments: str) -> list[str]:
        return ["docker", "--config", str(self.folder), "--host", self._address, *arguments]

    def import_image(self, path: Path) -> None:
        """Make IMAGE of a root file system."""
        self.call("import", str(path), IMAGE)

    def address(self, container_id: str) -> str:
        """Return a container's address on docker0."""
        return self.call("inspect", "--format", "{{.NetworkSettings.IPAddress}}", container_id)

    def run(self, name: str, *command: str, flags: Sequence[str] = ()) -> str:
        """A container; its id."""
        return self.call("run", "--detach", "--name", name, *flags, IMAGE, *command)


class Containerd(Daemon):
    """containerd alone."""

    name, package, client = "containerd", "containerd", "ctr"

    def command(self) -> Sequence[str]:
        config = self.folder / "config.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        places = (f"--root={self.folder}/containerd", f"--state={self.folder}/state", f"--address={self._address}")
        return ["containerd", f"--config={config}", *places]

    @property
    def _address(self) -> str:
        return f"{self.folder}/containerd.sock"

    def _client(self, *arguments: str) -> list[str]:
        return ["ctr", "--address", self._address, "--namespace", "udpwatch-test", *arguments]

    def import_image(self, path: Path) -> None:
        """Make IMAGE of a root file system, in the form that `docker save` gives."""
        archive = self.folder / "archive.tar"
        config: dict[str, Any] = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
        }
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
        manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
        (self.folder / "config.json").write_text(json.dumps(config))
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
        with tarfile.open(archive, "w") as tar:
            tar.add(path, "layer.tar")
            tar.add(self.folder / "config.json", "config.json")
            tar.add(self.folder / "manifest.json", "manifest.json")
        self.call("images", "import", str(archive))

    def run(self, number: str, *command: str, flags: Sequence[str] = ()) -> str:
        """A container; its id."""
        self.call("run", "--detach", "--null-io", *flags, IMAGE, number, *command)
        return number
