"""A real Docker on the census' host: its own docker0, rules and docker-proxy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest
from debian_trees import NotAvailable, Tree, command
from runtimes import Docker

from udpwatch.agent.testing.lab import Namespace


class CensusDocker(Docker):
    """Docker with containers in a cgroup of the census."""

    def __init__(self, folder: Path, node: Namespace, cgroup: Path) -> None:
        """``cgroup``: of the daemon and of docker-proxy; the containers are in another one beside it.

        Raises NotAvailable.
        """
        self._cgroup = cgroup
        self._images: dict[str, str] = {}
        try:
            super().__init__(folder, node)
        except pytest.skip.Exception as error:
            raise NotAvailable(str(error)) from None

    def command(self) -> Sequence[str]:
        """The lab's client has an address below this network."""
        return [*super().command(), "--fixed-cidr=172.17.128.0/17", "--ipv6", "--fixed-cidr-v6=fd00:17::/64"]

    def _enter(self) -> None:
        (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))
        super()._enter()

    def image(self, made: Tree, line: str, files: Mapping[str, str]) -> str:
        """Return the name of an image. ``line`` of shell, run in the tree, writes its root as a tar archive."""
        name = f"census:{hashlib.sha256(repr((made, line, files)).encode()).hexdigest()[:16]}"
        if name not in self._images:
            with tempfile.TemporaryDirectory(prefix="udpwatch-test-") as place:
                archive = self.folder / "image.tar"
                with archive.open("wb") as output:
                    done = subprocess.run(
                        command(Path(place), made, f"{line}\nexit", files),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.PIPE,
                        check=False,
                    )
            assert done.returncode == 0, f"cannot make the image: {done.stderr.decode(errors='replace')}"
            self._images[name] = self.call("import", str(archive), name)
            archive.unlink()
        return name

    @contextlib.contextmanager
    def running(self, lines: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        """Run containers, one for each line of arguments of `docker run`; yield the client of the first one."""
        parent = f"/{self._cgroup.parent.name}/containers"
        names = [f"census-{number}" for number in range(len(lines))]
        clients = []
        try:
            for name, line in zip(names, lines, strict=True):
                arguments = ["run", f"--name={name}", f"--cgroup-parent={parent}", *shlex.split(line.removesuffix("&"))]
                clients.append(
                    subprocess.Popen(self._client(*arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
            yield clients[0]
        finally:
            subprocess.run(self._client("rm", "--force", *names), capture_output=True, check=False)
            for each in clients:
                each.kill()
                each.wait()
