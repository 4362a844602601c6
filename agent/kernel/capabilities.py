"""Capabilities of this process: which it has, which it lacks, and giving them up."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from udpwatch.agent.errors import CannotRun

_VERSION_3 = 0x20080522
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
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


@dataclass(frozen=True, slots=True)
class User:
    """A user to change to."""

    name: str
    uid: int
    gid: int


def drop_all_but(keep: Iterable[Capability], user: User | None = None) -> None:
    """Give up every capability of the calling thread but these, and change to ``user``, if given.

    What it executes cannot have more: the bounding set is no larger, the inheritable and ambient sets are empty, and
    no_new_privs is set. Threads started later inherit all of it; those that run already do not.

    Raises OSError, with the bounding set reduced already.
    """
    kept = set(keep) & effective()
    _reduce_bounding_set(kept)
    if user:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups(os.getgrouplist(user.name, user.gid))
        os.setgid(user.gid)
        os.setuid(user.uid)
        _prctl(_PR_SET_KEEPCAPS, 0)
    mask = sum(1 << capability for capability in kept)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=IIIIII", low, low, 0, high, high, 0))
    if _libc.capset(header, data) != 0:
        raise _error("capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _reduce_bounding_set(kept: Collection[int]) -> None:
    """Without CAP_SETPCAP the bounding set stays as it is; no_new_privs then has to do."""
    for number in range(64):
        held = _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)
        if held < 0:  # beyond the last capability that this kernel has
            return
        if held and number not in kept and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            if ctypes.get_errno() == errno.EPERM:
                return
            raise _error("PR_CAPBSET_DROP")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise _error(f"prctl({option})")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
