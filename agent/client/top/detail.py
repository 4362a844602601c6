"""Lay out the detail pane of one row: its sender, the fix, and its latest events with conntrack's entries.

Pure functions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from udpwatch.agent.client.lines import safe, safe_lines
from udpwatch.agent.client.top.layout import StyledLine, clock_text, count_text, rate_text
from udpwatch.agent.client.top.rows import Key, Line
from udpwatch.agent.model import Sender

MAX_EVENTS = 20

_CAUSES = {
    "kernel-chosen": "the socket is bound to all addresses, and routing chose the source",
    "explicit": "the application chose the source itself",
    "connected": "the socket was connected, and connect() chose the source",
    "forwarded": "a machine behind this node sent the reply",
    "unknown": "how the source was chosen is unknown",
}
_VERDICTS = {
    "new": "conntrack counts the reply as a new flow, so NAT is not undone and the client's kernel rejects the reply",
    "untracked": "conntrack does not track this traffic; a client with a connected socket rejects the reply",
    "unknown": "this kernel does not report conntrack's verdict",
    "healed": "the reply is right, but only while udpwatch heals it; without it, routing chooses the source",
}
GENERAL_FIX = (
    "Bind the server to each address that clients ask, or use IP_PKTINFO (IPV6_PKTINFO): take the address of each "
    "request from recvmsg() and pass it to sendmsg(). See docs/findings.md."
)


def events_of(key: Key, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of one row, the newest first."""
    values = (key.process, key.pod, key.container, key.port, key.expected, key.actual, key.verdict, key.cause)
    names = ("process", "pod", "container", "port", "expected", "actual", "verdict", "cause")
    of_row = [event for event in events if tuple(event.get(name) or "" for name in names) == values]
    return of_row[: -MAX_EVENTS - 1 : -1]


def title(line: Line) -> str:
    process = safe(line.key.process) or "another machine"
    return f"{process}, port {line.key.port}/udp"


def detail(
    line: Line, events: Sequence[dict[str, Any]] | None, fix: str, width: int, cluster: bool
) -> list[StyledLine]:
    """Return the lines of the pane. ``events``: from `events_of`; None: not received yet."""
    key, row = line.key, line.row
    lines = process_lines(row.sender, key.node if cluster else "", row.interface)
    verdict, cause = safe(key.verdict), safe(key.cause)
    chosen = "udpwatch set the source, which the server left to routing" if key.is_healed else _CAUSES.get(cause, cause)
    lines.append(("asked at", f"{safe(key.expected)}, replied from {safe(key.actual)}: {chosen}"))
    lines.append(("verdict", f"{verdict}: {_VERDICTS[verdict]}" if verdict in _VERDICTS else verdict))
    counts = _counts(line)
    if row.last:
        counts += f", the last at {clock_text(row.last)}"
    lines.append(("count", counts))
    lines.append(("fix", ("Still fix the server. " if key.is_healed else "") + safe_lines(fix or GENERAL_FIX)))
    styled = [each for label, text in lines for each in labelled(label, text, width)]
    return styled + _latest(events, width, cluster)


def _counts(line: Line) -> str:
    what = "healed" if line.key.is_healed else "wrong"
    return f"{count_text(line.total)} {what} replies, {rate_text(line.rate)} per second"


def process_lines(sender: Sender, node: str = "", interface: str = "") -> list[tuple[str, str]]:
    """Describe a process: (label, text) of each line. ``interface``: the one that leads to another machine."""
    lines = []
    if node:
        lines.append(("node", safe(node)))
    if sender.pid:
        executable = sender.command or sender.executable
        lines.append(("process", f"pid {sender.pid}" + (f"  {safe(executable)}" if executable else "")))
    location = []
    if sender.pod:
        location.append(f"pod {sender.namespace}/{sender.pod}")
    if sender.container:
        location.append(f"container {sender.container}")
    if sender.runtime or sender.container_id:
        location.append(" ".join(filter(None, (sender.runtime, sender.container_id[:12]))))
    if interface:
        location.append(f"received on {interface}")
    if location:
        lines.append(("location", safe(", ".join(location))))
    elif sender.cgroup not in {"", "/"}:
        lines.append(("cgroup", safe(sender.cgroup)))
    return lines


def folded_detail(line: Line, width: int) -> list[StyledLine]:
    """Return the lines of the pane for a row that is the sum of many nodes."""
    lines = [
        ("nodes", f"{line.nodes}; g shows the rows of each node, with addresses and cause"),
        ("namespace", safe(line.key.namespace) or "-"),
        ("count", _counts(line)),
    ]
    return [each for label, text in lines for each in labelled(label, text, width)]


def _latest(events: Sequence[dict[str, Any]] | None, width: int, cluster: bool) -> list[StyledLine]:
    if cluster:
        text = "Prometheus stores no events; run `udpwatch top` or `udpwatch events` on that node"
        return labelled("events", text, width)
    if not events:
        return labelled("events", "..." if events is None else "none of the latest events belongs to this row", width)
    return labelled("events", "\n".join(map(_event, events)), width)


def _event(event: dict[str, Any]) -> str:
    conntrack = event.get("conntrack") or {}
    original, request = conntrack.get("original"), conntrack.get("request")
    text = _clock(event.get("time"))
    if not original:
        text += f"  client {_join(event.get('peer'), event.get('peer_port'))}"
    if request:
        text += f"  asked {_flow(request)}"
    if original:
        text += f"  conntrack {_flow(original)}"
    return safe(text)


def _flow(flow: dict[str, Any]) -> str:
    source = _join(flow.get("source"), flow.get("source_port"))
    return f"{source} > {_join(flow.get('destination'), flow.get('destination_port'))}"


def _join(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _clock(time: object) -> str:
    try:
        return clock_text(datetime.fromisoformat(str(time)).timestamp())
    except ValueError:
        return str(time)


_LABEL_WIDTH = 11


def labelled(label: str, text: str, width: int) -> list[StyledLine]:
    """Wrap a text beside its label of at most ten characters."""
    room = max(10, width - _LABEL_WIDTH - 1)
    wrapped = [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(part, room, break_on_hyphens=False, subsequent_indent="") or [""]
    ]
    first = f" {label:<{_LABEL_WIDTH - 1}}"
    return [[(first if at == 0 else " " * _LABEL_WIDTH, "label"), (line, "fact")] for at, line in enumerate(wrapped)]
