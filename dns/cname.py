"""CNAME chains in responses."""

from __future__ import annotations

import struct

from udpwatch.dns.message import Malformed, Response, Type, owner, rdata_name
from udpwatch.dns.records import Run

MAX_OWNERS = 128  # of the answers of a response, as written; a chain of aliases has a few

_type_and_class = struct.Struct("!HH")


class CnameLoop(Malformed):
    """A chain of aliases without an end. It can be parsed and forwarded, but gives nothing to cache."""

    def __init__(self) -> None:
        super().__init__("record")


#: The aliases (offsets of the ends of their owners), the name at their end, and its records of the question's type.
Chain = tuple[list[int], bytes, list[Run]]


def follow(answer: Response) -> Chain:
    """Follow the aliases from the question's name. Raises Malformed and CnameLoop.

    The result is kept with the response. The number of owners is limited, and so is reading their names (`Steps`).
    """
    if not answer.followed:
        answer.followed.append(_follow(answer))
    chain: Chain | None = answer.followed[0]
    if chain is None:
        raise CnameLoop
    return chain


def _follow(answer: Response) -> Chain | None:
    """Return the chain, or None for a loop. Raises Malformed."""
    message, named = answer.message, dict[bytes, list[Run]]()
    written: dict[bytes, list[Run]] = {}  # equal octets, usually a pointer, are the same name: it is read once
    for run in answer.records.runs(1):
        start, owner_end, _, _ = run
        if _type_and_class.unpack_from(message, owner_end)[1] == answer.klass:
            octets = message[start:owner_end]
            runs = written.get(octets)
            if runs is None:
                if len(written) >= MAX_OWNERS:
                    raise Malformed("record")
                runs = written[octets] = named.setdefault(owner(answer, start), [])
            runs.append(run)
    aliases: list[int] = []
    seen: set[bytes] = set()
    name = answer.name
    while name not in seen:
        seen.add(name)
        runs, alias = named.get(name, []), None
        types = [_type_and_class.unpack_from(message, run[1])[0] for run in runs]
        found = [run for run, kind in zip(runs, types, strict=True) if answer.type in (kind, Type.ANY)]
        if not found and Type.CNAME in types:
            alias = runs[types.index(Type.CNAME)][1]
        if alias is None:
            return aliases, name, found
        aliases.append(alias)
        name = rdata_name(answer, alias)
    return None
