"""The screen of `udpwatch top`, driven by Textual's pilot: each key, each state, and a golden one at 80x24."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repository import GOLDEN
from textual import events
from textual.widgets import Input
from top_screens import SERVERS, THREE, Slow, drive, processes, screen, selected
from top_snapshots import NOW, healed_row, row, server, view

from udpwatch.agent.client import explain
from udpwatch.agent.client.top.feed import Update
from udpwatch.agent.client.top.rows import Meter, View, key_of
from udpwatch.agent.client.top.screen import TopApp
from udpwatch.agent.client.top.sources import ViewSource
from udpwatch.agent.client.top.widgets import RowTable, TextPane
from udpwatch.agent.daemon.state import About, State
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing, Risk, Sender
from udpwatch.agent.sources import replay
from udpwatch.agent.sources.replay import Replay


def test_s_sorts_by_the_next_column_and_r_reverses() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        seen = []
        for _ in range(6):
            arrow = next(word for word in screen(app)[3].split() if word[-1] in "▼▲")
            seen.append((arrow, processes(app)))
            await pilot.press("s")
        assert seen == [
            ("/s▼", "bbb ccc aaa"),
            ("total▼", "bbb ccc aaa"),
            ("last▼", "bbb ccc aaa"),
            ("process▲", "aaa bbb ccc"),
            ("pod▲", "ccc aaa bbb"),
            ("port▲", "bbb ccc aaa"),
        ]
        await pilot.press("r")
        assert processes(app) == "aaa ccc bbb"

    drive(play)


def test_selected_row_stays_selected() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        assert selected(app) == "bbb"
        await pilot.press("j", "down", "j")
        assert selected(app) == "aaa"
        await pilot.press("k")
        assert selected(app) == "ccc"
        for _ in range(6):
            await pilot.press("s")
            assert selected(app) == "ccc"
        app.take(Update(view(2, row("zzz", 9, 100), *THREE)))
        assert selected(app) == "ccc"
        app.take(Update(view(3, *THREE[:2])))
        assert selected(app) in {"aaa", "bbb"}
        await pilot.press("G")
        assert selected(app) == "aaa"
        await pilot.press("g")
        app.take(Update(view(4, row("zzz", 9, 100), *THREE)))
        assert selected(app) == "zzz"

    drive(play)


def test_slash_filters_while_typing() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("slash", *"bb")
        assert processes(app) == "bbb"
        assert "1-1 of 1" in screen(app)[-1]
        await pilot.press("enter", "s", "j")
        assert processes(app) == "bbb"
        await pilot.press("escape")
        assert processes(app) == "bbb ccc aaa"
        await pilot.press("slash", *"nothing q")
        assert processes(app) == ""
        assert "No row contains these words" in screen(app)[5]
        await pilot.press("escape")
        assert len(processes(app).split()) == 3

    drive(play)


def test_keys_typed_in_one_burst_are_all_handled() -> None:
    """With a fast typist, a slow machine or a paste, all keys are there before the first is handled."""

    async def play(app: TopApp, pilot: Any) -> None:
        def burst(*keys: str) -> None:
            for each in keys:
                key = "slash" if each == "/" else each
                character = each if len(each) == 1 else None
                app.post_message(events.Key(key, character))

        burst("/", *"webx", "backspace", "enter", "p")
        await pilot.pause(0.1)
        assert "paused at" in screen(app)[0]  # the key after Enter is not a letter of the filter
        assert processes(app) == "bbb"  # shop/web-0
        assert app.query_one(Input).value == "web"
        assert app.query_one(Input).display
        burst("/", *"-0/x")  # replaces what was selected; a slash is a letter here
        await pilot.pause(0.1)
        assert app.query_one(Input).value == "-0/x"
        assert processes(app) == ""
        burst(*"yz", "escape", "p")
        await pilot.pause(0.1)
        assert "paused at" not in screen(app)[0]
        assert (app.query_one(Input).value, app.query_one(Input).display) == ("", False)
        assert len(processes(app).split()) == 3
        burst("/", "enter", "p")
        await pilot.pause(0.1)
        assert "paused at" in screen(app)[0]
        assert not app.query_one(Input).display

    drive(play)


def test_p_pauses_the_screen() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("p")
        assert "paused at" in screen(app)[0]
        app.take(Update(view(2, *THREE, row("new", 9))))
        assert "new" not in processes(app)
        await pilot.press("p")
        assert "new" in processes(app)

    drive(play)


def test_c_counts_from_now() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("c")
        assert "totals since" in screen(app)[1]
        assert "total 0" in screen(app)[1]
        assert processes(app) == ""
        assert "No wrong reply since" in screen(app)[5]
        app.take(Update(view(2, *THREE[:2], row("ccc", 2, 16))))
        await pilot.pause()
        assert processes(app) == "ccc"
        assert "total 10" in screen(app)[1]
        await pilot.press("C")
        assert "total 28" in screen(app)[1]

    drive(play)


def test_enter_opens_the_details_of_a_row() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("j", "enter")
        await pilot.pause()
        text = "\n".join(screen(app))
        for fact in ("ccc, port 2/udp", "pid 4242", "asked at  172.16.13.13", "fix  ", "events    ..."):
            assert fact in text, text
        assert len(app.query_one(RowTable).text) == 3
        line = app.query_one(RowTable).selected
        assert line
        event = json.loads((GOLDEN / "events.jsonl").read_text().splitlines()[0]) | {"peer": "\x1b[2J[b]"}
        app.take(Update(view(2, *THREE), key=line.key, events=(event,)))
        await pilot.pause()
        text = "\n".join(screen(app))
        assert "conntrack 172.17.0.1:56789 > 172.17.0.3:40000" in text, text
        await pilot.press("k")
        assert "bbb, port 1/udp" in "\n".join(screen(app))
        assert "events    ..." in "\n".join(screen(app))
        await pilot.press("right_square_bracket", "left_square_bracket", "escape")
        await pilot.pause()
        assert "port 1/udp" not in "\n".join(screen(app))

    drive(play)


def test_remedy_is_shown_in_the_details() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("enter")
        await pilot.pause()
        assert "multihome" in "\n".join(screen(app))

    drive(play, row("openvpn"), app=TopApp(None, fix=explain.short_advice, name="test"))


def test_question_mark_opens_help_and_any_key_closes_it() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("question_mark")
        await pilot.pause()
        text = "\n".join(screen(app))
        assert "sort by the next column" in text
        await pilot.press("j", "k", "q")
        await pilot.pause()
        assert app.is_running
        assert "sort by the next column" not in "\n".join(screen(app))

    drive(play)


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_q_quits(key: str) -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press(key)
        await pilot.pause()
        assert not app.is_running

    assert drive(play).return_value is None


def test_connection_error_is_shown_until_it_is_over() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(error="Connection refused"))
        await pilot.pause()
        assert "not connected: retrying" in screen(app)[0]
        assert "Connection refused" in screen(app)[1]
        assert len(processes(app).split()) == 3
        app.take(Update(view(2, *THREE)))
        await pilot.pause()
        assert "not connected" not in "\n".join(screen(app))

    drive(play)


def test_permanent_error_ends_the_screen() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        app.take(Update(fatal=UdpwatchError("the agent has ended")))
        await pilot.pause()

    assert str(drive(play).return_value) == "the agent has ended"


def test_screen_uses_every_size() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        for width, height in ((200, 50), (80, 24), (40, 10), (20, 5), (300, 100), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.press("enter")
            await pilot.pause()
            lines = screen(app)
            assert len(lines) == height
            assert all(len(line) <= width for line in lines)
            await pilot.press("enter")
            await pilot.pause()
        assert len(app.query_one(RowTable).text) == 19

    drive(play, *(row(f"srv-{number:03}", number, number) for number in range(1, 200)))


def test_tick_while_the_screen_is_closed_does_nothing() -> None:
    async def play(app: TopApp, _pilot: Any) -> None:
        await app.query_one("#banner").remove()
        app._draw_banner()

    drive(play, row())


def test_control_characters_in_names_are_escaped() -> None:
    async def play(app: TopApp, pilot: Any) -> None:
        await pilot.press("j", "enter")
        await pilot.pause()
        text = "\n".join(screen(app))
        assert "[red]" in text
        assert "[/bold" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        await pilot.press("question_mark")
        await pilot.pause()

    nasty = [
        row("[red]\x1b[2Jx", 1),
        row("\u202egnp", 2, pod="[/bold]"),
        row("漢字漢字漢字漢字", 3),
        row("\udc80", 4),
        row("", 5),
    ]
    drive(play, *nasty, size=(200, 50))
    drive(play, *nasty, size=(150, 24))


def test_five_thousand_changing_rows_leave_keys_responsive() -> None:
    """Each view changes all rows; only visible rows are drawn, so a key is handled between two views."""
    many = [row(f"srv-{number}", number, number) for number in range(1, 5001)]

    async def play(app: TopApp, pilot: Any) -> None:
        meter = Meter()
        for second in range(2, 5):
            app.take(Update(meter.add(view(second, *(replace(each, count=each.count * second) for each in many)))))
            begun = time.monotonic()
            await pilot.press("j")
            took = time.monotonic() - begun
        await pilot.press("G")
        await pilot.pause()
        assert "of 5000" in screen(app)[-1]
        assert selected(app) == "srv-1"
        assert took < 10  # a slow machine's; a table of widgets takes minutes

    drive(play, *many)


def test_no_color_disables_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def play(app: TopApp, pilot: Any) -> None:
        colours = set()
        for strip in app.screen._compositor.render_strips():
            for segment in strip:
                if segment.style and segment.style.color:
                    colours.add(segment.style.color.name)
        assert colours <= {"default"}
        reversed_ = [segment for strip in app.screen._compositor.render_strips() for segment in strip
                     if segment.style and segment.style.reverse and segment.text.startswith("bbb")]  # fmt: skip
        assert reversed_

    drive(play)


def test_feed_polls_its_source() -> None:
    source = Slow()

    async def run() -> None:
        checked: ViewSource = source
        app = TopApp(checked, 0.02)
        async with app.run_test(size=(80, 24)) as pilot:
            while source.asked < 5:
                await pilot.pause(0.01)
            assert processes(app) == "openvpn"
            await pilot.press("enter")
            while not source.subjects:
                await pilot.pause(0.01)
            await pilot.press("q")

    asyncio.run(run())


# Golden


def recording() -> list[str]:
    told = json.loads((GOLDEN / "events.jsonl").read_text().splitlines()[0])
    servers: list[dict[str, Any]] = [
        {"process": "openvpn", "port": 1194, "namespace": None, "pod": None, "container": None},
        {"process": "unbound", "port": 53, "namespace": "kube-system", "pod": "node-dns-x2x9k", "container": "dns",
         "expected": "169.254.20.10", "actual": "10.244.1.7", "count": 1204},
        {"process": "snmpd", "port": 161, "namespace": None, "pod": None, "container": "metrics",
         "verdict": "untracked", "expected": "fd00:13::13", "actual": "fd00:17::1", "family": 6,
         "cause": "connected", "count": 7},
        {"process": None, "pid": None, "port": 53, "namespace": None, "pod": None, "container": None,
         "expected": "10.2.0.5", "actual": "10.2.0.6", "cause": "forwarded", "interface": "vnet3", "count": 3,
         "conntrack": told["conntrack"] | {"request": told["conntrack"]["original"]}},
        {"process": "syslog [bold]\x1b[31m", "port": 514, "namespace": None, "pod": None, "container": None,
         "verdict": "unknown", "cause": "explicit", "count": 1},
    ]  # fmt: skip
    lines = []
    for second in (0, 1, 2):
        for each in servers:
            count = each.get("count", 23) * (second + 1)
            at = {"time": f"2027-01-15T08:00:{second:02}.000Z", "count": count}
            lines.append(json.dumps(told | each | at))
    return lines


def replayed(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[View]:
    """Yield snapshots of a recording, one view a second, through everything above the kernel."""
    now = 0.0
    monkeypatch.setattr(replay.time, "monotonic", lambda: now)
    played = Replay(path)
    state = State(About("0.1.0", "6.1.0-18-amd64", "node-1", played.mode, NOW, ()), 1000, 3600, played)
    meter, seen = Meter(), []
    for second in range(3):
        now = float(second)
        list(played.events())
        state.add(played.sample(0), NOW + second, now)
        snapshot = state.snapshot(True, NOW + second)
        seen.append(meter.add(View(snapshot.time, (snapshot,))))
    played.close()
    monkeypatch.undo()
    return seen


async def served(app: TopApp, pilot: Any, shown: list[str]) -> None:
    """Show servers: the table, the second one's details, and the findings' text on a healthy node."""
    many = (*SERVERS, server("snmpd [bold]\x1b[31m", 161, 12, risk=Risk.WRONG, wrong=4, at_risk=2, pktinfo=None))
    before = (replace(each, requests=0, replies=0, wrong=0, drops=each.drops and 1) for each in many)
    meter = Meter()
    meter.add(view(1, servers=tuple(before)))
    busy = meter.add(view(2, servers=many, checked=939))
    await pilot.press("escape", "tab")
    app.take(Update(busy))
    await pilot.pause()
    for keys in (("j",), ("enter",), ("tab",)):
        shown.append("-" * 80)
        await pilot.press(*keys)
        await pilot.pause()
        shown.extend(screen(app))


async def healed(app: TopApp, pilot: Any, shown: list[str]) -> None:
    """Show healed servers: the table, the details of one, and the help's part on healing."""
    healing = Healing("ports 69, 514", True, False, not_healed=("netns 4026532300: no right to enter it",),
                      refused={"several-addresses": 2, "group": 5})  # fmt: skip
    found = row(), healed_row(count=1204, pod="boot-0", namespace="shop"), healed_row("syslogd", 514, 7)
    meter = Meter()
    meter.add(view(3, *(replace(each, count=1) for each in found), healing=healing))
    await pilot.press("escape", "g")
    app.take(Update(meter.add(view(4, *found, healing=healing, checked=1400))))
    await pilot.pause()
    for keys in ((), ("j", "enter"), ("question_mark", *["j"] * 40)):
        shown.append("-" * 80)
        await pilot.press(*keys)
        await pilot.pause()
        shown.extend(screen(app))


