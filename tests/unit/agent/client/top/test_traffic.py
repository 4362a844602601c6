"""The rates of servers in `udpwatch top`."""

from __future__ import annotations

from typing import Any

import pytest
from top_snapshots import NOW, server, snapshot

from udpwatch.agent.client.top.traffic import Rates, ServerMeter, server_key


def rates(meter: ServerMeter, seconds: float, **counts: Any) -> Rates | None:
    """Return the rates of the only server."""
    started = counts.pop("started", NOW - 60)
    seen = meter.add(NOW + seconds, (snapshot(servers=(server(**counts),), started=started),))
    return None if seen is None else next(iter(seen.values()))


def test_first_snapshot_has_no_rates() -> None:
    assert rates(ServerMeter(), 0) is None


def test_rates_are_the_increase_of_five_seconds() -> None:
    meter = ServerMeter()
    for second in range(10):
        seen = rates(meter, second, requests=10 * second, replies=5 * second, wrong=second, drops=2 * second)
    assert seen == Rates(10.0, 5.0, 1.0, 2.0, 0.0)
    for second in range(10, 16):
        seen = rates(meter, second, requests=90, replies=45, wrong=9, drops=18)
    assert seen == Rates(0.0, 0.0, 0.0, 0.0, 0.0)


def test_unanswered_share_covers_a_minute() -> None:
    """A request counts as unanswered only after the window, long after it raised the rate of requests."""
    meter = ServerMeter()
    rates(meter, 0, requests=0)
    for second in range(1, 60):
        seen = rates(meter, second, requests=100, unanswered=25 if second > 30 else 0)
    assert seen and (seen.requests, seen.unanswered) == (0.0, 0.25)
    for second in range(60, 140):
        seen = rates(meter, second, requests=100, unanswered=25)
    assert seen and seen.unanswered is None


def test_share_is_at_most_one() -> None:
    """The requests of before the minute can expire in it."""
    meter = ServerMeter()
    rates(meter, 0, requests=100)
    seen = rates(meter, 1, requests=101, unanswered=50)
    assert seen and seen.unanswered == 1.0


def test_restarted_agent_has_no_rates_at_first() -> None:
    meter = ServerMeter()
    rates(meter, 0, requests=100)
    assert rates(meter, 1, requests=150, started=NOW) is None
    seen = rates(meter, 2, requests=153, started=NOW)
    assert seen and seen.requests == 3.0


def test_count_that_fell_has_begun_anew() -> None:
    """The agent evicted the server, and listed it again."""
    meter = ServerMeter()
    rates(meter, 0, requests=100)
    seen = rates(meter, 1, requests=4)
    assert seen and seen.requests == 4.0


def test_clock_that_is_set_back_starts_new_rates() -> None:
    meter = ServerMeter()
    rates(meter, 0, requests=100)
    assert rates(meter, -3600, requests=110) is None
    seen = rates(meter, -3599, requests=112)
    assert seen and seen.requests == 2.0


def test_unknown_drops_have_no_rate_and_repeated_snapshot_changes_nothing() -> None:
    meter = ServerMeter()
    rates(meter, 0, requests=0, drops=None)
    first = rates(meter, 1, requests=5, drops=None)
    assert first and first.drops == 0.0
    assert rates(meter, 1, requests=5, drops=None) == first


def test_memory_is_bounded() -> None:
    meter = ServerMeter()
    for tenth in range(3000):
        meter.add(NOW + tenth / 10, (snapshot(servers=(server(requests=tenth),)),))
    assert len(meter._recent) + len(meter._older) <= 16


@pytest.mark.parametrize("change", [{"port": 54}, {"netns": 2}, {"process": "x"}, {"pod": "p"}, {"container": "c"}])
def test_key_tells_servers_apart_and_ignores_the_process_id(change: dict[str, Any]) -> None:
    assert server_key("n", server(**change)) != server_key("n", server())
    assert server_key("n", server(pid=1)) == server_key("n", server())


def test_server_that_changes_its_name_has_not_received_its_whole_count_at_once() -> None:
    """Its counts go with it: they are not those of the last five seconds."""
    meter = ServerMeter()
    rates(meter, 10, requests=1_000_000, unanswered=500_000, process="before")
    seen = rates(meter, 11, requests=1_000_010, unanswered=500_000, process="after")
    assert seen == Rates()
    for second in range(12, 20):
        seen = rates(meter, second, requests=1_000_000 + 10 * (second - 10), unanswered=500_000, process="after")
    assert seen and seen.requests == 10.0
