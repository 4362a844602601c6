"""Any bytes on the agent's socket end in a value or an error, and no name of a tenant reaches the terminal as it is."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from fuzzing import HOSTILE, is_safe, mutated, rounds, texts, values
from hypothesis import example, given
from hypothesis import strategies as st
from repository import GOLDEN
from top_snapshots import healed_row, row, server, snapshot

from udpwatch.agent.client import connection, follow, heal_text, remedies
from udpwatch.agent.client.audit_text import report_text
from udpwatch.agent.client.connection import Client, from_json
from udpwatch.agent.client.explain import matching, short_advice
from udpwatch.agent.client.explain_text import remedy_text, rows_text
from udpwatch.agent.client.lines import EventLines, server_of
from udpwatch.agent.client.top import text
from udpwatch.agent.client.top.rows import View
from udpwatch.agent.client.top.sources import AgentSource
from udpwatch.agent.commands import doctor
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Cause, Healing, Risk, Row, Sender, Snapshot, Verdict
from udpwatch.agent.servers.audit import servers_of_agent

EVENTS: list[dict[str, Any]] = [json.loads(line) for line in (GOLDEN / "events.jsonl").read_text().splitlines()]
SNAPSHOT = asdict(
    snapshot(
        row("unbound", pod="dns-1", namespace="shop", container="dns"),
        healed_row(),
        servers=(server(),),
        healing=Healing("port 69", True, False, refused={"group": 2}, not_healed=("x: y",)),
    )
)
DOCTOR = {
    "version": "1",
    "pid": 7,
    "mode": "packet",
    "ready": True,
    "reason": "",
    "capabilities": ["CAP_BPF"],
    "notes": ["a note"],
    "probes": [],
    "healing": SNAPSHOT["healing"],
}
EVENT_MESSAGES = [{"v": 1, "event": EVENTS[0]}, {"v": 1, "lost": 3}, {"v": 1, "event": EVENTS[1]}]
RESPONSES = [
    {"v": 1, "snapshot": SNAPSHOT},
    {"v": 1, "events": EVENTS[:2]},
    {"v": 1, "following": "events"},
    {"v": 1, "doctor": DOCTOR},
    {"v": 1, "heal": SNAPSHOT["healing"]},
    {"v": 1, "error": "only root may switch healing on or off"},
    {"v": 2},
]


def lines_of(messages: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in messages)


whole = st.lists(st.one_of(mutated(RESPONSES), mutated(EVENT_MESSAGES), values), min_size=1, max_size=4).map(lines_of)
spoken = st.one_of(
    whole,
    st.tuples(whole, st.integers(0, 400)).map(lambda both: both[0][: both[1]]),
    st.tuples(mutated(RESPONSES), st.lists(mutated(EVENT_MESSAGES), max_size=4)).map(
        lambda both: lines_of([both[0], *both[1]])
    ),
    st.binary(max_size=100),
)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[socket.socket, Path]]:
    path = tmp_path_factory.mktemp("s") / "s"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen(8)
        yield made, path


@contextmanager
def speaking(listener: socket.socket, data: bytes) -> Iterator[None]:
    """Speak to every connection: the data, and then the end."""
    ended = threading.Event()

    def speak() -> None:
        with ExitStack() as opened:
            while not ended.is_set():
                connection = opened.enter_context(listener.accept()[0])
                connection.settimeout(10)
                with suppress(OSError):
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(listener.getsockname())
            speaker.join(10)
        assert not speaker.is_alive()


def commands(path: Path) -> Iterator[Callable[[], object]]:
    """Yield what the commands do with a connection."""
    with suppress(UdpwatchError):
        with follow.translated_errors(path), Client(path, 10) as client:
            taken = client.snapshot()
        yield lambda: shown(taken)
    for since in (None, 0.0):
        for following in (True, False):
            yield lambda since=since, following=following: [
                EventLines(True, UTC).line(message["event"]) if "event" in message else message["lost"]
                for message in follow.read_events(path, follow.EventFilter(pod="*"), since, following)
            ]
    yield lambda: doctor.as_text(doctor.ask(path), True)

    def heal() -> None:
        with follow.translated_errors(path), Client(path, 10) as client:
            assert isinstance(client.heal(), Healing)

    yield heal

    def top() -> None:
        with closing(AgentSource(path)) as source:
            with suppress(OSError):
                source.read()
            with suppress(OSError):
                source.events(10)

    yield top


@rounds(150)
@given(data=spoken)
@example(data=b"[" * 100_000 + b"\n")
@example(data=b"[1]\n")
@example(data=lines_of([{"v": 1, "following": "events"}, 7]))
@example(data=lines_of([{"v": 1, "following": "events"}, {"v": 1, "event": 7}]))
@example(data=lines_of([{"v": 1, "events": [{}]}]))
@example(data=lines_of([{"v": 1, "snapshot": {**SNAPSHOT, "rows": 7}}]))
@example(data=lines_of([{"v": 1, "doctor": {}}]))
@example(data=lines_of([{"v": 1, "error": "\x1b[2J"}]))
def test_any_response_ends_in_a_value_or_an_error(listener: tuple[socket.socket, Path], data: bytes) -> None:
    server, path = listener
    with speaking(server, data):
        for command in commands(path):
            try:
                command()
            except UdpwatchError as error:
                assert is_safe(str(error))
                assert str(path) in str(error) or b"error" in data or str(error) == "invalid response"


def test_response_without_an_end_is_not_kept(
    listener: tuple[socket.socket, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_RESPONSE", 1000)
    server, path = listener
    with speaking(server, b"x" * 100_000):
        with pytest.raises(UdpwatchError, match="not the socket of an agent"):
            next(follow.read_events(path, follow.EventFilter(), None, False))


# ---- what is printed ----


@rounds(300)
@given(event=mutated(EVENTS))
def test_line_of_any_event_is_safe_on_a_terminal(event: Any) -> None:
    if not isinstance(event, dict):
        return
    for colour in (False, True):
        line = EventLines(colour, UTC).line(event)
        for style in ("1", "2", "31", "32", "33", "0"):
            line = line.replace(f"\x1b[{style}m", "")
        assert line.isprintable()
    assert server_of(event).isprintable()
    json.dumps(event)
    for pattern in ("*", "x", "dns-*"):
        follow.EventFilter(pattern, pattern, 53, pattern, pattern).matches(event)


@rounds(200)
@given(event=st.sampled_from(EVENTS), lines=st.integers(1, 3))
def test_event_survives_json(event: dict[str, Any], lines: int) -> None:
    line = EventLines(False, UTC).line(event)
    assert EventLines(False, UTC).line(json.loads(json.dumps(event))) == line
    for name in ("expected", "actual", "peer", "cause"):
        assert event[name] in line


hostile = st.one_of(st.sampled_from(HOSTILE), texts, st.sampled_from(["unbound", "/usr/sbin/named", "python3", "java"]))
senders = st.builds(
    Sender,
    process=hostile,
    pid=st.integers(0, 1 << 22),
    executable=hostile,
    command=hostile,
    cgroup=hostile,
    runtime=hostile,
    container_id=hostile,
    container=hostile,
    namespace=hostile,
    pod=hostile,
)
found_rows = st.builds(
    Row,
    sender=senders,
    port=st.integers(1, 65535),
    expected=st.one_of(st.just("192.0.2.1"), hostile),
    actual=st.one_of(st.just("192.0.2.2"), hostile),
    verdict=st.sampled_from(list(map(str, Verdict))),
    cause=st.sampled_from(list(map(str, Cause))),
    family=st.sampled_from([4, 6]),
    count=st.integers(0, 1 << 63),
    first=st.floats(0, 4e9),
    last=st.floats(0, 4e9),
    interface=hostile,
)
servers = st.builds(
    lambda sender, port, addresses, risk: replace(
        server(), sender=sender, port=port, addresses=tuple(addresses), risk=risk, requests=3
    ),
    senders,
    st.integers(1, 65535),
    st.lists(hostile, max_size=2),
    st.sampled_from(list(Risk)),
)
healings = st.builds(
    Healing,
    selected=hostile,
    on=st.booleans(),
    dry_run=st.booleans(),
    ports_on=st.lists(st.integers(1, 65535), max_size=2).map(tuple),
    reason=st.one_of(st.just(""), hostile),
    not_healed=st.lists(hostile, max_size=2).map(tuple),
    refused=st.dictionaries(st.one_of(st.just("group"), hostile), st.integers(0, 9), max_size=2),
)
snapshots = st.builds(
    lambda rows, served, healing, node, notes: replace(
        snapshot(*rows), servers=tuple(served), healing=healing, node=node, notes=tuple(notes)
    ),
    st.lists(found_rows, max_size=3),
    st.lists(servers, max_size=2),
    st.one_of(st.none(), healings),
    hostile,
    st.lists(hostile, max_size=2),
)


def shown(taken: Snapshot) -> list[str]:
    """Return everything that the commands print of a snapshot."""
    view = View(taken.time, (taken,))
    cluster = View(taken.time, (taken, replace(taken, node="other")))
    printed = [rows_text(matching(taken.rows, None), False, taken.healing)]
    for each in (view, cluster):
        printed += [text.table(each, width, "source", servers) for width in (None, 80) for servers in (True, False)]
        printed += [*text.changes(each, {}), *text.server_changes(each, {})]
        json.dumps([text.as_json(each, True)])
    printed.append(report_text(servers_of_agent(taken.servers, taken.rows), True, False))
    if taken.healing:
        printed.append(heal_text.status_text(taken.healing, taken))
    for each in (*taken.rows, *taken.servers):
        short_advice(each)
    return printed


@rounds(150)
@given(taken=snapshots)
def test_text_of_any_snapshot_is_safe_on_a_terminal(taken: Snapshot) -> None:
    for page in shown(taken):
        assert is_safe(page), page


@rounds(100)
@given(taken=snapshots)
def test_snapshot_survives_the_socket(taken: Snapshot) -> None:
    assert from_json(Snapshot, json.loads(json.dumps(asdict(taken)))) == taken


@rounds(300)
@given(sender=senders, name=st.one_of(hostile, st.sampled_from([each.name for each in remedies.remedies()])))
def test_any_sender_and_name_has_a_remedy_or_none(sender: Sender, name: str) -> None:
    remedies.remedy_of(sender)
    found = remedies.remedy_named(name)
    assert found is None or is_safe(remedy_text(found, False))


@rounds(150)
@given(report=mutated([DOCTOR], st.one_of(hostile, values)))
def test_report_of_any_agent_is_safe_on_a_terminal(listener: tuple[socket.socket, Path], report: Any) -> None:
    server, path = listener
    with speaking(server, lines_of([{"v": 1, "doctor": report}])), suppress(UdpwatchError):
        assert is_safe(doctor.as_text(doctor.ask(path), False))
