"""`udpwatch events` and `udpwatch explain`: their words, and what they answer. cli.py prints it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.model import Verdict

COMMANDS = ("events", "explain")


@dataclass(frozen=True, slots=True)
class Said:
    """Something to print."""

    text: str
    aside: bool = False  # for standard error


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], epilog: str) -> None:
    """Their words."""
    events = commands.add_parser(
        "events",
        help="each wrong reply as it happens, a line each",
        description="Follow the running agent's events. Times are this machine's. NAME may be a pattern, as 'dns-*'.",
        epilog=epilog,
    )
    events.add_argument("--json", action="store_true", help="one JSON object a line (docs/events.md)")
    events.add_argument("--pod", metavar="NAME", help="only of this pod")
    events.add_argument("--namespace", metavar="NAME", help="only of this Kubernetes namespace")
    events.add_argument("--port", type=_port, metavar="N", help="only of this port of the server")
    events.add_argument("--process", metavar="NAME", help="only of this process")
    events.add_argument("--verdict", choices=[str(verdict) for verdict in Verdict], help="only with this verdict")
    events.add_argument(
        "--since", metavar="WHEN", help="first what the agent keeps since then: seconds ago, 5m, 1h, a time (RFC 3339)"
    )
    events.add_argument("--no-follow", action="store_true", help="only what the agent keeps, the newest 1,000")

    explain = commands.add_parser(
        "explain",
        help="why a server answers from the wrong address, and how to mend it",
        description="Explain what the running agent found, all of it or of one server. Without an agent: how to mend "
        "a server that is known.",
        epilog=epilog,
    )
    explain.add_argument("server", nargs="?", metavar="PROCESS|PORT", help="only of this process, pod or port")
    explain.add_argument("--json", action="store_true", help="the same as one JSON object")
    explain.add_argument("--list", action="store_true", help="the servers that are known")

    for command in (events, explain):
        command.add_argument("--connect", metavar="SOCKET", help="the agent's socket [/run/udpwatch/udpwatch.sock]")


def answer(parsed: argparse.Namespace, terminal: bool, colour: bool) -> Iterator[Said]:
    """What the command says, as it comes. Raises UdpwatchError."""
    return _events(parsed, terminal, colour) if parsed.command == "events" else _explain(parsed, colour)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it takes a number from 1 to 65535")
    return int(text)


def _events(parsed: argparse.Namespace, terminal: bool, colour: bool) -> Iterator[Said]:
    from udpwatch.agent.client import follow  # noqa: PLC0415  `udpwatch --help` needs none of it
    from udpwatch.agent.client.connection import DEFAULT_SOCKET  # noqa: PLC0415
    from udpwatch.agent.client.lines import Lines  # noqa: PLC0415

    wanted = follow.Wanted(parsed.pod, parsed.namespace, parsed.port, parsed.process, parsed.verdict)
    since = None if parsed.since is None else follow.moment(parsed.since, time.time())
    lines, headed = Lines(colour), not terminal or parsed.json
    for told in follow.events(Path(parsed.connect or DEFAULT_SOCKET), wanted, since, not parsed.no_follow):
        if "lost" in told:
            yield Said(f"udpwatch: {told['lost']} events are missing here: this reader was too slow", aside=True)
        elif parsed.json:
            yield Said(json.dumps(told["event"], separators=(",", ":")))
        else:
            line = lines.line(told["event"])
            if not headed:  # now, when the columns have their widths
                yield Said(lines.head())
                headed = True
            yield Said(line)


def _explain(parsed: argparse.Namespace, colour: bool) -> Iterator[Said]:
    from udpwatch.agent.client import (  # noqa: PLC0415
        explain_text,
        follow,
        remedies,
    )
    from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client  # noqa: PLC0415
    from udpwatch.agent.client.explain import matching  # noqa: PLC0415

    if parsed.list:
        yield Said(json.dumps(explain_text.known_object()) if parsed.json else explain_text.known_text())
        return
    known = remedies.named(parsed.server) if parsed.server else None
    path = Path(parsed.connect or DEFAULT_SOCKET)
    try:
        with follow.reaching(path), Client(path) as client:
            rows = matching(client.snapshot().rows, parsed.server)
        missing = f"no wrong reply{f' of {parsed.server!r}' if parsed.server else ''} was seen so far"
    except follow.NoAgent as error:
        if known is None:
            raise
        rows, missing = [], str(error)
    if not rows:
        yield Said(f"udpwatch: {missing}{f'; what is known of {known.name}:' if known else ''}", aside=True)
    if parsed.json:
        told = explain_text.remedy_only_object(known) if known and not rows else explain_text.rows_object(rows)
        yield Said(json.dumps(told))
    elif rows:
        yield Said(explain_text.rows_text(rows, colour))
    elif known:
        yield Said(explain_text.remedy_text(known, colour))
