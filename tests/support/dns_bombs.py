"""Upstream responses that are expensive to read: each as large as a message can be, or as the bounds allow."""

from __future__ import annotations

import struct
from collections.abc import Callable

import dns_messages as m

from udpwatch.dns.cname import MAX_OWNERS
from udpwatch.dns.message import MAX_MESSAGE_BYTES, MAX_RECORDS, MAX_SINGLES

QUESTION = "q.example"
#: Makes a record from its number and its offset in the message.
Make = Callable[[int, int], bytes]


def pointer(at: int) -> bytes:
    return struct.pack("!H", 0xC000 | min(at, 0x3FFF))


def filled(
    make: Make, question: str | bytes = QUESTION, kind: int = m.A, most: int = MAX_RECORDS, section: int = 1
) -> bytes:
    """A response with as many records as fit in one section, at most ``most``."""
    body, number = bytearray(m.question(question, kind)), 0
    while number < most:
        record = make(number, 12 + len(body))
        if 12 + len(body) + len(record) > MAX_MESSAGE_BYTES:
            break
        body += record
        number += 1
    counts = [number if each == section else 0 for each in (1, 2, 3)]
    return m.header(1, *counts, m.QR | m.RD) + bytes(body)


def _owner(number: int, at: int) -> bytes:
    """One of MAX_OWNERS names with a pointer."""
    return b"\x03" + struct.pack("!H", number % (MAX_OWNERS - 1)) + b"x" + pointer(12)


def _chain(number: int, at: int) -> bytes:
    """An alias whose owner is in the data of the alias before."""
    target = b"\x02" + struct.pack("!H", number) + pointer(12)
    return m.record(m.CNAME, target, 60, pointer(12 if number == 0 else at - 5))


_ALIAS = m.record(m.CNAME, m.name("a.long.chain.of.names.example.org"), 60)
_ALIAS_AT = 12 + len(m.question(QUESTION)) + 12
_LONG = b"\x01q" * 120 + b"\0"

BOMBS = {
    "addresses": filled(lambda number, at: m.record(m.A, bytes(4), 60)),
    "addresses, each with its own TTL": filled(lambda number, at: m.record(m.A, bytes(4), number)),
    "addresses, each TTL too large": filled(lambda number, at: m.record(m.A, bytes(4), 0x7FFFFFFF - number)),
    "addresses of an alias": filled(
        lambda number, at: m.record(m.A, bytes(4), 60, pointer(_ALIAS_AT)) if number else _ALIAS
    ),
    "IPv6 addresses": filled(lambda number, at: m.record(m.AAAA, bytes(16), 60), kind=m.AAAA),
    "tiny records": filled(lambda number, at: m.record(m.A, b"", 60, b"\0")),
    "records of two lengths": filled(lambda number, at: m.record(m.TXT, b"\1x"[: number % 2 + 1], 60), kind=m.TXT),
    "records of two lengths, as many as allowed": filled(
        lambda number, at: m.record(m.TXT, b"\1x"[: number % 2 + 1], 0x7FFFFFFF - number), kind=m.TXT, most=MAX_SINGLES
    ),
    "short runs": filled(
        lambda number, at: m.record(m.TXT, b"\1x"[: number // 15 % 2 + 1], 60), kind=m.TXT, most=MAX_SINGLES
    ),
    "many owners": filled(
        lambda number, at: m.record(m.A, bytes(4), 60, b"\x02" + struct.pack("!H", number) + pointer(12))
    ),
    "many owners of a long name": filled(
        lambda number, at: m.record(m.A, bytes(4), 60, b"\x02" + struct.pack("!H", number) + pointer(12)), _LONG
    ),
    "owners, records and TTLs as many as allowed": filled(
        lambda number, at: m.record(m.A, bytes(number % 2), 0x7FFFFFFF - number, _owner(number, at)), most=MAX_SINGLES
    ),
    "long owners": filled(lambda number, at: m.record(m.A, b"", 60, b"\1a" * 127 + b"\0")),
    "deep pointers": filled(
        lambda number, at: m.record(m.A, bytes(4), 60, pointer(12 if number == 0 else min(at - 16, 0x3FF0)))
    ),
    "chain of aliases": filled(_chain),
    "aliases to themselves": filled(lambda number, at: m.record(m.CNAME, b"\xc0\x0c", 60)),
    "SOA records": filled(lambda number, at: m.record(m.SOA, bytes(22), 60, b"\1z\0"), section=2),
    "SOA records of two lengths": filled(
        lambda number, at: m.record(m.SOA, bytes(22 + number % 2), 60, b"\1z\0"), section=2, most=MAX_SINGLES
    ),
    "additional records": filled(lambda number, at: m.record(m.A, bytes(4), 60, pointer(12)), section=3),
    "OPT with options": m.header(1, 0, 0, 1, m.QR | m.RD) + m.question(QUESTION) + m.opt(m.option(9) * 16_000),
}
