"""Explain a finding in three sentences with its addresses, and advise how to fix the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from udpwatch.agent.client.heal_advice import heal_sentence
from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.remedies import Remedy, codes, remedy_of
from udpwatch.agent.model import UNKNOWN_PROCESS, Cause, Healing, Row, Server, Verdict

#: causes that a setting of the program fixes; the others depend on the case
_FIXED_BY_SETTING = (Cause.KERNEL_CHOSEN, Cause.CONNECTED, Cause.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Advice:
    """How to fix one server."""

    server: str  # name of the program; "": unknown
    do: str
    config: str  # the exact line; "": none
    source: str  # link; "": none
    languages: tuple[str, ...]  # of the `Code` that shows the fix
    run: tuple[str, ...] = ()  # Debian packages with version that were run with this fix


def matching(rows: Sequence[Row], pattern: str | None) -> list[Row]:
    """Return the rows of a port, or of a process, pod or container by name or pattern.

    Wrong replies come first, then healed ones; of each, the most frequent.
    """

    def matches(row: Row) -> bool:
        if pattern is None:
            return True
        if pattern.isdecimal():
            return row.port == int(pattern)
        sender = row.sender
        names = (sender.process, sender.executable.rpartition("/")[2], sender.pod, sender.container)
        return any(name and (name == pattern or fnmatchcase(name, pattern)) for name in names)

    return sorted(
        filter(matches, rows), key=lambda row: (row.is_healed, -row.count, row.port, row.expected, row.actual)
    )


def explanation(row: Row) -> tuple[str, str, str]:
    """Return three sentences: what happened, how the source was chosen, what conntrack and the client do.

    Of a healed row: what happened, how the source was chosen, what happens without udpwatch.
    """
    if row.is_healed:
        return _healed_sentences(row)
    return _event_sentence(row), _cause_sentence(row), _verdict_sentence(row)


def advice(row: Row) -> Advice:
    """Return how to fix the server of a row."""
    remedy = remedy_of(row.sender) if row.cause in _FIXED_BY_SETTING else None
    if remedy:
        return remedy_advice(remedy, row)
    languages = () if row.cause == Cause.FORWARDED else tuple(code.language for code in codes())
    return Advice("", _general_advice(row), "", "", languages)


def _general_advice(row: Row) -> str:
    if row.cause == Cause.FORWARDED:
        location = f", behind {safe(row.interface)}" if row.interface else ""
        return f"Fix the server at {row.actual}{location}. Run `udpwatch` on that machine to identify it."
    if row.cause == Cause.EXPLICIT:
        return (
            f"Check which of the server's sockets sends the reply: it must be the socket that received the request, or "
            f"set {row.expected} as the source. If its settings list source addresses, list the addresses that clients "
            f"ask."
        )
    settings = f"In the server's settings, list the addresses to listen on instead of {_wildcard(row)}."
    if row.cause == Cause.CONNECTED:
        code = (
            f"Or in its code, bind the new socket to the address that was asked ({_receive_option(row)}) before "
            f"connecting it."
        )
    else:
        code = (
            f"Or in its code, take the address that was asked from recvmsg() and pass it to sendmsg() "
            f"({' and '.join(dict.fromkeys((_receive_option(row), _send_option(row))))})."
        )
    moving = (
        f"If the address moves between machines (keepalived, kube-vip), set the sysctl net.ipv{row.family}."
        "ip_nonlocal_bind=1, so that the other machines can bind it, too."
    )
    return f"{settings} {code} {moving}"


def remedy_advice(remedy: Remedy, row: Row | None = None) -> Advice:
    """Return the advice of a remedy with the addresses of a row; without a row, with placeholders such as ADDRESS."""
    address, port, family = (row.expected, str(row.port), str(row.family)) if row else ("ADDRESS", "PORT", "4")
    config = remedy.config
    for name, value in {
        "{address}": address,
        "{host}": f"[{address}]" if family == "6" else address,
        "{port}": port,
        "{family}": family,
        "{6}": "6" if family == "6" else "",
    }.items():
        config = config.replace(name, value)
    return Advice(remedy.name, remedy.do, config, remedy.source, (remedy.code,) if remedy.code else (), remedy.run)


def short_advice(row: Row | Server) -> str:
    """Return the advice in at most three lines, for the detail pane of `udpwatch top`.

    For a server without a finding, return "" if the program is unknown.
    """
    if isinstance(row, Server):
        remedy = remedy_of(row.sender)
        if remedy is None:
            return ""
        fix = remedy_advice(remedy)
    else:
        fix = advice(row)
    if not fix.server:
        return fix.do
    return "\n".join(filter(None, (f"{fix.server}: {fix.do}", fix.config, fix.source)))


def row_object(row: Row, healing: Healing | None = None, rows: Sequence[Row] = ()) -> dict[str, Any]:
    """Return a row, its explanation and its advice as a JSON object. ``healing``, ``rows``: the agent's."""
    sender = row.sender
    return {
        "process": sender.process or None,
        "pid": sender.pid or None,
        "namespace": sender.namespace or None,
        "pod": sender.pod or None,
        "container": sender.container or None,
        "port": row.port,
        "expected": row.expected,
        "actual": row.actual,
        "verdict": row.verdict,
        "cause": row.cause,
        "count": row.count,
        "why": list(explanation(row)),
        "remedy": advice_object(advice(row)),
        "heal": heal_sentence(row, healing, rows),
    }


