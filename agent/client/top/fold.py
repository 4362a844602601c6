"""Sums over the nodes of a cluster: the queries for Prometheus, and the view of their results. No I/O.

Prometheus sums, so that a look at a thousand nodes reads tens of rows. A row is a process name, a namespace and a port.
A row is unfolded by reading the series of its labels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from udpwatch.agent.client.top.rows import Healed, Key, View, key_of
from udpwatch.agent.client.top.traffic import Rates, ServerKey
from udpwatch.agent.model import HARMFUL_REFUSALS, Cause, Risk, Row, Sender, Server, Snapshot, Verdict

MISMATCH = "udpwatch_reply_source_mismatch_total"
CHECKED = "udpwatch_replies_checked_total"
HEALED = "udpwatch_healed_replies_total"
REFUSED = "udpwatch_heal_refused_total"
HEAL_ACTIVE = "udpwatch_heal_active"
LOST = "udpwatch_events_lost_total"
NODE_FAULTS = "udpwatch_node_faults_total"
UNWATCHED = "udpwatch_unwatched"
BUILD_INFO = "udpwatch_build_info"
AT_RISK = "udpwatch_sockets_at_risk"
_SERVER = "udpwatch_server_{}_total"
_QUEUE = "udpwatch_server_receive_queue_bytes"
# irate uses the last two scrapes within this window, so five minutes fit every usual scrape interval.
WINDOW = "5m"
OTHER = "other"  # the label value of what is beyond an agent's limit of rows or servers
MAX_PORT_DIGITS = 5

#: If the scrape target has a label of the same name, Prometheus renames the agent's label to exported_NAME.
_GROUP = tuple(f"{prefix}{name}" for name in ("process", "port", "namespace") for prefix in ("", "exported_"))
_BY = ",".join(_GROUP)
_WHAT = "what"  # the label that tells the results of one query apart
_SERVER_COUNTS = {"requests": "requests", "replies": "replies", "unanswered": "unanswered", "drops": "receive_drops"}

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


def label(labels: Labels, name: str) -> str:
    """Return the value of a label of the agent; "": none."""
    return labels.get(f"exported_{name}", labels.get(name, ""))


def port_of(labels: Labels) -> int:
    """Return the port; 0: it is not a number."""
    port = label(labels, "port")
    return int(port) if port.isascii() and port.isdecimal() and len(port) <= MAX_PORT_DIGITS else 0


def node_of(labels: Labels) -> str:
    """Return the node's name if the scrape adds it, as the chart's monitors do; else the scraped address."""
    return labels.get("node") or labels.get("instance", "")


def row_of(labels: Labels, count: int) -> Row:
    expected = label(labels, "expected")
    return Row(
        sender=_sender(labels),
        port=port_of(labels),
        expected=expected,
        actual=label(labels, "actual"),
        verdict=label(labels, "verdict"),
        cause=label(labels, "cause"),
        family=6 if ":" in expected else 4,
        count=count,
        first=0.0,
        last=0.0,
    )


def healed_row_of(labels: Labels, count: int) -> Row:
    """Return the row of a series of HEALED; without addresses, if it is a sum."""
    asked = label(labels, "asked")
    row = replace(row_of(labels, count), expected=asked, actual=asked, family=6 if ":" in asked else 4)
    return replace(row, verdict=str(Verdict.HEALED), cause=str(Cause.KERNEL_CHOSEN))


def _sender(labels: Labels) -> Sender:
    process, container, namespace, pod = (label(labels, each) for each in ("process", "container", "namespace", "pod"))
    return Sender(process, container=container, namespace=namespace, pod=pod)


# Queries


def _union(parts: Mapping[str, str]) -> str:
    """Combine queries; the label _WHAT of each result is its name."""
    return " or ".join(f'label_replace({query}, "{_WHAT}", "{name}", "", "")' for name, query in parts.items())


def _named(metric: str) -> str:
    """Return the series with the label `node`, even if the scrape does not add it."""
    return f'({metric}{{node!=""}} or label_replace({metric}{{node=""}}, "node", "$1", "instance", "(.*)"))'


def _facts() -> dict[str, str]:
    return {
        "nodes": f"count(count by (node) ({_named(BUILD_INFO)}))",
        "lost": f"sum by (stage) ({LOST})",
        "faults": f"sum by (fault) ({NODE_FAULTS})",
        "unwatched": f"sum by (kind) ({UNWATCHED})",
        "checked": f"sum({CHECKED})",
        "checked_rate": f"sum(irate({CHECKED}[{WINDOW}]))",
        "at_risk": f"sum({AT_RISK})",
        "found": f'count({MISMATCH}{{port!="{OTHER}"}})',
        "all_wrong_rate": f"sum(irate({MISMATCH}[{WINDOW}]))",
        "other": f'sum({MISMATCH}{{port="{OTHER}"}})',
        "all_healed": f"sum({HEALED})",
        "healed_servers": f'count(count without (asked) ({HEALED}{{port!="{OTHER}"}}))',
        "refused": f'sum({REFUSED}{{reason=~"{"|".join(HARMFUL_REFUSALS)}"}})',
        "idle": f"count({HEAL_ACTIVE} == 0)",
    }


def _parts(servers: bool) -> dict[str, tuple[str, str]]:
    """Return name -> (function over a window, metric) of what is read of each row."""
    parts = {"wrong": ("", MISMATCH), "wrong_rate": ("irate", MISMATCH)}
    parts |= {"healed": ("", HEALED), "healed_rate": ("irate", HEALED)}
    if servers:
        for name, metric in _SERVER_COUNTS.items():
            parts[name] = "", _SERVER.format(metric)
            parts[f"{name}_rate"] = ("rate" if name == "unanswered" else "irate"), _SERVER.format(metric)
        parts |= {"asked_rate": ("rate", _SERVER.format("requests")), "queue": ("", _QUEUE), "risk": ("", AT_RISK)}
    return parts


def folded_query(servers: bool) -> str:
    """Return the query for the sums over all nodes: of findings or, with ``servers``, also of servers."""
    queries = _facts()
    for name, (function, metric) in _parts(servers).items():
        series = f"{function}({metric}[{WINDOW}])" if function else metric
        queries[name] = f"sum by ({_BY}) ({series})"
    findings = (("wrong_on", MISMATCH), ("healed_on", HEALED))
    for name, metric in (*findings, *((("on", _SERVER.format("requests")),) if servers else ())):
        queries[name] = f"count by ({_BY}) (count by ({_BY},node) ({_named(metric)}))"
    return _union(queries)


def unfolded_query(groups: Iterable[Labels], servers: bool) -> str:
    """Return the query for the single series of one folded row; ``groups``: its labels, of one or more series."""
    matchers = [",".join(f"{name}={_quoted(group.get(name, ''))}" for name in _GROUP) for group in groups]
    queries = _facts()
    for name, (function, metric) in _parts(servers).items():
        series = [f"{metric}{{{each}}}" for each in matchers]
        queries[name] = " or ".join(f"{function}({each}[{WINDOW}])" if function else each for each in series)
        queries[name] = f"({queries[name]})"
    return _union(queries)


def _quoted(value: str) -> str:
    """Quote a label's value for a query."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


