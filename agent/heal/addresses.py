"""Tell the programs of bpf/heal.c which device has each address.

Rules
1. The programs check that the device has the address at the moment of the send. This map only says where to look, so a
   late removal is harmless.
2. Between that check and the kernel's own use of the address, it may still be removed. An address that was removed is
   therefore left out until it has stayed for STABLE_SECONDS: one that comes and goes is not used at all.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from pathlib import Path

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.interfaces import LinkAddress, addresses, read_address
from udpwatch.dns.netlink import BUFFER, messages

STABLE_SECONDS = 1.0
MAX_ADDRESSES = 16_384  # in the map
_NEW_ADDRESS, _DELETED_ADDRESS = 20, 21  # RTM_*
_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_RECEIVE_BYTES = 1 << 20
_REST = struct.Struct("=II")  # of struct local_key: netns, pad
_INDEX = struct.Struct("=I")


class LocalAddresses:
    """Follows the addresses of the network namespace of the thread that creates it. Not thread-safe."""

    def __init__(self, local_devices: int, now: float) -> None:
        """Enter all addresses in the map ``local_devices``. ``now``: monotonic seconds. Raises OSError."""
        self._map = local_devices
        self._rest = _REST.pack(Path("/proc/thread-self/ns/net").stat().st_ino, 0)
        self._entered: dict[bytes, int] = {}
        self._waiting: dict[bytes, tuple[float, int]] = {}  # when it is entered, and the index of its device
        self._removed: dict[bytes, float] = {}  # until when it is unstable
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        self._events.bind((0, _GROUPS))  # before they are listed, so that no change is missed
        for each in addresses(MAX_ADDRESSES):
            self._add(each, now)

    def fileno(self) -> int:
        """Return the descriptor that is readable when addresses have changed."""
        return self._events.fileno()

    def close(self) -> None:
        """Forget all addresses."""
        for key in list(self._entered):
            self._delete(key)
        self._events.close()

    def read(self, now: float) -> None:
        """Enter what has changed; call it also once a second. Raises OSError."""
        while True:
            try:
                raw = self._events.recv(BUFFER)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._begin_again(now)
                continue
            for kind, content in messages(raw):
                each = read_address(content) if kind in (_NEW_ADDRESS, _DELETED_ADDRESS) else None
                if each and kind == _NEW_ADDRESS and each.is_usable:
                    self._add(each, now)
                elif each:
                    self._remove(_key(each) + self._rest, now)
        for key, (at, index) in list(self._waiting.items()):
            if at <= now:
                del self._waiting[key]
                self._enter(key, index)
        self._removed = {key: until for key, until in self._removed.items() if until > now}

    def _begin_again(self, now: float) -> None:
        """Changes were lost: each address must show again that it stays."""
        for key in list(self._entered):
            self._remove(key, now)
        self._waiting.clear()
        for each in addresses(MAX_ADDRESSES):
            self._removed.setdefault(_key(each) + self._rest, now + STABLE_SECONDS)
            self._add(each, now)

    def _add(self, each: LinkAddress, now: float) -> None:
        if not each.is_usable:
            return
        key = _key(each) + self._rest
        until = self._removed.get(key, 0.0)
        if until > now:
            self._waiting[key] = until, each.index
        else:
            self._enter(key, each.index)

    def _enter(self, key: bytes, index: int) -> None:
        if self._entered.get(key) != index and len(self._entered) < MAX_ADDRESSES:
            bpf.map_update(self._map, key, _INDEX.pack(index))
            self._entered[key] = index

    def _remove(self, key: bytes, now: float) -> None:
        self._removed[key] = now + STABLE_SECONDS
        self._waiting.pop(key, None)
        self._delete(key)

    def _delete(self, key: bytes) -> None:
        if self._entered.pop(key, None) is not None:
            bpf.map_delete(self._map, key)


def _key(each: LinkAddress) -> bytes:
    address = ipaddress.ip_address(each.address)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