def test_golden_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(recording()) + "\n")
    views = replayed(path, monkeypatch)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    shown: list[str] = []

    async def run() -> None:
        app = TopApp(None, fix=explain.short_advice, clock=lambda: NOW + 2.5, name="test")
        async with app.run_test(size=(80, 24)) as pilot:
            for seen in views:
                app.take(Update(seen))
            await pilot.pause()
            shown.extend(screen(app))
            await pilot.press("j", "enter")
            await pilot.pause()
            mine = [json.loads(line) for line in reversed(recording()) if "openvpn" in line]
            line = app.query_one(RowTable).selected
            assert line
            app.take(Update(views[-1], key=line.key, events=tuple(mine)))
            await pilot.pause()
            shown.append("-" * 80)
            shown.extend(screen(app))
            await served(app, pilot, shown)
            await healed(app, pilot, shown)

    asyncio.run(run())
    monkeypatch.undo()
    time.tzset()
    text = "\n".join(shown) + "\n"
    golden = GOLDEN / "top-80x24.txt"
    if os.environ.get("UDPWATCH_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text(), f"{golden} differs: `make golden` rewrites it"


def test_lines_scroll_within_what_there_is() -> None:
    async def run() -> None:
        app = TopApp(None, name="test")
        async with app.run_test(size=(80, 24)):
            keys = app.query_one("#banner", TextPane)
            keys.show([[(str(number), "fact")] for number in range(10)])
            keys.scroll_lines(100)
            assert "9" in screen(app)[2]
            keys.scroll_lines(-100)
            assert "0" in screen(app)[0]

    asyncio.run(run())


def test_key_of_a_row_does_not_depend_on_the_process_id() -> None:
    changed = replace(row(), sender=Sender("openvpn", 1))
    assert key_of("n", changed) == key_of("n", row())
