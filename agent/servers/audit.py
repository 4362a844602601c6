"""Judge which UDP servers will reply from the wrong address, to which peers, and from which source.

Rules
1. What a server was seen doing counts more than what its sockets have set: a server with wrong replies is `wrong`.
2. Only a wildcard socket without PKTINFO can be wrong, and only if routing selects another source than the address that
   a peer asks. For IPv4 and IPv6 of one socket this is judged separately.
3. Not every peer can ask every address (`_can_ask`): nobody outside reaches the address of a container bridge.
4. This module does no I/O.
5. A tenant has as many sockets, addresses and routes as it likes: sockets that are alike are judged once, and share the
   result. At most MAX_KINDS of them and MAX_REPLIES are looked at; a socket beyond them is `unknown`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from itertools import islice

from udpwatch.agent.model import Cause, Risk, Row, Sender, Server, UdpSocket
from udpwatch.agent.servers.networks import Address, AddressKind, Networks, PeerKind, Peers, is_private

AT_RISK = (Risk.WRONG, Risk.VIRTUAL, Risk.POSSIBLE)
ORDER = (*AT_RISK, Risk.UNKNOWN, Risk.NONE)
MAX_WRONG = 256  # wrong replies listed of one server
MAX_KINDS = 256  # of wildcard sockets in one namespace
MAX_REPLIES = 1_024  # wrong replies of one family and device in one namespace
DEFAULT_PORTS = (32_768, 60_999)  # ip_local_port_range
_WILDCARDS = {"0.0.0.0": (4,), "::": (6, 4), "::ffff:0.0.0.0": (4,), "::ffff:0:0": (4,)}  # noqa: S104
_EXTRA = (AddressKind.VIRTUAL, AddressKind.BRIDGE)
#: Programs that receive only, or are clients with a port of their own. They do not reply to requests.
_NEVER_REPLY = {
    "dhclient": "a DHCP client",
    "dhcpcd": "a DHCP client",
    "udhcpc": "a DHCP client",
    "systemd-network": "a DHCP client",
    "NetworkManager": "a DHCP client",
    "rsyslogd": "a log receiver, which does not reply",
    "syslog-ng": "a log receiver, which does not reply",
    "syslogd": "a log receiver, which does not reply",
    "nfcapd": "a flow collector, which does not reply",
    "sfcapd": "a flow collector, which does not reply",
    "nfacctd": "a flow collector, which does not reply",
    "sfacctd": "a flow collector, which does not reply",
}


@dataclass(frozen=True, slots=True)
class WrongReply:
    """One address at which a group of peers would get wrong replies."""

    address: str  # that the peers ask
    peers: Peers | None  # None: clients on this host
    sources: tuple[str, ...]  # of the replies
    sometimes: bool  # other peers of the group get right replies
    risk: Risk  # VIRTUAL or POSSIBLE
    family: int  # 4 or 6


@dataclass(frozen=True, slots=True)
class SocketRisk:
    """The judgement on one socket."""

    socket: UdpSocket
    risk: Risk
    reason: str  # why it is not at risk, or unknown; "": it is at risk
    addresses: tuple[str, ...]  # at which it can be asked
    wrong: tuple[WrongReply, ...]


@dataclass(frozen=True, slots=True)
class ServerRisk:
    """The judgement on one server: the sockets of one program, container and port of a namespace."""

    sender: Sender
    port: int
    netns: int  # inode number, 0: unknown
    risk: Risk
    reason: str  # of the socket that is closest to a risk; "": it is at risk
    bound: tuple[str, ...]  # addresses that its sockets are bound to
    sockets: int
    at_risk: int  # sockets
    pktinfo: bool | None  # every wildcard socket has PKTINFO set for each family; None: unknown, or there is none
    addresses: tuple[str, ...]  # at which it can be asked
    wrong: tuple[WrongReply, ...]
    more: int  # wrong replies beyond MAX_WRONG, at least
    seen: tuple[Row, ...]  # wrong replies that the agent has seen
    healed: tuple[Row, ...]  # replies whose source the agent has set
    requests: int | None = None  # as the agent counted them; None: unknown
    replies: int | None = None


def judge(sockets: Sequence[UdpSocket], networks: Networks | None, busy: Collection[int] = ()) -> list[SocketRisk]:
    """Judge the server sockets of one namespace; clients are left out.

    ``networks``: None if they cannot be read. ``busy``: ports that are known to be servers', such as those with
    findings.
    """
    ports = networks.ports if networks else DEFAULT_PORTS
    servers = [each for each in sockets if is_server(each, ports, busy)]
    # A server such as dnsmasq asks others from random ports, and names them itself.
    own_ports = {each.pid for each in servers if each.pid and not ports[0] <= each.port <= ports[1]}
    servers = [
        each
        for each in servers
        if each.port in busy or each.pid not in own_ports or not ports[0] <= each.port <= ports[1]
    ]
    one = _Judge(networks, servers)
    return [one.judge(each) for each in servers]


def is_server(each: UdpSocket, ports: tuple[int, int] = DEFAULT_PORTS, busy: Collection[int] = ()) -> bool:
    """Return whether a socket is a server's: not connected, and on a port that bind() named.

    If that is unknown, a server's port is outside of ``ports``, from which the kernel gives clients theirs.
    """
    if each.peer or not each.port:
        return False
    if each.port in busy or each.named is not None:
        return each.named is not False or each.port in busy
    return not ports[0] <= each.port <= ports[1]


def families_of(each: UdpSocket) -> tuple[int, ...]:
    """Return the families that a wildcard socket serves; () for a socket that is bound to an address."""
    families = _WILDCARDS.get(each.address, ())
    return (6,) if each.only_ipv6 and families else families


def has_pktinfo(each: UdpSocket, family: int) -> bool | None:
    """Return whether a socket gets the address that a peer of this family asked; None: unknown.

    With IPV6_RECVPKTINFO, a socket of family 6 also gets the address of IPv4 requests.
    """
    if each.family == 4:
        return each.pktinfo
    if family == 6 or each.pktinfo6:
        return each.pktinfo6
    return None if each.pktinfo is None or (each.pktinfo6 is None and not each.pktinfo) else each.pktinfo


def servers_of(
    owned: Iterable[tuple[SocketRisk, Sender]], rows: Sequence[Row] = (), counted: Sequence[Server] = ()
) -> list[ServerRisk]:
    """Fold sockets into servers, those with the highest risk first.

    ``rows``: the agent's findings; ``counted``: its list of servers.
    """
    groups: dict[tuple[int, str, object, str, str, int], list[tuple[SocketRisk, Sender]]] = {}
    for judged, sender in owned:
        container = sender.container_id or sender.container or sender.cgroup
        key = (judged.socket.netns, sender.process, container, sender.namespace, sender.pod, judged.socket.port)
        groups.setdefault(key, []).append((judged, sender))
    known = {_identity(each): each for each in counted}
    by_port: dict[int, list[Row]] = {}
    for row in rows:
        by_port.setdefault(row.port, []).append(row)
    found = [_with_counts(_server(group, by_port.get(key[-1], ())), known) for key, group in groups.items()]
    return sorted(found, key=_urgency)


def servers_of_agent(counted: Iterable[Server], rows: Sequence[Row]) -> list[ServerRisk]:
    """Return what the agent knows of its servers, without addresses and clients, the highest risk first."""
    found = []
    for each in counted:
        seen, healed = _seen_and_healed(row for row in rows if row.port == each.port and _is_of(row, each.sender, ()))
        risk = Risk.WRONG if seen else Risk(each.risk)
        reason = {Risk.NONE: "as the agent judges it", Risk.UNKNOWN: "the agent cannot judge it"}.get(risk, "")
        found.append(
            ServerRisk(
                *(each.sender, each.port, each.netns, risk, reason, each.addresses),
                sockets=max(1, each.at_risk),
                at_risk=each.at_risk,
                pktinfo=each.pktinfo,
                addresses=(),
                wrong=(),
                more=0,
                seen=seen,
                healed=healed,
                requests=each.requests,
                replies=each.replies,
            )
        )
    return sorted(found, key=_urgency)


def _urgency(each: ServerRisk) -> tuple[int, int, int]:
    return ORDER.index(each.risk), -sum(row.count for row in each.seen), each.port


def _identity(each: Server | ServerRisk) -> tuple[object, ...]:
    sender = each.sender
    return each.netns, each.port, sender.process, sender.container_id or sender.container


def _with_counts(each: ServerRisk, counted: Mapping[tuple[object, ...], Server]) -> ServerRisk:
    known = counted.get(_identity(each))
    return replace(each, requests=known.requests, replies=known.replies) if known else each


def _server(group: list[tuple[SocketRisk, Sender]], rows: Sequence[Row]) -> ServerRisk:
    """Fold the sockets of one server. ``rows``: the findings on its port."""
    judged = [each for each, _ in group]
    first, sender = min(group, key=lambda each: ORDER.index(each[0].risk))
    pids = {each.pid for _, each in group if each.pid}
    seen, healed = _seen_and_healed(row for row in rows if _is_of(row, sender, pids))
    # Sockets that are alike share their tuples, and all of them their replies: comparing numbers is enough, and fast.
    shared = {id(each.wrong): each.wrong for each in judged}
    wrong = list({id(reply): reply for replies in shared.values() for reply in replies}.values())
    heard = {id(each.addresses): each.addresses for each in judged}
    at_risk = sum(each.risk in AT_RISK for each in judged)
    wildcard = [has_pktinfo(each.socket, family) for each in judged for family in families_of(each.socket)]
    return ServerRisk(
        sender=sender,
        port=first.socket.port,
        netns=first.socket.netns,
        risk=Risk.WRONG if seen else first.risk,
        reason="" if seen else first.reason,
        bound=tuple(sorted({each.socket.address for each in judged})),
        sockets=len(judged),
        at_risk=max(at_risk, 1) if seen else at_risk,
        pktinfo=None if None in wildcard or not wildcard else all(wildcard),
        addresses=tuple(dict.fromkeys(address for addresses in heard.values() for address in addresses)),
        wrong=tuple(wrong[:MAX_WRONG]),
        more=max(0, len(wrong) - MAX_WRONG),
        seen=seen,
        healed=healed,
    )


def _seen_and_healed(rows: Iterable[Row]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return the wrong replies, and the healed ones."""
    found = tuple(rows)
    return tuple(row for row in found if not row.is_healed), tuple(row for row in found if row.is_healed)


