"""Find the processes that hold sockets, for commands, which look up each process once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from udpwatch.agent.attribution.budget import Unlimited
from udpwatch.agent.attribution.sender import Roots, Senders
from udpwatch.agent.errors import CannotRun
from udpwatch.agent.kernel import cgroup
from udpwatch.agent.model import Sender, UdpSocket

_Owner = tuple[int, str, int]  # process id, name, cgroup id


def owners(sockets: Iterable[UdpSocket]) -> dict[_Owner, Sender]:
    """Return the process, container and pod of each socket, by `owner_key`."""
    with contextlib.ExitStack() as opened:
        root = None
        with contextlib.suppress(CannotRun, OSError):
            found = cgroup.find(None)
            opened.callback(found.close)
            root = Path(f"/proc/{os.getpid()}/fd/{found.fd}")
        senders = Senders(Roots(cgroup=root), budget=Unlimited())
        known: dict[_Owner, Sender] = {}
        for each in sockets:
            key = owner_key(each)
            if key not in known:
                known[key] = senders.sender_of(*key, each.netns)
        return known


def owner_key(each: UdpSocket) -> _Owner:
    """Return what identifies the process of a socket."""
    return each.pid, each.process, each.cgroup
