"""The output for people and programs, compared with tests/golden. `make golden` writes it again: review the diff."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from golden import EVENTS, HEALED_ROW, ROW, SNAPSHOT, compare

from udpwatch.agent.commands.doctor import Check, Report, Status, as_text
from udpwatch.agent.daemon.app import describe
from udpwatch.agent.daemon.event_log import as_json
from udpwatch.agent.daemon.http import HttpCollector
from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.model import (
    Sender,
)
from udpwatch.dns.cache import Cache
from udpwatch.dns.metrics import DnsCollector, Metrics


def test_golden_metrics() -> None:
    collectors = SnapshotCollector(lambda: SNAPSHOT), HttpCollector(Counter(size=2))
    compare("metrics.txt", exposition(*collectors, process=False)().decode())


def test_golden_dns_metrics() -> None:
    metrics = Metrics()
    metrics.cell("udp", "1", 1, 0, "hosts")[0] += 3
    metrics.cell("udp", "2", 28, 3, "forward")[0] += 1
    metrics.cell("tcp", "1", 65_000, 5, "error")[0] += 1
    metrics.cell("udp", "1", 1, 0, "cache")[0] += 7
    metrics.duration["memory"].observe(0.0001, 3)
    metrics.upstream_asked["10.0.0.2#53"][0] = 2
    metrics.upstream_failed["10.0.0.2#53", "timeout"][0] = 1
    metrics.upstream_duration["10.0.0.2#53"].observe(0.02)
    metrics.hosts_entries, metrics.reload_time = 1000, 1_800_000_000.0
    text = exposition(DnsCollector(metrics, Cache(100, 60), lambda: 0), process=False)().decode()
    compare("dns-metrics.txt", text)


def test_golden_events() -> None:
    senders = (
        Sender("plain-server", 4242, cgroup="/kubepods/a", container="dns", namespace="shop", pod="dns-7c9"),
        Sender("unknown"),
        Sender(""),
        HEALED_ROW.sender,
    )
    lines = [
        json.dumps(as_json(event, sender, "node-1", 1_800_000_000 + event.time / 1e9))
        for event, sender in zip(EVENTS, senders, strict=True)
    ]
    compare("events.jsonl", "\n".join(lines) + "\n")


def test_golden_log_line() -> None:
    forwarded = replace(ROW, sender=Sender(""), cause="forwarded", interface="vnet3")
    compare("finding.txt", "".join(describe(row) + "\n" for row in (ROW, forwarded)))


def test_golden_doctor() -> None:
    report = Report(
        "0.1.0",
        (
            Check("kernel", Status.OK, "Linux 6.1.0 x86_64"),
            Check("lockdown", Status.WARN, "confidentiality: kernel memory may not be read, " * 2, "boot otherwise"),
            Check("__nf_conntrack_confirm", Status.OK, "attached by kprobe; the verifier walked 2104 instructions"),
            Check("sensor", Status.FAIL, "cannot import bcc", "install python3-bpfcc"),
        ),
        None,
        False,
    )
    compare("doctor.txt", as_text(report, False) + "\n")
