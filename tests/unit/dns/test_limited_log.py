"""Log lines that packets can cause: a few per minute, then the number left out."""

from __future__ import annotations

import logging

import pytest

from udpwatch.dns.limited_log import LINES_PER_MINUTE, LimitedLog

log = logging.getLogger("udpwatch.dns.test")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limited(clock: Clock, caplog: pytest.LogCaptureFixture) -> LimitedLog:
    caplog.set_level(logging.INFO)
    return LimitedLog(clock)


def test_flood_is_a_few_lines_and_a_count(limited: LimitedLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1_000):
        limited.write(log, logging.WARNING, "dns: bad %d", number)
    assert caplog.messages == [f"dns: bad {number}" for number in range(LINES_PER_MINUTE)]
    caplog.clear()
    limited.flush()
    assert not caplog.messages, "the minute is not over"
    clock.now = 60.0
    limited.flush()
    assert caplog.messages == ["dns: left out 995 more lines like this, the last: dns: bad 999"]
    limited.flush(everything=True)
    assert len(caplog.messages) == 1, "logged once"


def test_next_minute_reports_the_lines_left_out(
    limited: LimitedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(7):
        limited.write(log, logging.WARNING, "dns: bad %d", number)
    clock.now = 61.0
    limited.write(log, logging.WARNING, "dns: bad %d", 7)
    assert caplog.messages[-2:] == ["dns: left out 2 more lines like this, the last: dns: bad 6", "dns: bad 7"]


def test_kinds_have_separate_limits(limited: LimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        limited.write(log, logging.WARNING, "dns: frequent")
    limited.write(log, logging.ERROR, "dns: rare", error=ValueError("why"))
    assert caplog.messages[-1] == "dns: rare"
    assert caplog.records[-1].exc_info
    limited.flush(everything=True)
    assert caplog.messages[-1] == "dns: left out 95 more lines like this, the last: dns: frequent"
