"""Builds DNS messages octet by octet, independently of any DNS library."""

from __future__ import annotations

import struct

A, NS, CNAME, SOA, PTR, HINFO, MX, TXT, AAAA, SRV, OPT, HTTPS, ANY = 1, 2, 5, 6, 12, 13, 15, 16, 28, 33, 41, 65, 255
IN, CH, HS = 1, 3, 4
QR, AA, TC, RD, RA, Z, AD, CD = 0x8000, 0x400, 0x200, 0x100, 0x80, 0x40, 0x20, 0x10
DO = 0x8000
TO_QUESTION = b"\xc0\x0c"
ID = 0x1234


def header(
    questions: int = 1, answers: int = 0, authorities: int = 0, additional: int = 0, flags: int = RD, ident: int = ID
) -> bytes:
    return struct.pack("!6H", ident, flags, questions, answers, authorities, additional)


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".") if label) + b"\0"


def question(text: str | bytes, kind: int = A, klass: int = IN) -> bytes:
    return (text if isinstance(text, bytes) else name(text)) + struct.pack("!HH", kind, klass)


def record(kind: int, data: bytes = b"", ttl: int = 0, owner: bytes = TO_QUESTION, klass: int = IN) -> bytes:
    return owner + struct.pack("!HHIH", kind, klass, ttl & 0xFFFFFFFF, len(data)) + data


def opt(data: bytes = b"", size: int = 1232, version: int = 0, flags: int = 0, owner: bytes = b"\0") -> bytes:
    return record(OPT, data, version << 16 | flags, owner, size)


def option(code: int, data: bytes = b"") -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def soa(ttl: int = 300, minimum: int = 60, owner: bytes = TO_QUESTION) -> bytes:
    return record(SOA, b"\0\0" + struct.pack("!5I", 1, 2, 3, 4, minimum & 0xFFFFFFFF), ttl, owner)


def query(text: str | bytes, kind: int = A, *extra: bytes, klass: int = IN, flags: int = RD, ident: int = ID) -> bytes:
    """A query; ``extra``: records of the additional section."""
    return header(additional=len(extra), flags=flags, ident=ident) + question(text, kind, klass) + b"".join(extra)


def response(
    text: str | bytes,
    kind: int = A,
    answers: tuple[bytes, ...] = (),
    authorities: tuple[bytes, ...] = (),
    additional: tuple[bytes, ...] = (),
    *,
    rcode: int = 0,
    flags: int = RD | RA,
    klass: int = IN,
    ident: int = ID,
) -> bytes:
    """An upstream server's response."""
    head = header(1, len(answers), len(authorities), len(additional), QR | flags | rcode, ident)
    return head + question(text, kind, klass) + b"".join((*answers, *authorities, *additional))


def flags_of(data: bytes) -> int:
    return int.from_bytes(data[2:4], "big")


def counts_of(data: bytes) -> tuple[int, ...]:
    return struct.unpack_from("!4H", data, 4)
