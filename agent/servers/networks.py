"""Which addresses of a network namespace can be asked, by which peers, and from which source a reply to them leaves.

Rules
1. The kernel is asked for each source (RTM_GETROUTE): rules, tables, metrics and address selection are its own.
2. The peers are the networks of its routing tables, each by a sample: the next hop is the same for all of them.
3. Everything is bounded, because a tenant configures its own namespace. What is beyond a limit makes `complete` False.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from udpwatch.agent.kernel.interfaces import Link, LinkAddress, addresses, links
from udpwatch.agent.kernel.routes import Entry, Lookup, entries

MAX_LINKS = 4_096
MAX_ADDRESSES = 512
MAX_ROUTES = 4_096  # of each family
MAX_PEERS = 64  # of each family and device
MAX_DEVICES = 8  # that sockets are bound to
MAX_LOCAL = 64  # networks that a route makes local (AnyIP)
_SAMPLES = 8  # of a group of peers whose sources may differ
_LINK_SCOPE, _HOST_SCOPE = 253, 254  # RT_SCOPE_*
_KEEPALIVED = 18  # RTPROT_KEEPALIVED, as the protocol of an address
#: kube-proxy's dummy interface: IPVS, not a server of this host, serves the addresses of Services
_SERVICES = "kube-ipvs0"
_PRIVATE = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)

_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressKind(StrEnum):
    """What an address is for."""

    HOST = "host"  # only clients on this host can ask it
    LINK = "link"  # link-local: only peers on the same link can
    ADDRESS = "address"
    VIRTUAL = "virtual"  # added beside the interface's own address: a VIP
    BRIDGE = "bridge"  # of a bridge whose ports are containers or virtual machines


class PeerKind(StrEnum):
    """Where peers are."""

    CONTAINERS = "containers"  # containers or virtual machines of this host
    ATTACHED = "attached"
    ROUTED = "routed"
    DEFAULT = "default"  # all others


@dataclass(frozen=True, slots=True)
class Address:
    """An address at which a wildcard socket can be asked."""

    address: str
    family: int  # 4 or 6
    interface: str
    index: int
    kind: AddressKind
    vrf: int  # index of the VRF of its interface, 0: none
    is_private: bool
    host_source: str  # the source of a reply to a client on this host that asked here; "": unknown


@dataclass(frozen=True, slots=True)
class Peers:
    """A group of peers that one route leads to."""

    family: int  # 4 or 6
    network: str  # for example "172.17.0.0/16"; "default"
    more: int  # further networks with the same route
    kind: PeerKind
    interface: str
    index: int
    device: int  # for sockets bound to this interface; 0: for the others
    is_link_local: bool
    sources: tuple[str, ...]  # of replies to them


@dataclass(frozen=True, slots=True)
class Networks:
    """The addresses and peers of one namespace."""

    addresses: tuple[Address, ...]
    peers: tuple[Peers, ...]
    vrfs: frozenset[int]  # interface indices
    devices: frozenset[int]  # for which `peers` is complete; always contains 0
    ports: tuple[int, int]  # that the kernel gives to sockets that choose none (ip_local_port_range)
    complete: bool  # nothing was beyond a limit


def read_networks(devices: Collection[int] = ()) -> Networks:
    """Read the namespace of the calling thread. ``devices``: to which sockets are bound. Raises OSError."""
    found_links, found = links(MAX_LINKS), addresses(MAX_ADDRESSES)
    wanted = (0, *sorted(set(devices) - {0})[: MAX_DEVICES - 1])
    routes = {family: entries(family, MAX_ROUTES) for family in (4, 6)}
    reader = _Reader({link.index: link for link in found_links}, found, routes)
    with Lookup() as lookup:
        usable = tuple(reader.addresses(lookup))
        groups = {(family, device): reader.groups(family, device) for family in (4, 6) for device in wanted}
        peers = [
            each
            for (family, device), group in groups.items()
            for each in reader.peers(lookup, group[:MAX_PEERS], family, device)
        ]
    return Networks(
        usable,
        tuple(dict.fromkeys(peers)),
        frozenset(link.index for link in found_links if link.kind == "vrf"),
        frozenset(wanted),
        _local_ports(),
        len(found_links) < MAX_LINKS
        and len(found) < MAX_ADDRESSES
        and all(len(each) < MAX_ROUTES for each in routes.values())
        and all(len(group) <= MAX_PEERS for group in groups.values())
        and len(reader.local) <= MAX_LOCAL
        and len(wanted) == len({0, *devices}),
    )


def is_private(address: str) -> bool:
    """Return whether an address is of a private network (RFC 1918, RFC 6598, RFC 4193)."""
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in _PRIVATE)


@dataclass(frozen=True, slots=True)
class _Group:
    """Routes with the same next hop."""

    entry: Entry  # the first of them
    kind: PeerKind
    count: int


class _Reader:
    """The tables of one namespace."""

    def __init__(self, links: dict[int, Link], found: list[LinkAddress], routes: dict[int, list[Entry]]) -> None:
        self._links, self._found = links, found
        self._routes = {family: [entry for entry in table if not entry.is_local] for family, table in routes.items()}
        self.local = [entry for table in routes.values() for entry in table if entry.is_local]
        self._own = {each.address for each in found}
        self._prefixes: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for family, table in routes.items():
            for entry in table:
                shifted = int(entry.network.network_address) >> (entry.network.max_prefixlen - entry.network.prefixlen)
                self._prefixes[family].setdefault(entry.network.prefixlen, set()).add(shifted)
        uplinks = {entry.index for table in self._routes.values() for entry in table if not entry.network.prefixlen}
        ports = {link.master for link in links.values() if link.kind not in ("veth", "tun")}
        self._bridges = {
            link.index
            for link in links.values()
            if link.kind == "bridge" and link.index not in ports and link.index not in uplinks
        }
        self._uplinks = uplinks
        self._numbered = {each.index for each in found if each.family == 6 and each.scope < _LINK_SCOPE}

    def addresses(self, lookup: Lookup) -> Iterator[Address]:
        """Yield the addresses that can be asked."""
        for each in self._found:
            link = self._links.get(each.index)
            # Clients do not learn temporary addresses: no name leads to them.
            if not link or not link.is_up or not each.is_usable or each.is_temporary or link.name == _SERVICES:
                continue
            yield Address(
                each.address,
                each.family,
                link.name,
                link.index,
                self._address_kind(each, link),
                self._vrf_of(link),
                is_private(each.address),
                _host_source(lookup, each.address, each.index),
            )
        for entry in self.local[:MAX_LOCAL]:
            yield from self._any_ip(lookup, entry)

    def _any_ip(self, lookup: Lookup, entry: Entry) -> Iterator[Address]:
        """Yield an address of a network that a route makes local: it stands for all of them."""
        link = self._links.get(entry.index)
        sample = next(self._hosts(entry, 1), None)
        if sample is None or not link or not link.is_up or link.name == _SERVICES or entry.network.is_multicast:
            return
        path = lookup.path(sample)
        if path and path.is_local:  # else only marked packets get there, as those of transparent proxies do
            source = _host_source(lookup, sample, entry.index)
            family = entry.network.version
            yield Address(
                *(sample, family, link.name, link.index, AddressKind.VIRTUAL),
                vrf=self._vrf_of(link),
                is_private=is_private(sample),
                host_source=source,
            )

    def groups(self, family: int, device: int) -> list[_Group]:
        """Return the groups of peers, those with the default route and the attached ones first."""
        is_vrf = device in self._links and self._links[device].kind == "vrf"
        found: dict[tuple[object, ...], _Group] = {}
        for entry in self._routes[family]:
            if entry.network.is_multicast or entry.network.is_loopback:
                continue
            link = self._links.get(entry.index)
            # What a VRF's table has no route for is looked up in the main table, unless it ends with "unreachable".
            in_vrf = is_vrf and (not entry.network.prefixlen or (link is not None and link.master == device))
            if device and entry.index not in (0, device) and not in_vrf:
                continue
            if not device and link and self._vrf_of(link):
                continue  # its peers do not reach a socket that is not bound to the VRF
            kind = self._peer_kind(entry, link)
            # Container links have several link-local addresses, but no container asks them.
            if entry.network.is_link_local and (kind is PeerKind.CONTAINERS or entry.index not in self._numbered):
                continue
            if not entry.network.prefixlen:
                key: tuple[object, ...] = ("default",)
            elif kind is PeerKind.CONTAINERS and entry.network.prefixlen == entry.network.max_prefixlen:
                key = ("containers", entry.preferred)
            elif entry.gateway:
                key = (entry.index, entry.preferred)
            else:
                key = (entry.index, entry.network)
            known = found.get(key)
            several = max(known.entry, entry, key=lambda each: each.paths) if known else entry
            found[key] = _Group(several, kind, known.count + 1 if known else 1)
        order = (PeerKind.DEFAULT, PeerKind.CONTAINERS, PeerKind.ATTACHED, PeerKind.ROUTED)
        return sorted(found.values(), key=lambda group: order.index(group.kind))

    def peers(self, lookup: Lookup, groups: Iterable[_Group], family: int, device: int) -> Iterator[Peers]:
        """Yield the groups of peers with the sources of replies to them."""
        for group in groups:
            network = group.entry.network
            out = device or (group.entry.index if network.is_link_local else 0)
            paths = [lookup.path(sample, out) for sample in self._samples(group.entry)]
            used = [path for path in paths if path and path.is_unicast and path.source]
            if not used:
                continue
            index = group.entry.index or used[0].index
            if all(path.index == used[0].index for path in used):
                index = used[0].index
            link = self._links.get(index)
            yield Peers(
                family,
                str(network) if network.prefixlen else "default",
                group.count - 1 if network.prefixlen else 0,
                group.kind,
                link.name if link else "",
                index,
                device,
                network.is_link_local,
                tuple(sorted({path.source for path in used})),
            )

    def _vrf_of(self, link: Link) -> int:
        if link.kind == "vrf":
            return link.index
        master = self._links.get(link.master)
        return link.master if master and master.kind == "vrf" else 0

    def _address_kind(self, each: LinkAddress, link: Link) -> AddressKind:
        parsed = ipaddress.ip_address(each.address)
        if parsed.is_loopback:
            return AddressKind.HOST
        if parsed.is_link_local and link.kind != "dummy" and not link.is_loopback:
            return AddressKind.LINK
        if link.is_loopback or link.kind == "dummy" or each.is_secondary or each.protocol == _KEEPALIVED:
            return AddressKind.VIRTUAL
        is_single = each.prefix == parsed.max_prefixlen and each.is_permanent
        if is_single and (link.kind == "macvlan" or self._has_network(each)):
            return AddressKind.VIRTUAL
        return AddressKind.BRIDGE if link.index in self._bridges else AddressKind.ADDRESS

    def _has_network(self, each: LinkAddress) -> bool:
        """Return whether the interface also has an address with a network."""
        return any(
            other.index == each.index
            and other.family == each.family
            and other.scope < _LINK_SCOPE
            and other.prefix < each.prefix
            for other in self._found
        )

    def _peer_kind(self, entry: Entry, link: Link | None) -> PeerKind:
        if not entry.network.prefixlen:
            return PeerKind.DEFAULT
        if link and not entry.gateway and link.index not in self._uplinks:
            is_host = entry.network.prefixlen == entry.network.max_prefixlen
            if link.index in self._bridges or (is_host and link.kind in ("veth", "tun")):
                return PeerKind.CONTAINERS
        return PeerKind.ROUTED if entry.gateway else PeerKind.ATTACHED

    def _samples(self, entry: Entry) -> list[str]:
        """Return some peers of a network. One is enough unless there are several next hops.

        IPv6 selects the source that has most bits in common with the peer, so peers near each own address are added.
        """
        network, most = entry.network, 1 if entry.paths == 1 else _SAMPLES
        if network.prefixlen:
            picked = list(self._hosts(entry, most))
        elif network.version == 4:
            picked = [f"198.51.{100 + number}.{number + 1}" for number in range(most)]
        else:
            picked = [f"2001:db8:{number + 1:x}::1" for number in range(most)]
        if network.version == 6 and not network.is_link_local:
            picked += self._near(entry)
        return [each for each in dict.fromkeys(picked) if self._longest(each) == network.prefixlen] or picked[:1]

    def _hosts(self, entry: Entry, most: int) -> Iterator[str]:
        network, count = entry.network, 0
        first, last = int(network.network_address), int(network.broadcast_address)
        tail = range(last - 1, max(first, last - 4 * _SAMPLES), -1)
        for number in (*range(first + 2, min(first + 4 * _SAMPLES, last)), *tail, first + 1, last, first):
            address = str(network.network_address + (number - first)) if first <= number <= last else ""
            if address and address not in self._own and self._longest(address) == network.prefixlen:
                yield address
                count += 1
                if count == most:
                    return

    def _near(self, entry: Entry) -> list[str]:
        """Return peers that have most bits in common with each own address, as far as the network allows."""
        near: list[str] = []
        for own in self._found:
            parsed = ipaddress.ip_address(own.address)
            if parsed.version != 6 or parsed.is_link_local or parsed.is_loopback or len(near) >= _SAMPLES:
                continue
            if entry.network.prefixlen == 0:
                # Another network of the same site: the first 48 bits are equal.
                near.append(str(ipaddress.IPv6Address((int(parsed) >> 80 << 80) | 0xFFFE << 64 | 1)))
            elif parsed in entry.network:
                near.append(str(ipaddress.IPv6Address(int(parsed) ^ 1 << 2)))
        return [each for each in near if each not in self._own]

    def _longest(self, address: str) -> int:
        """Return the length of the longest prefix in the tables that contains the address."""
        parsed = ipaddress.ip_address(address)
        value, bits = int(parsed), parsed.max_prefixlen
        table = self._prefixes[parsed.version]
        return max((length for length, known in table.items() if value >> (bits - length) in known), default=-1)


def _host_source(lookup: Lookup, address: str, index: int) -> str:
    """Return the source of a reply to a client on this host: the address that routing gives to that client."""
    out = index if ipaddress.ip_address(address).is_link_local else 0
    client = lookup.path(address, out)
    if not client or not client.source:
        return ""
    reply = lookup.path(client.source, out)
    return reply.source if reply else ""


def _local_ports() -> tuple[int, int]:
    """Return the first and last port of the range, of the namespace of the calling thread."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return 32_768, 60_999
    return first, last
