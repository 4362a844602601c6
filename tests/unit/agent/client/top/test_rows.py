"""What `udpwatch top` shows, without a screen: rates, order, filter, baseline, and everything in so many columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from top_snapshots import NOW, look, row

from udpwatch.agent.client.top.banner import Condition, banner, spark
from udpwatch.agent.client.top.layout import (
    address_text,
    age_text,
    cells,
    columns_for,
    count_text,
    heading,
    plain,
    rate_text,
)
from udpwatch.agent.client.top.rows import Look, Meter, Order, baseline_of, other_of, rows, total_of

# Rates


def rates(seen: Look) -> list[float | None]:
    return [line.rate for line in rows(seen, Order.PORT)]


def test_the_first_look_knows_no_rate() -> None:
    first = Meter().add(look(0, row()))
    assert (rates(first), first.wrong, first.checked) == ([None], None, None)


def test_a_rate_is_what_was_added_between_two_looks() -> None:
    meter = Meter()
    meter.add(look(0, row(count=10), checked=100))
    second = meter.add(look(2, row(count=16), checked=150))
    assert (rates(second), second.wrong, second.checked) == ([3.0], 3.0, 25.0)


def test_a_row_that_was_not_there_before_counts_whole() -> None:
    meter = Meter()
    meter.add(look(0, row()))
    assert rates(meter.add(look(1, row(), row(port=2000, count=4)))) == [0.0, 4.0]


def test_a_rate_is_of_the_last_five_seconds() -> None:
    meter = Meter()
    for second in range(21):
        seen = meter.add(look(second, row(count=100 if second >= 10 else 1)))
        if second == 12:
            assert rates(seen) == [pytest.approx(99 / 5)]
    assert rates(seen) == [0.0]


def test_an_agent_that_was_started_again_counts_from_zero() -> None:
    meter = Meter()
    meter.add(look(0, row(count=10), checked=100))
    again = meter.add(look(4, row(count=12), checked=104, started=NOW + 3))
    assert (rates(again), again.checked) == ([3.0], 26.0)


def test_a_count_that_fell_counts_whole() -> None:
    meter = Meter()
    meter.add(look(0, row(count=10)))
    assert rates(meter.add(look(1, row(count=3)))) == [3.0]


def test_the_same_reading_again_changes_nothing() -> None:
    meter = Meter()
    meter.add(look(0, row(count=10)))
    second = meter.add(look(1, row(count=12)))
    third = meter.add(look(1, row(count=12)))
    assert (third.rates, third.history) == (second.rates, second.history)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "total 1   findings 1   lost 0"),
        ({"other": 3, "lost": {"queue": 2}}, "total 4   findings 1   in no row 3   lost 2"),
    ],
    ids=["quiet", "beyond"],
)
def test_the_numbers_of_a_node(changes: dict[str, Any], told: str) -> None:
    lines = banner(look(0, row(count=1), **changes), Condition("test", NOW), None, 100)
    assert told in "".join(text for text, _ in lines[1])


def test_a_clock_that_was_set_back_does_no_harm() -> None:
    meter = Meter()
    meter.add(look(0, row(count=10)))
    meter.add(look(1, row(count=12)))
    assert meter.add(look(-3600, row(count=14))).wrong is None
    assert meter.add(look(-3599, row(count=15))).wrong == 1.0


def test_what_is_in_no_row_is_wrong_too() -> None:
    meter = Meter()
    meter.add(look(0, row(), other=5))
    second = meter.add(look(1, row(), other=7))
    assert second.wrong == 2.0
    assert total_of(second, None) == 8


# Order, filter, baseline

THREE = (row("a", 3, 5), row("B", 1, 7, pod="x", namespace="ns"), row("c", 2, 6, container="box", last=NOW + 1))


@pytest.mark.parametrize(
    ("order", "processes"),
    [
        (Order.RATE, "Bca"),  # no rate yet: the total decides
        (Order.TOTAL, "Bca"),
        (Order.LAST, "cBa"),
        (Order.PROCESS, "aBc"),
        (Order.WHERE, "acB"),
        (Order.PORT, "Bca"),
    ],
)
def test_order(order: Order, processes: str) -> None:
    shown = rows(look(0, *THREE), order)
    assert "".join(line.key.process for line in shown) == processes


def test_every_order_has_its_turn_and_can_be_turned_round() -> None:
    order, seen = Order.RATE, []
    for _ in Order:
        seen.append(order)
        order = order.next
    assert (sorted(seen), order) == (sorted(Order), Order.RATE)
    assert [line.key.port for line in rows(look(0, *THREE), Order.PORT, backwards=True)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "processes"),
    [("", "aBc"), ("b", "Bc"), ("NS/X", "B"), ("box", "c"), ("172.16 new", "aBc"), ("box a", ""), ("[red]", "")],
)
def test_filter(words: str, processes: str) -> None:
    shown = rows(look(0, *THREE), Order.PROCESS, words=words)
    assert "".join(line.key.process for line in shown if line) == processes


def test_after_a_clear_only_what_grew_is_shown() -> None:
    baseline = baseline_of(look(0, row(count=10), row(port=2, count=3), other=4))
    later = look(1, row(count=12), row(port=2, count=3), other=5)
    assert [(line.key.port, line.total) for line in rows(later, Order.RATE, baseline=baseline)] == [(1194, 2)]
    assert (other_of(later, baseline), total_of(later, baseline)) == (1, 3)
    restarted = look(2, row(count=1), started=NOW + 2)
    assert [line.total for line in rows(restarted, Order.RATE, baseline=baseline)] == [1]


# In characters


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "·"), (0, "0"), (0.001, "<0.01"), (0.05, "0.05"), (0.1, "0.1"), (12.34, "12.3"), (99.9, "99.9"),
     (100, "100"), (1234, "1.2k"), (999_999, "1.0M"), (54_321, "54k"), (12e9, "12G")],
)  # fmt: skip
def test_rate_text(rate: float | None, text: str) -> None:
    assert rate_text(rate) == text


@given(st.floats(0, 1e14))
def test_numbers_keep_their_column(number: float) -> None:
    assert len(rate_text(number)) <= 5
    assert len(count_text(number)) <= 7


@pytest.mark.parametrize(("seconds", "text"), [(-5, "0s"), (59.9, "59s"), (61, "1m"), (7200, "2h"), (1e6, "11d")])
def test_age_text(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_an_address_keeps_both_its_ends() -> None:
    assert address_text("fd00:1234:5678::13", 11) == "fd00:…8::13"
    assert address_text("10.0.0.1", 10) == "10.0.0.1  "


NAMES = st.text(max_size=40)
ADDRESSES = st.sampled_from(["10.0.0.1", "172.16.113.113", "fd00:1234:5678:9abc:def0:1234:5678:9abc"])


@given(
    st.lists(st.tuples(NAMES, NAMES, ADDRESSES, st.integers(1, 10**12)), max_size=4),
    st.integers(40, 240),
    st.booleans(),
    st.sampled_from(list(Order)),
)
def test_every_line_is_as_wide_as_the_screen_or_less(
    found: list[tuple[str, str, str, int]], width: int, cluster: bool, order: Order
) -> None:
    seen = look(0, *(row(name, 53, count, pod=pod, expected=where) for name, pod, where, count in found))
    lines = rows(seen, order)
    columns = columns_for(lines, width, cluster, order)
    for painted in (heading(columns, order, False), *(cells(line, columns, NOW) for line in lines)):
        text = "".join(part for part, _ in painted)
        assert cell_len(text) <= width
        assert text.isprintable()
    for painted in banner(seen, Condition("agent", NOW), None, width):
        assert cell_len("".join(part for part, _ in painted)) <= max(width, 70)


def test_addresses_of_usual_length_are_whole_in_80_columns() -> None:
    long = row("unbound-control-very-long", 65535, 123_456, namespace="kube-system", pod="coredns-7c9f6d-x2x9k")
    lines = rows(look(0, long), Order.RATE)
    text = plain(cells(lines[0], columns_for(lines, 80, False, Order.RATE), NOW))
    assert "172.16.13.13" in text
    assert "172.17.0.1" in text
    assert "65535" in text
    assert "coredns" in text


def test_the_heading_shows_what_it_is_sorted_by() -> None:
    lines = rows(look(0, row()), Order.TOTAL)
    for order, backwards, arrow in (
        (Order.TOTAL, False, "total▼"),
        (Order.PORT, False, "port▲"),
        (Order.PORT, True, "port▼"),
    ):
        assert arrow in plain(heading(columns_for(lines, 80, False, order), order, backwards))


# The lines above


def test_spark_has_the_newest_at_the_right() -> None:
    bars, peak = spark([(NOW - 150, 1.0), (NOW, 4.0)], NOW, 10)
    assert peak == 4.0
    assert bars[-1] == "█"
    assert bars.startswith("    ")
    assert spark([], NOW, 10) == (" " * 10, 0.0)
    assert spark([], NOW, 0) == ("", 0.0)


def test_spark_is_flat_where_nothing_is_wrong() -> None:
    bars, peak = spark([(NOW - second, 0.0) for second in range(60, 0, -1)], NOW, 50)
    assert (set(bars.strip()), peak) == ({"▁"}, 0.0)


def state(seen: Look | None, **changes: Any) -> str:
    lines = banner(seen, replace(Condition("/run/a.sock", NOW + 1), **changes), None, 80)
    return "\n".join(map(plain, lines))


def test_the_banner_says_how_it_stands() -> None:
    good = look(0, row())
    assert "● 1s ago" in state(good)
    assert "paused at " in state(good, paused=NOW)
    assert "not connected: retrying, as of 1s ago" in state(good, trouble="Connection refused")
    assert "Connection refused" in state(good, trouble="Connection refused")
    assert "/run/a.sock" in state(None)
    assert "not ready" in state(look(0, row(), ready=False))
    assert "2 nodes" in state(replace(good, cluster=True, snapshots=good.snapshots * 2))


def test_the_banner_counts() -> None:
    text = state(look(0, row(count=3), other=4, lost={"queue": 2, "output": 3}))
    for fact in ("total 7", "in no row 4", "findings 1", "lost 5"):
        assert fact in text
