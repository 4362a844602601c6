"""Tell the programs of bpf/heal.c which addresses a network namespace has, and on which device.

Rules
1. The programs check that the device has the address at the moment of the send. This map only says where to look, so a
   late removal is harmless.
2. Between that check and the kernel's own use of the address, the address may still be removed. An address that was
   removed is therefore left out until it has stayed for STABLE_SECONDS: one that comes and goes is not used at all.
3. Whoever rules a namespace may change its addresses at any rate. Beyond a rate, they are no longer followed, and
   nothing is healed there.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.interfaces import LinkAddress, addresses, read_address
from udpwatch.agent.kernel.records import encode_local_key
from udpwatch.dns.netlink import BUFFER, Netlink, messages

STABLE_SECONDS = 1.0
MAX_DATAGRAMS = 64  # of events, in one turn: other namespaces wait
_NEW_ADDRESS, _DELETED_ADDRESS = 20, 21  # RTM_*
_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_RECEIVE_BYTES = 1 << 20
_INDEX = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one namespace may use."""

    addresses: int
    changes_per_second: float
    burst: int  # of changes


class TooManyChangesError(Exception):
    """The addresses of a namespace change more often than its bounds allow."""


class LocalAddresses:
    """Follows the addresses of the network namespace of the thread that creates it. Not thread-safe.

    Its sockets keep the namespace alive.
    """

    def __init__(self, local_devices: int, bounds: Bounds, now: float) -> None:
        """Enter all addresses in the map ``local_devices``. ``now``: monotonic seconds. Raises OSError."""
        self.inode = Path("/proc/thread-self/ns/net").stat().st_ino
        self._map, self._bounds = local_devices, bounds
        self._followed = encode_local_key("::", self.inode)
        self._entered: dict[bytes, int] = {}
        self._waiting: dict[bytes, tuple[float, int]] = {}  # when it is entered, and the index of its device
        self._removed: dict[bytes, float] = {}  # until when it is unstable
        self._may_change, self._changed_at = float(bounds.burst), now
        self._requests = Netlink(socket.NETLINK_ROUTE)
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            self._events.bind((0, _GROUPS))  # before they are listed, so that no change is missed
            for each in addresses(bounds.addresses, self._requests):
                self._add(each, now)
            bpf.map_update(self._map, self._followed, _INDEX.pack(0))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that is readable when addresses have changed."""
        return self._events.fileno()

    def __len__(self) -> int:
        """Return the number of addresses in the map."""
        return len(self._entered)

    @property
    def is_settling(self) -> bool:
        """Whether an address waits until it has stayed for long enough: call `read` again soon."""
        return bool(self._waiting)

    def close(self) -> None:
        """Remove the namespace from the map."""
        bpf.map_delete(self._map, self._followed)
        for key in list(self._entered):
            self._delete(key)
        self._events.close()
        self._requests.close()

    def read(self, now: float) -> None:
        """Enter what has changed; call it also once a second. Raises OSError, and TooManyChangesError beyond the
        bounds: close it then.
        """
        for _ in range(MAX_DATAGRAMS):
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
                if each:
                    self._take_turn(now)
                    self._change(each, kind == _NEW_ADDRESS, now)
        for key, (at, index) in list(self._waiting.items()):
            if at <= now:
                del self._waiting[key]
                self._enter(key, index)
        self._removed = {key: until for key, until in self._removed.items() if until > now}

    def _take_turn(self, now: float) -> None:
        gained = (now - self._changed_at) * self._bounds.changes_per_second
        self._may_change, self._changed_at = min(self._may_change + gained, self._bounds.burst), now
        if self._may_change < 1:
            raise TooManyChangesError
        self._may_change -= 1

    def _change(self, each: LinkAddress, is_new: bool, now: float) -> None:
        if is_new and each.is_usable:
            self._add(each, now)
        else:
            self._remove(encode_local_key(each.address, self.inode), now)

    def _begin_again(self, now: float) -> None:
        """Changes were lost: each address must show again that it stays."""
        for key in list(self._entered):
            self._remove(key, now)
        self._waiting.clear()
        for each in addresses(self._bounds.addresses, self._requests):
            self._removed.setdefault(encode_local_key(each.address, self.inode), now + STABLE_SECONDS)
            self._add(each, now)

    def _add(self, each: LinkAddress, now: float) -> None:
        if not each.is_usable or len(self._entered) + len(self._waiting) >= self._bounds.addresses:
            return
        key = encode_local_key(each.address, self.inode)
        until = self._removed.get(key, 0.0)
        if until > now:
            self._waiting[key] = until, each.index
        else:
            self._enter(key, each.index)

    def _enter(self, key: bytes, index: int) -> None:
        if self._entered.get(key) != index:
            bpf.map_update(self._map, key, _INDEX.pack(index))
            self._entered[key] = index

    def _remove(self, key: bytes, now: float) -> None:
        self._waiting.pop(key, None)
        self._delete(key)
        if len(self._removed) >= 2 * self._bounds.addresses:
            raise TooManyChangesError
        self._removed[key] = now + STABLE_SECONDS

    def _delete(self, key: bytes) -> None:
        if self._entered.pop(key, None) is not None:
            bpf.map_delete(self._map, key)
