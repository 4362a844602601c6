"""Whether the server replies, and from which address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from udpwatch.agent.model import Cause, Row, Sender, Server, Verdict
from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.statements import Kind, Statement, count, end, several


def of_agent(before: Server | None, after: Server, time: str) -> Statement:
    """Say what the agent counted of a server in a namespace that this process could not look into."""
    old = before or replace(after, requests=0, replies=0, unanswered=0, drops=0)
    requests, answered = after.requests - old.requests, after.replies - old.replies
    dropped = (after.drops or 0) - (old.drops or 0)
    text = (
        f"By the agent, {after.sender.title} listens on "
        f"{several(end(each, after.port) for each in after.addresses)}: "
        f"{count(requests, 'request')} and {count(answered, 'reply', 'replies')} in {time}, {after.requests:,} and "
        f"{after.replies:,} in all, {after.unanswered:,} unanswered."
    )
    if dropped > 0:
        limit = f" of {after.queue_limit:,} bytes" if after.queue_limit else ""
        text += (
            f" Its receive buffers{limit} were full: {count(dropped, 'datagram')} dropped. Enlarge them (SO_RCVBUF)."
        )
        return Statement(Kind.RECEIVE_BUFFER, True, text)
    if requests > 0 and not answered:
        return Statement(Kind.NO_REPLY, True, f"{text} Its own log tells why it does not reply.")
    return Statement(Kind.REPLIES if requests else Kind.LISTENS, False, text)


def replies(case: Case, explained: bool) -> Iterator[Statement]:
    """Compare the replies that left with the requests that arrived. ``explained``: it is known why none left."""
    agent = _agent(case)
    if case.facts.traffic is None:
        if agent:
            yield Statement(Kind.REPLIES, False, agent)
        return
    if not case.requests:
        yield _nothing_arrives(case, agent)
    if any(each.wrong for each in case.matched):
        yield _wrong_source(case)
    if any(each.replies for each in case.matched):
        yield _right(case, agent)
    elif case.is_unanswered and not explained and not case.lost and not any(map(case.waits, case.facts.sockets)):
        yield _no_reply(case, agent)


def _nothing_arrives(case: Case, agent: str) -> Statement:
    there = "machine" if case.facts.here else "namespace"
    text = f"No request for this port arrived at a device of this {there} in {case.time}."
    addresses = f" ({several(case.facts.addresses)})" if case.facts.addresses else ""
    text += f" If a client asked, its request was lost on the way, or went to an address that is not here{addresses}."
    for device in case.facts.devices:
        if device.has_xdp:
            text += f" An XDP program on {device.name} sees each packet first, and may drop it."
        if device.dropped:
            text += f" {device.name} dropped {count(device.dropped, 'packet')} of any kind on receipt."
    fix = f"tcpdump -ni any udp port {case.port}  # on the client"
    return Statement(Kind.NOTHING_ARRIVES, False, f"{text} {agent}".rstrip(), fix)


def _wrong_source(case: Case) -> Statement:
    sources = Counter[tuple[str, str]]()
    for each in case.matched:
        for source, number in each.wrong.items():
            sources[each.address, source] += number
    (asked, source), number = sources.most_common(1)[0]
    total = sum(sources.values())
    of_them = "" if number == total else f"{number:,} of them: "
    text = (
        f"{count(total, 'reply', 'replies')} left from another address than the one that was asked ({of_them}asked at "
        f"{asked}, replied from {source}) in {case.time}."
    )
    return Statement(Kind.WRONG_SOURCE, True, text, row=_row(case, asked, source, number))


def _row(case: Case, asked: str, source: str, number: int) -> Row:
    served = next((each for each in case.facts.sockets if each.socket.pid), case.facts.sockets[0])
    return Row(
        sender=served.sender if served.sender.process else Sender(served.socket.process, served.socket.pid),
        port=case.port,
        expected=asked,
        actual=source,
        verdict=Verdict.UNKNOWN,
        cause=Cause.UNKNOWN,
        family=6 if ":" in asked else 4,
        count=number,
        first=0.0,
        last=0.0,
    )


def _right(case: Case, agent: str) -> Statement:
    requests = sum(each.requests for each in case.matched)
    answered = sum(each.replies for each in case.matched)
    clients = len({(each.peer, each.peer_port) for each in case.matched})
    silent = sum(each.requests for each in case.matched if not each.replies and not each.wrong)
    text = (
        f"It replies from the address that was asked: {count(requests, 'request')} of "
        f"{count(clients, 'client socket')}, {count(answered, 'reply', 'replies')} in {case.time}, at "
        f"{several(each.address for each in case.matched if each.replies)}."
    )
    if silent:
        text += f" {count(silent, 'request')} of clients that got no reply in that time."
    if case.missed:
        text += f" {count(case.missed, 'more datagram')} were not looked at."
    return Statement(Kind.REPLIES, False, f"{text} {agent}".rstrip())


def _no_reply(case: Case, agent: str) -> Statement:
    requests = sum(each.requests for each in case.matched)
    if any(each.has_no_process for each in case.facts.sockets):
        text = (
            f"{count(requests, 'request')} arrived in {case.time} and no reply left. A tunnel of the kernel sends none."
        )
        return Statement(Kind.NO_REPLY, False, f"{text} {agent}".rstrip())
    counters = case.facts.counters
    read = "; the server reads them" if counters and counters.received >= requests else ""
    # Of very many datagrams, not all are looked at: a reply may be among the others.
    seen = f" was seen ({count(case.missed, 'more datagram')} were not looked at)" if case.missed else " left"
    text = (
        f"{count(requests, 'request')} arrived in {case.time} and no reply{seen}{read}. The server's own log tells why "
        f"(who may ask, keys, a server that it asks itself). One that only collects, such as syslog, never replies."
    )
    pid = next((each.socket.pid for each in case.facts.sockets if each.socket.pid), 0)
    fix = f"strace -f -e trace=%network -p {pid}" if pid else ""
    return Statement(Kind.NO_REPLY, not case.missed, f"{text} {agent}".rstrip(), fix)


def _agent(case: Case) -> str:
    """Say what a running agent has counted."""
    if not case.facts.servers:
        return ""
    asked, answered, silent = (
        sum(getattr(after, name) for _, after in case.facts.servers) for name in ("requests", "replies", "unanswered")
    )
    counted = f"{count(asked, 'request')}, {count(answered, 'reply', 'replies')}, {silent:,} unanswered"
    return f"The agent has counted {counted}."
