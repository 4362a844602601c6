"""Events as aligned lines for people. A column is as wide as the widest it has shown so far: it never shrinks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any

_BOLD, _DIM, _RED, _YELLOW, _END = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"

#: column -> its width at first, so that the lines of one small network fit 80 columns
_COLUMNS = {
    "time": 8,
    "server": 8,
    "port": 4,
    "asked": 9,
    "answered from": 9,
    "verdict": 3,
    "cause": 13,
    "client": 0,
}
_MAX_WIDTH = 46  # of a column, [an IPv6 address with a zone]; what is longer pushes its own line out, and no other
_STYLES = {"time": _DIM, "server": _BOLD, "answered from": _RED}
_VERDICT_STYLES = {"new": _RED, "untracked": _YELLOW}


def safe(text: str) -> str:
    """The text with what would move the cursor, or turn the writing around, replaced."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


class Lines:
    """Makes a line of each event."""

    def __init__(self, colour: bool, zone: tzinfo | None = None) -> None:
        """``zone``: of the times shown, None: this machine's."""
        self._colour, self._zone = colour, zone
        self._widths = dict(_COLUMNS)

    def head(self) -> str:
        """The names of the columns."""
        names = {name: name.upper() for name in _COLUMNS} | {"answered from": "FROM"}
        names["verdict"] = names["verdict"][: self._widths["verdict"]]  # it makes no line longer
        line = self._aligned(names)
        return f"{_BOLD}{line}{_END}" if self._colour else line

    def line(self, event: Mapping[str, Any]) -> str:
        """One event, an object of docs/events.md; what it lacks is shown as "-"."""
        cells = {
            "time": self._clock(_text(event.get("time"))),
            "server": server_of(event),
            "port": _text(event.get("port")),
            "asked": _text(event.get("expected")),
            "answered from": _text(event.get("actual")),
            "verdict": _text(event.get("verdict")),
            "cause": _text(event.get("cause")),
            "client": _text(event.get("peer")),
        }
        styles = _STYLES | {"verdict": _VERDICT_STYLES.get(cells["verdict"], _DIM)}
        return self._aligned(cells, styles if self._colour else {})

    def _aligned(self, cells: Mapping[str, str], styles: Mapping[str, str] = {}) -> str:
        parts = []
        for name, cell in cells.items():
            width = self._widths[name] = max(self._widths[name], min(len(cell), _MAX_WIDTH))
            filling = " " * (width - len(cell))
            style = styles.get(name)
            painted = f"{style}{cell}{_END}" if style else cell
            parts.append(filling + painted if name == "port" else painted + filling)
            if name == "asked":
                parts.append("->")
        return " ".join(parts).rstrip()

    def _clock(self, time: str) -> str:
        try:
            return datetime.fromisoformat(time).astimezone(self._zone).strftime("%H:%M:%S")
        except (ValueError, OverflowError):
            return time


def server_of(event: Mapping[str, Any]) -> str:
    """Who answered: the process, with its pod or else its container; another machine by the interface it is behind."""
    pod, namespace = event.get("pod"), event.get("namespace")
    where = f"{namespace}/{pod}" if pod and namespace else pod or event.get("container")
    process = event.get("process") or (f"by {event.get('interface')}" if event.get("interface") else None)
    return _text(f"{process or '-'}@{where}" if where else process)


def _text(value: object) -> str:
    return safe(str(value)) if value not in (None, "") else "-"
