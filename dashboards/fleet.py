"""The fleet dashboard: nodes, namespaces and servers with wrong replies, since when, and their share."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Row
from grafana_foundation_sdk.models.dashboard import Dashboard
from parts import (
    AGENT,
    AGENTS,
    FINDING_LABELS,
    FLEET,
    HEALED,
    MISMATCH,
    ORANGE,
    RED,
    REFUSED,
    SCOPE,
    SERVER,
    SERVER_LABELS,
    WHERE,
    WHERE_LEGEND,
    Column,
    board,
    chosen,
    count,
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
)

WRONG = f"{MISMATCH}{{{chosen('namespace')}}}"
#: without the series `other`, which names no server
NAMED = f'{MISMATCH}{{{chosen("namespace")}, port!="other"}}'
IN_TIME = grown(WRONG, "$__range")
NAMED_IN_TIME = grown(NAMED, "$__range")
#: without the series `other`, which names no server
AT_RISK = f'udpwatch_sockets_at_risk{{{chosen("namespace")}, port!="other"}}'
HEALED_REPLIES = f"{HEALED}{{{chosen('namespace')}}}"
NAMED_HEALED = f'{HEALED}{{{chosen("namespace")}, port!="other"}}'
AT_RISK_LABELS = "namespace, container, process, port"
BLIND = (
    f'min by ({WHERE}) (udpwatch_probe_attached{{{SCOPE}, probe=~"ingress|egress"}}) == 0'
    f" or min by ({WHERE}) (udpwatch_self_test_passed{{{SCOPE}}}) == 0"
)


def since(selector: str, labels: str) -> str:
    """Return when the counter started within the dashboard's time, in ms since 1970: the first wrong reply."""
    return f"1000 * min by ({labels}) (min_over_time(timestamp({selector})[$__range:$__interval]))"


def last(selector: str, labels: str) -> str:
    """Return when the counter last grew or started, in ms since 1970."""
    growing = f"timestamp(increase({selector}[$__rate_interval]) > 0)"
    return (
        f"1000 * max by ({labels}) (max_over_time({growing}[$__range:$__interval])"
        f" or min_over_time(timestamp({selector})[$__range:$__interval]))"
    )


