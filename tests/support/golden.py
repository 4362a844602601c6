"""Findings, events and a snapshot with a value in every field, and the comparison with golden files."""

from __future__ import annotations

import os

from repository import GOLDEN

from udpwatch.agent.daemon.state import LOSS_STAGES
from udpwatch.agent.model import (
    NODE_FAULTS,
    UNWATCHED,
    Cause,
    ConntrackHealth,
    Event,
    Finding,
    Healing,
    Memory,
    Probe,
    Risk,
    Row,
    Sender,
    Server,
    ServerTotals,
    Snapshot,
    Tuple,
    Verdict,
)

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
HEALED_ROW = Row(
    sender=Sender("tftpd", 77, container="tftp", namespace="shop", pod="boot-5"),
    port=69,
    expected="172.16.13.13",
    actual="172.16.13.13",
    verdict="healed",
    cause="kernel-chosen",
    family=4,
    count=41,
    first=1_800_000_000.0,
    last=1_800_000_055.0,
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
    rows=(ROW, HEALED_ROW),
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
    servers=(
        Server(
            sender=Sender("coredns", 900, container="coredns", namespace="kube-system", pod="coredns-5d78"),
            port=53,
            netns=4026532200,
            addresses=("::",),
            requests=900,
            replies=890,
            unanswered=10,
            wrong=0,
            drops=3,
            queue=1280,
            queue_limit=212992,
            pktinfo=True,
            risk=Risk.NONE,
            first=1_800_000_000.0,
            last=1_800_000_059.0,
        ),
        Server(
            sender=ROW.sender,
            port=56789,
            netns=4026532300,
            addresses=("0.0.0.0",),
            requests=40,
            replies=40,
            unanswered=38,
            wrong=ROW.count,
            drops=None,
            queue=None,
            queue_limit=None,
            pktinfo=None,
            risk=Risk.WRONG,
            first=1_800_000_000.0,
            last=1_800_000_050.0,
            at_risk=1,
            inherited=ServerTotals(2, 1, 1, 0),
        ),
    ),
    other_at_risk={"shop": 2},
    other_servers={"shop": ServerTotals(5, 4, 1, 0)},
    healing=Healing("port 69", True, False, namespaces=1, addresses=5, refused={"several-addresses": 3}),
    other_healed={"shop": 4},
    node_faults=dict.fromkeys(NODE_FAULTS, 0) | {"clock_step": 1},
    unwatched=dict.fromkeys(UNWATCHED, 0),
    memory=Memory(40 << 20, 256 << 20),
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
    Event(
        finding=Finding("172.16.13.13", "172.16.13.13", 69, 4, Verdict.HEALED, Cause.KERNEL_CHOSEN, "tftpd", 1, 3),
        time=3_000_000_000,
        count=41,
        peer="172.17.0.3",
        peer_port=40003,
        segments=1,
        pid=77,
        uid=0,
        netns_inode=4026532300,
        original=Tuple("172.17.0.3", 40003, "172.16.13.13", 69),
        reply=Tuple("172.16.13.13", 69, "172.17.0.3", 40003),
        conversation=None,
        pktinfo=False,
    ),
)


def compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UDPWATCH_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: `make golden` rewrites it"
