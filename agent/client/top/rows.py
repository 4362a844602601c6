"""What `udpwatch top` shows, without a screen: looks at one node or many, rates, order, filter, baseline. No I/O.

Rules
1. A Look is all that a view sees. It never changes; another one takes its place.
2. A rate is what was added over the last RATE_SECONDS, or since the look before where that is longer ago. An agent that
   was started again counts from 0.
3. Rows that are equal in what they are sorted by keep one order, so that a screen is calm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from udpwatch.agent.model import Row, Snapshot

RATE_SECONDS = 5.0
HISTORY_SECONDS = 300.0


class Key(NamedTuple):
    """What makes a row the same one in two looks."""

    node: str
    process: str
    namespace: str
    pod: str
    container: str
    port: int
    expected: str
    actual: str
    verdict: str
    cause: str


def key_of(node: str, row: Row) -> Key:
    """The key of a node's row."""
    sender = row.sender
    who = (sender.process, sender.namespace, sender.pod, sender.container)
    return Key(node, *who, row.port, row.expected, row.actual, row.verdict, row.cause)


@dataclass(frozen=True, slots=True)
class Look:
    """One look at one node, or at all nodes of a cluster. Rates are per second; None: not known yet."""

    time: float  # seconds since the epoch
    snapshots: tuple[Snapshot, ...]
    cluster: bool = False  # rows need their node's name
    rates: Mapping[Key, float] | None = None
    wrong: float | None = None
    checked: float | None = None
    history: tuple[tuple[float, float], ...] = ()  # (time, wrong per second until then)


class Meter:
    """Fills in the rates of looks that come one after the other."""

    def __init__(self) -> None:
        self._before: Look | None = None
        self._counts: dict[Key, int] = {}
        self._steps: deque[tuple[float, float, dict[Key, int], int, int]] = deque()
        self._history: deque[tuple[float, float]] = deque()

    def add(self, look: Look) -> Look:
        """The look with its rates. A source that knows rates itself (Prometheus) keeps them."""
        before, self._before = self._before, look
        counts = {key_of(each.node, row): row.count for each in look.snapshots for row in each.rows}
        elapsed = look.time - before.time if before else 0.0
        if before and elapsed > 0 and look.rates is None:
            self._step(before, look, counts, elapsed)
            look = self._rated(look)
        elif before and elapsed == 0 and look.rates is None and self._steps:
            look = self._rated(look)  # the same reading again
        elif elapsed < 0:  # somebody set the clock back
            self._steps.clear()
            self._history.clear()
        if look.wrong is not None and elapsed > 0:
            self._history.append((look.time, self._last_rate(look)))
            while self._history[0][0] < look.time - HISTORY_SECONDS:
                self._history.popleft()
        self._counts = counts
        return replace(look, history=tuple(self._history))

    def _step(self, before: Look, look: Look, counts: dict[Key, int], elapsed: float) -> None:
        old = {each.node: each for each in before.snapshots}
        added = {}
        other = checked = 0
        for each in look.snapshots:
            known = old.get(each.node)
            same = known is not None and known.started == each.started
            for row in each.rows:
                key = key_of(each.node, row)
                more = _more(counts[key], self._counts.get(key, 0) if same else 0)
                if more:
                    added[key] = more
            other += _more(each.other, known.other if known and same else 0)
            checked += _more(each.checked, known.checked if known and same else 0)
        self._steps.append((look.time, elapsed, added, other, checked))
        while len(self._steps) > 1 and self._steps[0][0] <= look.time - RATE_SECONDS:
            self._steps.popleft()

    def _rated(self, look: Look) -> Look:
        seconds = sum(step[1] for step in self._steps)
        sums: dict[Key, int] = {}
        for _, _, added, _, _ in self._steps:
            for key, more in added.items():
                sums[key] = sums.get(key, 0) + more
        return replace(
            look,
            rates={key: more / seconds for key, more in sums.items()},
            wrong=(sum(sums.values()) + sum(step[3] for step in self._steps)) / seconds,
            checked=sum(step[4] for step in self._steps) / seconds,
        )

    def _last_rate(self, look: Look) -> float:
        """Of the last step alone: history is not smoothed twice."""
        if not self._steps:
            return look.wrong or 0.0
        _, elapsed, added, other, _ = self._steps[-1]
        return (sum(added.values()) + other) / elapsed


