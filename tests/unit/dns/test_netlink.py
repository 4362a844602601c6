"""The framing of netlink messages, and one request to the real kernel."""

from __future__ import annotations

import socket
import sys

import pytest

from udpwatch.dns import addresses
from udpwatch.dns.netlink import HEADER, NESTED, Netlink, attribute, attributes, messages


def test_attributes_are_padded_and_read_back() -> None:
    raw = attribute(1, b"abcde") + attribute(2 | NESTED, attribute(3, b"")) + attribute(4, b"abcd")
    assert len(raw) % 4 == 0
    read = [(kind, bytes(value)) for kind, value in attributes(memoryview(raw))]
    assert read == [(1, b"abcde"), (2, attribute(3, b"")), (4, b"abcd")]


@pytest.mark.parametrize("length", [0, 3, 9, 0xFFFF])
def test_an_invalid_length_ends_the_attributes(length: int) -> None:
    raw = attribute(1, b"abcd") + length.to_bytes(2, sys.byteorder) + bytes(6)
    assert [kind for kind, _ in attributes(memoryview(raw))] == [1]


def message(kind: int, content: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(content), kind, 0, 0, 0) + content + bytes(-len(content) % 4)


def test_a_datagram_may_hold_several_messages() -> None:
    raw = message(20, b"abcde") + message(3, b"")
    assert [(kind, bytes(content)) for kind, content in messages(raw)] == [(20, b"abcde"), (3, b"")]


@pytest.mark.parametrize("cut", [1, 15, 17])
def test_a_truncated_message_is_ignored(cut: int) -> None:
    assert [kind for kind, _ in messages(message(20, b"abcd") + message(21, b"abcd")[:-cut])] == [20]


def test_an_error_of_the_kernel_is_raised() -> None:
    with Netlink(socket.NETLINK_ROUTE) as link, pytest.raises(OSError, match="not supported"):
        list(link.ask(0x7FF0, bytes(16)))


def test_the_addresses_of_this_host() -> None:
    """Each address that the kernel knows, with its interface: loopback is everywhere."""
    found = {(each.text, each.interface) for each in addresses.snapshot()}
    assert ("127.0.0.1", "lo") in found
