"""The cache that every lookup uses: bounded in size and in time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class TtlCache(Generic[K, V]):
    """Keeps at most ``limit`` values for ``keep_seconds`` each; evicts the oldest first."""

    def __init__(self, limit: int, keep_seconds: float) -> None:
        self._limit, self._keep = limit, keep_seconds
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, now: float) -> V | None:
        """Return a value, or None if it is missing or expired. ``now``: monotonic seconds."""
        found = self._values.get(key)
        return found[1] if found and now < found[0] else None

    def put(self, key: K, value: V, now: float, keep_seconds: float | None = None) -> V:
        """Store and return a value; evict expired values."""
        self._values[key] = (now + (self._keep if keep_seconds is None else keep_seconds), value)
        self._values.move_to_end(key)
        while len(self._values) > self._limit or next(iter(self._values.values()))[0] <= now:
            self._values.popitem(last=False)
        return value
