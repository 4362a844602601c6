"""Addresses of this host, as `addresses.snapshot` returns them."""

from __future__ import annotations

import ipaddress

from udpwatch.dns.addresses import Local


def local(address: str, interface: str = "eth0", index: int = 2) -> Local:
    """An address of this host, from ADDRESS/PREFIX."""
    found = ipaddress.ip_interface(address)
    return Local(found.packed, found.network, index, interface, usable=True, label=interface, is_preferred=True)
