"""The three lines above the table: who is watched and how it stands, the numbers, the last minutes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from rich.cells import cell_len

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.layout import Painted, age_text, clock_text, count_text, fitted, rate_text
from udpwatch.agent.client.top.rows import HISTORY_SECONDS, Baseline, Look, other_of, total_of

STALE_SECONDS = 5.0
_KERNEL_WIDTH = 24
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Condition:
    """How the screen stands to its source."""

    source: str
    now: float  # seconds since the epoch
    paused: float | None = None  # since when
    trouble: str = ""  # why it is not connected


def _state(look: Look | None, condition: Condition) -> tuple[str, str]:
    if condition.trouble:
        age = f", as of {age_text(condition.now - look.time)} ago" if look else ""
        return f"not connected: retrying{age}", "trouble"
    if condition.paused is not None:
        return f"paused at {clock_text(condition.paused)}", "paused"
    if look is None:
        return "connecting", "paused"
    age_seconds = condition.now - look.time
    if not all(each.ready for each in look.snapshots):
        return f"not ready, {age_text(age_seconds)} ago", "trouble"
    stale = not look.cluster and age_seconds > STALE_SECONDS
    return f"● {age_text(age_seconds)} ago", "trouble" if stale else "live"


def banner(look: Look | None, condition: Condition, baseline: Baseline | None, width: int) -> list[Painted]:
    """The three lines above the table."""
    return [
        _title(look, condition, width),
        _numbers(look, condition, baseline, width),
        _graph(look, width),
    ]


def _title(look: Look | None, condition: Condition, width: int) -> Painted:
    state, style = _state(look, condition)
    painted: Painted = [(" udpwatch", "name")]
    if look and look.cluster:
        nodes = len(look.snapshots)
        facts = [("", f"{nodes} node" + "s" * (nodes != 1)), ("", condition.source)]
    elif look and look.snapshots:
        each = look.snapshots[0]
        facts = [("", each.node), ("mode", each.mode), ("kernel", fitted(each.kernel, _KERNEL_WIDTH).rstrip())]
    else:
        facts = [("", condition.source)]
    room = width - cell_len(state) - 12
    for label, fact in facts:
        text = f"  {label} " if label else "  "
        need = cell_len(text) + cell_len(safe(fact))
        if need > room and label:
            break
        shown = safe(fact) if need <= room else fitted(safe(fact), max(room - 2, 1))
        painted += [(text, "label"), (shown, "fact")]
        room -= need
    return _ended(painted, [(state + " ", style)], width)


def _numbers(look: Look | None, condition: Condition, baseline: Baseline | None, width: int) -> Painted:
    if look is None:
        return _ended([(f" {safe(condition.trouble)}", "trouble")] if condition.trouble else [], [], width)
    found = sum(len(each.rows) for each in look.snapshots)
    other = other_of(look, baseline)
    lost = sum(sum(each.lost.values()) for each in look.snapshots)
    painted: Painted = [(" wrong ", "label"), (f"{rate_text(look.wrong)}/s", "wrong" if look.wrong else "fact")]
    facts = [
        ("checked", f"{rate_text(look.checked)}/s", "fact"),
        ("total", count_text(total_of(look, baseline)), "fact"),
        ("findings", str(found), "fact"),
        ("lost", count_text(lost), "trouble" if lost else "fact"),
    ]
    if other:
        facts.insert(-1, ("in no row", count_text(other), "fact"))
    for label, fact, style in facts:
        painted += [(f"   {label} ", "label"), (fact, style)]
    since = [(f"counted since {clock_text(baseline.time)} ", "paused")] if baseline else []
    if condition.trouble:
        since = [(f"{safe(condition.trouble)} ", "trouble")]
    return _ended(painted, since, width)


def _graph(look: Look | None, width: int) -> Painted:
    left, right_width = " last 5 min ", 15
    columns = max(0, width - len(left) - right_width)
    bars, peak = spark(look.history, look.time, columns) if look else (" " * columns, 0.0)
    return [(left, "label"), (bars, "graph"), (fitted(f" peak {rate_text(peak)}/s", right_width), "label")]


def _ended(left: Painted, right: Painted, width: int) -> Painted:
    """Left and right parts in one line; the right one gives way where both do not fit."""
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
    """HISTORY_SECONDS of a rate in as many columns, the newest at the right; and the highest column's rate."""
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
    return _bars(_bridged(values))


def _bridged(values: list[float | None]) -> list[float | None]:
    """With long intervals only some columns have a value of their own: it is the rate of those before it, too."""
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
