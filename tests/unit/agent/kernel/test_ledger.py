"""The ledger writes JSON in pieces."""

from __future__ import annotations

import json

import pytest

from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ledger import PIECE, _encode

MANY = {str(number): [number, "ü", None] for number in range(3 * PIECE + 1)}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"a": None, "b": [], "c": {}},
        {"small": 1, "large": MANY, "also": 2},
        {"large": MANY},
        {"rows": [{"a": MANY, "b": 1}] * (PIECE + 1), "last": [MANY, 1, MANY]},
        {"state": {"rows": [{"a": [1, 2]}] * 1_000}, "sensor": {"digest": {"findings": MANY}}},
    ],
)
def test_pieces_are_the_json_text(record: dict[str, object]) -> None:
    pieces = list(_encode(record, unpaced))
    assert json.loads(b"".join(pieces)) == record
    assert max(map(len, pieces)) < 50 * PIECE
