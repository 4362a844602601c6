"""Store compiled programs in a folder between two starts.

Rules
1. Everything that is loaded is an Object, whether it was compiled now or read from a file.
2. The name of a file is the digest of everything that the compiler gets, so any change leads to another file.
3. Root loads these files into the kernel: a folder or file that another user could have written is not used, nor is a
   damaged one.
4. Without a usable folder everything works; it only compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from udpwatch.agent import __version__
from udpwatch.agent.kernel.bpf import MapDefinition, source_register

MAX_FILES = 16
MAX_FILE_BYTES = 4 << 20
_SUFFIX = ".json"
_OURS = re.compile(r"[0-9a-f]{64}\.json|\.[0-9a-f]{64}\.json\.\d+")  # the second: a file that was not finished
_INSTRUCTION = struct.Struct("=BBhi")
_LOAD_IMMEDIATE = 0x18  # BPF_LD | BPF_DW | BPF_IMM: two slots, of which the second has code 0
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True, slots=True)
class Object:
    """The result of compiling one source file; instructions name a map by its index in ``maps``."""

    compiler: str
    maps: tuple[MapDefinition, ...]
    programs: dict[str, bytes]


def name_maps(instructions: bytes, numbers: Mapping[int, int]) -> bytes:
    """Replace the number of each map in the instructions: a descriptor by an index, or the reverse.

    Raises LookupError for a map without a number, and for unknown kinds of constants.
    """
    code = bytearray(instructions)
    for at in range(0, len(code), _INSTRUCTION.size):
        operation, both, offset, number = _INSTRUCTION.unpack_from(code, at)
        kind = source_register(both)
        if operation != _LOAD_IMMEDIATE or not kind:
            continue
        if kind != _PSEUDO_MAP_FD:
            raise LookupError(f"instruction {at // _INSTRUCTION.size} loads a constant of the unknown kind {kind}")
        if number not in numbers:
            raise LookupError(f"instruction {at // _INSTRUCTION.size} names the unknown map {number}")
        _INSTRUCTION.pack_into(code, at, operation, both, offset, numbers[number])
    return bytes(code)


def key(sources: Path, source: str, constants: Mapping[str, object]) -> str:
    """Return the name of an object. All of ``sources`` counts, since any file may include any other."""
    digest = hashlib.sha256()
    compiled = [source, __version__, platform.machine(), sorted((name, str(constants[name])) for name in constants)]
    digest.update(json.dumps(compiled).encode())
    for path in sorted(path for kind in ("*.c", "*.h") for path in sources.rglob(kind)):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(sources)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def encode(key: str, compiled: Object) -> bytes:
    """Encode an object: the digest of the rest, a newline, JSON."""
    words = asdict(compiled) | {"key": key, "programs": {name: code.hex() for name, code in compiled.programs.items()}}
    body = json.dumps(words).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(key: str, content: bytes) -> Object:
    """Decode an object; raises ValueError if the content is damaged or has another key."""
    digest, _, body = content.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("the file is damaged")
    words = json.loads(body)
    if words["key"] != key:
        raise ValueError("the file has another key")
    maps = tuple(MapDefinition(**each) for each in words["maps"])
    return Object(words["compiler"], maps, {name: bytes.fromhex(code) for name, code in words["programs"].items()})


class CompileCache:
    """A folder with MAX_FILES objects at most; no method raises OSError."""

    def __init__(self, folder: Path | None) -> None:
        """Use ``folder``; None stores nothing."""
        self._folder = folder

    def get(self, key: str) -> Object | None:
        """Return the object of this key, or None if there is no usable one."""
        try:
            with self._opened() as folder:
                return decode(key, _read(folder, key + _SUFFIX))
        except (OSError, ValueError):
            return None

    def put(self, key: str, compiled: Object) -> None:
        """Store an object; the least recently used ones are deleted."""
        if not self._folder:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as folder:
                _write(folder, key + _SUFFIX, encode(key, compiled))
                _make_room(folder)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield a descriptor of the folder; raises OSError if it is not usable."""
        if not self._folder:
            raise FileNotFoundError
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _require_ours(os.fstat(folder))
            yield folder
        finally:
            os.close(folder)


def _require_ours(found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others can write to it")


def _read(folder: int, name: str) -> bytes:
    with os.fdopen(
        os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder), "rb"
    ) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError("it is not a regular file")
        _require_ours(found)
        content = file.read(MAX_FILE_BYTES)
        with contextlib.suppress(OSError):  # marks it as used; a read-only folder keeps everything
            os.utime(file.fileno())
    return content


def _write(folder: int, name: str, content: bytes) -> None:
    """Write a file atomically, even if another process writes the same one."""
    unfinished = f".{name}.{os.getpid()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(unfinished, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
        os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise


def _make_room(folder: int) -> None:
    """Delete the oldest of our own files; the folder may hold others."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _OURS.fullmatch(entry.name)]
    ages = {name: os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime for name in names}
    for name in sorted(ages, key=lambda name: -ages[name])[MAX_FILES:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
