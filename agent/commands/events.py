"""`udpwatch events`: each wrong and each healed reply, as the running agent finds it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from udpwatch.agent.client import follow
from udpwatch.agent.client.connection import DEFAULT_SOCKET
from udpwatch.agent.client.lines import EventLines
from udpwatch.agent.commands.arguments import port
from udpwatch.agent.model import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the filters."""
    parser.description = (
        "Follow the running agent's events. Times are in this machine's time zone. NAME may be a pattern: 'dns-*'."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line (docs/events.md)")
    parser.add_argument("--pod", metavar="NAME", help="only events of this pod")
    parser.add_argument("--namespace", metavar="NAME", help="only events of this Kubernetes namespace")
    parser.add_argument("--port", type=port, metavar="N", help="only events of this server port")
    parser.add_argument("--process", metavar="NAME", help="only events of this process")
    parser.add_argument(
        "--verdict", choices=[str(verdict) for verdict in Verdict], help="only events with this verdict"
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="first print the stored events since WHEN: 30 (seconds ago), 5m, 1h, or a time (RFC 3339)",
    )
    parser.add_argument("--no-follow", action="store_true", help="print the stored events (at most 1,000) and exit")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Print the events until the agent ends. Raises UdpwatchError."""
    terminal = sys.stdout.isatty()
    event_filter = follow.EventFilter(parsed.pod, parsed.namespace, parsed.port, parsed.process, parsed.verdict)
    since = None if parsed.since is None else follow.parse_since(parsed.since, time.time())
    lines = EventLines(terminal and not os.environ.get("NO_COLOR"))
    has_heading = not terminal or parsed.json
    path = Path(parsed.connect or DEFAULT_SOCKET)
    for message in follow.read_events(path, event_filter, since, not parsed.no_follow):
        if "lost" in message:
            print(f"udpwatch: {message['lost']} events are missing here: this reader was too slow", file=sys.stderr)
        elif parsed.json:
            print(json.dumps(message["event"], separators=(",", ":")), flush=True)
        else:
            line = lines.line(message["event"])
            if not has_heading:  # after the first event has set the columns' widths
                print(lines.head())
                has_heading = True
            print(line, flush=True)
    return 0
