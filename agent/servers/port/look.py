"""Look at one port for a few seconds: everything of `facts.Look`, read twice, and the datagrams at the devices.

Rules
1. The counters are read before the first datagram is counted and again after the last: what a socket took in while
   datagrams were counted is part of their increase. What takes long is read before and after that: lists, rules.
2. Bounded: MAX_WATCHED namespaces are watched, those with a socket first; of others, only the sockets are known. A
   tenant may have loaded any number of rules: reading all of them takes FIREWALL_SECONDS, twice.
3. What may not be read is a line in `Look.unseen`, never an error.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from udpwatch.agent.kernel import netns
from udpwatch.agent.kernel.interfaces import addresses, links
from udpwatch.agent.kernel.packet_tap import MAX_LINKS, Tap, Traffic
from udpwatch.agent.kernel.routes import route_to
from udpwatch.agent.model import ConntrackHealth, Sender, Server, UdpSocket
from udpwatch.agent.servers.counters import NetworkCounters, conntrack_health, network_counters, received_drops
from udpwatch.agent.servers.inventory import Listed
from udpwatch.agent.servers.owners import owner_key, owners
from udpwatch.agent.servers.port import firewall
from udpwatch.agent.servers.port.facts import DeviceFacts, Look, NamespaceFacts, SocketFacts
from udpwatch.agent.servers.port.firewall import Firewall
from udpwatch.agent.servers.port.own_sockets import all_here, missing_from, sockets_here
from udpwatch.agent.servers.port.places import Place, Places, places

MAX_WATCHED = 16  # namespaces: reading the firewall's rules takes 0.1 s in each
MAX_ADDRESSES = 512  # of a namespace
MAX_THREADS = 64  # of a process whose states are compared
MAX_VRFS = 8  # in whose tables an address that was asked is looked up
FIREWALL_SECONDS = 10.0  # for the rules of all namespaces; each takes at most half of what is left
SETTLE_SECONDS = 0.05  # until a datagram that passed a device has reached its socket
_STEP_SECONDS = 0.02
_SLACK_SECONDS = 0.5  # by which a look may take longer without saying so
_SAMPLE_SECONDS = 0.2
_LISTEN = "0A"  # in /proc/net/tcp

#: lists the sockets of the port in all namespaces
ListSockets = Callable[[], Listed]
#: returns the agent's servers; None: there is no agent
ListServers = Callable[[], Sequence[Server] | None]


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a namespace had counted at one moment."""

    counters: NetworkCounters | None
    conntrack: ConntrackHealth | None
    dropped: Mapping[str, int]  # packets by device
    drops: Mapping[tuple[int, ...], int]  # datagrams by socket


@dataclass(slots=True)
class _Watched:
    """A namespace while it is watched."""

    place: Place
    fd: int
    rules: Firewall = field(default_factory=lambda: Firewall(()))
    before: _Counted | None = None
    after: _Counted | None = None
    tap: Tap | None = None
    traffic: Traffic | None = None
    waiting: dict[int, tuple[int, float]] = field(default_factory=dict)  # inode -> (queue, waiting since)


