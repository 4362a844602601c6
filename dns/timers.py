"""Timers of a few fixed delays. No threads, no clock."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Item = TypeVar("_Item", bound=Hashable)

FIRED_PER_TURN = 64  # of one queue: others get their turn


class DelayQueue(Generic[_Item]):
    """Items that are due after the same delay: the oldest is always the next, so each step takes constant time."""

    __slots__ = ("_action", "_delay", "_due")

    def __init__(self, delay: float, action: Callable[[_Item], None]) -> None:
        """``action`` gets each item that is due; ``delay`` in seconds."""
        self._delay, self._action = delay, action
        self._due: OrderedDict[_Item, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._due)

    def start(self, item: _Item, now: float) -> None:
        """Start the timer of an item that has none."""
        self._due[item] = now + self._delay

    def stop(self, item: _Item) -> None:
        """Stop the timer of an item, if it has one."""
        self._due.pop(item, None)

    def oldest(self) -> _Item:
        """Return the item that is due next; there must be one."""
        return next(iter(self._due))

    def next(self) -> float:
        """Return when the next item is due; infinity: never."""
        for due in self._due.values():
            return due
        return math.inf

    def run(self, now: float) -> None:
        """Take the items that are due, at most FIRED_PER_TURN."""
        for _ in range(FIRED_PER_TURN):
            if self.next() > now:
                return
            item, _ = self._due.popitem(last=False)
            self._action(item)
