"""Read the networks of other namespaces, and keep them for a while.

Rules
1. A namespace is entered where the kernel allows it (CAP_SYS_ADMIN, and CAP_SYS_PTRACE for processes of other users).
   Elsewhere, /proc/PID/net tells whether it has only one address of each family: then no reply can be wrong. With
   more, its networks are unknown.
2. A tenant may create any number of namespaces. Reading takes at most a twentieth of the time: the namespaces that were
   not read for the longest time come first. A namespace is kept while it needs at most half of the free room. Judging
   is bounded alike; meanwhile, the last judgement on a namespace counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from itertools import islice
from pathlib import Path

from udpwatch.agent.kernel import netns
from udpwatch.agent.model import Risk, UdpSocket
from udpwatch.agent.servers.audit import DEFAULT_PORTS, judge
from udpwatch.agent.servers.networks import Address, AddressKind, Networks, is_private, read_networks

KEEP_SECONDS = 30.0  # how long changes of addresses and routes may go unnoticed
MAX_KEPT = 20_000  # addresses and groups of peers, beside those of the agent's own namespace
READ_SECONDS = 0.02  # of reading; then other namespaces wait
AUDIT_SECONDS = 20.0  # of reading by a command; the risk in further namespaces is unknown
JUDGE_SECONDS = 0.05  # of judging the sockets of other namespaces; then others wait for the next call
_REST = 20  # pause after reading, in multiples of its duration
_MAX_LINES = 4_096  # of a file in /proc/PID/net


def read_here(devices: Collection[int] = ()) -> Networks | None:
    """Return the networks of the namespace of the calling thread, or None if netlink fails."""
    try:
        return read_networks(devices)
    except OSError:
        return None


def read_of_process(pid: int, inode: int, devices: Collection[int], socket: int) -> Networks | None:
    """Return the networks of the namespace with this inode number that a process uses; None: unknown.

    ``socket``: inode number of one of the process's UDP sockets in that namespace.
    """
    folder = Path("/proc", str(pid))
    with contextlib.suppress(OSError):
        for fd in netns.of_process(pid) if os.access(folder / "ns/net", os.R_OK) else ():
            if os.fstat(fd).st_ino == inode:
                with netns.entered(fd):
                    return read_here(devices)
    with contextlib.suppress(OSError, ValueError):
        if _lists(folder / "net/udp", socket) or _lists(folder / "net/udp6", socket):
            return single_addresses(folder / "net")
    return None


def _lists(path: Path, socket: int) -> bool:
    """Return whether a list of sockets contains the socket with this inode number. Raises OSError.

    Reading the number of the namespace itself would need CAP_SYS_PTRACE.
    """
    with path.open() as file:
        return bool(socket) and any(line.split()[9] == str(socket) for line in islice(file, 1, _MAX_LINES))


def read_all(wanted: Mapping[int, Collection[int]], end: float) -> dict[int, Networks]:
    """Return the networks of all namespaces that can be found and entered. ``wanted``: inode number -> devices.

    ``end``: monotonic seconds at which to stop.
    """
    found: dict[int, Networks] = {}
    for fd in netns.everywhere():
        if time.monotonic() > end:
            break
        inode = os.fstat(fd).st_ino
        if inode in wanted:
            with contextlib.suppress(OSError), netns.entered(fd):
                found[inode] = read_networks(wanted[inode])
                if len(found) == len(wanted):
                    break
    return found


def single_addresses(folder: Path) -> Networks | None:
    """Return the networks of a namespace from its files in /proc, if it has at most one address of each family.

    Else, and if it has other local routes, return None: only the kernel knows which source it would select. Raises
    OSError, ValueError.
    """
    single = list(_ipv4(folder / "fib_trie"))
    ipv6 = list(_ipv6(folder / "if_inet6"))
    linked = [index for _, index, is_link in ipv6 if is_link]
    if len(single) > 1 or sum(not is_link for *_, is_link in ipv6) > 1 or len(linked) > len(set(linked)):
        return None
    addresses = [Address(each, 4, "", 0, AddressKind.ADDRESS, 0, is_private(each), "") for each in single]
    addresses += [
        Address(each, 6, "", index, AddressKind.LINK if is_link else AddressKind.ADDRESS, 0, is_private(each), "")
        for each, index, is_link in ipv6
    ]
    return Networks(tuple(addresses), (), frozenset(), frozenset({0}), DEFAULT_PORTS, True)


def _ipv4(path: Path) -> Iterator[str]:
    """Yield each address of the local table. Raises OSError, and ValueError for a local network."""
    address, found = "", set()
    with path.open() as file:
        lines = list(islice(file, _MAX_LINES + 1))
    if len(lines) > _MAX_LINES:
        raise ValueError(f"{path}: more than {_MAX_LINES} lines")
    for line in lines:
        words = line.split()
        if words[:1] == ["|--"]:
            address = words[1]
        elif words[1:] == ["host", "LOCAL"] and not address.startswith("127."):
            if words[0] != "/32":
                raise ValueError(f"{path}: a local network")
            found.add(address)
    yield from sorted(found)


def _ipv6(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (address, index of its interface, whether it is link-local). Raises OSError, ValueError."""
    try:
        with path.open() as file:
            lines = list(islice(file, _MAX_LINES + 1))
    except FileNotFoundError:  # a kernel without IPv6
        return
    if len(lines) > _MAX_LINES:
        raise ValueError(f"{path}: more than {_MAX_LINES} lines")
    for line in lines:
        raw, index, _, scope, _, _ = line.split()
        if int(scope, 16) != 0x10:  # loopback
            yield str(IPv6Address(bytes.fromhex(raw))), int(index, 16), int(scope, 16) == 0x20


