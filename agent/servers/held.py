"""List the UDP sockets that processes hold, without BPF: each socket is asked itself (pidfd_getfd, getsockopt).

This needs root (CAP_SYS_PTRACE). Sockets of the kernel (tunnels) are not listed, and the kernel does not tell whether
bind() named a port.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from udpwatch.agent.kernel.netns import MAX_ENTRIES
from udpwatch.agent.kernel.records import printable
from udpwatch.agent.model import UdpSocket

_SYS_PIDFD_GETFD = 438  # the same number on every architecture; Linux kernel commit 8649c322f75c (in v5.6)
_GET_NAMESPACE = 0x894C  # SIOCGSKNS
_SO_COOKIE, _SO_MEMINFO, _SO_BINDTOIFINDEX = 57, 55, 62
_MEMORY = struct.Struct("=9I")  # SK_MEMINFO_*: the first is what is received, then the limit; the last are drops
_IP_PKTINFO, _IP_TRANSPARENT, _IPV6_RECVPKTINFO, _IPV6_TRANSPARENT = 8, 19, 49, 75
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Held:
    """The sockets of the processes that could be examined."""

    sockets: tuple[UdpSocket, ...]
    closed: int  # processes that this user may not examine


def held_sockets(proc: Path = Path("/proc")) -> Held:
    """Return the bound UDP sockets of all processes; a socket that several processes share, once."""
    found: dict[int, UdpSocket] = {}
    closed = 0
    with os.scandir(proc) as entries:
        pids = sorted(int(entry.name) for entry in entries if entry.name.isdigit())
    for pid in pids:
        try:
            for inode, held in _of_process(proc / str(pid), pid):
                with held, contextlib.suppress(OSError):
                    if inode not in found and (described := _described(held, inode, pid, proc)):
                        found[inode] = described
        except PermissionError:
            closed += 1
        except OSError:
            continue  # it has ended
    return Held(tuple(found.values()), closed)


def _of_process(folder: Path, pid: int) -> Iterator[tuple[int, socket.socket]]:
    """Yield (inode number, duplicate) of each UDP socket. The caller closes it. Raises OSError."""
    process = os.pidfd_open(pid)  # before its descriptors are listed: another process may get the number meanwhile
    try:
        for number in _descriptors(folder / "fd"):
            fd = _libc.syscall(_SYS_PIDFD_GETFD, process, number, 0)
            if fd < 0:
                if ctypes.get_errno() in (1, 13):
                    raise PermissionError(ctypes.get_errno(), "pidfd_getfd")
                continue
            made = socket.socket(fileno=fd)
            if made.family in (socket.AF_INET, socket.AF_INET6) and made.proto == socket.IPPROTO_UDP:
                yield os.fstat(fd).st_ino, made  # of what was duplicated: the number may be another socket's by now
            else:
                made.close()
    finally:
        os.close(process)


def _descriptors(folder: Path) -> list[int]:
    """Return the number of each socket among a process's first descriptors. Raises OSError."""
    found = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, MAX_ENTRIES):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry.path).startswith("socket:["):  # noqa: PTH115 pathlib takes three times as long
                    found.append(int(entry.name))
    return found


def _described(held: socket.socket, inode: int, pid: int, proc: Path) -> UdpSocket | None:
    """Return what a socket tells about itself, or None if it is not bound. Raises OSError."""
    address, port = held.getsockname()[:2]
    if not port:
        return None
    peer = ("", 0)
    with contextlib.suppress(OSError):
        peer = held.getpeername()[:2]
    six = held.family == socket.AF_INET6
    memory = _MEMORY.unpack(held.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMORY.size))
    return UdpSocket(
        address=address,
        port=port,
        family=6 if six else 4,
        netns=_namespace(held),
        inode=inode,
        cookie=struct.unpack("=Q", held.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0],
        uid=os.fstat(held.fileno()).st_uid,
        peer=peer[0],
        peer_port=peer[1],
        device=held.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX),
        only_ipv6=six and bool(held.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)),
        pktinfo=bool(held.getsockopt(socket.IPPROTO_IP, _IP_PKTINFO)),
        pktinfo6=six and bool(held.getsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO)),
        reuseport=bool(held.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)),
        transparent=bool(
            held.getsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT)
            if six
            else held.getsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT)
        ),
        queue=memory[0],
        queue_limit=memory[1],
        drops=memory[8],
        pid=pid,
        process=printable((proc / str(pid) / "comm").read_bytes().removesuffix(b"\n")),
    )


def _namespace(held: socket.socket) -> int:
    """Return the inode number of a socket's network namespace, 0 if the kernel does not tell (CAP_NET_ADMIN)."""
    try:
        fd = fcntl.ioctl(held, _GET_NAMESPACE)
    except OSError:
        return 0
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)
