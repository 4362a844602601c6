"""Who listens on the port, and on what: the requests that match no socket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from udpwatch.agent.kernel.packet_tap import Conversation
from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.facts import NamespaceFacts, SocketFacts, is_loopback, is_wildcard
from udpwatch.agent.servers.port.matching import Mismatch
from udpwatch.agent.servers.port.statements import (
    MAX_NAMED,
    Kind,
    Statement,
    bound,
    count,
    end,
    owner,
    several,
)


def listeners(case: Case) -> Iterator[Statement]:
    """Name the processes and what they are bound to."""
    groups: dict[str, list[SocketFacts]] = {}
    for each in case.facts.sockets:
        groups.setdefault(owner(each), []).append(each)
    for name, sockets in islice(groups.items(), MAX_NAMED):
        places = Counter(bound(each) for each in sockets)
        texts = (f"{place} ({number} sockets)" if number > 1 else place for place, number in places.items())
        yield Statement(Kind.LISTENS, False, f"{name} listens on {several(texts)}.")
    if len(groups) > MAX_NAMED:
        more = count(len(groups) - MAX_NAMED, "more process", "more processes")
        yield Statement(Kind.LISTENS, False, f"{more} listen on the port.")


def no_listener(case: Case, served: list[NamespaceFacts]) -> Iterator[Statement]:
    """Say that nothing listens in a namespace, what asked in vain, and where something listens."""
    asked = sum(each.requests for each in case.local)
    elsewhere = bool(case.redirections) or bool(case.foreign and not asked)
    text = f"No socket listens on port {case.port}/udp here."
    if case.foreign:
        passed = sum(each.requests for each in case.foreign)
        text += f" {count(passed, 'request')} for other machines arrived in {case.time}"
        text += f" ({several(each.address for each in case.foreign)})."
    if asked and not case.redirections:
        addresses = several(each.address for each in case.local)
        text += (
            f" {count(asked, 'request')} arrived for {addresses} in {case.time} and found none; {unreachable(case)}."
        )
    elif case.facts.traffic is None and case.facts.counters and case.facts.counters.no_port:
        text += f" In {case.time}, {unreachable(case)}."
    if case.facts.tcp:
        yield Statement(
            Kind.ONLY_TCP,
            True,
            f"{text} A TCP socket listens on this port: set the server to serve UDP, too.",
            f"ss -lntp 'sport = :{case.port}'",
        )
    elif served or case.look.servers:
        names = [f"{owner(each.sockets[0])} in {each.name}" for each in served]
        places = several([*names, *(after.sender.title for _, after in case.look.servers)])
        yield Statement(Kind.OTHER_NAMESPACE, bool(asked) and not elsewhere, f"{text} It listens elsewhere: {places}.")
    else:
        advice = "" if elsewhere else " Start the server, or look up the port that it listens on."
        yield Statement(Kind.NOT_LISTENING, not elsewhere, text + advice, "" if elsewhere else "ss -lunp")


def unreachable(case: Case) -> str:
    """Say what the kernel counted for requests without a socket."""
    counters = case.facts.counters
    if counters is None:
        return "the kernel's counters could not be read"
    if case.local and all(each.group for each in case.local):  # it counts no NoPorts and sends no ICMP for a group
        return (
            f"the kernel counted {count(counters.ignored_group, 'datagram')} to groups without a socket (IgnoredMulti)"
        )
    if not counters.no_port:
        return "the kernel counted none of them (NoPorts), so they were dropped before it looked for a socket"
    return (
        f"the kernel counted {count(counters.no_port, 'datagram')} without a socket (NoPorts) and sent "
        f"{counters.unreachable:,} ICMP destination unreachable, for all ports together"
    )


def refusals(case: Case) -> Iterator[Statement]:
    """Say which requests arrived for the port and match none of its sockets, and why."""
    for reason, requests in case.refused.items():
        number = sum(each.requests for each in requests)
        addresses = several(each.address for each in requests)
        arrived = f"{count(number, 'request')} arrived for {addresses} in {case.time}"
        yield _refusal(case, reason, requests, arrived, f"; {unreachable(case)}")


def _refusal(case: Case, reason: Mismatch, requests: list[Conversation], arrived: str, result: str) -> Statement:
    sockets = case.facts.sockets
    addresses = several(each.address for each in requests)
    start = f"{arrived}, and the server listens only on {several(map(bound, sockets))}"
    match reason:
        case Mismatch.FAMILY:
            family, wildcard = ("IPv6", "::") if ":" in requests[0].address else ("IPv4", "0.0.0.0")  # noqa: S104
            text = f"{start}, not over {family}{result}. Let it listen on {wildcard} or {addresses}, too."
            return Statement(Kind.OTHER_FAMILY, True, text)
        case Mismatch.ONLY_IPV6:
            advice = "Let it listen on 0.0.0.0, too, or clear that option."
            text = f"{start}, which IPV6_V6ONLY limits to IPv6{result}. {advice}"
            return Statement(Kind.OTHER_FAMILY, True, text, "sysctl net.ipv6.bindv6only")
        case Mismatch.DEVICE:
            devices = several(each.device for each in requests)
            if vrfs := several(case.facts.vrfs[each.device] for each in requests if each.device in case.facts.vrfs):
                text = (
                    f"{start}, while they came through {devices} in the VRF {vrfs}{result}. Let it bind to the VRF, "
                    f"or let sockets without a device get the requests of all VRFs."
                )
                return Statement(Kind.OTHER_DEVICE, True, text, "sysctl -w net.ipv4.udp_l3mdev_accept=1")
            text = f"{start}, while they came through {devices}{result}. Let it bind to that device, or to none."
            return Statement(Kind.OTHER_DEVICE, True, text)
        case Mismatch.PEER:
            peers = several(end(each.peer, each.peer_port) for each in requests)
            text = (
                f"{start}; they came from {peers}, and a connected socket gets its peer's datagrams alone{result}. The "
                f"server needs a socket that is not connected."
            )
            return Statement(Kind.OTHER_PEER, True, text)
        case _:
            text = f"{start}{result}. Let it listen on {addresses}, or on all addresses."
            return Statement(Kind.OTHER_ADDRESS, True, text)


def addresses(case: Case) -> Iterator[Statement]:
    """Say which addresses do not lead to the sockets: the one that the user names, others' and loopback's."""
    facts = case.facts
    if facts.sockets and case.foreign:
        yield _foreign(case)
    if not facts.sockets or case.refused:
        return
    asked = case.look.asked
    if asked and asked in facts.local:
        request = Conversation("", 0, asked, "", False)
        reason = case.nearest(request)
        if reason in (Mismatch.ADDRESS, Mismatch.FAMILY, Mismatch.ONLY_IPV6):
            yield _refusal(case, reason, [request], f"Requests to {asked} find no socket", "")
    elif not asked and all(not is_wildcard(each.socket) and is_loopback(each.socket.address) for each in facts.sockets):
        text = "Only this namespace itself can ask the server: its sockets are bound to loopback addresses."
        if facts.addresses:
            text += f" To serve others, let it listen on {several(facts.addresses)}, or on all addresses."
        yield Statement(Kind.OTHER_ADDRESS, not any(each.replies for each in case.matched), text)


def _foreign(case: Case) -> Statement:
    number = sum(each.requests for each in case.foreign)
    addresses = several(each.address for each in case.foreign)
    counters = case.facts.counters
    dropped = counters.not_local + counters.no_route if counters else 0
    if dropped < number:  # some were forwarded
        text = f"{count(number, 'request')} for other machines arrived in {case.time}, too ({addresses})."
        return Statement(Kind.NOT_LOCAL, False, text)
    text = (
        f"{count(number, 'request')} came for {addresses}, which is no address here; the kernel dropped "
        f"{count(dropped, 'packet')} for such addresses (InAddrErrors, InNoRoutes). Ask one of "
        f"{several(case.facts.addresses)}, or add the address."
    )
    return Statement(Kind.NOT_LOCAL, True, text, f"ip address add {case.foreign[0].address} dev DEVICE")
