"""Format numbers and lay out columns in a given width. Pure functions.

A styled line is a list of (text, style); style.py defines the styles. Untrusted text passes through `safe` here and is
never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from rich.cells import cell_len, set_cell_size

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.rows import Line, Order, View
from udpwatch.agent.client.top.servers import ServerOrder

StyledLine = list[tuple[str, str]]


def fitted(text: str, width: int, right: bool = False) -> str:
    """Pad or cut the text to exactly ``width`` cells; a cut text ends with "…"."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * (width - length) + text if right else text + " " * (width - length)


def address_text(address: str, width: int) -> str:
    """Fit an address into ``width`` cells. The middle is cut, because both ends are more significant."""
    address = safe(address)
    if len(address) <= width or width < 3:
        return fitted(address, width)
    tail = (width - 1) // 2
    return fitted(f"{address[: width - 1 - tail]}…{address[len(address) - tail :]}", width)


def rate_text(rate: float | None) -> str:
    """Format a rate in at most five characters."""
    if rate is None:
        return "·"
    if rate == 0:
        return "0"
    if rate < 0.095:
        return f"{rate:.2f}" if rate >= 0.005 else "<0.01"
    return f"{rate:.1f}" if rate < 99.95 else _short(rate)


def count_text(count: float) -> str:
    """Format a count in at most seven characters, exactly if it fits."""
    return f"{count:.0f}" if count < 1e7 else _short(count)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if unit == "" or number >= 9.995 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


def sockets_text(count: int) -> str:
    """Format a number of sockets, with the word."""
    return f"{count_text(count)} socket" + "s" * (count != 1)


def age_text(seconds: float) -> str:
    """Format an age in at most four characters."""
    seconds = max(0.0, seconds)
    for limit, unit, size in ((60, "s", 1), (3600, "m", 60), (86_400, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds / size)}{unit}"
    return f"{int(seconds / 86_400)}d"


def clock_text(time: float) -> str:
    """Format the time of day in the local time zone."""
    return datetime.fromtimestamp(time).strftime("%H:%M:%S")


SortKey = Order | ServerOrder


