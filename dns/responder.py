"""Decides what a query gets: a response from the local names or the cache, or forwarding. Bytes in, bytes out; no
sockets.

In this order
1. Malformed bytes: no response, or FORMERR, which is never longer than the query (docs/dns.md).
2. Unsupported queries (opcodes, classes, zone transfers): NOTIMP, REFUSED, BADVERS.
3. Local names: their records, and NODATA for other types of names that have an address.
4. The cache.
5. An upstream server, if the client wants recursion and there is one; else REFUSED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, takewhile

from udpwatch.dns import message
from udpwatch.dns.alias import rewritten
from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import MAX_TTL, Entry, cut, entry_of, first_counts, without
from udpwatch.dns.direct import read_direct
from udpwatch.dns.message import AA, TC, Class, Malformed, Query, Rcode, Response, Type
from udpwatch.dns.names import lower
from udpwatch.dns.policy import has_address_in, is_windows_query, never_forwarded
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import Settings
from udpwatch.dns.zone import CONFIG, HOSTS, Found, Zone

TCP_BYTES = 65_535
MAX_UDP_BYTES = 4096  # whatever the settings say: larger responses do not arrive reliably
#: How long a local response may be repeated without a lookup: until a table changes.
FOREVER = float("inf")

_FORMERR_TYPES = {Type.OPT, Type.TKEY, Type.TSIG}  # records that belong to a message, not to a name
_REFUSED_TYPES = {Type.AXFR, Type.IXFR, Type.MAILA, Type.MAILB}
_UNUSUAL_TYPES = {int(each) for each in _FORMERR_TYPES | _REFUSED_TYPES} | {0}
_IN, _CH = int(Class.IN), int(Class.CH)  # comparing members of an enumeration takes longer
_HINFO = 13
_RFC8482 = b"\x07RFC8482\x00"
_BIND = b"\x04bind\x00"
MAX_STRINGS = 200  # of 255 octets: they fit into one TXT record


@dataclass(slots=True)  # not frozen: that takes three times as long to create
class Reply:
    """A response, with what metrics and log record of it."""

    data: bytes
    source: str  # hosts, config, cache, stale, forward, error
    rcode: int
    query: Query | None = None  # None: the query is malformed
    until: float = 0.0  # monotonic seconds; until then the same query gets the same response
    found: Found | None = None  # for the log


@dataclass(slots=True)
class Forward:
    """The query goes to upstream servers."""

    query: Query
    most: int  # maximum octets of the response


@dataclass(frozen=True, slots=True)
class Drop:
    """The query gets no response."""

    reason: str


#: Logs a query, with its response where there is one already: (query, client address, client port).
LogQuery = Callable[[Reply | Forward, str, int], None]


def _is_usual(query: Query) -> bool:
    """Return whether a query is a standard one for a name's records, which most are."""
    edns = query.edns
    return not (
        query.flags & message.OPCODE_MASK
        or query.klass != _IN
        or query.type in _UNUSUAL_TYPES
        or query.signed
        or (edns is not None and edns.version)
    )


