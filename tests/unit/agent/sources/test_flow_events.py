"""What is decided from conntrack's events, without root: real code on a double of conntrack's netlink sockets.

Namespaces and routes are real: the process's own namespace, where 127.0.0.0/8 is local.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import pytest

from udpwatch.agent.kernel import clock, netns
from udpwatch.agent.kernel.ctnetlink import EXPECTED, SEEN_REPLY, Entry, Listener, Overrun, Table
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Cause, Event, Tuple, Verdict
from udpwatch.agent.sources import flow_events
from udpwatch.agent.sources.flow_events import ListenedFlows, Transport
from udpwatch.agent.sources.flows import GRACE_SECONDS, Reported

CLIENT, ASKED, OTHER, THIRD = "192.0.2.1", "192.0.2.10", "192.0.2.11", "192.0.2.12"
PORT, CLIENT_PORT = 53, 40_000
TIMEOUT = 30  # seconds, of an unanswered entry


def flow(source: str, source_port: int, destination: str, destination_port: int, **others: Any) -> Entry:
    """Return the new entry of a datagram."""
    original = Tuple(source, source_port, destination, destination_port)
    reply = Tuple(destination, destination_port, source, source_port)
    return Entry(original, reply, **({"status": 0, "zone": 0, "timeout": TIMEOUT} | others))


def request(server: str = ASKED, client_port: int = CLIENT_PORT, **others: Any) -> Entry:
    return flow(CLIENT, client_port, server, PORT, **others)


def reply(source: str = OTHER, client_port: int = CLIENT_PORT, **others: Any) -> Entry:
    return flow(source, PORT, CLIENT, client_port, **others)


class Conntrack:
    """A conntrack table with the sockets that read it: the double."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.events: deque[Entry | Overrun] = deque()
        self.namespaces: list[str] = ["/proc/thread-self/ns/net"]

    def confirm(self, *entries: Entry) -> None:
        """Create entries and send their events."""
        self.entries += entries
        self.events += entries

    def answer(self, entry: Entry) -> None:
        """Let a datagram in reply direction pass."""
        self.entries[self.entries.index(entry)] = replace(entry, status=entry.status | SEEN_REPLY)

    def lookup(self, wanted: Tuple, zone: int = 0) -> Entry | None:
        found = (each for each in self.entries if each.zone == zone and wanted in (each.original, each.reply))
        return next(found, None)

    def dump(self) -> Iterator[Entry]:
        yield from list(self.entries)

    def read(self) -> Iterator[Entry]:
        while self.events:
            event = self.events.popleft()
            if isinstance(event, Overrun):
                raise event
            yield event

    def resize(self, _buffer_bytes: int) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Conntrack:
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def transport(self) -> Transport:
        return Transport(
            namespaces=lambda: netns.everywhere() if self.namespaces else iter(()),
            table=lambda: cast(Table, self),
            listener=lambda _bytes: cast(Listener, self),
        )


class NothingReported(Reported):
    def __init__(self) -> None:
        super().__init__((), 0)


class EverythingReported(NothingReported):
    def has(self, event: Event) -> bool:
        return True


@pytest.fixture
def conntrack(monkeypatch: pytest.MonkeyPatch) -> Conntrack:
    monkeypatch.setattr(flow_events, "MAX_NAMESPACES", 1)  # our own
    monkeypatch.setattr(flow_events, "entry_timeout", lambda: TIMEOUT)
    return Conntrack()


def watch(conntrack: Conntrack, sockets: bool = False, reported: Reported | None = None) -> ListenedFlows:
    return ListenedFlows(Limits(), sockets, reported or NothingReported(), transport=conntrack.transport)


def after(source: ListenedFlows, seconds: float = GRACE_SECONDS) -> list[Event]:
    """Return what is decided so many seconds from now."""
    return list(source.decided(clock.monotonic_ns() + int(seconds * 1e9)))


def found(conntrack: Conntrack, *entries: Entry, sockets: bool = False) -> tuple[list[Event], int]:
    """Return what these new entries lead to: (wrong replies, undecided ones)."""
    with closing(watch(conntrack, sockets)) as source:
        conntrack.confirm(*entries)
        return [*after(source, 0), *after(source)], source.undecided


