"""`udpwatch top` without its screen: tables, JSON and plain lines, for scripts and pipes. Imports no textual."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.banner import Condition, banner
from udpwatch.agent.client.top.layout import (
    cells,
    clock_text,
    columns_for,
    count_text,
    heading,
    plain,
    rate_text,
)
from udpwatch.agent.client.top.rows import Key, Line, Look, Meter, Order, rows
from udpwatch.agent.client.top.sources import Source
from udpwatch.agent.errors import UdpwatchError

UNCUT = 10_000
BANNER_WIDTH = 100
MAX_WAIT_SECONDS = 20.0  # an agent hangs up on who is silent for a minute


def once(source: Source, interval: float) -> Look:
    """One look with rates: of two, an interval apart. Raises OSError, UdpwatchError."""
    meter = Meter()
    first = look = meter.add(source.read())
    end = time.monotonic() + interval
    while first.wrong is None and (look.wrong is None or time.monotonic() < end):
        time.sleep(max(0.05, min(MAX_WAIT_SECONDS, end - time.monotonic())))
        look = meter.add(source.read())
    return look


def looks(source: Source, interval: float, trouble: Callable[[str], None]) -> Iterator[Look]:
    """A look each interval, without end; ``trouble`` is told once each time that nobody answers any more."""
    meter, told, due = Meter(), "", time.monotonic()
    while True:
        try:
            look: Look | None = meter.add(source.read())
            told = ""
        except OSError as error:
            look, reason = None, error.strerror or str(error)
            if not told:
                trouble(f"not connected: {reason}; retrying")
            told = reason
        if time.monotonic() >= due:
            due = time.monotonic() + interval
            if look:
                yield look
        time.sleep(max(0.01, min(MAX_WAIT_SECONDS, due - time.monotonic())))


def table(look: Look, width: int | None, source: str) -> str:
    """A look for people, as a table; without a ``width`` nothing is cut off."""
    lines = rows(look, Order.RATE)
    columns = columns_for(lines, width or UNCUT, look.cluster, Order.RATE)
    condition = Condition(source, look.time)
    text = [plain(line) for line in banner(look, condition, None, width or BANNER_WIDTH)[:2]]
    if lines:
        text += [
            plain(heading(columns, Order.RATE, False)),
            *(plain(cells(line, columns, look.time)) for line in lines),
        ]
    else:
        text.append(" no wrong reply so far")
    return "\n".join(text)


def changes(look: Look, before: dict[Key, int]) -> list[str]:
    """A line for each row that grew; ``before`` is brought up to date."""
    grown = [line for line in rows(look, Order.LAST, True) if before.get(line.key) != line.total]
    before.clear()
    before |= {line.key: line.total for line in rows(look, Order.TOTAL)}
    return [_change(look, line) for line in grown]


def _change(look: Look, line: Line) -> str:
    key = line.key
    who = " ".join(filter(None, (safe(key.node) if look.cluster else "", safe(key.process) or "-", safe(line.where))))
    return (
        f"{clock_text(look.time)} {who} port {key.port} asked {safe(key.expected)} answered {safe(key.actual)} "
        f"{safe(key.verdict)} {safe(key.cause)} rate {rate_text(line.rate)} total {count_text(line.total)}"
    )


def as_json(look: Look) -> dict[str, Any]:
    """A look for programs (docs/top.md)."""
    return {
        "v": 1,
        "time": _utc(look.time),
        "wrong_per_second": _rounded(look.wrong),
        "checked_per_second": _rounded(look.checked),
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
            for each in look.snapshots
        ],
        "findings": [_finding(line) for line in rows(look, Order.RATE)],
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


def interactive(source: Source, interval: float, remedy: Callable[[Any], str] | None) -> int:
    """The screen, until it is left; the exit status. Raises the UdpwatchError that ended it."""
    # Textual takes a third of a second and 30 MB: nobody else should pay for it.
    from udpwatch.agent.client.top.screen import TopApp  # noqa: PLC0415

    app = TopApp(source, interval, remedy)
    failure = app.run()
    if isinstance(failure, UdpwatchError):
        raise failure
    return app.return_code or 0