class Looker:
    """Looks at a port once."""

    def __init__(self, port: int, asked: str, sockets: ListSockets, servers: ListServers) -> None:
        """``asked``: the address that clients ask, "" if unknown."""
        self._port, self._asked = port, asked
        self._list_sockets, self._list_servers = sockets, servers
        self._unseen: list[str] = []

    def look(self, seconds: float) -> Look:
        """Watch the port for so long. Raises OSError if not even this namespace can be read."""
        before = self._sockets()
        servers = self._list_servers()
        found = places()
        chosen = self._choose(found, {each.netns for each in before})
        with contextlib.ExitStack() as held:
            watched = list(self._open(chosen, held))
            for each, rules in self._rules(watched):
                each.rules = rules
            begin = time.monotonic()
            for each in watched:
                with netns.entered(each.fd):
                    each.before = self._counted()
                    self._tap(each, held)
            self._wait(watched, seconds)
            for each in watched:
                each.traffic = each.tap.finish() if each.tap else None
                if each.traffic and each.traffic.missed:
                    self._unseen.append(f"{each.traffic.missed:,} datagrams at the devices of {each.place.name}")
            time.sleep(SETTLE_SECONDS)
            for each in watched:
                with netns.entered(each.fd):
                    self._sample(each, time.monotonic())
                    each.after = self._counted()
            took = time.monotonic() - begin
            after = self._sockets()
            pairs = _server_pairs(servers, self._list_servers() if servers is not None else None, self._port)
            sockets = _Sockets(after, owners(after))
            facts = [self._finish(each, rules, sockets, pairs) for each, rules in self._rules(watched)]
        seen = {each.inode for each in facts}
        facts += [sockets.unwatched(place) for place in found.found if place.inode not in seen]
        facts = [each for each in facts if each.sockets or each.inode in seen]
        self._note_places(found, {each.netns for each in after})
        facts.sort(key=lambda each: (not each.sockets, not each.here, each.name))
        others = tuple(pair for pair in pairs if pair[1].netns not in seen)
        shown = seconds if took < seconds + _SLACK_SECONDS else round(took, 1)  # very many sockets, or a busy machine
        return Look(self._port, shown, tuple(facts), self._asked, others, tuple(dict.fromkeys(self._unseen)))

    def _sockets(self) -> list[UdpSocket]:
        listed = self._list_sockets()
        if listed.left_out:
            self._unseen.append(f"{listed.left_out} of very many sockets")
        return list(listed.sockets)

    def _choose(self, found: Places, serving: set[int]) -> list[Place]:
        """Return the namespaces to watch: this one, those with a socket, then others."""
        asked = {each.inode for each in found.found if self._is_asked(each)}
        order = sorted(found.found, key=lambda each: (not each.here, each.inode not in serving | asked))
        if any(each.inode in serving for each in order):
            order = [each for each in order if each.here or each.inode in serving | asked]
        if len(order) > MAX_WATCHED:
            self._unseen.append(f"{len(order) - MAX_WATCHED} more network namespaces were not watched")
        return order[:MAX_WATCHED]

    def _is_asked(self, place: Place) -> bool:
        if not self._asked:
            return False
        with contextlib.suppress(OSError), _opened(place.path) as fd, netns.entered(fd):
            route = route_to(self._asked)
            return route is not None and route.is_local
        return False

    def _open(self, chosen: list[Place], held: contextlib.ExitStack) -> Iterator[_Watched]:
        for place in chosen:
            try:
                fd = held.enter_context(_opened(place.path))
                with netns.entered(fd):
                    pass
            except OSError as error:
                self._unseen.append(f"{place.name}: cannot enter it ({_reason(error, 'CAP_SYS_ADMIN')})")
                continue
            if os.fstat(fd).st_ino == place.inode:
                yield _Watched(place, fd)
            else:  # another process has the number now
                self._unseen.append(f"{place.name}: the process has ended")

    def _rules(self, watched: Iterable[_Watched]) -> Iterator[tuple[_Watched, Firewall]]:
        """Yield each namespace with the rules of its firewall."""
        end = time.monotonic() + FIREWALL_SECONDS
        for each in watched:
            with netns.entered(each.fd):
                rules = firewall.read(self._port, min(firewall.READ_SECONDS, (end - time.monotonic()) / 2))
            self._unseen += [f"{reason} ({each.place.name})" for reason in rules.unread]
            yield each, rules

    def _counted(self) -> _Counted:
        """Read what the namespace of the calling thread has counted."""
        drops = {_identity(sock): sock.drops or 0 for sock in sockets_here(self._port)}
        return _Counted(self._counters(), conntrack_health(), received_drops(), drops)

    def _tap(self, each: _Watched, held: contextlib.ExitStack) -> None:
        try:
            each.tap = held.enter_context(Tap(self._port))
        except OSError as error:
            reason = _reason(error, "CAP_NET_RAW")
            self._unseen.append(f"datagrams were not counted at the devices of {each.place.name} ({reason})")

    def _counters(self) -> NetworkCounters | None:
        try:
            return network_counters()
        except (OSError, ValueError) as error:
            self._unseen.append(f"/proc/net/snmp cannot be read: {error}")
            return None

    def _wait(self, watched: list[_Watched], seconds: float) -> None:
        end = time.monotonic() + seconds
        sample = 0.0
        while (now := time.monotonic()) < end:
            for each in watched:
                if each.tap:
                    each.tap.read()
            if now >= sample:
                for each in watched:
                    self._sample(each, now)
                # The list of a namespace may be long: reading takes a tenth of the time at most.
                sample = now + max(_SAMPLE_SECONDS, 10 * (time.monotonic() - now))
            time.sleep(max(min(_STEP_SECONDS, end - time.monotonic()), 0))

    def _sample(self, each: _Watched, now: float) -> None:
        """Note since when each receive buffer has not become shorter."""
        with contextlib.suppress(OSError), netns.entered(each.fd):
            for sock in sockets_here(self._port):
                queue = sock.queue or 0
                length, since = each.waiting.get(sock.inode, (0, now))
                each.waiting[sock.inode] = queue, since if queue >= length > 0 else now

    def _finish(
        self, each: _Watched, rules: Firewall, known: _Sockets, pairs: Sequence[tuple[Server | None, Server]]
    ) -> NamespaceFacts:
        assert each.before and each.after
        inode, before, after = each.place.inode, each.before, each.after
        now = time.monotonic()
        with netns.entered(each.fd):
            listed = known.of(inode)
            listed += missing_from(listed, all_here(self._port, inode))
            sockets = tuple(known.facts(sock, _waiting(each.waiting, sock, now), before, after) for sock in listed)
            asked = {conversation.address for conversation in each.traffic.conversations} if each.traffic else set()
            vrfs = _vrfs()
            return NamespaceFacts(
                name=known.name(each.place),
                inode=inode,
                here=each.place.here,
                path=str(each.place.path),
                sockets=sockets,
                local=frozenset(_local(asked | ({self._asked} if self._asked else set()), vrfs.values())),
                vrfs=vrfs,
                is_vrf_shared=_sysctl("net/ipv4/udp_l3mdev_accept") == 1,
                addresses=tuple(_addresses()),
                devices=tuple(_devices(before.dropped, after.dropped)),
                counters=after.counters - before.counters if after.counters and before.counters else None,
                conntrack=after.conntrack,
                conntrack_before=before.conntrack,
                traffic=each.traffic,
                firewall=rules,
                firewall_before=each.rules,
                tcp=not sockets and _has_tcp_listener(self._port),
                buffer_default=_sysctl("net/core/rmem_default"),
                buffer_max=_sysctl("net/core/rmem_max"),
                servers=tuple(pair for pair in pairs if pair[1].netns == inode),
            )

    def _note_places(self, found: Places, serving: set[int]) -> None:
        known = {each.inode for each in found.found}
        if found.hidden:
            processes = "1 process" if found.hidden == 1 else f"{found.hidden} processes"
            self._unseen.append(f"the network namespaces of {processes} that this user may not open")
        if serving - known - {0}:
            self._unseen.append(f"{len(serving - known - {0})} network namespaces without a process or a name")


