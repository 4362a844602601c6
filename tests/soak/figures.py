"""What the agent, its clients and the kernel hold: memory, descriptors, threads, BPF objects, pins, cgroups, links."""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from machine import memory_kib

from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.bpf import Command

_KINDS = {"prog_id": "programs", "map_id": "maps", "link_id": "links"}
_FD_BY_ID = {
    "programs": Command.PROG_GET_FD_BY_ID,
    "maps": Command.MAP_GET_FD_BY_ID,
    "links": Command.LINK_GET_FD_BY_ID,
}
#: how much more later looks may show: the responder opens sockets as it needs them, and pods come and go
ALLOWED = {
    "memory_kib": 1536,
    "top_kib": 4096,
    "descriptors": 10,
    "threads": 1,
    "namespaces": 2,
    "dying_cgroups": 5,
    "node_links": 4,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One look. Sizes in KiB."""

    memory_kib: int
    top_kib: int
    descriptors: int
    threads: int
    programs: int
    maps: int
    links: int
    namespaces: int  # descriptors of network namespaces
    pins: int
    dying_cgroups: int
    node_links: int  # interfaces of the node, one for each living pod


@dataclass(slots=True)
class Objects:
    """The BPF objects that agents of this run have held, by kind."""

    ids: dict[str, set[int]] = field(default_factory=lambda: {kind: set() for kind in _KINDS.values()})

    def look(self, pid: int) -> dict[str, int]:
        """Return how many of each kind a process holds."""
        held: dict[str, set[int]] = {kind: set() for kind in _KINDS.values()}
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):  # it was closed
                text = info.read_text()
                for key, value in re.findall(r"^(\w+_id):\s+(\d+)$", text, re.MULTILINE):
                    # A link's descriptor names its program, too.
                    if key in _KINDS and (key == "link_id" or "link_id" not in text):
                        held[_KINDS[key]].add(int(value))
        for kind, ids in held.items():
            self.ids[kind] |= ids
        return {kind: len(ids) for kind, ids in held.items()}

    def left(self) -> list[str]:
        """Return those that still exist."""
        return [f"{kind} {number}" for kind, ids in self.ids.items() for number in sorted(ids) if exists(kind, number)]


def exists(kind: str, number: int) -> bool:
    """Return whether there is a BPF object with this id. The kernel does not use an id again soon."""
    try:
        os.close(_opened(kind, number))
    except FileNotFoundError:
        return False
    return True


def detach(link: int) -> None:
    """Detach the program of a link with this id."""
    fd = _opened("links", link)
    try:
        bpf.link_detach(fd)
    finally:
        os.close(fd)


def _opened(kind: str, number: int) -> int:
    return bpf.bpf(_FD_BY_ID[kind], ctypes.create_string_buffer(struct.pack("=III", number, 0, 0), 128))


def look(pid: int, top: int, objects: Objects, state: Path, cgroup: Path, node_links: int) -> Figures:
    """Read the figures of an agent and of a `udpwatch top`."""
    process = Path(f"/proc/{pid}")
    descriptors = [_target(each) for each in (process / "fd").iterdir()]
    dying = re.search(r"^nr_dying_descendants (\d+)$", (cgroup / "cgroup.stat").read_text(), re.MULTILINE)
    assert dying
    return Figures(
        memory_kib=memory_kib(pid, "VmRSS"),
        top_kib=memory_kib(top, "VmRSS"),
        descriptors=len(descriptors),
        threads=len(list((process / "task").iterdir())),
        namespaces=sum(each.startswith("net:[") for each in descriptors),
        pins=sum(len(files) for _, _, files in os.walk(state)),
        dying_cgroups=int(dying.group(1)),
        node_links=node_links,
        **objects.look(pid),
    )


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # it was closed
        return ""


def growth(before: Sequence[Figures], after: Sequence[Figures]) -> list[str]:
    """Return what grew from some looks to later ones, by their medians."""
    found = []
    for each in fields(Figures):
        then, now = (statistics.median(getattr(look, each.name) for look in looks) for looks in (before, after))
        if now - then > ALLOWED.get(each.name, 0):
            found.append(f"{each.name} grew from {then:g} to {now:g}")
    return found
