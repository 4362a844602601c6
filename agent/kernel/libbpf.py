"""Use libbpf for BTF and the ring buffer. It is already installed: Debian's libbcc depends on it."""

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
        raise CannotRun(f"cannot load libbpf.so.1: {error}; install libbpf1") from None
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
    library.libbpf_set_print(None)  # it would print to stderr; our own messages name the object
    return library


class _Type(ctypes.Structure):
    """Mirror struct btf_type; its members follow it."""

    _fields_ = [("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size_or_type", ctypes.c_uint32)]


class _Member(ctypes.Structure):
    """Mirror struct btf_member."""

    _fields_ = [("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


class Btf:
    """The types of a kernel, for the offsets of members of its structures."""

    def __init__(self, path: Path, base: Btf | None = None) -> None:
        """Parse ``path``, normally /sys/kernel/btf/vmlinux; raises OSError if it is not readable BTF.

        The types of a module build on those of ``base``, which must stay open.
        """
        path.open("rb").close()  # raises the errno and the path; libbpf would only say "failed"
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
        """Return the type id of a function; raises LookupError."""
        type_id: int = self._libbpf.btf__find_by_name_kind(self._btf, name.encode(), _KIND_FUNCTION)
        if type_id < 0:
            raise LookupError(f"function {name}")
        return type_id

    def offset(self, structure: str, path: str) -> int:
        """Return the offset of a member in bytes, e.g. offset("sock", "__sk_common.skc_net.net").

        Members of anonymous structs and unions are found as in C. Raises LookupError if this kernel lacks the member.
        """
        return self.bit_offset(structure, path) // 8

    def bit_offset(self, structure: str, path: str) -> int:
        """Return the offset of a member in bits. Raises what `offset` raises."""
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
        return bits

    def element_size(self, structure: str) -> int:
        """Return sizeof(struct structure) in bytes; raises LookupError."""
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
        """Return (offset in bits, type id) of a member, or None."""
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
    """Read a BPF ring buffer, from one thread only."""

    def __init__(self, map_fd: int) -> None:
        """Map the buffer; raises OSError."""
        self._libbpf = _library()
        self._records: deque[bytes] = deque()
        self._most = 0
        # An exception in a ctypes callback is lost, so the callback only copies and appends.
        self._callback = _SAMPLE(self._append)
        self._ring = self._libbpf.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map the ring buffer: {os.strerror(number)}")

    def _append(self, _context: int, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return -1 if len(self._records) >= self._most else 0  # a negative result makes libbpf stop after this record

    def fileno(self) -> int:
        """Return a descriptor that polls readable while records are waiting."""
        number: int = self._libbpf.ring_buffer__epoll_fd(self._ring)
        return number

    def read(self, most: int) -> list[bytes]:
        """Return up to ``most`` waiting records without blocking; more may arrive faster than they are read."""
        if most < 1:
            return []
        self._most = most
        self._libbpf.ring_buffer__consume(self._ring)
        records = list(self._records)
        self._records.clear()
        return records

    def close(self) -> None:
        """Unmap the buffer; the map stays open."""
        if self._ring:
            self._libbpf.ring_buffer__free(self._ring)
            self._ring = None
