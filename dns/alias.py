"""Rewriting of IPv4 addresses in upstream responses: `--alias`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from udpwatch.dns.message import Class, Response, Type
from udpwatch.dns.settings import Alias


def rewritten(aliases: Sequence[Alias], answer: Response) -> Response:
    """Return a response with the addresses of its A records rewritten; the same object if none changes.

    As in dnsmasq, answers and additional records are rewritten, by the last option that applies.
    """
    if not aliases:
        return answer
    message: bytearray | None = None
    for section in (1, 3):
        for record in answer.records.of(section):
            if record.type != Type.A or record.klass != Class.IN or record.end - record.data != 4:
                continue
            old = int.from_bytes(answer.message[record.data : record.end], "big")
            for alias in reversed(aliases):
                if alias.first <= old & alias.compared <= alias.last:
                    new = old & ~alias.mask | alias.new & alias.mask
                    message = message or bytearray(answer.message)
                    message[record.data : record.end] = new.to_bytes(4, "big")
                    break
    return answer if message is None else replace(answer, message=bytes(message))
