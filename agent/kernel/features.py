"""Find what this kernel allows BPF programs to do, by trying and never from a version number.

Each probe is a program of a few instructions that calls one helper; the verifier accepts or refuses it. The results
reach bpf/compat.h as HAVE_* of the compile. Only this file and compat.h know about kernel differences.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udpwatch.agent.kernel.bpf import AttachType, ProgramType, program_load, registers
from udpwatch.agent.kernel.libbpf import Btf
from udpwatch.agent.kernel.probes import MODULE_BTF, try_functions
from udpwatch.agent.kernel.programs import FUNCTIONS

VMLINUX_BTF = Path("/sys/kernel/btf/vmlinux")

# Helper numbers: enum bpf_func_id in include/uapi/linux/bpf.h
_GET_CURRENT_PID_TGID, _GET_CURRENT_UID_GID, _GET_CURRENT_COMM = 14, 15, 16
_GET_CURRENT_TASK = 35
_GET_CURRENT_CGROUP_ID = 80
_PROBE_READ_KERNEL = 113
_GET_NETNS_COOKIE = 122

_STACK_BUFFER = 16


def _instruction(code: int, destination: int = 0, source: int = 0, immediate: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=BBhi", code, registers(destination, source), offset, immediate)


_RETURN_1 = _instruction(0xB7, 0, 0, 1) + _instruction(0x95)
#: r1 = a zeroed buffer on the stack, r2 = its size
_BUFFER_ARGUMENTS = (
    _instruction(0xB7, 2, 0, 0)
    + _instruction(0x7B, 10, 2, offset=-16)  # *(u64 *)(r10 - 16) = r2
    + _instruction(0x7B, 10, 2, offset=-8)
    + _instruction(0xBF, 1, 10)
    + _instruction(0x07, 1, 0, -_STACK_BUFFER)
    + _instruction(0xB7, 2, 0, _STACK_BUFFER)
)
_CONTEXT_AS_THIRD = _instruction(0xBF, 3, 1)


@dataclass(frozen=True, slots=True)
class Features:
    """What the programs may use. The comment behind each member says what is lost without it."""

    netns_cookie: bool  # without it and `conntrack`, two sockets of a namespace do not share their conversations
    current: bool  # without it, the process of connected sockets is unknown
    current_task: bool  # the same facts, read from the task_struct where the helpers are refused
    current_comm: bool  # without it, the process name is read from /proc
    sender_comm: bool  # the same for unconnected sockets
    conntrack: bool  # programs may read kernel memory; without it, conntrack is asked over netlink
    offsets: dict[str, int]  # of members of kernel structures, for `conntrack`
    conntrack_reason: str  # why `conntrack` is False
    functions: dict[str, str]  # function -> a `probes.How`; "": not probed
    functions_reason: dict[str, str]  # function -> why it is not probed
    flow_offsets: dict[str, int]  # for the programs on these functions
    socket_offsets: dict[str, int]  # for the iterators over sockets; empty: sock_diag lists them
    sockets_reason: str  # why there are no iterators
    address_offsets: dict[str, int]  # for healing: the kernel's lists of local addresses; empty: no healing
    address_reason: str  # why nothing can be healed

    @property
    def scope(self) -> str:
        """What separates conversations: "netns", or only the "socket"."""
        return "netns" if self.netns_cookie or self.conntrack else "socket"

    @property
    def sender(self) -> bool:
        """Whether the sender of a connected socket is known."""
        return self.current or self.current_task

    @property
    def mode(self) -> str:
        """How conntrack is read, in one word for metrics and doctor."""
        return "packet" if self.conntrack else "netlink"

    @property
    def flow_probes(self) -> bool:
        """Whether all functions of conntrack can be probed; one alone is useless."""
        return all(self.functions[function.name] for function in _CONNTRACK_FUNCTIONS)

    @property
    def probes_reason(self) -> str:
        """Why a function is not probed, conntrack's functions first; "" if all are probed."""
        reasons = (self.functions_reason.get(function.name, "") for function in _CONNTRACK_FUNCTIONS + _SEND_FUNCTIONS)
        return next(filter(None, reasons), "")


_SEND_FUNCTIONS = tuple(function for program, function in FUNCTIONS if not program.is_for_forwarded)
_CONNTRACK_FUNCTIONS = tuple(function for program, function in FUNCTIONS if program.is_for_forwarded)

_SKB = (ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS)
_SENDMSG = (ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_UDP4_SENDMSG)


def _helper(number: int, before: bytes = b"", kind: tuple[ProgramType, AttachType] = _SKB) -> str:
    """Try a helper; return why it is refused, or ""."""
    program = before + _instruction(0x85, 0, 0, number) + _RETURN_1
    try:
        fd = program_load(*kind, program)
    except OSError as error:
        return error.strerror or "refused"
    os.close(fd)
    return ""


