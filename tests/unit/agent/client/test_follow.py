"""Which events `udpwatch events` shows: the kept ones, the followed ones, filters."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import GOLDEN

from udpwatch.agent.client.follow import EventFilter, NoAgent, parse_since, read_events
from udpwatch.agent.errors import UdpwatchError, UsageError

EVENTS: list[dict[str, Any]] = [json.loads(line) for line in (GOLDEN / "events.jsonl").read_text().splitlines()]
EVENT = EVENTS[0]


def test_filter() -> None:
    assert EventFilter().matches(EVENT)
    whole = EventFilter(pod="dns-7c9", namespace="shop", port=56789, process="plain-server", verdict="new")
    assert whole.matches(EVENT)
    assert EventFilter(pod="dns-*").matches(EVENT)
    assert not EventFilter(pod="dns").matches(EVENT)
    assert not EventFilter(pod="*").matches(EVENTS[1])  # it is in none
    for name in ("pod", "namespace", "process", "verdict"):
        assert not EventFilter(**{name: "x"}).matches(EVENT)
    assert not EventFilter(port=1).matches(EVENT)
    assert EventFilter(process="a[1]").matches({"process": "a[1]"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 1e9),
        ("90", 1e9 - 90),
        ("90s", 1e9 - 90),
        ("1.5m", 1e9 - 90),
        ("2h", 1e9 - 7200),
        ("1d", 1e9 - 86400),
        ("2001-09-09T01:46:40Z", 1e9),
        ("2001-09-09T03:46:40.5+02:00", 1e9 + 0.5),
    ],
)
def test_since_accepts_ages_and_times(text: str, expected: float) -> None:
    assert parse_since(text, 1e9) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "-5", "5 m", "m", "1e3", "nan", "٣", "2001-09-09T01:46:40", "99-99", "1" * 99]
)
def test_invalid_since_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--since"):
        parse_since(text, 1e9)


class Talk:
    """A double of client.Client."""

    def __init__(self, kept: list[dict[str, Any]], words: list[dict[str, Any]]) -> None:
        self._kept, self._words = kept, words

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self, limit: int) -> list[dict[str, Any]]:
        return self._kept[-limit:]

    def follow(self) -> Iterator[dict[str, Any]]:
        return iter(self._words)


def numbered(count: int, seconds: int = 0) -> dict[str, Any]:
    return EVENT | {"count": count, "time": f"2027-01-15T08:00:{seconds:02}.000Z"}


def told(kept: list[dict[str, Any]], words: list[Any], since: float | None, follow: bool = True) -> list[Any]:
    """Collect the output: counts of events, "lost", and "gone" for the error at the end."""
    out: list[Any] = []
    talk = Talk(kept, words)
    try:
        for word in read_events(Path("/x"), EventFilter(process="plain-server"), since, follow, lambda _: talk):  # type: ignore[arg-type,return-value]
            out.append(word["event"]["count"] if "event" in word else "lost")
    except UdpwatchError:
        out.append("gone")
    return out


def test_kept_events_come_first_and_none_is_repeated() -> None:
    kept = [numbered(at) for at in (1, 2, 3)]
    words = [{"event": numbered(2)}, {"event": numbered(3)}, {"v": 1, "lost": 7}, {"event": numbered(4)}]
    assert told(kept, words, since=0.0) == [1, 2, 3, "lost", 4, "gone"]


def test_equal_event_after_a_new_one_is_shown() -> None:
    """Only events right after the kept ones can be repetitions of them."""
    assert told([numbered(1)], [{"event": numbered(2)}, {"event": numbered(1)}], since=0.0) == [1, 2, 1, "gone"]
    assert told([numbered(1), numbered(1)], [{"event": numbered(1)}] * 3, since=0.0) == [1, 1, 1, "gone"]


def test_since_leaves_older_events_out() -> None:
    kept = [numbered(1, 10), numbered(2, 20), numbered(3, 30)]
    since = parse_since("2027-01-15T08:00:20Z", 0)
    assert told(kept, [{"event": numbered(2, 20)}, {"event": numbered(4, 40)}], since) == [2, 3, 4, "gone"]


def test_without_follow_only_kept_events_are_shown() -> None:
    kept = [numbered(1), numbered(2), EVENTS[1]]
    assert told(kept, [], None, follow=False) == [1, 2]
    assert told(kept, [], 4e9, follow=False) == []


def test_without_since_only_new_events_are_shown() -> None:
    assert told([numbered(1)], [{"event": EVENTS[1]}, {"event": numbered(2)}], None) == [2, "gone"]


def test_half_a_line_at_the_end_of_the_connection_is_an_error() -> None:
    def words() -> Iterator[dict[str, Any]]:
        yield {"event": numbered(1)}
        json.loads('{"event": {"ti')

    talk = Talk([], [])
    talk.follow = words  # type: ignore[method-assign]
    heard = read_events(Path("/x"), EventFilter(), None, True, lambda _: talk)  # type: ignore[arg-type,return-value]
    assert next(heard)["event"]["count"] == 1
    with pytest.raises(UdpwatchError, match="closed the connection"):
        next(heard)


def test_another_protocol_on_the_socket_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        with pytest.raises(UdpwatchError, match=r"--connect|closed the connection"):
            list(read_events(tmp_path / "s", EventFilter(), None, False))
        speaker.join(10)


def test_missing_agent_is_an_error_that_says_what_to_start(tmp_path: Path) -> None:
    with pytest.raises(NoAgent, match=r"no agent is listening; start one with `udpwatch run`"):
        next(read_events(tmp_path / "none", EventFilter(), None, True))
    (tmp_path / "file").touch()
    with pytest.raises(NoAgent):
        next(read_events(tmp_path / "file", EventFilter(), None, True))
    with pytest.raises(UdpwatchError, match="--connect"):
        next(read_events(tmp_path / ("x" * 200), EventFilter(), None, True))
