"""The output of `udpwatch top` for scripts and pipes: tables, JSON and plain lines. Does not import textual."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.banner import SourceState, banner, nothing_wrong
from udpwatch.agent.client.top.faults import faults_of
from udpwatch.agent.client.top.healing import healed_of, healing_text
from udpwatch.agent.client.top.layout import (
    cells,
    clock_text,
    columns_for,
    count_text,
    findings_table,
    heading,
    plain,
    rate_text,
)
from udpwatch.agent.client.top.rows import Key, Line, Meter, Order, View, rows
from udpwatch.agent.client.top.server_table import no_servers, servers_table, share_text
from udpwatch.agent.client.top.servers import ServerLine, ServerOrder, at_risk_of, server_rows
from udpwatch.agent.client.top.sources import ViewSource
from udpwatch.agent.client.top.traffic import ServerKey
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing

UNCUT = 10_000
BANNER_WIDTH = 100
MAX_WAIT_SECONDS = 20.0  # the agent closes a connection that is idle for a minute


def once(source: ViewSource, interval: float) -> View:
    """Read twice, an interval apart, and return a view with rates. Raises OSError, UdpwatchError."""
    meter = Meter()
    first = view = meter.add(source.read())
    end = time.monotonic() + interval
    while first.wrong is None and (view.wrong is None or time.monotonic() < end):
        time.sleep(max(0.05, min(MAX_WAIT_SECONDS, end - time.monotonic())))
        view = meter.add(source.read())
    return view


def views(source: ViewSource, interval: float, report: Callable[[str], None]) -> Iterator[View]:
    """Yield a view every interval, forever. Pass each loss of the connection to ``report``, once."""
    meter, connected, due = Meter(), True, time.monotonic()
    while True:
        try:
            view: View | None = meter.add(source.read())
            connected = True
        except OSError as error:
            view = None
            if connected:
                report(f"not connected: {error.strerror or error}; retrying")
            connected = False
        if time.monotonic() >= due:
            due = time.monotonic() + interval
            if view:
                yield view
        time.sleep(max(0.01, min(MAX_WAIT_SECONDS, due - time.monotonic())))


def table(view: View, width: int | None, source: str, servers: bool = False) -> str:
    """Format the findings or the servers of a view as a table; without a ``width``, nothing is cut."""
    order: Order | ServerOrder = ServerOrder.RISK if servers else Order.RATE
    lines: Sequence[Any] = server_rows(view, ServerOrder.RISK) if servers else rows(view, Order.RATE)
    layout = servers_table(view) if servers else findings_table(view)
    columns = columns_for(lines, width or UNCUT, view.cluster, order, layout)
    state = SourceState(source, view.time)
    text = [plain(line) for line in banner(view, state, None, width or BANNER_WIDTH)[:2]]
    if (healing := healing_text(view)[0]) and not servers:
        text.append(f" {healing}")
    text += [f" fault: {name}: {description}" for name, description in faults_of(view)]
    if lines:
        text += [
            plain(heading(columns, order, False)),
            *(plain(cells(line, columns, view.time)) for line in lines),
        ]
    else:
        text.append(f" {no_servers(view) if servers else nothing_wrong(view)}")
    return "\n".join(text)


def changes(view: View, before: dict[Key, int]) -> list[str]:
    """Format a line for each row whose total has increased; update ``before``."""
    increased = [line for line in rows(view, Order.LAST, True) if before.get(line.key) != line.total]
    before.clear()
    before |= {line.key: line.total for line in rows(view, Order.TOTAL)}
    return [_change(view, line) for line in increased]


def _change(view: View, line: Line) -> str:
    key = line.key
    names = (safe(key.node) if view.cluster else "", safe(key.process) or "-", safe(line.location))
    return (
        f"{clock_text(view.time)} {' '.join(filter(None, names))} port {key.port} "
        f"asked {safe(key.expected)} replied {safe(key.actual)} "
        f"{safe(key.verdict)} {safe(key.cause)} rate {rate_text(line.rate)} total {count_text(line.total)}"
    )


def server_changes(view: View, before: dict[ServerKey, int]) -> list[str]:
    """Format a line for each server that has received requests; update ``before``."""
    lines = server_rows(view, ServerOrder.RISK)
    changed = [line for line in lines if before.get(line.key) != line.server.requests]
    before.clear()
    before |= {line.key: line.server.requests for line in lines}
    return [_server_change(view, line) for line in changed]


def _server_change(view: View, line: ServerLine) -> str:
    key, server, rates = line.key, line.server, line.rates
    node = "" if not view.cluster else f"{line.nodes} nodes" if view.folded else safe(key.node)
    names = " ".join(filter(None, (node, safe(key.process) or "-", safe(line.location))))
    return (
        f"{clock_text(view.time)} {names} port {key.port} requests {rate_text(rates and rates.requests)}/s "
        f"replies {rate_text(rates and rates.replies)}/s unanswered {share_text(rates and rates.unanswered)} "
        f"wrong {count_text(server.wrong)} drops {'-' if server.drops is None else count_text(server.drops)} "
        f"risk {safe(server.risk)}"
    )


def as_json(view: View, servers: bool = False) -> dict[str, Any]:
    """Return a view as a JSON object (docs/top.md), with ``servers`` if wanted."""
    source = view.folded_servers or view
    lines = rows(view, Order.RATE)
    healed = healed_of(view)
    listed = {"servers": [_server(line, source) for line in server_rows(source, ServerOrder.RISK)]} if servers else {}
    return {
        "v": 1,
        "time": _utc(view.time),
        "wrong_per_second": _rounded(view.wrong),
        "checked_per_second": _rounded(view.checked),
        "sockets_at_risk": at_risk_of(view),
        "nodes": [
            {
                "node": each.node,
                "mode": each.mode,
                "kernel": each.kernel,
                "version": each.version,
                "ready": each.ready,
                "wrong": sum(row.count for row in each.wrong_rows) + each.other,
                "other": each.other,
                "healed": sum(row.count for row in each.healed_rows) + sum(each.other_healed.values()),
                "healing": _healing(each.healing) if each.healing else None,
                "checked": each.checked,
                "lost": each.lost,
                "faults": each.node_faults,
                "unwatched": each.unwatched,
                "memory": asdict(each.memory) if each.memory else None,
                "conntrack": asdict(each.conntrack) if each.conntrack else None,
                "notes": list(each.notes),
            }
            for each in view.snapshots
        ],
        "findings": [_finding(line) for line in lines if not line.key.is_healed],
        "healed": [_finding(line) for line in lines if line.key.is_healed],
        "healed_servers": healed.servers if healed else 0,
        **listed,
    }


def _healing(healing: Healing) -> dict[str, Any]:
    return {"active": healing.is_active, "dry_run": healing.dry_run, "refused": healing.refused}


def _finding(line: Line) -> dict[str, Any]:
    key, row = line.key, line.row
    return {
        "node": key.node,
        "process": key.process or None,
        "pid": row.sender.pid or None,
        "command": row.sender.command or None,
        "namespace": key.namespace or None,
        "pod": key.pod or None,
        "container": key.container or None,
        "interface": row.interface or None,
        "port": key.port,
        "expected": key.expected,
        "actual": key.actual,
        "family": row.family,
        "verdict": key.verdict,
        "cause": key.cause,
        "rate": _rounded(line.rate),
        "total": line.total,
        "last": _utc(row.last) if row.last else None,
    }


def _server(line: ServerLine, view: View) -> dict[str, Any]:
    key, server, rates = line.key, line.server, line.rates
    return {
        "node": None if view.folded else key.node,
        "nodes": line.nodes,
        "process": key.process or None,
        "pid": server.sender.pid or None,
        "command": server.sender.command or None,
        "namespace": key.namespace or None,
        "pod": key.pod or None,
        "container": key.container or None,
        "port": key.port,
        "netns": key.netns or None,
        "addresses": list(server.addresses),
        "requests": server.requests,
        "replies": server.replies,
        "unanswered": server.unanswered,
        "wrong": server.wrong,
        "drops": server.drops,
        "requests_per_second": _rounded(rates and rates.requests),
        "replies_per_second": _rounded(rates and rates.replies),
        "wrong_per_second": _rounded(rates and rates.wrong),
        "drops_per_second": _rounded(rates and rates.drops),
        "unanswered_share": _rounded(rates and rates.unanswered),
        "queue": server.queue,
        "queue_limit": server.queue_limit,
        "pktinfo": server.pktinfo,
        "risk": str(server.risk),
        "sockets_at_risk": server.at_risk,
        "last": _utc(server.last) if server.last else None,
    }


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 3)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def interactive(source: ViewSource, interval: float, fix: Callable[[Any], str] | None, servers: bool = False) -> int:
    """Run the screen and return the exit status. Raises the UdpwatchError that ended it."""
    # Importing Textual takes 0.3 seconds and 30 MB, so only the screen imports it.
    from udpwatch.agent.client.top.screen import TopApp  # noqa: PLC0415

    app = TopApp(source, interval, fix, servers=servers)
    failure = app.run()
    if isinstance(failure, UdpwatchError):
        raise failure
    return app.return_code or 0
