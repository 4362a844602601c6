"""The widgets of `udpwatch top`: styled lines, a table that draws only its visible rows, and the help screen.

Textual's own DataTable keeps a copy of each cell. With thousands of rows that change every second, updating the copies
costs more than drawing. This table receives the complete list and formats only its visible lines.
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
from textual.widgets import Input

from udpwatch.agent.client.top.help import help_lines
from udpwatch.agent.client.top.layout import Column, StyledLine, cells, plain
from udpwatch.agent.client.top.rows import Key, Line, View
from udpwatch.agent.client.top.servers import ServerLine
from udpwatch.agent.client.top.traffic import ServerKey

#: every style that is used in a styled line
STYLES = (
    "name fact label live paused error wrong graph gap heading heading-sorted quiet node process location port asked "
    "replied verdict cause rate total last key"
)


class FilterField(Input):
    """The words that a row must contain."""

    def __init__(self) -> None:
        super().__init__(placeholder="words that a row must contain; Esc clears", id="filter", compact=True)
        self.cursor_blink = False

    def key_backspace(self, event: events.Key) -> None:
        """Delete here. A binding is run by the app, which then may have moved the focus for a later key."""
        event.stop()
        self.action_delete_left()


class TextPane(Widget):
    """Styled lines that can be scrolled."""

    COMPONENT_CLASSES: ClassVar[set[str]] = set(STYLES.split())

    def __init__(self, id: str) -> None:
        super().__init__(id=id)
        self._lines: Sequence[StyledLine] = ()
        self._top = 0

    @property
    def text(self) -> list[str]:
        """The text of the lines."""
        return [plain(line) for line in self._lines]

    def show(self, lines: Sequence[StyledLine]) -> None:
        """Draw these lines if they differ from the current ones."""
        if lines != self._lines:
            self._lines = lines
            self.scroll_lines(0)
            self.refresh()

    def scroll_lines(self, by: int) -> None:
        """Scroll by some lines; with 0, only correct a position beyond the end."""
        top = max(0, min(self._top + by, len(self._lines) - max(1, self.content_size.height)))
        if top != self._top:
            self._top = top
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw one line; Textual calls this."""
        at = y + self._top
        styled = self._lines[at] if at < len(self._lines) else []
        return strip_of(self, styled, self.content_size.width, self.rich_style)


def strip_of(widget: Widget, styled: StyledLine, width: int, base: Style, mark: Style | None = None) -> Strip:
    """Convert a styled line to Textual's Strip; ``mark`` is added to the style of each part."""
    segments = []
    for text, name in styled:
        style = widget.get_component_rich_style(name)
        segments.append(Segment(text, style + mark if mark else style))
    return Strip(segments).adjust_cell_length(width, base + mark if mark else base)


def first_visible(index: int, top: int, height: int, count: int) -> int:
    """Return the first visible line, as near to ``top`` as possible, so that line ``index`` is visible."""
    top = min(max(top, index - height + 1), index)
    return max(0, min(top, count - height))


