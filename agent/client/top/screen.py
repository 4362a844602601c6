"""The screen of `udpwatch top`. It draws what it was last told and never waits for a source."""

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

from udpwatch.agent.client.top.banner import Condition, banner
from udpwatch.agent.client.top.detail import detail, title
from udpwatch.agent.client.top.feed import Feed, News
from udpwatch.agent.client.top.layout import Painted, clock_text, columns_for, heading
from udpwatch.agent.client.top.rows import Baseline, Key, Line, Look, Order, baseline_of, matching, rows
from udpwatch.agent.client.top.sources import Source
from udpwatch.agent.client.top.style import CSS
from udpwatch.agent.client.top.widgets import Findings, Help, Lines
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Row

#: what there is to say about a row beyond itself: the cure of a known server; "" where nothing is known
Remedy = Callable[[Row], str]

_KEYS = (("s", "sort"), ("/", "filter"), ("p", "pause"), ("c", "clear"), ("⏎", "detail"), ("?", "help"), ("q", "quit"))
_LEAST_TABLE = 5  # lines that the detail pane leaves
_DETAIL = 14  # lines that it may have in any case


class TopApp(App[UdpwatchError | None]):
    """Ends with the error that ended it, or None."""

    CSS = CSS
    TITLE = "udpwatch top"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None  # it would come after keys that are typed already
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", priority=False),
        Binding("s", "sort"),
        Binding("r", "reverse"),
        # It moves the focus: it comes first, or keys that are typed already would go where that was before.
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

    class Told(Message):
        """News from the feed's thread."""

        def __init__(self, news: News) -> None:
            super().__init__()
            self.news = news

    def __init__(
        self,
        source: Source | None,
        interval: float = 1.0,
        remedy: Remedy | None = None,
        clock: Callable[[], float] = time.time,
        name: str = "",
    ) -> None:
        """Without a source nothing is asked, and `take` is called by whoever has news: a test."""
        super().__init__()
        self._remedy, self._clock = remedy, clock
        self._source_name = source.name if source else name
        self._feed = Feed(source, interval, self._tell) if source else None
        self._newest: Look | None = None
        self._shown: Look | None = None  # the newest, or the one before the pause
        self._trouble = ""
        self._paused: float | None = None
        self._baseline: Baseline | None = None
        self._order, self._backwards = Order.RATE, False
        self._words = ""
        self._detail = False
        self._events: tuple[Key | None, tuple[dict[str, Any], ...]] = (None, ())

    # What it is made of

    def compose(self) -> ComposeResult:
        """From the top: banner, heading, table, pane, filter, keys."""
        yield Lines("banner")
        yield Lines("heading")
        yield Findings()
        yield Lines("detail")
        yield Input(placeholder="words that a row must have; Esc clears", id="filter", compact=True)
        yield Lines("keys")

    def on_mount(self) -> None:
        """Begin to ask; let SIGTERM and a closed terminal end the screen as `q` does."""
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
        """Stop to ask."""
        if self._feed:
            self._feed.stop()

    def get_line_filters(self) -> list[LineFilter]:
        """NO_COLOR means none, where Textual's own answer is grey."""
        return [NoColor()] if self.no_color else list(super().get_line_filters())

    # What it is told

    def _tell(self, news: News) -> None:
        self.post_message(self.Told(news))

    def on_top_app_told(self, message: Told) -> None:
        """In the screen's own thread."""
        self.take(message.news)

    def take(self, news: News) -> None:
        """Take news in and draw them."""
        if news.failure:
            self.exit(news.failure)
            return
        self._trouble = news.trouble
        if news.look:
            self._newest = news.look
            if self._paused is None:
                self._shown = news.look
        if news.subject:
            self._events = news.subject, news.events
        self._draw()

    # What it draws

    def _draw(self) -> None:
        try:
            table = self.query_one(Findings)
        except NoMatches:  # it is ending
            return
        look = self._shown
        lines: list[Line] = []
        if look:
            lines = rows(look, self._order, self._backwards, baseline=self._baseline)
            # Laid out for all of them: the columns stand still while a filter is typed.
            columns = columns_for(lines, self.size.width, look.cluster, self._order)
            table.show(matching(lines, self._words), columns, look.time, self._empty())
            self.query_one("#heading", Lines).show([heading(columns, self._order, self._backwards)])
        self._draw_detail()
        self._draw_banner()
        self._draw_keys()

    def _empty(self) -> str:
        if self._words:
            return "No row has these words in it. Esc shows all."
        if self._baseline:
            return f"No wrong reply since {clock_text(self._baseline.time)}. C counts from the beginning again."
        return "No wrong reply so far: each one went out from the address that the client had asked."

    def _draw_banner(self) -> None:
        condition = Condition(self._source_name, self._clock(), self._paused, self._trouble)
        painted = banner(self._shown, condition, self._baseline, self.size.width)
        self.screen_stack[0].query_one("#banner", Lines).show(painted)

    def _draw_detail(self) -> None:
        pane, line = self.query_one("#detail", Lines), self.query_one(Findings).selected
        pane.display = self._detail and line is not None
        if not self._detail or line is None or self._shown is None:
            return
        subject, events = self._events
        remedy = self._remedy(line.row) if self._remedy else ""
        mine = events if subject == line.key else None
        painted = detail(line, mine, remedy, self.size.width, self._shown.cluster)
        room = min(self.size.height - 5 - _LEAST_TABLE, max(_DETAIL, self.size.height // 2))
        pane.styles.height = max(3, min(len(painted) + 1, room))
        pane.border_title = title(line).replace("[", "\\[")
        pane.show(painted)

    def _draw_keys(self) -> None:
        painted: Painted = []
        for key, what in _KEYS:
            painted += [(f" {key}", "key"), (f" {what} ", "label")]
        first, last, count = self.query_one(Findings).range
        where = f"{first}-{last} of {count} " if count else ""
        used = sum(len(text) for text, _ in painted)
        painted.append((where.rjust(max(0, self.size.width - used))[: max(0, self.size.width - used)], "label"))
        self.query_one("#keys", Lines).show([painted])

    def on_resize(self) -> None:
        """Lay out for the new size, once the widgets have theirs."""
        self.call_after_refresh(self._draw)

    # What its keys do

    def action_sort(self) -> None:
        """The next order."""
        self._order, self._backwards = self._order.next, False
        self._draw()

    def action_reverse(self) -> None:
        """The same order, the other way round."""
        self._backwards = not self._backwards
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """A slash is a letter while words are typed, and nothing over the help."""
        return action != "filter" or (len(self.screen_stack) == 1 and not isinstance(self.focused, Input))

    def action_filter(self) -> None:
        """Ask for words."""
        field = self.query_one(Input)
        field.display = True
        self.screen.set_focus(field)  # at once: focus() comes after the keys that are typed already

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while it is typed."""
        self._words = event.value
        self._draw()

    def on_input_submitted(self) -> None:
        """Keep the words and go back to the table."""
        field = self.query_one(Input)
        field.display = bool(field.value)
        self.screen.set_focus(self.query_one(Findings))

    def action_close(self) -> None:
        """Close what was opened last: the filter, else the pane."""
        field = self.query_one(Input)
        if field.display:
            field.value = ""
            field.display = False
            self.screen.set_focus(self.query_one(Findings))
        elif self._detail:
            self.action_detail()

    def action_pause(self) -> None:
        """Hold the screen; asking goes on."""
        self._paused = self._clock() if self._paused is None else None
        if self._paused is None:
            self._shown = self._newest
        self._draw()

    def action_clear(self, begin: bool = True) -> None:
        """Count from here on; or all of it again."""
        self._baseline = baseline_of(self._shown) if begin and self._shown else None
        self._draw()

    def action_detail(self) -> None:
        """Open or close the pane about the selected row."""
        table = self.query_one(Findings)
        self._detail = not self._detail and table.selected is not None
        if self._detail:
            table.pin()
        self._follow()
        self._draw()
        self.call_after_refresh(self._draw)

    def on_findings_selected(self, message: Findings.Selected) -> None:
        """Another row: another pane."""
        if message.opened and not self._detail:
            self.action_detail()
            return
        self._follow()
        self._draw_detail()
        self._draw_keys()

    def _follow(self) -> None:
        line = self.query_one(Findings).selected
        if self._feed:
            self._feed.follow(line.key if self._detail and line else None)

    def action_scroll_detail(self, by: int) -> None:
        """Move the pane's lines."""
        self.query_one("#detail", Lines).scroll_lines(by)

    def action_help(self) -> None:
        """Say what there is."""
        self.push_screen(Help(self._shown))
