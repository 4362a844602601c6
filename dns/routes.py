"""Which upstream servers are queried for which name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from udpwatch.dns.names import is_single_label, suffixes
from udpwatch.dns.settings import DomainServers, Server, Settings


@dataclass(slots=True)
class Routes:
    """The servers of each domain; replaced whole when they change."""

    default: tuple[Server, ...] = ()
    domains: tuple[DomainServers, ...] = ()
    by_domain: dict[bytes, DomainServers] = field(init=False)

    def __post_init__(self) -> None:
        self.by_domain = {each.domain: each for each in self.domains}

    def for_name(self, name: bytes) -> tuple[Server, ...] | None:
        """Return the servers of the most specific domain; () if the name is local only; None if there are no
        servers."""
        found = self.domain_of(name)
        if found and found.standard and is_single_label(name):  # "#" for such a name means the servers of "//"
            found = self.by_domain.get(b"", found)
        return found.servers if found and not found.standard else self.default or None

    def domain_of(self, name: bytes) -> DomainServers | None:
        """Return the most specific configured domain of a name."""
        if not self.by_domain:
            return None
        for domain in suffixes(name):
            if (found := self.by_domain.get(domain)) is not None:
                return found
        return self.by_domain.get(b"") if name[0] and is_single_label(name) else None


def build_routes(
    settings: Settings,
    from_resolv: tuple[Server, ...],
    usable: Callable[[tuple[Server, ...]], tuple[Server, ...]],
) -> Routes:
    """Combine the configured servers with those of resolv.conf; ``usable`` removes those that cannot be queried."""
    default = usable(tuple(dict.fromkeys((*settings.servers, *from_resolv))))
    domains = []
    for domain in settings.domain_servers:
        if not domain.servers:  # the most of a long list; the object stays the same
            domains.append(domain)
            continue
        servers = usable(domain.servers)
        if servers:  # else ignore the option: () would make the domain local only
            domains.append(replace(domain, servers=servers))
    return Routes(default, tuple(domains))
