"""Say what is known about a port, in the order in which one would look. Pure: facts in, statements out.

A statement repeats what the kernel reported. `Statement.wrong` is set only where a datagram was lost, or where one
would have to be.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from udpwatch.agent.servers.port import delivery, listening
from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.facts import Look, NamespaceFacts
from udpwatch.agent.servers.port.replies import of_agent, replies
from udpwatch.agent.servers.port.statements import Kind, Statement, owner, several

#: commands that act in the network namespace of whoever runs them; other settings are the machine's, or a client's
_IN_NAMESPACE = "nft", "iptables", "ip6tables", "ip", "ss", "tc", "conntrack", "udpwatch", "sysctl -w net.ipv4."


def diagnose(look: Look) -> list[Statement]:
    """Return what is known about the port."""
    served = [each for each in look.namespaces if each.sockets]
    found = list(_everywhere(look, served))
    unwatched = [each for each in served if not each.is_watched]
    for facts in look.namespaces:
        if not facts.is_watched:
            continue
        told = _statements(Case(look, facts), served)
        found += [replace(each, namespace=facts.name, netns=facts.inode, fix=_inside(each.fix, facts)) for each in told]
    if unwatched:
        places = several(f"{owner(each.sockets[0])} in {each.name}" for each in unwatched)
        found.append(Statement(Kind.LISTENS, False, f"In namespaces that were not watched: {places}."))
    return found


def _inside(fix: str, facts: NamespaceFacts) -> str:
    """Return a fix whose commands act in the namespace that the statement is about."""
    if facts.here or not facts.path:
        return fix
    prefixes = tuple(each if each.endswith(".") else f"{each} " for each in _IN_NAMESPACE)
    enter = f"nsenter --net={shlex.quote(facts.path)} "
    return "\n".join(enter + line if line.startswith(prefixes) else line for line in fix.splitlines())


def _everywhere(look: Look, served: list[NamespaceFacts]) -> Iterator[Statement]:
    """What concerns no single namespace."""
    if look.asked and not any(look.asked in each.local for each in look.namespaces):
        known = several(address for each in look.namespaces if each.sockets or each.here for address in each.addresses)
        text = f"{look.asked} is not an address of this machine. Ask one of its addresses ({known}), or add this one."
        yield Statement(Kind.NOT_LOCAL, True, text, f"ip address add {look.asked} dev DEVICE")
    for before, after in look.servers:
        yield of_agent(before, after, f"{look.seconds:g} s")


def _statements(case: Case, served: list[NamespaceFacts]) -> Iterator[Statement]:
    facts = case.facts
    if facts.sockets:
        yield from listening.listeners(case)
    elif facts.here or case.local or (case.look.asked and case.look.asked in facts.local):
        yield from listening.no_listener(case, served)
    yield from listening.refusals(case)
    yield from listening.addresses(case)
    yield from delivery.receive_buffer(case)
    yield from delivery.not_read(case)
    causes = list(delivery.causes(case))
    yield from causes
    explained = any(each.wrong for each in causes)
    if case.lost and not explained:
        yield delivery.lost(case)
    yield from delivery.redirected(case)
    if facts.sockets:
        yield from replies(case, explained)
