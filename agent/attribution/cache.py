"""The one kind of memory that the lookups have: bounded, and forgetting."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """At most ``limit`` values, the oldest thrown out first, each kept for so many seconds."""

    def __init__(self, limit: int, keep_seconds: float) -> None:
        self._limit, self._keep = limit, keep_seconds
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, now: float) -> V | None:
        """What was put, None where nothing was or it is too old. ``now``: monotonic seconds."""
        found = self._values.get(key)
        return found[1] if found and now < found[0] else None

    def put(self, key: K, value: V, now: float, keep_seconds: float | None = None) -> V:
        """Remember a value, and forget what is too old; returns the value."""
        self._values[key] = (now + (self._keep if keep_seconds is None else keep_seconds), value)
        self._values.move_to_end(key)
        while len(self._values) > self._limit or next(iter(self._values.values()))[0] <= now:
            self._values.popitem(last=False)
        return value
