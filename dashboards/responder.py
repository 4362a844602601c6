"""The DNS dashboard: queries, latency, upstream servers and cache of the responder."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import BLUE, ORANGE, RED, RESPONDER, SCOPE, WHERE, WHERE_LEGEND, board, increase, lines, number, rate

DNS = "udpwatch_dns_"
QUANTILES = (0.5, 0.9, 0.99)


def of(name: str, matchers: str = "") -> str:
    """Return the selector of a responder metric for the selected nodes."""
    return f"{DNS}{name}{{{SCOPE}{', ' if matchers else ''}{matchers}}}"


def quantile(share: float, histogram: str, by: str, matchers: str = "") -> str:
    """Return a quantile of a histogram over the rate's window."""
    return f"histogram_quantile({share}, sum by (le{by}) ({rate(of(f'{histogram}_bucket', matchers))}))"


def failing(by: str, over: str) -> str:
    """Return the share of queries to an upstream server without a usable response; 0 if it never failed."""
    asked = f"sum by ({by}) ({over.format(of('upstream_requests_total'))})"
    return f"(sum by ({by}) ({over.format(of('upstream_failures_total'))}) or 0 * {asked}) / ({asked} > 0)"


def dashboard() -> Dashboard:
    """Return the DNS dashboard."""
    rate_of = "rate({}[$__rate_interval])"
    over_ipv4, over_ipv6 = (of("requests_total", f'family="{family}"') for family in (1, 2))
    answers, servfail = of("responses_total"), of("responses_total", 'rcode="SERVFAIL"')
    return board(
        RESPONDER,
        "udpwatch / DNS",
        "The DNS responder: udpwatch run --dns, or udpwatch dns.",
        number("Queries", "Queries per second that got a response.", f"sum({rate(of('requests_total'))})", "reqps"),
        number(
            "Failed responses",
            "Share of SERVFAIL among the responses: neither an upstream server nor the cache had a usable one.",
            f"sum({rate(servfail)}) / (sum({rate(answers)}) > 0)",
            "percentunit",
            [(0.01, ORANGE), (0.05, RED)],
        ),
        number(
            "Upstream failures",
            "Share of the queries to upstream servers, retries included, without a usable response. Clients notice "
            "only if all servers fail.",
            failing("", rate_of),
            "percentunit",
            [(0.05, ORANGE), (0.5, RED)],
        ),
        number(
            "Latency from memory",
            "99 % of the responses from hosts files, configuration and cache take less than this. More than a few "
            "milliseconds mean that the node has too little CPU.",
            quantile(0.99, "request_duration_seconds", "", 'path="memory"'),
            "s",
            [(0.01, ORANGE), (0.1, RED)],
        ),
        number(
            "Latency from upstream",
            "99 % of the responses that needed an upstream server take less than this, retries included. Clients give "
            "up after 5 seconds.",
            quantile(0.99, "request_duration_seconds", "", 'path="forward"'),
            "s",
            [(1, ORANGE), (4, RED)],
        ),
        number(
            "Cache hits",
            "Share of the cache lookups that found a response.",
            f"sum({rate(of('cache_hits_total'))}) / (sum({rate(of('cache_hits_total'))})"
            f" + sum({rate(of('cache_misses_total'))}) > 0)",
            "percentunit",
            base=BLUE,
        ),
        Row("Queries and responses"),
        lines(
            "Queries by type",
            "Rare types are counted as other.",
            "reqps",
            (f"sum by (type) ({rate(of('requests_total'))})", "{{type}}"),
            stacked=True,
        ),
        lines(
            "Queries by node",
            "Over UDP and TCP, IPv4 and IPv6.",
            "reqps",
            (f"sum by ({WHERE}) ({rate(of('requests_total'))})", WHERE_LEGEND),
            stacked=True,
        ),
        lines(
            "Queries by transport",
            "Many queries over TCP mean that responses are too large for UDP.",
            "reqps",
            (f"sum by (proto) ({rate(over_ipv4)})", "{{proto}}, IPv4"),
            (f"sum by (proto) ({rate(over_ipv6)})", "{{proto}}, IPv6"),
            stacked=True,
        ),
        lines(
            "Responses by code",
            "SERVFAIL: no usable response was available. REFUSED: there is no upstream server, too many queries were "
            "in flight, or the responder never answers such a query. NXDOMAIN is a normal response.",
            "reqps",
            (f"sum by (rcode) ({rate(answers)})", "{{rcode}}"),
            stacked=True,
        ),
        lines(
            "Responses by source",
            "stale: expired, sent because no upstream server responded. error: made by the responder itself.",
            "reqps",
            (f"sum by (source) ({rate(answers)})", "{{source}}"),
            stacked=True,
        ),
        lines(
            "Queries without a response",
            "policy: from a network that is not served. group: sent to a multicast or broadcast address. source: from "
            "port 0. send: sending the response failed. malformed: not a valid query, by reason.",
            "reqps",
            (f"sum by (reason) ({rate(of('dropped_total'))}) > 0", "{{reason}}"),
            (f"sum by (reason) ({rate(of('malformed_total'))}) > 0", "malformed: {{reason}}"),
            stacked=True,
        ),
        Row("Latency"),
        lines(
            "From memory",
            "Time from receiving a query to sending its response, from hosts files, configuration and cache.",
            "s",
            *(
                (quantile(share, "request_duration_seconds", "", 'path="memory"'), f"{share:.0%}")
                for share in QUANTILES
            ),
        ),
        lines(
            "From upstream",
            "Time from receiving a query to sending its response, if an upstream server was asked.",
            "s",
            *(
                (quantile(share, "request_duration_seconds", "", 'path="forward"'), f"{share:.0%}")
                for share in QUANTILES
            ),
        ),
        Row("Upstream servers"),
        lines(
            "Failures by server",
            "Share of the queries to a server without a usable response. At 100 % it is down, or not a DNS server.",
            "percentunit",
            (failing("server", rate_of), "{{server}}"),
            steps=[(0.5, RED)],
            top=1,
        ),
        lines(
            "Failures by reason",
            "timeout: no response. network: the server cannot be reached. refused: SERVFAIL, REFUSED and similar. "
            "truncated, malformed: the response cannot be used. busy: too many TCP responses were in flight here.",
            "reqps",
            (f"sum by (server, reason) ({rate(of('upstream_failures_total'))}) > 0", "{{server}}: {{reason}}"),
            stacked=True,
        ),
        lines(
            "Response time by server",
            "99 % of a server's responses take less than this.",
            "s",
            (quantile(0.99, "upstream_request_duration_seconds", ", server"), "{{server}}"),
        ),
        lines(
            "Queries by server",
            "Queries sent to each upstream server, retries included.",
            "reqps",
            (f"sum by (server) ({rate(of('upstream_requests_total'))})", "{{server}}"),
            stacked=True,
        ),
        lines(
            "In flight",
            "Queries that wait for an upstream server, and queries that joined an identical one. refused: too many at "
            "once, so --dns-forward-max is too low or the servers are too slow.",
            "short",
            (f"sum({of('in_flight')})", "in flight"),
            (f"sum({rate(of('coalesced_total'))})", "joined per second"),
            (f"sum({rate(of('forward_rejects_total'))})", "refused per second"),
        ),
        lines(
            "Mismatched responses",
            "Messages that match no query. Many of them suggest an attempt to forge responses.",
            "reqps",
            (f"sum by ({WHERE}) ({rate(of('upstream_mismatched_responses_total'))}) > 0", WHERE_LEGEND),
        ),
        Row("Cache"),
        lines(
            "Hits and misses",
            "stale: expired responses sent because no upstream server responded.",
            "reqps",
            (f"sum({rate(of('cache_hits_total'))})", "hits"),
            (f"sum({rate(of('cache_misses_total'))})", "misses"),
            (f"sum({rate(of('cache_served_stale_total'))})", "stale"),
        ),
        lines(
            "Cached responses",
            "If responses are evicted constantly, --cache-size is too small.",
            "short",
            (f"sum by ({WHERE}) ({of('cache_entries')})", f"cached, {WHERE_LEGEND}"),
            (f"sum({rate(of('cache_insertions_total'))})", "inserted per second"),
            (f"sum({rate(of('cache_evictions_total'))})", "evicted per second"),
        ),
        lines(
            "Memory",
            "Approximate memory of the cached responses.",
            "bytes",
            (f"sum by ({WHERE}) ({of('cache_bytes')})", WHERE_LEGEND),
        ),
        lines(
            "TCP",
            "Open connections. closed: connections closed early, per second.",
            "short",
            (f"sum by ({WHERE}) ({of('tcp_connections')})", f"open, {WHERE_LEGEND}"),
            (f"sum({rate(of('tcp_connections_closed_total'))})", "closed"),
        ),
        Row("Local names"),
        number(
            "Local names",
            "Names from hosts files and configuration, on the node with the most.",
            f"max({of('hosts_entries')})",
            base=BLUE,
            width=6,
        ),
        number(
            "Oldest reload",
            "The earliest of the nodes' last reloads of the hosts files.",
            f"1000 * min({of('hosts_reload_timestamp_seconds')})",
            "dateTimeFromNow",
            base=BLUE,
            width=6,
        ),
        number(
            "Reloads",
            "Reloads of the hosts files within the selected time, on all nodes.",
            f"sum({increase(of('hosts_reloads_total'))})",
            base=BLUE,
            width=6,
            decimals=0,
        ),
        number(
            "Unreadable files",
            "Hosts files that could not be read at the last reload, on all nodes. The previous table stays in use.",
            f"sum({of('hosts_unreadable')})",
            steps=[(1, RED)],
            width=6,
        ),
        metric="udpwatch_dns_hosts_entries",
    )
