"""The screen of `udpwatch top`. It draws the last update and never waits for the source."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.filter import LineFilter, NoColor
from textual.message import Message
from textual.widgets import Input

from udpwatch.agent.client.top.banner import SourceState, banner
from udpwatch.agent.client.top.detail import detail, title
from udpwatch.agent.client.top.feed import Feed, Update
from udpwatch.agent.client.top.layout import StyledLine, clock_text, columns_for, heading
from udpwatch.agent.client.top.rows import Baseline, Key, Line, Order, View, baseline_of, matching, rows
from udpwatch.agent.client.top.sources import ViewSource
from udpwatch.agent.client.top.style import CSS
from udpwatch.agent.client.top.widgets import Findings, Help, TextPane
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Row

#: returns how to fix the server of a row, or ""
Fix = Callable[[Row], str]

_KEYS = (("s", "sort"), ("/", "filter"), ("p", "pause"), ("c", "clear"), ("⏎", "detail"), ("?", "help"), ("q", "quit"))
_TABLE_LINES = 5  # that the detail pane leaves for the table
_DETAIL_LINES = 14  # that the detail pane may use on any screen


class TopApp(App[UdpwatchError | None]):
    """Returns None, or the error that ended it."""

    CSS = CSS
    TITLE = "udpwatch top"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None  # automatic focus would be applied after keys that are already queued
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", priority=False),
        Binding("s", "sort"),
        Binding("r", "reverse"),
        # It moves the focus, so it needs priority: otherwise keys that are already queued go to the old focus.
        Binding("slash", "filter", priority=True),
        Binding("escape", "close"),
        Binding("p", "pause"),
        Binding("c", "clear"),
        Binding("C", "clear(False)"),
        Binding("enter", "detail"),
        Binding("left_square_bracket", "scroll_detail(-3)"),
        Binding("right_square_bracket", "scroll_detail(3)"),
        Binding("question_mark,h", "help"),
        Binding("ctrl+z", "suspend_process"),
    ]

    class Updated(Message):
        """An update from the feed's thread."""

        def __init__(self, update: Update) -> None:
            super().__init__()
            self.update = update

    def __init__(
        self,
        source: ViewSource | None,
        interval: float = 1.0,
        fix: Fix | None = None,
        clock: Callable[[], float] = time.time,
        name: str = "",
    ) -> None:
        """Without a source, nothing is read; a test then calls `take`."""
        super().__init__()
        self._fix, self._clock = fix, clock
        self._source_name = source.name if source else name
        self._feed = Feed(source, interval, self._post_update) if source else None
        self._newest: View | None = None
        self._shown: View | None = None  # the newest view, or the one when the screen was paused
        self._error = ""
        self._paused: float | None = None
        self._baseline: Baseline | None = None
        self._order, self._backwards = Order.RATE, False
        self._words = ""
        self._detail = False
        self._events: tuple[Key | None, tuple[dict[str, Any], ...]] = (None, ())

    # Widgets

    def compose(self) -> ComposeResult:
        """Create the widgets from top to bottom."""
        yield TextPane("banner")
        yield TextPane("heading")
        yield Findings()
        yield TextPane("detail")
        yield Input(placeholder="words that a row must contain; Esc clears", id="filter", compact=True)
        yield TextPane("keys")

    def on_mount(self) -> None:
        """Start reading; make SIGTERM and a closed terminal (SIGHUP) end the screen as `q` does."""
        self.query_one(Input).cursor_blink = False
        self.screen.set_focus(self.query_one(Findings))
        if not self.is_headless:
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        if self._feed:
            self._feed.start()
        self.set_interval(1.0, self._draw_banner)
        self._draw()

    def on_unmount(self) -> None:
        if self._feed:
            self._feed.stop()

    def get_line_filters(self) -> list[LineFilter]:
        """With NO_COLOR, use no colours at all; Textual would use shades of grey."""
        return [NoColor()] if self.no_color else list(super().get_line_filters())

    # Updates

    def _post_update(self, update: Update) -> None:
        """Hand an update from the feed's thread to the screen's thread."""
        self.post_message(self.Updated(update))

    def on_top_app_updated(self, message: Updated) -> None:
        self.take(message.update)

    def take(self, update: Update) -> None:
        """Apply an update and draw it."""
        if update.fatal:
            self.exit(update.fatal)
            return
        self._error = update.error
        if update.view:
            self._newest = update.view
            if self._paused is None:
                self._shown = update.view
        if update.key:
            self._events = update.key, update.events
        self._draw()

    # Drawing

    def _draw(self) -> None:
        try:
            table = self.query_one(Findings)
        except NoMatches:  # the screen is closing
            return
        view = self._shown
        lines: list[Line] = []
        if view:
            lines = rows(view, self._order, self._backwards, baseline=self._baseline)
            # The columns are laid out for all lines, so that they do not move while a filter is typed.
            columns = columns_for(lines, self.size.width, view.cluster, self._order)
            table.show(matching(lines, self._words), columns, view.time, self._empty_text())
            self.query_one("#heading", TextPane).show([heading(columns, self._order, self._backwards)])
        self._draw_detail()
        self._draw_banner()
        self._draw_keys()

    def _empty_text(self) -> str:
        """Return the text that an empty table shows."""
        if self._words:
            return "No row contains these words. Esc clears the filter."
        if self._baseline:
            return f"No wrong reply since {clock_text(self._baseline.time)}. C restores the full totals."
        return "No wrong reply so far: every reply left from the address that the client asked."

    def _draw_banner(self) -> None:
        source = SourceState(self._source_name, self._clock(), self._paused, self._error)
        styled = banner(self._shown, source, self._baseline, self.size.width)
        self.screen_stack[0].query_one("#banner", TextPane).show(styled)

    def _draw_detail(self) -> None:
        pane, line = self.query_one("#detail", TextPane), self.query_one(Findings).selected
        pane.display = self._detail and line is not None
        if not self._detail or line is None or self._shown is None:
            return
        key, events = self._events
        fix = self._fix(line.row) if self._fix else ""
        styled = detail(line, events if key == line.key else None, fix, self.size.width, self._shown.cluster)
        room = min(self.size.height - 5 - _TABLE_LINES, max(_DETAIL_LINES, self.size.height // 2))
        pane.styles.height = max(3, min(len(styled) + 1, room))
        pane.border_title = title(line).replace("[", "\\[")
        pane.show(styled)

    def _draw_keys(self) -> None:
        styled: StyledLine = []
        for key, action in _KEYS:
            styled += [(f" {key}", "key"), (f" {action} ", "label")]
        first, last, count = self.query_one(Findings).range
        position = f"{first}-{last} of {count} " if count else ""
        room = max(0, self.size.width - sum(len(text) for text, _ in styled))
        styled.append((position.rjust(room)[:room], "label"))
        self.query_one("#keys", TextPane).show([styled])

    def on_resize(self) -> None:
        """Draw after the widgets have their new sizes."""
        self.call_after_refresh(self._draw)

    # Keys

    def action_sort(self) -> None:
        self._order, self._backwards = self._order.next, False
        self._draw()

    def action_reverse(self) -> None:
        self._backwards = not self._backwards
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Disable the filter key while the filter is typed, where "/" is a character, and on the help screen."""
        return action != "filter" or (len(self.screen_stack) == 1 and not isinstance(self.focused, Input))

    def action_filter(self) -> None:
        field = self.query_one(Input)
        field.display = True
        self.screen.set_focus(field)  # focus() would be applied after keys that are already queued

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while the words are typed."""
        self._words = event.value
        self._draw()

    def on_input_submitted(self) -> None:
        """Keep the filter and return to the table."""
        field = self.query_one(Input)
        field.display = bool(field.value)
        self.screen.set_focus(self.query_one(Findings))

    def action_close(self) -> None:
        """Close the filter, else the detail pane."""
        field = self.query_one(Input)
        if field.display:
            field.value = ""
            field.display = False
            self.screen.set_focus(self.query_one(Findings))
        elif self._detail:
            self.action_detail()

    def action_pause(self) -> None:
        """Freeze or resume the screen; reading continues."""
        self._paused = self._clock() if self._paused is None else None
        if self._paused is None:
            self._shown = self._newest
        self._draw()

    def action_clear(self, clear: bool = True) -> None:
        """Count totals from now on, or restore the full totals."""
        self._baseline = baseline_of(self._shown) if clear and self._shown else None
        self._draw()

    def action_detail(self) -> None:
        """Open or close the detail pane of the selected row."""
        table = self.query_one(Findings)
        self._detail = not self._detail and table.selected is not None
        if self._detail:
            table.pin()
        self._follow()
        self._draw()
        self.call_after_refresh(self._draw)

    def on_findings_selected(self, message: Findings.Selected) -> None:
        """Show the details of the newly selected row."""
        if message.opened and not self._detail:
            self.action_detail()
            return
        self._follow()
        self._draw_detail()
        self._draw_keys()

    def _follow(self) -> None:
        """Read the events of the selected row while the detail pane is open."""
        line = self.query_one(Findings).selected
        if self._feed:
            self._feed.follow(line.key if self._detail and line else None)

    def action_scroll_detail(self, by: int) -> None:
        self.query_one("#detail", TextPane).scroll_lines(by)

    def action_help(self) -> None:
        self.push_screen(Help(self._shown))
