"""Find the cgroup to watch: the root of the v2 hierarchy, mounted or not."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.errors import CannotRun, UsageError
from udpwatch.agent.kernel.mounts import open_private

ROOT_ID = 1  # the root cgroup's inode number, which is its id (kernel/cgroup/cgroup.c, cgroup_setup_root)
_INIT_CGROUP_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO, include/linux/proc_ns.h


@dataclass(frozen=True, slots=True)
class Cgroup:
    """An open cgroup v2 folder."""

    fd: int
    path: str  # for messages: where it was found
    id: int

    @property
    def is_root(self) -> bool:
        """Whether this cgroup contains every process of the node."""
        return self.id == ROOT_ID

    def contains(self, pid: int) -> bool:
        """Return whether a process is in this cgroup or below it. Member lists that are not readable count as empty."""
        if self.is_root:
            return True
        for _root, _folders, _files, folder in os.fwalk(".", dir_fd=self.fd):
            try:
                with os.fdopen(os.open("cgroup.procs", os.O_RDONLY, dir_fd=folder)) as members:
                    if str(pid) in members.read().split():
                        return True
            except OSError:
                continue
        return False

    def open_top(self) -> Cgroup:
        """Open the topmost cgroup that is visible above this one: paths of processes in /proc begin there."""
        top = Cgroup(os.dup(self.fd), self.path, self.id)
        while not top.is_root:
            try:
                above = _open("..", top.fd)
            except OSError:  # the mount point is a folder of another file system
                break
            top.close()
            top = Cgroup(above.fd, str(Path(top.path).parent), above.id)
        return top

    def close(self) -> None:
        """Close the folder; its links stay."""
        os.close(self.fd)


def in_own_namespace() -> bool:
    """Return whether this process sees only a part of the cgroup tree, as in a container with a cgroup namespace."""
    return Path("/proc/self/ns/cgroup").stat().st_ino != _INIT_CGROUP_NAMESPACE


def _open(path: str, folder: int | None = None) -> Cgroup:
    """Open a folder of cgroup v2, relative to an open one; raise OSError if it is not one."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.stat("cgroup.controllers", dir_fd=fd)  # exists in every folder of v2 and in none of v1
    except FileNotFoundError:
        os.close(fd)
        raise OSError(errno.EINVAL, "not a cgroup v2 folder", path) from None
    return Cgroup(fd, path, os.fstat(fd).st_ino)


def _mounted(mountinfo: Path = Path("/proc/self/mountinfo")) -> Iterator[str]:
    """Yield the mount points of cgroup2 in this mount namespace."""
    # The kernel writes space, tab, newline and backslash in octal, but not the other characters at which Python splits
    # lines or words.
    for line in os.fsdecode(mountinfo.read_bytes()).split("\n"):
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            yield re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), mount.split(" ")[4])


def find(path: str | None) -> Cgroup:
    """Open the cgroup to watch.

    If ``path`` is given, open it; raise UsageError if it is not a cgroup v2 folder. Otherwise return the first root of
    the hierarchy among the local mounts, the mounts of process 1 (in a container with hostPID) and a private mount. If
    none is the root, return the first that opens. Raise CannotRun if none does.
    """
    if path is not None:
        try:
            return _open(path)
        except OSError as error:
            raise UsageError(
                f"invalid value {path!r} for --cgroup: expected a folder of cgroup v2 ({error.strerror})"
            ) from None
    found: Cgroup | None = None
    reasons = []
    for candidate in (*_mounted(), "/proc/1/root/sys/fs/cgroup", "/proc/1/root/sys/fs/cgroup/unified"):
        try:
            cgroup = _open(candidate)
        except OSError as error:
            reasons.append(f"{candidate}: {error.strerror}")
            continue
        if cgroup.is_root:
            if found:
                found.close()
            return cgroup
        if found:
            cgroup.close()
        else:
            found = cgroup
    if found is None:
        try:
            fd = open_private("cgroup2")
        except OSError as error:
            reasons.append(str(error.strerror))
            raise CannotRun(
                f"cannot open cgroup v2: {'; '.join(reasons)}; mount it, e.g. mount -t cgroup2 none /mnt, "
                "and give --cgroup /mnt"
            ) from None
        found = Cgroup(fd, "a private mount of cgroup2", os.fstat(fd).st_ino)
    return found
