"""Lay out the three lines above the table: the source and its state, the counts, the recent rate. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from rich.cells import cell_len

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.faults import faults_of
from udpwatch.agent.client.top.healing import healing_text
from udpwatch.agent.client.top.layout import (
    StyledLine,
    age_text,
    clock_text,
    count_text,
    fitted,
    rate_text,
    sockets_text,
)
from udpwatch.agent.client.top.rows import HISTORY_SECONDS, Baseline, View, other_of, total_of
from udpwatch.agent.client.top.servers import at_risk_of
from udpwatch.agent.model import Risk

STALE_SECONDS = 5.0
_KERNEL_WIDTH = 24
_GRAPH_COLUMNS = 8  # that what is said about healing leaves
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class SourceState:
    """The state of the screen's source."""

    name: str
    now: float  # seconds since the epoch
    paused: float | None = None  # when the screen was paused, seconds since the epoch
    error: str = ""  # why it is not connected


def _state(view: View | None, source: SourceState) -> tuple[str, str]:
    if source.error:
        age = f", data is {age_text(source.now - view.time)} old" if view else ""
        return f"not connected: retrying{age}", "error"
    if source.paused is not None:
        return f"paused at {clock_text(source.paused)}", "paused"
    if view is None:
        return "connecting", "paused"
    age_seconds = source.now - view.time
    if not all(each.ready for each in view.snapshots):
        return f"not ready, {age_text(age_seconds)} ago", "error"
    stale = not view.cluster and age_seconds > STALE_SECONDS
    return f"● {age_text(age_seconds)} ago", "error" if stale else "live"


def banner(view: View | None, source: SourceState, baseline: Baseline | None, width: int) -> list[StyledLine]:
    """Return the three lines above the table."""
    return [
        _title(view, source, width),
        _counts(view, source, baseline, width),
        _graph(view, width),
    ]


def nothing_wrong(view: View, tab: str = "") -> str:
    """Return one line for a view without wrong replies: what was checked, and what is at risk.

    ``tab``: how to see the servers.
    """
    checked = f"{count_text(sum(each.checked for each in view.snapshots))} replies checked"
    servers = [server for each in view.snapshots for server in each.servers]
    at_risk, unknown = at_risk_of(view), sum(server.risk == Risk.UNKNOWN for server in servers)
    if at_risk:
        return f"No wrong reply so far: {checked}, {sockets_text(at_risk)} at risk{tab}."
    if unknown:
        return f"No wrong reply so far: {checked}; the risk of {unknown} server{'s' * (unknown != 1)} is unknown{tab}."
    if servers or view.at_risk is not None:
        return f"Nothing is wrong: {checked}, no socket at risk."
    return f"No wrong reply so far: {checked}."


def _title(view: View | None, source: SourceState, width: int) -> StyledLine:
    state, style = _state(view, source)
    styled: StyledLine = [(" udpwatch", "name")]
    if view and view.cluster:
        nodes = len(view.snapshots) if view.node_count is None else view.node_count
        facts = [("", f"{nodes} node" + "s" * (nodes != 1)), ("", source.name)]
    elif view and view.snapshots:
        each = view.snapshots[0]
        facts = [("", each.node), ("mode", each.mode), ("kernel", fitted(each.kernel, _KERNEL_WIDTH).rstrip())]
    else:
        facts = [("", source.name)]
    room = width - cell_len(state) - 12
    for label, fact in facts:
        text = f"  {label} " if label else "  "
        need = cell_len(text) + cell_len(safe(fact))
        if need > room and label:
            break
        shown = safe(fact) if need <= room else fitted(safe(fact), max(room - 2, 1))
        styled += [(text, "label"), (shown, "fact")]
        room -= need
    return _justified(styled, [(state + " ", style)], width)


