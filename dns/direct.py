"""Read usual responses at once, without the general parser (message.py), which takes three times as long.

Usual are
- a few answers: maybe aliases, each for the one before, then records of the question's type and class for the last one;
- no answer, NXDOMAIN or not, and the SOA record of a domain above the name;
and after them at most an OPT record. Aliases must be written as servers do: the owner of each record is a pointer to
the question's name or to the alias before. What is unusual, or too long for a bounded time here, is left to the parser,
which comes to the same result for the rest (a test compares them).
"""

from __future__ import annotations

import struct
from array import array

from udpwatch.dns.cache_entry import MAX_NEGATIVE_TTL, SOA_BYTES, Entry
from udpwatch.dns.message import (
    AA,
    CD,
    HEADER_BYTES,
    OPT_BYTES,
    QR,
    RA,
    RD,
    TO_QUESTION,
    Malformed,
    Rcode,
    Steps,
    read_name,
    skip_name,
)
from udpwatch.dns.names import is_subdomain, lower

MAX_ANSWERS = 16
_MAX_OFFSET = 0x3FFF  # of a pointer

_header = struct.Struct("!5H")  # without the id
_ttl_and_length = struct.Struct("!IH")
_number = struct.Struct("!I")
_OPT_START = b"\0\0\x29"  # owner and type
_CNAME, _SOA = b"\0\x05", b"\0\x06"
_NXDOMAIN = int(Rcode.NXDOMAIN)
#: Flags of a complete response without an error; AD is not passed on here.
_FLAGS = QR | AA | RD | RA | CD


def read_direct(data: bytes, question: bytes, now: float, ttls: tuple[int, int]) -> Entry | None:
    """Return the cache entry of a response to this question, or None if it is not a usual one.

    ``question``: as sent; a response with it in another case is unusual. ``ttls``: the lowest and the highest TTL that
    are kept; others are unusual. ``now``: monotonic seconds.
    """
    if not data.startswith(question, HEADER_BYTES):
        return None
    flags, questions, answers, authorities, additional = _header.unpack_from(data, 2)
    if flags & QR and questions == 1 and additional <= 1:
        if answers and not authorities and not flags & ~_FLAGS:
            return _read_answers(data, question, answers, bool(additional), now, ttls)
        if not answers and authorities == 1 and flags & ~_FLAGS in (0, _NXDOMAIN):
            return _read_denial(data, question, bool(additional), now, ttls)
    return None


def _read_answers(
    data: bytes, question: bytes, answers: int, has_opt: bool, now: float, ttls: tuple[int, int]
) -> Entry | None:
    if answers > MAX_ANSWERS:
        return None
    base = at = HEADER_BYTES + len(question)
    owner, kind, klass = TO_QUESTION, question[-4:-2], question[-2:]
    wanted, alias = owner + kind + klass, owner + _CNAME + klass
    offsets, unpack, found, (low, high), size = array("H"), _ttl_and_length.unpack_from, False, ttls, len(data)
    lowest = high
    for _ in range(answers):
        is_alias = not found and data.startswith(alias, at) and kind != _CNAME
        if not (is_alias or data.startswith(wanted, at)) or at + 12 > size:
            return None
        found = not is_alias
        ttl, length = unpack(data, at + 6)
        if not low <= ttl <= high:
            return None
        if ttl < lowest:  # noqa: PLR1730  faster than min()
            lowest = ttl
        offsets.append(at + 6 - base)
        if is_alias:
            if at + 12 > _MAX_OFFSET or not _is_name(data, at + 12, length):
                return None
            owner = (0xC000 | at + 12).to_bytes(2, "big")
            wanted, alias = owner + kind + klass, owner + _CNAME + klass
        at += 12 + length
    if not found or not _ends(data, at, has_opt):
        return None
    return Entry(0, data[base:at], (answers, 0, 0), offsets, now, now + lowest)


def _is_name(data: bytes, at: int, length: int) -> bool:
    """Return whether RDATA is a name."""
    try:
        steps = Steps(length)
        return skip_name(data, at, steps) == at + length and bool(read_name(data, at, steps))
    except Malformed:
        return False


def _read_denial(data: bytes, question: bytes, has_opt: bool, now: float, ttls: tuple[int, int]) -> Entry | None:
    base, steps = HEADER_BYTES + len(question), Steps(len(data))
    try:
        at = skip_name(data, base, steps)
        domain = lower(read_name(data, base, steps))
    except Malformed:
        return None
    if at + 10 > len(data) or data[at : at + 4] != _SOA + question[-2:] or not is_subdomain(question[:-4], domain):
        return None
    ttl, length = _ttl_and_length.unpack_from(data, at + 4)
    end = at + 10 + length
    if length < SOA_BYTES or not _ends(data, end, has_opt):
        return None
    (minimum,), (low, high) = _number.unpack_from(data, end - 4), ttls
    lifetime = min(ttl, minimum, MAX_NEGATIVE_TTL)
    if not low <= ttl <= high or not low <= lifetime <= high or minimum >> 31:
        return None
    return Entry(data[3] & 0xF, data[base:end], (0, 1, 0), array("H", (at + 4 - base,)), now, now + lifetime)


def _ends(data: bytes, at: int, has_opt: bool) -> bool:
    """Return whether a message ends at ``at``, or after an OPT record there that says nothing about the response."""
    if not has_opt:
        return at == len(data)
    if at + OPT_BYTES > len(data) or not data.startswith(_OPT_START, at) or data[at + 5]:  # bits of the response code
        return False
    return at + OPT_BYTES + (data[at + 9] << 8 | data[at + 10]) == len(data)
