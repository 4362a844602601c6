"""Capabilities of this process: which it has, which it lacks, and giving them up."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection, Iterable
from enum import IntEnum
from pathlib import Path

from udpwatch.agent.errors import CannotRun

_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class Capability(IntEnum):
    """The ones that udpwatch has a use for (include/uapi/linux/capability.h)."""

    DAC_OVERRIDE = 1
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    PERFMON = 38
    BPF = 39

    def __str__(self) -> str:
        return f"CAP_{self.name}"


#: What each is needed for. CAP_SYS_ADMIN stands in for BPF and PERFMON on every kernel that has them.
PURPOSE = {
    Capability.BPF: "load the programs and read their maps",
    Capability.NET_ADMIN: "attach them to the cgroup",
    Capability.PERFMON: "read conntrack's entry from the packet, probe functions",
    Capability.SYS_ADMIN: "without CAP_PERFMON: enter namespaces to ask their conntrack; mount cgroup v2 privately",
    Capability.DAC_OVERRIDE: "open an event file again that belongs to somebody else by then",
    Capability.NET_BIND_SERVICE: "with --dns: listen on port 53 of addresses that come later",
    Capability.SYS_PTRACE: "without CAP_PERFMON: find a process's network namespace",
}


def effective() -> frozenset[Capability]:
    """The capabilities in force now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return frozenset(capability for capability in Capability if mask >> capability & 1)
    return frozenset()


def may_load(have: Collection[Capability]) -> bool:
    """Whether programs can be loaded and attached: CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN."""
    return Capability.NET_ADMIN in have and (Capability.BPF in have or Capability.SYS_ADMIN in have)


def may_read_memory(have: Collection[Capability]) -> bool:
    """Whether programs may see kernel pointers and memory: CAP_PERFMON (or CAP_SYS_ADMIN)."""
    return Capability.PERFMON in have or Capability.SYS_ADMIN in have


def require() -> None:
    """Raise CannotRun unless programs can be loaded and attached, before anything else is begun."""
    have = effective()
    if may_load(have):
        return
    if os.geteuid() != 0:
        raise CannotRun("watching the kernel needs root: run udpwatch as root")
    missing = {Capability.BPF, Capability.NET_ADMIN} - have
    names = " and ".join(sorted(map(str, missing)))
    raise CannotRun(f"{names} missing: udpwatch needs CAP_BPF and CAP_NET_ADMIN; see `udpwatch doctor`")


def drop_all_but(keep: Iterable[Capability]) -> None:
    """Give up every capability of the calling thread but these; threads started later inherit that.

    Raises OSError.
    """
    mask = sum(1 << capability for capability in set(keep) & effective())
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=IIIIII", low, low, 0, high, high, 0))
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")
