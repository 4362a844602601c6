"""What loses requests between a device and the server: firewall, conntrack, the kernel's checks, the receive buffer.

Counters of the namespace show a cause only if requests to this port were lost, or if they could not be counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.facts import SocketFacts
from udpwatch.agent.servers.port.firewall import Effect, Rule
from udpwatch.agent.servers.port.statements import MAX_NAMED, Kind, Statement, count, process

_STATES = {
    "T": ("The process is stopped (state T).", "kill -CONT {pid}"),
    "t": ("A debugger has stopped the process (state t).", "grep TracerPid /proc/{pid}/status"),
    "D": ("The process waits for a device or a file system (state D).", "cat /proc/{pid}/stack"),
    "Z": ("The process has ended, and its parent has not waited for it (state Z).", "ps -o ppid= -p {pid}"),
    "R": ("The process is busy with something else (state R).", "top -H -p {pid}"),
    "S": ("The process waits for something else (state S).", "strace -f -p {pid}"),
}


def receive_buffer(case: Case) -> Iterator[Statement]:
    """Say which sockets dropped requests because their receive buffer was full."""
    groups: dict[tuple[object, ...], list[SocketFacts]] = {}
    for each in case.facts.sockets:
        if each.socket.drops:
            groups.setdefault((process(each), each.socket.pid, each.socket.queue_limit), []).append(each)
    found = sorted(groups.values(), key=lambda sockets: (-_lately(sockets), -_in_all(sockets)))
    for sockets in found[:MAX_NAMED]:
        yield _dropped(case, sockets)
    if rest := [each for sockets in found[MAX_NAMED:] for each in sockets]:
        text = (
            f"{count(len(rest), 'more socket')} of other processes: {count(_lately(rest), 'datagram')} dropped in "
            f"{case.time}, {_in_all(rest):,} since the sockets were opened."
        )
        yield Statement(Kind.RECEIVE_BUFFER, _lately(rest) > 0, text)


def _lately(sockets: Sequence[SocketFacts]) -> int:
    return sum(each.drops or 0 for each in sockets)


def _in_all(sockets: Sequence[SocketFacts]) -> int:
    return sum(each.socket.drops or 0 for each in sockets)


def _dropped(case: Case, sockets: Sequence[SocketFacts]) -> Statement:
    """Say what the sockets of one process have dropped. The kernel counts the same for what a filter drops."""
    first, counters, lately, in_all = sockets[0], case.facts.counters, _lately(sockets), _in_all(sockets)
    opened = "the socket was opened" if len(sockets) == 1 else f"its {len(sockets):,} sockets were opened"
    numbers = f"{count(lately, 'datagram')} dropped in {case.time}, {in_all:,} since {opened}"
    limit = f" of {first.socket.queue_limit:,} bytes" if first.socket.queue_limit else ""
    advice, fix = _buffer_advice(case, first)
    if not lately:
        text = (
            f"{process(first)} lost {count(in_all, 'datagram')} since {opened}, none in this look: its receive "
            f"buffer{limit} was full, a filter of the socket dropped them, or their checksum was wrong. {advice}"
        )
        return Statement(Kind.RECEIVE_BUFFER, False, text, fix)
    if counters and not counters.receive_full and lately > counters.bad_checksum + counters.no_memory:
        text = (
            f"{process(first)}'s socket does not take its requests: {numbers}, while no receive buffer was full "
            f"(RcvbufErrors). A filter of the socket (SO_ATTACH_FILTER, SO_ATTACH_BPF) or an IPsec policy drops them."
        )
        return Statement(Kind.SOCKET_FILTER, True, text, "ss -lunpem  # f: filtered by")
    text = f"The receive buffer{limit} of {process(first)} was full: {numbers}"
    if counters and counters.bad_checksum:
        text += " (those with a wrong checksum included)"
    return Statement(Kind.RECEIVE_BUFFER, True, f"{text}. {advice}", fix)


def _buffer_advice(case: Case, each: SocketFacts) -> tuple[str, str]:
    limit, default, most = each.socket.queue_limit, case.facts.buffer_default, case.facts.buffer_max
    if limit is None or default is None or most is None:
        return "Give it a larger receive buffer (SO_RCVBUF), or make it read faster.", ""
    if limit == default:
        text = (
            f"That is the default (net.core.rmem_default): raise it and restart the server, or set a larger receive "
            f"buffer in the server's settings, up to net.core.rmem_max ({most:,})."
        )
        return text, f"sysctl -w net.core.rmem_default={max(4 * default, 1 << 20)}"
    if limit == 2 * most:
        text = f"The server asked for as much as net.core.rmem_max ({most:,}) allows: raise that and restart it."
        return text, f"sysctl -w net.core.rmem_max={max(4 * most, 4 << 20)}"
    text = (
        f"The server sets the size itself (SO_RCVBUF): raise it in its settings, up to net.core.rmem_max ({most:,}), "
        f"or make it read faster."
    )
    return text, ""


def not_read(case: Case) -> Iterator[Statement]:
    """Say which processes leave their requests in the receive buffer."""
    groups: dict[tuple[object, ...], list[SocketFacts]] = {}
    for each in case.facts.sockets:
        if not each.has_no_process and case.waits(each):
            groups.setdefault((process(each), each.socket.pid, each.state), []).append(each)
    found = sorted(groups.values(), key=lambda sockets: -sum(each.socket.queue or 0 for each in sockets))
    for sockets in found[:MAX_NAMED]:
        yield _waiting(case, sockets)
    if rest := len(found) - min(len(found), MAX_NAMED):
        text = f"{count(rest, 'more process leaves', 'more processes leave')} requests in receive buffers."
        yield Statement(Kind.NOT_READ, True, text)


def _waiting(case: Case, sockets: Sequence[SocketFacts]) -> Statement:
    first, counters = sockets[0], case.facts.counters
    queue = sum(each.socket.queue or 0 for each in sockets)
    where = "its receive buffer" if len(sockets) == 1 else f"the receive buffers of {len(sockets):,} sockets"
    waiting = f"{queue:,} bytes have waited in {where} for {max(each.waiting for each in sockets):.1f} s"
    if first.state in ("T", "t", "Z") or (counters and not counters.received):
        text = f"{process(first)} does not read its requests: {waiting}."
    else:
        text = f"{process(first)} does not keep up with its requests: {waiting}, and did not become fewer."
    state, fix = _STATES.get(first.state, ("", ""))
    pid = first.socket.pid
    return Statement(Kind.NOT_READ, True, f"{text} {state}".rstrip(), fix.format(pid=pid) if pid else "")


def causes(case: Case) -> Iterator[Statement]:
    """Say what the counters show of lost requests and replies."""
    yield from _firewall(case)
    if case.lost or case.is_unanswered or (case.facts.sockets and case.facts.traffic is None):
        yield from _kernel_counters(case)
    if case.facts.sockets or case.requests:
        yield from _conntrack(case)


def _firewall(case: Case) -> Iterator[Statement]:
    now, before = case.facts.firewall, case.facts.firewall_before
    if not now or not before:
        return
    old = {each.key: each for each in before.rules}
    for rule in now.rules:
        if rule.effect is Effect.DNAT:
            continue
        # A rule that was not there before is new, unless not all of them could be read.
        first = old[rule.key].packets or 0 if rule.key in old else (rule.packets or 0) if before.unread else 0
        more = max((rule.packets or 0) - first, 0)
        lossy = bool(case.lost) or case.is_unanswered or case.facts.traffic is None
        if rule.packets is None:
            # Without a counter, it is only a suspect: it has to be of the direction in which datagrams are lost.
            suspect = case.is_unanswered and not case.lost if rule.replies else bool(case.lost)
            if suspect or rule.named:
                yield _rule(case, rule, 0, suspect and (rule.named or rule.is_policy))
        elif rule.named or (more and lossy):
            yield _rule(case, rule, more, more > 0)


def _rule(case: Case, rule: Rule, more: int, wrong: bool) -> Statement:
    verb = "rejects" if rule.effect is Effect.REJECT else "drops"
    replies = "replies from" if rule.replies else "requests for"
    if rule.is_policy:
        text = f"The firewall drops what no rule accepts ({rule.place}: {rule.text})"
    elif rule.named:
        text = f"A firewall rule {verb} {replies} this port ({rule.place}: {rule.text})"
    else:
        text = f"A firewall rule {verb} packets ({rule.place}: {rule.text})"
    if rule.packets is not None:
        text += f": {count(more, 'packet')} in {case.time}, {rule.packets:,} in all"
    elif wrong and case.lost:
        text += f". It has no counter, but at least {count(case.lost, 'request')} of this port did not reach the socket"
    elif wrong:
        text += f". It has no counter, but no reply left this namespace in {case.time}"
    else:
        text += ". It has no counter to tell which"
    return Statement(
        Kind.FIREWALL, wrong, f"{text}.", _accept(case, rule) if rule.named or rule.is_policy or wrong else ""
    )


def _accept(case: Case, rule: Rule) -> str:
    if not rule.chain:
        return ""
    family, table, chain = rule.chain
    side = "sport" if rule.replies else "dport"
    if rule.by_iptables:
        command = "iptables" if family == "ip" else "ip6tables"
        return f"{command} -t {table} -I {chain} -p udp --{side} {case.port} -j ACCEPT"
    return f"nft insert rule {family} {table} {chain} udp {side} {case.port} accept"


def _kernel_counters(case: Case) -> Iterator[Statement]:
    counters = case.facts.counters
    if counters is None:
        return
    if counters.reverse_path:
        yield Statement(
            Kind.REVERSE_PATH,
            True,
            f"The reverse path filter dropped {count(counters.reverse_path, 'packet')} in {case.time} "
            f"(IPReversePathFilter): the route to their source leads through another device than the one that they "
            f"arrived on. Correct the routes, or loosen the filter of that device and of all.",
            "sysctl -w net.ipv4.conf.all.rp_filter=2",
        )
    if counters.bad_checksum:
        yield Statement(
            Kind.CHECKSUM,
            True,
            f"{count(counters.bad_checksum, 'datagram')} had a wrong UDP checksum in {case.time} and were dropped "
            f"(InCsumErrors). The checksum offload of the sender's device is the first suspect.",
            "ethtool -K DEVICE tx off  # on the sender",
        )
    if counters.no_memory:
        yield Statement(
            Kind.NO_MEMORY,
            True,
            f"{count(counters.no_memory, 'datagram')} dropped in {case.time} because all UDP sockets together hold as "
            f"much memory as net.ipv4.udp_mem allows (MemErrors).",
            "sysctl net.ipv4.udp_mem",
        )
    if counters.send_full:
        yield Statement(
            Kind.SEND_QUEUE,
            True,
            f"{count(counters.send_full, 'datagram')} could not be sent in {case.time}, because the queue of a device "
            f"was full (SndbufErrors).",
            "tc -s qdisc",
        )


def _conntrack(case: Case) -> Iterator[Statement]:
    now, before = case.facts.conntrack, case.facts.conntrack_before
    if not now or not before:
        return
    failed = now.insert_failed - before.insert_failed
    dropped = now.dropped - before.dropped - failed  # each failed insertion counts as dropped, too
    evicted = now.early_dropped - before.early_dropped
    if evicted > 0 or now.entries >= now.limit > 0:  # nothing is evicted before the table is full
        yield Statement(
            Kind.CONNTRACK_FULL,
            True,
            f"Conntrack's table is full ({now.entries:,} of {now.limit:,} entries). In {case.time}, "
            f"{count(max(dropped, 0), 'packet')} of new flows were dropped, and {count(evicted, 'flow')} without a "
            f"reply made room for others.",
            f"sysctl -w net.netfilter.nf_conntrack_max={2 * now.limit}  # in the first namespace",
        )
    elif dropped > 0:
        text = f"Conntrack dropped {count(dropped, 'packet')} of this namespace in {case.time} (drop)."
        yield Statement(Kind.CONNTRACK_DROP, True, text, "conntrack -S; dmesg | grep conntrack")
    why = (
        "because another new flow had taken the same addresses and ports (insert_failed). Two clients that ask from "
        "the same port behind source NAT cause that, for example"
    )
    if failed > 0:
        text = f"Conntrack dropped {count(failed, 'packet')} of this namespace in {case.time} {why}."
        yield Statement(
            Kind.CONNTRACK_INSERT, True, text, "... masquerade random,fully-random   # in rules of source NAT"
        )
    elif now.insert_failed:
        text = f"Conntrack has dropped {count(now.insert_failed, 'packet')} of this namespace {why}; none in this look."
        yield Statement(Kind.CONNTRACK_INSERT, False, text, "conntrack -S")


def lost(case: Case) -> Statement:
    """Say that requests were lost, and that no counter shows where."""
    arrived = sum(each.requests for each in case.matched)
    return Statement(
        Kind.LOST,
        True,
        f"{count(arrived, 'request')} arrived at a device in {case.time}, and at least {case.lost:,} of them reached "
        f"no socket. None of the counters that udpwatch reads shows where they were dropped.",
        "perf trace -e skb:kfree_skb --max-events 20",
    )


def redirected(case: Case) -> Iterator[Statement]:
    """Name the rules that send requests for the port elsewhere."""
    for rule in case.redirections:
        counted = f"; it counted {count(rule.packets, 'packet')}" if rule.packets is not None else ""
        text = (
            f"A rule sends requests for this port to {rule.to or 'another port'} ({rule.place}: {rule.text}){counted}."
        )
        port = rule.to.rpartition(":")[2] if ":" in rule.to and not rule.to.endswith("]") else ""
        fix = f"udpwatch explain {port if port.isdecimal() else case.port}"
        yield Statement(Kind.REDIRECTED, False, f"{text} Look at that port.", fix)
