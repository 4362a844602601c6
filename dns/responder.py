"""Bytes in, bytes out: what a question gets, from the local names, the cache, or whom it is passed on to. No sockets.

What a question is worth, in order
1. bytes that are no query: nothing, or FORMERR, never longer than what came (docs/dns.md);
2. what nobody serves (opcodes, classes, zone transfers): NOTIMP, REFUSED, BADVERS;
3. local names: what they have, and every type of those that have an address;
4. the cache;
5. an upstream server, if the client wants recursion and there is one; else REFUSED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from udpwatch.dns import message
from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import Entry, entry_of
from udpwatch.dns.message import AA, TC, Class, Malformed, Query, Rcode, Response, Type
from udpwatch.dns.policy import never_forwarded
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import Settings
from udpwatch.dns.zone import CONFIG, HOSTS, Found, Zone

TCP_BYTES = 65_535
MAX_UDP_BYTES = 4096  # whatever the settings say: more has never come through unharmed
#: for how long a local answer may be given again without a look: until something changes
FOREVER = float("inf")

_FORMERR_TYPES = {Type.OPT, Type.TKEY, Type.TSIG}  # records of a message, not of a name
_REFUSED_TYPES = {Type.AXFR, Type.IXFR, Type.MAILA, Type.MAILB}
_HINFO = 13
_RFC8482 = b"\x07RFC8482\x00"
_BIND = b"\x04bind\x00"
MAX_STRINGS = 200  # of a TXT record: they fit into one


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and what the books say of it."""

    data: bytes
    source: str  # hosts, config, cache, stale, forward, error
    rcode: int
    query: Query | None = None  # None: the question could not be read
    until: float = 0.0  # monotonic; the same bytes get the same answer until then
    found: Found | None = None  # for the log


