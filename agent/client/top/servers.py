"""The rows of the table of servers: order, filter, sums. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from udpwatch.agent.client.top.rows import View, matching
from udpwatch.agent.client.top.traffic import Rates, ServerKey, server_key
from udpwatch.agent.model import Risk, Sender, Server


@dataclass(frozen=True, slots=True)
class ServerLine:
    """A server as displayed."""

    key: ServerKey
    server: Server
    location: str  # namespace/pod, else container
    rates: Rates | None  # None: not known yet
    nodes: int = 1  # on which it runs

    @property
    def is_quiet(self) -> bool:
        """Return whether it receives nothing."""
        return self.rates is None or not (self.rates.requests or self.rates.replies or self.rates.drops)

    @property
    def words(self) -> str:
        """Return the text that the filter searches."""
        key, sender, server = self.key, self.server.sender, self.server
        names = (key.node, key.process, self.location, sender.container, sender.command, sender.executable)
        return "\n".join((*names, str(key.port), *server.addresses, str(server.risk))).casefold()


class ServerOrder(StrEnum):
    """The sort key of servers: numbers in descending order, names in ascending order."""

    RISK = "risk"
    REQUESTS = "requests"
    REPLIES = "replies"
    UNANSWERED = "unanswered"
    WRONG = "wrong"
    DROPS = "drops"
    PROCESS = "process"
    LOCATION = "location"
    PORT = "port"

    @property
    def next(self) -> ServerOrder:
        """Return the order that the key `s` switches to."""
        every = list(ServerOrder)
        return every[(every.index(self) + 1) % len(every)]

    @property
    def falls(self) -> bool:
        """Return whether the largest value comes first."""
        return self not in {ServerOrder.PROCESS, ServerOrder.LOCATION, ServerOrder.PORT}


_RISKS = {Risk.WRONG: 4, Risk.VIRTUAL: 3, Risk.POSSIBLE: 2, Risk.UNKNOWN: 1, Risk.NONE: 0}
_NO_RATES = Rates()

_SORTED_BY = {
    ServerOrder.RISK: lambda line: _RISKS.get(line.server.risk, 1),
    ServerOrder.REQUESTS: lambda line: (line.rates or _NO_RATES).requests,
    ServerOrder.REPLIES: lambda line: (line.rates or _NO_RATES).replies,
    ServerOrder.UNANSWERED: lambda line: (line.rates or _NO_RATES).unanswered or 0.0,
    ServerOrder.WRONG: lambda line: (line.rates or _NO_RATES).wrong,
    ServerOrder.DROPS: lambda line: (line.rates or _NO_RATES).drops,
    ServerOrder.PROCESS: lambda line: line.key.process.casefold(),
    ServerOrder.LOCATION: lambda line: line.location.casefold(),
    ServerOrder.PORT: lambda line: line.key.port,
}


def server_rows(view: View, order: ServerOrder, backwards: bool = False, words: str = "") -> list[ServerLine]:
    """Return the sorted servers that contain all ``words``. Of equal ones, the busiest is first."""
    rates = view.server_rates
    lines = []
    for each in view.snapshots:
        for server in each.servers:
            key = server_key(each.node, server)
            rate = None if rates is None else rates.get(key, _NO_RATES)
            where = key.namespace if view.folded else _location(server.sender)
            lines.append(ServerLine(key, server, where, rate, view.nodes.get(key, 1)))
    lines = matching(lines, words)
    lines.sort(key=lambda line: line.key)
    lines.sort(key=lambda line: (-(line.rates or _NO_RATES).requests, -line.server.requests))
    lines.sort(key=_SORTED_BY[order], reverse=order.falls is not backwards)
    return lines


def _location(sender: Sender) -> str:
    """Return the pod, else the container; "": on the host."""
    if sender.pod:
        return f"{sender.namespace}/{sender.pod}" if sender.namespace else sender.pod
    return sender.container


def at_risk_of(view: View) -> int:
    """Return the number of sockets that will reply from the wrong address, or have done so."""
    if view.at_risk is not None:
        return view.at_risk
    return sum(
        sum(server.at_risk for server in each.servers) + sum(each.other_at_risk.values()) for each in view.snapshots
    )


def other_servers_of(view: View) -> bool:
    """Return whether an agent has more servers than it lists."""
    return any(each.other_servers for each in view.snapshots)
