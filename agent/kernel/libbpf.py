"""The two things taken from libbpf (already there: Debian's libbcc depends on it): BTF and the ring buffer."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from pathlib import Path

from udpwatch.agent.errors import CannotRun

_KIND_STRUCT, _KIND_UNION, _KIND_FUNCTION = 4, 5, 12
_MODIFIERS = {8, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag
_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise CannotRun(f"cannot load libbpf.so.1 ({error}): install libbpf1") from None
    for name, result, arguments in (
        ("btf__parse_split", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]),
        ("btf__free", None, [ctypes.c_void_p]),
        ("btf__find_by_name_kind", ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]),
        ("btf__type_by_id", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_uint32]),
        ("btf__name_by_offset", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_uint32]),
        ("libbpf_set_print", ctypes.c_void_p, [ctypes.c_void_p]),
        ("ring_buffer__new", ctypes.c_void_p, [ctypes.c_int, _SAMPLE, ctypes.c_void_p, ctypes.c_void_p]),
        ("ring_buffer__consume", ctypes.c_int, [ctypes.c_void_p]),
        ("ring_buffer__epoll_fd", ctypes.c_int, [ctypes.c_void_p]),
        ("ring_buffer__free", None, [ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(None)  # its complaints would go to standard error; ours name the thing
    return library


class _Type(ctypes.Structure):
    """struct btf_type; members follow it."""

    _fields_ = [("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size_or_type", ctypes.c_uint32)]


class _Member(ctypes.Structure):
    """struct btf_member."""

    _fields_ = [("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


class Btf:
    """Type information of a kernel, for the offsets of its structures' members."""

    def __init__(self, path: Path, base: Btf | None = None) -> None:
        """Parse ``path``, normally /sys/kernel/btf/vmlinux; raises OSError when it cannot be read as BTF.

        A module's types build on those of ``base``, which must stay open as long.
        """
        path.open("rb").close()  # the plain errno, with the path in it, where libbpf would only say "failed"
        self._libbpf = _library()
        self._btf: int | None = self._libbpf.btf__parse_split(os.fsencode(path), base._btf if base else None)
        if not self._btf:
            raise OSError(errno.EINVAL, "not BTF", str(path))

    def close(self) -> None:
        """Free the parsed types (some megabytes)."""
        if self._btf:
            self._libbpf.btf__free(self._btf)
            self._btf = None

    def function(self, name: str) -> int:
        """The type id of a function; raises LookupError."""
        type_id: int = self._libbpf.btf__find_by_name_kind(self._btf, name.encode(), _KIND_FUNCTION)
        if type_id < 0:
            raise LookupError(f"function {name}")
        return type_id

    def offset(self, structure: str, path: str) -> int:
        """Bytes from the start of ``struct structure`` to a member, e.g. ("sock", "__sk_common.skc_net.net").

        Members of anonymous structs and unions are found as C finds them. Raises LookupError when this kernel
        has no such member.
        """
        type_id = self._libbpf.btf__find_by_name_kind(self._btf, structure.encode(), _KIND_STRUCT)
        if type_id < 0:
            raise LookupError(f"struct {structure}")
        bits = 0
        for name in path.split("."):
            member = self._member(type_id, name)
            if member is None:
                raise LookupError(f"struct {structure}, member {path}")
            at, type_id = member
            bits += at
        return bits // 8

    def element_size(self, structure: str) -> int:
        """sizeof(struct structure) in bytes; raises LookupError."""
        type_id = self._libbpf.btf__find_by_name_kind(self._btf, structure.encode(), _KIND_STRUCT)
        if type_id < 0:
            raise LookupError(f"struct {structure}")
        size: int = self._type(type_id).size_or_type
        return size

    def _type(self, type_id: int) -> _Type:
        address = self._libbpf.btf__type_by_id(self._btf, type_id)
        if not address:
            raise LookupError(f"BTF type {type_id}")
        return _Type.from_address(address)

    def _member(self, type_id: int, name: str) -> tuple[int, int] | None:
        """(offset in bits, type id) of a member."""
        type_ = self._type(type_id)
        while (type_.info >> 24 & 0x1F) in _MODIFIERS:
            type_id = type_.size_or_type
            type_ = self._type(type_id)
        if (type_.info >> 24 & 0x1F) not in (_KIND_STRUCT, _KIND_UNION):
            return None
        bitfields = type_.info >> 31
        members = (_Member * (type_.info & 0xFFFF)).from_address(ctypes.addressof(type_) + ctypes.sizeof(_Type))
        for member in members:
            at = member.offset & 0xFFFFFF if bitfields else member.offset
            member_name = self._libbpf.btf__name_by_offset(self._btf, member.name) or b""
            if member_name == name.encode():
                return at, member.type
            if not member_name:
                inner = self._member(member.type, name)
                if inner:
                    return at + inner[0], inner[1]
        return None


class RingBuffer:
    """Reads a BPF ring buffer. Used from one thread only."""

    def __init__(self, map_fd: int) -> None:
        """Map the buffer; raises OSError."""
        self._libbpf = _library()
        self._records: deque[bytes] = deque()
        self._most = 0
        # An exception in a ctypes callback is swallowed: it copies and appends, nothing that can fail.
        self._callback = _SAMPLE(self._append)
        self._ring = self._libbpf.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map the ring buffer: {os.strerror(number)}")

    def _append(self, _context: int, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return -1 if len(self._records) >= self._most else 0  # below 0: libbpf stops after this one

    def fileno(self) -> int:
        """A descriptor that polls readable when records are there."""
        number: int = self._libbpf.ring_buffer__epoll_fd(self._ring)
        return number

    def read(self, most: int) -> list[bytes]:
        """The records that are there now, ``most`` at the most: others may come faster than they are read. Never
        blocks.
        """
        if most < 1:
            return []
        self._most = most
        self._libbpf.ring_buffer__consume(self._ring)
        records = list(self._records)
        self._records.clear()
        return records

    def close(self) -> None:
        """Unmap; the map itself stays open."""
        if self._ring:
            self._libbpf.ring_buffer__free(self._ring)
            self._ring = None
