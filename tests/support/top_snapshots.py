"""Snapshots and samples for tests of `udpwatch top`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from udpwatch.agent.client.top.rows import View
from udpwatch.agent.model import Risk, Row, Sender, Server, Snapshot

NOW = 1_800_000_000.0


def row(process: str = "openvpn", port: int = 1194, count: int = 1, **changes: Any) -> Row:
    who = {name: changes.pop(name) for name in ("namespace", "pod", "container") if name in changes}
    plain_row = Row(
        Sender(process, 4242, **who), port, "172.16.13.13", "172.17.0.1", "new", "kernel-chosen", 4, count, NOW, NOW
    )
    return replace(plain_row, **changes)


def healed_row(process: str = "tftpd", port: int = 69, count: int = 1, **changes: Any) -> Row:
    """Return a row of healed replies."""
    return row(process, port, count, **{"actual": "172.16.13.13", "verdict": "healed", **changes})


def server(process: str = "dnsd", port: int = 53, requests: int = 100, **changes: Any) -> Server:
    who = {name: changes.pop(name) for name in ("namespace", "pod", "container", "pid") if name in changes}
    plain_server = Server(
        sender=Sender(process, **{"pid": 77, **who}),
        port=port,
        netns=1,
        addresses=("0.0.0.0",),
        requests=requests,
        replies=requests,
        unanswered=0,
        wrong=0,
        drops=0,
        queue=0,
        queue_limit=212_992,
        pktinfo=True,
        risk=Risk.NONE,
        first=NOW,
        last=NOW,
    )
    return replace(plain_server, **changes)


def snapshot(*found: Row, **changes: Any) -> Snapshot:
    plain_snapshot = Snapshot(
        "0.1.0", "6.1.0", "node-1", "packet", NOW - 60, NOW, True, (), found, 0, 100, 1, 0, {"rate_limit": 0}, ()
    )
    return replace(plain_snapshot, **changes)


def view(seconds: float, *found: Row, **changes: Any) -> View:
    return View(NOW + seconds, (snapshot(*found, time=NOW + seconds, **changes),))