@dataclass(frozen=True, slots=True)
class Forward:
    """A question for upstream servers."""

    query: Query
    most: int  # octets of the answer


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing may be answered."""

    reason: str


#: Logs a query, with its response where there is one already: (query, client address, client port).
LogQuery = Callable[[Reply | Forward, str, int], None]


class Responder:
    """Answers questions. ``zone`` and ``routes`` are put in place from outside, whole."""

    def __init__(self, settings: Settings, zone: Zone, cache: Cache) -> None:
        self._settings = settings
        self.zone = zone
        self.cache = cache
        self.routes = Routes()
        self.version = "udpwatch"
        #: for servers.bind: "ADDRESS#PORT asked failed" of each
        self.server_statistics: Callable[[], list[str]] = list
        #: for hits.bind and misses.bind: questions answered here, and passed on
        self.totals: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def respond(self, data: bytes, now: float, tcp: bool = False) -> Reply | Forward | Drop:
        """What these bytes get. ``now``: monotonic seconds. Never raises, whatever the bytes."""
        try:
            query = message.parse_query(data)
        except Malformed as error:
            if error.reason in ("short", "response"):
                return Drop(error.reason)
            return Reply(message.build_error(data, Rcode.FORMERR), error.reason, Rcode.FORMERR)
        most = TCP_BYTES if tcp else query.udp_bytes(min(self._settings.edns_packet_max, MAX_UDP_BYTES))
        return self._refusal(data, query) or self._known(query, most, now) or self._unknown(query, most)

    def _known(self, query: Query, most: int, now: float) -> Reply | None:
        """What is in memory."""
        if query.klass == Class.CH:
            return self._chaos(query, most)
        found = self.zone.find(query.name, query.type)
        if found:
            return self._local(query, found, most)
        entry = self.cache.get(query.key, now)
        if entry:
            return from_entry(query, entry, most, now, "cache" if now < entry.expires else "stale")
        return None

    def _unknown(self, query: Query, most: int) -> Reply | Forward:
        """Who else is asked."""
        domain = self.routes.domain_of(query.name)
        ends_here = never_forwarded(self._settings, query.name, query.type, bool(domain and domain.servers))
        servers = () if ends_here else self.routes.for_name(query.name)
        if servers == ():  # ours alone: what is not here is nowhere
            return self._nothing(query, Rcode.NOERROR if self.zone.exists(query.name) else Rcode.NXDOMAIN)
        if not servers or not query.recursion_desired:
            return self._nothing(query, Rcode.REFUSED)
        return Forward(query, most)

    def entry_of(self, answer: Response, now: float) -> Entry:
        """What an upstream server's answer is here, to give and to keep. A name that has records of other types here is
        not denied: NXDOMAIN would be the word on these, too (RFC 8020)."""
        settings = self._settings
        entry = entry_of(answer, now, settings.neg_ttl, settings.max_ttl, settings.negcache)
        if entry.rcode == Rcode.NXDOMAIN and self.zone.exists(answer.name):
            entry.rcode = Rcode.NOERROR
        return entry

    def refuse(self, query: Query, rcode: int) -> Reply:
        """The answer to a question that was passed on in vain."""
        return self._nothing(query, rcode)

    def _nothing(self, query: Query, rcode: int) -> Reply:
        source = CONFIG if rcode in (Rcode.NOERROR, Rcode.NXDOMAIN) else "error"
        return Reply(message.build_response(query, rcode), source, rcode, query)

    def _refusal(self, data: bytes, query: Query) -> Reply | None:
        if query.opcode:
            return Reply(message.build_error(data, Rcode.NOTIMP), "error", Rcode.NOTIMP, query)
        if query.edns and query.edns.version:
            return self._nothing(query, Rcode.BADVERS)  # RFC 6891, section 6.1.3
        if query.type in _FORMERR_TYPES:
            return self._nothing(query, Rcode.FORMERR)
        if query.klass not in (Class.IN, Class.CH) or query.type in _REFUSED_TYPES or query.type == 0:
            return self._nothing(query, Rcode.REFUSED)
        if query.signed:  # with a key that cannot be known here: no answer may look as if it had been
            return self._nothing(query, Rcode.REFUSED)
        return None

    def _local(self, query: Query, found: Found, most: int) -> Reply:
        rcode = Rcode.NOERROR if found.exists else Rcode.NXDOMAIN
        source = CONFIG if found.origin == CONFIG else HOSTS
        records, count = [], 0
        if query.type == Type.ANY and found.rrsets:
            first = found.rrsets[0]  # RFC 8482, section 4.1: one RRset will do
            if first.type not in (Type.A, Type.AAAA):
                records, count = [message.build_record(_HINFO, first.ttl, _RFC8482)], 1
            found = Found((first,) if not records else (), found.exists, found.origin)
        for rrset in found.rrsets:
            owner = message.TO_QUESTION if rrset.owner == query.name else rrset.owner
            records += [message.build_record(rrset.type, rrset.ttl, data, owner) for data in rrset.data]
            count += len(rrset.data)
        data = fitted(query, rcode, AA, b"".join(records), (count, 0, 0), most)
        return Reply(data, source, rcode, query, FOREVER, found)

    def _chaos(self, query: Query, most: int) -> Reply:
        """`version.bind` and the like, as dnsmasq answers them (dnsmasq(8), "cachesize.bind")."""
        if not self._settings.ident or query.type != Type.TXT or not query.name.endswith(_BIND):
            return self._nothing(query, Rcode.REFUSED)
        counts = self.cache.counts
        answers = {
            b"version": [self.version],
            b"authors": ["the udpwatch maintainers"],
            b"copyright": ["Apache-2.0"],
            b"cachesize": [str(self.cache.max_entries)],
            b"insertions": [str(counts.insertions)],
            b"evictions": [str(counts.evictions)],
            b"misses": [str(self.totals()[1])],
            b"hits": [str(self.totals()[0])],
            b"auth": ["0"],
            b"servers": self.server_statistics(),
        }
        label = query.name[1 : 1 + query.name[0]]
        if len(query.name) != len(label) + 1 + len(_BIND) or label not in answers:
            return self._nothing(query, Rcode.NOTIMP)
        strings = [line.encode()[:255] for line in answers[label][:MAX_STRINGS]]
        text = b"".join(bytes((len(string),)) + string for string in strings)
        body = message.build_record(Type.TXT, 0, text or b"\0", klass=Class.CH)
        return Reply(fitted(query, 0, AA, body, (1, 0, 0), most), "config", 0, query)


def fitted(query: Query, rcode: int, flags: int, body: bytes, counts: tuple[int, int, int], most: int) -> bytes:
    """The response, or where it is too long one that says so (TC) and holds nothing but the question: stub resolvers
    match it, and come again over TCP (RFC 2181, section 9)."""
    if not _fits(query, len(body), most):
        return message.build_response(query, rcode, flags | TC)
    return message.build_response(query, rcode, flags, body, counts)


def _fits(query: Query, body_bytes: int, most: int) -> bool:
    return message.HEADER_BYTES + len(query.question) + body_bytes + (message.OPT_BYTES if query.edns else 0) <= most


def from_entry(query: Query, entry: Entry, most: int, now: float, source: str) -> Reply:
    """An answer of an upstream server for this client; AA and AD are that server's word, and not ours to give."""
    rcode = entry.rcode if entry.rcode <= message.RCODE_MASK or query.edns else Rcode.SERVFAIL  # OPT has the upper bits
    # Thousands of TTLs are not counted down for an answer that says nothing but to come again over TCP.
    body = entry.aged(now, source == "stale") if _fits(query, len(entry.body), most) else entry.body
    data = fitted(query, rcode, 0, body, entry.counts, most)
    # TTLs are whole seconds: until they count down the same bytes are right.
    until = min(entry.expires, entry.stored + int(now - entry.stored) + 1) if source == "cache" else 0.0
    return Reply(data, source, rcode, query, until)
