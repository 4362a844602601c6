"""The link-layer addresses of this host's neighbours, for `--add-mac`: a copy of the kernel's table.

Rules
1. No query waits for the kernel: it is looked up in the copy. A client that is not in it has no address.
2. The kernel reports changes, and the event loop's thread follows them. Anyone in a network of this host can cause
   changes, so after each CHANGES_IN_A_ROW it pauses for PAUSE_SECONDS. If the kernel's buffer overflows meanwhile, the
   table is read again, at most once in READ_SECONDS.
3. The copy has at most MAX_NEIGHBOURS addresses. The kernel's own limit is 1,024 per family by default (gc_thresh3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from itertools import islice

from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.netlink import BUFFER, Netlink, attributes, messages

MAX_NEIGHBOURS = 16_384
CHANGES_IN_A_ROW = 32  # datagrams of the kernel, of one change each
PAUSE_SECONDS = 0.01  # so at most 3,200 changes a second, which take a few percent of a CPU
READ_SECONDS = 1.0

_RTM_NEWNEIGH, _RTM_DELNEIGH, _RTM_GETNEIGH = 28, 29, 30
_RTMGRP_NEIGH = 0x4
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_INCOMPLETE, _NUD_FAILED, _NUD_NOARP = 0x01, 0x20, 0x40
_UNKNOWN = _NUD_INCOMPLETE | _NUD_FAILED | _NUD_NOARP  # states without a usable address, as in dnsmasq
_MAX_OCTETS = 16  # of a link-layer address, as in dnsmasq: InfiniBand's 20 are none

_ndmsg = struct.Struct("=BxxxiHBB")

log = logging.getLogger(__name__)


class Neighbours:
    """The copy. `address_of` may be called by any thread, everything else in the event loop's."""

    def __init__(self) -> None:
        self._known: dict[bytes, dict[int, bytes]] = {}  # address -> interface index -> link-layer address
        self._of: dict[bytes, bytes] = {}  # address -> link-layer address, if there is only one
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None  # of the next reading
        self._pause: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._known)

    def address_of(self, client: bytes) -> bytes:
        """Return the link-layer address of a neighbour, given its address of 4 or 16 octets; b"": unknown.

        Link-local addresses of two networks may be the same; then it is unknown.
        """
        return self._of.get(client, b"")

    def start(self) -> None:
        """Follow the kernel's table in the running event loop. Raises OSError."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.bind((0, _RTMGRP_NEIGH))
        self._resume()
        self._read()

    def stop(self) -> None:
        """Stop; also if it was never started."""
        for timer in (self._timer, self._pause):
            if timer:
                timer.cancel()
        if self._socket:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _resume(self) -> None:
        assert self._socket
        self._pause = None
        asyncio.get_running_loop().add_reader(self._socket, self._on_change)

    def _on_change(self) -> None:
        assert self._socket
        for _ in range(CHANGES_IN_A_ROW):
            try:
                data = self._socket.recv(BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._read_soon()  # some changes were lost
                return
            for kind, content in messages(data):
                self._apply(kind, content)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._pause = loop.call_later(PAUSE_SECONDS, self._resume)

    def _read_soon(self) -> None:
        if not self._timer:
            self._timer = asyncio.get_running_loop().call_later(READ_SECONDS, self._read)

    def _read(self) -> None:
        """Read the whole table again."""
        self._timer = None
        try:
            with Netlink(socket.NETLINK_ROUTE) as link:
                table = link.ask(_RTM_GETNEIGH, _ndmsg.pack(socket.AF_UNSPEC, 0, 0, 0, 0), dump=True)
                found = list(islice(table, MAX_NEIGHBOURS))
        except OSError as error:
            LIMITED.write(log, logging.WARNING, "dns: cannot read this host's neighbours: %s", error.strerror)
            self._read_soon()
            return
        old, self._known, self._of = self._of, {}, dict(self._of)
        for content in found:
            self._apply(_RTM_NEWNEIGH, content)
        for gone in old.keys() - self._known.keys():
            self._of.pop(gone, None)

    def _apply(self, kind: int, content: memoryview) -> None:
        """Follow one change."""
        if kind not in (_RTM_NEWNEIGH, _RTM_DELNEIGH) or len(content) < _ndmsg.size:
            return
        family, index, state, _, _ = _ndmsg.unpack_from(content)
        if family not in (socket.AF_INET, socket.AF_INET6):  # a bridge's table
            return
        found = {each: bytes(value) for each, value in attributes(content[_ndmsg.size :])}
        address, link_address = found.get(_NDA_DST, b""), found.get(_NDA_LLADDR, b"")
        if kind == _RTM_DELNEIGH or state & _UNKNOWN or len(link_address) > _MAX_OCTETS:
            link_address = b""
        known = self._known.get(address, {})
        if link_address and (known or len(self._known) < MAX_NEIGHBOURS):
            known[index] = link_address
            self._known[address] = known
        elif known.pop(index, None) is not None and not known:
            del self._known[address]
        distinct = set(known.values())
        if len(distinct) == 1:
            self._of[address] = distinct.pop()
        else:
            self._of.pop(address, None)