# Results


@dataclass(slots=True)
class Folded:
    """The rows that a query returned."""

    facts: dict[str, float] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    unwatched: dict[str, int] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)
    rates: dict[Key, float] = field(default_factory=dict)
    nodes: dict[Key | ServerKey, int] = field(default_factory=dict)
    servers: dict[ServerKey, dict[str, float]] = field(default_factory=dict)
    senders: dict[ServerKey, Sender] = field(default_factory=dict)
    groups: dict[Key | ServerKey, list[Labels]] = field(default_factory=dict)  # the labels behind each row

    def add(self, labels: Labels, value: float) -> None:
        """Add one result of a query of this module."""
        what = labels.get(_WHAT, "")
        if what == "lost":
            self.lost[labels.get("stage", "")] = int(value)
        elif what == "faults":
            self.faults[labels.get("fault", "")] = int(value)
        elif what == "unwatched":
            self.unwatched[labels.get("kind", "")] = int(value)
        elif what in _FACTS:
            self.facts[what] = value
        elif label(labels, "port") != OTHER:
            self._add_row(what, labels, value)

    def _add_row(self, what: str, labels: Labels, value: float) -> None:
        count = int(value) if what in {"wrong", "healed"} else 0
        row = healed_row_of(labels, count) if what in _HEALED else row_of(labels, count)
        sender, node = row.sender, node_of(labels)
        server = ServerKey(node, sender.process, sender.namespace, sender.pod, sender.container, row.port)
        key = key_of(node, row)
        if what in {"wrong", "healed"}:
            known = self.rows.get(key)
            self.rows[key] = replace(row, count=row.count + known.count) if known else row
        elif what in {"wrong_rate", "healed_rate"}:
            self.rates[key] = self.rates.get(key, 0.0) + value
        elif what in {"wrong_on", "healed_on"}:
            self.nodes[key] = self.nodes.get(key, 0) + int(value)
        elif what == "on":
            self.nodes[server] = self.nodes.get(server, 0) + int(value)
        if what in {"wrong", "healed", "requests"}:
            group = {name: labels[name] for name in _GROUP if name in labels}
            self.groups.setdefault(server if what == "requests" else key, []).append(group)
        if what == "requests":
            self.senders[server] = sender
        sums = self.servers.setdefault(server, {})
        sums[what] = sums.get(what, 0.0) + value


