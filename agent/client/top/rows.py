"""The data of `udpwatch top`: snapshots of one node or many, rates, order, filter, baseline. No I/O.

Rules
1. A View contains everything that is displayed. It is immutable; the next View replaces it.
2. A rate is the increase over the last RATE_SECONDS, or since the previous View if that is older. The counts of a
   restarted agent begin at 0.
3. Rows with equal sort keys keep a stable order, so that the screen does not flicker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from udpwatch.agent.client.top.traffic import Rates, ServerKey, ServerMeter
from udpwatch.agent.model import Row, Snapshot, Verdict

RATE_SECONDS = 5.0
HISTORY_SECONDS = 300.0


class Key(NamedTuple):
    """Identifies a row across views."""

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

    @property
    def is_healed(self) -> bool:
        """Whether the replies of the row were healed, and are not wrong."""
        return self.verdict == Verdict.HEALED


def key_of(node: str, row: Row) -> Key:
    sender = row.sender
    names = (sender.process, sender.namespace, sender.pod, sender.container)
    return Key(node, *names, row.port, row.expected, row.actual, row.verdict, row.cause)


@dataclass(frozen=True, slots=True)
class Healed:
    """What the agents of a view heal."""

    replies: int  # healed so far
    servers: int  # with healed replies
    refused: int = 0  # sends that may have left from a wrong address
    idle: int = 0  # agents that have healing enabled and heal nothing now


@dataclass(frozen=True, slots=True)
class View:
    """The data of one node, or of all nodes of a cluster, at one moment. Rates are per second; None: not known yet."""

    time: float  # seconds since the epoch
    snapshots: tuple[Snapshot, ...]
    cluster: bool = False  # whether rows show their node
    rates: Mapping[Key, float] | None = None
    wrong: float | None = None
    checked: float | None = None
    history: tuple[tuple[float, float], ...] = ()  # (time, wrong replies per second before it)
    server_rates: Mapping[ServerKey, Rates] | None = None
    folded: bool = False  # whether a row is the sum of a process and port on many nodes
    nodes: Mapping[Key | ServerKey, int] = field(default_factory=dict)  # of a folded row
    node_count: int | None = None  # None: as many as there are snapshots
    found: int | None = None  # number of findings; None: as many as there are rows
    at_risk: int | None = None  # sockets; None: the snapshots tell
    has_servers: bool = True  # whether the source was asked for servers
    folded_servers: View | None = None  # the servers, if only they are folded
    healed: Healed | None = None  # None: the snapshots tell


class Meter:
    """Computes the rates of consecutive views."""

    def __init__(self) -> None:
        self._before: View | None = None
        self._counts: dict[Key, int] = {}
        self._steps: deque[tuple[float, float, dict[Key, int], int, int]] = deque()
        self._history: deque[tuple[float, float]] = deque()
        self._servers = ServerMeter()

    def add(self, view: View) -> View:
        """Return the view with its rates. Rates from the source itself (Prometheus) are kept."""
        before, self._before = self._before, view
        if view.server_rates is None:
            view = replace(view, server_rates=self._servers.add(view.time, view.snapshots))
        counts = {key_of(each.node, row): row.count for each in view.snapshots for row in each.rows}
        elapsed = view.time - before.time if before else 0.0
        if before and elapsed > 0 and view.rates is None:
            self._step(before, view, counts, elapsed)
            view = self._rated(view)
        elif before and elapsed == 0 and view.rates is None and self._steps:
            view = self._rated(view)  # the same snapshot as before
        elif elapsed < 0:  # the clock was set back
            self._steps.clear()
            self._history.clear()
        if view.wrong is not None and elapsed > 0:
            self._history.append((view.time, self._last_rate(view)))
            while self._history[0][0] < view.time - HISTORY_SECONDS:
                self._history.popleft()
        self._counts = counts
        return replace(view, history=tuple(self._history))

    def _step(self, before: View, view: View, counts: dict[Key, int], elapsed: float) -> None:
        old = {each.node: each for each in before.snapshots}
        added = {}
        other = checked = 0
        for each in view.snapshots:
            known = old.get(each.node)
            same = known is not None and known.started == each.started
            for row in each.rows:
                key = key_of(each.node, row)
                increase = _increase(counts[key], self._counts.get(key, 0) if same else 0)
                if increase:
                    added[key] = increase
            other += _increase(each.other, known.other if known and same else 0)
            checked += _increase(each.checked, known.checked if known and same else 0)
        self._steps.append((view.time, elapsed, added, other, checked))
        while len(self._steps) > 1 and self._steps[0][0] <= view.time - RATE_SECONDS:
            self._steps.popleft()

    def _rated(self, view: View) -> View:
        seconds = sum(step[1] for step in self._steps)
        sums: dict[Key, int] = {}
        for _, _, added, _, _ in self._steps:
            for key, increase in added.items():
                sums[key] = sums.get(key, 0) + increase
        return replace(
            view,
            rates={key: increase / seconds for key, increase in sums.items()},
            wrong=(_wrong_of(sums) + sum(step[3] for step in self._steps)) / seconds,
            checked=sum(step[4] for step in self._steps) / seconds,
        )

    def _last_rate(self, view: View) -> float:
        """Return the rate of the last step alone, because the history must not be smoothed twice."""
        if not self._steps:
            return view.wrong or 0.0
        _, elapsed, added, other, _ = self._steps[-1]
        return (_wrong_of(added) + other) / elapsed


def _wrong_of(counts: Mapping[Key, int]) -> int:
    """Add the counts of wrong replies, which healed ones are not."""
    return sum(count for key, count in counts.items() if not key.is_healed)


def _increase(now: int, before: int) -> int:
    """Return the increase of a counter; one that fell has started again from 0."""
    return now - before if now >= before else now


@dataclass(frozen=True, slots=True)
class Line:
    """A row as displayed."""

    key: Key
    row: Row
    location: str  # namespace/pod, else container, else the interface that received another machine's reply
    rate: float | None
    total: int  # since the baseline
    nodes: int = 1  # on which it was found

    @property
    def is_quiet(self) -> bool:
        """Return whether nothing is added."""
        return self.rate == 0

    @property
    def words(self) -> str:
        """Return the text that the filter searches."""
        key, sender = self.key, self.row.sender
        texts = (key.node, key.process, self.location, sender.container, str(key.port), key.expected, key.actual)
        return "\n".join((*texts, key.verdict, key.cause, sender.command, sender.executable)).casefold()


class Order(StrEnum):
    """The sort key of rows: numbers in descending order, names in ascending order."""

    RATE = "rate"
    TOTAL = "total"
    LAST = "last"
    PROCESS = "process"
    LOCATION = "location"
    PORT = "port"

    @property
    def next(self) -> Order:
        """Return the order that the key `s` switches to."""
        every = list(Order)
        return every[(every.index(self) + 1) % len(every)]

    @property
    def falls(self) -> bool:
        """Return whether the largest value comes first."""
        return self in {Order.RATE, Order.TOTAL, Order.LAST}


@dataclass(frozen=True, slots=True)
class Baseline:
    """The counts when `c` was pressed; totals are counted from there."""

    time: float
    counts: Mapping[Key, int]
    other: int


def baseline_of(view: View) -> Baseline:
    counts = {key_of(each.node, row): row.count for each in view.snapshots for row in each.rows}
    return Baseline(view.time, counts, sum(each.other for each in view.snapshots))


def rows(
    view: View, order: Order, backwards: bool = False, words: str = "", baseline: Baseline | None = None
) -> list[Line]:
    """Return the sorted lines that contain all ``words`` and, with a baseline, have increased since.

    In every order, healed rows come after the wrong replies.
    """
    rates = view.rates
    lines: list[Line] = []
    for each in view.snapshots:
        for row in each.rows:
            key = key_of(each.node, row)
            total = _increase(row.count, baseline.counts.get(key, 0)) if baseline else row.count
            if not total:
                continue
            where = key.namespace if view.folded else location_of(row)
            rate = None if rates is None else rates.get(key, 0.0)
            lines.append(Line(key, row, where, rate, total, view.nodes.get(key, 1)))
    lines = matching(lines, words)
    lines.sort(key=lambda line: line.key)
    if order is not Order.TOTAL:
        lines.sort(key=lambda line: -line.total)
    lines.sort(key=_SORTED_BY[order], reverse=order.falls is not backwards)
    lines.sort(key=lambda line: line.key.is_healed)
    return lines


class _Searchable(Protocol):
    @property
    def words(self) -> str: ...


_Row = TypeVar("_Row", bound=_Searchable)


def matching(lines: list[_Row], words: str) -> list[_Row]:
    """Return the lines whose row or sender contains all ``words``."""
    parts = words.casefold().split()
    return [line for line in lines if _contains(line.words, parts)] if parts else lines


_SORTED_BY = {
    Order.RATE: lambda line: line.rate or 0.0,
    Order.TOTAL: lambda line: line.total,
    Order.LAST: lambda line: line.row.last,
    Order.PROCESS: lambda line: line.key.process.casefold(),
    Order.LOCATION: lambda line: line.location.casefold(),
    Order.PORT: lambda line: line.key.port,
}


def location_of(row: Row) -> str:
    """Return the server's pod, else its container, else "via INTERFACE" for a forwarded reply; "": on the host."""
    sender = row.sender
    if sender.pod:
        return f"{sender.namespace}/{sender.pod}" if sender.namespace else sender.pod
    if sender.container or not row.interface:
        return sender.container
    return f"via {row.interface}"


def other_of(view: View, baseline: Baseline | None) -> int:
    """Return the number of wrong replies beyond the agents' limit of rows."""
    return _increase(sum(each.other for each in view.snapshots), baseline.other if baseline else 0)


def total_of(view: View, baseline: Baseline | None) -> int:
    """Return the number of all wrong replies, with those beyond the limit of rows."""
    found = ((key_of(each.node, row), row.count) for each in view.snapshots for row in each.wrong_rows)
    counts = baseline.counts if baseline else {}
    return sum(_increase(count, counts.get(key, 0)) for key, count in found) + other_of(view, baseline)


def _contains(text: str, words: Sequence[str]) -> bool:
    return all(word in text for word in words)
