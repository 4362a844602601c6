"""One server: what it was asked at, what it answers from, why, on which nodes, and what to do."""

from __future__ import annotations

from fleet import last, since
from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import (
    AGENT,
    BLUE,
    FINDING_LABELS,
    MISMATCH,
    ORANGE,
    RED,
    SERVER,
    WHERE,
    WHERE_LEGEND,
    Column,
    board,
    chosen,
    grown,
    increase,
    lines,
    link,
    number,
    of_culprits,
    per_second,
    rows,
    share,
    words,
)

VARIABLES = ("namespace", "pod", "process", "port")
WRONG = f"{MISMATCH}{{{chosen(*VARIABLES)}}}"
IN_TIME = grown(WRONG, "$__range")
NEXT = """Choose a port above, then on the node, or by `kubectl exec` in its udpwatch pod:

    udpwatch explain ${port:text}          # why, and the line that mends this server
    udpwatch events --port ${port:text}    # each wrong reply as it happens, with the client's address
"""


def dashboard() -> Dashboard:
    """Built anew at each call."""
    labels = f"{WHERE}, {FINDING_LABELS}"
    return board(
        SERVER,
        "udpwatch / Server",
        "One server that answers wrongly, or all of a namespace: choose above, or come from the fleet.",
        number(
            "Wrong replies",
            "Replies of the chosen servers that clients did not get within the time chosen above.",
            f"sum({IN_TIME})",
            steps=[(1, RED)],
            decimals=0,
        ),
        number(
            "Wrong replies now",
            "Wrong replies a second. 0 after it was mended, or while nobody asks.",
            f"sum({per_second(WRONG)})",
            unit="cps",
            steps=[(0.000001, RED)],
        ),
        number(
            "Share of the nodes' replies",
            "Wrong replies of the chosen servers among all UDP replies, and flows, of their nodes within the time "
            "chosen above.",
            share(f"sum({IN_TIME})", increase),
            unit="percentunit",
            steps=[(0.000001, ORANGE), (0.01, RED)],
        ),
        number(
            "Since",
            "The first wrong reply within the time chosen above; choose a longer time to see further back. A series "
            "ends an hour after the last one, or a minute after its pod.",
            since(WRONG, ""),
            unit="dateTimeAsIso",
            base=BLUE,
            width=6,
        ),
        number(
            "Last",
            "The last wrong reply within the time chosen above, to a scrape or two.",
            last(WRONG, ""),
            unit="dateTimeAsIso",
            base=BLUE,
            width=6,
        ),
        words("What to do", NEXT, height=5),
        Row("Over time"),
        lines(
            "Asked at, answered from",
            "Wrong replies by the address that the client asked (expected) and the one that the reply left from "
            "(actual). One pair: one missing address; many: the server answers from whatever routing picks.",
            "cps",
            (f"sum by (expected, actual) ({per_second(WRONG)}) > 0", "{{expected}} → {{actual}}"),
            stacked=True,
        ),
        lines(
            "By node",
            "One node: look at its addresses and routes. All nodes: it is the server.",
            "cps",
            (f"sum by ({WHERE}) ({per_second(WRONG)}) > 0", WHERE_LEGEND),
            stacked=True,
            leads_to=("The agent of this node", AGENT, "instance"),
        ),
        lines(
            "By cause",
            "kernel-chosen: bound to all addresses, routing chose the source: mend the server. explicit: the "
            "application named it. connected: connect() froze it. forwarded: the server runs on another machine.",
            "cps",
            (f"sum by (cause) ({per_second(WRONG)}) > 0", "{{cause}}"),
            stacked=True,
        ),
        lines(
            "By verdict",
            "new: conntrack booked the reply as a flow of its own, NAT is not undone and no client gets it. untracked: "
            "only clients with a connected socket refuse it. unknown: conntrack could not be read.",
            "cps",
            (f"sum by (verdict) ({per_second(WRONG)}) > 0", "{{verdict}}"),
            stacked=True,
        ),
        Row("In detail"),
        rows(
            "Findings",
            "Every kind of wrong reply of the chosen servers within the time chosen above. A click leads to the agent "
            "that found it.",
            labels,
            Column("wrong replies", f"sum by ({labels}) ({IN_TIME})"),
            Column("a second", f"sum by ({labels}) ({per_second(WRONG)})", "cps", [(0.000001, RED)], 100),
            Column("since", since(WRONG, labels), "dateTimeAsIso", width=170),
            Column("last", last(WRONG, labels), "dateTimeAsIso", width=170),
            links=[("The agent that found it", link(AGENT, "instance"))],
            only="wrong replies",
            sort="wrong replies",
            height=10,
        ),
        variables=of_culprits(*VARIABLES),
    )