_FACTS = frozenset(_facts())
_HEALED = frozenset({"healed", "healed_rate", "healed_on"})


def folded_of(samples: Iterable[Sample]) -> Folded:
    """Collect the results of a query of this module."""
    folded = Folded()
    for labels, value in samples:
        folded.add(labels, value)
    return folded


def view_of_folded(now: float, found: Folded, folded: bool, servers: bool) -> View:
    """Build the view of a query's results. ``folded``: they are sums over nodes; ``servers``: they contain servers."""
    facts = found.facts
    nodes = {key.node for key in found.rows} | {key.node for key in found.senders}
    snapshots = [_snapshot(name, found, now) for name in sorted(nodes - {""})]
    whole = replace(
        _snapshot("", found, now),
        lost=found.lost,
        node_faults=found.faults,
        unwatched=found.unwatched,
        other=int(facts.get("other", 0)),
        checked=int(facts.get("checked", 0)),
    )
    return View(
        time=now,
        snapshots=(whole, *snapshots),
        cluster=True,
        rates=found.rates,
        wrong=facts.get("all_wrong_rate", 0.0),
        checked=facts.get("checked_rate", 0.0),
        server_rates={key: _rates(found.servers[key]) for key in found.senders},
        folded=folded,
        nodes=found.nodes,
        node_count=int(facts.get("nodes", 0)),
        found=int(facts.get("found", 0)),
        at_risk=int(facts.get("at_risk", 0)),
        has_servers=servers,
        healed=Healed(*(int(facts.get(each, 0)) for each in ("all_healed", "healed_servers", "refused", "idle"))),
    )


def _rates(sums: Mapping[str, float]) -> Rates:
    asked = sums.get("asked_rate", 0.0)
    return Rates(
        requests=sums.get("requests_rate", 0.0),
        replies=sums.get("replies_rate", 0.0),
        wrong=sums.get("wrong_rate", 0.0),
        drops=sums.get("drops_rate", 0.0),
        unanswered=min(1.0, sums.get("unanswered_rate", 0.0) / asked) if asked else None,
    )


def _snapshot(node: str, found: Folded, now: float) -> Snapshot:
    return Snapshot(
        version="",
        kernel="",
        node=node,
        mode="",
        started=0.0,
        time=now,
        ready=True,
        notes=(),
        rows=tuple(row for key, row in found.rows.items() if key.node == node),
        other=0,
        checked=0,
        tracked_peers=0,
        evicted_peers=0,
        lost={},
        probes=(),
        servers=tuple(_server(key, found) for key in found.senders if key.node == node),
    )


def _server(key: ServerKey, found: Folded) -> Server:
    sums = {name: int(value) for name, value in found.servers[key].items()}
    at_risk = sums.get("risk", 0)
    wrong = sums.get("wrong", 0)
    return Server(
        sender=found.senders[key],
        port=key.port,
        netns=0,
        addresses=(),
        requests=sums.get("requests", 0),
        replies=sums.get("replies", 0),
        unanswered=sums.get("unanswered", 0),
        wrong=wrong,
        drops=sums.get("drops"),
        queue=sums.get("queue"),
        queue_limit=None,
        pktinfo=None,
        risk=Risk.WRONG if wrong else Risk.POSSIBLE if at_risk else Risk.NONE,
        first=0.0,
        last=0.0,
        at_risk=at_risk,
    )
