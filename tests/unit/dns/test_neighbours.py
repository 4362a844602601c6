"""The copy of the kernel's table of neighbours: what its messages do to it. The kernel itself reports them in
tests/integration/test_dns_edns.py."""

from __future__ import annotations

import socket
import struct

import pytest

from udpwatch.dns import neighbours as module
from udpwatch.dns.names import pack_address
from udpwatch.dns.neighbours import Neighbours
from udpwatch.dns.netlink import attribute

NEW, GONE = 28, 29
REACHABLE, INCOMPLETE, STALE, FAILED, NOARP, PERMANENT = 0x02, 0x01, 0x04, 0x20, 0x40, 0x80
CLIENT, LINK_LOCAL = pack_address("192.0.2.7"), pack_address("fe80::7")
MAC, OTHER = bytes.fromhex("020000000007"), bytes.fromhex("020000000008")


class Table(Neighbours):
    """A table that is told of changes."""

    def tell(
        self, client: bytes, mac: bytes = MAC, state: int = REACHABLE, kind: int = NEW, index: int = 2, family: int = 0
    ) -> bytes:
        """Apply a change; return the address of the client."""
        family = family or (socket.AF_INET if len(client) == 4 else socket.AF_INET6)
        content = struct.pack("=BxxxiHBB", family, index, state, 0, 0)
        content += attribute(1, client) + (attribute(2, mac) if mac else b"")
        self._apply(kind, memoryview(content))
        return self.address_of(client)


@pytest.mark.parametrize("client", [CLIENT, LINK_LOCAL])
def test_neighbour_has_its_address_until_it_is_gone(client: bytes) -> None:
    table = Table()
    assert table.address_of(client) == b""
    assert table.tell(client) == MAC
    assert table.tell(client, OTHER, STALE) == OTHER
    assert table.tell(client, OTHER, kind=GONE) == b""
    assert len(table) == 0


@pytest.mark.parametrize("state", [INCOMPLETE, FAILED, NOARP])
def test_state_without_a_usable_address(state: int) -> None:
    table = Table()
    assert table.tell(CLIENT, state=state) == b""
    table.tell(CLIENT)
    assert table.tell(CLIENT, state=state) == b""
    assert len(table) == 0


@pytest.mark.parametrize("mac", [b"", bytes(20)], ids=["none", "InfiniBand"])
def test_address_that_cannot_be_sent(mac: bytes) -> None:
    assert Table().tell(CLIENT, mac) == b""


def test_address_of_two_neighbours_is_unknown() -> None:
    table = Table()
    table.tell(LINK_LOCAL, index=2)
    assert table.tell(LINK_LOCAL, index=3) == MAC
    assert table.tell(LINK_LOCAL, OTHER, index=3) == b""
    assert table.tell(LINK_LOCAL, kind=GONE, index=2) == OTHER


def test_entries_of_a_bridge_and_other_messages_are_ignored() -> None:
    table = Table()
    assert table.tell(CLIENT, family=7) == b""
    assert table.tell(CLIENT, kind=30) == b""
    table._apply(NEW, memoryview(b"\2"))
    assert len(table) == 0


def test_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NEIGHBOURS", 2)
    table = Table()
    clients = [bytes((192, 0, 2, number)) for number in range(3)]
    assert [table.tell(client) for client in clients] == [MAC, MAC, b""]
    table.tell(clients[0], kind=GONE)
    assert table.tell(clients[2]) == MAC


def test_reading_the_kernels_table_forgets_what_is_not_in_it() -> None:
    table = Table()
    documentation = pack_address("192.0.2.77")
    table.tell(documentation)
    table._read()
    assert table.address_of(documentation) == b""
