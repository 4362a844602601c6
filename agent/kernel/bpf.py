"""Call bpf(2) directly: what the agent needs after the loader has exited.

bcc and its LLVM never enter this process, so it reads maps, queries programs and creates links with the system call
itself. The layouts are those of ``union bpf_attr`` in the kernel's ``include/uapi/linux/bpf.h``; the kernel pads a
shorter attribute with zeros.

Every function raises OSError with the errno of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_MEMBARRIER_NUMBER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}
_MEMBARRIER_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL
_GRACE_SECONDS = 0.5
_ATTR_BYTES = 128
_NO_COMMAND = 0x7FFFFFFF
_BATCH = 1024
_ITERATOR_BYTES = 1 << 16
_LOG_ALL, _LOG_STATISTICS = 1, 4  # BPF_LOG_LEVEL1, BPF_LOG_STATS in include/linux/bpf_verifier.h
_ENOTSUPP = 524  # internal to the kernel, in no header of user space

_libc = ctypes.CDLL(None, use_errno=True)


class Command(IntEnum):
    """Mirror enum bpf_cmd."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    RAW_TRACEPOINT_OPEN = 17
    BTF_LOAD = 18
    BTF_GET_FD_BY_ID = 19
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    BTF_GET_NEXT_ID = 23
    MAP_LOOKUP_BATCH = 24
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    ITER_CREATE = 33
    LINK_DETACH = 34


class ProgramType(IntEnum):
    """Mirror enum bpf_prog_type."""

    SOCKET_FILTER = 1
    KPROBE = 2
    CGROUP_SKB = 8
    CGROUP_SOCK = 9
    CGROUP_SOCK_ADDR = 18
    TRACING = 26


class AttachType(IntEnum):
    """Mirror enum bpf_attach_type."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET4_POST_BIND = 12
    CGROUP_INET6_POST_BIND = 13
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    TRACE_FENTRY = 24
    TRACE_ITER = 28


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """The parameters of a new map. The type is an enum bpf_map_type; the entries of a ring buffer are its bytes."""

    name: str
    type: int
    key_bytes: int
    value_bytes: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel reports about a loaded program. Run times stay 0 unless kernel.bpf_stats_enabled is 1."""

    id: int
    name: str
    run_time_ns: int
    run_count: int
    instructions: int
    missed: int  # runs that the kernel skipped because the program was already running on that CPU


def bpf(command: Command, attribute: ctypes.Array[ctypes.c_char], size: int | None = None) -> int:
    """Call bpf(2) with a prepared attribute; return the result of the system call."""
    result: int = _libc.syscall(_number(), int(command), attribute, len(attribute) if size is None else size)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf({command.name}): {os.strerror(number)}")
    return result


def is_forbidden() -> bool:
    """Return whether bpf(2) is refused before the kernel examines the command, as seccomp does. The probe is an unknown
    command, for which a process with CAP_BPF gets EINVAL.
    """
    nothing = _attribute("")
    result: int = _libc.syscall(_number(), _NO_COMMAND, nothing, len(nothing))
    return result < 0 and ctypes.get_errno() == errno.EPERM


def _number() -> int:
    try:
        return _SYSCALL_NUMBER[platform.machine()]
    except KeyError:
        raise OSError(
            errno.ENOSYS, f"unsupported architecture {platform.machine()}: its number of bpf(2) is unknown"
        ) from None


def _attribute(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("=" + layout, *values), _ATTR_BYTES)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def registers(destination: int, source: int) -> int:
    """Pack two register numbers into the byte of an instruction (bit-fields of struct bpf_insn, in the machine's byte
    order).
    """
    return destination | source << 4 if sys.byteorder == "little" else source | destination << 4


def source_register(both: int) -> int:
    """Return the source register of such a byte."""
    return both >> 4 if sys.byteorder == "little" else both & 0xF


def map_create(definition: MapDefinition, btf: int = 0, key_type: int = 0, value_type: int = 0) -> int:
    """Create a map; return its descriptor.

    ``btf`` is the descriptor of the types of its key and value, ``key_type`` and ``value_type`` their numbers.
    """
    raw = struct.pack(
        "=IIIIIII16sIIII",
        definition.type,
        definition.key_bytes,
        definition.value_bytes,
        definition.max_entries,
        definition.flags,
        0,
        0,
        definition.name.encode()[:15],
        0,
        btf,
        key_type,
        value_type,
    )
    return bpf(Command.MAP_CREATE, ctypes.create_string_buffer(raw, _ATTR_BYTES))


