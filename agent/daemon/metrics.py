"""Prometheus metrics. A scrape renders one Snapshot, so all its numbers belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from udpwatch.agent.model import REFUSALS, Server, ServerTotals, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MISMATCH_LABELS = ("process", "port", "expected", "actual", "verdict", "cause", "namespace", "pod", "container")
HEALED_LABELS = ("process", "port", "asked", "namespace", "pod", "container")
SERVER_LABELS = ("process", "port", "namespace", "pod", "container")
SERVER_COUNTERS = {
    "requests": "UDP datagrams that this server's port received. Beyond the limit of servers, all labels except "
    "namespace are 'other'.",
    "replies": "UDP datagrams that this server sent to peers that had asked.",
    "unanswered": "Requests that got no datagram within the window, or before the peer asked again a second or more "
    "later, or a wrong reply only. Quicker repetitions are not counted.",
    "receive_drops": "UDP datagrams that the kernel dropped because the server's receive buffer was full, or the "
    "checksum was wrong; stays 0 where the server's sockets cannot be read.",
}
OTHER = "other"


class SnapshotCollector(Collector):
    """The agent's metrics, for a registry."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families, from one snapshot."""
        return families(self._snapshot())


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metric families of one snapshot."""
    yield _wrong_replies(snapshot)
    yield CounterMetricFamily(
        "udpwatch_replies_checked",
        "UDP replies compared with the address that the client asked, right and wrong ones.",
        value=snapshot.checked,
    )
    yield from _healing(snapshot)
    yield from _servers(snapshot)
    yield _lost(snapshot)
    yield from _probes(snapshot)
    yield from _self_checks(snapshot)
    yield from _node(snapshot)
    yield CounterMetricFamily(
        "udpwatch_flows_checked",
        "New UDP flows of conntrack that were checked for wrong replies of machines behind this node; stays 0 if "
        "this check is off (see udpwatch doctor).",
        value=snapshot.flows,
    )
    yield from _conntrack(snapshot)
    yield from _conversations(snapshot)
    info = GaugeMetricFamily(
        "udpwatch_build_info",
        "Always 1. mode is how conntrack is read: 'packet', 'netlink' if the kernel does not allow 'packet', "
        "'function' if only new flows are watched, or 'replay' for a recording.",
        labels=["version", "kernel", "mode"],
    )
    info.add_metric([snapshot.version, snapshot.kernel, snapshot.mode], 1)
    yield info


def _wrong_replies(snapshot: Snapshot) -> Metric:
    wrong = CounterMetricFamily(
        "udpwatch_reply_source_mismatch",
        "UDP replies that left this node from a different address (actual) than the one the client asked (expected). "
        "Most clients do not get them, because they wait for a reply from the expected address. Beyond the limit of "
        "series, all labels except namespace are 'other'.",
        labels=MISMATCH_LABELS,
    )
    for row in snapshot.wrong_rows:
        sender = row.sender
        labels = (sender.process, str(row.port), row.expected, row.actual, row.verdict, row.cause)
        wrong.add_metric([*labels, sender.namespace, sender.pod, sender.container], row.count)
    _add_others(wrong, MISMATCH_LABELS, snapshot.other_of)
    return wrong


def _add_others(family: CounterMetricFamily, names: tuple[str, ...], by_namespace: Mapping[str, int]) -> None:
    """Add what is beyond the limit of series: one series for each namespace, and one that exists at 0."""
    others = {OTHER: 0}
    for namespace, count in by_namespace.items():
        others[namespace or OTHER] = others.get(namespace or OTHER, 0) + count
    for namespace, count in others.items():
        family.add_metric([namespace if name == "namespace" else OTHER for name in names], count)


def _healing(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what was healed and what was not; if nothing is to be healed, only the counters of both, at 0."""
    healed = CounterMetricFamily(
        "udpwatch_healed_replies",
        "UDP replies whose source udpwatch set to the address that the client asked. The server still needs its fix: "
        "without udpwatch it replies from an address that routing chooses. Beyond the limit of series, all labels "
        "except namespace are 'other'.",
        labels=HEALED_LABELS,
    )
    for row in snapshot.healed_rows:
        sender = row.sender
        names = (sender.namespace, sender.pod, sender.container)
        healed.add_metric([sender.process, str(row.port), row.expected, *names], row.count)
    _add_others(healed, HEALED_LABELS, snapshot.other_healed)
    yield healed
    refused = CounterMetricFamily(
        "udpwatch_heal_refused",
        "Replies of servers selected for healing that udpwatch left alone, by reason. They left with the source that "
        "routing chose.",
        labels=["reason"],
    )
    healing = snapshot.healing
    for reason in REFUSALS:
        refused.add_metric([reason], healing.refused.get(reason, 0) if healing else 0)
    yield refused
    if healing is None:
        return
    yield CounterMetricFamily(
        "udpwatch_heal_dry_run_replies",
        "Replies that udpwatch would have healed without --heal-dry-run.",
        value=healing.dry_run_replies,
    )
    yield GaugeMetricFamily(
        "udpwatch_heal_active",
        "1 if the replies of the selected servers are healed, 0 if healing is switched off, is a dry run, or does not "
        "work here (see udpwatch heal status). Absent if healing is not enabled.",
        value=int(healing.is_active),
    )


