"""Format numbers and lay out columns in a given width. Pure functions.

A styled line is a list of (text, style); style.py defines the styles. Untrusted text passes through `safe` here and is
never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from rich.cells import cell_len, set_cell_size

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.rows import Line, Order

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
    return f"{address[: width - 1 - tail]}…{address[len(address) - tail :]}"


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


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its content, and how it may shrink."""

    name: str
    headings: tuple[str, ...]  # (long, short)
    cell: Callable[[Line, float], str]  # (line, time now) -> text
    right: bool = False
    order: Order | None = None
    brief: Callable[[Line, float], str] | None = None  # the same as `cell` in fewer cells
    width: int = 0


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
_ADDRESSES = {"asked", "replied"}
_NAMES = {"node", "process", "location"}
#: the columns to shrink, in this order, and their minimum widths
_SHRINK_ORDER = ((_NAMES, 12), (_ADDRESSES, 13), (_NAMES, 7), (_ADDRESSES, 9))


def _brief(word: str) -> str:
    return _BRIEF.get(word) or safe(word)


COLUMNS = (
    Column("node", ("node",), lambda line, _: safe(line.key.node)),
    Column("process", ("process",), lambda line, _: safe(line.key.process) or "-", order=Order.PROCESS),
    Column(
        "location",
        ("pod or container", "pod"),
        lambda line, _: safe(line.location) or "-",
        order=Order.LOCATION,
        brief=lambda line, _: safe(line.key.pod or line.location) or "-",
    ),
    Column("port", ("port",), lambda line, _: str(line.key.port), right=True, order=Order.PORT),
    Column("asked", ("asked at", "asked"), lambda line, _: safe(line.key.expected)),
    Column("replied", ("replied from", "replied"), lambda line, _: safe(line.key.actual)),
    Column(
        "verdict",
        ("verdict", "ct"),
        lambda line, _: safe(line.key.verdict),
        brief=lambda line, _: _brief(line.key.verdict),
    ),
    Column("cause", ("cause",), lambda line, _: safe(line.key.cause), brief=lambda line, _: _brief(line.key.cause)),
    Column("rate", ("rate/s", "/s"), lambda line, _: rate_text(line.rate), right=True, order=Order.RATE),
    Column("total", ("total",), lambda line, _: count_text(line.total), right=True, order=Order.TOTAL),
    Column("last", ("last seen", "last"), _last, right=True, order=Order.LAST),
)


def columns_for(lines: Sequence[Line], width: int, cluster: bool, order: Order) -> tuple[Column, ...]:
    """Lay out the columns for ``lines`` in ``width`` cells.

    If they do not fit, headings are shortened first, then words with a short form, then names, and addresses last.
    """
    columns = [column for column in COLUMNS if cluster or column.name != "node"]
    laid = [_natural(column, lines, order) for column in columns]
    for brief in ((), ("verdict", "cause"), ("verdict", "cause", "location")):
        if _total(laid) <= width:
            break
        laid = [_natural(_shortened(column, column.name in brief), lines, order) for column in columns]
    return tuple(_spread(_shrunk(laid, width), width))


def _shortened(column: Column, words: bool) -> Column:
    """Use the short heading and, with ``words``, the short form of the content."""
    cell = column.brief if words and column.brief else column.cell
    return replace(column, headings=column.headings[-1:], cell=cell)


#: minimum widths, so that changing numbers do not move the columns
_MINIMUM = {"rate": 5, "total": 5, "last": 4, "port": 5}


def _natural(column: Column, lines: Sequence[Line], order: Order) -> Column:
    """Set the width to that of the content or of the heading with its arrow."""
    content = _MINIMUM.get(column.name, 0)
    if column.name == "total":
        content = max([content, *(len(count_text(line.total)) for line in lines)])
    elif not content:
        content = max(map(cell_len, {column.cell(line, 0.0) for line in lines}), default=0)
    arrow = 1 if column.order is order else 0
    return replace(column, width=max(content, cell_len(column.headings[0]) + arrow))


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(columns) - 1


def _shrunk(columns: Sequence[Column], width: int) -> list[Column]:
    """Shrink the widest column of _SHRINK_ORDER, one cell at a time; if all are at their minimum, shrink any column."""
    widths = [column.width for column in columns]
    for _ in range(_total(columns) - width):
        for names, minimum in _SHRINK_ORDER:
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


def heading(columns: Sequence[Column], order: Order, backwards: bool) -> StyledLine:
    """Return the line of headings; an arrow marks the sorted column and its direction."""
    styled: StyledLine = []
    for column in columns:
        arrow = ("▼" if order.falls is not backwards else "▲") if column.order is order else ""
        text = fitted(column.headings[0] + arrow, column.width, column.right)
        styled += [(text, "heading-sorted" if arrow else "heading"), (" ", "heading")]
    return styled[:-1]


def cells(line: Line, columns: Sequence[Column], now: float) -> StyledLine:
    """Return one line of the table."""
    quiet = line.rate == 0
    styled: StyledLine = []
    for column in columns:
        style = "quiet" if quiet and column.name != "replied" else column.name
        cell = column.cell(line, now)
        text = (
            address_text(cell, column.width) if column.name in _ADDRESSES else fitted(cell, column.width, column.right)
        )
        styled += [(text, style), (" ", "gap")]
    return styled[:-1]


def plain(styled: StyledLine) -> str:
    """Return the text without styles."""
    return "".join(text for text, _ in styled).rstrip()
