"""A thread's share of a quota. Time and CPU are arguments."""

from __future__ import annotations

import math

import pytest

from udpwatch.dns.budget import BURST_SECONDS, FORWARD_SHARE, MAX_DEBT_SECONDS, TCP_SHARE, UNLIMITED, Budget

SHARE = FORWARD_SHARE


class Thread:
    """A thread that has worked for ``used`` of ``now`` seconds."""

    def __init__(self, cpus: float, share: float = SHARE) -> None:
        self.now = self.used = 0.0
        self.budget = Budget(lambda: cpus, share, lambda: self.now, lambda: self.used)

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds


def test_work_beyond_the_share_waits_until_it_has_been_saved() -> None:
    thread = Thread(0.5)
    thread.work(BURST_SECONDS)
    assert thread.budget.delay() == 0
    thread.work(0.04)
    assert thread.budget.delay() == pytest.approx((0.04 - (0.04 + BURST_SECONDS) * SHARE * 0.5) / (SHARE * 0.5))
    thread.now += thread.budget.delay()
    assert thread.budget.delay() == pytest.approx(0)


def test_a_long_rest_saves_no_more_than_a_burst() -> None:
    thread = Thread(0.5)
    thread.now += 1_000
    assert thread.budget.delay() == 0
    thread.work(2 * BURST_SECONDS)
    assert thread.budget.delay() > 0


def test_debt_is_bounded() -> None:
    thread = Thread(0.5)
    thread.work(1_000)
    assert thread.budget.delay() == pytest.approx(MAX_DEBT_SECONDS / (SHARE * 0.5))


@pytest.mark.parametrize("share", [FORWARD_SHARE, TCP_SHARE])
def test_in_the_long_run_it_is_the_share(share: float) -> None:
    thread = Thread(0.25, share)
    for _ in range(1_000):
        thread.work(0.003)
        thread.now += thread.budget.delay()
    assert thread.used / thread.now == pytest.approx(share * 0.25, rel=0.05)


@pytest.mark.parametrize("cpus", [1.0, 4.0, math.inf])
def test_without_a_small_quota_nothing_waits(cpus: float) -> None:
    thread = Thread(cpus)
    thread.work(100)
    assert thread.budget.delay() == 0
    assert not thread.budget.is_limited


def test_quota_is_asked_each_time() -> None:
    """An operator may change it while the process runs."""
    cpus = [0.5, 1.0, 0.99]
    budget = Budget(lambda: cpus[0], SHARE)
    found = []
    while cpus:
        found.append(budget.is_limited)
        del cpus[0]
    assert found == [True, False, True]


def test_unlimited_never_waits() -> None:
    assert not UNLIMITED.is_limited
    assert UNLIMITED.delay() == 0