class TableLine(Protocol):
    """A row of a table."""

    @property
    def is_quiet(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its content, and how it may shrink."""

    name: str
    headings: tuple[str, ...]  # (long, short)
    cell: Callable[[Any, float], str]  # (line, time now) -> text
    right: bool = False
    order: SortKey | None = None
    brief: Callable[[Any, float], str] | None = None  # the same as `cell` in fewer cells
    style: Callable[[Any], str] | None = None  # of a line's cell; None: the column's name
    width: int = 0


#: (names of columns, minimum width): the columns to shrink, in this order
_Shrinks = tuple[tuple[frozenset[str], int], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a table, and how they fit a narrow terminal."""

    columns: tuple[Column, ...]
    minimum: dict[str, int]  # widths of numbers, so that changing numbers do not move the columns
    shrinks: _Shrinks
    shortened: tuple[frozenset[str], ...]  # the columns to shorten, step by step; the first step: only headings
    optional: tuple[str, ...] = ()  # left out where they do not fit, in this order


def _last(line: Line, now: float) -> str:
    return age_text(now - line.row.last) if line.row.last else "-"


#: short forms for narrow terminals
_BRIEF = {
    "kernel-chosen": "kernel",
    "explicit": "app",
    "connected": "conn",
    "forwarded": "fwd",
    "untracked": "untr",
    "unknown": "?",
}
_ADDRESSES = frozenset({"asked", "replied", "bound"})
_NAMES = frozenset({"node", "process", "location"})
SHRINKS: _Shrinks = ((_NAMES, 12), (_ADDRESSES, 13), (_NAMES, 7), (_ADDRESSES, 9))
_NEVER_QUIET = {"replied", "wrong", "paused"}  # styles that a quiet row keeps
_COMFORTABLE = {**dict.fromkeys(_NAMES, 9), **dict.fromkeys(_ADDRESSES, 11)}  # else optional columns are left out


def _brief(word: str) -> str:
    return _BRIEF.get(word) or safe(word)


NODE = Column("node", ("node",), lambda line, _: safe(line.key.node))
NODES = Column("nodes", ("nodes",), lambda line, _: count_text(line.nodes), right=True, style=lambda _: "total")


def name_columns(process: SortKey, location: SortKey, port: SortKey, folded: bool) -> tuple[Column, ...]:
    """Return the columns that name a server, with the orders that they sort by."""
    if folded:
        where = Column("location", ("namespace",), lambda line, _: safe(line.location) or "-", order=location)
    else:
        where = Column(
            "location",
            ("pod or container", "pod"),
            lambda line, _: safe(line.location) or "-",
            order=location,
            brief=lambda line, _: safe(line.key.pod or line.location) or "-",
        )
    return (
        Column("process", ("process",), lambda line, _: safe(line.key.process) or "-", order=process),
        where,
        Column("port", ("port",), lambda line, _: str(line.key.port), right=True, order=port),
    )


_COUNTS = (
    Column("rate", ("rate/s", "/s"), lambda line, _: rate_text(line.rate), right=True, order=Order.RATE),
    Column("total", ("total",), lambda line, _: count_text(line.total), right=True, order=Order.TOTAL),
    Column("last", ("last seen", "last"), _last, right=True, order=Order.LAST),
)
FINDINGS = Table(
    (
        NODE,
        *name_columns(Order.PROCESS, Order.LOCATION, Order.PORT, folded=False),
        Column("asked", ("asked at", "asked"), lambda line, _: safe(line.key.expected)),
        Column(
            "replied",
            ("replied from", "replied"),
            lambda line, _: safe(line.key.actual),
            style=lambda line: "asked" if line.key.is_healed else "replied",
        ),
        Column(
            "verdict",
            ("verdict", "ct"),
            lambda line, _: safe(line.key.verdict),
            brief=lambda line, _: _brief(line.key.verdict),
        ),
        Column("cause", ("cause",), lambda line, _: safe(line.key.cause), brief=lambda line, _: _brief(line.key.cause)),
        *_COUNTS,
    ),
    minimum={"rate": 5, "total": 5, "last": 4, "port": 5},
    shrinks=SHRINKS,
    shortened=(frozenset(), frozenset({"verdict", "cause"}), frozenset({"verdict", "cause", "location"})),
)
FOLDED_FINDINGS = Table(
    (*name_columns(Order.PROCESS, Order.LOCATION, Order.PORT, folded=True), NODES, *_COUNTS),
    minimum={"rate": 5, "total": 5, "last": 4, "port": 5, "nodes": 5},
    shrinks=SHRINKS,
    shortened=(frozenset(),),
)
#: if replies are healed: sums of them have rows of their own
_FOLDED_WITH_HEALED = replace(
    FOLDED_FINDINGS,
    columns=(
        *FOLDED_FINDINGS.columns[:-3],
        Column("verdict", ("replies",), lambda line, _: "healed" if line.key.is_healed else "wrong"),
        *FOLDED_FINDINGS.columns[-3:],
    ),
)


def findings_table(view: View) -> Table:
    """Return the table that shows the findings of a view."""
    if view.folded:
        return _FOLDED_WITH_HEALED if any(each.healed_rows for each in view.snapshots) else FOLDED_FINDINGS
    return FINDINGS


def columns_for(
    lines: Sequence[Any], width: int, cluster: bool, order: SortKey, table: Table = FINDINGS
) -> tuple[Column, ...]:
    """Lay out the columns for ``lines`` in ``width`` cells.

    If they do not fit, headings are shortened first, then words with a short form; then optional columns are left out,
    and names and at last addresses shrink.
    """
    columns = [column for column in table.columns if cluster or column.name != "node"]
    laid = [_natural(column, lines, order, table) for column in columns]
    for brief in table.shortened:
        if _total(laid) <= width:
            break
        laid = [_natural(_shortened(column, column.name in brief), lines, order, table) for column in columns]
    for name in table.optional:
        if _total([replace(each, width=min(each.width, _COMFORTABLE.get(each.name, width))) for each in laid]) <= width:
            break
        laid = [each for each in laid if each.name != name]
    return tuple(_spread(_shrunk(laid, width, table.shrinks), width))


def _shortened(column: Column, words: bool) -> Column:
    """Use the short heading and, with ``words``, the short form of the content."""
    cell = column.brief if words and column.brief else column.cell
    return replace(column, headings=column.headings[-1:], cell=cell)


def _natural(column: Column, lines: Sequence[Any], order: SortKey, table: Table) -> Column:
    """Set the width to that of the content or of the heading with its arrow."""
    content = table.minimum.get(column.name, 0)
    if column.name == "total":
        content = max([content, *(len(count_text(line.total)) for line in lines)])
    elif not content:
        content = max(map(cell_len, {column.cell(line, 0.0) for line in lines}), default=0)
    arrow = 1 if column.order is order else 0
    return replace(column, width=max(content, cell_len(column.headings[0]) + arrow))


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(columns) - 1


def _shrunk(columns: Sequence[Column], width: int, shrinks: _Shrinks) -> list[Column]:
    """Shrink the widest column of ``shrinks``, one cell at a time; if all are at their minimum, shrink any column."""
    widths = [column.width for column in columns]
    for _ in range(_total(columns) - width):
        for names, minimum in shrinks:
            candidates = [at for at, each in enumerate(columns) if each.name in names and widths[at] > minimum]
            if candidates:
                break
        else:
            candidates = [at for at in range(len(columns)) if widths[at] > 1]
        if not candidates:
            break
        widths[max(candidates, key=lambda at: widths[at])] -= 1
    return [replace(column, width=each) for column, each in zip(columns, widths, strict=True)]


def _spread(columns: Sequence[Column], width: int) -> list[Column]:
    """Divide spare room between the columns, at most three blanks before each."""
    spare = width - _total(columns)
    gap = min(3, spare // len(columns))
    return [replace(column, width=column.width + (gap if at else 0)) for at, column in enumerate(columns)]


def heading(columns: Sequence[Column], order: SortKey, backwards: bool) -> StyledLine:
    """Return the line of headings; an arrow marks the sorted column and its direction."""
    styled: StyledLine = []
    for column in columns:
        arrow = ("▼" if order.falls is not backwards else "▲") if column.order is order else ""
        text = fitted(column.headings[0] + arrow, column.width, column.right)
        styled += [(text, "heading-sorted" if arrow else "heading"), (" ", "heading")]
    return styled[:-1]


def cells(line: TableLine, columns: Sequence[Column], now: float) -> StyledLine:
    """Return one line of a table."""
    quiet = line.is_quiet
    styled: StyledLine = []
    for column in columns:
        style = column.style(line) if column.style else column.name
        if quiet and style not in _NEVER_QUIET:
            style = "quiet"
        cell = column.cell(line, now)
        text = (
            address_text(cell, column.width) if column.name in _ADDRESSES else fitted(cell, column.width, column.right)
        )
        styled += [(text, style), (" ", "gap")]
    return styled[:-1]


def plain(styled: StyledLine) -> str:
    """Return the text without styles."""
    return "".join(text for text, _ in styled).rstrip()