@dataclass(frozen=True, slots=True)
class _Sockets:
    """The sockets of the port in all namespaces."""

    after: Sequence[UdpSocket]
    senders: Mapping[tuple[int, str, int], Sender]

    def of(self, inode: int) -> list[UdpSocket]:
        """Return those of a namespace."""
        return [each for each in self.after if each.netns == inode]

    def name(self, place: Place) -> str:
        """Name a namespace after the pod or container of its server if it has no name of its own."""
        for each in self.of(place.inode):
            sender = self.senders[owner_key(each)]
            if sender.pod and not place.here:
                return f"pod {sender.namespace}/{sender.pod}"
            if sender.container and not place.here:
                return f"container {sender.container}"
        return place.name

    def unwatched(self, place: Place) -> NamespaceFacts:
        """Return what is known of a namespace that was not watched."""
        own = tuple(self.facts(each, 0.0) for each in self.of(place.inode))
        return NamespaceFacts(self.name(place), place.inode, place.here, own, is_watched=False)

    def facts(
        self, sock: UdpSocket, waiting: float, before: _Counted | None = None, after: _Counted | None = None
    ) -> SocketFacts:
        """Complete a socket in the namespace of the calling thread."""
        device = ""
        if sock.device:
            with contextlib.suppress(OSError):
                device = socket.if_indextoname(sock.device)
            device = device or str(sock.device)
        known, drops = _identity(sock), None
        if before and after and known in after.drops:  # a socket that was opened meanwhile begins at 0
            drops = max(after.drops[known] - before.drops.get(known, 0), 0)
        return SocketFacts(
            socket=sock,
            sender=self.senders.get(owner_key(sock), Sender(sock.process, sock.pid)),
            device=device,
            drops=drops,
            waiting=waiting,
            state=_state(sock.pid),
        )


