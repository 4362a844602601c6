"""DNS messages as bytes. All untrusted bytes are parsed here, and nowhere else.

Rules
1. Parsing raises nothing but Malformed, whatever the bytes are.
2. Time is linear in the message's size: finding its parts takes at most one step per octet, and decompressing names has
   a budget for the whole message. `Steps` counts, and a test limits it.
3. Names are kept in wire format, uncompressed, in lower case for lookups (RFC 4343). A label may hold any octet
   (RFC 2181, section 11).
4. A received message is forwarded as it is; only its id, flags, TTLs and OPT record change.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from udpwatch.dns.names import MAX_LABEL_BYTES, MAX_NAME_BYTES, lower
from udpwatch.dns.records import MAX_RUN_OWNER_BYTES, MIN_RUN, Records, count_alike

HEADER_BYTES = 12  # RFC 1035, section 4.1.1
NAME_STEPS_PER_OCTET = 4  # of a message, for all its names; a real message takes about 1
MAX_NAME_STEPS = 4096  # less than a millisecond; a name takes at most 128 without pointers
MAX_RECORDS = 5000  # of a response; 65,535 octets hold 4,094 addresses (a large headless Service)
MAX_SINGLES = 1400  # records of a response that are in no run; a large Service has 700 SRV and A records each
MAX_SKIP_STEPS = 4000  # to find the ends of the owners of a response's records
MAX_RUN_TRIES = 4  # to find records alike in a response; it is wasted where there are few of them
MAX_MESSAGE_BYTES = 65_535  # of a response; over TCP its length has two octets (RFC 1035, section 4.2.2)
MAX_ADDITIONAL = 64  # records of a query; a real query has OPT and a signature
OPT_BYTES = 11  # without options (RFC 6891, section 6.1.2)
MIN_UDP_BYTES = 512  # RFC 1035, section 4.2.1
POINTER = 0xC0
TO_QUESTION = b"\xc0\x0c"  # a pointer to the question's name, which follows the header


class Type(IntEnum):
    """Record types that the responder treats specially."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    NAPTR = 35
    OPT = 41
    SVCB = 64
    HTTPS = 65
    CAA = 257
    TKEY = 249
    TSIG = 250
    IXFR = 251
    AXFR = 252
    MAILB = 253
    MAILA = 254
    ANY = 255


class Class(IntEnum):
    """Supported classes."""

    IN = 1
    CH = 3


class Rcode(IntEnum):
    """RFC 1035, section 4.1.1; BADVERS: RFC 6891, section 6.1.3."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


# Header flags.
QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE_MASK, RCODE_MASK = 0x7800, 0x000F
DO = 0x8000  # of OPT's TTL field

_header = struct.Struct("!6H")
_fixed = struct.Struct("!HHIH")  # of a record, after its name
_question_end = struct.Struct("!HH")


class Malformed(Exception):
    """Bytes that are not a valid message. ``reason`` is one of REASONS: it becomes a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


#: All values of `Malformed.reason`; metrics show each from the start.
REASONS = ("short", "response", "question", "name", "record", "opt", "sections")


class Steps:
    """The cost of parsing one message: steps taken (labels and options), jumps, and steps left for its names."""

    __slots__ = ("jumps", "left", "taken")

    def __init__(self, size: int) -> None:
        """``size``: octets of the message."""
        self.taken = self.jumps = 0
        self.left = min(NAME_STEPS_PER_OCTET * size, MAX_NAME_STEPS)


# ---- names ----


def skip_name(data: bytes, at: int, steps: Steps, compressed: bool = True) -> int:
    """Return the offset after the name at ``at``, without following pointers.

    Raises Malformed, also for a pointer if the name must not be ``compressed``, and for one that does not point back or
    that points into the header, whose id differs for the next client.
    """
    start, taken = at, 1
    try:
        while length := data[at]:
            if length >= POINTER:
                if not compressed or not HEADER_BYTES <= (length & 0x3F) << 8 | data[at + 1] < start:
                    raise Malformed("name")
                at += 1
                break
            at += 1 + length
            taken += 1
            if length > MAX_LABEL_BYTES or at - start >= MAX_NAME_BYTES:  # the root label is still to come
                raise Malformed("name")
    except IndexError:
        raise Malformed("name") from None
    steps.taken += taken
    return at + 1


