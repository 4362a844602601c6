"""`udpwatch heal`: shows and switches what the running agent heals."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.follow import NoAgent, translated_errors
from udpwatch.agent.client.heal_text import status_text
from udpwatch.agent.commands.arguments import port
from udpwatch.agent.errors import UdpwatchError, UsageError
from udpwatch.agent.model import Snapshot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and the ports."""
    parser.description = (
        "Show, switch on or switch off the healing of replies, at once and until the agent restarts. Without PORT, on "
        "heals what the agent's settings select, and off heals nothing at all. Only root may switch."
    )
    actions = ["status", "on", "off"]
    parser.add_argument("action", nargs="?", default="status", choices=actions, help="what to do [status]")
    parser.add_argument("ports", nargs="*", type=_ports, metavar="PORT", help="switch only these server ports: 53,161")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Do it, and print the result. Exit status 1: nothing can be healed. Raises UdpwatchError."""
    path = Path(parsed.connect or DEFAULT_SOCKET)
    on = None if parsed.action == "status" else parsed.action == "on"
    ports = [each for some in parsed.ports for each in some]
    if on is None and ports:
        raise UsageError("udpwatch heal status takes no PORT: it shows every port")
    try:
        with translated_errors(path), Client(path) as client:
            healing = client.heal(on, ports)
            snapshot = client.snapshot()
    except NoAgent as error:
        if on is not None and os.geteuid():
            raise UdpwatchError(f"cannot switch healing {parsed.action}: run this as root") from None
        raise error
    for number in ports if on else ():
        _warn_without_server(number, snapshot)
    if parsed.json:
        print(json.dumps(asdict(healing) | {"healed": list(map(asdict, snapshot.healed_rows))}, separators=(",", ":")))
    else:
        print(status_text(healing, snapshot))
    return 1 if healing.reason and on is not False else 0


def _warn_without_server(number: int, snapshot: Snapshot) -> None:
    """Warn of a port that may be a typing error. The agent lists a server some seconds after it has started."""
    if all(server.port != number for server in snapshot.servers):
        print(f"udpwatch: no server on port {number}/udp is known so far", file=sys.stderr)


def _ports(text: str) -> list[int]:
    return [port(each) for each in text.split(",")]
