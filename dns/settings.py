"""What the responder is told, checked. options.py makes it from dnsmasq's words; nothing else is read anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ETC_HOSTS = Path("/etc/hosts")
ETC_RESOLV_CONF = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Server:
    """An upstream server."""

    address: str  # numeric; a link-local one with %interface
    port: int = 53
    source: str = ""  # address to ask from; "": as routing says
    interface: str = ""  # or interface (SO_BINDTODEVICE)

    def __str__(self) -> str:
        return f"{self.address}#{self.port}"


@dataclass(frozen=True, slots=True)
class DomainServers:
    """Who answers for a domain and what is below it."""

    domain: bytes  # wire format, lower case; b"": names of one label
    servers: tuple[Server, ...]  # (): nobody, it is ours alone
    standard: bool = False  # "#": the servers that answer for everything else


@dataclass(frozen=True, slots=True)
class DomainAddress:
    """`--address`: a domain, and all below it, at one address."""

    domain: bytes  # wire format, lower case; b"\\0": every name
    address: str | None  # None: NXDOMAIN


@dataclass(frozen=True, slots=True)
class StaticRecord:
    """A record from the settings."""

    name: bytes  # wire format, lower case
    type: int
    data: bytes  # as on the wire, names uncompressed
    ttl: int | None = None  # None: local_ttl


@dataclass(frozen=True, slots=True)
class HostRecord:
    """`--host-record`: names with both addresses, and the reverse."""

    names: tuple[bytes, ...]  # wire format, lower case; the first is the canonical one
    addresses: tuple[str, ...]
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; the defaults are those of `udpwatch dns` without options."""

    port: int = 53
    listen_addresses: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()  # names; a final * stands for any rest
    except_interfaces: tuple[str, ...] = ()
    local_service: bool = True  # answer directly connected networks only; off where listening is told explicitly
    hosts: bool = True  # ETC_HOSTS
    addn_hosts: tuple[Path, ...] = ()  # files and folders
    resolv: bool = True
    resolv_files: tuple[Path, ...] = (ETC_RESOLV_CONF,)
    poll: bool = True  # watch the resolv files
    servers: tuple[Server, ...] = ()
    domain_servers: tuple[DomainServers, ...] = ()
    addresses: tuple[DomainAddress, ...] = ()
    host_records: tuple[HostRecord, ...] = ()
    records: tuple[StaticRecord, ...] = ()
    domain: bytes = b""  # wire format, lower case
    expand_hosts: bool = False
    domain_needed: bool = False
    bogus_priv: bool = False
    stop_dns_rebind: bool = False
    rebind_localhost_ok: bool = False
    rebind_domains_ok: tuple[bytes, ...] = ()
    local_ttl: int = 0  # seconds
    neg_ttl: int = 0  # seconds, for negative answers without SOA; 0: they are not kept
    max_ttl: int = 0  # seconds that a client sees at most; 0: no limit
    cache_size: int = 10_000  # answers; 0: no cache
    negcache: bool = True
    stale_seconds: int = 86_400  # for which an expired answer may stand in while every upstream is down; 0: never
    forward_max: int = 1_000  # questions under way to the servers of one domain at the same time
    edns_packet_max: int = 1232  # octets over UDP
    log_queries: bool = False
    log_extra: bool = False
    ident: bool = True  # answer CHAOS *.bind
    metrics_listen: str = "127.0.0.1:9953"  # HOST:PORT or "off"
    user: str = ""  # to change to where started as root; "": nobody
