"""Tell the programs of bpf/heal.c which addresses a network namespace has, and on which device.

Rules
1. The programs check that the device has the address at the moment of the send. This map only says where to look, so a
   late removal is harmless.
2. Between that check and the kernel's own use of the address, the address may still be removed. An address that was
   removed is therefore left out until it has stayed for STABLE_SECONDS: one that comes and goes is not used at all.
3. A tenant may change the addresses of its namespace at any rate. Beyond a rate, they are no longer followed, and
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
from udpwatch.dns.netlink import BUFFER, KERNEL, Netlink, messages

STABLE_SECONDS = 1.0
MAX_DATAGRAMS = 64  # of events, in one turn: other namespaces wait
_NEW_ADDRESS, _DELETED_ADDRESS = 20, 21  # RTM_*
_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_RECEIVE_BYTES = 1 << 20
_INDEX = struct.Struct("=I")
_FOLLOWED = "::"  # the address that marks a namespace as followed
_LINK_SCOPE = 253  # RT_SCOPE_LINK
MAX_PLACES = 16  # of one address
_Place = tuple[int, int]  # index of the device, length of the prefix


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
        self._entered: dict[str, int] = {}  # address -> index of its device, as in the map
        self._devices: dict[str, set[_Place]] = {}  # where the kernel has it, usable
        self._removed: dict[str, float] = {}  # until when it is unstable
        self._has_lost = False
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
            bpf.map_update(self._map, self._key(_FOLLOWED), _INDEX.pack(0))
        except BaseException:
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
        return self._has_lost or any(address in self._devices for address in self._removed)

    def close(self) -> None:
        """Remove the namespace from the map."""
        bpf.map_delete(self._map, self._key(_FOLLOWED))
        for address in list(self._entered):
            self._leave(address)
        self._events.close()
        self._requests.close()

    def read(self, now: float) -> None:
        """Enter what has changed; call it also once a second. Raises OSError, and TooManyChangesError beyond the
        bounds: close it then.
        """
        for _ in range(MAX_DATAGRAMS):
            try:
                raw, (sender, _) = self._events.recvfrom(BUFFER)
            except BlockingIOError:
                if not self._has_lost:
                    break
                self._begin_again(now)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._forget(now)
            else:
                if sender == KERNEL:  # a tenant may send to the group, too
                    self._read_changes(raw, now)
        for address in [address for address, until in self._removed.items() if until <= now]:
            del self._removed[address]
            self._enter(address)

    def _read_changes(self, raw: bytes, now: float) -> None:
        for kind, content in messages(raw):
            self._take_turn(now)
            each = read_address(content) if kind in (_NEW_ADDRESS, _DELETED_ADDRESS) else None
            if not each:
                continue
            if kind == _NEW_ADDRESS and each.is_usable:
                self._add(each, now)
            else:
                self._remove(each, now)

    def _take_turn(self, now: float) -> None:
        gained = (now - self._changed_at) * self._bounds.changes_per_second
        self._may_change, self._changed_at = min(self._may_change + gained, self._bounds.burst), now
        if self._may_change < 1:
            raise TooManyChangesError
        self._may_change -= 1

    def _forget(self, now: float) -> None:
        """Changes were lost. The kernel reports no more of them until its queue has been read to the end, so the
        addresses are listed only then.
        """
        self._has_lost = True
        for address in list(self._entered):
            self._leave(address)
        for address in self._devices:
            self._removed[address] = now + STABLE_SECONDS

    def _begin_again(self, now: float) -> None:
        """List all addresses; each must show again that it stays."""
        self._has_lost = False
        self._devices.clear()
        for each in addresses(self._bounds.addresses, self._requests):
            self._removed[each.address] = now + STABLE_SECONDS
            self._add(each, now)

    def _add(self, each: LinkAddress, now: float) -> None:
        if not each.is_usable or (each.family == 6 and each.scope == _LINK_SCOPE):
            return
        places = self._devices.get(each.address)
        if places is None:
            if len(self._devices) >= self._bounds.addresses:
                return
            places = self._devices[each.address] = set[_Place]()
        if len(places) < MAX_PLACES:
            places.add((each.index, each.prefix))
        if self._removed.get(each.address, 0.0) <= now:
            self._enter(each.address)

    def _enter(self, address: str) -> None:
        """Enter an address where the kernel has it, if it has it."""
        if self._has_lost or address not in self._devices:
            return
        index = next(iter(self._devices[address]))[0]
        if self._entered.get(address) != index:
            bpf.map_update(self._map, self._key(address), _INDEX.pack(index))
            self._entered[address] = index

    def _remove(self, each: LinkAddress, now: float) -> None:
        """Leave out an address that was removed from one place, also if it is still at another."""
        places = self._devices.get(each.address, set[_Place]())
        places.discard((each.index, each.prefix))
        if not places:
            self._devices.pop(each.address, None)
        self._leave(each.address)
        if each.address not in self._removed and len(self._removed) >= 2 * self._bounds.addresses:
            raise TooManyChangesError
        self._removed[each.address] = now + STABLE_SECONDS

    def _leave(self, address: str) -> None:
        if self._entered.pop(address, None) is not None:
            bpf.map_delete(self._map, self._key(address))

    def _key(self, address: str) -> bytes:
        return encode_local_key(address, self.inode)
