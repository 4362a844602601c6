"""What may be asked, by whom, and which answers are not believed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from udpwatch.dns.message import Response, Type
from udpwatch.dns.names import Network, address_of, is_single_label, is_subdomain, suffixes
from udpwatch.dns.settings import Settings

#: RFC 6303, sections 4.2 to 4.6, and what RFC 6890 adds: reverse look-ups that no public server knows
PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
        *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "255.255.255.255/32"),
        *("::/128", "::1/128", "fc00::/7", "fe80::/10", "2001:db8::/32"),
    )
)
_ADDRESSES = {(Type.A, 4), (Type.AAAA, 16)}  # type, octets
_REVERSE_LABELS = 6, 34  # of a whole address in in-addr.arpa, and in ip6.arpa
#: what leads to this host, whatever its name: with 0.0.0.0 lists of blocked domains are made
LOOPBACK = tuple(ipaddress.ip_network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "::/128", "::1/128"))


def contains(networks: Iterable[Network], packed: bytes) -> bool:
    """Whether an address of 4 or 16 octets is in one of the networks; IPv4-mapped ones count as IPv4."""
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return any(mapped in network for network in networks if network.version == mapped.version)


def never_forwarded(settings: Settings, name: bytes, kind: int, has_servers: bool = False) -> bool:
    """Whether a question that nobody here can answer ends here, with NXDOMAIN: `--domain-needed`, `--bogus-priv`.

    ``has_servers``: of its domain's own, who may know private addresses.
    """
    if settings.domain_needed and kind in (Type.A, Type.AAAA) and is_single_label(name):
        return True
    if settings.bogus_priv and not has_servers and name.endswith(b"\x04arpa\x00"):
        # What stands in front of an address is below it: DNS service discovery asks b._dns-sd._udp.0.1.168.192....
        parts = tuple(suffixes(name))
        for labels in _REVERSE_LABELS:
            address = address_of(parts[-1 - labels]) if len(parts) > labels else None
            if address is not None and contains(PRIVATE, address):
                return True
    return False


def rebinds(settings: Settings, answer: Response) -> bool:
    """Whether an upstream server says that a name is at a private address (`--stop-dns-rebind`)."""
    if not settings.stop_dns_rebind or any(is_subdomain(answer.name, domain) for domain in settings.rebind_domains_ok):
        return False
    for record in answer.records.of(1):
        if (record.type, record.end - record.data) not in _ADDRESSES:
            continue
        packed = answer.message[record.data : record.end]
        if contains(PRIVATE, packed) and not (settings.rebind_localhost_ok and contains(LOOPBACK, packed)):
            return True
    return False
