"""Asking conntrack over netlink, where the packet's own entry may not be read.

Asked rarely (once a suspected flow), so pyroute2's convenience costs nothing that matters.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from udpwatch.agent.kernel import netns
from udpwatch.agent.model import Finding, Flow

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_wrong(finding: Finding, flow: Flow, pid: int) -> bool | None:
    """Whether a suspected reply is wrong: True, or False where NAT turned its source back; None: cannot tell.

    The peer expects an answer from S:port exactly if conntrack holds a flow whose original direction is peer ->
    S:port. A lookup by tuple finds an entry by either of its directions, so the wrong reply's own entry answers
    too; in that one the original direction starts at S.
    """
    try:
        with netns.entered_by_cookie(finding.netns, pid) as found:
            if not found:
                return None
            opener = _opener(flow, finding)
    except OSError:
        return None
    return opener != (ipaddress.ip_address(flow.peer), flow.peer_port)


def _opener(flow: Flow, finding: Finding) -> tuple[_Address, int] | None:
    """Who sent first in the flow between the peer and the source that left; None where conntrack has none."""
    family = socket.AF_INET6 if finding.family == 6 else socket.AF_INET
    wanted = NFCTAttrTuple(
        family=family,
        saddr=flow.peer,
        daddr=finding.actual,
        proto=socket.IPPROTO_UDP,
        sport=flow.peer_port,
        dport=flow.source_port,
    )
    with NFCTSocket(nfgen_family=family) as conntrack:
        try:
            entries = conntrack.entry("get", tuple_orig=wanted)
        except NetlinkError as error:
            if error.code == errno.ENOENT:
                return None
            raise OSError(error.code, f"conntrack: {os.strerror(error.code)}") from None
    for entry in entries:
        original = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
        return ipaddress.ip_address(original.saddr), original.sport
    return None
