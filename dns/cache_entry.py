"""What the cache keeps of a response, and for how long."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass

from udpwatch.dns.cname import follow
from udpwatch.dns.message import AD, HEADER_BYTES, Malformed, Rcode, Response, Type, owner
from udpwatch.dns.names import is_subdomain
from udpwatch.dns.records import Run, numbers_of, put_numbers

ENTRY_BYTES = 600  # of Python objects per entry
MAX_TTL = 86_400  # RFC 8767, section 4, advises a cap of days; one is enough for a node
MAX_NEGATIVE_TTL = 10_800  # RFC 2308, section 5
FAILURE_SECONDS = 5  # RFC 9520, section 3.2: between 1 s and 5 min
STALE_TTL = 30  # RFC 8767, section 5.2
SOA_BYTES = 22  # two names, five numbers (RFC 1035, section 3.3.13)

MAX_SOA = 8  # records in the authority section that are looked at; a real response has one

_ttl = struct.Struct("!I")
_fixed = struct.Struct("!HHIH")  # of a record, after its name

#: Name, type, class, and the flags that change a response. If the response depends on the EDNS options of the query,
#: these, too; then it is not cached.
Key = tuple[bytes, int, int, int] | tuple[bytes, int, int, int, bytes]


@dataclass(slots=True)
class Entry:
    """A response: everything after the question, without OPT."""

    rcode: int
    body: bytes
    counts: tuple[int, int, int]
    ttls: array[int]  # offsets in body; no stored TTL is above MAX_TTL
    stored: float  # monotonic seconds
    expires: float
    max_ttl: int = MAX_TTL  # seconds; the largest TTL that a client sees
    flags: int = 0  # AD, if it is passed on
    retry: float = 0.0  # while it is served stale: the servers are not queried again before this time

    @property
    def size(self) -> int:
        """Approximate memory, in bytes."""
        return ENTRY_BYTES + len(self.body) + 2 * len(self.ttls)

    def aged(self, now: float, stale: bool, records: int | None = None) -> bytes:
        """Return the first ``records`` records (None: all) with their TTLs as of now, or STALE_TTL if ``stale``."""
        passed, most = int(now - self.stored), self.max_ttl
        kept_body = self.body if records is None else self.body[: self.end_of(records)]
        if not self.ttls or (passed == 0 and most == MAX_TTL and not stale):
            return kept_body
        body, stale_ttl = bytearray(kept_body), min(STALE_TTL, most)
        for offset in self.ttls if records is None else self.ttls[:records]:
            if stale:
                ttl = stale_ttl
            else:
                (kept,) = _ttl.unpack_from(body, offset)
                ttl = min(max(kept - passed, 0), most)
            _ttl.pack_into(body, offset, ttl)
        return bytes(body)

    def end_of(self, records: int) -> int:
        """Return the offset in body after the first ``records`` records."""
        if not records:
            return 0
        at = self.ttls[records - 1] + 4  # RDLENGTH and RDATA follow the TTL
        return at + 2 + int.from_bytes(self.body[at : at + 2], "big")

    def fitting(self, room: int) -> int:
        """Return how many records fit into ``room`` octets."""
        return bisect_right(range(len(self.ttls)), room, key=lambda index: self.end_of(index + 1))


def entry_of(
    answer: Response,
    now: float,
    neg_ttl: int,
    max_ttl: int,
    negcache: bool,
    proxy_dnssec: bool = False,
    cache_ttl: tuple[int, int] = (0, MAX_TTL),
) -> Entry:
    """Create the entry of a response. It expires at once if it must not be cached.

    Positive responses live as long as the smallest TTL of the records that answer the question, including aliases.
    NXDOMAIN and NODATA also have the SOA's TTL or MINIMUM, whichever is smaller (RFC 2308, section 5), else
    ``neg_ttl``. ``max_ttl`` (0: no limit) applies to clients only: caching for less would cost more upstream queries.
    ``proxy_dnssec``: keep the server's AD. ``cache_ttl``: the smallest and the largest TTL that are kept.
    """
    start, (low, high) = len(answer.question) + HEADER_BYTES, cache_ttl
    ttls = answer.records.ttl_offsets(start)
    entry = Entry(
        rcode=answer.rcode,
        body=_limited(answer, start, low, high),
        counts=answer.counts,
        ttls=ttls,
        stored=now,
        expires=now,
        max_ttl=min(max_ttl or MAX_TTL, MAX_TTL),
        flags=answer.flags & AD if proxy_dnssec else 0,
    )
    if answer.truncated or answer.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return entry
    try:
        aliases, last, found = follow(answer)
        lifetimes = [_seconds(_ttl.unpack_from(answer.message, end + 4)[0]) for end in aliases]
        lifetimes += [_lifetime(answer.message, run) for run in found]
        if answer.rcode == Rcode.NXDOMAIN or not found:
            lifetimes.append(_negative_ttl(answer, last, neg_ttl) if negcache else 0)
    except Malformed:  # its names are invalid or form a loop
        return entry
    lifetime = min(lifetimes)
    if lifetime or (found and answer.rcode == Rcode.NOERROR):  # a negative response without a lifetime is not cached
        entry.expires = now + min(max(lifetime, low), high)
    return entry


def _lifetime(message: bytes, run: Run) -> int:
    """Return the smallest TTL of a run, in seconds."""
    _, owner_end, size, count = run
    if count == 1:
        return _seconds(_ttl.unpack_from(message, owner_end + 4)[0])
    ttls = numbers_of(message, owner_end + 4, size, count)
    return 0 if max(ttls) >> 31 else min(ttls)


def _limited(answer: Response, start: int, low: int, high: int) -> bytes:
    """Return the records from ``start`` on with no TTL below or above these limits."""
    message, unpack = answer.message, _ttl.unpack_from
    body = message[start : answer.body_end]
    changed: bytearray | None = None
    for _, owner_end, size, count in answer.records.runs():
        if count == 1:
            (ttl,) = unpack(message, owner_end + 4)
            if not low <= ttl <= high:
                changed = changed or bytearray(body)
                _ttl.pack_into(changed, owner_end + 4 - start, min(max(_seconds(ttl), low), high))
            continue
        ttls = numbers_of(message, owner_end + 4, size, count)
        if not (low <= min(ttls) and max(ttls) <= high):
            changed = changed or bytearray(body)
            limited = [min(max(_seconds(ttl), low), high) for ttl in ttls]
            put_numbers(changed, owner_end + 4 - start, size, count, limited)
    return body if changed is None else bytes(changed)


def without(entry: Entry, types: Collection[int]) -> None:
    """Cut the records of an entry before the first one of these types.

    Later records may refer to names in earlier ones, so that a record in the middle cannot be removed; aliases come
    before what they lead to.
    """
    for index, offset in enumerate(entry.ttls):
        if int.from_bytes(entry.body[offset - 4 : offset - 2], "big") in types:
            cut(entry, index)
            return


def cut(entry: Entry, records: int) -> None:
    """Keep the first records only. AD no longer holds."""
    entry.body, entry.ttls = entry.body[: entry.end_of(records)], entry.ttls[:records]
    entry.counts, entry.flags = first_counts(entry.counts, records), 0


def first_counts(counts: tuple[int, int, int], records: int) -> tuple[int, int, int]:
    """Return the number of records in each section if only the first ``records`` stay."""
    answers = min(counts[0], records)
    authorities = min(counts[1], records - answers)
    return answers, authorities, min(counts[2], records - answers - authorities)


def _seconds(ttl: int) -> int:
    """Return a TTL, or 0 if its top bit is set (RFC 2181, section 8)."""
    return 0 if ttl >> 31 else ttl


def _negative_ttl(answer: Response, name: bytes, neg_ttl: int) -> int:
    message, left = answer.message, MAX_SOA
    for start, owner_end, _, _ in answer.records.runs(2):
        kind, _, ttl, length = _fixed.unpack_from(message, owner_end)
        if kind != Type.SOA or length < SOA_BYTES or not left:
            continue
        left -= 1
        if is_subdomain(name, owner(answer, start)):
            minimum: int = _ttl.unpack_from(message, owner_end + 6 + length)[0]
            return min(_seconds(ttl), _seconds(minimum), MAX_NEGATIVE_TTL)
    return neg_ttl


def failure(now: float, seconds: float = FAILURE_SECONDS) -> Entry:
    """Create a SERVFAIL entry, cached briefly so that clients do not all retry a broken name at once (RFC 9520)."""
    return Entry(Rcode.SERVFAIL, b"", (0, 0, 0), array("H"), now, now + seconds)
