"""List the UDP sockets of a network namespace over netlink (sock_diag(7)), for kernels without socket iterators."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from udpwatch.agent.kernel.records import decode_address, encode_address
from udpwatch.agent.model import UdpSocket
from udpwatch.dns.netlink import Netlink, attributes

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_ALL_STATES = 0xFFFFFFFF
_SKMEMINFO, _SKV6ONLY, _CGROUP_ID, _SOCKOPT = 7, 11, 21, 22  # INET_DIAG_*
_RMEM, _RCVBUF, _DROPS = 0, 1, 8  # SK_MEMINFO_*
_TRANSPARENT = 0x20  # in struct inet_diag_sockopt
_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2
_MESSAGE = struct.Struct("=BBBB HH 16s16s II I IIIII".replace(" ", ""))  # struct inet_diag_msg


def list_sockets(netns: int) -> Iterator[UdpSocket]:
    """Yield the UDP sockets of the namespace of the calling thread, whose inode number is ``netns``.

    Whether they have PKTINFO set, and whether bind() named their port, is not told. Raises OSError.
    """
    with Netlink(_NETLINK_SOCK_DIAG) as link:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_UDP, 1 << (_SKMEMINFO - 1), 0, _ALL_STATES)
            with contextlib.suppress(FileNotFoundError):  # a kernel without this family's module
                for message in link.ask(_SOCK_DIAG_BY_FAMILY, request, dump=True):
                    yield _decode(message, netns)


def _decode(message: memoryview, netns: int) -> UdpSocket:
    family, _state, _timer, _retrans, *rest = _MESSAGE.unpack_from(message)
    port, peer_port = (socket.ntohs(number) for number in rest[:2])
    address, peer = (_address(family, raw) for raw in rest[2:4])
    device, low, high, _expires, _receive, _send, uid, inode = rest[4:]
    known = {kind: bytes(value) for kind, value in attributes(message[_MESSAGE.size :])}
    memory = struct.unpack("=9I", known[_SKMEMINFO][:36]) if len(known.get(_SKMEMINFO, b"")) >= 36 else None
    options = known.get(_SOCKOPT)
    return UdpSocket(
        address=address,
        port=port,
        family=4 if family == socket.AF_INET else 6,
        netns=netns,
        inode=inode,
        cookie=high << 32 | low,
        uid=uid,
        peer=peer if peer_port else "",
        peer_port=peer_port,
        device=device,
        only_ipv6=bool(known.get(_SKV6ONLY, b"\0")[0]),
        transparent=bool(options[0] & _TRANSPARENT) if options else None,
        queue=memory[_RMEM] if memory else None,
        queue_limit=memory[_RCVBUF] if memory else None,
        drops=memory[_DROPS] if memory else None,
        cgroup=struct.unpack("=Q", known[_CGROUP_ID])[0] if len(known.get(_CGROUP_ID, b"")) == 8 else 0,
    )


def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return decode_address(encode_address("0.0.0.0")[:12] + raw[:4])  # noqa: S104 the prefix of mapped addresses
    return decode_address(raw)
