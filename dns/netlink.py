"""Send netlink requests and decode the answers (netlink(7)).

Raw netlink: pyroute2 takes 20 MB of memory, and the agent's budget is 45 MB.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Self

NESTED = 0x8000  # NLA_F_NESTED
BUFFER = 1 << 16
KERNEL = 0  # the port number of the kernel: any other sender is a process
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_REQUEST, _DUMP = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute with its padding."""
    return _ATTRIBUTE.pack(len(value) + 4, kind) + value + bytes(-len(value) % 4)


def attributes(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type without flags, value) of each attribute, up to the first invalid length."""
    at, end = 0, len(raw)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if length < 4 or at + length > end:
            return
        yield kind & ~NESTED, raw[at + 4 : at + length]
        at += length + 3 & ~3


def messages(raw: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, content) of each message in a datagram."""
    view, at = memoryview(raw), 0
    while at + HEADER.size <= len(raw):
        length, kind = struct.unpack_from("=IH", raw, at)
        if length < HEADER.size or at + length > len(raw):
            return
        yield kind, view[at + HEADER.size : at + length]
        at += length + 3 & ~3


class Netlink:
    """A socket for requests, in the namespace of the thread that creates it."""

    def __init__(self, protocol: int) -> None:
        """Open the socket; raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, kind: int, body: bytes, dump: bool = False) -> Iterator[memoryview]:
        """Send a request; yield the content of each message of the answer. The caller must read all of them; raises
        OSError.
        """
        flags = _REQUEST | (_DUMP if dump else 0)
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
        while True:
            raw, (sender, _) = self._socket.recvfrom(BUFFER)
            if sender != KERNEL:
                continue
            for what, content in messages(raw):
                if what == _DONE:
                    return
                if what == _ERROR:
                    (code,) = struct.unpack_from("=i", content)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return
                yield content
            if not dump:
                return
