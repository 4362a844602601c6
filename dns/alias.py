"""Rewriting of IPv4 addresses in upstream responses: `--alias`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

from udpwatch.dns.message import Class, Response, Type
from udpwatch.dns.records import numbers_of, put_numbers
from udpwatch.dns.settings import Alias

_A = struct.pack("!HHH", Type.A, Class.IN, 4)  # type, class, length


def rewritten(aliases: Sequence[Alias], answer: Response) -> Response:
    """Return a response with the addresses of its A records rewritten; the same object if none changes.

    As in dnsmasq, answers and additional records are rewritten, by the last option that applies.
    """
    if not aliases:
        return answer
    message: bytearray | None = None
    for section in (1, 3):
        for _, owner_end, size, count in answer.records.runs(section):
            if answer.message[owner_end : owner_end + 4] + answer.message[owner_end + 8 : owner_end + 10] != _A:
                continue
            at = owner_end + 10
            before = numbers_of(answer.message, at, size, count)
            after = [_rewrite(aliases, each) for each in before]
            if tuple(after) != before:
                message = message or bytearray(answer.message)
                put_numbers(message, at, size, count, after)
    return answer if message is None else replace(answer, message=bytes(message))


def _rewrite(aliases: Sequence[Alias], address: int) -> int:
    for alias in reversed(aliases):
        if alias.first <= address & alias.compared <= alias.last:
            return address & ~alias.mask | alias.new & alias.mask
    return address
