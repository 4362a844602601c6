"""Store what the agent knows in a map, in place of a file: it lives as long as the pinned programs, and a reboot ends
both.

The map has two halves. A record is written to the half that is not in use, then one 8-byte store makes it the current
one, so that a process that is killed leaves the old or the new record.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import MapDefinition
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.pins import LEDGER, Pins
from udpwatch.agent.kernel.rlimits import raise_memory_lock_limit

HALF_BYTES = 2 << 20  # compressed; the default limits need 1.2 MB
MAX_RECORD_BYTES = 64 << 20  # of a compressed record
PIECE = 32  # elements
_ARRAY, _MMAPABLE = 2, 1 << 10  # BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE
_PAGE = mmap.PAGESIZE
_HEADER = struct.Struct("=I32s")  # length, SHA-256
_WORDS = struct.Struct("=QQ")  # in the first page


def _encode(value: Mapping[str, object] | Sequence[object], pace: Callable[[], None]) -> Iterator[bytes]:
    """Yield the JSON text of a container in pieces: one call of json.dumps() would keep all other threads waiting."""
    is_object = isinstance(value, Mapping)
    items = list(value.items()) if isinstance(value, Mapping) else [("", each) for each in value]
    yield b"{" if is_object else b"["
    at = 0
    while at < len(items):
        small = list(itertools.takewhile(lambda item: not _is_large(item[1]), items[at : at + PIECE]))
        pace()
        yield b"," if at else b""
        if small:
            batch = dict(small) if is_object else [each for _, each in small]
            yield json.dumps(batch, separators=(",", ":")).encode()[1:-1]
        else:
            name, each = items[at]
            yield json.dumps(name).encode() + b":" if is_object else b""
            yield from _encode(each, pace)  # type: ignore[arg-type]
        at += max(1, len(small))
    yield b"}" if is_object else b"]"


def _is_large(value: object, depth: int = 2) -> bool:
    """Return whether a value is a container that has more than PIECE elements, or holds one that has."""
    if not isinstance(value, dict | list):
        return False
    if len(value) > PIECE or not depth:
        return len(value) > PIECE
    return any(_is_large(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value))


def _map(fd: int | None) -> mmap.mmap | None:
    """Map the ledger into memory and close its descriptor: the mapping and the pin hold it. None: it is missing, or
    something else.
    """
    if fd is None:
        return None
    try:
        found = bpf.map_definition(fd, LEDGER)
        is_ours = (found.type, found.key_bytes, found.value_bytes, found.flags) == (_ARRAY, 4, _PAGE, _MMAPABLE)
        size = found.max_entries * _PAGE
        if not is_ours or not 2 * _PAGE < size <= 2 * MAX_RECORD_BYTES:
            return None
        return mmap.mmap(fd, size)
    except OSError:
        return None
    finally:
        os.close(fd)


class Ledger:
    """The record in a pinned map."""

    def __init__(self, pins: Pins) -> None:
        """Open the ledger of a state folder, or create it. Raises UdpwatchError."""
        try:
            memory = _map(pins.ledger())
            if memory is None:
                raise_memory_lock_limit()
                # Elements of one page, which are adjacent in memory: Linux 5.10 refuses those of more than 4 MB.
                fd = bpf.map_create(MapDefinition(LEDGER, _ARRAY, 4, _PAGE, 1 + 2 * HALF_BYTES // _PAGE, _MMAPABLE))
                pins.pin_ledger(fd)
                memory = _map(fd)
        except OSError as error:
            raise UdpwatchError(f"cannot keep the state in {pins.folder}: {error.strerror}") from None
        assert memory
        self._memory = memory
        self._half_bytes = (len(memory) // _PAGE - 1) // 2 * _PAGE  # another version's may differ

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    @property
    def is_empty(self) -> bool:
        """Whether no record was ever written."""
        return not self._words()[0]

    @property
    def tries(self) -> int:
        """How many processes have begun to go on with the record, and ended before they wrote one."""
        return self._words()[1]

    def note_try(self) -> None:
        """Note that this process goes on with the record."""
        self._set_word(1, min(self.tries + 1, 1 << 32))

    def read(self) -> dict[str, Any] | None:
        """Return the last record; None: there is none that is readable."""
        number = self._words()[0]
        if not number:
            return None
        at = self._half(number)
        length, digest = _HEADER.unpack_from(self._memory, at)
        packed = self._memory[at + _HEADER.size : at + _HEADER.size + min(length, self._half_bytes)]
        if hashlib.sha256(packed).digest() != digest:
            return None
        with contextlib.suppress(ValueError, RecursionError, zlib.error):
            record = json.loads(zlib.decompressobj().decompress(packed, MAX_RECORD_BYTES))
            return record if isinstance(record, dict) else None
        return None

    def write(self, record: dict[str, Any], pace: Callable[[], None] = unpaced) -> None:
        """Replace the record. ``pace`` is called between small pieces of work, so that other threads run meanwhile.

        Raises ValueError if it is too large; the old one then stays.
        """
        packed = zlib.compress(b"".join(_encode(record, pace)), 1)
        room = self._half_bytes - _HEADER.size
        if len(packed) > room:
            raise ValueError(f"it needs {len(packed)} bytes, and there is room for {room}")
        number = (self._words()[0] + 1) % (1 << 64) or 2  # even like 0, which stands for an empty map
        at = self._half(number)
        _HEADER.pack_into(self._memory, at, len(packed), hashlib.sha256(packed).digest())
        self._memory[at + _HEADER.size : at + _HEADER.size + len(packed)] = packed
        self._set_word(0, number)
        self._set_word(1, 0)

    def _words(self) -> tuple[int, int]:
        """Return the number of the current record, and `tries`."""
        number, tries = _WORDS.unpack_from(self._memory)
        return number, tries

    def _set_word(self, which: int, value: int) -> None:
        with memoryview(self._memory) as view, view.cast("Q") as words:
            words[which] = value  # one store; struct would clear the bytes first

    def _half(self, number: int) -> int:
        return _PAGE + number % 2 * self._half_bytes