def dashboard() -> Dashboard:
    """Return the fleet dashboard."""
    by_server = f"{WHERE}, {FINDING_LABELS}"
    to_server = link(SERVER, "instance", "namespace", "process", "port")
    return board(
        FLEET,
        "udpwatch / Fleet",
        "Nodes, namespaces and servers that send UDP replies from an address that the client did not ask.",
        number(
            "Servers with wrong replies",
            "Processes, each with a port, that sent wrong replies within the selected time. Each is a row of the last "
            "table. A server on five nodes counts five times.",
            count(f"sum by ({WHERE}, {SERVER_LABELS}) ({NAMED_IN_TIME}) > 0"),
            steps=[(1, RED)],
        ),
        number(
            "Nodes with such servers",
            "Agents that found at least one wrong reply within the selected time.",
            count(f"sum by ({WHERE}) ({IN_TIME}) > 0"),
            steps=[(1, RED)],
        ),
        number(
            "Wrong replies",
            "Replies within the selected time that clients did not get, because they left from the wrong address. "
            "Those of machines behind a node are counted in flows.",
            f"sum({IN_TIME})",
            steps=[(1, RED)],
            decimals=0,
        ),
        number(
            "Share of wrong replies",
            "Share of wrong replies among all UDP replies and flows that were checked within the selected time.",
            share(f"sum({IN_TIME})", increase),
            unit="percentunit",
            steps=[(0.000001, ORANGE), (0.01, RED)],
        ),
        number(
            "Agents",
            "Agents that Prometheus scrapes now.",
            f"count({AGENTS})",
        ),
        number(
            "Blind agents",
            "Agents whose programs at the root cgroup are detached, or that did not see their own test datagram. Wrong "
            "replies on their nodes go unseen. See the dashboard udpwatch / Agents.",
            count(BLIND),
            steps=[(1, RED)],
        ),
        Row("Over time"),
        lines(
            "Wrong replies by node",
            "Wrong replies per second, by the node that sent them.",
            "cps",
            (f"sum by ({WHERE}) ({per_second(WRONG)}) > 0", WHERE_LEGEND),
            stacked=True,
            leads_to=("The servers of this node", SERVER, "instance"),
        ),
        lines(
            "Share of wrong replies by node",
            "Share of wrong replies among all UDP replies and flows of a node. Near 100 %, all its UDP servers fail.",
            "percentunit",
            (
                f"{share(f'sum by ({WHERE}) ({per_second(WRONG)})', rate, f' by ({WHERE})')} > 0",
                WHERE_LEGEND,
            ),
            steps=[(0.01, RED)],
            leads_to=("The servers of this node", SERVER, "instance"),
        ),
        lines(
            "Wrong replies by namespace",
            "The namespace of the sender's pod. Without a name: processes outside of pods, and machines behind a node.",
            "cps",
            (f"sum by (namespace) ({per_second(WRONG)}) > 0", "{{namespace}}"),
            stacked=True,
            leads_to=("The servers of this namespace", SERVER, "namespace"),
        ),
        lines(
            "Wrong replies by cause",
            "kernel-chosen: the socket is bound to all addresses, and routing chose the source. explicit: the program "
            "chose it. connected: connect() chose it. forwarded: the reply of another machine, counted in flows.",
            "cps",
            (f"sum by (cause) ({per_second(WRONG)}) > 0", "{{cause}}"),
            stacked=True,
        ),
        Row("Where"),
        rows(
            "Nodes",
            "Nodes with wrong replies within the selected time, the worst first. A click opens the node's agent.",
            WHERE,
            Column("wrong replies", f"sum by ({WHERE}) ({IN_TIME})"),
            Column(
                "share of replies",
                share(f"sum by ({WHERE}) ({IN_TIME})", increase, f" by ({WHERE})"),
                "percentunit",
                [(0.01, RED)],
            ),
            Column(
                "servers",
                f"count by ({WHERE}) (sum by ({WHERE}, {SERVER_LABELS}) ({NAMED_IN_TIME}) > 0)",
                width=90,
            ),
            Column("since", since(NAMED, WHERE), "dateTimeAsIso", width=170),
            links=[("The agent of this node", link(AGENT, "instance"))],
            only="wrong replies",
            sort="wrong replies",
            width=14,
        ),
        rows(
            "Namespaces",
            "Namespaces with wrong replies within the selected time, the worst first. The row without a name "
            "has the processes outside of pods.",
            "namespace",
            Column("wrong replies", f"sum by (namespace) ({IN_TIME})"),
            Column(
                "servers",
                f"count by (namespace) (sum by ({WHERE}, {SERVER_LABELS}) ({NAMED_IN_TIME}) > 0)",
                width=90,
            ),
            Column("since", since(NAMED, "namespace"), "dateTimeAsIso", width=170),
            links=[("Its servers", link(SERVER, "namespace"))],
            only="wrong replies",
            sort="wrong replies",
            width=10,
        ),
        rows(
            "Servers",
            "Servers with wrong replies within the selected time. expected: the address that the client asked. actual: "
            "the source of the reply. since: the first wrong reply within that time. A click opens the server.",
            by_server,
            Column("wrong replies", f"sum by ({by_server}) ({NAMED_IN_TIME})"),
            Column("per second", f"sum by ({by_server}) ({per_second(NAMED)})", "cps", [(0.000001, RED)], 100),
            Column("since", since(NAMED, by_server), "dateTimeAsIso", width=170),
            Column("last", last(NAMED, by_server), "dateTimeAsIso", width=170),
            links=[("This server", to_server)],
            only="wrong replies",
            sort="wrong replies",
            height=12,
        ),
        Row("Healed"),
        lines(
            "Healed replies by node",
            "Replies per second whose source udpwatch set to the address that the client asked (--heal). They are "
            "right, and no wrong replies. Their servers still need the fix.",
            "cps",
            (f"sum by ({WHERE}) ({per_second(HEALED_REPLIES)}) > 0", WHERE_LEGEND),
            stacked=True,
            leads_to=("The servers of this node", SERVER, "instance"),
        ),
        lines(
            "Replies that were not healed",
            "Replies per second of servers selected for healing that udpwatch left alone, by reason. With "
            "several-addresses, not-local and transparent, a wrong reply may have left. All namespaces.",
            "cps",
            (f"sum by (reason) ({rate(f'{REFUSED}{{{SCOPE}}}')}) > 0", "{{reason}}"),
            stacked=True,
        ),
        rows(
            "Healed servers",
            "Servers with healed replies within the selected time: fix them. asked: the address that the client asked, "
            "and the source that udpwatch set. A click opens the server.",
            f"{WHERE}, {SERVER_LABELS}, asked",
            Column("healed replies", f"sum by ({WHERE}, {SERVER_LABELS}, asked) ({grown(NAMED_HEALED, '$__range')})"),
            Column(
                "per second", f"sum by ({WHERE}, {SERVER_LABELS}, asked) ({per_second(NAMED_HEALED)})", "cps", (), 100
            ),
            Column("since", since(NAMED_HEALED, f"{WHERE}, {SERVER_LABELS}, asked"), "dateTimeAsIso", width=170),
            links=[("This server", to_server)],
            only="healed replies",
            sort="healed replies",
            height=8,
        ),
        Row("At risk"),
        lines(
            "Servers at risk by node",
            "Servers with sockets that reply from another address than the one that some clients ask, by their options "
            "and the node's routes. `udpwatch audit` on the node prints the addresses and the clients.",
            "short",
            (f"count by ({WHERE}) (sum by ({WHERE}, {SERVER_LABELS}) ({AT_RISK}) > 0)", WHERE_LEGEND),
        ),
        rows(
            "Servers at risk",
            "Servers that will reply from the wrong address, or have done so, by the number of their nodes. A click "
            "opens the server.",
            AT_RISK_LABELS,
            Column(
                "nodes", f"count by ({AT_RISK_LABELS}) (sum by ({WHERE}, {AT_RISK_LABELS}) ({AT_RISK}) > 0)", width=90
            ),
            Column("sockets", f"sum by ({AT_RISK_LABELS}) ({AT_RISK})", width=90),
            links=[("This server", link(SERVER, "namespace", "process", "port"))],
            only="nodes",
            sort="nodes",
            width=12,
            height=8,
        ),
        variables=of_culprits("namespace"),
    )
