"""The rows of `udpwatch top`: rates, order, filter, baseline."""

from __future__ import annotations

import pytest
from top_snapshots import NOW, healed_row, row, view

from udpwatch.agent.client.top.rows import Meter, Order, View, baseline_of, other_of, rows, total_of

# Rates


def rates(seen: View) -> list[float | None]:
    return [line.rate for line in rows(seen, Order.PORT)]


def test_first_look_has_no_rate() -> None:
    first = Meter().add(view(0, row()))
    assert (rates(first), first.wrong, first.checked) == ([None], None, None)


def test_rate_is_the_increase_between_two_looks() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10), checked=100))
    second = meter.add(view(2, row(count=16), checked=150))
    assert (rates(second), second.wrong, second.checked) == ([3.0], 3.0, 25.0)


def test_new_row_counts_completely() -> None:
    meter = Meter()
    meter.add(view(0, row()))
    assert rates(meter.add(view(1, row(), row(port=2000, count=4)))) == [0.0, 4.0]


def test_rate_covers_the_last_five_seconds() -> None:
    meter = Meter()
    for second in range(21):
        seen = meter.add(view(second, row(count=100 if second >= 10 else 1)))
        if second == 12:
            assert rates(seen) == [pytest.approx(99 / 5)]
    assert rates(seen) == [0.0]


def test_restarted_agent_counts_from_zero() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10), checked=100))
    again = meter.add(view(4, row(count=12), checked=104, started=NOW + 3))
    assert (rates(again), again.checked) == ([3.0], 26.0)


def test_count_that_fell_counts_completely() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10)))
    assert rates(meter.add(view(1, row(count=3)))) == [3.0]


def test_repeated_snapshot_changes_nothing() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10)))
    second = meter.add(view(1, row(count=12)))
    third = meter.add(view(1, row(count=12)))
    assert (third.rates, third.history) == (second.rates, second.history)


def test_clock_that_is_set_back_starts_new_rates() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10)))
    meter.add(view(1, row(count=12)))
    assert meter.add(view(-3600, row(count=14))).wrong is None
    assert meter.add(view(-3599, row(count=15))).wrong == 1.0


def test_replies_in_no_row_count_as_wrong() -> None:
    meter = Meter()
    meter.add(view(0, row(), other=5))
    second = meter.add(view(1, row(), other=7))
    assert second.wrong == 2.0
    assert total_of(second, None) == 8


def test_healed_replies_have_a_rate_and_are_not_wrong() -> None:
    meter = Meter()
    meter.add(view(0, row(count=10), healed_row(count=10)))
    second = meter.add(view(1, row(count=13), healed_row(count=15)))
    assert rates(second) == [3.0, 5.0]
    assert (second.wrong, second.history, total_of(second, None)) == (3.0, ((NOW + 1, 3.0),), 13)


# Order, filter, baseline

THREE = (row("a", 3, 5), row("B", 1, 7, pod="x", namespace="ns"), row("c", 2, 6, container="box", last=NOW + 1))


@pytest.mark.parametrize(
    ("order", "processes"),
    [
        (Order.RATE, "Bca"),  # no rate yet: the total decides
        (Order.TOTAL, "Bca"),
        (Order.LAST, "cBa"),
        (Order.PROCESS, "aBc"),
        (Order.LOCATION, "acB"),
        (Order.PORT, "Bca"),
    ],
)
def test_rows_are_sorted_by_each_column(order: Order, processes: str) -> None:
    shown = rows(view(0, *THREE), order)
    assert "".join(line.key.process for line in shown) == processes


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("backwards", [False, True])
def test_healed_rows_come_last_in_every_order(order: Order, backwards: bool) -> None:
    shown = rows(view(0, healed_row("A", 4, 9), *THREE), order, backwards)
    assert [line.key.process for line in shown][-1] == "A"


def test_sort_key_visits_every_column_and_can_be_reversed() -> None:
    order, seen = Order.RATE, []
    for _ in Order:
        seen.append(order)
        order = order.next
    assert (sorted(seen), order) == (sorted(Order), Order.RATE)
    assert [line.key.port for line in rows(view(0, *THREE), Order.PORT, backwards=True)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("words", "processes"),
    [("", "aBc"), ("b", "Bc"), ("NS/X", "B"), ("box", "c"), ("172.16 new", "aBc"), ("box a", ""), ("[red]", "")],
)
def test_filter_selects_rows_by_words(words: str, processes: str) -> None:
    shown = rows(view(0, *THREE), Order.PROCESS, words=words)
    assert "".join(line.key.process for line in shown if line) == processes


def test_after_clear_only_rows_that_grew_are_shown() -> None:
    baseline = baseline_of(view(0, row(count=10), row(port=2, count=3), other=4))
    later = view(1, row(count=12), row(port=2, count=3), other=5)
    assert [(line.key.port, line.total) for line in rows(later, Order.RATE, baseline=baseline)] == [(1194, 2)]
    assert (other_of(later, baseline), total_of(later, baseline)) == (1, 3)
    restarted = view(2, row(count=1), started=NOW + 2)
    assert [line.total for line in rows(restarted, Order.RATE, baseline=baseline)] == [1]
