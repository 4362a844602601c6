"""How wrong replies that conntrack's flows show are added up: counts, events, and what is counted once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Cause, Event, Finding, Verdict
from udpwatch.agent.sources import flows
from udpwatch.agent.sources.flows import FlowSensor, Reported

SECOND = 1_000_000_000
WINDOW = 30 * SECOND


class Decided:
    """A FlowSource that yields what a test puts in."""

    undecided = overruns = evicted = 0
    flows: int | None = 0
    unwatched = ("one namespace",)
    missing = 1

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def decided(self, _now: int) -> Iterator[Event]:
        events, self.events = self.events, []
        yield from events

    def close(self) -> None:
        self.closed = True


class ReportedPort(Reported):
    """The datagrams of one server port are covered by a socket's finding."""

    def __init__(self, port: int) -> None:
        super().__init__((), WINDOW)
        self._port = port

    def has(self, event: Event) -> bool:
        return event.finding.port == self._port


def wrong(client: int = 1, port: int = 53, netns: int = 7, time: int = 100 * SECOND) -> Event:
    finding = Finding("10.0.0.1", "10.0.0.2", port, 4, Verdict.NEW, Cause.FORWARDED, "", 0, netns=0, interface="eth0")
    return Event(
        finding=finding,
        time=time,
        count=0,
        peer=f"192.0.2.{client}",
        peer_port=40_000,
        segments=1,
        pid=0,
        uid=0,
        netns_inode=netns,
        original=None,
        reply=None,
        conversation=None,
    )


def sensor(*events: Event, limits: Limits = Limits(), reported: Reported | None = None) -> tuple[FlowSensor, Decided]:
    source = Decided()
    source.events += events
    return FlowSensor(source, reported or Reported((), WINDOW), limits), source


def counts(watched: FlowSensor) -> dict[int, int]:
    """Return how much was added to the finding of each port."""
    return {increase.finding.port: increase.count for increase in watched.increases()}


def test_increases_are_added_up_by_finding_and_reported_once() -> None:
    watched, source = sensor(wrong(1), wrong(2), wrong(3, port=514))
    assert counts(watched) == {53: 2, 514: 1}
    assert counts(watched) == {}
    source.events += [wrong(4)]
    assert counts(watched) == {53: 1}


def test_an_increase_has_the_time_of_its_last_reply() -> None:
    watched, _ = sensor(wrong(1, time=SECOND), wrong(2, time=3 * SECOND))
    assert [increase.last for increase in watched.increases()] == [3 * SECOND]


def test_events_carry_the_count_of_their_finding() -> None:
    watched, source = sensor(wrong(1), wrong(2), wrong(3, port=514))
    assert [(event.finding.port, event.count) for event in watched.events(100)] == [(53, 1), (53, 2), (514, 1)]
    source.events += [wrong(4)]
    assert [event.count for event in watched.events(100)] == [3]


def test_reading_events_takes_no_increase_away() -> None:
    watched, _ = sensor(wrong(1), wrong(2))
    assert len(list(watched.events(100))) == 2
    assert counts(watched) == {53: 2}


def test_a_reply_that_passes_two_namespaces_counts_once() -> None:
    watched, _ = sensor(wrong(netns=7), wrong(netns=8, time=101 * SECOND))
    assert counts(watched) == {53: 1}


def test_two_replies_in_one_namespace_count_twice() -> None:
    watched, _ = sensor(wrong(), wrong(time=101 * SECOND))
    assert counts(watched) == {53: 2}


def test_the_same_addresses_after_two_windows_are_another_reply() -> None:
    watched, _ = sensor(wrong(netns=7), wrong(netns=8, time=100 * SECOND + 2 * WINDOW))
    assert counts(watched) == {53: 2}


def test_the_reply_of_a_socket_that_was_reported_is_left_out() -> None:
    watched, _ = sensor(wrong(1), wrong(2, port=514), reported=ReportedPort(53))
    assert counts(watched) == {514: 1}


def test_events_are_limited_per_finding_and_second_but_counted() -> None:
    events = [wrong(client, time=100 * SECOND + client) for client in range(6)] + [wrong(9, time=101 * SECOND)]
    watched, _ = sensor(*events, wrong(1, port=514), limits=Limits(events_per_second=2))
    assert [(event.finding.port, event.count) for event in watched.events(100)] == [(53, 1), (53, 2), (53, 7), (514, 1)]
    assert watched.held_back == 4
    assert counts(watched) == {53: 7, 514: 1}


def test_unread_events_are_bounded_and_counted_as_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_WAITING", 3)
    watched, _ = sensor(*(wrong(client, port=client) for client in range(1, 6)))
    assert sum(counts(watched).values()) == 5
    assert watched.dropped == 2
    assert [event.finding.port for event in watched.events(2)] == [1, 2]
    assert [event.finding.port for event in watched.events(2)] == [3]


def test_the_source_is_asked_for_its_own_numbers() -> None:
    watched, source = sensor()
    source.undecided, source.overruns, source.evicted, source.flows = 1, 2, 3, None
    assert (watched.undecided, watched.overruns, watched.evicted, watched.flows) == (1, 2, 3, None)
    assert watched.unwatched == ("one namespace",)
    assert watched.missing == 1
    watched.close()
    assert source.closed
