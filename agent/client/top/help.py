"""What `?` says: the keys, what the columns mean, and what the agents say of themselves. A pure function."""

from __future__ import annotations

import textwrap

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.layout import Painted, count_text
from udpwatch.agent.client.top.rows import Look

_KEYS = (
    ("s, r", "sort by the next column; turn the order round"),
    ("/", "filter: words that a row must have; Enter keeps them, Esc clears them"),
    ("p", "pause: the screen stands still, counting goes on"),
    ("c, C", "clear: totals count from now on; count everything again"),
    ("Enter", "what is known about the selected row, and how to mend it; [ and ] scroll"),
    ("j k, arrows", "select; g or Home: the first row, whichever that is; G or End: the last"),
    ("q", "quit"),
)
_COLUMNS = (
    ("asked at", "the address that the client asked"),
    ("answered from", "the source that the reply left from"),
    ("verdict, ct", "what conntrack made of it: new (a flow of its own: NAT is not undone), untracked, unknown (?)"),
    ("cause", "kernel-chosen (left to routing), explicit or app (the server's choice), connected, forwarded, unknown"),
    ("rate/s", "wrong replies per second, over the last five"),
)


def help_lines(look: Look | None, width: int) -> list[Painted]:
    """Lines of ``width`` cells."""
    lines = [*_block("Keys", _KEYS, width), [], *_block("Columns", _COLUMNS, width)]
    snapshots = look.snapshots if look else ()
    lost = {stage: 0 for each in snapshots for stage in each.lost}
    for each in snapshots:
        for stage, count in each.lost.items():
            lost[stage] += count
    told = [
        (safe(stage), f"{count_text(count)} lost there (docs/metrics.md)") for stage, count in lost.items() if count
    ]
    if told:
        lines += [[], *_block("Lost", told, width)]
    notes = [("", safe(note)) for each in snapshots for note in each.notes]
    if notes:
        lines += [[], *_block("This machine", notes, width)]
    return lines


def _block(name: str, entries: list[tuple[str, str]] | tuple[tuple[str, str], ...], width: int) -> list[Painted]:
    lines: list[Painted] = [[(name, "name")]]
    for label, text in entries:
        for at, line in enumerate(textwrap.wrap(text, max(20, width - 16), break_on_hyphens=False)):
            lines.append([(f"  {label if at == 0 else '':<13} ", "key"), (line, "fact")])
    return lines
