"""Find which kernel functions can be probed, and attach to them.

fentry is used where the kernel has trampolines and types for the function, else a kprobe. Both are tried with an empty
program on the function itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from enum import StrEnum
from pathlib import Path

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import AttachType, ProgramType
from udpwatch.agent.kernel.libbpf import Btf
from udpwatch.agent.kernel.programs import Function

MODULE_BTF = Path("/sys/kernel/btf")
_KPROBE_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
#: indices of the first arguments in struct pt_regs, in words (arch/*/include/uapi/asm/ptrace.h)
_ARGUMENT_REGISTERS = {"x86_64": (14, 13, 12), "aarch64": (0, 1, 2)}
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_EVENT_IOC_SET_BPF, _PERF_EVENT_IOC_ENABLE = 0x40042408, 0x2400
_PERF_ATTR_BYTES = 112  # PERF_ATTR_SIZE_VER5
_RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")

_libc = ctypes.CDLL(None, use_errno=True)


class How(StrEnum):
    """How a program is attached to a function."""

    FENTRY = "fentry"
    KPROBE = "kprobe"


def argument_indices(how: str) -> tuple[int, ...]:
    """Return where the first arguments of a probed function are in the context, in words.

    fentry has them in a row, a kprobe in the registers of the calling convention.
    """
    in_a_row = (0, 1, 2)
    return _ARGUMENT_REGISTERS.get(platform.machine(), in_a_row) if how == How.KPROBE else in_a_row


def try_functions(functions: tuple[Function, ...], vmlinux: Path) -> tuple[How | None, str]:
    """Return how all of these functions can be probed, or (None, the reasons)."""
    reasons = []
    for how in How:
        try:
            for function in functions:
                load_and_attach_empty(function, how, vmlinux)
        except (OSError, LookupError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"no {error.args[0]}"
            reasons.append(f"{how}: {reason}")
        else:
            return how, ""
    return None, "; ".join(reasons)


def load_and_attach_empty(function: Function, how: How, vmlinux: Path) -> None:
    """Attach an empty program and detach it; raises what `Target` raises."""
    with Target(function, how, vmlinux) as target:
        program = target.load(_RETURN_0, "empty")[0]
        try:
            os.close(target.attach(program))
        finally:
            os.close(program)


class Target:
    """A function to probe; holds what loading needs until it is closed."""

    def __init__(self, function: Function, how: How, vmlinux: Path) -> None:
        """Find the function; raises LookupError if no BTF describes it, and OSError if BTF is not readable."""
        self._function, self._how = function, how
        self._id, self._module = 0, 0
        if how is How.FENTRY:
            self._find(vmlinux)

    def _find(self, vmlinux: Path) -> None:
        base = Btf(vmlinux)
        try:
            try:
                self._id = base.function(self._function.name)
            except LookupError:
                if not self._function.module:
                    raise
                self._find_in_module(base)
        finally:
            base.close()

    def _find_in_module(self, base: Btf) -> None:
        module = self._function.module
        try:
            split = Btf(MODULE_BTF / module, base)
        except OSError as error:
            raise OSError(error.errno, f"cannot read BTF of the module {module}: {error.strerror}") from None
        try:
            self._id = split.function(self._function.name)
        finally:
            split.close()
        self._module = bpf.module_btf(module)

    def load(self, instructions: bytes, name: str) -> tuple[int, int]:
        """Load a program; return (descriptor, instructions that the verifier walked). Raises OSError."""
        if self._how is How.FENTRY:
            where = (self._id, self._module)
            return bpf.program_load_logged(ProgramType.TRACING, AttachType.TRACE_FENTRY, instructions, name, where)
        return bpf.program_load_logged(ProgramType.KPROBE, None, instructions, name)

    def attach(self, program: int) -> int:
        """Attach a program; it stays attached while the returned descriptor is open. Raises OSError."""
        if self._how is How.FENTRY:
            return bpf.tracing_attach(program)
        return _attach_kprobe(self._function.name, program)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        if self._module:
            os.close(self._module)


def _attach_kprobe(function: str, program: int) -> int:
    """Attach a kprobe by perf_event_open(2); it runs on every CPU, whichever is named.

    The kprobe PMU: Linux kernel commit e12f03d7031a ("perf/core: Implement the 'perf_kprobe' PMU") (in v4.17).
    """
    try:
        number = _PERF_EVENT_OPEN[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"kprobes are not supported on {platform.machine()}") from None
    try:
        kind = int(_KPROBE_TYPE.read_text())
    except OSError:
        raise OSError(errno.ENOENT, "the kernel has no kprobes (CONFIG_KPROBE_EVENTS)") from None
    name = ctypes.create_string_buffer(function.encode())
    # type, size, config, sample_period, sample_type, read_format, flags, wakeup_events, bp_type, kprobe_func, offset
    raw = struct.pack("=IIQQQQQIIQQ", kind, _PERF_ATTR_BYTES, 0, 1, 0, 0, 0, 1, 0, ctypes.addressof(name), 0)
    attribute = ctypes.create_string_buffer(raw, _PERF_ATTR_BYTES)
    fd: int = _libc.syscall(number, attribute, -1, 0, -1, _PERF_FLAG_FD_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        fcntl.ioctl(fd, _PERF_EVENT_IOC_SET_BPF, program)
        fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError:
        os.close(fd)
        raise
    return fd
