"""Read, check and drop the capabilities of this process."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
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
_SO_BINDTODEVICE = 25
_libc = ctypes.CDLL(None, use_errno=True)


class Capability(IntEnum):
    """The capabilities that udpwatch uses (include/uapi/linux/capability.h)."""

    DAC_OVERRIDE = 1
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    PERFMON = 38
    BPF = 39

    def __str__(self) -> str:
        return f"CAP_{self.name}"


#: What each capability is for. CAP_SYS_ADMIN replaces CAP_BPF and CAP_PERFMON on every kernel that has these.
PURPOSE = {
    Capability.BPF: "load the programs and read their maps",
    Capability.NET_ADMIN: "attach them to the cgroup",
    Capability.PERFMON: "read conntrack's entry from the packet; probe functions",
    Capability.SYS_ADMIN: "without CAP_PERFMON: enter namespaces to ask their conntrack; mount cgroup v2 privately",
    Capability.DAC_OVERRIDE: "reopen an event file that another user owns by then",
    Capability.NET_BIND_SERVICE: "with --dns: listen on port 53 of addresses that are added later",
    Capability.NET_RAW: "before Linux 5.7, with --server=..@INTERFACE: bind sockets to an interface",
    Capability.SYS_PTRACE: "without CAP_PERFMON: find a process's network namespace",
}


def effective() -> frozenset[Capability]:
    """Return the effective capabilities."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return frozenset(capability for capability in Capability if mask >> capability & 1)
    return frozenset()


def may_load(have: Collection[Capability]) -> bool:
    """Return whether programs can be loaded and attached: this needs CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN."""
    return Capability.NET_ADMIN in have and (Capability.BPF in have or Capability.SYS_ADMIN in have)


def may_read_memory(have: Collection[Capability]) -> bool:
    """Return whether programs may read kernel memory: this needs CAP_PERFMON (or CAP_SYS_ADMIN)."""
    return Capability.PERFMON in have or Capability.SYS_ADMIN in have


def require() -> None:
    """Raise CannotRun unless programs can be loaded and attached."""
    have = effective()
    if may_load(have):
        return
    if os.geteuid() != 0:
        raise CannotRun("cannot load BPF programs: this user is not root; run udpwatch as root")
    missing = {Capability.BPF, Capability.NET_ADMIN} - have
    names = " and ".join(sorted(map(str, missing)))
    raise CannotRun(f"cannot load BPF programs: {names} missing; see `udpwatch doctor`")


@dataclass(frozen=True, slots=True)
class User:
    """A user for `drop_all_but` to switch to."""

    name: str
    uid: int
    gid: int


def drop_all_but(keep: Iterable[Capability], user: User | None = None) -> None:
    """Drop every capability of the calling thread except these, and switch to ``user`` if given.

    No program that it executes can gain more: the bounding set shrinks, the inheritable and ambient sets are empty, and
    no_new_privs is set. Threads that start later inherit this; running threads do not.

    Raises OSError; the bounding set may have shrunk by then.
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


def binding_to_interface_needs_net_raw() -> bool:
    """Return whether a process without CAP_NET_RAW cannot bind a socket to an interface. A child process tries.

    Since Linux kernel commit c427bfec18f2 ("net: core: enable SO_BINDTODEVICE for non-root users") (in v5.7) it can.
    """
    child = os.fork()
    if child == 0:
        try:
            drop_all_but(())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
                link.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, b"lo\0")
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def _reduce_bounding_set(kept: Collection[int]) -> None:
    """Shrink the bounding set. Without CAP_SETPCAP it stays, and only no_new_privs protects."""
    for number in range(64):
        held = _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)
        if held < 0:  # above the last capability of this kernel
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