class Responder:
    """Answers queries. ``zone`` and ``routes`` are replaced whole, from outside."""

    def __init__(self, settings: Settings, zone: Zone, cache: Cache) -> None:
        self._settings = settings
        high = min(settings.max_cache_ttl or MAX_TTL, MAX_TTL)
        self._cache_ttl = min(settings.min_cache_ttl, high), high
        self._udp_most = min(settings.edns_packet_max, MAX_UDP_BYTES)
        self._keeps_names = settings.domain_needed or settings.bogus_priv or settings.filter_windows
        #: Whether no setting changes or rejects responses with answers.
        self._reads_direct = not (
            settings.stop_dns_rebind
            or settings.bogus_addresses
            or settings.ignored_addresses
            or settings.filtered_types
            or settings.aliases
            or settings.proxy_dnssec
            or settings.max_ttl
            or settings.subnets
            or not settings.negcache
        )
        self.zone = zone
        self.cache = cache
        self.routes = Routes()
        #: Whether a name is that of a query of ours that has come back (`LoopDetector.is_test`).
        self.is_loop_test: Callable[[bytes], bool] | None = None
        self.version = "udpwatch"
        #: For servers.bind: "ADDRESS#PORT queries failures" of each.
        self.server_statistics: Callable[[], list[str]] = list
        #: For hits.bind and misses.bind: queries answered locally, and forwarded.
        self.totals: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def respond(self, data: bytes, now: float, tcp: bool = False, asked: bytes = b"") -> Reply | Forward | Drop:
        """Return what a query gets. Never raises, whatever the bytes.

        ``now``: monotonic seconds. ``asked``: the address of this host that was asked, 4 or 16 octets.
        """
        try:
            query = message.parse_query(data)
        except Malformed as error:
            if error.reason in ("short", "response"):
                return Drop(error.reason)
            return Reply(message.build_error(data, Rcode.FORMERR), error.reason, Rcode.FORMERR)
        most = TCP_BYTES if tcp else query.udp_bytes(self._udp_most)
        if not _is_usual(query):
            refusal = self._refusal(data, query) or (self._chaos(query, most) if query.klass == _CH else None)
            if refusal is not None:
                return refusal
        found = self.zone.find(query.name, query.type, asked)
        if found:
            return self._local(query, found, most)
        entry = self.cache.get(query.key, now)
        if entry:
            return from_entry(query, entry, most, now, "cache" if now < entry.expires else "stale")
        return self._unknown(query, most)

    def _unknown(self, query: Query, most: int) -> Reply | Forward:
        """Decide about a name that is not in memory."""
        if self.is_loop_test is not None and query.type == Type.TXT and self.is_loop_test(query.name):
            return self._nothing(query, Rcode.REFUSED)
        servers = self.routes.for_name(query.name)
        if self._keeps_names:
            if is_windows_query(self._settings, query.name, query.type):
                return self._nothing(query, Rcode.NOERROR)
            domain = self.routes.domain_of(query.name)
            if never_forwarded(self._settings, query.name, query.type, bool(domain and domain.servers)):
                servers = ()
        if servers == ():  # local only
            return self._nothing(query, Rcode.NOERROR if self.zone.exists(query.name) else Rcode.NXDOMAIN)
        if not servers or not query.recursion_desired:
            return self._nothing(query, Rcode.REFUSED)
        return Forward(query, most)

    def direct_entry(self, data: bytes, question: bytes, now: float) -> Entry | None:
        """Create the cache entry of a usual response; None: parse it, and use `entry_of`."""
        if not self._reads_direct:
            return None
        entry = read_direct(data, question, now, self._cache_ttl)
        if entry is not None and entry.rcode and self.zone.exists(lower(question[:-4])):
            return None  # `entry_of` changes it
        return entry

    def entry_of(self, answer: Response, now: float) -> Entry:
        """Create the cache entry of a response, changed as the settings say.

        NXDOMAIN for a name with local records of other types becomes NODATA: it would deny these, too (RFC 8020).
        """
        settings = self._settings
        limits = settings.neg_ttl, settings.max_ttl, settings.negcache
        received, answer = answer, rewritten(settings.aliases, answer)
        entry = entry_of(answer, now, *limits, settings.proxy_dnssec, self._cache_ttl)
        if answer is not received:
            entry.flags = 0  # AD was about other addresses
        if settings.bogus_addresses and has_address_in(settings.bogus_addresses, answer):
            entry.rcode = Rcode.NXDOMAIN
            cut(entry, 0)
        if settings.filtered_types:
            without(entry, settings.filtered_types)
        if entry.rcode == Rcode.NXDOMAIN and self.zone.exists(answer.name):
            entry.rcode = Rcode.NOERROR
            entry.flags = 0  # AD was about NXDOMAIN
        return entry

    def refuse(self, query: Query, rcode: int) -> Reply:
        """Build the response to a query that could not be forwarded or resolved."""
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
        if query.signed:  # with an unknown key: a response would look as if it had been verified
            return self._nothing(query, Rcode.REFUSED)
        return None

    def _local(self, query: Query, found: Found, most: int) -> Reply:
        rcode = Rcode.NOERROR if found.exists else Rcode.NXDOMAIN
        source = CONFIG if found.origin == CONFIG else HOSTS
        records = []
        if query.type == Type.ANY and found.rrsets:
            first = found.rrsets[0]  # RFC 8482, section 4.1: one RRset will do
            if first.type not in (Type.A, Type.AAAA):
                records = [message.build_record(_HINFO, first.ttl, _RFC8482)]
            found = Found((first,) if not records else (), found.exists, found.origin)
        for rrset in found.rrsets:
            owner = message.TO_QUESTION if rrset.owner == query.name else rrset.owner
            records += [message.build_record(rrset.type, rrset.ttl, data, owner) for data in rrset.data]
        until = 0.0 if any(rrset.varies for rrset in found.rrsets) else FOREVER
        return Reply(_with_answers(query, rcode, records, most), source, rcode, query, until, found)

    def _chaos(self, query: Query, most: int) -> Reply:
        """Answer `version.bind` and similar names as dnsmasq does (dnsmasq(8), "cachesize.bind")."""
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
        return Reply(_with_answers(query, 0, [body], most), "config", 0, query)


# ---- responses that fit ----
#
# One that is too long carries as many whole records as fit, with TC (RFC 2181, section 9): a resolver that supports TCP
# retries over TCP, one that does not (musl before 1.2.4) uses the records. The question, which stub resolvers compare,
# and OPT are always there.


def _room(query: Query, most: int) -> int:
    """Return how many octets of records fit."""
    return most - message.HEADER_BYTES - len(query.question) - (message.OPT_BYTES if query.edns else 0)


def _with_answers(query: Query, rcode: int, records: list[bytes], most: int) -> bytes:
    """Build an authoritative response with these answers, or the first of them and TC."""
    body, room, flags, count = b"".join(records), _room(query, most), AA, len(records)
    if len(body) > room:
        flags |= TC
        ends = accumulate(map(len, records))
        count = sum(1 for _ in takewhile(lambda end: end <= room, ends))
        body = b"".join(records[:count])
    return message.build_response(query, rcode, flags, body, (count, 0, 0))


def from_entry(query: Query, entry: Entry, most: int, now: float, source: str) -> Reply:
    """Build the response of a cache entry for this client, without AA, which is the server's claim."""
    has_room = entry.rcode <= message.RCODE_MASK or query.edns  # only OPT has the upper bits
    rcode = entry.rcode if has_room else Rcode.SERVFAIL
    stale, room = source == "stale", _room(query, most)
    flags = entry.flags if entry.flags and not stale and query.understands_ad else 0
    if len(entry.body) <= room:
        data = message.build_response(query, rcode, flags, entry.aged(now, stale), entry.counts)
    else:
        records = entry.fitting(room)
        counts = first_counts(entry.counts, records)
        if counts[:2] != entry.counts[:2]:  # additional records may be left out (RFC 2181, section 9)
            flags |= TC
        data = message.build_response(query, rcode, flags, entry.aged(now, stale, records), counts)
    # TTLs are whole seconds: the same bytes are valid until the next second.
    until = min(entry.expires, entry.stored + int(now - entry.stored) + 1) if source == "cache" else 0.0
    return Reply(data, source, rcode, query, until)
