"""`udpwatch audit`: which UDP servers of this node will reply from the wrong address, to whom, and how to fix them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from udpwatch.agent.client import audit_text, follow
from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.errors import CannotRun
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.model import Risk, Snapshot, UdpSocket
from udpwatch.agent.servers.audit import (
    AT_RISK,
    ServerRisk,
    families_of,
    is_server,
    judge,
    servers_of,
    servers_of_agent,
)
from udpwatch.agent.servers.held import held_sockets
from udpwatch.agent.servers.inventory import list_all
from udpwatch.agent.servers.namespaces import AUDIT_SECONDS, read_all, read_of_process
from udpwatch.agent.servers.networks import Networks
from udpwatch.agent.servers.owners import owner_key, owners

NOTHING, RISK, CANNOT_TELL = 0, 1, 77


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to print."""
    parser.description = (
        "List the UDP servers of this node that will reply from the wrong address: the addresses, the peers, and how "
        "to fix them. A running agent adds the wrong replies that it has seen. Needs root."
    )
    parser.epilog = (
        "exit status: 0 no server is at risk, 1 a server is at risk, 2 wrong usage, 77 it cannot be determined here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/audit.md)")
    parser.add_argument("--all", action="store_true", help="list the servers that are not at risk, too")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Print the report. Raises UdpwatchError."""
    snapshot, notes = _seen(parsed.connect)
    try:
        servers, more_notes = examine(snapshot)
        notes += more_notes
    except CannotRun as error:
        if snapshot is None or not snapshot.servers:
            raise
        servers = servers_of_agent(snapshot.servers, snapshot.rows)
        notes.append(f"{error}; this is what the agent knows, without addresses and clients")
    if parsed.json:
        print(json.dumps(audit_text.report_object(servers, notes, parsed.all)))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(audit_text.report_text(servers, parsed.all, colour))
        sys.stdout.flush()
        for note in notes:
            print(f"udpwatch: {note}", file=sys.stderr)
    if any(server.risk in AT_RISK for server in servers):
        return RISK
    return CANNOT_TELL if any(server.risk is Risk.UNKNOWN for server in servers) else NOTHING


def examine(snapshot: Snapshot | None) -> tuple[list[ServerRisk], list[str]]:
    """Return the judgement on each server of this node, and what could not be examined. Raises UdpwatchError.

    ``snapshot``: the agent's.
    """
    rows, counted = (snapshot.rows, snapshot.servers) if snapshot else ((), ())
    sockets, listing_notes = _sockets()
    groups: dict[int, list[UdpSocket]] = {}
    for each in sockets:
        groups.setdefault(each.netns, []).append(each)
    networks = _networks(groups)
    busy = {row.port for row in rows}
    judged = [each for inode, group in groups.items() for each in judge(group, networks.get(inode), busy)]
    senders = owners(each.socket for each in judged)
    servers = servers_of(((each, senders[owner_key(each.socket)]) for each in judged), rows, counted)
    notes = listing_notes + _notes([each.socket for each in judged], groups, networks)
    return servers, notes


def _sockets() -> tuple[list[UdpSocket], list[str]]:
    """Return the sockets of all namespaces, and what is missing. Raises CannotRun."""
    missing = {Capability.SYS_ADMIN, Capability.SYS_PTRACE} - capabilities.effective()
    if missing:
        names = " and ".join(sorted(map(str, missing)))
        raise CannotRun(f"cannot examine the sockets of other processes: {names} missing; run this as root")
    try:
        listed = list_all()
    except OSError as error:
        raise CannotRun(f"cannot list sockets: {error.strerror or error}") from None
    if all(each.pktinfo is not None for each in listed.sockets):
        return list(listed.sockets), list(listed.notes)
    # Without BPF iterators, each socket is asked itself.
    held = {each.inode: each for each in held_sockets().sockets}
    return [held.get(each.inode, each) for each in listed.sockets], []


def _seen(path: str | None) -> tuple[Snapshot | None, list[str]]:
    """Return the snapshot of the running agent, and a note if there is none. Raises UdpwatchError."""
    where = Path(path or DEFAULT_SOCKET)
    try:
        with follow.translated_errors(where), Client(where) as client:
            return client.snapshot(), []
    except follow.NoAgent as error:
        if path:
            raise
        reason = "no agent is running" if not where.exists() else str(error)
        return None, [f"{reason}: wrong replies that servers have already sent are unknown"]


def _networks(groups: dict[int, list[UdpSocket]]) -> dict[int, Networks]:
    """Read the networks of each namespace that has a server."""
    wanted = {
        inode: {each.device for each in group}
        for inode, group in groups.items()
        if any(families_of(each) and is_server(each) for each in group)
    }
    end = time.monotonic() + AUDIT_SECONDS
    found = read_all(wanted, end)
    for inode in wanted.keys() - found.keys():
        if time.monotonic() > end:
            break
        held = next((each for each in groups[inode] if each.pid), None)
        networks = read_of_process(held.pid, inode, wanted[inode], held.inode) if held else None
        if networks:
            found[inode] = networks
    return found


def _notes(
    servers: Sequence[UdpSocket], groups: dict[int, list[UdpSocket]], networks: dict[int, Networks]
) -> list[str]:
    """Return what could not be examined, and what is needed for it."""
    notes = []
    hint = "run this as root, outside of a container" if os.geteuid() else "see the table in docs/audit.md"
    closed = [inode for inode in {each.netns for each in servers if families_of(each)} if inode not in networks]
    if closed:
        notes.append(f"cannot read the addresses of {len(closed)} of {len(groups)} network namespaces; {hint}")
    if blind := sum(bool(families_of(each)) and each.pktinfo is None for each in servers):
        notes.append(f"cannot read whether PKTINFO is set on {blind} of {len(servers)} sockets; {hint}")
    if unknown := sum(not each.pid and not each.kernel for each in servers):
        notes.append(f"cannot find the process of {unknown} of {len(servers)} sockets; {hint}")
    return notes
