"""The table of servers in `udpwatch top`: columns, text of an empty table, detail pane. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

from udpwatch.agent.client.lines import safe, safe_lines
from udpwatch.agent.client.top.detail import GENERAL_FIX, labelled, process_lines
from udpwatch.agent.client.top.layout import (
    NODE,
    NODES,
    SHRINKS,
    Column,
    StyledLine,
    Table,
    clock_text,
    count_text,
    name_columns,
    rate_text,
    sockets_text,
)
from udpwatch.agent.client.top.rows import View
from udpwatch.agent.client.top.servers import ServerLine, ServerOrder
from udpwatch.agent.model import Risk, Server

_WILDCARDS = {"0.0.0.0", "::", "::ffff:0.0.0.0"}  # noqa: S104

RISKS = {
    Risk.WRONG: "it has replied from the wrong address",
    Risk.VIRTUAL: "it will reply from the wrong address to containers, virtual machines, or at a virtual IP",
    Risk.POSSIBLE: "it will reply from the wrong address if another network asks one of its addresses",
    Risk.UNKNOWN: "unknown, because the options of its sockets or its routes cannot be read here",
    Risk.NONE: "none, because it is bound to one address, sets PKTINFO, or routing selects the address that was asked",
}
_SOME = {Risk.VIRTUAL, Risk.POSSIBLE}


def _rate(name: str) -> Callable[[ServerLine, float], str]:
    def cell(line: ServerLine, _: float) -> str:
        return rate_text(None if line.rates is None else getattr(line.rates, name))

    return cell


def _drops(line: ServerLine, _: float) -> str:
    return "-" if line.server.drops is None else rate_text(line.rates.drops if line.rates else None)


def share_text(share: float | None) -> str:
    """Format a share from 0 to 1 in at most four characters; None: "-"."""
    if share is None:
        return "-"
    if 0 < share < 0.01:
        return "<1%"
    return f"{int(share * 100)}%"


def _unanswered(line: ServerLine, _: float) -> str:
    return share_text(line.rates.unanswered if line.rates else None)


def _bound(line: ServerLine, _: float) -> str:
    addresses = line.server.addresses
    return safe(addresses[0]) + (f" +{len(addresses) - 1}" if len(addresses) > 1 else "") if addresses else "-"


def _queue(line: ServerLine, _: float) -> str:
    return "-" if line.server.queue is None else rate_text(line.server.queue)


def pktinfo_text(server: Server) -> str:
    """Return whether the wildcard sockets of a server have PKTINFO set; "-": it has no such socket."""
    if server.addresses and not _WILDCARDS.intersection(server.addresses):
        return "-"
    return {True: "yes", False: "no", None: "?"}[server.pktinfo]


def _risk(line: ServerLine, _: float) -> str:
    return safe(line.server.risk)


def _brief_risk(line: ServerLine, _: float) -> str:
    return "?" if line.server.risk == Risk.UNKNOWN else safe(line.server.risk)


def _style(when: Callable[[ServerLine], bool], style: str) -> Callable[[ServerLine], str]:
    return lambda line: style if when(line) else "total"


def _risk_style(line: ServerLine) -> str:
    return "wrong" if line.server.risk == Risk.WRONG else "paused" if line.server.risk in _SOME else "quiet"


_REQUESTS = Column("requests", ("requests/s", "req/s"), _rate("requests"), True, ServerOrder.REQUESTS,
                   style=lambda _: "rate")  # fmt: skip
_TRAFFIC = (
    _REQUESTS,
    Column("replies", ("replies/s", "rep/s"), _rate("replies"), True, ServerOrder.REPLIES, style=lambda _: "total"),
    Column("unanswered", ("unanswered", "unans"), _unanswered, True, ServerOrder.UNANSWERED, style=lambda _: "total"),
    Column("wrong", ("wrong/s", "wrong"), _rate("wrong"), True, ServerOrder.WRONG,
           style=_style(lambda line: bool(line.rates and line.rates.wrong), "wrong")),
    Column("drops", ("drops/s", "drops"), _drops, True, ServerOrder.DROPS,
           style=_style(lambda line: bool(line.rates and line.rates.drops), "wrong")),
    Column("queue", ("queue",), _queue, True, style=lambda _: "total"),
)  # fmt: skip
_RISK = Column("risk", ("risk",), _risk, False, ServerOrder.RISK, _brief_risk, _risk_style)
_WIDTHS = dict.fromkeys(("requests", "replies", "unanswered", "wrong", "drops", "queue", "port", "nodes"), 5)
_OPTIONAL = ("queue", "pktinfo", "bound", "replies", "drops", "wrong", "unanswered")
_SHORTENED = (frozenset[str](), frozenset({"risk"}), frozenset({"risk", "location"}))

SERVERS = Table(
    (
        NODE,
        *name_columns(ServerOrder.PROCESS, ServerOrder.LOCATION, ServerOrder.PORT, folded=False),
        Column("bound", ("bound to", "bound"), _bound, style=lambda _: "cause"),
        *_TRAFFIC,
        Column("pktinfo", ("PKTINFO", "pkt"), lambda line, _: pktinfo_text(line.server), style=lambda _: "cause"),
        _RISK,
    ),
    _WIDTHS,
    SHRINKS,
    _SHORTENED,
    _OPTIONAL,
)
#: of all nodes, and of single nodes of a cluster: Prometheus knows neither addresses nor options
FOLDED_SERVERS = Table(
    (*name_columns(ServerOrder.PROCESS, ServerOrder.LOCATION, ServerOrder.PORT, folded=True), NODES, *_TRAFFIC, _RISK),
    _WIDTHS,
    SHRINKS,
    _SHORTENED,
    _OPTIONAL,
)
NODE_SERVERS = Table(
    tuple(column for column in SERVERS.columns if column.name not in {"bound", "pktinfo"}),
    _WIDTHS,
    SHRINKS,
    _SHORTENED,
    _OPTIONAL,
)


def servers_table(view: View) -> Table:
    """Return the table that shows the servers of a view."""
    if view.folded:
        return FOLDED_SERVERS
    return NODE_SERVERS if view.cluster else SERVERS


def no_servers(view: View) -> str:
    """Return the text of a table without servers."""
    if not view.has_servers:
        return "Reading the servers ..."
    agents = "The agents list" if view.cluster else "The agent lists"
    return f"{agents} no UDP servers; older agents and recordings list none."


def server_title(line: ServerLine) -> str:
    """Return the title of the detail pane."""
    return f"{safe(line.key.process) or 'unknown process'}, port {line.key.port}/udp"


def server_detail(line: ServerLine, fix: str, width: int, view: View) -> list[StyledLine]:
    """Return the lines of the detail pane. ``fix``: how to fix the server; "": unknown."""
    server, rates = line.server, line.rates
    lines = [("nodes", f"{line.nodes}; g shows each of them")] if view.folded else []
    lines += process_lines(server.sender, line.key.node if view.cluster and not view.folded else "")
    if server.addresses:
        option = {"yes": "with PKTINFO", "no": "without PKTINFO", "?": "PKTINFO unknown", "-": ""}[pktinfo_text(server)]
        lines.append(("bound to", ", ".join(filter(None, (*map(safe, server.addresses), option)))))
    lines.append(
        (
            "traffic",
            f"{count_text(server.requests)} requests, {count_text(server.replies)} replies, "
            f"{count_text(server.wrong)} wrong; {count_text(server.unanswered)} requests unanswered"
            + (f", {share_text(rates.unanswered)} in the last minute" if rates and rates.requests else ""),
        )
    )
    drops = "unknown" if server.drops is None else count_text(server.drops)
    queue = "" if server.queue is None else f"; {count_text(server.queue)} bytes wait"
    limit = "" if server.queue_limit is None else f" of {count_text(server.queue_limit)}"
    lines.append(("buffer", f"{drops} drops{queue}{limit if queue else ''}"))
    if server.last:
        lines.append(("last", f"request at {clock_text(server.last)}"))
    lines.append(("risk", f"{sockets_text(server.at_risk)} at risk" if view.cluster else _risk_text(server)))
    if server.risk in {Risk.WRONG, *_SOME}:
        lines.append(("fix", safe_lines(fix or GENERAL_FIX)))
        command = "Tab shows its wrong replies" if server.risk == Risk.WRONG else "`udpwatch audit` lists the addresses"
        lines.append(("more", f"{command}; `udpwatch explain {line.key.port}` looks at the port"))
    else:
        lines.append(("more", f"`udpwatch explain {line.key.port}` says why UDP to this port does not work"))
    return [each for label, text in lines for each in labelled(label, text, width)]


def _risk_text(server: Server) -> str:
    return f"{safe(server.risk)}: {RISKS[server.risk]}" if server.risk in RISKS else safe(server.risk)
