"""Compiled programs as plain data, and the folder that keeps them from one start to the next.

Rules
1. What is loaded has always come through here, whether it was compiled a moment ago or read from a file.
2. A file's name is the digest of everything that the compiler was given. Where any of it changes there is no such file.
3. Root loads what lies here into the kernel: a folder or a file that anybody else could have written is not used, nor
   is one that is damaged.
4. Without a usable folder everything works, a compile later.
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
_OURS = re.compile(r"[0-9a-f]{64}\.json|\.[0-9a-f]{64}\.json\.\d+")  # the second: what a writer that was killed left
_INSTRUCTION = struct.Struct("=BBhi")
_LOAD_IMMEDIATE = 0x18  # BPF_LD | BPF_DW | BPF_IMM: two slots, the second one's code is 0
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True, slots=True)
class Object:
    """What a compile made of one source file; where instructions name a map, they hold its index in ``maps``."""

    compiler: str
    maps: tuple[MapDefinition, ...]
    programs: dict[str, bytes]


def name_maps(instructions: bytes, numbers: Mapping[int, int]) -> bytes:
    """The instructions with each map named by another number: descriptors become indices, or the reverse.

    Raises LookupError for a map that has none, and for constants of kinds other than maps and plain numbers.
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
    """The name under which the object is kept: all of ``sources`` counts, since any file may include any other."""
    digest = hashlib.sha256()
    compiled = [source, __version__, platform.machine(), sorted((name, str(constants[name])) for name in constants)]
    digest.update(json.dumps(compiled).encode())
    for path in sorted(path for kind in ("*.c", "*.h") for path in sources.rglob(kind)):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(sources)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def encode(key: str, compiled: Object) -> bytes:
    """A file's content: the digest of the rest, a line end, JSON."""
    words = asdict(compiled) | {"key": key, "programs": {name: code.hex() for name, code in compiled.programs.items()}}
    body = json.dumps(words).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(key: str, content: bytes) -> Object:
    """Raises ValueError where the content is not whole, or another key's."""
    digest, _, body = content.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("it is damaged")
    words = json.loads(body)
    if words["key"] != key:
        raise ValueError("it is another one's")
    maps = tuple(MapDefinition(**each) for each in words["maps"])
    return Object(words["compiler"], maps, {name: bytes.fromhex(code) for name, code in words["programs"].items()})


class Cache:
    """A folder of objects, MAX_FILES at most; no method raises OSError."""

    def __init__(self, folder: Path | None) -> None:
        """None: nothing is kept."""
        self._folder = folder

    def get(self, key: str) -> Object | None:
        """The object of this key, None where there is none that may be used."""
        try:
            with self._opened() as folder:
                return decode(key, _read(folder, key + _SUFFIX))
        except (OSError, ValueError):
            return None

    def put(self, key: str, compiled: Object) -> None:
        """Keep an object; the least recently used ones make room."""
        if not self._folder:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as folder:
                _write(folder, key + _SUFFIX, encode(key, compiled))
                _make_room(folder)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the folder. Raises OSError where there is none that may be used."""
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
            raise PermissionError("it is no file")
        _require_ours(found)
        content = file.read(MAX_FILE_BYTES)
        with contextlib.suppress(OSError):  # that it was used; a folder that is read-only keeps all that it has
            os.utime(file.fileno())
    return content


def _write(folder: int, name: str, content: bytes) -> None:
    """There whole or not at all, whoever else writes the same."""
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
    """Only what is ours by its name goes: the folder may hold more."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _OURS.fullmatch(entry.name)]
    ages = {name: os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime for name in names}
    for name in sorted(ages, key=lambda name: -ages[name])[MAX_FILES:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