def _labels_of(server: Server) -> tuple[str, ...]:
    sender = server.sender
    return sender.process, str(server.port), sender.namespace, sender.pod, sender.container


def _other_labels(namespace: str) -> tuple[str, ...]:
    return tuple((namespace or OTHER) if name == "namespace" else OTHER for name in SERVER_LABELS)


def _servers(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what each server did; servers of the same labels in several network namespaces are added up."""
    sums: dict[tuple[str, ...], ServerTotals] = {}
    queues: dict[tuple[str, ...], int] = {}
    for server in snapshot.servers:
        labels = _labels_of(server)
        total = sums.setdefault(labels, ServerTotals())
        total.add(ServerTotals(server.requests, server.replies, server.unanswered, server.drops or 0))
        total.add(server.inherited)
        if server.queue is not None:
            queues[labels] = queues.get(labels, 0) + server.queue
    for namespace, total in ({"": ServerTotals()} | snapshot.other_servers).items():
        sums.setdefault(_other_labels(namespace), ServerTotals()).add(total)
    for name, text in SERVER_COUNTERS.items():
        family = CounterMetricFamily(f"udpwatch_server_{name}", text, labels=SERVER_LABELS)
        for labels, total in sums.items():
            family.add_metric(labels, getattr(total, name.removeprefix("receive_")))
        yield family
    queue = GaugeMetricFamily(
        "udpwatch_server_receive_queue_bytes",
        "Datagrams that wait in the server's receive buffers, with the kernel's overhead.",
        labels=SERVER_LABELS,
    )
    for labels, value in queues.items():
        queue.add_metric(labels, value)
    yield queue
    yield _at_risk(snapshot)


def _at_risk(snapshot: Snapshot) -> Metric:
    sums: dict[tuple[str, ...], int] = {}
    for server in snapshot.servers:
        if server.at_risk:
            labels = _labels_of(server)
            sums[labels] = sums.get(labels, 0) + server.at_risk
    for namespace, count in ({"": 0} | snapshot.other_at_risk).items():
        if count or not namespace:
            labels = _other_labels(namespace)
            sums[labels] = sums.get(labels, 0) + count
    at_risk = GaugeMetricFamily(
        "udpwatch_sockets_at_risk",
        "UDP sockets of this server that reply from a different address than the one that some clients ask, by their "
        "options and the node's routes, or because they have done so. `udpwatch audit` lists the addresses and the "
        "clients. A server without such sockets has no series.",
        labels=SERVER_LABELS,
    )
    for labels, count in sums.items():
        at_risk.add_metric(labels, count)
    return at_risk


def _lost(snapshot: Snapshot) -> Metric:
    lost = CounterMetricFamily(
        "udpwatch_events_lost",
        "Events and replies that were lost, by stage. Counts of wrong replies stay exact except for the stages "
        "'undecided', 'flows_full', 'conntrack_overrun', 'probe_missed', 'remember' and 'unparsed'.",
        labels=["stage"],
    )
    for stage, count in snapshot.lost.items():
        lost.add_metric([stage], count)
    return lost


def _probes(snapshot: Snapshot) -> Iterator[Metric]:
    attached = GaugeMetricFamily(
        "udpwatch_probe_attached",
        "1 if the kernel reports this program as attached, else 0: udpwatch is blind there.",
        labels=["probe"],
    )
    reattached = CounterMetricFamily(
        "udpwatch_probe_reattached",
        "Times that another program detached this program and the agent attached it again.",
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
        "Runs of this function probe that the kernel skipped because the CPU was already in a probe; stays 0 on "
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


def _self_checks(snapshot: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "udpwatch_self_test_passed",
        "1 if the programs saw the last datagram that the agent sent itself over loopback (once a minute), else 0: "
        "udpwatch is blind. In mode 'function', and for an agent outside the watched cgroup: 1 if the kernel reports "
        "the programs as attached.",
        value=int(snapshot.self_test_passed),
    )
    if snapshot.udp_sent is not None:
        yield CounterMetricFamily(
            "udpwatch_udp_sent_datagrams",
            "UDP datagrams sent in the agent's network namespace, as the kernel counts them. If this grows and "
            "udpwatch_replies_checked_total does not, udpwatch is blind; mode 'function' is an exception: it checks "
            "flows, not replies.",
            value=snapshot.udp_sent,
        )


def _node(snapshot: Snapshot) -> Iterator[Metric]:
    faults = CounterMetricFamily(
        "udpwatch_node_faults",
        "Faults of this node that the agent noticed: late_sample (too little CPU; counts wait in the kernel and stay "
        "exact), memory (less than a tenth of the memory limit was free; checked every 5 s), clock_step (the wall "
        "clock was set), suspend (the machine was suspended).",
        labels=["fault"],
    )
    for fault, count in snapshot.node_faults.items():
        faults.add_metric([fault], count)
    yield faults
    unwatched = GaugeMetricFamily(
        "udpwatch_unwatched",
        "What is there and beyond a limit of the agent: network namespaces whose conntrack events are not read "
        "(namespaces), UDP sockets that are not listed among servers (sockets). Wrong replies of sockets are counted "
        "all the same.",
        labels=["kind"],
    )
    for kind, count in snapshot.unwatched.items():
        unwatched.add_metric([kind], count)
    yield unwatched
    if snapshot.memory is None:
        return
    yield GaugeMetricFamily(
        "udpwatch_memory_used_bytes",
        "Memory in use of the agent's cgroup, with the kernel's tables and without files in the cache that are not in "
        "use. Absent without a memory limit.",
        value=snapshot.memory.used,
    )
    yield GaugeMetricFamily(
        "udpwatch_memory_limit_bytes",
        "Memory limit of the agent's cgroup. At the limit, the kernel kills the agent. Absent without a limit.",
        value=snapshot.memory.limit,
    )


def _conversations(snapshot: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "udpwatch_tracked_peers",
        "Conversations (client, client port, server port) with a request within the window.",
        value=snapshot.tracked_peers,
    )
    yield CounterMetricFamily(
        "udpwatch_peers_evicted",
        "Requests evicted within the window, those of the server port with the most requests first. Replies to them "
        "count as undecided. If udpwatch_events_lost_total{stage='undecided'} grows too, raise max_peers.",
        value=snapshot.evicted_peers,
    )


def _conntrack(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield nothing if conntrack is not loaded."""
    health = snapshot.conntrack
    if health is None:
        return
    yield GaugeMetricFamily(
        "udpwatch_conntrack_entries",
        "Conntrack entries in the agent's network namespace. At the limit, the kernel drops new flows.",
        value=health.entries,
    )
    yield GaugeMetricFamily(
        "udpwatch_conntrack_limit",
        "Limit of conntrack entries in that namespace (net.netfilter.nf_conntrack_max).",
        value=health.limit,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_insert_failed",
        "Packets dropped because another packet had already created the entry of the same flow: a UDP client that "
        "sends two requests at once from one socket loses one (usually DNS queries for A and AAAA). Also packets "
        "dropped because the table has too few buckets (net.netfilter.nf_conntrack_buckets).",
        value=health.insert_failed,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_dropped",
        "Packets dropped because conntrack could not create an entry: the table was full, memory was short, or another "
        "packet had created the entry (udpwatch_conntrack_insert_failed_total counts this case too). The table is full "
        "only if udpwatch_conntrack_entries is at the limit.",
        value=health.dropped,
    )
    yield CounterMetricFamily(
        "udpwatch_conntrack_early_drop",
        "Entries without a reply that conntrack evicted for new ones because the table was full.",
        value=health.early_dropped,
    )


def exposition(*collectors: Collector, process: bool = True) -> Callable[[], bytes]:
    """Return a function that renders the collectors in the Prometheus text format; with ``process``, also the process_*
    metrics of this process (memory, CPU time, descriptors).
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    if process:
        ProcessCollector(registry=registry)
    return lambda: generate_latest(registry)
