"""A recording in place of the kernel: its counts are counted again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from repository import GOLDEN

from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import Cause, Event, Verdict
from udpwatch.agent.sources import replay
from udpwatch.agent.sources.replay import Replay

EVENTS = GOLDEN / "events.jsonl"


def line(**changes: Any) -> str:
    told = json.loads(EVENTS.read_text().splitlines()[0])
    return json.dumps(told | changes)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PAUSE_SECONDS", 0.0)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Replay]]:
    """Write a recording of these lines."""
    with ExitStack() as opened:

        def start(*lines: str) -> Replay:
            path = tmp_path / "events.jsonl"
            path.write_text("\n".join(lines) + "\n")
            played = Replay(path)
            opened.callback(played.close)
            return played

        yield start


def test_events_that_the_agent_writes_can_be_replayed() -> None:
    played = Replay(EVENTS)
    events = list(played.events())
    assert [event.finding.port for event in events] == [56789, 53, 53, 69]
    first, second, forwarded, healed = events
    assert (first.finding.expected, first.finding.actual) == ("172.16.13.13", "172.17.0.1")
    assert (first.finding.verdict, first.finding.cause) == (Verdict.NEW, Cause.KERNEL_CHOSEN)
    assert first.original is not None
    assert first.original.source_port == 56789
    assert played.lookup(first).pod == "dns-7c9"
    assert second.finding.family == 6
    assert played.lookup(second).process == "unknown"
    assert forwarded.request is not None
    assert played.lookup(forwarded).process == ""
    assert healed.finding.verdict == Verdict.HEALED
    assert list(played.events()) == []
    played.close()


def test_healed_reply_is_checked_and_not_wrong(play: Callable[..., Replay]) -> None:
    played = play(line(count=5), EVENTS.read_text().splitlines()[3])
    list(played.events())
    counters = played.sample(0).counters
    assert (counters.checked, counters.wrong) == (46, 5)


def total(played: Replay) -> int:
    list(played.events())
    return sum(increase.count for increase in played.sample(0).increases)


def test_counts_are_of_findings_not_of_events(play: Callable[..., Replay]) -> None:
    assert total(play(line(count=1), line(count=2), line(count=900))) == 900


def test_restarted_agent_in_the_recording_counts_from_one(play: Callable[..., Replay]) -> None:
    assert total(play(line(count=5), line(count=1), line(count=2))) == 7


def test_senders_are_distinguished(play: Callable[..., Replay]) -> None:
    played = play(line(pod="a", count=3), line(pod="b", count=4))
    list(played.events())
    increases = played.sample(0).increases
    assert {played.lookup(increase).pod: increase.count for increase in increases} == {"a": 3, "b": 4}
    assert played.sample(0).increases == ()


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        "[]",
        '"text"',
        "{}",
        line(cause="magic"),
        line(port="x"),
        line(time="yesterday"),
        line(count=None),
        line(conntrack={}),
        "[" * 50_000,
        line(port=10**400),
    ],
    ids=lambda text: text[:20],
)
def test_invalid_line_is_skipped_and_counted(
    play: Callable[..., Replay], bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    played = play(line(), bad, line(count=2))
    events: list[Event] = list(played.events())
    assert [event.count for event in events] == [1, 2]
    assert played.sample(0).counters.unparsed == 1
    assert "line 2: skipped, not an event" in caplog.text


def test_control_characters_in_names_are_escaped(play: Callable[..., Replay]) -> None:
    played = play(line(process="a\x1b[31m\n", pod="[bold]x"))
    (event,) = played.events()
    assert played.lookup(event).process == "a\\x1b[31m\\x0a"
    assert played.lookup(event).pod == "[bold]x"


@pytest.mark.parametrize("content", ["", "\n\n", "nothing\n"])
def test_file_without_events_is_refused(play: Callable[..., Replay], content: str) -> None:
    with pytest.raises(UsageError, match="it has no event"):
        play(content)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Replay(tmp_path / "nothing")


def test_short_pauses_are_kept_and_long_ones_cut(play: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PAUSE_SECONDS", 100.0)
    played = play(line(), line(time="2027-01-15T08:01:00.000Z", count=2))
    assert len(list(played.events())) == 1  # the second one is due in a minute
    played.wait(0.01)
    assert list(played.events()) == []
