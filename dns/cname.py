"""CNAME chains in responses."""

from __future__ import annotations

import struct

from udpwatch.dns.message import Malformed, Response, Type, owner, rdata_name

_type_and_class = struct.Struct("!HH")


class CnameLoop(Malformed):
    """A chain of aliases without an end. It can be parsed and forwarded, but gives nothing to cache."""

    def __init__(self) -> None:
        super().__init__("record")


def follow(answer: Response) -> tuple[list[int], bytes, list[int]]:
    """Follow the aliases from the question's name.

    Return the aliases, the name at their end, and that name's records of the question's type; aliases and records as
    offsets of the ends of their owners.

    The number of aliases is limited by the message and by its budget for names. Raises Malformed and CnameLoop.
    """
    message, named = answer.message, dict[bytes, list[int]]()
    written: dict[bytes, bytes] = {}  # equal octets, usually a pointer, are the same name: it is read once
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
    raise CnameLoop
