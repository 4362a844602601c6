"""A tun device: what the test writes, its namespace receives as packets, and what it sends, the test reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Self

from udpwatch.agent.testing.lab import Namespace

# include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class Tun:
    """A device that is up, with a queue for many packets; a context manager."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        with namespace.entered():
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        namespace.ip(f"link set {name} txqueuelen 100000 up")

    def write(self, packet: bytes) -> bool:
        """Send a packet to the namespace; return whether it is one: the device refuses what is not IP."""
        try:
            os.write(self._fd, packet)
        except OSError:
            return False
        return True

    def read(self) -> Iterator[bytes]:
        """Yield the packets that the namespace has sent."""
        with contextlib.suppress(BlockingIOError):
            while True:
                yield os.read(self._fd, 65_535)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