def read_name(data: bytes, at: int, steps: Steps) -> bytes:
    """Return the name at ``at``, uncompressed, case unchanged. Raises Malformed.

    A pointer must point before the part that it ends (RFC 1035, section 4.1.4: "a prior occurrence"), so that every
    chain ends; the cost of all names of a message together is limited.
    """
    parts, size, limit = [], 1, at
    try:
        while True:
            length = data[at]
            steps.taken += 1
            steps.left -= 1
            if steps.left < 0:
                raise Malformed("name")
            if length == 0:
                parts.append(b"\0")
                return b"".join(parts)
            if length >= POINTER:
                target = (length & 0x3F) << 8 | data[at + 1]
                steps.jumps += 1
                if not HEADER_BYTES <= target < limit:
                    raise Malformed("name")
                at = limit = target
                continue
            size += 1 + length
            if length > MAX_LABEL_BYTES or size > MAX_NAME_BYTES:
                raise Malformed("name")
            label = data[at : at + 1 + length]
            if len(label) <= length:
                raise Malformed("name")
            parts.append(label)
            at += 1 + length
    except IndexError:
        raise Malformed("name") from None


# ---- queries ----


@dataclass(slots=True)  # not frozen: that takes three times as long to create
class Edns:
    """The OPT record of a query (RFC 6891)."""

    udp_bytes: int  # the client's value; less than 512 counts as 512
    version: int
    dnssec_ok: bool


@dataclass(slots=True)  # not frozen: that takes three times as long to create
class Query:
    """A query that can be answered or refused."""

    id: int
    flags: int
    question: bytes  # name, type and class as received
    name: bytes  # in lower case
    type: int
    klass: int
    edns: Edns | None
    signed: bool = False  # it has a TSIG (RFC 8945)

    @property
    def opcode(self) -> int:
        """0 for a standard query."""
        return (self.flags & OPCODE_MASK) >> 11

    @property
    def dnssec_ok(self) -> bool:
        """Whether the client asks for DNSSEC records."""
        return bool(self.edns and self.edns.dnssec_ok)

    @property
    def understands_ad(self) -> bool:
        """Whether AD means something to the client (RFC 6840, section 5.8)."""
        return bool(self.flags & AD) or self.dnssec_ok

    @property
    def recursion_desired(self) -> bool:
        """Whether upstream servers may be queried."""
        return bool(self.flags & RD)

    @property
    def key(self) -> tuple[bytes, int, int, int]:
        """The cache key: name, type, class, and the flags that change a response (DO and CD)."""
        wants = (self.flags & CD) | (DO if self.dnssec_ok else 0)
        return self.name, self.type, self.klass, wants

    def udp_bytes(self, most: int) -> int:
        """Return the longest response that fits over UDP."""
        return min(max(self.edns.udp_bytes, MIN_UDP_BYTES), most) if self.edns else MIN_UDP_BYTES


def parse_query(data: bytes, steps: Steps | None = None) -> Query:
    """Parse a query. Raises Malformed: with reason "short" or "response" there must be no response, else FORMERR.

    Only the format is checked: a query with an unsupported opcode, class or type is valid. Bytes after the last record
    are ignored.
    """
    if len(data) < HEADER_BYTES:
        raise Malformed("short")
    ident, flags, questions, answers, authorities, additional = _header.unpack_from(data)
    if flags & QR:
        raise Malformed("response")
    steps = steps or Steps(len(data))
    if flags & OPCODE_MASK:  # other opcodes use the sections in other ways
        return Query(ident, flags, b"", b"\0", 0, 0, None)
    if questions != 1:  # RFC 9619
        raise Malformed("question")
    at = HEADER_BYTES
    end = skip_name(data, at, steps, compressed=False)  # there is nothing before it to point to
    if end + 4 > len(data):
        raise Malformed("question")
    kind, klass = _question_end.unpack_from(data, end)
    question, name = data[at : end + 4], lower(data[at:end])
    if answers or authorities:
        raise Malformed("sections")
    if additional > MAX_ADDITIONAL:
        raise Malformed("record")
    edns, signed, at = None, False, end + 4
    for _ in range(additional):
        owner_end = skip_name(data, at, steps)
        rtype, rclass, ttl, length = _record(data, owner_end)
        body = owner_end + 10
        if rtype == Type.OPT:
            if edns or owner_end != at + 1:  # RFC 6891, section 6.1.1: one, and its owner is the root
                raise Malformed("opt")
            _check_options(data, body, length, steps)
            edns = Edns(rclass, ttl >> 16 & 0xFF, bool(ttl & DO))
        signed |= rtype == Type.TSIG
        at = body + length
    return Query(ident, flags, question, name, kind, klass, edns, signed)


