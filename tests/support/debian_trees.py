"""Run programs of Debian's packages, unchanged, without installing them: no service starts on this machine.

A tree holds the files of packages and of what they depend on, except for what this machine has. `command` runs a
program in an overlay of the tree over this machine's own files, in mount and process namespaces of its own.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

PLACE = ROOT / "build/census"
_MERGED = ("bin", "sbin", "lib", "lib64")  # links to /usr/bin and so on; folders would hide this machine's files
_ENTER = """
set -e
mount -t tmpfs none {place}
cd {place}
mkdir upper work root
for each in usr etc var; do
    mkdir -p upper/$each work/$each root/$each none/$each
    lower={tree}/$each
    [ -d $lower ] || lower=none/$each
    [ $each = var ] || lower=$lower:/$each
    mount -t overlay -o lowerdir=$lower,upperdir=upper/$each,workdir=work/$each none root/$each
done
cp -a {files} root/census
cd root
for each in bin sbin lib lib64; do [ ! -L /$each ] || ln -s usr/$each $each; done
mkdir -m 1777 tmp var/tmp 2>/dev/null || true
mkdir -p dev proc run root opt var/run var/lib var/log var/cache
mount --rbind /dev dev
mount -t tmpfs none dev/shm
mount -t tmpfs none tmp
mount -t tmpfs none run
mount -t proc none proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
for user in {users}; do
    grep -q "^$user:" etc/passwd || echo "$user:x:64000:64000::/census:/bin/sh" >>etc/passwd
    grep -q "^$user:" etc/group || echo "$user:x:64000:" >>etc/group
done
exec chroot . /bin/sh census/start
"""
_START = """
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/games HOME=/census LANG=C.UTF-8
cd /census
{command}
sleep infinity
"""


class NotAvailable(Exception):
    """A package cannot be downloaded here."""


@dataclass(frozen=True)
class Tree:
    """The files of packages."""

    path: Path
    version: str  # of the first package


def tree(packages: Sequence[str]) -> Tree:
    """Return the tree of packages ("name" or "name=version"); the first call downloads it. Raises NotAvailable."""
    path = _path(packages)
    stamp = path.with_name(f"{path.name}.version")
    if not stamp.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        version = _fill(path, packages)
        stamp.write_text(version)
    return Tree(path, stamp.read_text())


def command(
    place: Path, made: Tree, text: str, files: Mapping[str, str] = {}, users: Sequence[str] = ()
) -> Sequence[str]:
    """Return the command that runs a line of shell in the tree; it ends with the process that starts it.

    ``place``: an empty folder for its mounts. ``files``: name -> content, in the folder /census, where the line runs.
    ``users``: that /etc/passwd shall have.
    """
    source = place / "files"
    source.mkdir()
    mounts = place / "mounts"
    mounts.mkdir()
    for name, content in {**files, "start": _START.format(command=text)}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    source.chmod(0o777)
    enter = _ENTER.format(
        place=shlex.quote(str(mounts)),
        tree=shlex.quote(str(made.path)),
        files=shlex.quote(str(source)),
        users=shlex.join(users) or '""',
    )
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", enter]


def remove(packages: Sequence[str]) -> None:
    """Remove the files of a tree; what was seen stays known."""
    path = _path(packages)
    shutil.rmtree(path, ignore_errors=True)
    path.with_name(f"{path.name}.version").unlink(missing_ok=True)


def _path(packages: Sequence[str]) -> Path:
    return PLACE / re.sub(r"[^\w.+-]", "", "-".join(packages))


def _fill(path: Path, packages: Sequence[str]) -> str:
    """Download and unpack; return the version of the first package."""
    archives = PLACE / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    install = [
        "apt-get",
        "-qq",
        "-y",
        "--no-install-recommends",
        "--download-only",
        "--allow-downgrades",  # "nodejs=18.*": Debian's, although this machine has another one
        "-o",
        f"Dir::Cache::archives={archives}",
    ]
    wanted = [*install, "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=true", "install", *packages]
    done = subprocess.run(wanted, capture_output=True, text=True, check=False)
    if done.returncode:  # the lists of packages are missing or old
        _update()
        done = subprocess.run(wanted, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NotAvailable(f"cannot download {' '.join(packages)}: {' '.join(reason)}; run `apt-get update`")
    path.mkdir()
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", archive, path], check=True)
    version = _version(packages[0].partition("=")[0], archives)
    shutil.rmtree(archives)
    for name in _MERGED:
        folder = path / name
        if folder.is_dir() and not folder.is_symlink() and Path("/", name).is_symlink():
            (path / "usr").mkdir(exist_ok=True)
            subprocess.run(["cp", "--archive", "--link", f"{folder}/.", path / "usr" / name], check=True)
            shutil.rmtree(folder)
    return version


@functools.cache
def _update() -> None:
    """Read the lists of packages, once: without a network, it takes long."""
    subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)


def _version(package: str, archives: Path) -> str:
    for archive in archives.glob(f"{package}_*.deb"):
        return _output("dpkg-deb", "--field", str(archive), "Version")
    return _output("dpkg-query", "--show", "--showformat=${Version}", package)


def _output(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
