"""The DNS responder: what is asked, how fast it is answered, and whether its upstream servers do."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import BLUE, ORANGE, RED, RESPONDER, SCOPE, WHERE, WHERE_LEGEND, board, increase, lines, number, rate

DNS = "udpwatch_dns_"
QUANTILES = (0.5, 0.9, 0.99)


def of(name: str, matchers: str = "") -> str:
    """A metric of the responder's, of the chosen nodes."""
    return f"{DNS}{name}{{{SCOPE}{', ' if matchers else ''}{matchers}}}"


def quantile(share: float, histogram: str, by: str, matchers: str = "") -> str:
    """Of a histogram, over the rate's window."""
    return f"histogram_quantile({share}, sum by (le{by}) ({rate(of(f'{histogram}_bucket', matchers))}))"


def failing(by: str, over: str) -> str:
    """The share of questions to an upstream server without a usable answer; 0 where it never failed."""
    asked = f"sum by ({by}) ({over.format(of('upstream_requests_total'))})"
    return f"(sum by ({by}) ({over.format(of('upstream_failures_total'))}) or 0 * {asked}) / ({asked} > 0)"


def dashboard() -> Dashboard:
    """Built anew at each call."""
    rate_of = "rate({}[$__rate_interval])"
    over_ipv4, over_ipv6 = (of("requests_total", f'family="{family}"') for family in (1, 2))
    answers, servfail = of("responses_total"), of("responses_total", 'rcode="SERVFAIL"')
    return board(
        RESPONDER,
        "udpwatch / DNS",
        "The responder that answers the nodes' DNS queries: udpwatch run --dns, or udpwatch dns.",
        number("Questions", "Questions a second that were answered.", f"sum({rate(of('requests_total'))})", "reqps"),
        number(
            "Failed answers",
            "Share of SERVFAIL among the answers: no upstream server gave a usable one, nor did the cache.",
            f"sum({rate(servfail)}) / (sum({rate(answers)}) > 0)",
            "percentunit",
            [(0.01, ORANGE), (0.05, RED)],
        ),
        number(
            "Upstream failures",
            "Share of the questions to upstream servers, retries included, without a usable answer. Clients notice "
            "only once all servers fail.",
            failing("", rate_of),
            "percentunit",
            [(0.05, ORANGE), (0.5, RED)],
        ),
        number(
            "From memory within",
            "Time within which 99 % of the answers from hosts files, configuration and cache leave. From some "
            "milliseconds on the node has too little CPU.",
            quantile(0.99, "request_duration_seconds", "", 'path="memory"'),
            "s",
            [(0.01, ORANGE), (0.1, RED)],
        ),
        number(
            "From upstream within",
            "Time within which 99 % of the answers that had to be asked for upstream leave, retries included. "
            "Clients give up after 5 seconds.",
            quantile(0.99, "request_duration_seconds", "", 'path="forward"'),
            "s",
            [(1, ORANGE), (4, RED)],
        ),
        number(
            "Cache hits",
            "Share of the questions for the cache that it could answer.",
            f"sum({rate(of('cache_hits_total'))}) / (sum({rate(of('cache_hits_total'))})"
            f" + sum({rate(of('cache_misses_total'))}) > 0)",
            "percentunit",
            base=BLUE,
        ),
        Row("Questions and answers"),
        lines(
            "Questions by type",
            "Types that are rare count as other.",
            "reqps",
            (f"sum by (type) ({rate(of('requests_total'))})", "{{type}}"),
            stacked=True,
        ),
        lines(
            "Questions by node",
            "Over UDP and TCP, IPv4 and IPv6.",
            "reqps",
            (f"sum by ({WHERE}) ({rate(of('requests_total'))})", WHERE_LEGEND),
            stacked=True,
        ),
        lines(
            "Questions by transport",
            "Much TCP: answers too large for UDP.",
            "reqps",
            (f"sum by (proto) ({rate(over_ipv4)})", "{{proto}}, IPv4"),
            (f"sum by (proto) ({rate(over_ipv6)})", "{{proto}}, IPv6"),
            stacked=True,
        ),
        lines(
            "Answers by code",
            "SERVFAIL: no usable answer was to be had. REFUSED: nobody is there to ask, too many questions were under "
            "way, or it was one that is never answered. NXDOMAIN is an answer like any other.",
            "reqps",
            (f"sum by (rcode) ({rate(answers)})", "{{rcode}}"),
            stacked=True,
        ),
        lines(
            "Answers by origin",
            "stale: expired answers, given since no upstream server answered. error: answers made up for want of one.",
            "reqps",
            (f"sum by (source) ({rate(answers)})", "{{source}}"),
            stacked=True,
        ),
        lines(
            "Not answered",
            "policy: from a network that is not served. group: asked at a multicast or broadcast address. source: from "
            "port 0. send: the answer could not be sent. malformed: no proper query, by what was wrong with it.",
            "reqps",
            (f"sum by (reason) ({rate(of('dropped_total'))}) > 0", "{{reason}}"),
            (f"sum by (reason) ({rate(of('malformed_total'))}) > 0", "malformed: {{reason}}"),
            stacked=True,
        ),
        Row("Latency"),
        lines(
            "From memory",
            "From reading a question to sending its answer, from hosts files, configuration and cache.",
            "s",
            *(
                (quantile(share, "request_duration_seconds", "", 'path="memory"'), f"{share:.0%}")
                for share in QUANTILES
            ),
        ),
        lines(
            "From upstream",
            "The same, where an upstream server had to be asked.",
            "s",
            *(
                (quantile(share, "request_duration_seconds", "", 'path="forward"'), f"{share:.0%}")
                for share in QUANTILES
            ),
        ),
        Row("Upstream servers"),
        lines(
            "Failures by server",
            "Share of the questions to a server without a usable answer. At 100 % it is dead, or not a DNS server.",
            "percentunit",
            (failing("server", rate_of), "{{server}}"),
            steps=[(0.5, RED)],
            top=1,
        ),
        lines(
            "Failures by reason",
            "timeout: no answer. network: the way to it is broken. refused: SERVFAIL, REFUSED and their like. "
            "truncated, malformed: an answer that cannot be used.",
            "reqps",
            (f"sum by (server, reason) ({rate(of('upstream_failures_total'))}) > 0", "{{server}}: {{reason}}"),
            stacked=True,
        ),
        lines(
            "Time to answer, by server",
            "Within this time a server gave 99 % of its answers.",
            "s",
            (quantile(0.99, "upstream_request_duration_seconds", ", server"), "{{server}}"),
        ),
        lines(
            "Questions by server",
            "Retries included.",
            "reqps",
            (f"sum by (server) ({rate(of('upstream_requests_total'))})", "{{server}}"),
            stacked=True,
        ),
        lines(
            "Under way",
            "Questions that wait for an upstream server, and those that joined one that was under way already. "
            "refused: too many at once, --dns-forward-max is too low or the servers are too slow.",
            "short",
            (f"sum({of('in_flight')})", "under way"),
            (f"sum({rate(of('coalesced_total'))})", "joined, a second"),
            (f"sum({rate(of('forward_rejects_total'))})", "refused, a second"),
        ),
        lines(
            "Answers to something else",
            "Messages from outside that answered no question of ours. Many of them: somebody tries to forge answers.",
            "reqps",
            (f"sum by ({WHERE}) ({rate(of('upstream_mismatched_responses_total'))}) > 0", WHERE_LEGEND),
        ),
        Row("Cache"),
        lines(
            "Hits and misses",
            "stale: expired answers that were given since no server answered.",
            "reqps",
            (f"sum({rate(of('cache_hits_total'))})", "hits"),
            (f"sum({rate(of('cache_misses_total'))})", "misses"),
            (f"sum({rate(of('cache_served_stale_total'))})", "stale"),
        ),
        lines(
            "Answers kept",
            "When answers are pushed out all the time, --cache-size is too small.",
            "short",
            (f"sum by ({WHERE}) ({of('cache_entries')})", f"kept, {WHERE_LEGEND}"),
            (f"sum({rate(of('cache_insertions_total'))})", "put in, a second"),
            (f"sum({rate(of('cache_evictions_total'))})", "pushed out, a second"),
        ),
        lines(
            "Memory",
            "What the kept answers take, about.",
            "bytes",
            (f"sum by ({WHERE}) ({of('cache_bytes')})", WHERE_LEGEND),
        ),
        lines(
            "TCP",
            "Open connections. closed: idle ones closed early to make room, a second.",
            "short",
            (f"sum by ({WHERE}) ({of('tcp_connections')})", f"open, {WHERE_LEGEND}"),
            (f"sum({rate(of('tcp_connections_closed_total'))})", "closed"),
        ),
        Row("Local names"),
        number(
            "Local names",
            "Names from hosts files and configuration, on the node that has most.",
            f"max({of('hosts_entries')})",
            base=BLUE,
            width=6,
        ),
        number(
            "Read since",
            "When the node that is furthest behind last read its hosts files.",
            f"1000 * min({of('hosts_reload_timestamp_seconds')})",
            "dateTimeFromNow",
            base=BLUE,
            width=6,
        ),
        number(
            "Times read",
            "How often hosts files were read anew within the time chosen above, by all nodes.",
            f"sum({increase(of('hosts_reloads_total'))})",
            base=BLUE,
            width=6,
            decimals=0,
        ),
        number(
            "Unreadable files",
            "Hosts files that could not be read at the last reading, on all nodes; the table before stays in force.",
            f"sum({of('hosts_unreadable')})",
            steps=[(1, RED)],
            width=6,
        ),
        metric="udpwatch_dns_hosts_entries",
    )
