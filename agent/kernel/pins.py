"""Keep programs, maps and links in a folder of a bpffs (--state), so that they go on counting while no agent runs.

    DIR/ledger                                   what the last agent knew (ledger.py)
    DIR/DIGEST/manifest                          a description of the rest, written last
    DIR/DIGEST/{maps,programs,links}/NAME

Rules
1. The folder belongs to one agent at a time, by a lock that ends with its process.
2. DIGEST names everything that the programs were made of. Programs and maps of one DIGEST, a generation, fit together.
3. The kernel says which generation counts: the one whose own program `egress` is on its link `egress`.
4. What is pinned is loaded by root and trusted like a program: a folder that others can write to is refused.
5. Function probes and the programs that heal are never pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import MapDefinition

DEFAULT_FOLDER = Path("/sys/fs/bpf/udpwatch")
MANIFEST = "manifest"
LEDGER = "ledger"
BESIDE = "_new"  # after the name of what is being pinned
KINDS = ("map", "program", "link")
MAX_MANIFEST = 1 << 20
LOCK_SECONDS = 3.0
_BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h
_ARRAY = 2  # BPF_MAP_TYPE_ARRAY
_DIGEST = re.compile("[0-9a-f]{32}")

_libc = ctypes.CDLL(None, use_errno=True)


class Busy(UdpwatchError):
    """Another process holds the lock of the folder."""


class Generation:
    """Programs, maps and links that were loaded together."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Name the generation ``digest`` in a folder, which need not hold it."""
        self.digest = digest
        self._path = folder / digest

    def manifest(self) -> dict[str, Any] | None:
        """Return the description of a complete generation; None: it is missing or incomplete."""
        try:
            fd = bpf.pinned(self._path / MANIFEST)
        except OSError:
            return None
        try:
            size = bpf.map_definition(fd, MANIFEST).value_bytes
            raw = bpf.map_lookup(fd, bytes(4), size) if size <= MAX_MANIFEST else None
            described = json.loads((raw or b"").rstrip(b"\0"))
        except (OSError, ValueError, RecursionError):
            return None
        finally:
            os.close(fd)
        return described if isinstance(described, dict) else None

    def write_manifest(self, described: dict[str, Any]) -> None:
        """Complete the generation. Raises OSError."""
        content = json.dumps(described, separators=(",", ":")).encode()
        fd = bpf.map_create(MapDefinition(MANIFEST, _ARRAY, 4, -(-len(content) // 8) * 8, 1, 0))
        try:
            bpf.map_update(fd, bytes(4), content.ljust(-(-len(content) // 8) * 8, b"\0"))
            self._path.mkdir(0o700, exist_ok=True)
            bpf.pin(fd, self._path / MANIFEST)
        finally:
            os.close(fd)

    def get(self, kind: str, name: str) -> int:
        """Return a descriptor of one object. Raises OSError."""
        return bpf.pinned(self._path_of(kind, name))

    def pin(self, kind: str, name: str, fd: int) -> None:
        """Pin one object; it replaces one of the same name. Raises OSError."""
        path = self._path_of(kind, name)
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        _pin_over(fd, path)

    def unpin(self, kind: str, name: str) -> None:
        """Remove one object, if it is there."""
        self._path_of(kind, name).unlink(missing_ok=True)

    def has_counted(self, cgroup_id: int) -> bool:
        """Whether this generation judges replies of a cgroup, or did so before another one took its link."""
        try:
            fd = self.get("link", "egress")
        except OSError:
            return False
        try:
            return bpf.link_cgroup_id(fd) in (0, cgroup_id)  # 0: it was detached
        except OSError:
            return False
        finally:
            os.close(fd)

    @property
    def counts(self) -> bool:
        """Whether this generation judges replies: its program `egress` is on its link `egress`."""
        fds = []
        try:
            for kind in ("link", "program"):
                fds.append(self.get(kind, "egress"))
            return bpf.link_program_id(fds[0]) == bpf.program_info(fds[1]).id
        except OSError:
            return False
        finally:
            for fd in fds:
                os.close(fd)

    def remove(self) -> int:
        """Detach and free everything; return how many objects were pinned. Programs end one after the other: `egress`
        first, so that no request is noted that nothing judges."""
        removed = 0
        if self._path.is_symlink() or self._path.is_file():
            self._path.unlink()
            return 1
        for folder in ("", *(kind + "s" for kind in reversed(KINDS))):
            removed += _unlink_files(self._path / folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path)
        return removed

    def _path_of(self, kind: str, name: str) -> Path:
        return self._path / f"{kind}s" / name


class Pins:
    """An open and locked state folder. `close` keeps what is pinned."""

    def __init__(self, folder: Path, create: bool = True) -> None:
        """Open ``folder``, and create it unless ``create`` is false. Raises Busy if another process holds it, and
        UdpwatchError if it cannot be used.
        """
        self.folder = folder
        self.fd = _open(folder, create)
        try:
            _lock(self.fd)
        except OSError as error:
            self.close()
            if error.errno == errno.EWOULDBLOCK:
                raise Busy(
                    f"cannot use the state folder {folder}: another agent uses it; stop that agent, or choose another "
                    "--state DIR"
                ) from None
            raise UdpwatchError(f"cannot lock the state folder {folder}: {error.strerror}") from None

    @classmethod
    def inherited(cls, fd: int) -> Pins:
        """Use the folder that the parent process has opened and locked."""
        pins = cls.__new__(cls)
        pins.fd, pins.folder = fd, Path(f"/proc/self/fd/{fd}")
        return pins

    @property
    def _path(self) -> Path:
        return Path(f"/proc/self/fd/{self.fd}")  # whatever happens to the name

    def close(self) -> None:
        """Give the folder to the next agent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def generation(self, digest: str) -> Generation:
        """Return the generation of a digest, which need not exist."""
        return Generation(self._path, digest)

    def generations(self) -> list[Generation]:
        """Return the generations that exist, complete or not. Other folders are left alone."""
        with os.scandir(self.fd) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [self.generation(name) for name in sorted(found) if _DIGEST.fullmatch(name)]

    def ledger(self) -> int | None:
        """Return a descriptor of the ledger's map; None: there is none."""
        try:
            return bpf.pinned(self._path / LEDGER)
        except OSError:
            return None

    def pin_ledger(self, fd: int) -> None:
        """Pin a new ledger in the place of the old one. Raises OSError."""
        _pin_over(fd, self._path / LEDGER)

    def remove(self) -> int:
        """Detach and free everything, and remove the folder; return how many objects were pinned."""
        removed = 0
        while generations := self.generations():
            removed += sum(each.remove() for each in generations)
        for each in sorted(self._path.iterdir()):
            if each.name in (LEDGER, LEDGER + BESIDE):
                each.unlink()
                removed += 1
        with contextlib.suppress(OSError):  # e.g. EBUSY: the folder is where the bpffs is mounted
            self.folder.rmdir()
        return removed


def _lock(fd: int) -> None:
    """Lock a folder. The loader of an agent that was killed may hold the lock a moment longer. Raises OSError."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _unlink_files(folder: Path) -> int:
    """Remove the files of a folder in the order of their names; return their number. Links are not followed."""
    if folder.is_symlink():
        return 0
    removed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        with os.scandir(folder) as entries:
            files = sorted(entry.path for entry in entries if not entry.is_dir(follow_symlinks=False))
        for path in map(Path, files):
            path.unlink()
            removed += 1
    return removed


def _pin_over(fd: int, path: Path) -> None:
    """Pin an object in the place of another one."""
    beside = path.with_name(path.name + BESIDE)
    beside.unlink(missing_ok=True)
    bpf.pin(fd, beside)
    beside.rename(path)


def _open(folder: Path, create: bool) -> int:
    def refuse(reason: str) -> UdpwatchError:
        return UdpwatchError(f"cannot use the state folder {folder}: {reason}")

    try:
        if create:
            # Not the parents: a folder made below an unmounted bpffs would be of another file system.
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if folder.is_symlink():
            raise refuse("it is a symbolic link; give the folder itself") from None
        hint = "; mount the bpffs: mount -t bpf bpf /sys/fs/bpf" if not _is_bpffs(folder.parent) else ""
        raise refuse(f"{error.strerror}{hint}") from None
    found = os.fstat(fd)
    reason = ""
    if not _is_bpffs(f"/proc/self/fd/{fd}"):
        reason = "it is not in a bpffs; mount one (mount -t bpf bpf /sys/fs/bpf) and give a folder in it"
    elif found.st_uid != os.geteuid():
        reason = f"it belongs to user {found.st_uid}, who could replace the programs; remove it"
    elif stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "others can write to it, and could replace the programs; give a folder of its own, such as " + str(
            folder / "udpwatch"
        )
    if reason:
        os.close(fd)
        raise refuse(reason)
    return fd


def _is_bpffs(path: Path | str) -> bool:
    """Return whether a path is in a bpffs (struct statfs begins with f_type, a long)."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer):
        return False
    kind: int = struct.unpack_from("=q" if ctypes.sizeof(ctypes.c_long) == 8 else "=i", buffer)[0]
    return kind & 0xFFFFFFFF == _BPF_FS_MAGIC


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Pins]:
    """Open an existing state folder for a while. Raises what `Pins` raises."""
    pins = Pins(folder, create=False)
    try:
        yield pins
    finally:
        pins.close()
