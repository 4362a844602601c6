"""The responder's own figures: counted where things happen, rendered at a scrape.

A counter here is a list of one number: the thread that answers from memory keeps hold of it, and adds. The GIL makes
`cell[0] += n` by one thread at a time good enough, and each cell of the fast path belongs to one thread.
"""

from __future__ import annotations

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
#: why a question was not forwarded; docs/metrics.md says what each means
REJECT_REASONS = ("servers", "all", "shed", "repeat", "queue", "queue_share")
#: why a TCP connection was closed early
CLOSE_REASONS = ("room", "held", "slow")
#: seconds; CoreDNS's buckets
BUCKETS = tuple(0.00025 * 2**power for power in range(16))
#: types that may be a label (CoreDNS's list); the rest is "other", so that no client makes series
NAMED_TYPES = {
    **{kind.value: kind.name for kind in (Type.A, Type.AAAA, Type.MX, Type.SOA, Type.CNAME, Type.PTR, Type.TXT)},
    **{kind.value: kind.name for kind in (Type.NS, Type.SRV, Type.HTTPS, Type.IXFR, Type.AXFR, Type.ANY)},
    **{43: "DS", 48: "DNSKEY", 46: "RRSIG", 47: "NSEC", 50: "NSEC3"},
}
_RCODES = {rcode.value: rcode.name for rcode in Rcode}


def type_label(kind: int) -> str:
    """A record type as a label."""
    return NAMED_TYPES.get(kind, "other")


@dataclass(slots=True)
class Histogram:
    """Durations in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """``times`` events that each took this long."""
        at = 0
        while at < len(BUCKETS) and seconds > BUCKETS[at]:
            at += 1
        self.counts[at] += times
        self.sum += seconds * times

    def buckets(self) -> list[tuple[str, float]]:
        """As prometheus_client takes them."""
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
        self.tcp_closed: dict[str, Cell] = {reason: [0] for reason in CLOSE_REASONS}  # by us
        self.tcp_held_bytes = 0

    def cell(self, proto: str, family: str, kind: int, rcode: int, source: str) -> Cell:
        """The counter of one kind of answer."""
        return self.answered[proto, family, type_label(kind), _RCODES.get(rcode, "other"), source]


class DnsCollector(Collector):
    """For a prometheus_client registry."""

    def __init__(self, metrics: Metrics, cache: Cache, in_flight: Callable[[], int]) -> None:
        self._metrics, self._cache, self._in_flight = metrics, cache, in_flight

    def collect(self) -> Iterator[Metric]:
        """The families, all of one moment."""
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
            "requests", "DNS questions that were answered, if by a refusal.", ("proto", "family", "type"), requests
        )
        yield _counter(
            "responses",
            "DNS answers by response code and by where they came from: hosts files, the configuration, the cache, an "
            "expired answer of the cache (stale), an upstream server (forward), or nowhere (error).",
            ("rcode", "source"),
            responses,
        )
        yield _counter(
            "malformed",
            "Messages that were no proper query, by what was wrong with them.",
            ("reason",),
            {(reason,): cell[0] for reason, cell in self._metrics.malformed.items()},
        )
        yield _counter(
            "dropped",
            "Questions that got no answer: from networks that are not served (policy), asked at a group's address "
            "(group), from port 0 (source), or sending failed (send).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in self._metrics.dropped.items()},
        )
        duration = HistogramMetricFamily(
            "udpwatch_dns_request_duration_seconds",
            "Time from reading a question to sending its answer, from memory or by way of an upstream server.",
            labels=["path"],
        )
        for path, histogram in self._metrics.duration.items():
            duration.add_metric([path], histogram.buckets(), histogram.sum)
        yield duration

    def _cache_families(self) -> Iterator[Metric]:
        statistics = self._cache.counts
        memory_hits = sum(cell[0] for key, cell in list(self._metrics.answered.items()) if key[4] in ("cache", "stale"))
        yield _gauge("cache_entries", "Answers in the cache.", len(self._cache))
        yield _gauge("cache_bytes", "Memory that they take, about.", self._cache.bytes)
        yield _counter("cache_hits", "Questions answered from the cache.", (), {(): memory_hits})
        yield _counter("cache_misses", "Questions that it had no answer for.", (), {(): statistics.misses})
        yield _counter("cache_insertions", "Answers put into it.", (), {(): statistics.insertions})
        yield _counter("cache_evictions", "Answers pushed out by newer ones.", (), {(): statistics.evictions})
        yield _counter(
            "cache_served_stale", "Expired answers given since no server answered.", (), {(): statistics.stale}
        )

    def _upstream(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter(
            "upstream_requests",
            "Questions sent to an upstream server, retries included.",
            ("server",),
            {(server,): cell[0] for server, cell in list(metrics.upstream_asked.items())},
        )
        yield _counter(
            "upstream_failures",
            "Questions that an upstream server did not answer, by what happened; busy: too many long answers (TCP) "
            "were under way here.",
            ("server", "reason"),
            {key: cell[0] for key, cell in list(metrics.upstream_failed.items())},
        )
        duration = HistogramMetricFamily(
            "udpwatch_dns_upstream_request_duration_seconds", "Time to an upstream server's answer.", labels=["server"]
        )
        for server, histogram in list(metrics.upstream_duration.items()):
            duration.add_metric([server], histogram.buckets(), histogram.sum)
        yield duration
        yield _counter(
            "upstream_mismatched_responses",
            "Messages that came back but answered something else: another id, question, or nonsense. Many of them: "
            "somebody tries to forge answers.",
            (),
            {(): metrics.mismatched[0]},
        )
        yield _counter(
            "forward_rejects",
            "Questions that were not forwarded. Refused: too many under way to the servers of a domain (servers) or to "
            "all (all), and the client had as many as any; given up for a client with fewer (shed). Dropped: repeated "
            "too often by one client (repeat), too many for the event loop (queue), or too many of one client for it "
            "(queue_share).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in metrics.forward_rejects.items()},
        )
        yield _counter(
            "coalesced", "Questions that waited for the answer to the same question.", (), {(): metrics.coalesced[0]}
        )
        yield _gauge("in_flight", "Questions under way to upstream servers.", self._in_flight())

    def _rest(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _gauge("hosts_entries", "Names in the table of local names.", metrics.hosts_entries)
        yield _gauge(
            "hosts_reload_timestamp_seconds", "When the table was last read, seconds since 1970.", metrics.reload_time
        )
        yield _counter("hosts_reloads", "Times that it was read anew.", (), {(): metrics.reloads[0]})
        yield _counter(
            "hosts_reload_errors",
            "Times that a file could not be read: the table before stayed in force.",
            (),
            {(): metrics.reload_errors[0]},
        )
        yield _gauge(
            "hosts_unreadable",
            "Files that could not be read at the last reading: while it is not 0, changes do not arrive.",
            metrics.hosts_unreadable,
        )
        yield _gauge("tcp_connections", "Open TCP connections.", metrics.tcp_connections)
        yield _counter(
            "tcp_connections_closed",
            "TCP connections closed early: idle, to make room for others (room); its client had most of the memory for "
            "responses that wait for their clients, and that was full (held); it took no response for 10 s (slow).",
            ("reason",),
            {(reason,): cell[0] for reason, cell in metrics.tcp_closed.items()},
        )
        yield _gauge("tcp_held_bytes", "Responses that wait for slow TCP clients to take them.", metrics.tcp_held_bytes)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"udpwatch_dns_{name}", text, value=value)


def _counter(name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(f"udpwatch_dns_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