def _is_of(row: Row, sender: Sender, pids: Collection[int]) -> bool:
    """Return whether a finding is of a server: of its process, or of its program in its container."""
    if row.cause == Cause.FORWARDED:
        return False
    if row.sender.pid in pids:
        return True
    theirs, ours = ((each.process, each.container_id or each.container) for each in (row.sender, sender))
    return theirs == ours


class _Port:
    """What the sockets on one port take from each other."""

    def __init__(self) -> None:
        self._bound: dict[int, set[str]] = {}  # device -> addresses that sockets are bound to
        self._ipv4: set[int] = set()  # devices of wildcard sockets of family 4
        self._served: dict[int, frozenset[str]] = {}

    def add(self, each: UdpSocket) -> None:
        if each.address not in _WILDCARDS:
            self._bound.setdefault(each.device, set()).add(each.address.removeprefix("::ffff:"))
        elif each.family == 4:
            self._ipv4.add(each.device)

    def served(self, device: int) -> frozenset[str]:
        """Return the addresses for which another socket gets the requests to a wildcard socket."""
        found = self._served.get(device)
        if found is None:
            found = frozenset(self._bound.get(0, ())) | frozenset(self._bound.get(device, ()))
            self._served[device] = found
        return found

    def takes_ipv4(self, device: int) -> bool:
        """Return whether another socket gets the IPv4 requests to a socket of family 6."""
        return not self._ipv4.isdisjoint((0, device))


