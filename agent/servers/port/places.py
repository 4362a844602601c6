"""Find the network namespaces of this machine, and a name for each.

A namespace is found by its name (`ip netns`), by Docker's, or by a process in it. One that only a descriptor holds is
not found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.attribution.container import parse
from udpwatch.agent.attribution.process import cgroups_of

_OWN = Path("/proc/thread-self/ns/net")
_NAMED = (Path("/run/netns"), Path("/run/docker/netns"))


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace."""

    inode: int
    name: str
    path: Path  # to open it by
    here: bool = False  # this process is in it


@dataclass(frozen=True, slots=True)
class Places:
    """The network namespaces that were found."""

    found: tuple[Place, ...]  # the one of this process is the first
    hidden: int  # processes whose namespace this user may not see


def places() -> Places:
    """Return the network namespaces of this machine. Raises OSError if even its own cannot be read."""
    here = _OWN.stat().st_ino
    found = {here: Place(here, "this network namespace", _OWN, True)}
    for folder in _NAMED:
        for path in sorted(_entries(folder)):
            with contextlib.suppress(OSError):
                inode = path.stat().st_ino
                found.setdefault(inode, Place(inode, f"namespace {path.name}", path))
    hidden = 0
    for process in sorted((each for each in _entries(Path("/proc")) if each.name.isdecimal()), key=_number):
        try:
            inode = (process / "ns/net").stat().st_ino
        except FileNotFoundError:
            continue  # it has ended
        except OSError:
            hidden += 1
            continue
        if inode not in found:
            with contextlib.suppress(OSError):
                found[inode] = Place(inode, _name(process), process / "ns/net")
    return Places(tuple(found.values()), hidden)


def container_of(pid: int) -> str:
    """Return the short id of the container of a process, or ""."""
    try:
        paths = cgroups_of(Path(f"/proc/{pid}/cgroup"))
    except OSError:
        return ""
    return next((found[:12] for found in (parse(path).id for path in paths) if found), "")


def _name(process: Path) -> str:
    comm = (process / "comm").read_text(errors="replace").strip()
    if process.name == "1" or comm == "kthreadd":
        return "the host's network namespace"
    container = container_of(int(process.name))
    owner = f"container {container}" if container else comm
    return f"the network namespace of {owner} (pid {process.name})"


def _number(path: Path) -> int:
    return int(path.name)


def _entries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from folder.iterdir()
