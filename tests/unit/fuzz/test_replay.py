"""Recordings of any content: each line is an event, or is skipped; what is played can be published and shown."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fuzzing import mutated, rounds, scalars, values
from hypothesis import example, given
from hypothesis import strategies as st
from repository import DOCS, GOLDEN

from udpwatch.agent.client.lines import EventLines
from udpwatch.agent.daemon.event_log import as_json
from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import Cause, Verdict
from udpwatch.agent.sources import replay
from udpwatch.agent.sources.replay import Replay

EVENTS: list[dict[str, Any]] = [json.loads(line) for line in (GOLDEN / "events.jsonl").read_text().splitlines()]
EVENT = jsonschema.Draft202012Validator(json.loads((DOCS / "event.schema.json").read_text()))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("replay") / "events.jsonl"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Leave out the lines about what is skipped."""
    log = logging.getLogger(replay.__name__)
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(logging.NOTSET)


words = st.sampled_from([*map(str, Verdict), *map(str, Cause), 0, 1, 4, 6, 53, "192.0.2.1", None])


def line_of(event: Any) -> bytes:
    return json.dumps(event).encode() + b"\n"


def played(file: Path) -> list[dict[str, Any]]:
    """Return the events as the agent publishes them; [] for a file without events."""
    try:
        source = Replay(file)
    except UsageError as error:
        assert str(file) in str(error)
        return []
    found = []
    with closing(source):
        while events := _next(source):
            for event in events:
                sender = source.lookup(event)
                found.append(as_json(event, sender, "node", event.time / 1e9 + source.clock_offset()))
        sample = source.sample(0)
    for increase in sample.increases:
        source.lookup(increase)
    assert sum(increase.count for increase in sample.increases) == sample.counters.checked
    return found


def _next(source: Replay) -> list[Any]:
    """Return the next events at once, however long the recording paused."""
    source._begun = -1e12
    return list(source.events())


@rounds(300)
@given(
    lines=st.lists(
        st.one_of(
            mutated(EVENTS).map(line_of),
            mutated(EVENTS, scalars).map(line_of),
            mutated(EVENTS, words).map(line_of),
            values.map(line_of),
            st.binary(max_size=50),
        ),
        max_size=6,
    )
)
@example(lines=[line_of(EVENTS[0] | {"time": "0001-01-01T00:00:00+14:00"})])
@example(lines=[line_of(EVENTS[0] | {"time": "9999-12-31T23:59:59.999999+00:00"})])
@example(lines=[line_of(EVENTS[0] | {"port": True})])
@example(lines=[b"[" * 60_000 + b"\n"])
@example(lines=[line_of(EVENTS[0] | {"pid": 1e400, "netns": 1.5, "pktinfo": []})])
@example(lines=[line_of(EVENTS[0])[:-1] + b" " * (2 * replay.MAX_LINE)])
def test_any_recording_is_played_or_refused(file: Path, lines: list[bytes]) -> None:
    file.write_bytes(b"".join(lines))
    for event in played(file):
        EVENT.validate(json.loads(json.dumps(event, allow_nan=False)))
        assert EventLines(False, UTC).line(event).isprintable()
        for name in ("process", "container", "pod", "namespace", "cgroup", "interface", "expected", "actual", "peer"):
            assert event[name] is None or event[name].isprintable()


@rounds(50)
@given(events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6))
def test_recording_is_played_as_it_was(file: Path, events: list[dict[str, Any]]) -> None:
    """Its times are those of the recording, to a millisecond."""
    file.write_bytes(b"".join(map(line_of, events)))
    assert [event | {"node": None} for event in played(file)] == [event | {"node": None} for event in events]
