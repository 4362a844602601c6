"""Which names are not forwarded, and which responses are rejected."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from udpwatch.dns.alias import rewritten
from udpwatch.dns.message import Response, Type
from udpwatch.dns.names import Network, address_of, is_single_label, is_subdomain, suffixes
from udpwatch.dns.networks import network_set
from udpwatch.dns.settings import Settings

#: RFC 6303, sections 4.2 to 4.6, and RFC 6890: networks whose reverse names no public server knows
PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
        *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "255.255.255.255/32"),
        *("::/128", "::1/128", "fc00::/7", "fe80::/10", "2001:db8::/32"),
    )
)
_ADDRESSES = {b"\0\1\0\4": 4, b"\0\x1c\0\x10": 16}  # type and length of A and AAAA records: octets
_REVERSE_LABELS = 6, 34  # of an address in in-addr.arpa and in ip6.arpa
#: This host, by any name; block lists use 0.0.0.0.
LOOPBACK = tuple(ipaddress.ip_network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "::/128", "::1/128"))


def contains(networks: Iterable[Network], packed: bytes) -> bool:
    """Return whether an address (4 or 16 octets) is in one of the networks. IPv4-mapped addresses count as IPv4."""
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return any(mapped in network for network in networks if network.version == mapped.version)


def has_address_in(networks: Iterable[Network], answer: Response) -> bool:
    """Return whether a response has an address in one of the networks."""
    wanted = network_set(tuple(networks))
    return any(packed in wanted for packed in _addresses(answer))


def _addresses(answer: Response) -> Iterator[bytes]:
    """Yield the addresses in the answer section; written for thousands of them."""
    message = answer.message
    for _, owner_end, size, count in answer.records.runs(1):
        length = _ADDRESSES.get(message[owner_end : owner_end + 2] + message[owner_end + 8 : owner_end + 10])
        if length:
            first = owner_end + 10
            yield from [message[at : at + length] for at in range(first, first + count * size, size)]


def never_forwarded(settings: Settings, name: bytes, kind: int, has_servers: bool = False) -> bool:
    """Return whether a query without a local answer gets NXDOMAIN: `--domain-needed`, `--bogus-priv`.

    ``has_servers``: its domain has servers of its own, which may know private addresses.
    """
    if settings.domain_needed and kind in (Type.A, Type.AAAA) and is_single_label(name):
        return True
    if settings.bogus_priv and not has_servers and name.endswith(b"\x04arpa\x00"):
        # Labels in front of an address are below it: DNS service discovery asks b._dns-sd._udp.0.1.168.192....
        parts = tuple(suffixes(name))
        for labels in _REVERSE_LABELS:
            address = address_of(parts[-1 - labels]) if len(parts) > labels else None
            if address is not None and contains(PRIVATE, address):
                return True
    return False


def is_windows_query(settings: Settings, name: bytes, kind: int) -> bool:
    """Return whether a query without a local answer gets NODATA (`--filterwin2k`): old versions of Windows ask public
    servers for their domain controllers."""
    return settings.filter_windows and (kind in (Type.SOA, Type.SRV) or (kind == Type.ANY and b"_" in name))


def rebinds(settings: Settings, answer: Response) -> bool:
    """Return whether a response maps a name to a private address (`--stop-dns-rebind`), after `--alias`."""
    if not settings.stop_dns_rebind or any(is_subdomain(answer.name, domain) for domain in settings.rebind_domains_ok):
        return False
    private, loopback = network_set(PRIVATE), network_set(LOOPBACK if settings.rebind_localhost_ok else ())
    return any(
        packed in private and packed not in loopback for packed in _addresses(rewritten(settings.aliases, answer))
    )
