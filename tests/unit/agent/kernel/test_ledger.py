"""The ledger writes JSON in pieces."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ledger import PIECE, _encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each, max_size=PIECE + 2) | st.dictionaries(st.text(), each, max_size=PIECE + 2),
    max_leaves=50,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_pieces_are_the_json_text(record: dict[str, object]) -> None:
    assert json.loads(b"".join(_encode(record, unpaced))) == record


def test_large_containers_come_in_many_pieces() -> None:
    record = {
        "state": {"rows": [{"a": [1, 2]}] * 1_000},
        "sensor": {"digest": {"findings": {str(n): n for n in range(1_000)}}},
    }
    pieces = list(_encode(record, unpaced))
    assert json.loads(b"".join(pieces)) == record
    assert max(map(len, pieces)) < 1_000
