"""The pane about one row: who it is, how to mend it, its latest events as conntrack saw them. Pure functions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.layout import Painted, clock_text, count_text, rate_text
from udpwatch.agent.client.top.rows import Key, Line
from udpwatch.agent.model import Row

MAX_EVENTS = 20

_CAUSES = {
    "kernel-chosen": "the socket is bound to all addresses and left the source to routing",
    "explicit": "the application chose this source itself",
    "connected": "the socket was connected: its source has been fixed since",
    "forwarded": "the reply of a machine behind this node",
    "unknown": "why is not known",
}
_VERDICTS = {
    "new": "conntrack booked the reply as a new flow: NAT is not undone, the client's kernel refuses it",
    "untracked": "no conntrack on this path: a client with a connected socket refuses it",
    "unknown": "conntrack could not be read",
}
GENERAL_REMEDY = (
    "Bind the server to each address that clients ask, or let it use IP_PKTINFO (IPV6_PKTINFO): take the "
    "address of each request from recvmsg() and give it to sendmsg(). See docs/findings.md."
)


def events_of(key: Key, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of one row, the newest first."""
    wanted = (key.process, key.pod, key.container, key.port, key.expected, key.actual, key.verdict, key.cause)
    names = ("process", "pod", "container", "port", "expected", "actual", "verdict", "cause")
    of_row = [event for event in events if tuple(event.get(name) or "" for name in names) == wanted]
    return of_row[: -MAX_EVENTS - 1 : -1]


def title(line: Line) -> str:
    """The pane's title."""
    process = safe(line.key.process) or "another machine"
    return f"{process}, port {line.key.port}/udp"


def detail(
    line: Line, events: Sequence[dict[str, Any]] | None, remedy: str, width: int, cluster: bool
) -> list[Painted]:
    """The pane's lines; ``events`` as `events_of` gives them, None while they are being asked for."""
    key, row = line.key, line.row
    lines = _about(key, row, cluster)
    verdict, cause = safe(key.verdict), safe(key.cause)
    lines.append(("asked", f"{safe(key.expected)}, answered from {safe(key.actual)}: {_CAUSES.get(cause, cause)}"))
    lines.append((verdict, _VERDICTS.get(verdict, verdict)))
    seen = f"{count_text(line.total)} wrong replies, {rate_text(line.rate)} per second"
    if row.last:
        seen += f", the last at {clock_text(row.last)}"
    lines.append(("count", seen))
    lines.append(("remedy", safe_lines(remedy or GENERAL_REMEDY)))
    painted = [each for label, text in lines for each in _labelled(label, text, width)]
    return painted + _latest(events, width, cluster)


def safe_lines(text: str) -> str:
    """`safe`, of a text of several lines."""
    return "\n".join(map(safe, text.splitlines()))


def _about(key: Key, row: Row, cluster: bool) -> list[tuple[str, str]]:
    sender = row.sender
    lines = []
    if cluster:
        lines.append(("node", safe(key.node)))
    if sender.pid:
        executable = sender.command or sender.executable
        lines.append(("process", f"pid {sender.pid}" + (f"  {safe(executable)}" if executable else "")))
    where = []
    if sender.pod:
        where.append(f"pod {sender.namespace}/{sender.pod}")
    if sender.container:
        where.append(f"container {sender.container}")
    if sender.runtime or sender.container_id:
        where.append(" ".join(filter(None, (sender.runtime, sender.container_id[:12]))))
    if row.interface:
        where.append(f"came in by {row.interface}")
    if where:
        lines.append(("where", safe(", ".join(where))))
    elif sender.cgroup not in {"", "/"}:
        lines.append(("cgroup", safe(sender.cgroup)))
    return lines


def _latest(events: Sequence[dict[str, Any]] | None, width: int, cluster: bool) -> list[Painted]:
    if cluster:
        return _labelled("events", "Prometheus keeps none: run `udpwatch top` or `udpwatch events` on that node", width)
    if not events:
        return _labelled("events", "..." if events is None else "none of the latest is of this row", width)
    return _labelled("events", "\n".join(map(_event, events)), width)


def _event(event: dict[str, Any]) -> str:
    conntrack = event.get("conntrack") or {}
    booked, request = conntrack.get("original"), conntrack.get("request")
    text = _clock(event.get("time"))
    if not booked:
        text += f"  client {_join(event.get('peer'), event.get('peer_port'))}"
    if request:
        text += f"  asked {_flow(request)}"
    if booked:
        text += f"  conntrack {_flow(booked)}"
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


def _labelled(label: str, text: str, width: int) -> list[Painted]:
    """A label and its text, folded beside it."""
    room = max(10, width - _LABEL_WIDTH - 1)
    folded = [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(part, room, break_on_hyphens=False, subsequent_indent="") or [""]
    ]
    first = f" {label:<{_LABEL_WIDTH - 1}}"
    return [[(first if at == 0 else " " * _LABEL_WIDTH, "label"), (line, "fact")] for at, line in enumerate(folded)]
