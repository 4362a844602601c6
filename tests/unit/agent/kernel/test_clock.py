"""The clock of the BPF programs, seen from a time namespace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from udpwatch.agent.kernel import clock


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    clock.offset_ns.cache_clear()
    yield
    clock.offset_ns.cache_clear()


@pytest.mark.parametrize(
    ("text", "offset_ns"),
    [
        ("monotonic           0         0\nboottime            7         0\n", 0),
        ("monotonic     1000000 500000000\nboottime            0         0\n", 1_000_000_500_000_000),
        ("monotonic        -100         0\nboottime            0         0\n", -100_000_000_000),
        (None, 0),  # a kernel without time namespaces
    ],
)
def test_offset_of_a_time_namespace_is_subtracted(
    text: str | None, offset_ns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "timens_offsets").write_text(text)
    monkeypatch.setattr(clock, "_OFFSETS", tmp_path / "timens_offsets")
    before = time.monotonic_ns()
    assert before <= clock.monotonic_ns() + offset_ns <= time.monotonic_ns()
