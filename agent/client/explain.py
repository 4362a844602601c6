"""`udpwatch explain`: why a reply was wrong, in three sentences with the addresses of the case, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.remedies import Remedy, codes, find
from udpwatch.agent.model import Cause, Row, Verdict

#: causes that a program's own setting mends; the others need a look at the case
_MENDED_BY_SETTING = (Cause.KERNEL_CHOSEN, Cause.CONNECTED, Cause.UNKNOWN)
_NAMELESS = "a process that is not known"


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do."""

    server: str  # name of the program, "": not known
    do: str
    config: str  # the exact line, "": none
    source: str  # link, "": none
    languages: tuple[str, ...]  # of code that shows how


def matching(rows: Sequence[Row], wanted: str | None) -> list[Row]:
    """The rows of a port, or of a process, pod or container by name or pattern; the most frequent first."""

    def is_wanted(row: Row) -> bool:
        if wanted is None:
            return True
        if wanted.isdecimal():
            return row.port == int(wanted)
        sender = row.sender
        names = (sender.process, sender.executable.rpartition("/")[2], sender.pod, sender.container)
        return any(name and (name == wanted or fnmatchcase(name, wanted)) for name in names)

    return sorted(filter(is_wanted, rows), key=lambda row: (-row.count, row.port, row.expected, row.actual))


def why(row: Row) -> tuple[str, str, str]:
    """What happened, who chose that source, what the client sees of it."""
    return _happened(row), _chosen(row), _seen(row)


def advice(row: Row) -> Advice:
    """How to mend the server of a row."""
    remedy = find(row.sender) if row.cause in _MENDED_BY_SETTING else None
    if remedy:
        return of_remedy(remedy, row)
    languages = tuple(code.language for code in codes())
    each = (
        f"give each address a socket of its own, by a setting that lists the addresses to listen on instead of "
        f"{_wildcard(row)}"
    )
    moving = (
        f"Where the address moves between machines (keepalived, kube-vip), the sysctl net.ipv{row.family}."
        "ip_nonlocal_bind=1 lets the others bind it, too."
    )
    match row.cause:
        case Cause.FORWARDED:
            where = f", behind {safe(row.interface)}" if row.interface else ""
            do = f"Mend the server at {row.actual}{where}: `udpwatch` on that machine names it."
            return Advice("", do, "", "", ())
        case Cause.EXPLICIT:
            do = (
                f"See which of the server's sockets answers: it has to be the one that was asked, or to name "
                f"{row.expected}. Where its settings list addresses to send from, they have to be those asked."
            )
        case Cause.CONNECTED:
            do = (
                f"In its settings, {each}. Or in its code: bind the new socket to the address that was asked "
                f"({_option(row)} tells it), and only then connect it. {moving}"
            )
        case _:
            do = (
                f"In its settings, {each}. Or in its code: answer from the address that was asked, which "
                f"{_option(row)} tells and sets. {moving}"
            )
    return Advice("", do, "", "", languages)


def of_remedy(remedy: Remedy, row: Row | None = None) -> Advice:
    """What is known of a program, with the addresses of a row; without one with words in their place."""
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
    return Advice(remedy.name, remedy.do, config, remedy.source, (remedy.code,) if remedy.code else ())


def short(row: Row) -> str:
    """How to mend it, in two or three lines, for a pane."""
    todo = advice(row)
    if not todo.server:
        return todo.do
    return "\n".join(filter(None, (f"{todo.server}: {todo.do}", todo.config, todo.source)))


def as_object(row: Row) -> dict[str, Any]:
    """All that is said of a row, for programs."""
    todo, sender = advice(row), row.sender
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
        "why": list(why(row)),
        "remedy": remedy_object(todo),
    }


def remedy_object(todo: Advice) -> dict[str, Any]:
    """An advice, for programs."""
    return {
        "server": todo.server or None,
        "do": todo.do,
        "config": todo.config or None,
        "source": todo.source or None,
        "languages": list(todo.languages),
    }


def who(row: Row) -> str:
    """The sender, with its pod or container."""
    sender = row.sender
    if row.cause == Cause.FORWARDED:
        return f"a machine behind {safe(row.interface)}" if row.interface else "another machine"
    name = _NAMELESS if sender.process in ("", "unknown") else safe(sender.process)
    if sender.pid:
        name += f" (pid {sender.pid})"
    if sender.pod:
        return f"{name} of pod {safe(f'{sender.namespace}/{sender.pod}' if sender.namespace else sender.pod)}"
    return f"{name} in container {safe(sender.container)}" if sender.container else name


def _happened(row: Row) -> str:
    subject = who(row)
    unit = "flow" if row.cause == Cause.FORWARDED else "time"
    times = "once" if (unit, row.count) == ("time", 1) else f"{row.count} {unit}{'s' if row.count != 1 else ''}"
    answered = f"answered from {row.actual}"
    if row.actual == row.expected:
        answered = "answered from another port of it, which source NAT gave the reply"
    if row.cause == Cause.FORWARDED or subject.startswith(_NAMELESS):
        subject = "A" + subject[1:]  # a name keeps its letters
    return f"{subject} was asked at {row.expected}, port {row.port}/udp, and {answered}, {times} so far."


def _chosen(row: Row) -> str:
    actual = row.actual if row.actual != row.expected else "another address"
    match row.cause:
        case Cause.KERNEL_CHOSEN:
            return (
                f"Its socket is bound to all addresses ({_wildcard(row)}) and the reply named no source, so routing "
                f"chose {actual}, the source of its route to the client."
            )
        case Cause.EXPLICIT:
            return (
                f"The server chose that source itself: it answered through a socket bound to {actual}, or named it "
                f"with {_option(row, sending=True)}."
            )
        case Cause.CONNECTED:
            return (
                f"It answered through a socket that it connected after the request: connect() let routing choose "
                f"{actual}, and the socket kept it."
            )
        case Cause.FORWARDED:
            return (
                f"No socket of this node sent it: in conntrack the client's flow to {row.expected} stayed unanswered, "
                f"and a new one from {actual} with the same ports came up beside it."
            )
        case _:
            return (
                "Who chose that source is not known: the sendmsg hook is not attached, or the send named no "
                "destination (`udpwatch doctor` tells)."
            )


def _seen(row: Row) -> str:
    client = (
        "a client with a connected socket refuses it (ICMP port unreachable) and waits in vain, any other has an "
        "answer from somebody it did not ask"
    )
    match row.verdict:
        case Verdict.NEW:
            return f"Conntrack booked it as a new flow, so NAT is not undone and stateful firewalls drop it; {client}."
        case Verdict.UNTRACKED:
            return f"Conntrack is not at work on this path, and the reply arrives as it is; {client}."
        case _:
            return f"What conntrack made of it this kernel does not tell; {client}."


def _wildcard(row: Row) -> str:
    return "::" if row.family == 6 else "0.0.0.0 or ::"


def _option(row: Row, sending: bool = False) -> str:
    if row.family == 4:
        return "IP_PKTINFO"
    return "IPV6_PKTINFO" if sending else "IPV6_RECVPKTINFO"
