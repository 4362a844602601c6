"""Answers of upstream servers, as they came, bounded in number and in bytes.

Rules
1. An answer is kept packed: its code, its records, and where their TTLs stand, in two octets each. A hit copies it and
   counts the TTLs down; nothing is taken apart. How long it is kept is decided by the records that answer its question,
   by way of its aliases: what else a server writes into it is passed on with it, and is never the answer to another.
2. Two queues (segmented LRU): an answer enters the first, and moves to the second when it is asked for again. What has
   to go is the oldest of the first. A flood of names that are asked once, negative or not, pushes out only its like.
3. Expired answers stay while there is room: they stand in when every upstream server is down (RFC 8767).
4. Every method takes the lock: the UDP thread looks up, the loop's thread adds.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from udpwatch.dns.wire import HEADER_BYTES, Answer, Malformed, Rcode, Type, is_below, owner, rdata_name

MAX_BYTES = 32 << 20
ENTRY_BYTES = 600  # of Python's objects around an answer
PROTECTED_SHARE = 0.8
MAX_TTL = 86_400  # RFC 8767, section 4, advises a cap of days; one is enough for a node
MAX_NEGATIVE_TTL = 10_800  # RFC 2308, section 5
FAILURE_SECONDS = 5  # RFC 9520, section 3.2: between 1 s and 5 min
STALE_TTL = 30  # RFC 8767, section 5.2
STALE_RETRY_SECONDS = 5.0  # how long a stale answer stands in before the servers are tried again

SOA_BYTES = 22  # two names, five numbers (RFC 1035, section 3.3.13)

_ttl = struct.Struct("!I")
_type_and_class = struct.Struct("!HH")

Key = tuple[bytes, int, int, int]


@dataclass(slots=True)
class Entry:
    """An answer: everything behind the question, without OPT."""

    rcode: int
    body: bytes
    counts: tuple[int, int, int]
    ttls: array[int]  # where they stand in body; as stored none is above MAX_TTL
    stored: float  # monotonic seconds
    expires: float
    max_ttl: int = MAX_TTL  # seconds that a client is told at most
    retry: float = 0.0  # while it stands in although it expired: not before this time is a server asked again

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return ENTRY_BYTES + len(self.body) + 2 * len(self.ttls)

    def aged(self, now: float, stale: bool) -> bytes:
        """The records with their TTLs as of now; with STALE_TTL where it stands in."""
        passed, most = int(now - self.stored), self.max_ttl
        if not self.ttls or (passed == 0 and most == MAX_TTL and not stale):
            return self.body
        body, stale_ttl = bytearray(self.body), min(STALE_TTL, most)
        for offset in self.ttls:
            if stale:
                ttl = stale_ttl
            else:
                (kept,) = _ttl.unpack_from(body, offset)
                ttl = min(max(kept - passed, 0), most)
            _ttl.pack_into(body, offset, ttl)
        return bytes(body)


@dataclass(slots=True)
class Statistics:
    """For metrics and `*.bind`."""

    hits: int = 0
    misses: int = 0
    insertions: int = 0
    evictions: int = 0
    stale: int = 0


class Cache:
    """Answers by what was asked."""

    def __init__(self, max_entries: int, stale_seconds: float, max_bytes: int = MAX_BYTES) -> None:
        """``max_entries`` 0: nothing is kept."""
        self._max_entries, self._max_bytes, self._stale = max_entries, max_bytes, stale_seconds
        self._first: OrderedDict[Key, Entry] = OrderedDict()
        self._second: OrderedDict[Key, Entry] = OrderedDict()
        self._bytes = self._second_bytes = 0
        self._lock = threading.Lock()
        self.statistics = Statistics()

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @property
    def max_entries(self) -> int:
        """How many there may be."""
        return self._max_entries

    @property
    def bytes(self) -> int:
        """What all entries take, about."""
        return self._bytes

    def get(self, key: Key, now: float) -> Entry | None:
        """An answer that may be given now: a fresh one, or one that stands in; counts hit or miss."""
        with self._lock:
            entry = self._peek(key)
            if entry is None or (now >= entry.expires and now >= entry.retry):
                self.statistics.misses += 1
                return None
            self.statistics.hits += 1
            if now >= entry.expires:
                self.statistics.stale += 1
            self._promote(key, entry)
            return entry

    def stand_in(self, key: Key, now: float) -> Entry | None:
        """An expired answer, since no server gives a new one; from now on it is a hit, for a while."""
        with self._lock:
            entry = self._peek(key)
            if entry is None or entry.rcode == Rcode.SERVFAIL or now >= entry.expires + self._stale:
                return None
            entry.retry = now + STALE_RETRY_SECONDS
            self.statistics.stale += 1
            return entry

    def put(self, key: Key, entry: Entry) -> None:
        """Keep an answer; what it displaces goes."""
        if not self._max_entries or entry.size > self._max_bytes // 8:
            return
        with self._lock:
            self.statistics.insertions += 1
            if key in self._second:
                self._second_bytes += entry.size - self._second[key].size
                self._bytes += entry.size - self._second[key].size
                self._second[key] = entry
            else:
                if (old := self._first.pop(key, None)) is not None:
                    self._bytes -= old.size
                self._first[key] = entry
                self._bytes += entry.size
            while len(self) > self._max_entries or self._bytes > self._max_bytes:
                self._evict()

    def clear(self) -> None:
        """Forget everything (SIGHUP)."""
        with self._lock:
            self._first.clear()
            self._second.clear()
            self._bytes = self._second_bytes = 0

    def keys(self, most: int) -> list[Key]:
        """Some of what is kept, oldest first."""
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
        self.statistics.evictions += 1


def entry_of(answer: Answer, now: float, neg_ttl: int, max_ttl: int, negcache: bool) -> Entry:
    """What to keep of an answer. It expires at once where it must not be kept.

    Positive: the smallest TTL of the records that answer the question, aliases included. NXDOMAIN and NODATA: besides,
    the SOA's TTL or its MINIMUM, whichever is smaller (RFC 2308, section 5), else ``neg_ttl``. ``max_ttl`` is for
    clients alone (0: no limit): what is kept for less than it is good for costs a server more questions.
    """
    start = len(answer.question) + HEADER_BYTES
    ttls = answer.records.ttl_offsets(start)
    entry = Entry(
        rcode=answer.rcode,
        body=_limited(answer.message[start : answer.body_end], ttls),
        counts=answer.counts,
        ttls=ttls,
        stored=now,
        expires=now,
        max_ttl=min(max_ttl or MAX_TTL, MAX_TTL),
    )
    if answer.truncated or answer.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return entry
    try:
        aliases, last, found = follow(answer)
        lifetimes = [_seconds(_ttl.unpack_from(answer.message, end + 4)[0]) for end in (*aliases, *found)]
        if answer.rcode == Rcode.NXDOMAIN or not found:
            lifetimes.append(_negative_ttl(answer, last, neg_ttl) if negcache else 0)
    except Malformed:  # its names cannot be read, as names must be, or lead nowhere
        return entry
    entry.expires = now + min(MAX_TTL, *lifetimes)
    return entry


def _limited(body: bytes, ttls: array[int]) -> bytes:
    """The records, no TTL of theirs above MAX_TTL; the same object in the usual case."""
    unpack = _ttl.unpack_from
    high = [offset for offset in ttls if unpack(body, offset)[0] > MAX_TTL]
    if not high:
        return body
    changed = bytearray(body)
    for offset in high:
        _ttl.pack_into(changed, offset, min(_seconds(unpack(body, offset)[0]), MAX_TTL))
    return bytes(changed)


def _seconds(ttl: int) -> int:
    """A TTL with its top bit set is 0 (RFC 2181, section 8)."""
    return 0 if ttl >> 31 else ttl


class Circle(Malformed):
    """Aliases that lead back to one another: they can be read, and passed on, but answer nothing that could be kept."""

    def __init__(self) -> None:
        super().__init__("record")


def follow(answer: Answer) -> tuple[list[int], bytes, list[int]]:
    """The aliases from the question's name on, the name that they lead to, and its records of the question's type;
    each as the offset where its owner ends.

    There may be as many aliases as the message holds, and the budget for its names. Raises Malformed, and Circle.
    """
    message, named = answer.message, dict[bytes, list[int]]()
    written: dict[bytes, bytes] = {}  # the same octets, most often a pointer, are the same name: it is read once
    for start, owner_end in answer.records.spans(1):
        if _type_and_class.unpack_from(message, owner_end)[1] == answer.klass:
            octets = message[start:owner_end]
            if octets not in written:
                written[octets] = owner(answer, start)
            named.setdefault(written[octets], []).append(owner_end)
    aliases: list[int] = []
    seen: set[bytes] = set()
    name = answer.name
    while name not in seen:
        seen.add(name)
        ends, alias = named.get(name, []), None
        types = [_type_and_class.unpack_from(message, end)[0] for end in ends]
        found = [end for end, kind in zip(ends, types, strict=True) if answer.type in (kind, Type.ANY)]
        if not found and Type.CNAME in types:
            alias = ends[types.index(Type.CNAME)]
        if alias is None:
            return aliases, name, found
        aliases.append(alias)
        name = rdata_name(answer, alias)
    raise Circle


def _negative_ttl(answer: Answer, name: bytes, neg_ttl: int) -> int:
    for record in answer.records.of(2):
        if (
            record.type == Type.SOA
            and record.end - record.data >= SOA_BYTES
            and is_below(name, owner(answer, record.start))
        ):
            minimum: int = _ttl.unpack_from(answer.message, record.end - 4)[0]
            return min(_seconds(record.ttl), _seconds(minimum), MAX_NEGATIVE_TTL)
    return neg_ttl


def failure(now: float, seconds: float = FAILURE_SECONDS) -> Entry:
    """SERVFAIL, kept briefly so that a broken name is not looked for by everybody at once (RFC 9520)."""
    return Entry(Rcode.SERVFAIL, b"", (0, 0, 0), array("H"), now, now + seconds)
