"""The image, built by podman: it sets the times of all files in the layers, as Docker's classic builder cannot."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import IO

from checks import Commit
from errors import ReleaseError
from programs import run
from sbom import Contents

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_METADATA = re.compile(r"opt/udpwatch/lib/python[\d.]+/site-packages/[^/]+\.dist-info/METADATA")
_DPKG_STATUS = "var/lib/dpkg/status"
_OS_RELEASE = ("etc/os-release", "usr/lib/os-release")


def architecture() -> str:
    """Return this machine's architecture in the words of container registries."""
    return ARCHITECTURES.get(os.uname().machine, os.uname().machine)


def build(source: Path, version: str, commit: Commit, base: str, target: Path) -> None:
    """Build the image from ``source`` and write what `docker load` reads. ``base`` replaces the Dockerfile's."""
    if not shutil.which("podman"):
        raise ReleaseError("cannot build the image: podman is not installed; install it, or set IMAGE=off")
    name = f"docker.io/library/udpwatch:{version}"  # what `docker build --tag udpwatch:VERSION` calls it
    labels = {"version": version, "revision": commit.sha}
    command = ["podman", "build", "--quiet", "--no-cache", "--format=docker", "--network=host", "--isolation=chroot"]
    command += [f"--timestamp={commit.time}", f"--tag={name}"]
    command += [f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items()]
    command += [f"--build-arg=BASE={base}"] if base else []
    run([*command, str(source)], "build the image", "set BASE to an image of Debian that podman can get, or IMAGE=off")
    saved = target.with_name("saved.tar")
    try:
        run(["podman", "save", "--quiet", "--format=docker-archive", f"--output={saved}", name], "save the image")
    finally:
        run(["podman", "rmi", name], "remove the image from podman's storage")
    _without_traces(saved, target, commit.time)


def _without_traces(saved: Path, target: Path, time: int) -> None:
    """Write a docker-archive again without the ids and host names of the containers that the build ran in.

    What Docker before 1.10 needed, a folder for each layer, is left out.
    """
    with tarfile.open(saved) as old, tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as new:
        (manifest,) = json.loads(_text(old, "manifest.json"))
        config = json.loads(_text(old, manifest["Config"]))
        for key in ("container", "container_config", "parent"):
            config.pop(key, None)
        config["config"].pop("Hostname", None)
        for step in config["history"]:
            step.pop("comment", None)
        described = json.dumps(config, sort_keys=True).encode()
        manifest["Config"] = f"{hashlib.sha256(described).hexdigest()}.json"
        _add(new, "manifest.json", io.BytesIO(json.dumps([manifest], sort_keys=True).encode()), time)
        _add(new, manifest["Config"], io.BytesIO(described), time)
        for layer in manifest["Layers"]:
            _add(new, layer, old.extractfile(layer), time)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes] | None, time: int) -> None:
    assert file, name
    member = tarfile.TarInfo(name)
    member.size, member.mtime = file.seek(0, os.SEEK_END), time
    file.seek(0)
    tar.addfile(member, file)


def contents(archive: Path) -> Contents:
    """Read from the image's layers which Debian and Python packages it has."""
    files: dict[str, str] = {}
    with tarfile.open(archive) as image:
        for layer in json.loads(_text(image, "manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=image.extractfile(layer)) as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and (name in (_DPKG_STATUS, *_OS_RELEASE) or _METADATA.fullmatch(name)):
                        files[name] = _text(tar, member)
    release = next(files[name] for name in _OS_RELEASE if name in files)
    suite = re.search(r'^VERSION_ID="?([\d.]+)', release, re.MULTILINE)
    python = [text for name, text in sorted(files.items()) if _METADATA.fullmatch(name)]
    return Contents(python, files[_DPKG_STATUS], f"debian-{suite[1] if suite else 'unknown'}")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> str:
    file = tar.extractfile(member)
    assert file, member
    return file.read().decode()
