"""The server dashboard: one server's addresses, causes and nodes, and what to do."""

from __future__ import annotations

from fleet import last, since
from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import (
    AGENT,
    BLUE,
    FINDING_LABELS,
    HEALED,
    MISMATCH,
    ORANGE,
    RED,
    REFUSED,
    SCOPE,
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
    rate,
    rows,
    share,
    words,
)

VARIABLES = ("namespace", "pod", "process", "port")
WRONG = f"{MISMATCH}{{{chosen(*VARIABLES)}}}"
IN_TIME = grown(WRONG, "$__range")
NEXT = """Select a port above. Then run on the node, or with `kubectl exec` in its udpwatch pod:

    udpwatch explain ${port:text}          # why, and how to fix the server
    udpwatch events --port ${port:text}    # each wrong reply as it happens, with the client's address
    udpwatch heal status             # what udpwatch heals, and what it refuses
"""


def traffic(name: str) -> str:
    """Return the selector of one of the counters of the selected servers."""
    return f"udpwatch_server_{name}_total{{{chosen(*VARIABLES)}}}"


def dashboard() -> Dashboard:
    """Return the server dashboard."""
    labels = f"{WHERE}, {FINDING_LABELS}"
    return board(
        SERVER,
        "udpwatch / Server",
        "One server with wrong replies, or all of a namespace. Select it above, or click it on the fleet dashboard.",
        number(
            "Wrong replies",
            "Wrong replies of the selected servers within the selected time. Clients did not get them.",
            f"sum({IN_TIME})",
            steps=[(1, RED)],
            decimals=0,
        ),
        number(
            "Wrong replies now",
            "Wrong replies per second. 0 if the server is fixed, or if no client asks.",
            f"sum({per_second(WRONG)})",
            unit="cps",
            steps=[(0.000001, RED)],
        ),
        number(
            "Share of the nodes' replies",
            "Share of the selected servers' wrong replies among all UDP replies and flows of their nodes within the "
            "selected time.",
            share(f"sum({IN_TIME})", increase),
            unit="percentunit",
            steps=[(0.000001, ORANGE), (0.01, RED)],
        ),
        number(
            "Since",
            "The first wrong reply within the selected time. Select a longer time to see further back. A series ends "
            "an hour after its last wrong reply, or a minute after its pod.",
            since(WRONG, ""),
            unit="dateTimeAsIso",
            base=BLUE,
            width=6,
        ),
        number(
            "Last",
            "The last wrong reply within the selected time, accurate to one or two scrape intervals.",
            last(WRONG, ""),
            unit="dateTimeAsIso",
            base=BLUE,
            width=6,
        ),
        words("What to do", NEXT, height=6),
        Row("Over time"),
        lines(
            "Asked at, answered from",
            "Wrong replies by the address that the client asked (expected) and the source of the reply (actual). One "
            "pair: one address is affected. Many pairs: the server replies from whatever routing chooses.",
            "cps",
            (f"sum by (expected, actual) ({per_second(WRONG)}) > 0", "{{expected}} → {{actual}}"),
            stacked=True,
        ),
        lines(
            "By node",
            "One node: check its addresses and routes. All nodes: check the server.",
            "cps",
            (f"sum by ({WHERE}) ({per_second(WRONG)}) > 0", WHERE_LEGEND),
            stacked=True,
            leads_to=("The agent of this node", AGENT, "instance"),
        ),
        lines(
            "By cause",
            "kernel-chosen: the socket is bound to all addresses, and routing chose the source; fix the server. "
            "explicit: the program chose it. connected: connect() chose it. forwarded: the server runs on another "
            "machine.",
            "cps",
            (f"sum by (cause) ({per_second(WRONG)}) > 0", "{{cause}}"),
            stacked=True,
        ),
        lines(
            "By verdict",
            "new: conntrack made the reply a new flow, so NAT is not undone and the client does not get it. untracked: "
            "only clients with a connected socket refuse it. unknown: conntrack could not be read.",
            "cps",
            (f"sum by (verdict) ({per_second(WRONG)}) > 0", "{{verdict}}"),
            stacked=True,
        ),
        Row("Healed"),
        lines(
            "Healed replies",
            "Replies of the selected servers whose source udpwatch set (--heal), by the address that the client asked. "
            "They are right, but the server still needs the fix: without udpwatch, routing chooses the source.",
            "cps",
            (f"sum by (asked) ({per_second(f'{HEALED}{{{chosen(*VARIABLES)}}}')}) > 0", "{{asked}}"),
            stacked=True,
        ),
        lines(
            "Replies that were not healed",
            "Replies per second of servers selected for healing that udpwatch left alone, by reason, on the selected "
            "nodes. With several-addresses, not-local and transparent, a wrong reply may have left.",
            "cps",
            (f"sum by (reason) ({rate(f'{REFUSED}{{{SCOPE}}}')}) > 0", "{{reason}}"),
            stacked=True,
        ),
        Row("Traffic"),
        lines(
            "Requests and replies",
            "Datagrams per second that the selected servers' ports received, and that they sent to peers that had "
            "asked.",
            "pps",
            (f"sum({per_second(traffic('requests'))})", "requests"),
            (f"sum({per_second(traffic('replies'))})", "replies"),
        ),
        lines(
            "Requests that clients lost",
            "unanswered: no reply within the window, or only a wrong one; a peer counts once a second at most. "
            "dropped: the receive buffer was full, so the server never saw them.",
            "pps",
            (f"sum({per_second(traffic('unanswered'))})", "unanswered"),
            (f"sum({per_second(traffic('receive_drops'))})", "dropped"),
        ),
        Row("In detail"),
        rows(
            "Findings",
            "All findings of the selected servers within the selected time. A click opens the agent that found it.",
            labels,
            Column("wrong replies", f"sum by ({labels}) ({IN_TIME})"),
            Column("per second", f"sum by ({labels}) ({per_second(WRONG)})", "cps", [(0.000001, RED)], 100),
            Column("since", since(WRONG, labels), "dateTimeAsIso", width=170),
            Column("last", last(WRONG, labels), "dateTimeAsIso", width=170),
            links=[("The agent that found it", link(AGENT, "instance"))],
            only="wrong replies",
            sort="wrong replies",
            height=10,
        ),
        variables=of_culprits(*VARIABLES),
    )
