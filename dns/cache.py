"""Responses of upstream servers, bounded in number and in bytes.

Rules
1. A response is kept packed: its code, its records, and the offsets of their TTLs in two octets each. A hit copies it
   and counts the TTLs down; nothing is parsed. Its lifetime depends on the records that answer its question, including
   aliases: other records in it are forwarded with it, but never answer another question.
2. Two queues (segmented LRU): a response enters the first and moves to the second when it is asked for again. The
   oldest of the first is evicted. A flood of names that are asked once, negative or not, evicts only its own entries.
3. Expired responses stay while there is room: they are served when every upstream server is down (RFC 8767).
4. Every method takes the lock: the UDP thread looks up, the event loop's thread adds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from udpwatch.dns.cache_entry import Entry, Key
from udpwatch.dns.message import Rcode

MAX_BYTES = 32 << 20
PROTECTED_SHARE = 0.8
STALE_RETRY_SECONDS = 5.0  # how long a stale response is served before the servers are queried again


@dataclass(slots=True)
class CacheCounts:
    """For metrics and `*.bind`."""

    hits: int = 0
    misses: int = 0
    insertions: int = 0
    evictions: int = 0
    stale: int = 0


class Cache:
    """Responses by question."""

    def __init__(self, max_entries: int, stale_seconds: float, max_bytes: int = MAX_BYTES) -> None:
        """``max_entries`` 0: cache nothing."""
        self._max_entries, self._max_bytes, self._stale = max_entries, max_bytes, stale_seconds
        self._first: OrderedDict[Key, Entry] = OrderedDict()
        self._second: OrderedDict[Key, Entry] = OrderedDict()
        self._bytes = self._second_bytes = 0
        self._lock = threading.Lock()
        self.counts = CacheCounts()

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @property
    def max_entries(self) -> int:
        """The maximum number of entries."""
        return self._max_entries

    @property
    def bytes(self) -> int:
        """Approximate memory of all entries."""
        return self._bytes

    def get(self, key: Key, now: float) -> Entry | None:
        """Return a fresh entry, or a stale one that is being served. Count a hit or a miss."""
        with self._lock:
            entry = self._peek(key)
            if entry is None or (now >= entry.expires and now >= entry.retry):
                self.counts.misses += 1
                return None
            self.counts.hits += 1
            if now >= entry.expires:
                self.counts.stale += 1
            self._promote(key, entry)
            return entry

    def get_stale(self, key: Key, now: float) -> Entry | None:
        """Return an expired entry because no server responds. For a while, `get` returns it, too."""
        with self._lock:
            entry = self._peek(key)
            if entry is None or entry.rcode == Rcode.SERVFAIL or now >= entry.expires + self._stale:
                return None
            entry.retry = now + STALE_RETRY_SECONDS
            self.counts.stale += 1
            return entry

    def put(self, key: Key, entry: Entry) -> None:
        """Add an entry and evict others if necessary."""
        size = entry.size
        if not self._max_entries or size > self._max_bytes // 8:
            return
        with self._lock:
            self.counts.insertions += 1
            if key in self._second:
                more = size - self._second[key].size
                self._second_bytes += more
                self._bytes += more
                self._second[key] = entry
            else:
                if (old := self._first.pop(key, None)) is not None:
                    self._bytes -= old.size
                self._first[key] = entry
                self._bytes += size
            while len(self._first) + len(self._second) > self._max_entries or self._bytes > self._max_bytes:
                self._evict()

    def clear(self) -> None:
        """Remove all entries (SIGHUP)."""
        with self._lock:
            self._first.clear()
            self._second.clear()
            self._bytes = self._second_bytes = 0

    def keys(self, most: int) -> list[Key]:
        """Return up to ``most`` keys, oldest first."""
        with self._lock:
            return list(islice((*self._first, *self._second), most))

    def _peek(self, key: Key) -> Entry | None:
        return self._second.get(key) or self._first.get(key)

    def _promote(self, key: Key, entry: Entry) -> None:
        if key in self._second:
            self._second.move_to_end(key)
            return
        del self._first[key]
        self._second[key] = entry
        self._second_bytes += entry.size
        while (
            len(self._second) > PROTECTED_SHARE * self._max_entries
            or self._second_bytes > PROTECTED_SHARE * self._max_bytes
        ):
            oldest, demoted = self._second.popitem(last=False)
            self._second_bytes -= demoted.size
            self._first[oldest] = demoted

    def _evict(self) -> None:
        if self._first:
            _, gone = self._first.popitem(last=False)
        else:
            _, gone = self._second.popitem(last=False)
            self._second_bytes -= gone.size
        self._bytes -= gone.size
        self.counts.evictions += 1
