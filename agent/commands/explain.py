"""`udpwatch explain`: why a server replies from the wrong address, or why UDP to a port does not work; and the fix."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from udpwatch.agent.client import explain_text, follow, port_text, remedies
from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.explain import matching
from udpwatch.agent.client.remedies import Remedy
from udpwatch.agent.commands.arguments import seconds
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing, Row, Server
from udpwatch.agent.servers.inventory import list_all
from udpwatch.agent.servers.port.diagnosis import diagnose
from udpwatch.agent.servers.port.look import Looker

_MAX_PORT = 65_535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to explain."""
    parser.description = (
        "Explain all findings of the running agent, or those of one server. For a port without a finding, look at the "
        "kernel for a few seconds and say why UDP to that port does not work (root; no agent is needed). For a known "
        "server, print its fix."
    )
    parser.epilog = "exit status: 0 nothing wrong with the port, 1 something is, or failure; 2 wrong usage"
    parser.add_argument("server", nargs="?", metavar="PROCESS|PORT", help="only this process, pod or port")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the known servers")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=seconds(0.5),
        default=3.0,
        help="how long to look at a port without a finding [3]",
    )
    parser.add_argument("--address", metavar="ADDRESS", type=_address, help="the address that clients ask")


def run(parsed: argparse.Namespace) -> int:
    """Print the explanation; return 1 if something is wrong with a port. Raises UdpwatchError."""
    if parsed.list:
        print(json.dumps(explain_text.known_object()) if parsed.json else explain_text.known_text())
        return 0
    path = Path(parsed.connect or DEFAULT_SOCKET)
    known = remedies.remedy_named(parsed.server) if parsed.server else None
    port = int(parsed.server) if _is_port(parsed.server) else None
    healing = None
    try:
        with follow.translated_errors(path), Client(path) as client:
            snapshot = client.snapshot()
        rows, healing = matching(snapshot.rows, parsed.server), snapshot.healing
        missing = f"no wrong reply{f' of {parsed.server!r}' if parsed.server else ''} so far"
    except follow.NoAgent as error:
        if known is None and port is None:
            raise
        rows, missing = [], str(error) if port is None or os.geteuid() else "there is no agent"
    if port is not None and not rows:
        return _explain_port(port, parsed, path, missing, healing)
    if not rows:
        print(f"udpwatch: {missing}{f'; the known fix for {known.name}:' if known else ''}", file=sys.stderr)
    _print(rows, known, parsed.json, healing)
    return 0


def _print(rows: list[Row], known: Remedy | None, as_json: bool, healing: Healing | None) -> None:
    if as_json:
        if known and not rows:
            print(json.dumps(explain_text.remedy_only_object(known)))
        else:
            print(json.dumps(explain_text.rows_object(rows, healing)))
    elif rows:
        print(explain_text.rows_text(rows, _colour(), healing))
    elif known:
        print(explain_text.remedy_text(known, _colour()))


def _explain_port(port: int, parsed: argparse.Namespace, path: Path, missing: str, healing: Healing | None) -> int:
    """Look at a port without a finding and print what is known about it."""
    looker = Looker(port, parsed.address or "", lambda: list_all(port=port), lambda: _servers(path))
    if not parsed.json:
        print(f"udpwatch: {missing}; looking at port {port}/udp for {parsed.seconds:g} s", file=sys.stderr)
    look = looker.look(parsed.seconds)
    statements = diagnose(look)
    wrong = any(each.wrong for each in statements)
    if parsed.json:
        print(json.dumps(port_text.port_object(look, statements) | explain_text.rows_object([], healing)))
    else:
        print(port_text.port_text(look, statements, _colour()))
        if more := explain_text.rows_text([], _colour(), healing):
            print(f"\n{more}")
    return 1 if wrong else 0


def _servers(path: Path) -> Sequence[Server] | None:
    """Return the agent's servers, or None without an agent."""
    with contextlib.suppress(UdpwatchError), follow.translated_errors(path), Client(path) as client:
        return client.snapshot().servers
    return None


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _is_port(server: str | None) -> bool:
    return server is not None and server.isascii() and server.isdecimal() and 0 < int(server) <= _MAX_PORT


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected an IP address") from None
