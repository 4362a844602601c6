"""Keep the shares of a bounded map right.

A program lets a tenant hold as many elements as are free (`finding_of` in bpf/sockets.c). Programs only add to the
numbers; user space corrects them when it deletes elements.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping

from udpwatch.agent.kernel import bpf

_NUMBER = struct.Struct("=Q")


class Shares:
    """The numbers of elements in one map, by tenant."""

    def __init__(self, held: int, all_held: int) -> None:
        """Use the map from tenant to number, and the array with the total; the caller closes both."""
        self._held, self._all = held, all_held
        self._holding: set[int] = set()

    def set(self, held: Mapping[int, int]) -> None:
        """Set the number of each tenant; tenants that are not listed hold nothing. What the kernel refuses, e.g. for
        lack of memory, is set at the next call.
        """
        for tenant in self._holding - held.keys():
            with contextlib.suppress(OSError):
                bpf.map_delete(self._held, _NUMBER.pack(tenant))
        for tenant, count in held.items():
            with contextlib.suppress(OSError):
                bpf.map_update(self._held, _NUMBER.pack(tenant), _NUMBER.pack(count))
        bpf.map_update(self._all, bytes(4), _NUMBER.pack(sum(held.values())))
        self._holding = set(held)


def excess(held: dict[int, int], most: int) -> dict[int, int]:
    """Return how many elements each of the largest tenants must lose so that ``most`` are left."""
    if sum(held.values()) <= most:
        return {}
    share, left, room = most, len(held), most
    for number in sorted(held.values()):
        if number * left > room:
            share = room // left  # what each remaining tenant may keep
            break
        room, left = room - number, left - 1
    return {tenant: number - share for tenant, number in held.items() if number > share}
