"""Lay out the help screen: keys, columns, lost events, faults and the agents' notes. A pure function."""

from __future__ import annotations

import textwrap

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.faults import faults_of
from udpwatch.agent.client.top.healing import healing_facts
from udpwatch.agent.client.top.layout import StyledLine, count_text
from udpwatch.agent.client.top.rows import View
from udpwatch.agent.client.top.server_table import RISKS

_KEYS = (
    ("Tab", "switch between findings and servers"),
    ("s, r", "sort by the next column; reverse the order"),
    ("/", "filter: show the rows that contain all words; Enter keeps the filter, Esc clears it"),
    ("p", "pause: freeze the screen; counting continues"),
    ("c, C", "clear: count totals from now on; restore the full totals"),
    ("Enter", "show the details of the selected row and how to fix its server; [ and ] scroll"),
    ("j k, arrows", "select a row; g or Home: stay on the first row; G or End: the last row"),
    ("g", "in a cluster: show the selected row of each node; again: all nodes in one row"),
    ("q", "quit"),
)
_COLUMNS = (
    ("asked at", "the address that the client asked"),
    ("replied from", "the source address of the reply"),
    (
        "verdict, ct",
        "conntrack's verdict: new (a new flow, so NAT is not undone), untracked, unknown (?); healed: "
        "udpwatch set the source to the address that was asked, so the reply is right, but the server is not fixed",
    ),
    (
        "cause",
        "how the source was chosen: kernel-chosen (by routing), explicit or app (by the server), connected, "
        "forwarded, unknown",
    ),
    ("rate/s", "wrong or healed replies per second, over the last five seconds"),
)


_SERVER_COLUMNS = (
    ("bound to", "the address that its sockets are bound to; 0.0.0.0 or ::, every address; +N, N more"),
    ("requests/s", "datagrams that the server's port receives, and those that it sends to peers that had asked"),
    ("unanswered", "share of the requests of the last minute that got no reply within the window"),
    ("wrong/s", "wrong replies per second"),
    ("drops/s", "requests that its receive buffer had no room for"),
    ("queue", "bytes that wait in its receive buffer, with the kernel's overhead"),
    ("PKTINFO", "whether its wildcard sockets learn the address that was asked: yes, no, unknown (?)"),
    *((risk, text) for risk, text in RISKS.items()),
)


def help_lines(view: View | None, servers: bool, width: int) -> list[StyledLine]:
    """Return the lines of the help, ``width`` cells wide. ``servers``: for the table of servers."""
    columns = _SERVER_COLUMNS if servers else _COLUMNS
    lines = [*_block("Keys", _KEYS, width), [], *_block("Columns", columns, width)]
    snapshots = view.snapshots if view else ()
    lost = {stage: 0 for each in snapshots for stage in each.lost}
    for each in snapshots:
        for stage, count in each.lost.items():
            lost[stage] += count
    losses = [
        (safe(stage), f"{count_text(count)} lost at this stage (docs/metrics.md)")
        for stage, count in lost.items()
        if count
    ]
    if losses:
        lines += [[], *_block("Lost", losses, width)]
    faults = faults_of(view) if view else []
    if faults:
        lines += [[], *_block("Faults", faults, width)]
    healing = healing_facts(view) if view else []
    if healing:
        lines += [[], *_block("Healing", healing, width)]
    notes = [("", safe(note)) for each in snapshots for note in each.notes]
    if notes:
        lines += [[], *_block("Notes", notes, width)]
    return lines


def _block(name: str, entries: list[tuple[str, str]] | tuple[tuple[str, str], ...], width: int) -> list[StyledLine]:
    lines: list[StyledLine] = [[(name, "name")]]
    for label, text in entries:
        for at, line in enumerate(textwrap.wrap(text, max(20, width - 16), break_on_hyphens=False)):
            lines.append([(f"  {label if at == 0 else '':<13} ", "key"), (line, "fact")])
    return lines
