"""The responder's metrics: counted where things happen, rendered at a scrape.

A counter is a list of one number, so that the thread that answers from memory can keep a reference and add to it. Each
cell of the fast path belongs to one thread, so `cell[0] += n` needs no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from udpwatch.dns.cache import Cache
from udpwatch.dns.message import REASONS, Rcode, Type

Cell = list[int]

SOURCES = ("hosts", "config", "cache", "stale", "forward", "error")
DROP_REASONS = ("policy", "group", "source", "send")
UPSTREAM_FAILURES = ("timeout", "network", "refused", "truncated", "malformed", "busy")
#: Why a query was not forwarded; docs/metrics.md explains each.
REJECT_REASONS = ("servers", "all", "shed", "repeat", "queue", "queue_share")
#: Why a TCP connection was closed early.
CLOSE_REASONS = ("room", "held", "slow")
#: seconds; CoreDNS's buckets
BUCKETS = tuple(0.00025 * 2**power for power in range(16))
#: Types that have a label value (CoreDNS's list); the rest are "other", so that clients cannot create series.
NAMED_TYPES = {
    **{kind.value: kind.name for kind in (Type.A, Type.AAAA, Type.MX, Type.SOA, Type.CNAME, Type.PTR, Type.TXT)},
    **{kind.value: kind.name for kind in (Type.NS, Type.SRV, Type.HTTPS, Type.IXFR, Type.AXFR, Type.ANY)},
    **{43: "DS", 48: "DNSKEY", 46: "RRSIG", 47: "NSEC", 50: "NSEC3"},
}
_RCODES = {rcode.value: rcode.name for rcode in Rcode}


def type_label(kind: int) -> str:
    """Return the label value of a record type."""
    return NAMED_TYPES.get(kind, "other")


@dataclass(slots=True)
class Histogram:
    """Durations in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count ``times`` events of this duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += times
        self.sum += seconds * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts, as prometheus_client takes them."""
        total, found = 0, []
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics:
    """All counters of one responder."""

    def __init__(self) -> None:
        #: (proto, family, type, rcode, source)
        self.answered: defaultdict[tuple[str, str, str, str, str], Cell] = defaultdict(lambda: [0])
        self.malformed: dict[str, Cell] = {reason: [0] for reason in REASONS}
        self.dropped: dict[str, Cell] = {reason: [0] for reason in DROP_REASONS}
        self.duration = {"memory": Histogram(), "forward": Histogram()}
        self.upstream_asked: defaultdict[str, Cell] = defaultdict(lambda: [0])
        self.upstream_failed: defaultdict[tuple[str, str], Cell] = defaultdict(lambda: [0])
        self.upstream_duration: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.forward_rejects: dict[str, Cell] = {reason: [0] for reason in REJECT_REASONS}
        self.mismatched: Cell = [0]
        self.coalesced: Cell = [0]
        self.reloads: Cell = [0]
        self.reload_errors: Cell = [0]
        self.reload_time = 0.0  # seconds since the epoch
        self.hosts_entries = 0
        self.hosts_unreadable = 0
        self.tcp_connections = 0
        self.tcp_closed: dict[str, Cell] = {reason: [0] for reason in CLOSE_REASONS}  # by the responder
        self.tcp_held_bytes = 0
        self.log_lost: Cell = [0]  # lines

    def cell(self, proto: str, family: str, kind: int, rcode: int, source: str) -> Cell:
        """Return the counter of one kind of response."""
        return self.answered[proto, family, type_label(kind), _RCODES.get(rcode, "other"), source]


class DnsCollector(Collector):
    """For a prometheus_client registry."""

    def __init__(self, metrics: Metrics, cache: Cache, in_flight: Callable[[], int]) -> None:
        self._metrics, self._cache, self._in_flight = metrics, cache, in_flight

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families."""
        yield from self._answers()
        yield from self._cache_families()
        yield from self._upstream()
        yield from self._rest()

    def _answers(self) -> Iterator[Metric]:
        requests: defaultdict[tuple[str, ...], int] = defaultdict(int)
        responses: defaultdict[tuple[str, ...], int] = defaultdict(int)
        for source in SOURCES:
            responses["NOERROR" if source != "error" else "SERVFAIL", source] += 0
        for (proto, family, kind, rcode, source), cell in list(self._metrics.answered.items()):
            requests[proto, family, kind] += cell[0]
            responses[rcode, source] += cell[0]
        yield _counter(
            "requests", "DNS queries that got a response, including REFUSED.", ("proto", "family", "type"), requests
        )
        yield _counter(
            "responses",
            "DNS responses by response code and source: hosts files, the configuration, the cache, an expired cache "
            "entry (stale), an upstream server (forward), or none of these (error).",
            ("rcode", "source"),
            responses,
        )
        yield _counter(
            "malformed",
            "Messages that are not a valid query, by problem.",
            ("reason",),
            {(reason,): cell[0] for reason, cell in self._metrics.malformed.items()},
        )
        yield _counter(
            "dropped",
            "Queries without a response: from a network or on an interface that is not served (policy), to a multicast "
            "or broadcast address (group), from port 0 (source), or sending failed (send).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in self._metrics.dropped.items()},
        )
        duration = HistogramMetricFamily(
            "udpwatch_dns_request_duration_seconds",
            "Time from receiving a query to sending its response, from memory or through an upstream server.",
            labels=["path"],
        )
        for path, histogram in self._metrics.duration.items():
            duration.add_metric([path], histogram.buckets(), histogram.sum)
        yield duration

    def _cache_families(self) -> Iterator[Metric]:
        counts = self._cache.counts
        memory_hits = sum(cell[0] for key, cell in list(self._metrics.answered.items()) if key[4] in ("cache", "stale"))
        yield _gauge("cache_entries", "Responses in the cache.", len(self._cache))
        yield _gauge("cache_bytes", "Approximate memory of the cache.", self._cache.bytes)
        yield _counter("cache_hits", "Queries answered from the cache.", (), {(): memory_hits})
        yield _counter("cache_misses", "Queries that the cache could not answer.", (), {(): counts.misses})
        yield _counter("cache_insertions", "Responses added to the cache.", (), {(): counts.insertions})
        yield _counter("cache_evictions", "Responses evicted from the cache.", (), {(): counts.evictions})
        yield _counter(
            "cache_served_stale", "Expired responses sent because no server responded.", (), {(): counts.stale}
        )

    def _upstream(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter(
            "upstream_requests",
            "Queries sent to an upstream server, including retries.",
            ("server",),
            {(server,): cell[0] for server, cell in list(metrics.upstream_asked.items())},
        )
        yield _counter(
            "upstream_failures",
            "Queries without a usable response from an upstream server, by reason. busy: too many responses over TCP "
            "were being read, or this process had no file or buffer left.",
            ("server", "reason"),
            {key: cell[0] for key, cell in list(metrics.upstream_failed.items())},
        )
        duration = HistogramMetricFamily(
            "udpwatch_dns_upstream_request_duration_seconds",
            "Time to an upstream server's response.",
            labels=["server"],
        )
        for server, histogram in list(metrics.upstream_duration.items()):
            duration.add_metric([server], histogram.buckets(), histogram.sum)
        yield duration
        yield _counter(
            "upstream_mismatched_responses",
            "Messages from upstream servers that do not match the query: another id or question, or malformed. Many of "
            "them suggest an attempt to forge responses.",
            (),
            {(): metrics.mismatched[0]},
        )
        yield _counter(
            "forward_rejects",
            "Queries that were not forwarded. Refused: too many in flight to the servers of a domain (servers) or to "
            "all (all), or replaced by a query of a client with fewer (shed). Dropped: repeated too often by one "
            "client (repeat), too many queued (queue), or too many queued of one client (queue_share).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in metrics.forward_rejects.items()},
        )
        yield _counter(
            "coalesced", "Queries that shared the response to the same query.", (), {(): metrics.coalesced[0]}
        )
        yield _gauge("in_flight", "Queries in flight to upstream servers.", self._in_flight())

    def _rest(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _gauge("hosts_entries", "Local names.", metrics.hosts_entries)
        yield _gauge(
            "hosts_reload_timestamp_seconds", "Unix time when the hosts files were last read.", metrics.reload_time
        )
        yield _counter("hosts_reloads", "Times that the hosts files were read.", (), {(): metrics.reloads[0]})
        yield _counter(
            "hosts_reload_errors",
            "Times that a hosts file could not be read and the previous names stayed in use.",
            (),
            {(): metrics.reload_errors[0]},
        )
        yield _gauge(
            "hosts_unreadable",
            "Hosts files that could not be read the last time. While this is not 0, changes do not take effect.",
            metrics.hosts_unreadable,
        )
        yield _gauge("tcp_connections", "Open TCP connections.", metrics.tcp_connections)
        yield _counter(
            "tcp_connections_closed",
            "TCP connections closed early: idle ones, to make room for another (room); of the client that held the "
            "most unread responses when their memory was full (held); of a client that took no response for 10 s "
            "(slow).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in metrics.tcp_closed.items()},
        )
        yield _gauge("tcp_held_bytes", "Responses held for slow TCP clients.", metrics.tcp_held_bytes)
        yield _counter(
            "log_lines_lost",
            "Log lines of `udpwatch dns` that were not written: too many at once, or the file or syslog failed.",
            (),
            {(): metrics.log_lost[0]},
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"udpwatch_dns_{name}", text, value=value)


def _counter(name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(f"udpwatch_dns_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
