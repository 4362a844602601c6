"""List the sockets of a port in one namespace, as every user may: without their processes, with the kernel's own."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from udpwatch.agent.kernel import sock_diag
from udpwatch.agent.model import UdpSocket

_HERE = Path("/proc/thread-self/net")


def all_here(port: int, netns: int) -> list[UdpSocket]:
    """Return the sockets of the port in the namespace of the calling thread, whose inode number is ``netns``."""
    try:
        return [each for each in sock_diag.list_sockets(netns) if each.port == port]
    except OSError:
        return [replace(each, netns=netns) for each in sockets_here(port)]


def sockets_here(port: int, folder: Path = _HERE) -> Iterator[UdpSocket]:
    """Yield the same from /proc/net/udp and udp6, which is fast, and lacks most of their options."""
    wanted = f":{port:04X}"
    for name, family in (("udp", 4), ("udp6", 6)):
        with contextlib.suppress(OSError), (folder / name).open() as lines:
            for line in lines:
                if wanted not in line:  # nearly all, and there may be very many
                    continue
                words = line.split()
                if len(words) > 12 and words[1].endswith(wanted):
                    yield _parsed(words, port, family)


def missing_from(listed: Iterable[UdpSocket], here: Iterable[UdpSocket]) -> list[UdpSocket]:
    """Return the sockets of this list that another list lacks."""
    known = {_identity(each) for each in listed}
    return [each for each in here if _identity(each) not in known]


def _identity(sock: UdpSocket) -> tuple[int, ...]:
    """Return what identifies a socket in its namespace. Those of the kernel have no inode number."""
    return (sock.inode,) if sock.inode else (0, sock.family)


def _parsed(words: list[str], port: int, family: int) -> UdpSocket:
    peer, _, peer_port = words[2].partition(":")
    connected = int(peer_port, 16) != 0
    return UdpSocket(
        address=_address(words[1].partition(":")[0]),
        port=port,
        family=family,
        inode=int(words[9]),
        uid=int(words[7]),
        peer=_address(peer) if connected else "",
        peer_port=int(peer_port, 16),
        queue=int(words[4].partition(":")[2], 16),
        drops=int(words[12]),
    )


def _address(text: str) -> str:
    """Decode an address, which is printed as words in the byte order of the machine."""
    raw = b"".join(int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
