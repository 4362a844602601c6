"""Limit the lookups of attribution per second, in total and per tenant.

Rules
1. Each tenant has a token bucket, and all tenants share another one. A lookup takes one token from both.
2. When the shared bucket is less than half full, only tenants whose own bucket is at least half full may take from it.
   A few busy tenants therefore never delay a quiet one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

PER_SECOND, BURST = 100, 256  # one lookup reads at most 64 files, which takes 0.9 ms
PER_SECOND_OF_A_TENANT, BURST_OF_A_TENANT = 20, 64
MAX_TENANTS = 4096


@dataclass(slots=True)
class _Bucket:
    tokens: float
    per_second: float
    filled_at: float  # monotonic seconds

    def fill(self, burst: float, now: float) -> None:
        self.tokens = min(burst, self.tokens + self.per_second * max(0.0, now - self.filled_at))
        self.filled_at = now


class Budget:
    """Token buckets: one per tenant and one shared by all."""

    def __init__(self) -> None:
        self._all = _Bucket(BURST, PER_SECOND, 0.0)
        self._tenants: OrderedDict[str, _Bucket] = OrderedDict()  # least recently used first

    def take(self, tenant: str, now: float) -> bool:
        """Take one lookup for a tenant; return False if its budget is used up. ``now``: monotonic seconds."""
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


class Unlimited(Budget):
    """For a command that looks up each process once, and ends."""

    def take(self, tenant: str, now: float) -> bool:
        """Return True."""
        return True