class RowTable(Widget, can_focus=True):
    """The table. One row is selected; after the user has moved, that row stays selected wherever it is sorted."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {*STYLES.split(), "selected"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)"),
        Binding("down,j", "move(1)"),
        Binding("pageup", "page(-1)"),
        Binding("pagedown,space", "page(1)"),
        Binding("home", "first"),
        Binding("end,G", "last"),
    ]

    class Selected(Message):
        """Another row is selected; with ``opened``, by a double click."""

        def __init__(self, opened: bool = False) -> None:
            super().__init__()
            self.opened = opened

    def __init__(self) -> None:
        super().__init__(id="rows")
        self._lines: Sequence[Line | ServerLine] = ()
        self._columns: Sequence[Column] = ()
        self._now = 0.0
        self._index = 0
        self._top = 0
        self._pinned: Key | ServerKey | None = None  # None: the first row stays selected
        self._empty = ""

    @property
    def selected(self) -> Line | ServerLine | None:
        return self._lines[self._index] if self._lines else None

    @property
    def range(self) -> tuple[int, int, int]:
        """The first and last visible line, counted from 1, and the number of all lines."""
        count = len(self._lines)
        return min(self._top + 1, count), min(self._top + max(1, self.size.height), count), count

    @property
    def position(self) -> str:
        """The range as text; "" without rows."""
        first, last, count = self.range
        return f"{first}-{last} of {count} " if count else ""

    @property
    def text(self) -> list[str]:
        """The text of the visible rows."""
        visible = self._lines[self._top : self._top + self.size.height]
        return [plain(cells(line, self._columns, self._now)) for line in visible]

    def show(self, lines: Sequence[Line | ServerLine], columns: Sequence[Column], now: float, empty: str) -> None:
        """Show these lines, or the text ``empty`` if there are none. The selected row keeps its place if possible."""
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
        self._redraw()

    def _redraw(self) -> None:
        """Draw the table with the selected row visible."""
        self._top = first_visible(self._index, self._top, max(1, self.size.height), len(self._lines))
        self.refresh()

    def _select(self, index: int, pin: bool = True, opened: bool = False) -> None:
        if not self._lines:
            return
        self._index = max(0, min(index, len(self._lines) - 1))
        self._pinned = self._lines[self._index].key if pin else None
        self._redraw()
        self.post_message(self.Selected(opened))

    def select_key(self, key: Key | ServerKey | None) -> None:
        """Select the row of this key in the next lines; None: stay on the first row."""
        self._pinned, self._index, self._top = key, 0, 0

    def pin(self) -> None:
        """Keep the current row selected wherever it is sorted."""
        self._pinned = self.selected.key if self.selected else None

    def action_move(self, by: int) -> None:
        self._select(self._index + by)

    def action_page(self, by: int) -> None:
        self._select(self._index + by * max(1, self.size.height - 1))

    def action_first(self) -> None:
        """Select the first row, and keep the first row selected when the order changes."""
        self._select(0, pin=False)

    def action_last(self) -> None:
        self._select(len(self._lines) - 1)

    def on_mouse_scroll_up(self) -> None:
        self._select(self._index - 3)

    def on_mouse_scroll_down(self) -> None:
        self._select(self._index + 3)

    def on_click(self, event: events.Click) -> None:
        """Select the row; a double click opens its details."""
        at = self._top + event.y
        if at < len(self._lines):
            self._select(at, opened=event.chain > 1)

    def on_resize(self) -> None:
        self._redraw()

    def render_line(self, y: int) -> Strip:
        """Draw one line; Textual calls this."""
        at = self._top + y
        if at >= len(self._lines):
            styled: StyledLine = [] if self._lines or y != 1 else [(f" {self._empty}", "label")]
            return strip_of(self, styled, self.size.width, self.rich_style)
        mark = self.get_component_rich_style("selected", partial=True) if at == self._index else None
        styled = cells(self._lines[at], self._columns, self._now)
        return strip_of(self, styled, self.size.width, self.rich_style, mark)


class Help(ModalScreen[None]):
    """The help: keys, columns and the agents' notes. Any key but those that scroll closes it."""

    def __init__(self, view: View | None, servers: bool) -> None:
        """``servers``: describe the columns of the table of servers."""
        super().__init__()
        self._look, self._servers = view, servers

    def compose(self) -> ComposeResult:
        yield TextPane("help")

    def on_mount(self) -> None:
        self._fill()

    def on_resize(self) -> None:
        self._fill()

    def _fill(self) -> None:
        self.query_one(TextPane).show(help_lines(self._look, self._servers, min(self.app.size.width, 100) - 6))

    def on_key(self, event: events.Key) -> None:
        """Scroll, or close the help."""
        event.stop()
        step = {"down": 1, "j": 1, "up": -1, "k": -1, "pagedown": 10, "pageup": -10}.get(event.key)
        if step:
            self.query_one(TextPane).scroll_lines(step)
        else:
            self.dismiss()
