"""What `udpwatch explain PORT` knows about a port: the kernel's own words, read twice with a few seconds between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from udpwatch.agent.kernel.packet_tap import Traffic
from udpwatch.agent.model import ConntrackHealth, Sender, Server, UdpSocket
from udpwatch.agent.servers.counters import NetworkCounters
from udpwatch.agent.servers.port.firewall import Firewall

_NOBODY = Sender("")
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """A socket bound to the port."""

    socket: UdpSocket  # at the end of the look
    sender: Sender = _NOBODY  # its process, container and pod
    device: str = ""  # name of the interface it is bound to
    drops: int | None = None  # in the look
    waiting: float = 0.0  # seconds that its receive buffer has held datagrams and has not become shorter
    state: str = ""  # of its process, as in ps(1): R, S, D, T, Z; "": unknown

    @property
    def has_no_process(self) -> bool:
        """Whether no process is known to hold it: it may be the kernel's own (VXLAN, WireGuard)."""
        return not self.socket.pid


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device on which packets may be lost before anything can count a port's."""

    name: str
    dropped: int  # packets that it received with an error, or dropped, in the look; of all kinds
    has_xdp: bool  # an XDP program decides on its packets


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """One network namespace."""

    name: str  # for people
    inode: int
    here: bool  # udpwatch runs in it
    sockets: tuple[SocketFacts, ...] = ()
    is_watched: bool = True  # else only its sockets are known
    local: frozenset[str] = frozenset()  # which of the asked addresses are local here
    addresses: tuple[str, ...] = ()  # its addresses other than the loopback's
    devices: tuple[DeviceFacts, ...] = ()  # that dropped something in the look, or run a program that may
    counters: NetworkCounters | None = None  # increase in the look; None: could not be read
    conntrack: ConntrackHealth | None = None  # at the end
    conntrack_before: ConntrackHealth | None = None
    traffic: Traffic | None = None  # None: not watched
    firewall: Firewall | None = None  # at the end
    firewall_before: Firewall | None = None
    tcp: bool = False  # a TCP socket listens on the port
    buffer_default: int | None = None  # net.core.rmem_default
    buffer_max: int | None = None  # net.core.rmem_max
    servers: tuple[tuple[Server | None, Server], ...] = ()  # before and after, from a running agent
    path: str = ""  # for nsenter --net=
    vrfs: Mapping[str, str] = field(default_factory=dict)  # device -> the VRF that it belongs to
    is_vrf_shared: bool = False  # net.ipv4.udp_l3mdev_accept: sockets without a device get requests of VRFs


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that was seen of one port."""

    port: int
    seconds: float
    namespaces: tuple[NamespaceFacts, ...]  # those with a socket first, then the one udpwatch runs in
    asked: str = ""  # the address of --address
    servers: tuple[tuple[Server | None, Server], ...] = ()  # the agent's, of namespaces that were not watched
    unseen: tuple[str, ...] = ()  # what could not be looked at, and why


def is_wildcard(sock: UdpSocket) -> bool:
    return plain(sock.address) in _WILDCARDS


def is_loopback(address: str) -> bool:
    return ip_address(plain(address)).is_loopback


def plain(address: str) -> str:
    """Return an IPv4-mapped address as IPv4, without a zone."""
    return address.partition("%")[0].removeprefix("::ffff:") if "." in address else address.partition("%")[0]
