"""Which socket of a namespace gets a request, and what the nearest one lacks.

A tenant may have thousands of sockets on a port, and a client may ask from thousands of addresses: sockets are found by
what they are bound to, not one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from udpwatch.agent.kernel.packet_tap import Conversation
from udpwatch.agent.model import UdpSocket
from udpwatch.agent.servers.port.facts import SocketFacts, is_wildcard, plain

_ANY = ""  # address, device


class Mismatch(StrEnum):
    """Why the kernel does not deliver a request to a socket with the right port."""

    ADDRESS = "address"
    FAMILY = "family"
    ONLY_IPV6 = "only-ipv6"
    DEVICE = "device"
    PEER = "peer"


class Sockets:
    """The sockets of a port in one namespace."""

    def __init__(
        self, sockets: Iterable[SocketFacts], vrfs: Mapping[str, str] | None = None, is_vrf_shared: bool = False
    ) -> None:
        """``vrfs``: device -> VRF. ``is_vrf_shared``: sockets without a device get the requests of VRFs, too."""
        self._vrfs, self._is_vrf_shared = vrfs or {}, is_vrf_shared
        self._free: set[tuple[int, str, str]] = set()  # family, address, device: not connected
        self._peers: set[tuple[int, str, str, str, int]] = set()  # and their peers
        self._connected: set[tuple[int, str, str]] = set()
        self._places: set[tuple[int, str]] = set()  # family, address
        self._families: set[int] = set()
        self._has_only_ipv6 = False
        for each in sockets:
            self._add(each)

    def _add(self, each: SocketFacts) -> None:
        sock = each.socket
        self._has_only_ipv6 = self._has_only_ipv6 or (sock.family == 6 and sock.only_ipv6)
        address = _ANY if is_wildcard(sock) else plain(sock.address)
        for family in (4, 6):
            if family_mismatch(sock, family):
                continue
            self._families.add(family)
            self._places.add((family, address))
            if sock.peer:
                self._connected.add((family, address, each.device))
                self._peers.add((family, address, each.device, plain(sock.peer), sock.peer_port))
            else:
                self._free.add((family, address, each.device))

    def mismatch(self, request: Conversation) -> Mismatch | None:
        """Return what the socket lacks that comes closest to a request; None: one gets it."""
        family = 6 if ":" in request.address else 4
        places = [(family, address) for address in (plain(request.address), _ANY)]
        ends = [(*place, device) for place in places for device in self._devices(request.device)]
        peer = plain(request.peer), request.peer_port
        if any(end in self._free or (*end, *peer) in self._peers for end in ends):
            return None
        if any(end in self._connected for end in ends):
            return Mismatch.PEER
        if any(place in self._places for place in places):
            return Mismatch.DEVICE
        if family in self._families:
            return Mismatch.ADDRESS
        return Mismatch.ONLY_IPV6 if family == 4 and self._has_only_ipv6 else Mismatch.FAMILY

    def _devices(self, device: str) -> tuple[str, ...]:
        """Return what a socket may be bound to that gets the requests of a device."""
        vrf = self._vrfs.get(device)
        if vrf is None:
            return device, _ANY
        return (device, vrf, _ANY) if self._is_vrf_shared else (device, vrf)


def family_mismatch(sock: UdpSocket, family: int) -> Mismatch | None:
    """Return why a socket does not serve a family."""
    if family == 6:
        return None if sock.family == 6 and not sock.address.startswith("::ffff:") else Mismatch.FAMILY
    if sock.family == 4:
        return None
    if sock.only_ipv6:
        return Mismatch.ONLY_IPV6
    return None if sock.address == "::" or sock.address.startswith("::ffff:") else Mismatch.FAMILY
