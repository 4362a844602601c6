"""Read the usual response at once: a few answers, each with the name, type and class of the question, and at most OPT.

Most responses are like that, and reading one as any message (message.py) takes four times as long. What is unusual, or
too long to be read in a bounded time here, is read there.
"""

from __future__ import annotations

import struct
from array import array

from udpwatch.dns.cache_entry import Entry
from udpwatch.dns.message import AA, CD, HEADER_BYTES, OPT_BYTES, QR, RA, RD, TO_QUESTION

MAX_ANSWERS = 8

_header = struct.Struct("!5H")  # without the id
_ttl_and_length = struct.Struct("!IH")
_OPT_START = b"\0\0\x29"  # owner and type
#: Flags of a complete response without an error; AD is not passed on here.
_FLAGS = QR | AA | RD | RA | CD


def read_direct(data: bytes, question: bytes, now: float, ttls: tuple[int, int]) -> Entry | None:
    """Return the cache entry of a response to this question, or None if it is not a usual one.

    ``question``: with the name in lower case. ``ttls``: the lowest and the highest TTL that are kept; others are
    unusual. ``now``: monotonic seconds.
    """
    if not data.startswith(question, HEADER_BYTES):
        return None
    flags, questions, answers, authorities, additional = _header.unpack_from(data, 2)
    if flags & ~_FLAGS or not flags & QR or questions != 1 or authorities or additional > 1 or answers > MAX_ANSWERS:
        return None
    base = at = HEADER_BYTES + len(question)
    head, offsets, unpack = TO_QUESTION + question[-4:], array("H"), _ttl_and_length.unpack_from
    (low, high), size = ttls, len(data)
    lowest = high
    for _ in range(answers):
        if not data.startswith(head, at) or at + 12 > size:
            return None
        ttl, length = unpack(data, at + 6)
        if not low <= ttl <= high:
            return None
        if ttl < lowest:  # noqa: PLR1730  faster than min()
            lowest = ttl
        offsets.append(at + 6 - base)
        at += 12 + length
    if not answers or not _ends(data, at, bool(additional)):
        return None
    return Entry(0, data[base:at], (answers, 0, 0), offsets, now, now + lowest)


def _ends(data: bytes, at: int, has_opt: bool) -> bool:
    """Return whether a message ends at ``at``, or after an OPT record there that says nothing about the response."""
    if not has_opt:
        return at == len(data)
    if at + OPT_BYTES > len(data) or not data.startswith(_OPT_START, at) or data[at + 5]:  # bits of the response code
        return False
    return at + OPT_BYTES + (data[at + 9] << 8 | data[at + 10]) == len(data)
