"""`udpwatch top`: the servers that send wrong replies, and all UDP servers, live."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
from typing import NoReturn

from udpwatch.agent.client import explain
from udpwatch.agent.client.connection import DEFAULT_SOCKET
from udpwatch.agent.client.top import sources, text
from udpwatch.agent.client.top.prometheus import PrometheusSource
from udpwatch.agent.client.top.rows import Key
from udpwatch.agent.client.top.traffic import ServerKey
from udpwatch.agent.commands.arguments import seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where to read from and how to print."""
    parser.description = (
        "Show the findings and the UDP servers of this machine, as its agent reports them. Without an agent, start one "
        "until top exits (needs root). Without a terminal, print a line for each changed row every interval."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")
    where.add_argument("--prometheus", metavar="URL", help="read all nodes from this Prometheus instead")
    where.add_argument("--replay", metavar="FILE", help="play a recording of `udpwatch run --events FILE` instead")
    parser.add_argument("--servers", action="store_true", help="begin with the servers; with --json, add them")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=seconds(0.1), default=1.0, help="time between updates [1]"
    )
    parser.add_argument("--once", action="store_true", help="print one table, with rates over one interval")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object every interval; with --once, only one"
    )


def run(parsed: argparse.Namespace) -> int:
    """Show the servers until the user quits. Raises UdpwatchError."""

    def end(*_: object) -> NoReturn:
        sys.exit(0)

    # An agent that was started here must be stopped, whichever signal ends this process.
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.closing(_source(parsed)) as source:
            return _show(source, parsed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _source(parsed: argparse.Namespace) -> sources.ViewSource:
    if parsed.prometheus:
        return PrometheusSource(parsed.prometheus)
    if parsed.replay:
        return sources.open_replay(parsed.replay)
    return sources.open_agent(parsed.connect)


def _show(source: sources.ViewSource, parsed: argparse.Namespace) -> int:
    """Print one table or object, print lines or objects without end, or run the screen."""
    # Scripts that read JSON get the findings of each node.
    source.select(sources.Wanted(parsed.servers, folded=not parsed.json))
    if parsed.once:
        view = text.once(source, parsed.interval)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        object_ = text.as_json(view, parsed.servers) if parsed.json else None
        print(json.dumps(object_) if object_ else text.table(view, width, source.name, parsed.servers))
        return 0
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if terminal and not parsed.json:
        return text.interactive(source, parsed.interval, explain.short_advice, parsed.servers)
    shown: dict[Key, int] = {}
    servers: dict[ServerKey, int] = {}
    for view in text.views(source, parsed.interval, lambda line: print(f"udpwatch: {line}", file=sys.stderr)):
        if parsed.json:
            lines = [json.dumps(text.as_json(view, parsed.servers))]
        else:
            lines = text.server_changes(view, servers) if parsed.servers else text.changes(view, shown)
        print(*lines, sep="\n", end="\n" if lines else "")
        sys.stdout.flush()
    return 0
