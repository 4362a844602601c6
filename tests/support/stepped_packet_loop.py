"""`udpwatch.dns.packet_loop.PacketLoop` without a thread: a test runs its turns. No descriptors, no timers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class SteppedPacketLoop:
    """What is posted runs at once; the rest in `turn`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.handlers: dict[int, Callable[[], None]] = {}
        self._soon: deque[Callable[[], None]] = deque()

    def post(self, call: Callable[[], None]) -> None:
        call()

    def register(self, descriptor: int, handler: Callable[[], None]) -> None:
        assert descriptor not in self.handlers
        self.handlers[descriptor] = handler

    def unregister(self, descriptor: int) -> None:
        del self.handlers[descriptor]

    def call_soon(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    def turn(self) -> None:
        """End the turn: run what was to run soon."""
        for _ in range(len(self._soon)):
            self._soon.popleft()()