def _counts(view: View | None, source: SourceState, baseline: Baseline | None, width: int) -> StyledLine:
    if view is None:
        return _justified([(f" {safe(source.error)}", "error")] if source.error else [], [], width)
    found = sum(len(each.wrong_rows) for each in view.snapshots) if view.found is None else view.found
    at_risk = at_risk_of(view)
    other = other_of(view, baseline)
    lost = sum(sum(each.lost.values()) for each in view.snapshots)
    styled: StyledLine = [(" wrong ", "label"), (f"{rate_text(view.wrong)}/s", "wrong" if view.wrong else "fact")]
    facts = [
        ("checked", f"{rate_text(view.checked)}/s", "fact"),
        ("total", count_text(total_of(view, baseline)), "fact"),
        ("findings", str(found), "fact"),
        ("lost", count_text(lost), "error" if lost else "fact"),
    ]
    if at_risk:
        facts.insert(-1, ("at risk", count_text(at_risk), "paused"))
    if other:
        facts.insert(-1, ("other", count_text(other), "fact"))
    if faults := faults_of(view):
        facts.append(("faults", str(len(faults)), "paused"))
    long = sum(len(label) + len(fact) + 4 for label, fact, _ in facts) + sum(len(text) for text, _ in styled)
    gap = "   " if long < width else "  "
    for label, fact, style in facts:
        styled += [(f"{gap}{label} ", "label"), (fact, style)]
    note = [(f"totals since {clock_text(baseline.time)} ", "paused")] if baseline else []
    if source.error:
        note = [(f"{safe(source.error)} ", "error")]
    return _justified(styled, note, width)


def _graph(view: View | None, width: int) -> StyledLine:
    left, right_width = " last 5 min ", 15
    healing, style = healing_text(view) if view else ("", "label")
    healing = (
        fitted(healing, min(len(healing), width - len(left) - right_width - _GRAPH_COLUMNS - 1)) if healing else ""
    )
    columns = max(0, width - len(left) - right_width - (len(healing) + 1 if healing else 0))
    bars, peak = spark(view.history, view.time, columns) if view else (" " * columns, 0.0)
    line = [(left, "label"), (bars, "graph"), (fitted(f" peak {rate_text(peak)}/s", right_width), "label")]
    return [*line, (f"{healing} ", style)] if healing else line


def _justified(left: StyledLine, right: StyledLine, width: int) -> StyledLine:
    """Put two parts at the ends of one line; cut the right part if they do not fit."""
    used = sum(cell_len(text) for text, _ in left)
    room = width - used - 1
    if right and room < 8:
        right = []
    text = "".join(part for part, _ in right)
    style = right[0][1] if right else "gap"
    shown = fitted(text, max(0, room)).rstrip() + " " if cell_len(text) > room else text
    gap = width - used - cell_len(shown)
    return [*left, (" " * max(0, gap), "gap"), (shown, style)]


def spark(history: Sequence[tuple[float, float]], now: float, columns: int) -> tuple[str, float]:
    """Draw HISTORY_SECONDS of a rate in ``columns`` bars, the newest at the right; also return the highest rate."""
    if columns <= 0:
        return "", 0.0
    seconds = HISTORY_SECONDS / columns
    newest = ceil(now / seconds)
    sums: dict[int, list[float]] = {}
    for time, rate in history:
        column = columns - 1 - (newest - ceil(time / seconds))
        if 0 <= column < columns:
            sums.setdefault(column, []).append(rate)
    values = [sum(sums[column]) / len(sums[column]) if column in sums else None for column in range(columns)]
    return _bars(_filled(values))


def _filled(values: list[float | None]) -> list[float | None]:
    """Fill each gap with the next value. A value is the rate since the previous one, so it applies to the gap, too."""
    known = [column for column, value in enumerate(values) if value is not None]
    for left, right in pairwise(known):
        for column in range(left + 1, right):
            values[column] = values[right]
    return values


def _bars(values: list[float | None]) -> tuple[str, float]:
    peak = max((value for value in values if value is not None), default=0.0)
    bars = []
    for value in values:
        if value is None:
            bars.append(" ")
        elif value <= 0:
            bars.append(_BARS[0])
        else:
            bars.append(_BARS[min(7, 1 + int(value / peak * 6.999))])
    return "".join(bars), peak
