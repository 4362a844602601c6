"""Questions and answers in dnsmasq's words (its log.c), which many programs read: `query[A] NAME from ADDRESS`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from itertools import count

from udpwatch.dns import wire
from udpwatch.dns.metrics import NAMED_TYPES
from udpwatch.dns.responder import Forward, Reply
from udpwatch.dns.wire import Malformed, Query, Rcode, Type, name_to_text
from udpwatch.dns.zone import unpack_address

log = logging.getLogger(__name__)

MAX_OPEN = 10_000  # questions whose answer has not come

_NODATA = {Type.A: "NODATA-IPv4", Type.AAAA: "NODATA-IPv6"}
_WORDS = {"cache": "cached", "stale": "cached-stale", "forward": "reply", "config": "config"}


class QueryLog:
    """Writes to this module's logger, a line each."""

    def __init__(self, extra: bool) -> None:
        """``extra``: each line begins with a serial number and the client (`--log-queries=extra`)."""
        self._extra, self._serials = extra, count(1)
        self._open: OrderedDict[tuple[str, int], int] = OrderedDict()  # client -> serial number

    def tell(self, found: Reply | Forward, address: str, port: int) -> None:
        """A question, and its answer where there is one already."""
        if found.query is None:
            return
        self.question(found.query, address, port)
        if isinstance(found, Reply):
            self.answer(found, address, port)

    def question(self, query: Query, address: str, port: int) -> None:
        """That it came."""
        if self._extra:
            self._open[address, port] = next(self._serials)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._write(address, port, f"query[{_type(query.type)}] {name_to_text(query.name)} from {address}")

    def forwarded(self, query: Query, server: str, address: str, port: int) -> None:
        """That it was passed on."""
        self._write(address, port, f"forwarded {name_to_text(query.name)} to {server}")

    def answer(self, reply: Reply, address: str, port: int) -> None:
        """What the client gets, a line for each record of the answer section."""
        query = reply.query
        assert query
        word = _WORDS.get(reply.source, reply.source)
        if reply.found and reply.source == "hosts":
            word = reply.found.origin
        name, told = name_to_text(query.name), 0
        try:
            answer = wire.parse_answer(reply.data)
            for record in answer.records:
                if record.section == 1:
                    owner = name_to_text(wire.owner(answer, record))
                    self._write(address, port, f"{word} {owner} is {_data(answer, record)}")
                    told += 1
        except Malformed:  # an upstream server's records are passed on as they came
            told = 0
        if not told:
            what = _NODATA.get(Type(query.type), "NODATA") if query.type in _NODATA else "NODATA"
            if reply.rcode != Rcode.NOERROR:
                what = Rcode(reply.rcode).name if reply.rcode in Rcode.__members__.values() else str(reply.rcode)
            self._write(address, port, f"{word} {name} is {what}")

    def _write(self, address: str, port: int, text: str) -> None:
        if self._extra:
            text = f"{self._open.get((address, port), 0)} {address}/{port} {text}"
        log.info("%s", text)


def _type(kind: int) -> str:
    return NAMED_TYPES.get(kind, f"type={kind}")


def _data(answer: wire.Answer, record: wire.Record) -> str:
    packed = answer.message[record.data : record.end]
    if (record.type, len(packed)) in ((Type.A, 4), (Type.AAAA, 16)):
        return unpack_address(packed)
    if record.type == Type.PTR:
        return name_to_text(wire.rdata_name(answer, record))
    return f"<{_type(record.type)}>"
