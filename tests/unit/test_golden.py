"""What people and programs see, held against tests/golden. `make golden` rewrites; the difference is reviewed."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from udpwatch.agent.commands.doctor import Check, Report, Status, as_text
from udpwatch.agent.daemon.app import describe
from udpwatch.agent.daemon.event_log import as_json
from udpwatch.agent.daemon.http import HttpCollector
from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.daemon.state import LOSS_STAGES
from udpwatch.agent.model import (
    Cause,
    ConntrackHealth,
    Event,
    Finding,
    Probe,
    Row,
    Sender,
    Snapshot,
    Tuple,
    Verdict,
)
from udpwatch.dns.cache import Cache
from udpwatch.dns.metrics import DnsCollector, Metrics

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

ROW = Row(
    sender=Sender(
        "openvpn", 4242, "/usr/sbin/openvpn", "openvpn --config server.conf", "/system.slice/openvpn.service"
    ),
    port=1194,
    expected="172.16.13.13",
    actual="172.17.0.1",
    verdict="new",
    cause="kernel-chosen",
    family=4,
    count=23,
    first=1_800_000_000.0,
    last=1_800_000_000.0,
)
SNAPSHOT = Snapshot(
    version="0.1.0",
    kernel="6.1.0",
    node="node-1",
    mode="packet",
    started=1_800_000_000.0,
    time=1_800_000_060.0,
    ready=True,
    notes=(),
    rows=(ROW,),
    other=2,
    other_of={"": 2},
    checked=1000,
    tracked_peers=17,
    evicted_peers=3,
    lost=dict.fromkeys(LOSS_STAGES, 0) | {"rate_limit": 5},
    probes=(
        Probe("ingress", True, True, 0, 0.25, 1000, 600),
        Probe("egress", True, True, 1, 0.5, 2000, 700),
        Probe("sendmsg4", True, False, 0, 0.0, 0, 300),
        Probe("sendmsg6", False, False, 0, 0.0, 0, 300, "cannot attach sendmsg6"),
        Probe("__nf_conntrack_confirm", True, False, 0, 0.125, 500, 2000, how="kprobe", missed=2),
    ),
    flows=77,
    conntrack=ConntrackHealth(1200, 65536, 3, 5, 7),
    udp_sent=4000,
)
EVENTS = (
    Event(
        finding=Finding("172.16.13.13", "172.17.0.1", 56789, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, "plain-server", 1, 3),
        time=0,
        count=1,
        peer="172.17.0.3",
        peer_port=40000,
        segments=1,
        pid=4242,
        uid=0,
        netns_inode=4026532300,
        original=Tuple("172.17.0.1", 56789, "172.17.0.3", 40000),
        reply=Tuple("172.17.0.3", 40000, "172.17.0.1", 56789),
        conversation=None,
    ),
    Event(
        finding=Finding("fd00::2", "fd00::1", 53, 6, Verdict.UNTRACKED, Cause.CONNECTED, "", 1, 0),
        time=1_500_000_000,
        count=23,
        peer="fd00::3",
        peer_port=40001,
        segments=1,
        pid=0,
        uid=0,
        netns_inode=None,
        original=None,
        reply=None,
        conversation=None,
        pktinfo=False,
    ),
    Event(
        finding=Finding(
            "10.2.0.5", "10.2.0.6", 53, 4, Verdict.NEW, Cause.FORWARDED, "", 0, 4026532300, interface="vnet3"
        ),
        time=2_000_000_000,
        count=1,
        peer="10.1.0.9",
        peer_port=40002,
        segments=1,
        pid=0,
        uid=0,
        netns_inode=4026532300,
        original=Tuple("10.2.0.6", 53, "10.1.0.9", 40002),
        reply=Tuple("10.1.0.9", 40002, "10.2.0.6", 53),
        conversation=None,
        request=Tuple("10.1.0.9", 40002, "10.2.0.5", 53),
    ),
)


def compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UDPWATCH_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: `make golden` rewrites it"


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
