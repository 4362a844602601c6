"""Count each client's use of a shared resource, so that the client with the most gives way. No sockets, no clock.

Rules
1. A client is an address. An IPv6 client counts first as its /64, and as its address among those of the same /64: a
   host may choose its address within a /64 freely, and the pods of a node often share one /64.
2. Every step takes constant time, however many clients there are: their addresses may be forged.
3. Of clients with equal counts, the one that has had its count longest is the greediest: a flood of forged addresses
   with one item each then evicts its own oldest items.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

LINK_LOCAL = b"\xfe\x80"  # the first octets of fe80::/64, the part of fe80::/10 in use (RFC 4291, section 2.5.6)
NETWORK_BYTES = 8

Client = bytes  # 4 or 16 octets
_Name = TypeVar("_Name", bound=Hashable)
_Item = TypeVar("_Item", bound=Hashable)


def network_of(client: Client) -> bytes:
    """Return what a client counts as first: the /64 of an IPv6 address; an IPv4 or link-local address itself."""
    return client if len(client) == 4 or client.startswith(LINK_LOCAL) else client[:NETWORK_BYTES]


class Counts(Generic[_Name]):
    """The count of each name, and which name has the highest."""

    __slots__ = ("_by_count", "_counts", "_most")

    def __init__(self) -> None:
        self._counts: dict[_Name, int] = {}
        self._by_count: dict[int, OrderedDict[_Name, None]] = {}
        self._most = 0

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, name: _Name) -> int:
        return self._counts.get(name, 0)

    def greediest(self) -> _Name:
        """Return the name with the highest count; of several, the one that has had it longest."""
        return next(iter(self._by_count[self._most]))

    def add(self, name: _Name, change: int) -> None:
        """Add 1 or -1."""
        before = self._counts.get(name, 0)
        after = before + change
        if before:
            group = self._by_count[before]
            del group[name]
            if not group:
                del self._by_count[before]
        if after:
            self._counts[name] = after
            self._by_count.setdefault(after, OrderedDict())[name] = None
        else:
            del self._counts[name]
        if after > self._most or self._most not in self._by_count:  # the only name that had the most has one less
            self._most = after


class Shares(Generic[_Item]):
    """The items of each client, oldest first."""

    def __init__(self) -> None:
        self._networks: Counts[bytes] = Counts()
        self._clients: dict[bytes, Counts[Client]] = {}
        self._items: dict[Client, OrderedDict[_Item, None]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, client: Client, item: _Item) -> None:
        """Add an item of a client."""
        network = network_of(client)
        self._networks.add(network, 1)
        self._clients.setdefault(network, Counts()).add(client, 1)
        self._items.setdefault(client, OrderedDict())[item] = None
        self._size += 1

    def remove(self, client: Client, item: _Item) -> None:
        """Remove an item of a client."""
        network = network_of(client)
        self._networks.add(network, -1)
        clients = self._clients[network]
        clients.add(client, -1)
        if not clients:
            del self._clients[network]
        items = self._items[client]
        del items[item]
        if not items:
            del self._items[client]
        self._size -= 1

    def to_give_way(self, client: Client) -> tuple[_Item, bool]:
        """Return the item that gives way to a new one of this client, and whether its owner has more.

        The new item counts for the client; without more, both have an equal claim. There must be an item.
        """
        network = network_of(client)
        greediest = self._networks.greediest()
        mine, most = self._networks[network] + 1, self._networks[greediest]
        if network == greediest or mine > most:  # a client of the same network gives way
            clients = self._clients[network]
            owner = clients.greediest()
            return self._oldest(owner), clients[owner] > clients[client] + 1
        return self._oldest(self._clients[greediest].greediest()), most > mine

    def _oldest(self, client: Client) -> _Item:
        return next(iter(self._items[client]))


class Turns(Generic[_Item]):
    """Items that wait. Clients take turns, however many items each of them has."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, OrderedDict[_Item, None]] = OrderedDict()  # by network, the next one first
        self._counts: Counts[bytes] = Counts()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def of(self, client: Client) -> int:
        """Return how many items of a client's network wait."""
        return self._counts[network_of(client)]

    def add(self, client: Client, item: _Item) -> None:
        """Add an item of a client."""
        network = network_of(client)
        self._waiting.setdefault(network, OrderedDict())[item] = None
        self._counts.add(network, 1)
        self._size += 1

    def remove(self, client: Client, item: _Item) -> None:
        """Remove an item."""
        self._remove(network_of(client), item)

    def networks(self) -> Iterable[bytes]:
        """Return the clients that wait, as `network_of` names them, in the order of their turns."""
        return self._waiting.keys()

    def take(self) -> _Item:
        """Remove and return the oldest item of the client whose turn it is."""
        return self.take_from(next(iter(self._waiting)))

    def take_from(self, network: bytes) -> _Item:
        """Remove and return the oldest item of a client, which goes to the end of the line."""
        self._waiting.move_to_end(network)
        return self._take(network)

    def take_from_greediest(self) -> _Item:
        """Remove and return the oldest item of the client with the most."""
        return self._take(self._counts.greediest())

    def _take(self, network: bytes) -> _Item:
        item = next(iter(self._waiting[network]))
        self._remove(network, item)
        return item

    def _remove(self, network: bytes, item: _Item) -> None:
        items = self._waiting[network]
        del items[item]
        if not items:
            del self._waiting[network]
        self._counts.add(network, -1)
        self._size -= 1


class LazyShares(Generic[_Item]):
    """As `Shares`, but counts clients only from ``threshold`` items on: as long as few wait, nothing is counted."""

    __slots__ = ("_items", "_shares", "_threshold")

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._items: dict[_Item, Client] = {}  # oldest first
        self._shares: Shares[_Item] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, client: Client, item: _Item) -> None:
        """Add an item of a client."""
        self._items[item] = client
        if self._shares is not None:
            self._shares.add(client, item)
        elif len(self._items) >= self._threshold:
            self._count()

    def remove(self, client: Client, item: _Item) -> None:
        """Remove an item of a client."""
        del self._items[item]
        if self._shares is not None:
            self._shares.remove(client, item)
            if len(self._items) < self._threshold // 2:  # so that counting again is rare
                self._shares = None

    def to_give_way(self, client: Client) -> tuple[_Item, bool]:
        """See `Shares.to_give_way`."""
        return (self._shares or self._count()).to_give_way(client)

    def _count(self) -> Shares[_Item]:
        self._shares = shares = Shares[_Item]()
        for item, client in self._items.items():
            shares.add(client, item)
        return shares
