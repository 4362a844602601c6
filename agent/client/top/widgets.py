"""The widgets of `udpwatch top`: painted lines, a table that draws only the rows in sight, and the help.

Textual's own DataTable keeps a copy of each cell; with thousands of rows that all change each second, telling it
costs more than drawing. This one is handed the whole list and looks at some twenty lines of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget

from udpwatch.agent.client.top.help import help_lines
from udpwatch.agent.client.top.layout import Column, Painted, cells, plain
from udpwatch.agent.client.top.rows import Key, Line, Look

#: every style that layout.py and detail.py paint with
STYLES = (
    "name fact label live paused trouble wrong graph gap heading heading-sorted quiet node process where port asked "
    "answered verdict cause rate total last key"
)


class Lines(Widget):
    """Painted lines, from the first one that is in sight."""

    COMPONENT_CLASSES: ClassVar[set[str]] = set(STYLES.split())

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._lines: Sequence[Painted] = ()
        self._top = 0

    @property
    def text(self) -> list[str]:
        """The characters alone."""
        return [plain(line) for line in self._lines]

    def show(self, lines: Sequence[Painted]) -> None:
        """Draw these, if they are others than before."""
        if lines != self._lines:
            self._lines = lines
            self.scroll_lines(0)
            self.refresh()

    def scroll_lines(self, by: int) -> None:
        """Move what is in sight; 0 only keeps it within what there is."""
        top = max(0, min(self._top + by, len(self._lines) - max(1, self.content_size.height)))
        if top != self._top:
            self._top = top
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """One line, for Textual."""
        at = y + self._top
        painted = self._lines[at] if at < len(self._lines) else []
        return strip_of(self, painted, self.content_size.width, self.rich_style)


def strip_of(widget: Widget, painted: Painted, width: int, base: Style, mark: Style | None = None) -> Strip:
    """A painted line as Textual wants it; ``mark`` goes over each part's own style."""
    segments = []
    for text, name in painted:
        style = widget.get_component_rich_style(name)
        segments.append(Segment(text, style + mark if mark else style))
    return Strip(segments).adjust_cell_length(width, base + mark if mark else base)


def place(index: int, top: int, height: int, count: int) -> int:
    """The first line in sight, so that line ``index`` is: as near to ``top`` as may be."""
    top = min(max(top, index - height + 1), index)
    return max(0, min(top, count - height))


class Findings(Widget, can_focus=True):
    """The table. One row is selected; once the user has moved, it stays selected wherever it goes."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {*STYLES.split(), "selected"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)"),
        Binding("down,j", "move(1)"),
        Binding("pageup", "page(-1)"),
        Binding("pagedown,space", "page(1)"),
        Binding("home,g", "first"),
        Binding("end,G", "last"),
    ]

    class Selected(Message):
        """Another row is the selected one, or it was chosen with the mouse (``opened``)."""

        def __init__(self, opened: bool = False) -> None:
            super().__init__()
            self.opened = opened

    def __init__(self) -> None:
        super().__init__(id="findings")
        self._lines: Sequence[Line] = ()
        self._columns: Sequence[Column] = ()
        self._now = 0.0
        self._index = 0
        self._top = 0
        self._pinned: Key | None = None  # None: the first row, whichever that is
        self._empty = ""

    @property
    def selected(self) -> Line | None:
        """The selected row."""
        return self._lines[self._index] if self._lines else None

    @property
    def range(self) -> tuple[int, int, int]:
        """First and last line in sight, and how many there are; from 1."""
        count = len(self._lines)
        return min(self._top + 1, count), min(self._top + max(1, self.size.height), count), count

    @property
    def text(self) -> list[str]:
        """The rows in sight, in characters."""
        in_sight = self._lines[self._top : self._top + self.size.height]
        return [plain(cells(line, self._columns, self._now)) for line in in_sight]

    def show(self, lines: Sequence[Line], columns: Sequence[Column], now: float, empty: str) -> None:
        """Show these lines, or the word for none; the selected row stays selected, and at its height if it can."""
        self._empty = empty
        before = self._index
        if self._pinned is None:
            self._index = 0
        else:
            at = next((at for at, line in enumerate(lines) if line.key == self._pinned), None)
            self._index = min(before, max(0, len(lines) - 1)) if at is None else at
            if at is not None:
                self._top += at - before
        self._lines, self._columns, self._now = lines, columns, now
        self._settle()

    def _settle(self) -> None:
        self._top = place(self._index, self._top, max(1, self.size.height), len(self._lines))
        self.refresh()

    def _select(self, index: int, pin: bool = True, opened: bool = False) -> None:
        if not self._lines:
            return
        self._index = max(0, min(index, len(self._lines) - 1))
        self._pinned = self._lines[self._index].key if pin else None
        self._settle()
        self.post_message(self.Selected(opened))

    def pin(self) -> None:
        """Keep to the row that is selected now."""
        self._pinned = self.selected.key if self.selected else None

    def action_move(self, by: int) -> None:
        """A line up or down."""
        self._select(self._index + by)

    def action_page(self, by: int) -> None:
        """A screenful up or down."""
        self._select(self._index + by * max(1, self.size.height - 1))

    def action_first(self) -> None:
        """The first row, and whichever comes first from now on."""
        self._select(0, pin=False)

    def action_last(self) -> None:
        """The last row."""
        self._select(len(self._lines) - 1)

    def on_mouse_scroll_up(self) -> None:
        """As three times up."""
        self._select(self._index - 3)

    def on_mouse_scroll_down(self) -> None:
        """As three times down."""
        self._select(self._index + 3)

    def on_click(self, event: events.Click) -> None:
        """Select; a second click opens."""
        at = self._top + event.y
        if at < len(self._lines):
            self._select(at, opened=event.chain > 1)

    def on_resize(self) -> None:
        """Keep the selected row in sight."""
        self._settle()

    def render_line(self, y: int) -> Strip:
        """One line, for Textual."""
        at = self._top + y
        if at >= len(self._lines):
            painted: Painted = [] if self._lines or y != 1 else [(f" {self._empty}", "label")]
            return strip_of(self, painted, self.size.width, self.rich_style)
        mark = self.get_component_rich_style("selected", partial=True) if at == self._index else None
        painted = cells(self._lines[at], self._columns, self._now)
        return strip_of(self, painted, self.size.width, self.rich_style, mark)


class Help(ModalScreen[None]):
    """Keys, columns and what this machine does not allow; any key closes it."""

    def __init__(self, look: Look | None) -> None:
        super().__init__()
        self._look = look

    def compose(self) -> ComposeResult:
        """One block of lines."""
        yield Lines("help")

    def on_mount(self) -> None:
        """Fill it."""
        self._fill()

    def on_resize(self) -> None:
        """Fold anew."""
        self._fill()

    def _fill(self) -> None:
        self.query_one(Lines).show(help_lines(self._look, min(self.app.size.width, 100) - 6))

    def on_key(self, event: events.Key) -> None:
        """Scroll, or close."""
        event.stop()
        step = {"down": 1, "j": 1, "up": -1, "k": -1, "pagedown": 10, "pageup": -10}.get(event.key)
        if step:
            self.query_one(Lines).scroll_lines(step)
        else:
            self.dismiss()