def btf_load(types: bytes) -> int:
    """Load a description of types (struct btf_header and its data); return its descriptor."""
    buffer = ctypes.create_string_buffer(types, len(types))
    return bpf(Command.BTF_LOAD, _attribute("QQIII", _address(buffer), 0, len(types), 0, 0))


def map_definition(fd: int, name: str) -> MapDefinition:
    """Return the parameters of a map (struct bpf_map_info), with the given name, because the kernel truncates names."""
    kind, _id, *sizes = struct.unpack_from("=6I", _info(fd, 24))
    return MapDefinition(name, kind, *sizes)


def map_id(fd: int) -> int:
    """Return the id of a map."""
    number: int = struct.unpack_from("=I", _info(fd, 24), 4)[0]
    return number


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the value of ``key``, or None. A per-CPU map returns the values of all CPUs, each padded to 8 bytes."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_size)
    try:
        bpf(Command.MAP_LOOKUP_ELEM, _attribute("I4xQQQ", fd, _address(key_buffer), _address(value), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_push(fd: int, value: bytes) -> None:
    """Add a value to a queue."""
    buffer = ctypes.create_string_buffer(value, len(value))
    bpf(Command.MAP_UPDATE_ELEM, _attribute("I4xQQQ", fd, 0, _address(buffer), 0))


def map_pop(fd: int, value_size: int) -> bytes | None:
    """Take the oldest value of a queue, or return None."""
    value = ctypes.create_string_buffer(value_size)
    try:
        bpf(Command.MAP_LOOKUP_AND_DELETE_ELEM, _attribute("I4xQQQ", fd, 0, _address(value), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, only_new: bool = False) -> None:
    """Set the value of ``key``; with ``only_new``, raise FileExistsError if it exists."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    addresses = _address(key_buffer), _address(value_buffer)
    bpf(Command.MAP_UPDATE_ELEM, _attribute("I4xQQQ", fd, *addresses, int(only_new)))  # BPF_NOEXIST


def map_delete(fd: int, key: bytes) -> bool:
    """Delete ``key``; return whether it existed."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    try:
        bpf(Command.MAP_DELETE_ELEM, _attribute("I4xQQQ", fd, _address(key_buffer), 0, 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_take(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Delete ``key`` and return its last value, or None.

    This is one step since Linux kernel commit 3e87f192b405 ("bpf: Add lookup_and_delete_elem support to hashtab") (in
    v5.14), and two steps before.
    """
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_size)
    try:
        attribute = _attribute("I4xQQQ", fd, _address(key_buffer), _address(value), 0)
        bpf(Command.MAP_LOOKUP_AND_DELETE_ELEM, attribute)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, _ENOTSUPP):
            raise
        found = map_lookup(fd, key, value_size)
        map_delete(fd, key)
        return found
    return value.raw


def map_batches(fd: int, key_size: int, value_size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (number of elements, their keys, their values) of a hash map or an array, one batch at a time.

    BPF_MAP_LOOKUP_BATCH copies whole buckets and does not change the LRU state of the elements (Linux kernel commit
    057996380a42 ("bpf: Add batch ops to all htab bpf map") (in v5.6)).
    """
    size = _BATCH
    cursor = ctypes.create_string_buffer(8)
    started = False
    while True:
        keys = ctypes.create_string_buffer(key_size * size)
        values = ctypes.create_string_buffer(value_size * size)
        attribute = _attribute(
            "QQQQIIQQ",
            _address(cursor) if started else 0,
            _address(cursor),
            _address(keys),
            _address(values),
            size,
            fd,
            0,
            0,
        )
        done = False
        try:
            bpf(Command.MAP_LOOKUP_BATCH, attribute)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a bucket is larger than the batch: retry with a larger one
                size *= 2
                continue
            if error.errno != errno.ENOENT:
                raise
            done = True  # the last batch comes together with ENOENT
        started = True
        (count,) = struct.unpack_from("=I", attribute, 32)
        if count:
            yield count, keys.raw[: count * key_size], values.raw[: count * value_size]
        if done:
            return


def array_values(fd: int, value_size: int) -> Iterator[bytes]:
    """Yield the values of an array map in order, one batch at a time."""
    for _, _, values in map_batches(fd, 4, value_size):
        yield values


def map_items(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield every (key, value) of a hash map."""
    for count, keys, values in map_batches(fd, key_size, value_size):
        for index in range(count):
            yield (
                keys[index * key_size : (index + 1) * key_size],
                values[index * value_size : (index + 1) * value_size],
            )


def program_load(
    type_: ProgramType,
    attach: AttachType | None,
    instructions: bytes,
    name: str = "",
    function: tuple[int, int] = (0, 0),
    log: ctypes.Array[ctypes.c_char] | None = None,
    log_level: int = 0,
) -> int:
    """Load instructions under the GPL; return the descriptor of the program.

    ``function`` is for TRACING programs: the BTF id of the function, and the descriptor of the BTF of its module (0:
    vmlinux). The verifier writes to ``log`` as much as ``log_level`` asks for.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    raw = struct.pack(
        "=IIQQIIQII16sIII32xII",
        type_,
        len(instructions) // 8,
        _address(code),
        _address(licence),
        log_level,
        len(log) if log else 0,
        _address(log) if log else 0,
        0,
        0,
        name.encode()[:15],
        0,
        attach or 0,
        0,
        *function,
    )
    return bpf(Command.PROG_LOAD, ctypes.create_string_buffer(raw, _ATTR_BYTES))


def program_load_logged(
    type_: ProgramType, attach: AttachType | None, instructions: bytes, name: str, function: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """Load a program; return (descriptor, number of instructions that the verifier walked).

    If the verifier refuses the program, the error contains its last message.
    """
    log = ctypes.create_string_buffer(1 << 16)
    try:
        fd = program_load(type_, attach, instructions, name, function, log, _LOG_STATISTICS)
    except OSError as error:
        log = ctypes.create_string_buffer(1 << 24)
        try:
            os.close(program_load(type_, attach, instructions, name, function, log, _LOG_ALL))
        except OSError:
            lines = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
            messages = [line for line in lines if not line.startswith("processed ")]
            raise OSError(error.errno, f"{error.strerror}{f' ({messages[-1].strip()})' if messages else ''}") from None
        raise
    walked = re.search(rb"processed (\d+) insns", log.value)
    return fd, int(walked.group(1)) if walked else 0


def program_test_run(fd: int, packet: bytes, repeat: int) -> tuple[int, int]:
    """Run a program ``repeat`` times on an Ethernet frame; return (its return value, mean nanoseconds per run)."""
    data = ctypes.create_string_buffer(packet, len(packet))
    attribute = _attribute("IIIIQQII", fd, 0, len(packet), 0, _address(data), 0, repeat, 0)
    bpf(Command.PROG_TEST_RUN, attribute)
    returned, duration = struct.unpack_from("=I", attribute, 4)[0], struct.unpack_from("=I", attribute, 36)[0]
    return returned, duration


def program_query(cgroup_fd: int, attach: AttachType) -> list[int]:
    """Return the ids of the programs on a hook of this cgroup, in their order."""
    ids = ctypes.create_string_buffer(4 * 64)  # BPF_CGROUP_MAX_PROGS
    attribute = _attribute("IIIIQI4x", cgroup_fd, attach, 0, 0, _address(ids), 64)
    bpf(Command.PROG_QUERY, attribute)
    (count,) = struct.unpack_from("=I", attribute, 24)
    return list(struct.unpack_from(f"={count}I", ids))


def program_fd(program_id: int) -> int:
    """Return a descriptor of the program with this id; this needs CAP_SYS_ADMIN."""
    return bpf(Command.PROG_GET_FD_BY_ID, _attribute("III", program_id, 0, 0))


def _info(fd: int, size: int) -> ctypes.Array[ctypes.c_char]:
    info = ctypes.create_string_buffer(size)
    bpf(Command.OBJ_GET_INFO_BY_FD, _attribute("IIQ", fd, size, _address(info)))
    return info


def program_info(fd: int) -> ProgramInfo:
    """Return struct bpf_prog_info of a program."""
    info = _info(fd, 224)
    return ProgramInfo(
        id=struct.unpack_from("=I", info, 4)[0],
        name=info.raw[64:80].split(b"\0")[0].decode("ascii", "replace"),
        run_time_ns=struct.unpack_from("=Q", info, 192)[0],
        run_count=struct.unpack_from("=Q", info, 200)[0],
        instructions=struct.unpack_from("=I", info, 216)[0],
        missed=struct.unpack_from("=Q", info, 208)[0],
    )


def program_type(fd: int) -> int:
    """Return the type of a program."""
    kind: int = struct.unpack_from("=I", _info(fd, 224))[0]
    return kind


def program_maps(fd: int) -> frozenset[int]:
    """Return the ids of the maps that a program uses."""
    numbers = ctypes.create_string_buffer(4 * 64)  # MAX_USED_MAPS
    info = ctypes.create_string_buffer(224)
    struct.pack_into("=IQ", info, 52, 64, _address(numbers))
    bpf(Command.OBJ_GET_INFO_BY_FD, _attribute("IIQ", fd, len(info), _address(info)))
    (count,) = struct.unpack_from("=I", info, 52)
    return frozenset(struct.unpack_from(f"={min(count, 64)}I", numbers))


def link_create(program: int, cgroup: int, attach: AttachType) -> int:
    """Attach a program to a cgroup; return a descriptor. The program stays attached while any process holds the
    descriptor.

    Links always allow other programs on the same hook (BPF_F_ALLOW_MULTI).
    """
    return bpf(Command.LINK_CREATE, _attribute("IIII", program, cgroup, attach, 0))


def iterator_attach(program: int, of_map: int | None) -> int:
    """Attach an iterator to what its program names, or to a map; return a descriptor for `iterator_read`."""
    info = ctypes.create_string_buffer(struct.pack("=I", of_map or 0), 8)
    length = 0 if of_map is None else len(info)
    attribute = _attribute("IIIIQI4x", program, 0, AttachType.TRACE_ITER, 0, _address(info) if length else 0, length)
    return bpf(Command.LINK_CREATE, attribute)


def iterator_read(link: int) -> Iterator[bytes]:
    """Run an iterator; yield what its program writes, in pieces. It sees the namespace of the calling thread, from the
    first piece on.
    """
    fd = bpf(Command.ITER_CREATE, _attribute("II", link, 0))
    try:
        while piece := os.read(fd, _ITERATOR_BYTES):
            yield piece
    finally:
        os.close(fd)


def link_detach(link: int) -> None:
    """Detach a link, like ``bpftool link detach``; the descriptor stays open."""
    bpf(Command.LINK_DETACH, _attribute("I", link))


def link_update(link: int, program: int) -> None:
    """Replace the program of a link: each packet meets either the old program or this one (Linux kernel commit
    0c991ebc8c69 ("bpf: Implement bpf_prog replacement for an active bpf_cgroup_link") (in v5.7)).
    """
    bpf(Command.LINK_UPDATE, _attribute("IIII", link, program, 0, 0))


def link_program_id(link: int) -> int:
    """Return the id of the program of a link."""
    number: int = struct.unpack_from("=I", _info(link, 32), 8)[0]
    return number


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link at a path of a bpffs: it stays after the last process that holds it has ended."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(Command.OBJ_PIN, _attribute("QII", _address(name), fd, 0))


def pinned(path: Path) -> int:
    """Return a descriptor of what is pinned at a path."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return bpf(Command.OBJ_GET, _attribute("QII", _address(name), 0, 0))


def wait_for_programs() -> None:
    """Wait until no CPU runs a program that was already replaced or detached (membarrier(2) waits for an RCU grace
    period); where seccomp forbids that, wait for far longer than a program takes.
    """
    number = _MEMBARRIER_NUMBER.get(platform.machine())
    if number is None or _libc.syscall(number, _MEMBARRIER_GLOBAL, 0, 0):
        time.sleep(_GRACE_SECONDS)


def link_cgroup_id(link: int) -> int:
    """Return the id of the cgroup of a link, 0 if the link is detached or the cgroup is gone."""
    info = _info(link, 32)
    cgroup: int = struct.unpack_from("=Q", info, 16)[0]
    return cgroup


def tracing_attach(program: int) -> int:
    """Attach a TRACING program to its function; it stays attached while the returned descriptor is open."""
    return bpf(Command.RAW_TRACEPOINT_OPEN, _attribute("QI4x", 0, program))


def module_btf(module: str) -> int:
    """Return a descriptor of the BTF of a loaded module; this needs CAP_SYS_ADMIN.

    Modules have their own BTF since Linux kernel commit 5329722057d4 ("bpf: Assign ID to vmlinux BTF and return extra
    info for BTF in GET_OBJ_INFO") (in v5.11).
    """
    number = 0
    while True:
        attribute = _attribute("II", number, 0)
        bpf(Command.BTF_GET_NEXT_ID, attribute)  # ENOENT after the last one
        (number,) = struct.unpack_from("=I", attribute, 4)
        fd = bpf(Command.BTF_GET_FD_BY_ID, _attribute("I", number))
        name = ctypes.create_string_buffer(64)
        info = ctypes.create_string_buffer(struct.pack("=QIIQII", 0, 0, 0, _address(name), len(name), 0))
        bpf(Command.OBJ_GET_INFO_BY_FD, _attribute("IIQ", fd, 32, _address(info)))
        if name.value == module.encode():
            return fd
        os.close(fd)
