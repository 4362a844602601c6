"""What each tenant holds of a bounded map: a program lets a tenant hold as many elements as are free (bpf/sockets.c,
`finding_of`). Programs only add to the numbers; whoever takes elements out sets them right here.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping

from udpwatch.agent.kernel import bpf

_NUMBER = struct.Struct("=Q")


class Shares:
    """The numbers of one map."""

    def __init__(self, held: int, all_held: int) -> None:
        """The descriptors of the map from tenant to number, and of the array with their sum; both stay the caller's."""
        self._held, self._all = held, all_held
        self._holding: set[int] = set()

    def set(self, held: Mapping[int, int]) -> None:
        """Set what each tenant holds; others hold nothing. What the kernel refuses (for want of memory, say) is set at
        the next call.
        """
        for tenant in self._holding - held.keys():
            with contextlib.suppress(OSError):
                bpf.map_delete(self._held, _NUMBER.pack(tenant))
        for tenant, count in held.items():
            with contextlib.suppress(OSError):
                bpf.map_update(self._held, _NUMBER.pack(tenant), _NUMBER.pack(count))
        bpf.map_update(self._all, bytes(4), _NUMBER.pack(sum(held.values())))
        self._holding = set(held)