def test_a_flow_that_mirrors_an_unanswered_request_is_a_wrong_reply(conntrack: Conntrack) -> None:
    (event,), undecided = found(conntrack, request(), reply())
    finding = event.finding
    assert (finding.expected, finding.actual, finding.port, finding.family) == (ASKED, OTHER, PORT, 4)
    assert (finding.verdict, finding.cause) == (Verdict.NEW, Cause.FORWARDED)
    assert (event.peer, event.peer_port) == (CLIENT, CLIENT_PORT)
    assert (event.original, event.request) == (reply().original, request().original)
    assert undecided == 0


def test_ipv6(conntrack: Conntrack) -> None:
    (event,), _ = found(conntrack, flow("fd00::1", 9, "fd00::2", 53), flow("fd00::3", 53, "fd00::1", 9))
    assert (event.finding.expected, event.finding.actual, event.finding.family) == ("fd00::2", "fd00::3", 6)


def test_nothing_is_decided_before_the_grace_time(conntrack: Conntrack) -> None:
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request(), reply())
        assert after(source, GRACE_SECONDS - 0.5) == []
        assert len(after(source)) == 1
        assert after(source, 2 * GRACE_SECONDS) == []


@pytest.mark.parametrize("answered", [request(), reply()], ids=["the request", "the mirror"])
def test_peers_that_answer_each_other_are_no_finding(conntrack: Conntrack, answered: Entry) -> None:
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request(), reply())
        assert after(source, 0) == []
        conntrack.answer(answered)
        assert (after(source), source.undecided) == ([], 0)


@pytest.mark.parametrize("gone", [request(), reply()], ids=["the request", "the mirror"])
def test_an_entry_that_is_gone_leaves_the_reply_undecided(conntrack: Conntrack, gone: Entry) -> None:
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request(), reply())
        assert after(source, 0) == []
        conntrack.entries.remove(gone)
        assert (after(source), source.undecided) == ([], 1)


def test_a_namespace_that_is_gone_leaves_the_reply_undecided(
    conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request(), reply())
        assert after(source, 0) == []
        conntrack.namespaces.clear()
        monkeypatch.setattr(flow_events, "LOOK_SECONDS", 0.0)
        assert (after(source), source.undecided) == ([], 1)


@pytest.mark.parametrize(
    "entries",
    [
        [reply()],
        [reply(), request()],
        [request(), reply(ASKED)],
        [request(), request(OTHER), reply()],
        [request(), request(THIRD), reply()],
        [request("224.0.0.251"), reply()],
        [request("255.255.255.255"), reply()],
        [request("127.255.255.255"), reply()],
        [request(client_port=CLIENT_PORT + 1), reply()],
        [request(), flow(OTHER, PORT + 1, CLIENT, CLIENT_PORT)],
        [request(zone=1), reply()],
        [request(status=EXPECTED), reply()],
        [request(), reply(status=EXPECTED)],
    ],
    ids=[
        "no request",
        "the peer spoke first",
        "from the address asked",
        "from the address asked before",
        "two servers asked at once",
        "multicast",
        "limited broadcast",
        "broadcast by route",
        "another client port",
        "another server port",
        "another zone",
        "a request that a helper announced",
        "a flow that a helper announced",
    ],
)
def test_no_finding(conntrack: Conntrack, entries: list[Entry]) -> None:
    assert found(conntrack, *entries) == ([], 0)


def test_a_reply_to_a_group_is_never_a_candidate(conntrack: Conntrack) -> None:
    """A candidate whose entry is gone would be undecided."""
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request("224.0.0.251"), reply())
        assert after(source, 0) == []
        conntrack.entries.clear()
        assert (after(source), source.undecided) == ([], 0)


def test_the_zone_is_part_of_the_request(conntrack: Conntrack) -> None:
    events, _ = found(conntrack, request(zone=7), reply(zone=7))
    assert len(events) == 1


