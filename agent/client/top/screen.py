"""The screen of `udpwatch top`. It draws the last update and never waits for the source."""

from __future__ import annotations

import asyncio
import os
import signal
import termios
import time
from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.filter import LineFilter, NoColor
from textual.message import Message

from udpwatch.agent.client.top.banner import SourceState, banner, nothing_wrong
from udpwatch.agent.client.top.detail import detail, folded_detail, title
from udpwatch.agent.client.top.feed import Feed, Update
from udpwatch.agent.client.top.layout import StyledLine, clock_text, columns_for, findings_table, heading
from udpwatch.agent.client.top.rows import Baseline, Key, Line, Order, View, baseline_of, matching, rows
from udpwatch.agent.client.top.server_table import no_servers, server_detail, server_title, servers_table
from udpwatch.agent.client.top.servers import ServerLine, ServerOrder, server_rows
from udpwatch.agent.client.top.sources import ViewSource, Wanted
from udpwatch.agent.client.top.style import CSS
from udpwatch.agent.client.top.traffic import ServerKey
from udpwatch.agent.client.top.widgets import FilterField, Help, RowTable, TextPane
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Row, Server

#: returns how to fix the server of a row, or ""
Fix = Callable[[Row | Server], str]

_KEYS = (("s", "sort"), ("/", "filter"), ("p", "pause"), ("c", "clear"), ("⏎", "detail"), ("?", "help"), ("q", "quit"))
_LESS_IMPORTANT = ("clear", "pause", "sort")  # keys that a narrow screen does not show
_TABLE_LINES = 5  # that the detail pane leaves for the table
_DETAIL_LINES = 14  # that the detail pane may use on any screen


