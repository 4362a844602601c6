"""The validated settings of a responder. options.py creates them from dnsmasq's options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from udpwatch.dns.names import Network

ETC_HOSTS = Path("/etc/hosts")
ETC_RESOLV_CONF = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Server:
    """An upstream server."""

    address: str  # numeric; a link-local one with %interface
    port: int = 53
    source: str = ""  # source address; "": chosen by routing
    interface: str = ""  # SO_BINDTODEVICE; "": any

    def __str__(self) -> str:
        return f"{self.address}#{self.port}"


@dataclass(frozen=True, slots=True)
class Ports:
    """The source ports of queries to upstream servers over UDP."""

    low: int = 0
    high: int = 0  # 0: the kernel's choice
    single: bool = False  # one per server, not random ones

    def __str__(self) -> str:
        return f"port {self.low}" if self.low == self.high else f"ports {self.low} to {self.high}"


ANY_PORTS = Ports()


@dataclass(frozen=True, slots=True)
class DomainServers:
    """The servers of a domain and of all names below it."""

    domain: bytes  # wire format, lower case; b"": names with one label
    servers: tuple[Server, ...]  # (): the domain is local only
    standard: bool = False  # "#": use the default servers


@dataclass(frozen=True, slots=True)
class DomainAddress:
    """`--address`: one address for a domain and all names below it."""

    domain: bytes  # wire format, lower case; b"\\0": every name
    address: str | None  # None: NXDOMAIN


@dataclass(frozen=True, slots=True)
class StaticRecord:
    """A configured record."""

    name: bytes  # wire format, lower case
    type: int
    data: bytes  # RDATA in wire format, names uncompressed
    ttl: int | None = None  # None: local_ttl


@dataclass(frozen=True, slots=True)
class HostRecord:
    """`--host-record`: names with their addresses, and reverse names."""

    names: tuple[bytes, ...]  # wire format, lower case; the first is the canonical one
    addresses: tuple[str, ...]
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class InterfaceName:
    """`--interface-name`, `--dynamic-host`: a name with the addresses of an interface, or in its networks."""

    name: bytes  # wire format, lower case
    interface: str  # or a label: eth0:1
    ipv4: str | None = ""  # "": the interface's addresses; None: no IPv4; else the address whose host part is taken
    ipv6: str | None = ""


@dataclass(frozen=True, slots=True)
class SynthDomain:
    """`--synth-domain`: names for a range of addresses."""

    domain: bytes  # wire format, lower case
    first: bytes  # 4 or 16 octets
    last: bytes
    prefix: str = ""  # lower case
    is_numbered: bool = False  # names have numbers instead of addresses


@dataclass(frozen=True, slots=True)
class Alias:
    """`--alias`: IPv4 addresses, as numbers, that are rewritten in upstream responses."""

    first: int
    last: int
    new: int
    mask: int  # the bits that are rewritten
    compared: int  # the bits of an address that must be in the range


@dataclass(frozen=True, slots=True)
class Subnet:
    """`--add-subnet` for one family of clients."""

    prefix: int = 0  # bits
    address: str = ""  # "": the client's


@dataclass(frozen=True, slots=True)
class Umbrella:
    """`--umbrella`: what identifies an account of Cisco Umbrella."""

    org: int = 0  # 0: none
    asset: int = 0  # 0: none
    device: bytes = b""  # 8 octets; b"": none


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; the defaults are those of `udpwatch dns` without options."""

    port: int = 53
    listen_addresses: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()  # names; a final * matches any ending
    except_interfaces: tuple[str, ...] = ()
    bind_interfaces: bool = False  # a socket for each address, not one on the wildcard address
    bind_dynamic: bool = False  # the same
    local_service: bool = True  # serve directly connected networks only; off if listening is configured
    hosts: bool = True  # ETC_HOSTS
    addn_hosts: tuple[Path, ...] = ()  # files and folders
    resolv: bool = True
    resolv_files: tuple[Path, ...] = (ETC_RESOLV_CONF,)
    poll: bool = True  # watch the resolv files
    clear_on_reload: bool = False  # clear the cache when a resolv file is read again
    servers_file: Path | None = None  # more servers, read again when it changes
    servers: tuple[Server, ...] = ()
    domain_servers: tuple[DomainServers, ...] = ()
    strict_order: bool = False  # query servers in their order
    loop_detect: bool = False  # do not use default servers that send our queries back
    all_servers: bool = False  # query all servers at the same time
    retry_milliseconds: tuple[int, int] | None = None  # the first delay and the total time; None: failover.py's
    upstream_tcp: bool = False  # query servers over TCP only
    mixes_case: bool = False  # 0x20 encoding of queries to servers
    ports: Ports = ANY_PORTS  # source ports of queries to servers
    addresses: tuple[DomainAddress, ...] = ()
    host_records: tuple[HostRecord, ...] = ()
    records: tuple[StaticRecord, ...] = ()
    interface_names: tuple[InterfaceName, ...] = ()
    synth_domains: tuple[SynthDomain, ...] = ()
    localise_queries: bool = False  # of a name's IPv4 addresses, return those in the network of the address asked
    local_mx: bytes = b""  # wire format: the MX target of each name with an address; b"": none
    self_mx: bool = False  # each name with an address is its own MX target
    domain: bytes = b""  # wire format, lower case
    expand_hosts: bool = False
    domain_needed: bool = False
    bogus_priv: bool = False
    filter_windows: bool = False  # NODATA for SOA, SRV and for ANY of names with _
    stop_dns_rebind: bool = False
    rebind_localhost_ok: bool = False
    rebind_domains_ok: tuple[bytes, ...] = ()
    local_ttl: int = 0  # seconds
    proxy_dnssec: bool = False  # pass AD on
    bogus_addresses: tuple[Network, ...] = ()  # a response with such an address becomes NXDOMAIN
    ignored_addresses: tuple[Network, ...] = ()  # a response with such an address is ignored
    aliases: tuple[Alias, ...] = ()  # the last one that applies counts
    filtered_types: tuple[int, ...] = ()  # records that are removed from upstream responses
    min_cache_ttl: int = 0  # seconds
    max_cache_ttl: int = 0  # seconds; 0: no limit
    neg_ttl: int = 0  # seconds, for negative responses without SOA; 0: do not cache them
    max_ttl: int = 0  # seconds; the largest TTL that a client sees; 0: no limit
    cache_size: int = 10_000  # responses; 0: no cache
    negcache: bool = True
    stale_seconds: int = 86_400  # how long expired responses are served while all servers are down; 0: never
    subnets: tuple[Subnet, Subnet] | None = None  # upstream queries name them: for IPv4 clients, for IPv6 clients
    mac_formats: tuple[str, ...] = ()  # upstream queries contain the client's MAC address in these
    cpe_id: bytes = b""  # upstream queries contain it
    umbrella: Umbrella | None = None  # upstream queries contain it and the client's address
    forward_max: int = 1_000  # queries in flight to the servers of one domain
    max_tcp_connections: int = 512  # of clients
    edns_packet_max: int = 1232  # octets over UDP
    log_queries: bool = False
    log_extra: bool = False
    log_debug: bool = False
    log_facility: str = "-"  # "-": stderr; a path with a slash; or the name of a syslog facility
    ident: bool = True  # answer CHAOS *.bind
    metrics_listen: str = "127.0.0.1:9953"  # HOST:PORT or "off"
    pid_file: Path | None = None
    foreground: bool = False  # asked for; udpwatch always stays there
    group: str = ""  # the group to change to; "": that of the user
    notices: tuple[str, ...] = ()  # accepted options without effect, for the operator
    user: str = ""  # the user to change to when started as root; "": nobody
