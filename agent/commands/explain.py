"""`udpwatch explain`: why a server replies from the wrong address, and how to fix it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from udpwatch.agent.client import explain_text, follow, remedies
from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.explain import matching


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to explain."""
    parser.description = (
        "Explain all findings of the running agent, or those of one server. Without an agent: print how to fix a known "
        "server."
    )
    parser.add_argument("server", nargs="?", metavar="PROCESS|PORT", help="only this process, pod or port")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the known servers")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Print the explanation. Raises UdpwatchError."""
    if parsed.list:
        print(json.dumps(explain_text.known_object()) if parsed.json else explain_text.known_text())
        return 0
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    known = remedies.remedy_named(parsed.server) if parsed.server else None
    path = Path(parsed.connect or DEFAULT_SOCKET)
    try:
        with follow.translated_errors(path), Client(path) as client:
            rows = matching(client.snapshot().rows, parsed.server)
        missing = f"no wrong reply{f' of {parsed.server!r}' if parsed.server else ''} so far"
    except follow.NoAgent as error:
        if known is None:
            raise
        rows, missing = [], str(error)
    if not rows:
        print(f"udpwatch: {missing}{f'; the known fix for {known.name}:' if known else ''}", file=sys.stderr)
    if parsed.json:
        report = explain_text.remedy_only_object(known) if known and not rows else explain_text.rows_object(rows)
        print(json.dumps(report))
    elif rows:
        print(explain_text.rows_text(rows, colour))
    elif known:
        print(explain_text.remedy_text(known, colour))
    return 0
