"""Timers of a fixed delay. Time is an argument."""

from __future__ import annotations

import math

import pytest

from udpwatch.dns.timers import FIRED_PER_TURN, DelayQueue


class Timers:
    """A queue whose items are recorded when they are due."""

    def __init__(self, delay: float = 2.0) -> None:
        self.fired: list[str] = []
        self.queue: DelayQueue[str] = DelayQueue(delay, self.fired.append)


@pytest.fixture
def timers() -> Timers:
    return Timers()


def test_items_are_due_after_the_delay_in_the_order_of_their_start(timers: Timers) -> None:
    timers.queue.start("a", 10.0)
    timers.queue.start("b", 10.5)
    timers.queue.start("c", 13.0)
    assert (timers.queue.next(), timers.queue.oldest(), len(timers.queue)) == (12.0, "a", 3)
    timers.queue.run(11.999)
    assert timers.fired == []
    timers.queue.run(12.0)
    assert timers.fired == ["a"]
    timers.queue.run(14.999)
    assert timers.fired == ["a", "b"]
    assert (timers.queue.next(), timers.queue.oldest(), len(timers.queue)) == (15.0, "c", 1)


def test_item_is_taken_once(timers: Timers) -> None:
    timers.queue.start("a", 0.0)
    timers.queue.run(100.0)
    timers.queue.run(200.0)
    assert timers.fired == ["a"]


def test_nothing_is_due_in_an_empty_queue(timers: Timers) -> None:
    assert (timers.queue.next(), len(timers.queue)) == (math.inf, 0)
    timers.queue.run(1e12)
    assert timers.fired == []


def test_stopped_item_is_not_taken(timers: Timers) -> None:
    for name in "abc":
        timers.queue.start(name, 0.0)
    timers.queue.stop("b")
    timers.queue.stop("b")  # has no timer any more
    timers.queue.stop("unknown")
    timers.queue.stop("a")
    assert (timers.queue.oldest(), len(timers.queue)) == ("c", 1)
    timers.queue.run(2.0)
    assert timers.fired == ["c"]


def test_stopped_item_that_is_started_again_waits_for_the_whole_delay(timers: Timers) -> None:
    timers.queue.start("a", 0.0)
    timers.queue.start("b", 1.0)
    timers.queue.stop("a")
    timers.queue.start("a", 1.5)
    timers.queue.run(3.0)
    assert timers.fired == ["b"]
    timers.queue.run(3.5)
    assert timers.fired == ["b", "a"]


def test_one_turn_takes_a_bounded_number(timers: Timers) -> None:
    names = [str(number) for number in range(2 * FIRED_PER_TURN + 1)]
    for name in names:
        timers.queue.start(name, 0.0)
    for turn in range(1, 4):
        timers.queue.run(5.0)
        assert timers.fired == names[: turn * FIRED_PER_TURN]


def test_action_may_start_and_stop_timers() -> None:
    fired: list[str] = []

    def act(name: str) -> None:
        fired.append(name)
        if name == "a":
            queue.stop("b")
            queue.start("a", 2.0)

    queue: DelayQueue[str] = DelayQueue(2.0, act)
    for name in "abc":
        queue.start(name, 0.0)
    queue.run(2.0)
    assert fired == ["a", "c"]
    assert (queue.next(), queue.oldest(), len(queue)) == (4.0, "a", 1)


def test_item_that_starts_itself_again_at_once_does_not_run_for_ever() -> None:
    fired: list[str] = []

    def act(name: str) -> None:
        fired.append(name)
        queue.start(name, 5.0)

    queue: DelayQueue[str] = DelayQueue(0.0, act)
    queue.start("a", 5.0)
    queue.run(5.0)
    assert len(fired) == FIRED_PER_TURN


def test_exception_costs_one_item(timers: Timers) -> None:
    def act(name: str) -> None:
        if name == "bomb":
            raise ZeroDivisionError
        fired.append(name)

    fired: list[str] = []
    queue: DelayQueue[str] = DelayQueue(2.0, act)
    for name in ("a", "bomb", "b"):
        queue.start(name, 0.0)
    with pytest.raises(ZeroDivisionError):
        queue.run(2.0)
    assert queue.next() == 2.0, "the rest is still due"
    queue.run(2.0)
    assert (fired, len(queue)) == (["a", "b"], 0)
