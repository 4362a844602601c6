"""Sets of networks, to look addresses up in."""

from __future__ import annotations

import functools
import ipaddress
from bisect import bisect_right
from collections.abc import Iterable

from udpwatch.dns.names import Network


class NetworkSet:
    """Networks of both families. An IPv4-mapped address (::ffff:192.0.2.1) is in the IPv4 networks, too."""

    def __init__(self, networks: Iterable[Network]) -> None:
        given = list(networks)
        v4 = [each for each in given if isinstance(each, ipaddress.IPv4Network)]
        v6 = [each for each in given if isinstance(each, ipaddress.IPv6Network)]
        v6 += [ipaddress.IPv6Network((b"\0" * 10 + b"\xff\xff" + each[0].packed, 96 + each.prefixlen)) for each in v4]
        #: octets of an address -> first address, end, first address, end, ...
        self._bounds = {
            4: [bound for each in ipaddress.collapse_addresses(v4) for bound in _bounds(each)],
            16: [bound for each in ipaddress.collapse_addresses(v6) for bound in _bounds(each)],
        }

    def __contains__(self, packed: bytes) -> bool:
        """Whether an address (4 or 16 octets) is in one of the networks."""
        return bool(bisect_right(self._bounds[len(packed)], packed) & 1)


def _bounds(network: Network) -> tuple[bytes, bytes]:
    return network[0].packed, network[-1].packed + b"\0"  # the least octets above the last address


@functools.lru_cache(maxsize=16)
def network_set(networks: tuple[Network, ...]) -> NetworkSet:
    """Return the set of these networks, the same one each time."""
    return NetworkSet(networks)