def advice_object(fix: Advice) -> dict[str, Any]:
    return {
        "server": fix.server or None,
        "do": fix.do,
        "config": fix.config or None,
        "source": fix.source or None,
        "languages": list(fix.languages),
        "run": list(fix.run),
    }


def sender_text(row: Row) -> str:
    """Name the sender with its pod or container."""
    sender = row.sender
    if row.cause == Cause.FORWARDED:
        return f"a machine behind {safe(row.interface)}" if row.interface else "another machine"
    return safe(sender.title)


def _healed_sentences(row: Row) -> tuple[str, str, str]:
    subject = sender_text(row)
    if subject.startswith(UNKNOWN_PROCESS):
        subject = "A" + subject[1:]
    times = "once" if row.count == 1 else f"{row.count} times"
    since = datetime.fromtimestamp(row.first).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{subject} was asked at {row.expected}, port {row.port}/udp, and replied from that address, because udpwatch "
        f"heals its replies ({times} since {since}).",
        f"Its socket left the source to routing, and udpwatch set it to {row.expected} in the kernel.",
        "The server still needs the fix: without udpwatch, routing chooses the source.",
    )


def _event_sentence(row: Row) -> str:
    subject = sender_text(row)
    if row.cause == Cause.FORWARDED:
        times = f"in {row.count} flow{'s' if row.count != 1 else ''}"
    else:
        times = "once" if row.count == 1 else f"{row.count} times"
    replied = f"replied from {row.actual}"
    if row.actual == row.expected:
        replied = "replied from another port of that address, which source NAT chose"
    if row.cause == Cause.FORWARDED or subject.startswith(UNKNOWN_PROCESS):
        subject = "A" + subject[1:]  # the name of a process is not capitalized
    return f"{subject} was asked at {row.expected}, port {row.port}/udp, and {replied}, {times} so far."


def _cause_sentence(row: Row) -> str:
    actual = row.actual if row.actual != row.expected else "another address"
    match row.cause:
        case Cause.KERNEL_CHOSEN:
            return (
                f"Its socket is bound to all addresses ({_wildcard(row)}) and the reply set no source, so the kernel "
                f"used {actual}, the source address of its route to the client."
            )
        case Cause.EXPLICIT:
            return (
                f"The server chose the source itself: it sent the reply through a socket bound to {actual}, or set "
                f"that address with {_send_option(row)}."
            )
        case Cause.CONNECTED:
            return (
                f"It replied through a socket that it connected to the client after the request, and connect() let "
                f"routing choose {actual} as the source."
            )
        case Cause.FORWARDED:
            return (
                f"No socket of this node sent the reply: in conntrack, the client's flow to {row.expected} has no "
                f"reply, and a new flow from {actual} with the same ports appeared beside it."
            )
        case _:
            return (
                "How the source was chosen is unknown: the sendmsg hook is not attached, or the server sent without a "
                "destination address (`udpwatch doctor` lists the attached hooks)."
            )


def _verdict_sentence(row: Row) -> str:
    client = (
        "a client with a connected socket rejects it (ICMP port unreachable), and any other client gets it from an "
        "address that it did not ask"
    )
    match row.verdict:
        case Verdict.NEW:
            conntrack = "Conntrack counts the reply as a new flow, so NAT is not undone and stateful firewalls drop it"
            return f"{conntrack}; {client}."
        case Verdict.UNTRACKED:
            return f"Conntrack does not track this traffic, so the reply arrives unchanged; {client}."
        case _:
            return f"This kernel does not report conntrack's verdict on the reply; {client}."


def _wildcard(row: Row) -> str:
    return "::" if row.family == 6 else "0.0.0.0 or ::"


def _receive_option(row: Row) -> str:
    return "IP_PKTINFO" if row.family == 4 else "IPV6_RECVPKTINFO"


def _send_option(row: Row) -> str:
    return "IP_PKTINFO" if row.family == 4 else "IPV6_PKTINFO"
