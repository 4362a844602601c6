"""How many look-ups a second attribution may spend: in all, and on one tenant.

Rules
1. Each tenant has a token bucket of its own, and all share one. A look-up takes a token of both.
2. The second half of the common bucket is for tenants that have hardly used their own: a few tenants that ask all the
   time never keep a quiet one waiting.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

PER_SECOND, BURST = 100, 256  # a look-up reads 64 files at worst, 0.9 ms
PER_SECOND_OF_A_TENANT, BURST_OF_A_TENANT = 20, 64
MAX_TENANTS = 4096  # that are remembered


@dataclass(slots=True)
class _Bucket:
    tokens: float
    per_second: float
    filled_at: float  # monotonic seconds

    def fill(self, burst: float, now: float) -> None:
        self.tokens = min(burst, self.tokens + self.per_second * max(0.0, now - self.filled_at))
        self.filled_at = now


class Budget:
    """Token buckets of tenants, and one of all."""

    def __init__(self) -> None:
        self._all = _Bucket(BURST, PER_SECOND, 0.0)
        self._tenants: OrderedDict[str, _Bucket] = OrderedDict()  # the one that asked last is the last

    def take(self, tenant: str, now: float) -> bool:
        """Whether there is a look-up left for a tenant; if so it is spent. ``now``: monotonic seconds."""
        self._all.fill(BURST, now)
        own = self._tenants.setdefault(tenant, _Bucket(BURST_OF_A_TENANT, PER_SECOND_OF_A_TENANT, now))
        own.fill(BURST_OF_A_TENANT, now)
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)
        needed = 1 if self._all.tokens >= BURST / 2 else BURST_OF_A_TENANT / 2
        if self._all.tokens < 1 or own.tokens < needed:
            return False
        self._all.tokens -= 1
        own.tokens -= 1
        return True
