"""How `udpwatch top` writes numbers, addresses and rows in columns of any width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from top_snapshots import NOW, row, view

from udpwatch.agent.client.top.banner import SourceState, banner
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
from udpwatch.agent.client.top.rows import Order, rows


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "·"), (0, "0"), (0.001, "<0.01"), (0.05, "0.05"), (0.1, "0.1"), (12.34, "12.3"), (99.9, "99.9"),
     (100, "100"), (1234, "1.2k"), (999_999, "1.0M"), (54_321, "54k"), (12e9, "12G")],
)  # fmt: skip
def test_rate_as_text(rate: float | None, text: str) -> None:
    assert rate_text(rate) == text


@given(st.floats(0, 1e14))
def test_numbers_fit_their_column(number: float) -> None:
    assert len(rate_text(number)) <= 5
    assert len(count_text(number)) <= 7


@pytest.mark.parametrize(("seconds", "text"), [(-5, "0s"), (59.9, "59s"), (61, "1m"), (7200, "2h"), (1e6, "11d")])
def test_age_as_text(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_long_address_keeps_both_ends() -> None:
    assert address_text("fd00:1234:5678::13", 11) == "fd00:…8::13"
    assert address_text("10.0.0.1", 10) == "10.0.0.1  "
    assert cell_len(address_text("00000000000⺀", 10)) == 10  # a character of two cells


NAMES = st.text(max_size=40)
ADDRESSES = st.sampled_from(["10.0.0.1", "172.16.113.113", "fd00:1234:5678:9abc:def0:1234:5678:9abc"])


@given(
    st.lists(st.tuples(NAMES, NAMES, ADDRESSES, st.integers(1, 10**12)), max_size=4),
    st.integers(40, 240),
    st.booleans(),
    st.sampled_from(list(Order)),
)
def test_no_line_is_wider_than_the_screen(
    found: list[tuple[str, str, str, int]], width: int, cluster: bool, order: Order
) -> None:
    seen = view(0, *(row(name, 53, count, pod=pod, expected=where) for name, pod, where, count in found))
    lines = rows(seen, order)
    columns = columns_for(lines, width, cluster, order)
    for painted in (heading(columns, order, False), *(cells(line, columns, NOW) for line in lines)):
        text = "".join(part for part, _ in painted)
        assert cell_len(text) <= width
        assert text.isprintable()
    for painted in banner(seen, SourceState("agent", NOW), None, width):
        assert cell_len("".join(part for part, _ in painted)) <= max(width, 70)


def test_ipv4_addresses_are_complete_in_80_columns() -> None:
    long = row("unbound-control-very-long", 65535, 123_456, namespace="kube-system", pod="coredns-7c9f6d-x2x9k")
    lines = rows(view(0, long), Order.RATE)
    text = plain(cells(lines[0], columns_for(lines, 80, False, Order.RATE), NOW))
    assert "172.16.13.13" in text
    assert "172.17.0.1" in text
    assert "65535" in text
    assert "coredns" in text


def test_heading_marks_the_sort_column() -> None:
    lines = rows(view(0, row()), Order.TOTAL)
    for order, backwards, arrow in (
        (Order.TOTAL, False, "total▼"),
        (Order.PORT, False, "port▲"),
        (Order.PORT, True, "port▼"),
    ):
        assert arrow in plain(heading(columns_for(lines, 80, False, order), order, backwards))