def _record(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Return type, class, TTL and length of the record whose owner ends at ``at``."""
    try:
        fixed: tuple[int, int, int, int] = _fixed.unpack_from(data, at)
    except struct.error:
        raise Malformed("record") from None
    if at + 10 + fixed[3] > len(data):
        raise Malformed("record")
    return fixed


def _check_options(data: bytes, at: int, length: int, steps: Steps) -> None:
    """Check EDNS options: code, length, data, up to the exact end of the record (RFC 6891, section 6.1.2)."""
    end = at + length
    while at < end:
        steps.taken += 1
        if at + 4 > end:
            raise Malformed("opt")
        at += 4 + (data[at + 2] << 8 | data[at + 3])
    if at != end:
        raise Malformed("opt")


# ---- responses ----


@dataclass(slots=True)  # not frozen: that takes three times as long to create
class Response:
    """A response, parsed as far as a forwarder needs."""

    message: bytes
    id: int
    flags: int
    name: bytes  # of the question, in lower case
    question: bytes  # as received
    type: int
    klass: int
    records: Records  # without OPT
    rcode: int  # with OPT's upper bits
    body_end: int  # where the forwarded records end
    counts: tuple[int, int, int]  # of those
    steps: Steps = field(compare=False)
    followed: list[Any] = field(default_factory=list, compare=False)  # what `cname.follow` has found

    @property
    def truncated(self) -> bool:
        """Whether the complete response must be fetched over TCP."""
        return bool(self.flags & TC)

    @property
    def opcode(self) -> int:
        """0 for a standard query."""
        return (self.flags & OPCODE_MASK) >> 11


def parse_response(data: bytes) -> Response:
    """Parse a response. Raises Malformed.

    The forwarded body ends before OPT: what follows, at most a signature of the transport (RFC 8945), means nothing to
    a client. The records of a truncated response are not parsed: it may be cut anywhere (RFC 2181, section 9).
    """
    if len(data) < HEADER_BYTES:
        raise Malformed("short")
    ident, flags, questions, *counts = _header.unpack_from(data)
    if not flags & QR:
        raise Malformed("response")
    if questions != 1 or sum(counts) > MAX_RECORDS or len(data) > MAX_MESSAGE_BYTES:
        raise Malformed("question" if questions != 1 else "record")
    steps = Steps(len(data))
    end = skip_name(data, HEADER_BYTES, steps, compressed=False)
    if end + 4 > len(data):
        raise Malformed("question")
    kind, klass = _question_end.unpack_from(data, end)
    records = Records(data)
    at, opt_at, extended = _find_records(data, end + 4, [] if flags & TC else counts, records, steps)
    return Response(
        message=data,
        id=ident,
        flags=flags,
        name=lower(data[HEADER_BYTES:end]),
        question=data[HEADER_BYTES : end + 4],
        type=kind,
        klass=klass,
        records=records,
        rcode=flags & RCODE_MASK | extended,
        body_end=opt_at or at,
        counts=records.counts,
        steps=steps,
    )


def _find_records(data: bytes, at: int, counts: list[int], records: Records, steps: Steps) -> tuple[int, int, int]:
    """Record the offsets of the records from ``at`` on. Return where they end, where OPT is (0: nowhere), and the upper
    bits of its response code. Raises Malformed.

    Written for speed: the body of the loop runs thousands of times per response.
    """
    opt_at = extended = singles = 0
    add, tries, end = records._runs.extend, MAX_RUN_TRIES, len(data)
    unpack, opt_type = _fixed.unpack_from, int(Type.OPT)
    for section, count in enumerate(counts, 1):
        left = count
        while left:
            owner_end = at + 2 if data.startswith(TO_QUESTION, at) else skip_name(data, at, steps)
            if owner_end + 10 > end:
                raise Malformed("record")
            rtype, _, ttl, length = unpack(data, owner_end)
            stop, alike = owner_end + 10 + length, 1
            if stop > end:
                raise Malformed("record")
            if rtype == opt_type:
                if section != 3 or opt_at:
                    raise Malformed("opt")
                extended, opt_at = ttl >> 24 << 4, at
            elif not opt_at:
                if (
                    tries
                    and left >= MIN_RUN
                    and data.startswith(head := data[at : owner_end + 4], stop)
                    and data.startswith(head, at + (MIN_RUN - 1) * (stop - at))
                ):
                    tries -= 1
                    alike = _run(data, at, owner_end, stop - at, left, steps)
                add((at, owner_end, stop - at, alike))
            at += alike * (stop - at)
            left -= alike
            singles += alike == 1
            if singles > MAX_SINGLES or steps.taken > MAX_SKIP_STEPS:
                raise Malformed("record")
        records.add_section(section)
    steps.taken += singles
    return at, opt_at, extended


def _run(data: bytes, at: int, owner_end: int, size: int, left: int, steps: Steps) -> int:
    """Return the number of records alike from ``at`` on. One step for each column that is compared."""
    if owner_end - at > MAX_RUN_OWNER_BYTES:
        return 1
    steps.taken += owner_end - at + 6
    return count_alike(data, at, owner_end, size, left)


def rdata_name(answer: Response, owner_end: int) -> bytes:
    """Return the name that is the whole RDATA of the record whose owner ends at ``owner_end``, in lower case. Raises
    Malformed."""
    at, length = owner_end + 10, int.from_bytes(answer.message[owner_end + 8 : owner_end + 10], "big")
    if skip_name(answer.message, at, answer.steps) != at + length:
        raise Malformed("record")
    return lower(read_name(answer.message, at, answer.steps))


def owner(answer: Response, start: int) -> bytes:
    """Return the owner of the record at ``start``, in lower case. Raises Malformed."""
    if answer.message.startswith(TO_QUESTION, start):
        return answer.name
    return lower(read_name(answer.message, start, answer.steps))


# ---- building messages ----


def response_flags(query_flags: int, rcode: int = 0, flags: int = 0) -> int:
    """Return a response's flags: RD and CD copied, RA set; Z, AD and TC are not copied (RFC 6895, section 2.1)."""
    return QR | RA | (query_flags & (RD | CD)) | flags | (rcode & RCODE_MASK)


def build_response(
    query: Query, rcode: int = 0, flags: int = 0, body: bytes = b"", counts: tuple[int, int, int] = (0, 0, 0)
) -> bytes:
    """Build a response: header, the question as received, ``body``, and OPT if the query has one."""
    answers, authorities, additional = counts
    ours = opt(rcode, query.edns.dnssec_ok) if query.edns else b""  # DO is copied (RFC 3225, section 3)
    header = _header.pack(
        query.id,
        response_flags(query.flags, rcode, flags),
        1,
        answers,
        authorities,
        additional + (1 if ours else 0),
    )
    return b"".join((header, query.question, body, ours))


def opt(rcode: int = 0, dnssec_ok: bool = False) -> bytes:
    """Build our OPT record: the size we accept over UDP without fragments (RFC 9715), version 0, no options."""
    return struct.pack("!BHHBBHH", 0, Type.OPT, 1232, rcode >> 4, 0, DO if dnssec_ok else 0, 0)


def build_error(data: bytes, rcode: int) -> bytes:
    """Build a response to a malformed query, or to one with an unsupported opcode: a header only, so never longer than
    the query.

    What follows the header of another opcode is unknown (RFC 8906, section 8.1.4), so the question is not copied; RD,
    RA and CD have a meaning for standard queries only.
    """
    ident, flags = struct.unpack_from("!HH", data)
    opcode = flags & OPCODE_MASK
    kept = QR | opcode | rcode if opcode else response_flags(flags & ~CD, rcode)
    return _header.pack(ident, kept, 0, 0, 0, 0)


def build_record(kind: int, ttl: int, rdata: bytes, owner_name: bytes = TO_QUESTION, klass: int = Class.IN) -> bytes:
    """Build a record; by default its owner is the question's name."""
    return b"".join((owner_name, _fixed.pack(kind, klass, ttl, len(rdata)), rdata))


def build_query(ident: int, question: bytes, flags: int, edns: bytes) -> bytes:
    """Build a query. ``edns``: its OPT record, or b""."""
    return _header.pack(ident, flags, 1, 0, 0, 1 if edns else 0) + question + edns


def error_without_question(data: bytes) -> int | None:
    """Return the code of an error response without a question, which servers send for queries that they cannot parse;
    else None."""
    if len(data) < HEADER_BYTES:
        return None
    _, flags, questions, *_ = _header.unpack_from(data)
    rcode: int = flags & RCODE_MASK
    return rcode if flags & QR and not questions and rcode else None