def test_a_local_source_belongs_to_the_cgroup_hooks(conntrack: Conntrack) -> None:
    entries = request("127.0.0.1"), reply("127.0.0.2")
    (event,), _ = found(conntrack, *entries)
    assert event.finding.interface == "lo"
    conntrack.entries.clear()
    assert found(conntrack, *entries, sockets=True) == ([], 0)


def test_a_reply_of_a_socket_that_was_reported_is_no_candidate(conntrack: Conntrack) -> None:
    with closing(watch(conntrack, reported=EverythingReported())) as source:
        conntrack.confirm(request(), reply())
        assert (after(source, 0), after(source), source.undecided) == ([], [], 0)


def test_each_flow_is_counted_and_each_wrong_one_found(conntrack: Conntrack) -> None:
    pairs = [(request(client_port=port), reply(client_port=port)) for port in range(1_000, 1_100)]
    with closing(watch(conntrack)) as source:
        conntrack.confirm(*(entry for pair in pairs for entry in pair))
        assert after(source, 0) == []
        assert sorted(event.peer_port for event in after(source)) == list(range(1_000, 1_100))
        assert source.flows == 200


@pytest.mark.parametrize(("mirror_age", "wrong"), [(5, 1), (8, 1), (10, 0), (12, 0)])
def test_flows_from_before_the_start_count_if_certainly_later(
    conntrack: Conntrack, mirror_age: int, wrong: int
) -> None:
    """The table has whole seconds: of two entries of one second, either may have been first."""
    conntrack.entries += [request(timeout=TIMEOUT - 10), reply(timeout=TIMEOUT - mirror_age)]
    with closing(watch(conntrack)) as source:
        assert len(after(source)) == wrong


def test_answered_requests_of_the_table_do_not_count(conntrack: Conntrack) -> None:
    """Even when their entry is gone, which would leave a candidate undecided."""
    conntrack.entries.append(request(status=SEEN_REPLY))
    with closing(watch(conntrack)) as source:
        conntrack.confirm(reply())
        assert after(source, 0) == []
        del conntrack.entries[0]
        assert (after(source), source.undecided) == ([], 0)


def test_lost_events_are_read_from_the_table_and_found_once(conntrack: Conntrack) -> None:
    with closing(watch(conntrack)) as source:
        conntrack.confirm(request(), reply())
        assert after(source, 0) == []
        lost = [request(client_port=5), reply(client_port=5)]
        conntrack.entries += lost
        conntrack.events.append(Overrun(errno.ENOBUFS, "lost"))
        events = [*after(source, 0), *after(source, 0), *after(source)]
        assert sorted(event.peer_port for event in events) == [5, CLIENT_PORT]
        assert source.overruns == 1


def test_a_namespace_cannot_take_all_the_room_for_candidates(
    conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of N places, one namespace gets the half of those that others leave free: here N / 2."""
    monkeypatch.setattr(flow_events, "MAX_WAITING", 8)
    pairs = [(request(client_port=port), reply(client_port=port)) for port in range(10)]
    events, undecided = found(conntrack, *(entry for pair in pairs for entry in pair))
    assert (len(events), undecided) == (4, 6)


def test_an_evicted_request_leaves_the_reply_undecided(conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_events, "MAX_REQUESTS", 4)
    requests = [request(client_port=port) for port in range(5)]
    events, undecided = found(conntrack, *requests, reply(client_port=0), reply(client_port=4))
    assert [event.peer_port for event in events] == [4]
    assert undecided == 1


def test_no_namespace_at_all_is_an_error(conntrack: Conntrack) -> None:
    def refused(_bytes: int) -> Listener:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.raises(PermissionError):
        ListenedFlows(Limits(), False, NothingReported(), transport=replace(conntrack.transport, listener=refused))


def test_namespaces_that_are_not_watched_are_named(conntrack: Conntrack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_events, "_has_no_events", lambda: True)
    with closing(watch(conntrack)) as source:
        assert "net.netfilter.nf_conntrack_events is 0 in 1 network namespaces" in source.unwatched
