"""Asking conntrack over netlink, where the packet's own entry may not be read.

Asked rarely (once a suspected flow), so pyroute2's convenience costs nothing that matters.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from udpwatch.agent.kernel import netns
from udpwatch.agent.model import Finding, Flow

MAX_NAMESPACES = 10_000
MISSING_SECONDS = 5.0
RTN_BROADCAST = 3  # include/uapi/linux/rtnetlink.h
SEEN_REPLY = 2  # IPS_SEEN_REPLY, include/uapi/linux/netfilter/nf_conntrack_common.h

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Conntrack:
    """Decides suspected replies; remembers of each namespace whether conntrack is at work there."""

    def __init__(self) -> None:
        self._at_work: set[int] = set()
        self._missing: dict[int, float] = {}

    def is_wrong(self, finding: Finding, flow: Flow, pid: int) -> bool | None:
        """Whether a suspected reply is wrong: True, or False where it was NAT; None: it cannot be told.

        Two questions, by tuple; conntrack finds an entry by either of its directions.

        1. peer -> the source that left. Found, and begun by the peer: that is whom it asked, NAT turned the source
           back. Found, begun here and answered: our own conversation behind source NAT. Found otherwise: the wrong
           reply's own entry.
        2. the address asked -> peer, the answer that was due. Found: the request is known, and no answer from the
           other source belongs to it.

        Where neither is known, NAT cannot have been at work in a namespace without any entry; elsewhere the entry may
        have been deleted or lie in another zone: then nothing is claimed.
        """
        # A namespace that is gone is looked for in all of /proc: not again for each of its replies.
        now = time.monotonic()
        everywhere = now >= self._missing.get(finding.netns, 0)
        try:
            with netns.entered_by_cookie(finding.netns, pid, everywhere) as found:
                if found:
                    return self._ask(finding, flow)
        except OSError:
            return None
        if everywhere:
            if len(self._missing) >= MAX_NAMESPACES:
                self._missing.clear()
            self._missing[finding.netns] = now + MISSING_SECONDS
        return None

    def _ask(self, finding: Finding, flow: Flow) -> bool | None:
        peer = (ipaddress.ip_address(flow.peer), flow.peer_port)
        family = socket.AF_INET6 if finding.family == 6 else socket.AF_INET
        # A cookie is never used again, an inode number soon is.
        here = finding.netns or Path("/proc/thread-self/ns/net").stat().st_ino
        with NFCTSocket(nfgen_family=family) as table:
            entry = _lookup(table, family, (flow.peer, flow.peer_port), (finding.actual, flow.source_port))
            if entry:
                self._remember(here)
                if entry.opener == peer or _is_broadcast(finding.expected):
                    return False
                return not (entry.answered and entry.opener[0] == ipaddress.ip_address(finding.expected))
            entry = _lookup(table, family, (finding.expected, finding.port), (flow.peer, flow.peer_port))
            if entry:
                self._remember(here)
                return entry.asked != (ipaddress.ip_address(finding.actual), flow.source_port)
            if here not in self._at_work and _entries(table) == 0:
                return not _is_broadcast(finding.expected)
            self._remember(here)
            return None

    def _remember(self, namespace: int) -> None:
        if len(self._at_work) >= MAX_NAMESPACES:
            self._at_work.clear()
        self._at_work.add(namespace)


@dataclass(frozen=True, slots=True)
class _Entry:
    opener: tuple[_Address, int]  # who sent first
    asked: tuple[_Address, int]  # to whom
    answered: bool


def _lookup(table: NFCTSocket, family: int, source: tuple[str, int], destination: tuple[str, int]) -> _Entry | None:
    """The UDP entry of which this is one direction; None where there is none."""
    wanted = NFCTAttrTuple(
        family=family,
        saddr=source[0],
        daddr=destination[0],
        proto=socket.IPPROTO_UDP,
        sport=source[1],
        dport=destination[1],
    )
    try:
        entries = table.entry("get", tuple_orig=wanted)
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return None
        raise OSError(error.code, f"conntrack: {os.strerror(error.code)}") from None
    for entry in entries:
        original = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
        return _Entry(
            opener=(ipaddress.ip_address(original.saddr), original.sport),
            asked=(ipaddress.ip_address(original.daddr), original.dport),
            answered=bool((entry.get_attr("CTA_STATUS") or 0) & SEEN_REPLY),
        )
    return None


def _is_broadcast(address: str) -> bool:
    """Whether the route to it says so, here: what mode packet reads from the request itself."""
    if ":" in address:
        return False
    with IPRoute() as route:
        return any(found["type"] == RTN_BROADCAST for found in route.route("get", dst=address))


def _entries(table: NFCTSocket) -> int:
    """How many entries the namespace has."""
    count: int = table.count()[0].get_attr("CTA_STATS_GLOBAL_ENTRIES")
    return count
