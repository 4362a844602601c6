"""Compare audit's verdict with what a server does: ask it at each address, from each network, and look at the reply."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from waiting import wait_for

from udpwatch.agent.model import UdpSocket
from udpwatch.agent.servers.audit import AT_RISK, SocketRisk, judge
from udpwatch.agent.servers.networks import Networks, Peers, read_networks
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import Lab, Namespace

REPLY_SECONDS = 0.15, 0.3, 0.6  # of each attempt: neighbours are resolved first
_IPV6_RECVPKTINFO = 49


@dataclass(frozen=True)
class Kind:
    """A kind of server socket."""

    name: str
    family: int
    address: str  # "": each usable address is tried
    pktinfo: bool = False  # set, and used
    only_ipv6: bool = False
    device: str = ""


KINDS = (
    Kind("IPv4 wildcard", 4, "0.0.0.0"),
    Kind("IPv4 wildcard with PKTINFO", 4, "0.0.0.0", pktinfo=True),
    Kind("IPv6 wildcard, both families", 6, "::"),
    Kind("IPv6 wildcard, only IPv6", 6, "::", only_ipv6=True),
    Kind("IPv6 wildcard with PKTINFO", 6, "::", pktinfo=True),
)


@dataclass(frozen=True)
class Layout:
    """A node, the hosts that ask it, and the kinds of server that are run on it."""

    lab: Lab
    node: Namespace
    clients: Sequence[Namespace]
    kinds: Sequence[Kind] = KINDS


@dataclass
class Tally:
    """Predictions against what happened."""

    true: int = 0
    false: int = 0  # predicted, and the reply was right
    missed: int = 0  # not predicted, and the reply was wrong
    right: int = 0
    mistakes: list[str] = field(default_factory=list)

    def add(self, predicted: bool, happened: bool, what: str) -> None:
        self.true += predicted and happened
        self.false += predicted and not happened
        self.missed += happened and not predicted
        self.right += not happened and not predicted
        if predicted != happened:
            self.mistakes.append(f"{'predicted' if predicted else 'missed'}: {what}")

    def include(self, other: Tally) -> None:
        """Add the cases of another tally."""
        self.true += other.true
        self.false += other.false
        self.missed += other.missed
        self.right += other.right

    @property
    def precision(self) -> float:
        return self.true / (self.true + self.false) if self.true + self.false else 1.0

    @property
    def recall(self) -> float:
        return self.true / (self.true + self.missed) if self.true + self.missed else 1.0

    def __str__(self) -> str:
        return (
            f"{self.true + self.false + self.missed + self.right} cases, {self.true + self.missed} wrong: precision "
            f"{self.precision:.3f}, recall {self.recall:.3f}"
        )


@contextlib.contextmanager
def serving(node: Namespace, kind: Kind, port: int) -> Iterator[UdpSocket]:
    """Run a server that echoes, and yield its socket as the inventory would describe it."""
    inet = socket.AF_INET if kind.family == 4 else socket.AF_INET6
    with node.socket(inet) as made:
        if inet == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(kind.only_ipv6))
        if kind.pktinfo and inet == socket.AF_INET:
            made.setsockopt(socket.IPPROTO_IP, servers.IP_PKTINFO, 1)
        elif kind.pktinfo:
            made.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        device = 0
        if kind.device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, kind.device.encode())
            with node.entered():
                device = socket.if_nametoindex(kind.device)
        made.bind((kind.address, port))
        stop = threading.Event()
        made.settimeout(0.05)
        thread = threading.Thread(target=_echo, args=(made, kind, stop), daemon=True)
        thread.start()
        try:
            yield UdpSocket(
                kind.address,
                port,
                kind.family,
                netns=node.inode,
                device=device,
                only_ipv6=kind.only_ipv6,
                pktinfo=kind.pktinfo and kind.family == 4,
                pktinfo6=kind.pktinfo and kind.family == 6,
                process="server",
            )
        finally:
            stop.set()
            thread.join(5)
            assert not thread.is_alive()


def _echo(made: socket.socket, kind: Kind, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            data, control, _, peer = made.recvmsg(100, 100)
        except TimeoutError:
            continue
        sent = [
            each for each in control if each[:2] in ((socket.IPPROTO_IP, servers.IP_PKTINFO), (socket.IPPROTO_IPV6, 50))
        ]
        with contextlib.suppress(OSError):
            made.sendmsg([data], [_without_interface(each) for each in sent] if kind.pktinfo else [], 0, peer)


def _without_interface(control: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
    """Return what to send: the address that was asked, and for IPv4 no interface."""
    level, kind, data = control
    if level == socket.IPPROTO_IP:
        return level, kind, bytes(4) + data[8:12] + bytes(4)
    return level, kind, data


def reply_source(client: Namespace, address: str, port: int) -> tuple[str, str] | None:
    """Ask an address; return (the client's address, the source of the reply), or None without a reply."""
    inet = socket.AF_INET6 if ":" in address else socket.AF_INET
    with client.socket(inet) as asking, client.socket(inet) as probe:
        try:
            probe.connect((address, port))
        except OSError:
            return None  # no route
        for seconds in REPLY_SECONDS:
            asking.settimeout(seconds)
            with contextlib.suppress(OSError):
                asking.sendto(b"request", (address, port))
                return probe.getsockname()[0], asking.recvfrom(100)[1][0]
    return None


def group_of(networks: Networks, peer: str, device: int = 0) -> Peers | None:
    """Return the group that audit puts a peer into."""
    address = ipaddress.ip_address(peer)
    best: tuple[int, Peers | None] = (-1, None)
    for each in networks.peers:
        if each.family != address.version or each.device != device:
            continue
        network = None if each.network == "default" else ipaddress.ip_network(each.network)
        if network is None or address in network:
            best = max(best, (network.prefixlen if network else 0, each), key=lambda found: found[0])
    return best[1]


def compare(layout: Layout, ports: Iterator[int], tallies: tuple[Tally, Tally]) -> None:
    """Run each kind of server and ask it. Count (address, group of peers) in the first tally, servers in the second."""
    pairs, verdicts = tallies
    for host in (layout.node, *layout.clients):
        wait_for(lambda host=host: not host.run(["ip", "-6", "addr", "show", "tentative"]), f"addresses of {host.name}")
    for kind in layout.kinds:
        with serving(layout.node, kind, next(ports)) as made:
            with layout.node.entered():
                networks = read_networks([made.device])
            (judged,) = judge([made], networks, [made.port])
            replies: dict[tuple[str, Peers | None], set[str]] = {}
            for client in (layout.node, *layout.clients):
                for (address, group), source in _ask(judged, networks, layout.node, client):
                    replies.setdefault((address, group), set()).add(source)
        for (address, group), sources in replies.items():
            predicted = any((reply.address, reply.peers) == (address, group) for reply in judged.wrong)
            pairs.add(
                predicted, sources != {address}, f"{kind.name}: {address} asked by {group}, replies from {sources}"
            )
        is_wrong = any(sources != {address} for (address, _), sources in replies.items())
        verdicts.add(judged.risk in AT_RISK, is_wrong, f"{kind.name}: {judged}")


def _ask(
    judged: SocketRisk, networks: Networks, node: Namespace, client: Namespace
) -> Iterator[tuple[tuple[str, Peers | None], str]]:
    """Ask each address; yield (address, group of the client) and the source of the reply."""
    each = judged.socket
    for address in networks.addresses:
        if (address.family == 4 and each.only_ipv6) or (address.family == 6 and each.family == 4):
            continue
        parsed = ipaddress.ip_address(address.address)
        if parsed.is_link_local or (parsed.is_loopback and client is not node):
            continue
        found = reply_source(client, address.address, each.port)
        if found:
            peer, source = found
            # The node reaches an address in a VRF by its router, like any other client.
            here = client is node and not address.vrf
            group = None if here else group_of(networks, peer, each.device)
            yield (address.address, group), source
