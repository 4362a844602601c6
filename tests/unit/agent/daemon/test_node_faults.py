"""Faults of the node, by clocks and a memory that the tests set."""

from __future__ import annotations

import pytest

from udpwatch.agent.daemon import node_faults
from udpwatch.agent.daemon.node_faults import NodeFaults
from udpwatch.agent.kernel.clock import Clocks
from udpwatch.agent.model import NODE_FAULTS, Memory


class Node:
    """A node whose clocks and memory the test sets."""

    def __init__(self) -> None:
        self.clocks = Clocks(1_800_000_000.0, 100.0, 500.0)
        self.memory: Memory | None = None
        self.faults = NodeFaults(self.clocks, lambda: self.memory)

    def sample(self, seconds: float = 0.5, suspended: float = 0.0, step: float = 0.0) -> list[str]:
        """Take a sample so many seconds later; return what is logged."""
        wall, monotonic, boot = self.clocks
        self.clocks = Clocks(wall + seconds + suspended + step, monotonic + seconds, boot + seconds + suspended)
        return self.faults.add(self.clocks)

    def counted(self) -> dict[str, int]:
        return {fault: count for fault, count in self.faults.counts.items() if count}


def test_nothing_is_counted_while_samples_are_taken_in_time() -> None:
    node = Node()
    for _ in range(100):
        assert node.sample() == []
    assert node.faults.counts == dict.fromkeys(NODE_FAULTS, 0)
    assert node.faults.step == 0


def test_each_late_sample_is_counted_and_the_first_is_logged() -> None:
    node = Node()
    (line,) = node.sample(7.25)
    assert "too little CPU" in line and "7.2 s old" in line
    assert node.sample(8) == []
    assert node.counted() == {"late_sample": 2}
    for _ in range(int(node_faults.CALM_SECONDS)):
        node.sample(1)
    assert len(node.sample(7)) == 1


@pytest.mark.parametrize(("step", "words"), [(3600.0, "forward by 3600.0 s"), (-90.5, "back by 90.5 s")])
def test_wall_clock_that_is_set_is_counted_and_told(step: float, words: str) -> None:
    node = Node()
    (line,) = node.sample(step=step)
    assert words in line
    assert node.faults.step == pytest.approx(step)
    assert node.counted() == {"clock_step": 1}
    assert node.sample() == []
    assert node.faults.step == 0


def test_clock_whose_rate_is_adjusted_is_not_set() -> None:
    node = Node()
    for _ in range(100):
        assert node.sample(step=0.00025) == []
    assert node.counted() == {}


def test_suspend_is_no_step_and_no_late_sample() -> None:
    node = Node()
    (line,) = node.sample(suspended=28_800)
    assert "suspended for 28800.0 s" in line
    assert node.counted() == {"suspend": 1}
    assert node.faults.step == 0


def test_step_during_a_suspend_is_both() -> None:
    node = Node()
    assert len(node.sample(suspended=100, step=-5)) == 2
    assert node.counted() == {"suspend": 1, "clock_step": 1}
    assert node.faults.step == pytest.approx(-5)


def test_short_memory_is_counted_at_each_check_and_logged_when_it_begins() -> None:
    node = Node()
    node.memory = Memory(91 << 20, 100 << 20)
    (line,) = node.sample()
    assert "91 of 100 MB" in line
    for _ in range(9):
        assert node.sample() == []  # checked every 5 s
    assert node.counted() == {"memory": 1}
    node.sample()
    assert node.counted() == {"memory": 2}
    node.memory = Memory(50 << 20, 100 << 20)
    assert node.sample(5) == []
    node.memory = Memory(100 << 20, 100 << 20)
    assert len(node.sample(5)) == 1
    assert node.faults.memory == node.memory


def test_memory_without_a_limit_is_never_short() -> None:
    node = Node()
    assert node.sample() == []
    assert node.faults.memory is None
