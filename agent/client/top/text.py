"""The output of `udpwatch top` for scripts and pipes: tables, JSON and plain lines. Does not import textual."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.banner import SourceState, banner
from udpwatch.agent.client.top.layout import (
    cells,
    clock_text,
    columns_for,
    count_text,
    heading,
    plain,
    rate_text,
)
from udpwatch.agent.client.top.rows import Key, Line, Meter, Order, View, rows
from udpwatch.agent.client.top.sources import ViewSource
from udpwatch.agent.errors import UdpwatchError

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


def table(view: View, width: int | None, source: str) -> str:
    """Format a view as a table; without a ``width``, nothing is cut."""
    lines = rows(view, Order.RATE)
    columns = columns_for(lines, width or UNCUT, view.cluster, Order.RATE)
    state = SourceState(source, view.time)
    text = [plain(line) for line in banner(view, state, None, width or BANNER_WIDTH)[:2]]
    if lines:
        text += [
            plain(heading(columns, Order.RATE, False)),
            *(plain(cells(line, columns, view.time)) for line in lines),
        ]
    else:
        text.append(" no wrong reply so far")
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


def as_json(view: View) -> dict[str, Any]:
    """Return a view as a JSON object (docs/top.md)."""
    return {
        "v": 1,
        "time": _utc(view.time),
        "wrong_per_second": _rounded(view.wrong),
        "checked_per_second": _rounded(view.checked),
        "nodes": [
            {
                "node": each.node,
                "mode": each.mode,
                "kernel": each.kernel,
                "version": each.version,
                "ready": each.ready,
                "wrong": sum(row.count for row in each.rows) + each.other,
                "other": each.other,
                "checked": each.checked,
                "lost": each.lost,
                "notes": list(each.notes),
            }
            for each in view.snapshots
        ],
        "findings": [_finding(line) for line in rows(view, Order.RATE)],
    }


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


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 3)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def interactive(source: ViewSource, interval: float, fix: Callable[[Any], str] | None) -> int:
    """Run the screen and return the exit status. Raises the UdpwatchError that ended it."""
    # Importing Textual takes 0.3 seconds and 30 MB, so only the screen imports it.
    from udpwatch.agent.client.top.screen import TopApp  # noqa: PLC0415

    app = TopApp(source, interval, fix)
    failure = app.run()
    if isinstance(failure, UdpwatchError):
        raise failure
    return app.return_code or 0
