"""Ask conntrack over netlink about suspected replies, where programs cannot read its entries."""

from __future__ import annotations

import contextlib
import os
import time

from udpwatch.agent.kernel import netns
from udpwatch.agent.kernel.ctnetlink import SEEN_REPLY, Entry, Table
from udpwatch.agent.kernel.routes import route_to
from udpwatch.agent.model import Conversation, Finding, Tuple

MAX_NAMESPACES = 10_000
MISSING_SECONDS = 5.0


class Conntrack:
    """Decide suspected replies; remember for each namespace whether conntrack works there."""

    def __init__(self) -> None:
        self._at_work: set[int] = set()
        self._missing: dict[int, float] = {}

    def is_wrong(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        """Return True if a suspected reply is wrong, False if it was NAT, and None if conntrack cannot tell.

        Two lookups by tuple; conntrack finds an entry by either of its directions.

        1. peer -> the source of the reply. If the peer began the entry, it asked this source, and NAT restored it. If
           this host began the entry and the peer answered, it is a conversation of this host, behind source NAT if it
           begins at the expected address; otherwise the reply may continue that conversation or answer a request in it.
           Any other entry is the wrong reply's own.
        2. the expected address -> peer, the expected reply. If the entry exists, the request is known, and no reply
           from another source belongs to it.

        If neither exists, a namespace without any entry has no NAT. Elsewhere the entry may have been deleted or be in
        another zone, so the reply is undecided.
        """
        try:
            if finding.netns:
                return self._ask_in(finding, reply, pid)
            return self._ask_everywhere(finding, reply, pid)
        except OSError:
            return None

    def _ask_in(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        # Searching all of /proc for a namespace that is gone is expensive, so it is not repeated for each reply.
        now = time.monotonic()
        everywhere = now >= self._missing.get(finding.netns, 0)
        with netns.entered_by_cookie(finding.netns, pid, everywhere) as found:
            if found:
                # Use the cookie: unlike an inode number, it is never reused.
                return self._ask(finding, reply, finding.netns)
        if everywhere:
            if len(self._missing) >= MAX_NAMESPACES:
                self._missing.clear()
            self._missing[finding.netns] = now + MISSING_SECONDS
        return None

    def _ask_everywhere(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        """Ask the conntrack of each namespace that the process uses, if the kernel does not report the namespace.

        The answers must agree. One namespace without entries among several has no answer.
        """
        with contextlib.ExitStack() as held:
            namespaces = []
            for fd in netns.of_process(pid):
                namespaces.append(os.dup(fd))
                held.callback(os.close, namespaces[-1])
            opinions = set()
            for fd in namespaces:
                with netns.entered(fd):
                    opinions.add(self._ask(finding, reply, os.fstat(fd).st_ino, len(namespaces) > 1))
        opinions.discard(None)
        return opinions.pop() if len(opinions) == 1 else None

    def _ask(self, finding: Finding, reply: Conversation, here: int, one_of_several: bool = False) -> bool | None:
        with Table() as table:
            entry = table.lookup(Tuple(reply.peer, reply.peer_port, finding.actual, reply.source_port))
            if entry:
                self._remember(here)
                return _judge(entry, finding, reply)
            entry = table.lookup(Tuple(finding.expected, finding.port, reply.peer, reply.peer_port))
            if entry:
                self._remember(here)
                asked = entry.original
                return (asked.destination, asked.destination_port) != (finding.actual, reply.source_port)
            if here not in self._at_work and table.entries() == 0:
                return None if one_of_several else not _is_broadcast(finding.expected)
            self._remember(here)
            return None

    def _remember(self, namespace: int) -> None:
        if len(self._at_work) >= MAX_NAMESPACES:
            self._at_work.clear()
        self._at_work.add(namespace)


def _judge(entry: Entry, finding: Finding, reply: Conversation) -> bool | None:
    """Decide like `Conntrack.is_wrong`, by the entry that has the suspected reply."""
    opener = entry.original
    if (opener.source, opener.source_port) == (reply.peer, reply.peer_port) or _is_broadcast(finding.expected):
        return False
    if not entry.status & SEEN_REPLY:
        return True
    return False if opener.source == finding.expected else None


def _is_broadcast(address: str) -> bool:
    """Return whether the route to an address, in this namespace, is a broadcast route."""
    route = route_to(address) if ":" not in address else None
    return route is not None and route.is_group