class _Judge:
    """Judges the sockets of one namespace."""

    def __init__(self, networks: Networks | None, servers: Iterable[UdpSocket]) -> None:
        """``networks``: None if they cannot be read."""
        self._networks = networks
        self._wrong_replies: dict[tuple[int, int], tuple[WrongReply, ...]] = {}  # by family and device
        self._known: dict[tuple[object, ...], SocketRisk] = {}  # by kind of socket
        self._ports: dict[int, _Port] = {}
        for each in servers:
            self._ports.setdefault(each.port, _Port()).add(each)
        self._addresses = {each.address for each in networks.addresses} if networks else set()

    def judge(self, each: UdpSocket) -> SocketRisk:
        """Judge one of the server sockets."""
        families = families_of(each)
        if not families:
            return SocketRisk(each, Risk.NONE, _bound_reason(each.address), (each.address,), ())
        port = self._ports[each.port]
        if each.family == 6 and port.takes_ipv4(each.device):
            families = tuple(family for family in families if family != 4)
        # A socket that is bound to an address gets the requests to it.
        served = port.served(each.device) & self._addresses
        exempt = _exemption(each)
        kind = (families, each.family, each.device, served, each.pktinfo, each.pktinfo6, exempt)
        known = self._known.get(kind)
        if known is None:
            if len(self._known) >= MAX_KINDS:
                return SocketRisk(each, Risk.UNKNOWN, "there are too many different sockets in its namespace", (), ())
            known = self._known[kind] = self._judge(each, families, served, exempt)
        return replace(known, socket=each)

    def _judge(self, each: UdpSocket, families: Sequence[int], served: Collection[str], exempt: str) -> SocketRisk:
        """Judge a wildcard socket. ``families``: that it gets; ``served``: addresses that others serve."""
        usable = tuple(
            address.address for address in self._heard(families, each.device) if address.address not in served
        )
        if exempt:
            return SocketRisk(each, Risk.NONE, exempt, usable, ())
        replies = {family: self._wrong(family, each.device) for family in families}
        of_family = {
            family: [reply for reply in found if reply.address not in served] for family, found in replies.items()
        }
        wrong = tuple(reply for family in families for reply in of_family[family] if has_pktinfo(each, family) is False)
        if wrong:
            is_virtual = any(reply.risk is Risk.VIRTUAL for reply in wrong)
            return SocketRisk(each, Risk.VIRTUAL if is_virtual else Risk.POSSIBLE, "", usable, wrong)
        if unknown := self._unknown(each, [family for family in families if of_family[family]], families):
            return SocketRisk(each, Risk.UNKNOWN, unknown, usable, ())
        unlisted = [family for family in families if len(replies[family]) == MAX_REPLIES]
        if any(not of_family[family] and not has_pktinfo(each, family) for family in unlisted):
            return SocketRisk(each, Risk.UNKNOWN, "its network namespace has too many addresses", usable, ())
        reason = _PKTINFO if any(of_family.values()) else _routing_reason(usable)
        return SocketRisk(each, Risk.NONE, reason, usable, ())

    def _unknown(self, each: UdpSocket, dangerous: Sequence[int], families: Sequence[int]) -> str:
        """Return why a socket cannot be judged, or "". ``dangerous``: families for which it needs PKTINFO."""
        if any(has_pktinfo(each, family) is None for family in dangerous):
            return "whether PKTINFO is set is unknown"
        if all(has_pktinfo(each, family) for family in families):
            return ""
        if self._networks is None:
            return "the addresses of its network namespace cannot be read"
        if each.device not in self._networks.devices or not self._networks.complete:
            return "its network namespace has more interfaces, addresses or routes than were read"
        return ""

    def _heard(self, families: Sequence[int], device: int) -> Iterable[Address]:
        """Return the addresses whose requests a wildcard socket gets. ``device``: that it is bound to, 0 for none."""
        if self._networks is None:
            return ()
        return (
            address
            for address in self._networks.addresses
            if address.family in families and _is_heard(address, device, self._networks)
        )

    def _wrong(self, family: int, device: int) -> tuple[WrongReply, ...]:
        """Return the wrong replies of a wildcard socket without PKTINFO, those with the highest risk first."""
        if self._networks is None:
            return ()
        found = self._wrong_replies.get((family, device))
        if found is None:
            groups = [each for each in self._networks.peers if each.family == family and each.device == device]
            heard = list(self._heard((family,), device))
            if len(heard) * (len(groups) + 1) > MAX_REPLIES:  # the riskiest ones first
                groups.sort(key=lambda each: each.kind is not PeerKind.CONTAINERS)
                heard.sort(key=lambda each: each.kind not in _EXTRA)
            replies = (reply for address in heard for reply in _of_address(address, groups, device))
            found = tuple(sorted(islice(replies, MAX_REPLIES), key=lambda reply: ORDER.index(reply.risk)))
            self._wrong_replies[family, device] = found
        return found


