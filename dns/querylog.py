"""Logs queries and responses in dnsmasq's format (its log.c), which many programs parse: `query[A] NAME from
ADDRESS`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from itertools import count

from udpwatch.dns import message
from udpwatch.dns.message import Malformed, Query, Rcode, Type
from udpwatch.dns.metrics import NAMED_TYPES
from udpwatch.dns.names import address_of, name_to_text, unpack_address
from udpwatch.dns.records import Record
from udpwatch.dns.responder import Forward, Reply

log = logging.getLogger(__name__)

MAX_OPEN = 10_000  # queries without a response yet

_WORDS = {"cache": "cached", "stale": "cached-stale", "forward": "reply"}  # "config" for the rest
#: dnsmasq's names of types that are not metric labels
_TYPES: dict[int, str] = {
    **NAMED_TYPES,
    **{13: "HINFO", 35: "NAPTR", 39: "DNAME", 44: "SSHFP", 52: "TLSA", 64: "SVCB", 99: "SPF", 256: "URI", 257: "CAA"},
}
_FAMILIES: dict[int, str] = {Type.A: "NODATA-IPv4", Type.AAAA: "NODATA-IPv6"}
_OF_FILES = {Type.A, Type.AAAA, Type.PTR}  # types of hosts files


class QueryLog:
    """Writes to this module's logger."""

    def __init__(self, extra: bool) -> None:
        """``extra``: each line starts with a serial number and the client (`--log-queries=extra`)."""
        self._extra, self._serials = extra, count(1)
        #: client and query id -> serial number. One socket may send two queries, as glibc's does for A and AAAA.
        self._open: OrderedDict[tuple[str, int, int], int] = OrderedDict()

    def log_query(self, found: Reply | Forward, address: str, port: int) -> None:
        """Log a query, and its response if there is one already."""
        if found.query is None:
            return
        self.query(found.query, address, port)
        if isinstance(found, Reply):
            self.response(found, address, port)

    def query(self, query: Query, address: str, port: int) -> None:
        """Log that a query arrived."""
        if self._extra:
            self._open[address, port, query.id] = next(self._serials)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._write(query, address, port, f"query[{_type(query.type)}] {_asked(query)} from {address}")

    def forwarded(self, query: Query, server: str, address: str, port: int) -> None:
        """Log that a query was forwarded."""
        self._write(query, address, port, f"forwarded {_asked(query)} to {server}")

    def response(self, reply: Reply, address: str, port: int) -> None:
        """Log a response, one line for each record of the answer section."""
        assert reply.query
        for text in _lines(reply, reply.query):
            self._write(reply.query, address, port, text)

    def _write(self, query: Query, address: str, port: int, text: str) -> None:
        if self._extra:
            text = f"{self._open.get((address, port, query.id), 0)} {address}/{port} {text}"
        log.info("%s", text)


def _lines(reply: Reply, query: Query) -> list[str]:
    word, name = _WORDS.get(reply.source, "config"), _asked(query)
    if reply.source == "error":
        return [f"{'reply' if reply.rcode == Rcode.SERVFAIL else word} error is {_rcode(reply.rcode)}"]
    file = reply.found.origin if reply.found and reply.source == "hosts" else word
    lines = []
    try:
        answer = message.parse_response(reply.data)
        if answer.truncated:
            return [f"{word} {name} is truncated"]
        for record in answer.records.of(1):
            word_of_type = file if record.type in _OF_FILES else word
            lines.append(f"{word_of_type} {_owner(answer, record, name)} is {_data(answer, record)}")
    except Malformed:  # records are forwarded as received
        lines.append(f"{word} {name} is <unreadable>")
    if not lines or reply.rcode:
        what = _FAMILIES.get(query.type, "NODATA") if reply.rcode == Rcode.NOERROR else _rcode(reply.rcode)
        lines.append(f"{word} {name} is {what}")
    return lines


def _asked(query: Query) -> str:
    """Return the name in the case of the query, as dnsmasq does."""
    return name_to_text(query.question[:-4] or query.name)


def _rcode(rcode: int) -> str:
    return Rcode(rcode).name if rcode in Rcode.__members__.values() else str(rcode)


def _type(kind: int) -> str:
    return _TYPES.get(kind, f"type={kind}")


def _owner(answer: message.Response, record: Record, asked: str) -> str:
    """Return an owner; for a reverse name, its address."""
    name = message.owner(answer, record.start)
    packed = address_of(name) if record.type == Type.PTR else None
    if packed:
        return unpack_address(packed)
    return asked if name == answer.name else name_to_text(name)


def _data(answer: message.Response, record: Record) -> str:
    packed = answer.message[record.data : record.end]
    if (record.type, len(packed)) in ((Type.A, 4), (Type.AAAA, 16)):
        return unpack_address(packed)
    if record.type == Type.PTR:
        return name_to_text(message.rdata_name(answer, record.owner_end))
    return f"<{_type(record.type)}>"
