"""Debian's own kernels, unpacked in a cache outside the repository.

Each kernel is the one that the suite's ``linux-image-amd64`` depends on, fetched by name from the mirror that this
machine's apt uses. Nothing is installed: the suites have sources, lists and a folder of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: outside /var and /tmp, over which a guest mounts file systems of its own
CACHE = Path(os.environ.get("UDPWATCH_KERNELS", Path.home() / ".cache/udpwatch/kernels"))
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: short name -> Debian suite, oldest first; the last one is whatever is newest
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "newest": "sid"}


class Unavailable(Exception):
    """A kernel is not available; the message says why and what to do."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted."""

    name: str  # key of SUITES
    release: str  # what uname -r will say
    image: Path  # lib/modules lies beside its folder


def obtain(name: str) -> Kernel:
    """Return the kernel of a suite, from the cache or the mirror; raises Unavailable."""
    suite = SUITES[name]
    folder = CACHE / suite
    stamp = folder / "packages"  # written last: where it is, everything is there
    try:
        packages = _packages(suite, folder)
    except Unavailable:
        if stamp.exists():  # no mirror: what was fetched before is as good
            return _unpacked(name, folder)
        raise
    wanted = "\n".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        _unpack(packages, folder)
        stamp.write_text(wanted)
    return _unpacked(name, folder)


def _unpacked(name: str, folder: Path) -> Kernel:
    (image,) = (folder / "root/boot").glob("vmlinuz-*")
    return Kernel(name, image.name.removeprefix("vmlinuz-"), image)


def _packages(suite: str, folder: Path) -> list[str]:
    """Return name=version of every package of the kernel, as the mirror has them now."""
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {suite} main\n")
    _apt(folder, "update", "-qq")
    image = _dependency(folder, "linux-image-amd64", r"linux-image-[\w.+~-]+-amd64")
    names = [image]
    # Since 7.x the image package holds nothing; its parts are beside it.
    names += [
        part
        for kind in ("base", "binary", "modules")
        if (part := image.replace("linux-image-", f"linux-{kind}-")) in _depends(folder, image)
    ]
    return [f"{name}={_field(folder, name, 'Version')}" for name in names]


def _mirror() -> str:
    lines = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for line in lines:
        origin, label, uri = line.split("\t")
        if origin == label == "Debian":
            return uri
    raise Unavailable("this machine's apt knows no mirror of Debian: run apt-get update, on a Debian machine")


def _apt(folder: Path, *command: str, tool: str = "apt-get", cwd: Path | None = None) -> str:
    options = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache::pkgcache": folder / "pkgcache.bin",
        "Dir::Cache::srcpkgcache": "",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    words = [tool, *(word for name, value in options.items() for word in ("-o", f"{name}={value}")), *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise Unavailable(f"{tool} {' '.join(command)} of {folder.name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _field(folder: Path, package: str, field: str) -> str:
    found = re.search(rf"^{field}: (.*)$", _apt(folder, "show", package, tool="apt-cache"), re.MULTILINE)
    return found.group(1) if found else ""


def _depends(folder: Path, package: str) -> str:
    return f"{_field(folder, package, 'Depends')}, {_field(folder, package, 'Pre-Depends')}"


def _dependency(folder: Path, package: str, pattern: str) -> str:
    found = re.search(pattern, _depends(folder, package))
    if not found:
        raise Unavailable(f"{package} of {folder.name} depends on no kernel image")
    return found.group()


def _unpack(packages: list[str], folder: Path) -> None:
    root, archives = folder / "root", folder / "archives"
    for leftover in (root, archives):
        shutil.rmtree(leftover, ignore_errors=True)
        leftover.mkdir()
    _apt(folder, "download", *packages, cwd=archives)
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    shutil.rmtree(archives)
    if not (root / "lib").exists():  # merged /usr
        (root / "lib").symlink_to("usr/lib")
    try:
        (release,) = (path.name for path in (root / "lib/modules").iterdir())
        if not (root / f"boot/vmlinuz-{release}").exists():
            (root / "boot").mkdir(exist_ok=True)
            shutil.copy(root / f"lib/modules/{release}/vmlinuz", root / f"boot/vmlinuz-{release}")
    except (OSError, ValueError) as error:
        raise Unavailable(f"the packages of {folder.name} ({', '.join(packages)}) hold no kernel: {error}") from None
    subprocess.run(["depmod", "-b", root, release], check=True)