@contextlib.contextmanager
def _types(path: Path) -> Iterator[Btf]:
    """Open the types of the kernel including conntrack's, which may be in its module.

    Raises OSError if a BTF file cannot be read, and LookupError if none describes conntrack.
    """
    with contextlib.closing(Btf(path)) as kernel:
        try:
            kernel.element_size("nf_conn")
        except LookupError as error:
            module = MODULE_BTF / "nf_conntrack"
            try:
                split = Btf(module, kernel)
            except OSError as missing:
                raise LookupError(f"{error.args[0]}, nor does {module} ({missing.strerror})") from None
            with contextlib.closing(split):
                yield split
        else:
            yield kernel


def conntrack_offsets(path: Path = VMLINUX_BTF) -> dict[str, int]:
    """Return OFFSET_* of everything that the egress program reads from kernel memory.

    Raises OSError if a BTF file cannot be read, and LookupError if a structure lacks a member or conntrack is not
    loaded.
    """
    with _types(path) as btf:
        tuples = btf.offset("nf_conn", "tuplehash") + btf.offset("nf_conntrack_tuple_hash", "tuple")
        cgroup = {}
        with contextlib.suppress(LookupError):  # used only if no helper returns it (HAVE_CURRENT_TASK)
            cgroup = {
                "OFFSET_TASK_CGROUPS": btf.offset("task_struct", "cgroups"),
                "OFFSET_CSS_SET_CGROUP": btf.offset("css_set", "dfl_cgrp"),
                "OFFSET_CGROUP_NODE": btf.offset("cgroup", "kn"),
                "OFFSET_NODE_ID": btf.offset("kernfs_node", "id"),
            }
        locks = {}
        with contextlib.suppress(LookupError):
            bits = btf.bit_offset("sock", "sk_userlocks")
            if sys.byteorder == "little":  # elsewhere, bits are numbered from the other end
                locks = {"OFFSET_SOCK_USERLOCKS": bits // 8, "USERLOCKS_SHIFT": bits % 8}
        return (
            cgroup
            | locks
            | {
                "OFFSET_SKB_NFCT": btf.offset("sk_buff", "_nfct"),
                "OFFSET_SKB_SK": btf.offset("sk_buff", "sk"),
                "OFFSET_SKB_DST": btf.offset("sk_buff", "_skb_refdst"),
                "OFFSET_ROUTE_FLAGS": btf.offset("rtable", "rt_flags"),
                "OFFSET_TASK_PID": btf.offset("task_struct", "pid"),
                "OFFSET_TASK_TGID": btf.offset("task_struct", "tgid"),
                "OFFSET_TASK_COMM": btf.offset("task_struct", "comm"),
                "OFFSET_TASK_CRED": btf.offset("task_struct", "cred"),
                "OFFSET_CRED_UID": btf.offset("cred", "uid.val"),
                "OFFSET_SOCK_NET": btf.offset("sock", "__sk_common.skc_net.net"),
                "OFFSET_NET_INUM": btf.offset("net", "ns.inum"),
                "OFFSET_TUPLE_ORIGINAL": tuples,
                "OFFSET_TUPLE_REPLY": tuples + btf.element_size("nf_conntrack_tuple_hash"),
            }
        )


def socket_offsets(path: Path = VMLINUX_BTF) -> dict[str, int]:
    """Return OFFSET_* and BIT_* of what the iterators over sockets read. Raises OSError if BTF cannot be read, and
    LookupError if a structure lacks a member that every kernel has.
    """
    with contextlib.closing(Btf(path)) as btf:
        common = "__sk_common."
        found = {
            "OFFSET_SOCK_NUM": btf.offset("sock", common + "skc_num"),
            "OFFSET_SOCK_DPORT": btf.offset("sock", common + "skc_dport"),
            "OFFSET_SOCK_FAMILY": btf.offset("sock", common + "skc_family"),
            "OFFSET_SOCK_SADDR": btf.offset("sock", common + "skc_rcv_saddr"),
            "OFFSET_SOCK_DADDR": btf.offset("sock", common + "skc_daddr"),
            "OFFSET_SOCK_COOKIE": btf.offset("sock", common + "skc_cookie"),
            "OFFSET_SOCK_DEVICE": btf.offset("sock", common + "skc_bound_dev_if"),
            "OFFSET_SOCK_PROTOCOL": btf.offset("sock", "sk_protocol"),
            "OFFSET_SOCK_UID": btf.offset("sock", "sk_uid.val"),
            "OFFSET_SOCK_RMEM": btf.offset("sock", "sk_backlog.rmem_alloc"),
            "OFFSET_SOCK_RCVBUF": btf.offset("sock", "sk_rcvbuf"),
            "OFFSET_SOCK_DROPS": btf.offset("sock", "sk_drops"),
            "OFFSET_SOCK_SOCKET": btf.offset("sock", "sk_socket"),
            "OFFSET_SOCKET_FILE": btf.offset("socket", "file"),
            "OFFSET_SOCKET_INODE": btf.offset("socket_alloc", "vfs_inode") + btf.offset("inode", "i_ino"),
        }
        for group in (_IPV6, _DROP_COUNTERS, _SOCK_CGROUP, _INET_FLAGS, _INET_CMSG_FLAGS, _IPV6_RXINFO):
            with contextlib.suppress(LookupError):
                found |= {name: btf.offset(*member) for name, member in group.items()}
        if sys.byteorder == "little":  # elsewhere, bits are numbered from the other end
            for name, member in _BITS.items():
                with contextlib.suppress(LookupError):
                    found[name] = btf.bit_offset(*member)
        return found


#: Members that not every kernel has; a group is used together.
_IPV6 = {
    "OFFSET_SOCK_SADDR6": ("sock", "__sk_common.skc_v6_rcv_saddr"),
    "OFFSET_SOCK_DADDR6": ("sock", "__sk_common.skc_v6_daddr"),
}
_DROP_COUNTERS = {
    "OFFSET_SOCK_DROP_COUNTERS": ("sock", "sk_drop_counters"),
    "OFFSET_DROPS0": ("numa_drop_counters", "drops0"),
    "OFFSET_DROPS1": ("numa_drop_counters", "drops1"),
}
_SOCK_CGROUP = {
    "OFFSET_SOCK_CGROUP": ("sock", "sk_cgrp_data.cgroup"),
    "OFFSET_CGROUP_NODE": ("cgroup", "kn"),
    "OFFSET_NODE_ID": ("kernfs_node", "id"),
}
_INET_FLAGS = {"OFFSET_INET_FLAGS": ("inet_sock", "inet_flags")}
_INET_CMSG_FLAGS = {"OFFSET_INET_CMSG_FLAGS": ("inet_sock", "cmsg_flags")}
_IPV6_RXINFO = {"OFFSET_INET_PINET6": ("inet_sock", "pinet6")}
_BITS = {
    "BIT_SOCK_REUSEPORT": ("sock", "__sk_common.skc_reuseport"),
    "BIT_SOCK_IPV6ONLY": ("sock", "__sk_common.skc_ipv6only"),
    "BIT_INET_TRANSPARENT": ("inet_sock", "transparent"),
    "BIT_IPV6_RXINFO": ("ipv6_pinfo", "rxopt.bits.rxinfo"),
}


def address_offsets(path: Path = VMLINUX_BTF) -> dict[str, int]:
    """Return OFFSET_* of what shows whether an address is local. Raises OSError if BTF cannot be read, and LookupError
    if a structure lacks a member.
    """
    with contextlib.closing(Btf(path)) as btf:
        return {
            "OFFSET_NET_DEVICES": btf.offset("net", "dev_index_head"),
            "OFFSET_SEND_SK": btf.offset("bpf_sock_addr_kern", "sk"),
            "OFFSET_DEVICE_NODE": btf.offset("net_device", "index_hlist"),
            "OFFSET_DEVICE_INDEX": btf.offset("net_device", "ifindex"),
            "OFFSET_DEVICE_FLAGS": btf.offset("net_device", "flags"),
            "OFFSET_DEVICE_IP": btf.offset("net_device", "ip_ptr"),
            "OFFSET_DEVICE_IP6": btf.offset("net_device", "ip6_ptr"),
            "OFFSET_IN_DEVICE_ADDRESSES": btf.offset("in_device", "ifa_list"),
            "OFFSET_IFA_NEXT": btf.offset("in_ifaddr", "ifa_next"),
            "OFFSET_IFA_LOCAL": btf.offset("in_ifaddr", "ifa_local"),
            "OFFSET_IFA_MASK": btf.offset("in_ifaddr", "ifa_mask"),
            "OFFSET_INET6_DEV_ADDRESSES": btf.offset("inet6_dev", "addr_list"),
            "OFFSET_IFA6_LIST": btf.offset("inet6_ifaddr", "if_list"),
            "OFFSET_IFA6_ADDRESS": btf.offset("inet6_ifaddr", "addr"),
            "OFFSET_IFA6_FLAGS": btf.offset("inet6_ifaddr", "flags"),
        }


def flow_offsets(path: Path = VMLINUX_BTF) -> dict[str, int]:
    """Return OFFSET_* of what the function probes read in addition. Raises what `conntrack_offsets` raises."""
    with _types(path) as btf:
        found = {
            "OFFSET_SKB_IIF": btf.offset("sk_buff", "skb_iif"),
            "OFFSET_SOCK_RCV_SADDR": btf.offset("sock", "__sk_common.skc_rcv_saddr"),
            "OFFSET_SOCK_STATE": btf.offset("sock", "__sk_common.skc_state"),
            "OFFSET_MSG_CONTROL": btf.offset("msghdr", "msg_control"),
            "OFFSET_MSG_CONTROLLEN": btf.offset("msghdr", "msg_controllen"),
            "OFFSET_CT_STATUS": btf.offset("nf_conn", "status"),
            "OFFSET_CT_NET": btf.offset("nf_conn", "ct_net.net"),
            "OFFSET_NET_DEVICES": btf.offset("net", "dev_index_head"),
            "OFFSET_DEVICE_NODE": btf.offset("net_device", "index_hlist"),
            "OFFSET_DEVICE_INDEX": btf.offset("net_device", "ifindex"),
            "OFFSET_DEVICE_NAME": btf.offset("net_device", "name"),
        }
        with contextlib.suppress(LookupError):  # CONFIG_IPV6
            found["OFFSET_SOCK_RCV_SADDR6"] = btf.offset("sock", "__sk_common.skc_v6_rcv_saddr")
        with contextlib.suppress(LookupError):  # CONFIG_NF_CONNTRACK_ZONES
            found["OFFSET_CT_ZONE"] = btf.offset("nf_conn", "zone.id")
        return found


def _undescribed(btf: Path, error: OSError | LookupError) -> str:
    """Return in one line why there are no offsets."""
    if isinstance(error, OSError):
        return f"cannot read BTF from {btf}: {error.strerror}"
    return f"{btf} does not describe {error.args[0]}"


def _read_offsets(read: Callable[[Path], dict[str, int]], btf: Path, reason: str) -> tuple[dict[str, int], str]:
    """Return the offsets that ``read`` finds, and why there are none; ``reason``: why there can be none."""
    if reason:
        return {}, reason
    try:
        return read(btf), ""
    except (OSError, LookupError) as error:
        return {}, _undescribed(btf, error)


def _try_probes(btf: Path, reason: str) -> dict[str, Any]:
    """Return the members of Features for function probes; ``reason`` says why there can be none."""
    names = [function.name for _, function in FUNCTIONS]
    functions, reasons = dict[str, str](), dict[str, str]()
    offsets, reason = _read_offsets(flow_offsets, btf, reason)
    if reason:
        none = {"functions": dict.fromkeys(names, ""), "functions_reason": dict.fromkeys(names, reason)}
        return none | {"flow_offsets": {}}
    # Probe each send function separately: a kernel without IPv6 has only one. Probe the functions of conntrack
    # together: one alone is useless.
    for group in (*((function,) for function in _SEND_FUNCTIONS), _CONNTRACK_FUNCTIONS):
        how, reason = try_functions(group, btf)
        functions |= {function.name: how or "" for function in group}
        reasons |= {function.name: reason for function in group if not how}
    return {"functions": functions, "functions_reason": reasons, "flow_offsets": offsets}


def probe(btf: Path = VMLINUX_BTF) -> Features:
    """Try everything. Raises OSError if not even an empty program loads."""
    os.close(program_load(*_SKB, _RETURN_1))
    reason = _helper(_PROBE_READ_KERNEL, _CONTEXT_AS_THIRD + _BUFFER_ARGUMENTS)
    if reason:
        reason = f"cannot read kernel memory: {reason}; add CAP_PERFMON, unless the kernel is locked down"
    offsets, reason = _read_offsets(conntrack_offsets, btf, reason)
    of_sockets, sockets_reason = _read_offsets(socket_offsets, btf, reason)
    of_addresses, address_reason = _read_offsets(address_offsets, btf, reason)
    current = _helper(_GET_CURRENT_PID_TGID) or _helper(_GET_CURRENT_UID_GID) or _helper(_GET_CURRENT_CGROUP_ID)
    return Features(
        netns_cookie=not _helper(_GET_NETNS_COOKIE),
        current=not current,
        current_task=not reason and not _helper(_GET_CURRENT_TASK),
        current_comm=not _helper(_GET_CURRENT_COMM, _BUFFER_ARGUMENTS),
        sender_comm=not _helper(_GET_CURRENT_COMM, _BUFFER_ARGUMENTS, _SENDMSG),
        conntrack=not reason,
        offsets=offsets,
        conntrack_reason=reason,
        socket_offsets=of_sockets,
        sockets_reason=sockets_reason,
        address_offsets=of_addresses,
        address_reason=address_reason,
        **_try_probes(btf, reason),
    )
