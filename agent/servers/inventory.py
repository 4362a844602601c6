"""List the UDP sockets of the node.

Rules
1. The agent reads the sockets that the programs of bpf/inventory.c have noted, in all namespaces: those that were bound
   since it started, and, if it could enter their namespace when it started, older ones. Without these programs it
   lists those of its own namespace by an iterator, else by sock_diag.
2. A command reads each namespace that it may enter.
3. Memory and time are bounded: at most MAX_SOCKETS are listed, a namespace may have as many as are left for others,
   and the rest is counted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import bpf, netns, sock_diag
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.loader import load_inventory
from udpwatch.agent.kernel.records import INODE, NETNS, PORT, SOCKET_BYTES, decode_socket, printable
from udpwatch.agent.model import UdpSocket

MAX_SOCKETS = 16_384
HOLDERS_SECONDS = 30.0  # how often the processes of sockets are looked for
MAX_DESCRIPTORS = 4_096  # of one process that are read


@dataclass(frozen=True, slots=True)
class Listed:
    """The sockets of the node, and what is missing."""

    sockets: tuple[UdpSocket, ...]
    left_out: int = 0  # sockets beyond the limit
    notes: tuple[str, ...] = ()  # what could not be read, one line each


class Inventory:
    """Lists sockets for the agent. Not thread-safe."""

    def __init__(self, links: dict[str, int], proc: Path = Path("/proc"), pace: Callable[[], None] = unpaced) -> None:
        """Use the descriptors of the iterators, by name; the caller closes them. ``pace`` is called between small
        pieces of work, and may pause.
        """
        self._links, self._proc, self._pace = links, proc, pace
        self._known: dict[bytes, UdpSocket] = {}  # by record: most are as they were
        self._holders: dict[int, tuple[int, str]] = {}
        self._looked_at = -HOLDERS_SECONDS
        self._home = Path("/proc/thread-self/ns/net").stat().st_ino
        self.left_out = 0  # sockets beyond the limit, at the last call
        with contextlib.suppress(OSError):
            self.read()  # the agent will drop the capability to look for the processes of older sockets

    def read(self) -> tuple[UdpSocket, ...]:
        """Return the sockets of servers: those whose port was named by bind(), as far as that is known.

        Raises OSError.
        """
        room = _Room()
        sockets = [each for each in self._read(room) if each.named is not False]
        self.left_out = room.left_out
        if self._look_for_holders(sockets):
            self._known = {raw: self._with_holder(each) for raw, each in self._known.items()}
            sockets = [self._with_holder(each) for each in sockets]
        return tuple(sockets)

    def _read(self, room: _Room) -> Iterator[UdpSocket]:
        names = ["noted_sockets", *([] if "adopt_sockets" in self._links else ["sockets_here"])]
        links = [self._links[name] for name in names if name in self._links]
        if not links:
            found = sock_diag.list_sockets(self._home)
            yield from (self._with_holder(each) for each in found if room.has(each.netns))
            return
        before, self._known = self._known, {}
        seen = set[int]()  # inode numbers: a socket may be in both lists
        for raw in itertools.chain.from_iterable(map(_records, links)):
            self._pace()
            if len(links) > 1 and (inode := _number(raw, INODE)):  # the kernel's own have none
                if inode in seen:
                    continue
                seen.add(inode)
            if not room.has(_number(raw, NETNS)):  # decoding takes most of the time
                continue
            each = before.get(raw)
            if each is None:
                each = self._with_holder(decode_socket(raw))
            self._known[raw] = each
            yield each

    def _look_for_holders(self, sockets: list[UdpSocket]) -> bool:
        """Look for the processes of sockets that were bound before the agent started; return whether it was done."""
        unknown = {each.inode for each in sockets if not each.pid and each.inode}
        now = time.monotonic()
        if not unknown - self._holders.keys() or now - self._looked_at < HOLDERS_SECONDS:
            return False
        self._looked_at = now
        listed = {each.inode for each in sockets}
        known = {inode: holder for inode, holder in self._holders.items() if inode in listed and holder[0]}
        self._holders = dict.fromkeys(unknown, (0, "")) | known | find_holders(unknown, self._proc, self._pace)
        return True

    def _with_holder(self, each: UdpSocket) -> UdpSocket:
        """Add the process of a socket that was bound before the agent started."""
        pid, process = (0, "") if each.pid else self._holders.get(each.inode, (0, ""))
        return replace(each, pid=pid, process=process) if pid else each


def list_all(cache: Path | None = None, port: int | None = None) -> Listed:
    """List the sockets of all namespaces that can be entered, for a command. A process that holds each one is added.
    With ``port``, only the sockets of that port are listed.

    Raises OSError if not even this namespace's sockets can be listed.
    """
    notes = []
    with contextlib.ExitStack() as opened:
        link = None
        try:
            loaded = load_inventory(cache=cache)
            for group in (loaded.links, loaded.programs, loaded.maps):
                for descriptor in group.values():
                    opened.callback(os.close, descriptor)
            link = loaded.links.get("sockets_here")
            reason = loaded.refused.get("sockets_here", "")
        except (CannotRun, UdpwatchError) as error:
            reason = str(error)
        if link is None:
            notes.append(f"whether sockets have PKTINFO set is unknown: {reason}")
        room = _Room()
        sockets = list(_of_all_namespaces(link, port, notes, room))
    holders = find_holders({each.inode for each in sockets if each.inode})
    with_holders = (
        replace(each, pid=holders[each.inode][0], process=holders[each.inode][1]) if each.inode in holders else each
        for each in sockets
    )
    if room.left_out:
        notes.append(f"{room.left_out} sockets are not listed: there are more than {MAX_SOCKETS}")
    return Listed(tuple(with_holders), room.left_out, tuple(notes))


def _of_all_namespaces(link: int | None, port: int | None, notes: list[str], room: _Room) -> Iterator[UdpSocket]:
    """Yield the sockets of each namespace for which there is room."""
    refused = 0
    for fd in netns.everywhere(thorough=True):
        try:
            with netns.entered(fd):
                inode = os.fstat(fd).st_ino
                # Read all before the caller goes on, which is not to run in this namespace.
                sockets, more = _of_port(link, port) if link is not None else _by_netlink(inode, port)
        except OSError:
            refused += 1
            continue
        room.left_out += more
        yield from (each for each in sockets if room.has(each.netns))
    if refused:
        notes.append(f"{refused} network namespaces cannot be entered: run as root, or add CAP_SYS_ADMIN")


def _of_port(link: int, port: int | None) -> tuple[list[UdpSocket], int]:
    """Return the sockets that an iterator lists, of a port or all, and how many more there are."""
    records = _records(link)
    if port is not None:
        records = (each for each in records if _number(each, PORT) == port)
    return list(map(decode_socket, itertools.islice(records, MAX_SOCKETS))), sum(1 for _ in records)


def _by_netlink(inode: int, port: int | None) -> tuple[list[UdpSocket], int]:
    found = (each for each in sock_diag.list_sockets(inode) if port in (None, each.port))
    return list(itertools.islice(found, MAX_SOCKETS)), sum(1 for _ in found)


def _records(link: int) -> Iterator[bytes]:
    for piece in bpf.iterator_read(link):
        for at in range(0, len(piece), SOCKET_BYTES):
            yield piece[at : at + SOCKET_BYTES]


class _Room:
    """Room for MAX_SOCKETS. A namespace may have as many as are left for others."""

    def __init__(self) -> None:
        self._kept = 0
        self._held: dict[int, int] = {}  # by inode number of the namespace
        self.left_out = 0

    def has(self, netns: int) -> bool:
        """Take the place of a socket, if there is one."""
        mine = self._held.get(netns, 0)
        if mine >= MAX_SOCKETS - self._kept:
            self.left_out += 1
            return False
        self._held[netns] = mine + 1
        self._kept += 1
        return True


def _number(raw: bytes, place: tuple[int, int]) -> int:
    """Return a number of a socket's record; ``place``: its offset, and the offset of what follows."""
    return int.from_bytes(raw[slice(*place)], sys.byteorder)


def find_holders(
    inodes: set[int], proc: Path = Path("/proc"), pace: Callable[[], None] = unpaced
) -> dict[int, tuple[int, str]]:
    """Return a process that holds each socket: inode number -> (process id, name). Of several, the oldest one.

    Processes of other users need CAP_SYS_PTRACE; they are left out without it.
    """
    found: dict[int, tuple[int, str]] = {}
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in sorted(int(each) for each in _entries(str(proc)) if each.isdigit()):
        if len(found) == len(inodes):
            break
        name, folder = "", f"{proc}/{pid}/fd"
        for held in _entries(folder, MAX_DESCRIPTORS):
            pace()
            try:
                inode = wanted.get(os.readlink(f"{folder}/{held}"))  # noqa: PTH115 pathlib takes three times as long
                if inode is not None and inode not in found:
                    name = name or printable((proc / str(pid) / "comm").read_bytes().strip())
                    found[inode] = pid, name
            except OSError:
                continue  # it was closed
    return found


def _entries(folder: str, most: int | None = None) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, most)]
    except OSError:
        return []