def _more(now: int, before: int) -> int:
    return now - before if now >= before else now


@dataclass(frozen=True, slots=True)
class Line:
    """A row as it is shown."""

    key: Key
    row: Row
    where: str  # namespace/pod, else container, else the interface that another machine's reply came in by
    rate: float | None
    total: int  # since the baseline


class Order(StrEnum):
    """What rows are sorted by: numbers fall, names rise."""

    RATE = "rate"
    TOTAL = "total"
    LAST = "last"
    PROCESS = "process"
    WHERE = "where"
    PORT = "port"

    @property
    def next(self) -> Order:
        """The one that follows when `s` is pressed."""
        every = list(Order)
        return every[(every.index(self) + 1) % len(every)]

    @property
    def falls(self) -> bool:
        """Whether the largest comes first."""
        return self in {Order.RATE, Order.TOTAL, Order.LAST}


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where totals count from, since `c` was pressed."""

    time: float
    counts: Mapping[Key, int]
    other: int


def baseline_of(look: Look) -> Baseline:
    """Totals from this look on."""
    counts = {key_of(each.node, row): row.count for each in look.snapshots for row in each.rows}
    return Baseline(look.time, counts, sum(each.other for each in look.snapshots))


def rows(
    look: Look, order: Order, backwards: bool = False, words: str = "", baseline: Baseline | None = None
) -> list[Line]:
    """The lines to show: those that have all of ``words`` in them and, after a clear, those that grew since."""
    rates = look.rates
    lines: list[Line] = []
    for each in look.snapshots:
        for row in each.rows:
            key = key_of(each.node, row)
            total = _more(row.count, baseline.counts.get(key, 0)) if baseline else row.count
            if not total:
                continue
            lines.append(Line(key, row, where_of(row), None if rates is None else rates.get(key, 0.0), total))
    lines = matching(lines, words)
    lines.sort(key=lambda line: line.key)
    if order is not Order.TOTAL:
        lines.sort(key=lambda line: -line.total)
    lines.sort(key=_SORTED_BY[order], reverse=order.falls is not backwards)
    return lines


def matching(lines: list[Line], words: str) -> list[Line]:
    """Those that have all of ``words`` in what is known about them."""
    wanted = words.casefold().split()
    return [line for line in lines if _has(line, wanted)] if wanted else lines


_SORTED_BY = {
    Order.RATE: lambda line: line.rate or 0.0,
    Order.TOTAL: lambda line: line.total,
    Order.LAST: lambda line: line.row.last,
    Order.PROCESS: lambda line: line.key.process.casefold(),
    Order.WHERE: lambda line: line.where.casefold(),
    Order.PORT: lambda line: line.key.port,
}


def where_of(row: Row) -> str:
    """Where the server runs: pod, else container; of a forwarded reply the interface it came in by; "" on the host."""
    sender = row.sender
    if sender.pod:
        return f"{sender.namespace}/{sender.pod}" if sender.namespace else sender.pod
    if sender.container or not row.interface:
        return sender.container
    return f"via {row.interface}"


def other_of(look: Look, baseline: Baseline | None) -> int:
    """Wrong replies beyond the agents' limit of rows."""
    return _more(sum(each.other for each in look.snapshots), baseline.other if baseline else 0)


def total_of(look: Look, baseline: Baseline | None) -> int:
    """All wrong replies, in rows or not."""
    found = ((key_of(each.node, row), row.count) for each in look.snapshots for row in each.rows)
    counts = baseline.counts if baseline else {}
    return sum(_more(count, counts.get(key, 0)) for key, count in found) + other_of(look, baseline)


def _has(line: Line, wanted: Sequence[str]) -> bool:
    key, row = line.key, line.row
    sender = row.sender
    texts = (key.node, key.process, line.where, sender.container, str(key.port), key.expected, key.actual)
    text = "\n".join((*texts, key.verdict, key.cause, sender.command, sender.executable)).casefold()
    return all(word in text for word in wanted)
