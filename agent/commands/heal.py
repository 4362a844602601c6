"""`udpwatch heal`: shows and switches what the running agent heals."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.follow import translated_errors
from udpwatch.agent.client.heal_text import lines
from udpwatch.agent.commands.arguments import port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and the ports."""
    parser.description = (
        "Show, switch on or switch off the healing of replies, at once and until the agent restarts. Without PORT, on "
        "heals what the agent's settings select, and off heals nothing at all. Only root may switch."
    )
    actions = ["status", "on", "off"]
    parser.add_argument("action", nargs="?", default="status", choices=actions, help="what to do [status]")
    parser.add_argument("ports", nargs="*", type=port, metavar="PORT", help="switch only these server ports")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Do it, and print the result. Exit status 1: nothing can be healed. Raises UdpwatchError."""
    path = Path(parsed.connect or DEFAULT_SOCKET)
    on = None if parsed.action == "status" else parsed.action == "on"
    with translated_errors(path), Client(path) as client:
        healing = client.heal(on, [] if on is None else parsed.ports)
        rows = tuple(row for row in client.snapshot().healed_rows if not parsed.ports or row.port in parsed.ports)
    if parsed.json:
        print(json.dumps(asdict(healing) | {"healed": [asdict(row) for row in rows]}, separators=(",", ":")))
    else:
        print("\n".join(lines(healing, rows)))
    return 1 if healing.reason else 0
