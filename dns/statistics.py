"""Counters in dnsmasq's words: for SIGUSR1, and for the CHAOS names in `bind.`"""

from __future__ import annotations

from collections import Counter

from udpwatch.dns.cache import Cache
from udpwatch.dns.metrics import Metrics


class Statistics:
    """Reads the counters of a responder."""

    def __init__(self, metrics: Metrics, cache: Cache) -> None:
        self._metrics, self._cache = metrics, cache

    def lines(self) -> list[str]:
        """Return dnsmasq's lines of SIGUSR1."""
        counts, (local, sent) = self._cache.counts, self.totals()
        lines = [
            f"cache size {self._cache.max_entries}, {counts.evictions}/{counts.insertions} cache insertions re-used "
            "unexpired cache entries.",
            f"queries forwarded {sent}, queries answered locally {local}",
        ]
        for text in self.servers():
            server, asked, failed = text.split()
            lines.append(f"server {server}: queries sent {asked}, retried or failed {failed}")
        return lines

    def totals(self) -> tuple[int, int]:
        """Return the numbers of queries answered locally and forwarded, as dnsmasq counts hits and misses."""
        found = [0, 0]
        for (*_, source), cell in list(self._metrics.answered.items()):
            found[source == "forward"] += cell[0]
        return found[0], found[1]

    def servers(self) -> list[str]:
        """Return "ADDRESS#PORT queries failures" for each server."""
        failed: Counter[str] = Counter()
        for (server, _), cell in list(self._metrics.upstream_failed.items()):
            failed[server] += cell[0]
        return [f"{server} {cell[0]} {failed[server]}" for server, cell in list(self._metrics.upstream_asked.items())]
