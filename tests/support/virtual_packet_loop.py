"""`udpwatch.dns.packet_loop.PacketLoop` in an event loop with virtual time: same timers and order, no descriptors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TypeVar

from udpwatch.dns.timers import DelayQueue

_Item = TypeVar("_Item", bound=Hashable)


class _Queue(DelayQueue[_Item]):
    """Runs itself when an item is due."""

    def start(self, item: _Item, now: float) -> None:
        super().start(item, now)
        due = now + self._delay
        asyncio.get_running_loop().call_at(due, lambda: self.run(due))  # the clock may be a rounding error behind


class VirtualPacketLoop:
    """Create it in the event loop. What is posted runs in the next turn."""

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def post(self, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(call)

    call_soon = post

    def delay_queue(self, delay: float, action: Callable[[_Item], None]) -> DelayQueue[_Item]:
        return _Queue(delay, action)

    def at_end(self, call: Callable[[], None]) -> None:
        """Nothing ends it."""