@dataclass(slots=True)
class _Kept:
    networks: Networks | None
    until: float  # monotonic seconds
    judged: tuple[object, ...] = ()  # the sockets for which `risks` is true
    judged_at: float = 0.0  # monotonic seconds
    risks: dict[int, Risk] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.networks.addresses) + len(self.networks.peers) if self.networks else 0


class Risks:
    """Judges the sockets of all namespaces, for the agent. It keeps each namespace's networks."""

    def __init__(self) -> None:
        self._home = Path("/proc/thread-self/ns/net").stat().st_ino
        self._kept: dict[int, _Kept] = {}
        self._next_read = 0.0  # monotonic seconds
        self.left_out = 0  # namespaces without room, at the last call

    def __call__(self, sockets: Iterable[UdpSocket], now: float | None = None) -> dict[int, Risk]:
        """Return the risk of each server socket by its cookie, or by its inode number if the cookie is unknown.

        ``now``: monotonic seconds. A client's socket is not among them.
        """
        now = time.monotonic() if now is None else now
        groups: dict[int, list[UdpSocket]] = {}
        for each in sockets:
            groups.setdefault(each.netns, []).append(each)
        self._read(groups, now)
        risks: dict[int, Risk] = {}
        for inode in groups.keys() - self._kept.keys():
            risks |= _risks(groups[inode], None)
        started = time.monotonic()
        for inode in sorted(groups.keys() & self._kept.keys(), key=lambda each: self._kept[each].judged_at):
            known = self._kept[inode]
            if inode == self._home or time.monotonic() - started < JUDGE_SECONDS:
                sockets_now = tuple(map(_options, groups[inode]))
                if sockets_now != known.judged:
                    known.judged, known.risks = sockets_now, _risks(groups[inode], known.networks)
                    known.judged_at = now
            risks |= known.risks if known.judged_at else _risks(groups[inode], None)
        return risks

    def _read(self, groups: Mapping[int, Collection[UdpSocket]], now: float) -> None:
        """Read the namespaces that were not read for the longest time, and forget those without sockets."""
        for gone in self._kept.keys() - groups.keys():
            del self._kept[gone]
        if now < self._next_read:
            return
        until = {inode: self._kept[inode].until if inode in self._kept else 0.0 for inode in groups if inode}
        room = MAX_KEPT - sum(each.size for inode, each in self._kept.items() if inode != self._home)
        started, self.left_out = time.monotonic(), 0
        for inode in sorted((each for each in until if until[each] <= now), key=lambda each: until[each]):
            old = self._kept.pop(inode, None)
            networks = self._networks(inode, groups[inode])
            new = _Kept(networks, now + KEEP_SECONDS)
            if old:
                new.risks, new.judged_at, room = old.risks, old.judged_at, room + old.size
            if inode != self._home:
                if new.size > room / 2:
                    new.networks = None
                    self.left_out += 1
                room -= new.size
            self._kept[inode] = new
            if time.monotonic() - started > READ_SECONDS:
                break
        self._next_read = now + (time.monotonic() - started) * _REST

    def _networks(self, inode: int, group: Collection[UdpSocket]) -> Networks | None:
        devices = {each.device for each in group}
        if inode == self._home:
            return read_here(devices)
        held = next((each for each in group if each.pid), None)
        return read_of_process(held.pid, inode, devices, held.inode) if held else None


def _options(each: UdpSocket) -> tuple[object, ...]:
    """Return what the judgement on a socket depends on, and its numbers."""
    numbers = (each.cookie, each.inode, each.port, each.device, each.address, each.peer, each.process)
    return (*numbers, each.pktinfo, each.pktinfo6, each.only_ipv6, each.transparent, each.named)


def _risks(group: Sequence[UdpSocket], networks: Networks | None) -> dict[int, Risk]:
    return {each.socket.cookie or each.socket.inode: each.risk for each in judge(group, networks)}
