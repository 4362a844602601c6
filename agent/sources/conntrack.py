"""Asking conntrack over netlink about suspected replies, where the packet's own entry may not be read."""

from __future__ import annotations

import contextlib
import os
import time

from udpwatch.agent.kernel import netns
from udpwatch.agent.kernel.ctnetlink import SEEN_REPLY, Entry, Table
from udpwatch.agent.kernel.netlink import route_to
from udpwatch.agent.model import Conversation, Finding, Tuple

MAX_NAMESPACES = 10_000
MISSING_SECONDS = 5.0


class Conntrack:
    """Decides suspected replies; remembers of each namespace whether conntrack is at work there."""

    def __init__(self) -> None:
        self._at_work: set[int] = set()
        self._missing: dict[int, float] = {}

    def is_wrong(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        """Whether a suspected reply is wrong: True, or False where it was NAT; None: it cannot be told.

        Two questions, by tuple; conntrack finds an entry by either of its directions.

        1. peer -> the source that left. Found, and begun by the peer: that is whom it asked, NAT turned the source
           back. Found, begun here and answered: our own conversation, behind source NAT if it begins at the address
           that was asked; else it may go on, or a request be answered in it. Found otherwise: the wrong reply's own
           entry.
        2. the address asked -> peer, the answer that was due. Found: the request is known, and no answer from the
           other source belongs to it.

        Where neither is known, NAT cannot have been at work in a namespace without any entry; elsewhere the entry may
        have been deleted or lie in another zone: then nothing is claimed.
        """
        try:
            if finding.netns:
                return self._ask_in(finding, reply, pid)
            return self._ask_everywhere(finding, reply, pid)
        except OSError:
            return None

    def _ask_in(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        # A namespace that is gone is looked for in all of /proc: not again for each of its replies.
        now = time.monotonic()
        everywhere = now >= self._missing.get(finding.netns, 0)
        with netns.entered_by_cookie(finding.netns, pid, everywhere) as found:
            if found:
                # A cookie is never used again, an inode number soon is.
                return self._ask(finding, reply, finding.netns)
        if everywhere:
            if len(self._missing) >= MAX_NAMESPACES:
                self._missing.clear()
            self._missing[finding.netns] = now + MISSING_SECONDS
        return None

    def _ask_everywhere(self, finding: Finding, reply: Conversation, pid: int) -> bool | None:
        """The kernel did not tell the namespace: each that the process has to do with is asked, none may contradict.

        That one of several has no entries says nothing.
        """
        with contextlib.ExitStack() as held:
            namespaces = []
            for fd in netns.of_process(pid):
                namespaces.append(os.dup(fd))
                held.callback(os.close, namespaces[-1])
            answers = set()
            for fd in namespaces:
                with netns.entered(fd):
                    answers.add(self._ask(finding, reply, os.fstat(fd).st_ino, len(namespaces) > 1))
        answers.discard(None)
        return answers.pop() if len(answers) == 1 else None

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
    """As `Conntrack.is_wrong`, by the entry that the suspected reply belongs to; in its namespace."""
    opener = entry.original
    if (opener.source, opener.source_port) == (reply.peer, reply.peer_port) or _is_broadcast(finding.expected):
        return False
    if not entry.status & SEEN_REPLY:
        return True
    return False if opener.source == finding.expected else None


def _is_broadcast(address: str) -> bool:
    """Whether the route to it says so, here: what mode packet reads from the request itself."""
    route = route_to(address) if ":" not in address else None
    return route is not None and route.is_group
