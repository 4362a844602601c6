"""HOST:PORT as text."""

from __future__ import annotations

import pytest

from udpwatch.dns.host_port import host_port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9953", ("127.0.0.1", 9953)),
        ("[::1]:0", ("::1", 0)),
        ("::1:53", ("::1", 53)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_host_and_port_are_taken_apart(text: str, expected: tuple[str, int]) -> None:
    assert host_port(text) == expected


@pytest.mark.parametrize("text", ["", ":", "9953", ":9953", "[]:53", "a:", "a:65536", "a:-1", "a:٣", "a:+1", "a: 1"])
def test_other_texts_raise_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        host_port(text)
