"""Format events as aligned lines. A column grows with its widest cell and never shrinks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _END = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"

#: column -> initial width, chosen so that the lines of a small network fit 80 columns
_COLUMNS = {
    "time": 8,
    "server": 8,
    "port": 4,
    "asked": 9,
    "replied from": 9,
    "verdict": 3,
    "cause": 13,
    "client": 0,
}
_MAX_WIDTH = 46  # fits an IPv6 address with a zone; a longer cell shifts its own line only
_STYLES = {"time": _DIM, "server": _BOLD, "replied from": _RED}
_VERDICT_STYLES = {"new": _RED, "untracked": _YELLOW, "healed": _GREEN}


def safe(text: str) -> str:
    """Replace the characters that would move the cursor or reverse the direction of the text."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def safe_lines(text: str) -> str:
    """Apply `safe` to each line."""
    return "\n".join(map(safe, text.splitlines()))


def safe_paragraph(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Wrap a text into lines, the first of which begins with ``first`` and the others with ``rest``; apply `safe` to
    each. Words are not broken.
    """
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return list(map(safe, lines))


class EventLines:
    """Formats each event as a line."""

    def __init__(self, colour: bool, zone: tzinfo | None = None) -> None:
        """``zone``: the time zone to show times in; None: this machine's."""
        self._colour, self._zone = colour, zone
        self._widths = dict(_COLUMNS)

    def head(self) -> str:
        """Return the line of column headings."""
        names = {name: name.upper() for name in _COLUMNS} | {"replied from": "FROM"}
        names["verdict"] = names["verdict"][: self._widths["verdict"]]  # the heading must not widen its column
        line = self._aligned(names)
        return f"{_BOLD}{line}{_END}" if self._colour else line

    def line(self, event: Mapping[str, Any]) -> str:
        """Format one event (docs/events.md). A missing value is shown as "-"."""
        cells = {
            "time": self._clock(_text(event.get("time"))),
            "server": server_of(event),
            "port": _text(event.get("port")),
            "asked": _text(event.get("expected")),
            "replied from": _text(event.get("actual")),
            "verdict": _text(event.get("verdict")),
            "cause": _text(event.get("cause")),
            "client": _text(event.get("peer")),
        }
        styles = _STYLES | {"verdict": _VERDICT_STYLES.get(cells["verdict"], _DIM)}
        if event.get("healed"):
            styles["replied from"] = _GREEN
        return self._aligned(cells, styles if self._colour else {})

    def _aligned(self, cells: Mapping[str, str], styles: Mapping[str, str] = {}) -> str:
        parts = []
        for name, cell in cells.items():
            width = self._widths[name] = max(self._widths[name], min(len(cell), _MAX_WIDTH))
            padding = " " * (width - len(cell))
            style = styles.get(name)
            styled = f"{style}{cell}{_END}" if style else cell
            parts.append(padding + styled if name == "port" else styled + padding)
            if name == "asked":
                parts.append("->")
        return " ".join(parts).rstrip()

    def _clock(self, time: str) -> str:
        try:
            return datetime.fromisoformat(time).astimezone(self._zone).strftime("%H:%M:%S")
        except (ValueError, OverflowError):
            return time


def server_of(event: Mapping[str, Any]) -> str:
    """Return the process and its pod, else its container; for another machine, the interface that leads to it."""
    pod, namespace = event.get("pod"), event.get("namespace")
    owner = f"{namespace}/{pod}" if pod and namespace else pod or event.get("container")
    process = event.get("process") or (f"via {event.get('interface')}" if event.get("interface") else None)
    return _text(f"{process or '-'}@{owner}" if owner else process)


def _text(value: object) -> str:
    return safe(str(value)) if value not in (None, "") else "-"
