"""Which queries are served: by the client's network, and by the interface on which they arrive.

A listening address does not keep packets out: Linux accepts a packet for any of its addresses on any interface. So
when interfaces are configured, the ingress interface decides, whatever address was asked (CVE-2012-3411).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from udpwatch.dns.addresses import Local
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.names import Network, pack_address, unpack_address
from udpwatch.dns.policy import contains
from udpwatch.dns.settings import Settings

LOOPBACK = "lo"
_LOOPBACK_INDEX = 1  # LOOPBACK_IFINDEX, in every network namespace

log = logging.getLogger(__name__)


class Admission:
    """Decides which queries are served. Any thread may ask."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.by_interface = bool(settings.interfaces or settings.except_interfaces)
        self.addresses = {pack_address(text) for text in settings.listen_addresses}
        #: lengths of the addresses of families with --listen-address=0.0.0.0 or ::
        self._every = {len(packed) for packed in self.addresses if not any(packed)}
        self._served: frozenset[bytes] = frozenset()  # this host's addresses on interfaces that are served
        self._networks: list[Network] = []
        self._interfaces: dict[int, bool] = {}  # by index: whether queries that arrive there are served

    def update(self, locals_: Sequence[Local]) -> None:
        """Take this host's addresses after they or interfaces have changed."""
        self._interfaces = {}
        self._networks = sorted({local.network for local in locals_}, key=str)
        self._served = frozenset(local.packed for local in locals_ if self.serves_interface(local.interface))

    def admits_client(self, address: bytes) -> bool:
        """Return whether a client (4 or 16 octets) is served: any, or with --local-service those of connected
        networks."""
        if not self._settings.local_service or contains(self._networks, address):
            return True
        LIMITED.write(
            log,
            logging.WARNING,
            "dns: ignoring query from non-local network %s; "
            "to serve other networks, set --listen-address or --interface",
            unpack_address(address),
        )
        return False

    def admits_ingress(self, index: int, destination: bytes) -> bool:
        """Return whether a query is served that arrived on interface ``index`` for this address (4 or 16 octets).

        dnsmasq's rule: queries to a --listen-address, on a configured interface, or from this host to an address of
        one.
        """
        if not self.by_interface or destination in self.addresses or len(destination) in self._every:
            return True
        if index == _LOOPBACK_INDEX and destination in self._served:  # this host asks an address of a served interface
            return True
        interfaces = self._interfaces
        if (served := interfaces.get(index)) is not None:
            return served
        try:
            name = socket.if_indextoname(index)
        except OSError:  # the interface has disappeared; or no descriptor is free, so that this cannot be remembered
            return False
        served = interfaces[index] = self.serves_interface(name)
        if not served:  # once per interface: the result is remembered
            LIMITED.write(
                log,
                logging.WARNING,
                "dns: ignoring query on interface %s, which is not configured; "
                "to serve an address on every interface, set --listen-address",
                name,
            )
        return served

    def serves_interface(self, name: str) -> bool:
        """Return whether an interface is configured. As in dnsmasq, --interface always includes loopback."""
        settings = self._settings
        if matches(name, settings.except_interfaces):
            return False
        if not settings.interfaces:
            return not settings.listen_addresses
        return name == LOOPBACK or matches(name, settings.interfaces)


def matches(interface: str, patterns: Iterable[str]) -> bool:
    """Return whether an interface has one of these names."""
    return any(fnmatchcase(interface, pattern) for pattern in patterns)
