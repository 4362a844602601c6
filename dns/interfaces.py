"""Local names that depend on this host's interfaces: `--interface-name`, `--dynamic-host`, `--localise-queries`.

The tables are replaced whole, by one assignment, when the addresses change; readers in any thread see the old ones or
the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from udpwatch.dns.addresses import Local
from udpwatch.dns.names import MAX_ADDRESSES, pack_address
from udpwatch.dns.settings import InterfaceName, Settings

#: name -> octets of an address -> addresses
Addresses = dict[bytes, dict[int, tuple[bytes, ...]]]
_Tables = tuple[Addresses, dict[bytes, bytes]]


class HostInterfaces:
    """What the local names must know of this host's interfaces."""

    def __init__(self, settings: Settings) -> None:
        self._names = settings.interface_names
        self._localises = settings.localise_queries
        self._masks: dict[bytes, int] = {}  # IPv4 address -> netmask
        self._tables: _Tables = _named(self._names, []), {}

    def update(self, locals_: Iterable[Local]) -> bool:
        """Take this host's addresses. Return whether responses change."""
        if not self._names and not self._localises:
            return False
        known, before = list(locals_), self._tables
        self._tables = _named(self._names, known), _pointers(self._names, known)
        self._masks = {local.packed: _mask(local) for local in known if len(local.packed) == 4}
        return self._tables != before

    def addresses(self, name: bytes) -> dict[int, tuple[bytes, ...]] | None:
        """Return the addresses of a name, by their octets (4 or 16); None for a name without an interface."""
        return self._tables[0].get(name)

    def pointer(self, address: bytes) -> bytes | None:
        """Return the name of an address of an interface."""
        return self._tables[1].get(address)

    def selects(self, asked: bytes) -> bool:
        """Return whether responses to queries for this address of this host depend on it; b"" if it is not known."""
        return self._localises and asked in self._masks

    def near(self, addresses: tuple[bytes, ...], asked: bytes) -> tuple[bytes, ...]:
        """Return those IPv4 addresses that are in the network of the address that was asked, or all if none is.

        The network is that of the interface with this address, which may not be the one on which the query arrived.
        """
        mask = self._masks.get(asked, 0)
        network = int.from_bytes(asked, "big") & mask
        return tuple(each for each in addresses if int.from_bytes(each, "big") & mask == network) or addresses


def _mask(local: Local) -> int:
    return int(local.network.netmask)


def _named(names: tuple[InterfaceName, ...], known: list[Local]) -> Addresses:
    """Return the addresses of each name, in dnsmasq's order: that of the options, an interface's newest first."""
    tables: dict[bytes, dict[int, dict[bytes, None]]] = {}
    for each in names:
        table = tables.setdefault(each.name, {4: {}, 16: {}})
        for local in reversed(known):
            address = _address(each, local)
            if address and local.is_preferred:
                table[len(address)].setdefault(address)
    return {
        name: {size: tuple(islice(addresses, MAX_ADDRESSES)) for size, addresses in table.items()}
        for name, table in tables.items()
    }


def _pointers(names: tuple[InterfaceName, ...], known: list[Local]) -> dict[bytes, bytes]:
    """Return the first name of each address, also of those that are not given for the name: temporary, deprecated."""
    found: dict[bytes, bytes] = {}
    for each in names:
        for local in known:
            if address := _address(each, local):
                found.setdefault(address, each.name)
    return found


def _address(name: InterfaceName, local: Local) -> bytes | None:
    """Return the address that an interface's address gives a name."""
    if name.interface != local.label:
        return None
    host = name.ipv4 if len(local.packed) == 4 else name.ipv6
    if not host:
        return None if host is None else local.packed
    mask = _mask(local)
    joined = int.from_bytes(local.packed, "big") & mask | int.from_bytes(pack_address(host), "big") & ~mask
    return joined.to_bytes(len(local.packed), "big")
