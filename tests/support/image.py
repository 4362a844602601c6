"""The project's image, built by its Dockerfile on a base made from Debian's packages; no registry is used.

Debian's packages come from the mirror of this machine's apt, Python's from the index of its pip. The base and the
image are cached outside the repository, and replaced when they are out of date.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from machine import cgroup_folders, remove_cgroups
from mirrors import apt_options, sources
from repository import ROOT
from runtimes import Docker

from udpwatch.agent import __version__
from udpwatch.agent.testing.lab import die_with_parent

CACHE = Path(os.environ.get("UDPWATCH_IMAGES", Path.home() / ".cache/udpwatch/images"))
IMAGE = f"udpwatch:{__version__}"  # as the chart names it
SUITE, PYTHON = "trixie", "3.13"  # of the base image
SOURCES = ("agent", "bpf", "dns", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", ".dockerignore")
BUILD_SECONDS = 900  # two cores that others use, too
_WHEELS = "usr/share/udpwatch-test"
_PIP = f"[global]\nno-index = true\nfind-links = /{_WHEELS}/wheels\n"
#: what Debian's own slim image leaves out
_SLIM = tuple(f"path-exclude=/usr/share/{kind}/*" for kind in ("doc", "man", "info", "locale", "groff", "lintian"))


class Builder(Docker):
    """Docker in the machine's own network, where packages come from; it makes no link and no rule there."""

    def _enter(self) -> None:
        die_with_parent()

    def command(self) -> list[str]:
        without = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")
        return [*super().command(), *without]

    def build(self, base: Path, name: str) -> None:
        """Build IMAGE from a base of that name."""
        self.call("import", str(base), name)
        # Docker 20.10 has its classic builder built in, a newer client looks for BuildKit first.
        proxies = [f"--build-arg={name}" for name in os.environ if name.lower().endswith("_proxy")]
        command = self._client("build", "--network=host", f"--tag={IMAGE}", *proxies, str(ROOT))
        environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
        _run(command, "docker build", env=environment)


def obtain(folder: Path) -> Path:
    """Write the output of `docker save` into this folder, from the cache or a new build; skip the test if that is not
    possible.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it
        base = _base(folder)
        path = CACHE / f"image-{_digest([base.name], [ROOT / 'Dockerfile', *_sources()])}.tar"
        if not path.exists():
            cgroups = cgroup_folders()
            try:
                with Builder(folder, None) as docker:  # type: ignore[arg-type]
                    docker.build(base, _from())
                    docker.call("save", f"--output={folder}/image.tar", IMAGE)
            finally:
                remove_cgroups(cgroups)
            _keep(folder / "image.tar", path)
    return path


def _from() -> str:
    """Return the base image that the Dockerfile names."""
    found = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found, "the Dockerfile names no base"
    return found.group(1)


def _sources() -> list[Path]:
    """Return all files that the Dockerfile copies."""
    files = [path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*")) if path.is_file()]
    return sorted(path for path in files if "__pycache__" not in path.parts)


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for word in (*words, *(f"{path.relative_to(ROOT)} {_of(path)}" for path in files)):
        digest.update(f"{word}\n".encode())
    return digest.hexdigest()[:16]


def _of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _keep(made: Path, path: Path) -> None:
    """Put a finished file into the cache and remove what it replaces."""
    kind = path.name.partition("-")[0]
    shutil.move(made, path.with_suffix(".part"))
    for old in CACHE.glob(f"{kind}-*.tar"):
        old.unlink()
    path.with_suffix(".part").rename(path)


def _base(folder: Path) -> Path:
    """Make a root file system as small as debian:*-slim, with the files that the build's pip needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    mirrors = sources(SUITE)
    if not mirrors:
        pytest.skip("apt knows no Debian mirror here: run apt-get update on a Debian machine")
    path = CACHE / f"base-{_digest([_from(), _PIP, *_SLIM, PYTHON, *wanted, *mirrors], [ROOT / 'constraints.txt'])}.tar"
    if path.exists():
        return path
    if not shutil.which("mmdebstrap"):
        pytest.skip("no mmdebstrap here to make the image's base: apt-get install mmdebstrap")
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
    pip += [f"--python-version={PYTHON}"]
    _run([*pip, f"--dest={wheels}", f"--constraint={ROOT}/constraints.txt", *wanted], "pip download")
    options = [*(f"--dpkgopt={line}" for line in _SLIM), '--aptopt=APT::Install-Recommends "false"']
    options += [f"--aptopt={line}" for line in apt_options()]
    if any(mirror.startswith("deb https") for mirror in mirrors):
        options.append("--include=ca-certificates")
    made = folder / "base.tar"
    _run(["mmdebstrap", "-q", "--variant=minbase", *options, SUITE, str(made), *mirrors], "mmdebstrap")
    (folder / "pip.conf").write_text(_PIP)
    with tarfile.open(made, "a") as tar:
        tar.add(wheels, f"./{_WHEELS}/wheels")
        tar.add(folder / "pip.conf", "./etc/pip.conf")
    _keep(made, path)
    return path


def _run(command: list[str], what: str, **options: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS, **options)
    assert done.returncode == 0, f"{what}: {(done.stdout + done.stderr)[-3000:]}"