def _identity(sock: UdpSocket) -> tuple[int, ...]:
    """Return what identifies a socket of the port in its namespace. Those of the kernel have no inode number."""
    return (sock.inode,) if sock.inode else (0, sock.family)


def _waiting(samples: dict[int, tuple[int, float]], sock: UdpSocket, now: float) -> float:
    queue, since = samples.get(sock.inode, (0, now))
    return now - since if queue else 0.0


def _server_pairs(
    before: Iterable[Server] | None, after: Iterable[Server] | None, port: int
) -> list[tuple[Server | None, Server]]:
    """Return the agent's servers of the port, each with its earlier counts."""

    def key(server: Server) -> tuple[object, ...]:
        return server.netns, server.sender.process, server.sender.container

    old = {key(each): each for each in before or () if each.port == port}
    return [(old.get(key(each)), each) for each in after or () if each.port == port]


def _state(pid: int) -> str:
    """Return the state of a process as in ps(1); "" if it is unknown, or if its threads are in different ones."""
    if not pid:
        return ""
    states = set()
    try:
        with os.scandir(f"/proc/{pid}/task") as threads:
            for thread in itertools.islice(threads, MAX_THREADS):
                states.add(Path(thread.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[0])
    except (OSError, IndexError):
        return ""
    return states.pop() if len(states) == 1 else ""


def _has_tcp_listener(port: int) -> bool:
    """Return whether a TCP socket listens on the port in the namespace of the calling thread."""
    wanted = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), Path("/proc/thread-self/net", name).open() as lines:
            next(lines, "")
            for line in lines:
                words = line.split()
                if words[3] != _LISTEN:  # the kernel lists those that listen first
                    break
                if words[1].endswith(wanted):
                    return True
    return False


def _local(addresses: Iterable[str], vrfs: Iterable[str]) -> Iterator[str]:
    """Yield those that are local in the namespace of the calling thread, in the main tables or in those of a VRF."""
    tables = [0]
    for vrf in sorted(set(vrfs))[:MAX_VRFS]:
        with contextlib.suppress(OSError):
            tables.append(socket.if_nametoindex(vrf))
    for address in addresses:
        if any((route := route_to(address, table)) is not None and route.is_local for table in tables):
            yield address


def _vrfs() -> dict[str, str]:
    """Return the VRF of each device of the namespace of the calling thread that belongs to one."""
    try:
        found = links(MAX_LINKS)
    except OSError:
        return {}
    names = {link.index: link.name for link in found if link.kind == "vrf"}
    return {link.name: names[link.master] for link in found if link.master in names}


def _addresses() -> list[str]:
    """Return the addresses of the namespace of the calling thread; without loopback's and link-local ones."""
    try:
        found = [each.address for each in addresses(MAX_ADDRESSES)]
    except OSError:
        return []
    parsed = map(ipaddress.ip_address, found)
    return [str(each) for each in parsed if not each.is_loopback and not each.is_link_local]


def _devices(before: Mapping[str, int], now: Mapping[str, int]) -> Iterator[DeviceFacts]:
    """Yield the devices of the namespace of the calling thread on which packets may be lost."""
    with contextlib.suppress(OSError):
        for link in links(MAX_LINKS):
            dropped = now.get(link.name, 0) - before.get(link.name, 0)
            if dropped > 0 or link.has_xdp:
                yield DeviceFacts(link.name, dropped, link.has_xdp)


def _sysctl(name: str) -> int | None:
    try:
        return int(Path("/proc/sys", name).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _reason(error: OSError, capability: str) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"needs {capability}; run this as root"
    return error.strerror or str(error)
