"""Format the output of `udpwatch audit`: text in 80 columns, or one JSON object."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from udpwatch.agent.client.explain import Advice, advice, advice_object, remedy_advice
from udpwatch.agent.client.lines import safe, safe_lines, safe_paragraph
from udpwatch.agent.client.remedies import remedy_of
from udpwatch.agent.model import Cause, Risk, Row, Verdict
from udpwatch.agent.servers.audit import AT_RISK, ORDER, ServerRisk, WrongReply
from udpwatch.agent.servers.networks import PeerKind, Peers

WIDTH = 79
MAX_SENTENCES = 6  # of one server
MAX_SERVERS = 50  # with their details
MAX_LISTED = 65_536  # wrong replies in a JSON object; each server may list an equal share, but LEAST_LISTED
LEAST_LISTED = 8
_LABEL = 10
_SHOWN = 3  # addresses in a sentence
_COLOURS = {Risk.WRONG: "31", Risk.VIRTUAL: "33", Risk.POSSIBLE: "33", Risk.UNKNOWN: "35", Risk.NONE: "32"}


def report_text(servers: Sequence[ServerRisk], everything: bool, colour: bool) -> str:
    """Describe the servers at risk and the unknown ones; with ``everything``, list the others too."""
    lines = [summary(servers)]
    advised: dict[tuple[str, str], str] = {}
    shown = [server for server in servers if server.risk is not Risk.NONE]
    for server in shown[:MAX_SERVERS]:
        lines += ["", *_head(server, colour), *_body(server), *_advice(server, advised)]
    if len(shown) > MAX_SERVERS:
        lines += ["", f"{len(shown) - MAX_SERVERS} more servers: see --json."]
    others = [server for server in servers if server.risk is Risk.NONE]
    if everything and others:
        lines += ["", "Not at risk:", *(line for server in others for line in _line(server))]
    return "\n".join(lines)


def summary(servers: Sequence[ServerRisk]) -> str:
    """Return the number of servers at risk."""
    counts = Counter(server.risk for server in servers)
    at_risk = sum(counts[risk] for risk in AT_RISK)
    parts = ", ".join(f"{counts[risk]} {risk}" for risk in AT_RISK if counts[risk])
    sentence = f"At risk: {at_risk} of {len(servers)} UDP servers{f' ({parts})' if parts else ''}."
    return sentence + (f" Unknown: {counts[Risk.UNKNOWN]}." if counts[Risk.UNKNOWN] else "")


def report_object(servers: Sequence[ServerRisk], notes: Sequence[str], everything: bool) -> dict[str, Any]:
    """Return the report as a JSON object."""
    counts = Counter(server.risk for server in servers)
    shown = [server for server in servers if everything or server.risk is not Risk.NONE]
    share = max(MAX_LISTED // max(len(shown), 1), LEAST_LISTED)
    return {
        "counts": {str(risk): counts[risk] for risk in ORDER},
        "notes": list(notes),
        "servers": [_object(server, share) for server in shown],
    }


def _object(server: ServerRisk, share: int) -> dict[str, Any]:
    """Describe one server with at most ``share`` wrong replies."""
    sender = server.sender
    return {
        "risk": str(server.risk),
        "reason": server.reason or None,
        "process": sender.process or None,
        "pid": sender.pid or None,
        "executable": sender.executable or None,
        "namespace": sender.namespace or None,
        "pod": sender.pod or None,
        "container": sender.container or None,
        "netns": server.netns or None,
        "port": server.port,
        "bound": list(server.bound),
        "sockets": server.sockets,
        "sockets_at_risk": server.at_risk,
        "pktinfo": server.pktinfo,
        "addresses": list(server.addresses),
        "wrong": [_wrong_object(reply) for reply in server.wrong[:share]],
        "wrong_not_listed": server.more + max(0, len(server.wrong) - share),
        "seen": [{"expected": row.expected, "actual": row.actual, "count": row.count} for row in server.seen],
        "healed": [{"asked": row.expected, "count": row.count} for row in server.healed],
        "requests": server.requests,
        "replies": server.replies,
        "remedy": advice_object(fix) if (fix := _fix(server)) else None,
    }


def _wrong_object(reply: WrongReply) -> dict[str, Any]:
    peers = reply.peers
    return {
        "asked": reply.address,
        "risk": str(reply.risk),
        "peers": str(peers.kind) if peers else "host",
        "network": peers.network if peers else None,
        "interface": peers.interface if peers else "lo",
        "replies_from": list(reply.sources),
        "always": not reply.sometimes,
    }


def _fix(server: ServerRisk) -> Advice | None:
    """Return how to fix a server at risk; None: it is not at risk, or too little is known."""
    if server.seen or server.healed:
        return advice((server.seen or server.healed)[0])
    if server.wrong:
        reply = server.wrong[0]
        verdict, cause = str(Verdict.UNKNOWN), str(Cause.KERNEL_CHOSEN)
        addresses = reply.address, reply.sources[0]
        return advice(Row(server.sender, server.port, *addresses, verdict, cause, reply.family, 0, 0, 0))
    remedy = remedy_of(server.sender) if server.risk in AT_RISK else None
    return remedy_advice(remedy) if remedy else None


def _title(server: ServerRisk) -> str:
    return f"{safe(server.sender.title)}, port {server.port}/udp"


def _head(server: ServerRisk, colour: bool) -> list[str]:
    label = f"{server.risk:<{_LABEL}}"
    if colour:
        label = f"\x1b[1;{_COLOURS[server.risk]}m{label}\x1b[0m"
    first, *more = textwrap.wrap(_title(server), WIDTH - _LABEL, break_on_hyphens=False) or [""]
    return [label + first, *(" " * _LABEL + line for line in more)]


def _body(server: ServerRisk) -> list[str]:
    bound = f"Bound to {_listed(server.bound)}{f' by {server.sockets} sockets' if server.sockets > 1 else ''}"
    has_pktinfo = {True: ", with PKTINFO", False: ", without PKTINFO", None: ""}[server.pktinfo]
    sentences = [f"{bound}{has_pktinfo}{f': {server.reason}' if server.reason else ''}."]
    seen = sorted(server.seen, key=lambda row: -row.count)
    sentences += [
        f"Seen: asked at {row.expected}, it replied from {row.actual} {_times(row.count)}."
        for row in seen[:MAX_SENTENCES]
    ]
    sentences += [
        f"Healed: asked at {row.expected}, udpwatch set this source {_times(row.count)}. It still needs the fix."
        for row in server.healed[:MAX_SENTENCES]
    ]
    if server.requests and not server.replies:
        sentences.append(f"So far it got {server.requests} requests and sent no reply: perhaps it only receives.")
    predicted = _predictions(server)
    sentences += predicted[:MAX_SENTENCES]
    left_out = max(0, len(seen) - MAX_SENTENCES, len(server.healed) - MAX_SENTENCES) + max(
        0, len(predicted) - MAX_SENTENCES
    )
    if left_out or server.more:
        sentences.append("There is more: see --json.")
    return [line for sentence in sentences for line in _paragraph(sentence)]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _predictions(server: ServerRisk) -> list[str]:
    """Return a sentence for each group of peers with the same wrong source."""
    groups: dict[tuple[Peers | None, tuple[str, ...], bool], list[str]] = {}
    for reply in server.wrong:
        groups.setdefault((reply.peers, reply.sources, reply.sometimes), []).append(reply.address)
    found = []
    for (peers, sources, sometimes), addresses in groups.items():
        some = "some of " if sometimes else ""
        source = _listed(sources, "or")
        found.append(f"Asked at {_listed(addresses)} by {some}{_peers(peers)}: it replies from {source}.")
    return found


def _peers(peers: Peers | None) -> str:
    if peers is None:
        return "clients on this host"
    on = f" ({safe(peers.interface)})" if peers.interface else ""
    if peers.kind is PeerKind.DEFAULT:
        return f"peers on the default route{on}"
    if peers.kind is PeerKind.CONTAINERS:
        where = f" on {safe(peers.interface)}" if peers.interface and not peers.more else ""
        return f"containers{where} ({peers.network}{_more(peers)})"
    return f"{peers.network}{_more(peers)}{on}"


def _more(peers: Peers) -> str:
    return f" and {peers.more} more network{'s' if peers.more > 1 else ''}" if peers.more else ""


def _listed(words: Sequence[str], last: str = "and") -> str:
    if len(words) > _SHOWN + 1:
        words = [*words[:_SHOWN], f"{len(words) - _SHOWN} more"]
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _advice(server: ServerRisk, advised: dict[tuple[str, str], str]) -> Iterable[str]:
    fix = _fix(server)
    if fix is None:
        return
    title = _title(server)
    if (first := advised.setdefault((fix.do, fix.config), title)) != title:
        yield from _paragraph(f"Fix: the same as for {first}.")
        return
    yield from _paragraph(f"Fix ({fix.server}): {fix.do}" if fix.server else f"Fix: {fix.do}")
    if fix.config:
        yield from ("", *(f"{' ' * _LABEL}    {line}".rstrip() for line in safe_lines(fix.config).split("\n")), "")
    if fix.source:
        yield f"{' ' * _LABEL}{fix.source}"


def _paragraph(text: str) -> list[str]:
    indent = " " * _LABEL
    return safe_paragraph(text, WIDTH, indent, indent)


def _line(server: ServerRisk) -> list[str]:
    text = f"{_title(server)}, on {_listed(server.bound)}: {server.reason}"
    return safe_paragraph(text, WIDTH, "  ", "    ")
