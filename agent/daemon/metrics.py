"""Prometheus metrics: one Snapshot, one scrape, so that all numbers of a scrape belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from udpwatch.agent.model import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MISMATCH_LABELS = ("process", "port", "expected", "actual", "verdict", "cause", "namespace", "pod", "container")
OTHER = "other"


class SnapshotCollector(Collector):
    """The agent's metrics, for a registry."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All families, of one snapshot."""
        return families(self._snapshot())


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """The metric families of one snapshot."""
    wrong = CounterMetricFamily(
        "udpwatch_reply_source_mismatch",
        "UDP replies that left this node from another address (actual) than the one the client asked (expected). "
        "The client does not get them: it waits for the other address. Past the limit of series all labels but the "
        "namespace are 'other'.",
        labels=MISMATCH_LABELS,
    )
    for row in snapshot.rows:
        sender = row.sender
        labels = (sender.process, str(row.port), row.expected, row.actual, row.verdict, row.cause)
        wrong.add_metric([*labels, sender.namespace, sender.pod, sender.container], row.count)
    others = {OTHER: 0}
    for namespace, count in snapshot.other_of.items():
        others[namespace or OTHER] = others.get(namespace or OTHER, 0) + count
    for namespace, count in others.items():
        wrong.add_metric([namespace if name == "namespace" else OTHER for name in MISMATCH_LABELS], count)
    yield wrong

    yield CounterMetricFamily(
        "udpwatch_replies_checked",
        "UDP datagrams sent to a peer that had asked this node before, right and wrong ones.",
        value=snapshot.checked,
    )
    lost = CounterMetricFamily(
        "udpwatch_events_lost",
        "What was not delivered, by the stage that lost it. Counts of wrong replies stay exact in spite of it.",
        labels=["stage"],
    )
    for stage, count in snapshot.lost.items():
        lost.add_metric([stage], count)
    yield lost

    attached = GaugeMetricFamily(
        "udpwatch_probe_attached",
        "1 if the kernel says that this program is attached, 0 if not: then udpwatch is blind there.",
        labels=["probe"],
    )
    reattached = CounterMetricFamily(
        "udpwatch_probe_reattached",
        "Times that this program had been detached by somebody else and was attached again.",
        labels=["probe"],
    )
    seconds = CounterMetricFamily(
        "udpwatch_probe_run_seconds",
        "Time spent in this program; stays 0 unless the sysctl kernel.bpf_stats_enabled is 1.",
        labels=["probe"],
    )
    runs = CounterMetricFamily(
        "udpwatch_probe_runs",
        "Runs of this program; stays 0 unless the sysctl kernel.bpf_stats_enabled is 1.",
        labels=["probe"],
    )
    missed = CounterMetricFamily(
        "udpwatch_probe_missed",
        "Runs of this function probe that the kernel left out, since the CPU was in a probe already; stays 0 on "
        "kernels that do not count them.",
        labels=["probe"],
    )
    for probe in snapshot.probes:
        attached.add_metric([probe.name], int(probe.attached))
        reattached.add_metric([probe.name], probe.reattached)
        seconds.add_metric([probe.name], probe.run_seconds)
        runs.add_metric([probe.name], probe.runs)
        if probe.how:
            missed.add_metric([probe.name], probe.missed)
    yield from (attached, reattached, seconds, runs, missed)

    yield GaugeMetricFamily(
        "udpwatch_self_test_passed",
        "1 if the programs saw the last datagram that the agent sent itself over loopback (once a minute), 0 if not: "
        "then udpwatch is blind. In mode 'function', and for an agent outside the cgroup that it watches: 1 if the "
        "kernel says that they are attached.",
        value=int(snapshot.self_test_passed),
    )
    if snapshot.udp_sent is not None:
        yield CounterMetricFamily(
            "udpwatch_udp_sent_datagrams",
            "UDP datagrams sent in the agent's network namespace, by the kernel's own count: if it grows and "
            "udpwatch_replies_checked_total does not, udpwatch is blind, unless its mode is 'function': then no reply "
            "is checked, only flows.",
            value=snapshot.udp_sent,
        )

    yield CounterMetricFamily(
        "udpwatch_flows_checked",
        "New UDP flows booked by conntrack in which wrong replies of other machines were looked for; stays 0 where "
        "they are not looked for (udpwatch doctor).",
        value=snapshot.flows,
    )
    yield from _conntrack(snapshot)
    yield GaugeMetricFamily(
        "udpwatch_tracked_peers",
        "Conversations (peer, peer port, local port) that asked something within the window.",
        value=snapshot.tracked_peers,
    )
    yield CounterMetricFamily(
        "udpwatch_peers_evicted",
        "Requests that had to make room within the window, of the server port that has the most first. Replies to them "
        "count as undecided; if udpwatch_events_lost_total{stage='undecided'} grows too, raise max_peers.",
        value=snapshot.evicted_peers,
    )
    info = GaugeMetricFamily(
        "udpwatch_build_info",
        "Always 1. mode tells how conntrack is read: 'packet', or 'netlink' where the kernel forbids that; 'function' "
        "is by conntrack's new flows alone.",
        labels=["version", "kernel", "mode"],
    )
    info.add_metric([snapshot.version, snapshot.kernel, snapshot.mode], 1)
    yield info


def _conntrack(snapshot: Snapshot) -> Iterator[Metric]:
    """Absent where conntrack is not loaded."""
    health = snapshot.conntrack
    if health is None:
        return
    yield GaugeMetricFamily(
        "udpwatch_conntrack_entries",
        "Conntrack entries in the agent's network namespace. At the limit new UDP flows are dropped.",
        value=health.entries,
    )
    yield GaugeMetricFamily(
        "udpwatch_conntrack_limit",
        "Conntrack entries allowed there (net.netfilter.nf_conntrack_max).",
        value=health.limit,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_insert_failed",
        "New flows whose packet was dropped since another packet had booked the same flow: UDP clients that send two "
        "questions at once from one socket lose one (two DNS questions, for A and AAAA, are the usual case). Or since "
        "the table has too few buckets (net.netfilter.nf_conntrack_buckets).",
        value=health.insert_failed,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_dropped",
        "Packets dropped since conntrack could not book their flow: its table was full, memory was short, or another "
        "packet had booked the same flow (udpwatch_conntrack_insert_failed_total counts that, too). The table is full "
        "only if udpwatch_conntrack_entries is at the limit.",
        value=health.dropped,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_early_drop",
        "Entries not yet answered that were thrown out for new ones, since the table was full.",
        value=health.early_dropped,
    )


def exposition(*collectors: Collector, process: bool = True) -> Callable[[], bytes]:
    """A function that renders what the collectors have now in the Prometheus text format.

    With ``process`` the process_* metrics of this process (memory, CPU time, descriptors) come along.
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    if process:
        ProcessCollector(registry=registry)
    return lambda: generate_latest(registry)