_PKTINFO = "PKTINFO is set, and no wrong reply was seen"


def _exemption(each: UdpSocket) -> str:
    """Return why a wildcard socket is not judged by its options, or ""."""
    if each.kernel:
        return "a socket of the kernel, such as a tunnel's"
    return "a transparent proxy, which chooses its sources" if each.transparent else _NEVER_REPLY.get(each.process, "")


def _routing_reason(usable: Sequence[str]) -> str:
    if len(usable) <= 1:
        return "there is only one address that can be asked"
    return "routing selects the address that was asked"


def _bound_reason(address: str) -> str:
    try:
        is_group = ip_address(address).is_multicast or address == "255.255.255.255"
    except ValueError:
        is_group = False
    return "bound to a multicast or broadcast address" if is_group else "bound to one address"


def _is_heard(address: Address, device: int, networks: Networks) -> bool:
    """Return whether a socket that is bound to a device, or to none, gets requests to an address."""
    if not device:
        return not address.vrf
    if device in networks.vrfs:
        return address.vrf == device
    return address.index == device or not address.vrf


def _of_address(address: Address, groups: Iterable[Peers], device: int) -> Iterable[WrongReply]:
    for peers in groups:
        if _can_ask(address, peers):
            sources = tuple(source for source in peers.sources if source != address.address)
            if sources:
                is_virtual = address.kind is not AddressKind.LINK and (
                    peers.kind is PeerKind.CONTAINERS or address.kind in _EXTRA
                )
                risk = Risk.VIRTUAL if is_virtual else Risk.POSSIBLE
                yield WrongReply(
                    address.address, peers, sources, len(sources) < len(peers.sources), risk, address.family
                )
    # The packets of a client on this host arrive on the loopback interface.
    if not device and address.host_source not in ("", address.address):
        risk = Risk.VIRTUAL if address.kind is AddressKind.VIRTUAL else Risk.POSSIBLE
        yield WrongReply(address.address, None, (address.host_source,), False, risk, address.family)


def _can_ask(address: Address, peers: Peers) -> bool:
    """Return whether peers have a reason and a way to ask an address."""
    if address.kind is AddressKind.HOST:
        return False
    if address.kind is AddressKind.LINK or peers.is_link_local:
        return address.kind is AddressKind.LINK and peers.is_link_local and address.index == peers.index
    if address.index == peers.index or peers.kind is PeerKind.CONTAINERS:  # this host is the containers' router
        return True
    if address.kind is AddressKind.BRIDGE:
        return False
    if address.kind is AddressKind.VIRTUAL:
        return True
    # A private address is not routed to peers that get replies from a public one, and the reverse.
    return any(is_private(source) == address.is_private for source in peers.sources)
