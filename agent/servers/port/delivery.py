"""What loses requests between a device and the server: firewall, conntrack, the kernel's checks, the receive buffer.

Counters of the namespace show a cause only if requests to this port were lost, or if they could not be counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.facts import SocketFacts
from udpwatch.agent.servers.port.firewall import Effect, Rule
from udpwatch.agent.servers.port.statements import Kind, Statement, count, process

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
    for each in case.facts.sockets:
        sock = each.socket
        if not sock.drops:
            continue
        limit = f" of {sock.queue_limit:,} bytes" if sock.queue_limit else ""
        text = f"The receive buffer{limit} of {process(each)} was full: "
        if each.drops:
            text += (
                f"{count(each.drops, 'datagram')} dropped in {case.time}, {sock.drops:,} since the socket was opened"
            )
        else:
            text += f"{count(sock.drops, 'datagram')} dropped since the socket was opened, none in this look"
        if case.facts.counters and case.facts.counters.bad_checksum:
            text += " (those with a wrong checksum included)"
        advice, fix = _buffer_advice(case, each)
        yield Statement(Kind.RECEIVE_BUFFER, bool(each.drops), f"{text}. {advice}", fix)


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
    for each in case.facts.sockets:
        if each.has_no_process or not case.waits(each):
            continue
        waiting = f"{each.socket.queue:,} bytes have waited in its receive buffer for {each.waiting:.1f} s"
        counters = case.facts.counters
        if each.state in ("T", "t", "Z") or (counters and not counters.received):
            text = f"{process(each)} does not read its requests: {waiting}."
        else:
            text = f"{process(each)} does not keep up with its requests: {waiting}, and did not become fewer."
        state, fix = _STATES.get(each.state, ("", ""))
        pid = each.socket.pid
        yield Statement(Kind.NOT_READ, True, f"{text} {state}".rstrip(), fix.format(pid=pid) if pid else "")


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
        more = (rule.packets or 0) - (old[rule.key].packets or 0) if rule.key in old else rule.packets or 0
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
    family, table, chain = rule.place.split(" ", 2)
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
        "because another new flow had taken the same addresses and ports (insert_failed). Two questions at once from "
        "one socket, or two clients with the same port behind NAT, cause that"
    )
    if failed > 0:
        text = f"Conntrack dropped {count(failed, 'packet')} of this namespace in {case.time} {why}."
        fix = (
            "options single-request-reopen        # in resolv.conf of DNS clients\n"
            "... masquerade random,fully-random   # in rules of source NAT"
        )
        yield Statement(Kind.CONNTRACK_INSERT, True, text, fix)
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