def end_without_terminal() -> None:
    """End the process at once if its terminal is gone. There is nothing to restore, and Textual would wait without end
    for its last output, and read the end of its input in a loop. An agent that was started here ends with its parent.
    """
    try:
        termios.tcgetattr(0)
    except termios.error:
        os._exit(0)


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
        # They move the focus, so they need priority: otherwise keys that are already queued go to the old focus.
        Binding("slash", "filter", priority=True),
        Binding("enter", "keep_filter", priority=True),
        Binding("escape", "clear_filter", priority=True),
        Binding("escape", "close"),
        Binding("p", "pause"),
        Binding("tab", "switch", priority=True),
        Binding("g", "group"),
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
        servers: bool = False,
    ) -> None:
        """Without a source, nothing is read; a test then calls `take`. ``servers``: begin with the table of servers."""
        super().__init__()
        self._fix, self._clock = fix, clock
        self._source_name = source.name if source else name
        self._feed = Feed(source, interval, self._post_update) if source else None
        self._newest: View | None = None
        self._shown: View | None = None  # the newest view, or the one when the screen was paused
        self._error = ""
        self._paused: float | None = None
        self._baseline: Baseline | None = None
        self._servers = servers
        self._orders: list[tuple[Order | ServerOrder, bool]] = [(Order.RATE, False), (ServerOrder.RISK, False)]
        self._only: Key | ServerKey | None = None  # the folded row of which single rows are shown
        self._words = ""
        self._detail = False
        self._events: tuple[Key | None, tuple[dict[str, Any], ...]] = (None, ())

    # Widgets

    def compose(self) -> ComposeResult:
        """Create the widgets from top to bottom."""
        yield TextPane("banner")
        yield TextPane("heading")
        yield RowTable()
        yield TextPane("detail")
        yield FilterField()
        yield TextPane("keys")

    def on_mount(self) -> None:
        """Start reading; make SIGTERM and SIGHUP end the screen as `q` does."""
        self.screen.set_focus(self.query_one(RowTable))
        if not self.is_headless:
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self._end)
            self.set_interval(1.0, end_without_terminal)
        if self._feed:
            self._feed.want(Wanted(self._servers))
            self._feed.start()
        self.set_interval(1.0, self._draw_banner)
        self._draw()

    def _end(self) -> None:
        end_without_terminal()
        self.exit()

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
            table = self.query_one(RowTable)
        except NoMatches:  # the screen is closing
            return
        view, (order, backwards) = self._shown, self._orders[self._servers]
        if view:
            layout = servers_table(view) if self._servers else findings_table(view)
            lines = self._lines(view)
            # The columns are laid out for all lines, so that they do not move while a filter is typed.
            columns = columns_for(lines, self.size.width, view.cluster, order, layout)
            table.show(matching(lines, self._words), columns, view.time, self._empty_text(view))
            self.query_one("#heading", TextPane).show([heading(columns, order, backwards)])
        self._draw_detail()
        self._draw_banner()
        self._draw_keys()

    def _lines(self, view: View) -> list[Any]:
        order, backwards = self._orders[self._servers]
        if isinstance(order, ServerOrder):
            return server_rows(view, order, backwards)
        return rows(view, order, backwards, baseline=self._baseline)

    def _empty_text(self, view: View) -> str:
        """Return the text that an empty table shows."""
        if self._words:
            return "No row contains these words. Esc clears the filter."
        if self._servers:
            return no_servers(view)
        if self._baseline:
            return f"No wrong reply since {clock_text(self._baseline.time)}. C restores the full totals."
        return nothing_wrong(view, " (Tab)")

    def _draw_banner(self) -> None:
        source = SourceState(self._source_name, self._clock(), self._paused, self._error)
        styled = banner(self._shown, source, self._baseline, self.size.width)
        for pane in self.screen_stack[0].query("#banner").results(TextPane):  # none while the screen is closed
            pane.show(styled)

    def _draw_detail(self) -> None:
        pane, line = self.query_one("#detail", TextPane), self.query_one(RowTable).selected
        pane.display = self._detail and line is not None
        if not self._detail or line is None or self._shown is None:
            return
        styled = self._detail_lines(line, self._shown)
        room = min(self.size.height - 5 - _TABLE_LINES, max(_DETAIL_LINES, self.size.height // 2))
        pane.styles.height = max(3, min(len(styled) + 1, room))
        name = server_title(line) if isinstance(line, ServerLine) else title(line)
        pane.border_title = name.replace("[", "\\[")
        pane.show(styled)

    def _detail_lines(self, line: Line | ServerLine, view: View) -> list[StyledLine]:
        if isinstance(line, ServerLine):
            return server_detail(line, self._fix(line.server) if self._fix else "", self.size.width, view)
        if view.folded:
            return folded_detail(line, self.size.width)
        key, events = self._events
        fix = self._fix(line.row) if self._fix else ""
        return detail(line, events if key == line.key else None, fix, self.size.width, view.cluster)

    def _draw_keys(self) -> None:
        cluster = self._shown is not None and self._shown.cluster
        keys = [("⇥", "findings" if self._servers else "servers"), *_KEYS]
        if cluster:
            keys.insert(1, ("g", "all nodes" if self._only else "each node"))
        if self._servers:
            keys.remove(("c", "clear"))
        room = self.size.width - len(self.query_one(RowTable).position)
        for each in _LESS_IMPORTANT:
            if sum(len(key) + len(action) + 3 for key, action in keys) > room:
                keys = [(key, action) for key, action in keys if action != each]
        styled: StyledLine = []
        for key, action in keys:
            styled += [(f" {key}", "key"), (f" {action} ", "label")]
        position = self.query_one(RowTable).position
        room = max(0, self.size.width - sum(len(text) for text, _ in styled))
        styled.append((position.rjust(room)[:room], "label"))
        self.query_one("#keys", TextPane).show([styled])

    def on_resize(self) -> None:
        """Draw after the widgets have their new sizes."""
        self.call_after_refresh(self._draw)

    # Keys

    def action_sort(self) -> None:
        self._orders[self._servers] = self._orders[self._servers][0].next, False
        self._draw()

    def action_reverse(self) -> None:
        order, backwards = self._orders[self._servers]
        self._orders[self._servers] = order, not backwards
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Disable the keys that move the focus where they mean something else: "/" is a character while the filter is
        typed, and Enter and Esc end the filter only then; none of them acts on the help screen.
        """
        if action not in ("switch", "filter", "keep_filter", "clear_filter"):
            return True
        typed = isinstance(self.focused, FilterField)
        return len(self.screen_stack) == 1 and (action == "switch" or typed == (action != "filter"))

    def action_filter(self) -> None:
        field = self.query_one(FilterField)
        field.display = True
        self.screen.set_focus(field)  # focus() would be applied after keys that are already queued

    def on_input_changed(self, event: FilterField.Changed) -> None:
        """Filter while the words are typed."""
        self._words = event.value
        self._draw()

    def action_keep_filter(self) -> None:
        """Return to the table, and keep the filter."""
        self.screen.set_focus(self.query_one(RowTable))
        # The field may have to handle characters from before this key.
        field = self.query_one(FilterField)
        field.call_later(self._show_filter, field)

    def action_clear_filter(self) -> None:
        """Return to the table, without a filter."""
        self.screen.set_focus(self.query_one(RowTable))
        field = self.query_one(FilterField)
        field.call_later(field.clear)
        field.call_later(self._show_filter, field)

    def _show_filter(self, field: FilterField) -> None:
        field.display = bool(field.value) or self.focused is field

    def action_close(self) -> None:
        """Close the filter, else the detail pane."""
        field = self.query_one(FilterField)
        if field.display:
            self.action_clear_filter()
        elif self._detail:
            self.action_detail()
        elif self._only:
            self.action_group()

    def action_pause(self) -> None:
        """Freeze or resume the screen; reading continues."""
        self._paused = self._clock() if self._paused is None else None
        if self._paused is None:
            self._shown = self._newest
        self._draw()

    def action_clear(self, clear: bool = True) -> None:
        """Count totals of findings from now on, or restore the full totals."""
        if self._servers:
            return
        self._baseline = baseline_of(self._shown) if clear and self._shown else None
        self._draw()

    def action_switch(self) -> None:
        """Switch between findings and servers."""
        self._servers = not self._servers
        self._want(None)

    def action_group(self) -> None:
        """In a cluster, show the rows of each node of the selected row, or fold them; on a node, select the first."""
        table = self.query_one(RowTable)
        if self._shown is None or not self._shown.cluster:
            table.action_first()
        elif self._only or table.selected:
            self._want(None if self._only or table.selected is None else table.selected.key)

    def _want(self, only: Key | ServerKey | None) -> None:
        """Show the chosen table; of a cluster, the folded rows or, with ``only``, the single rows of one of them."""
        before, self._only = self._only, only
        self._detail = False
        self.query_one(RowTable).select_key(before)
        self._follow()
        if self._feed:
            self._feed.want(Wanted(self._servers, only=only))
        if self._paused is not None and self._shown and self._shown.cluster:
            self.action_pause()  # the frozen view does not contain what is wanted
        self._draw()
        self.call_after_refresh(self._draw)

    def action_detail(self) -> None:
        """Open or close the detail pane of the selected row."""
        table = self.query_one(RowTable)
        self._detail = not self._detail and table.selected is not None
        if self._detail:
            table.pin()
        self._follow()
        self._draw()
        self.call_after_refresh(self._draw)

    def on_row_table_selected(self, message: RowTable.Selected) -> None:
        """Show the details of the newly selected row."""
        if message.opened and not self._detail:
            self.action_detail()
            return
        self._follow()
        self._draw_detail()
        self._draw_keys()

    def _follow(self) -> None:
        """Read the events of the selected row while the detail pane is open."""
        line = self.query_one(RowTable).selected
        if self._feed:
            self._feed.follow(line.key if self._detail and isinstance(line, Line) else None)

    def action_scroll_detail(self, by: int) -> None:
        self.query_one("#detail", TextPane).scroll_lines(by)

    def action_help(self) -> None:
        self.push_screen(Help(self._shown, self._servers))
