"""What `udpwatch top` says about faults of the nodes: in its banner and its help. Pure functions."""

from __future__ import annotations

from collections import Counter

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.layout import count_text
from udpwatch.agent.client.top.rows import View
from udpwatch.agent.model import NODE_FAULTS, UNWATCHED, Memory, Snapshot

FULL_SHARE = 0.9  # of a limit, as in the alerts


def faults_of(view: View) -> list[tuple[str, str]]:
    """Return each kind of fault that was counted since the agents started, or that lasts: (name, text)."""
    faults, unwatched = Counter[str](), Counter[str]()
    for each in view.snapshots:
        faults.update(each.node_faults)
        unwatched.update(each.unwatched)
    texts = [(safe(name), NODE_FAULTS.get(name, ""), count) for name, count in faults.items()]
    texts += [("unwatched", UNWATCHED.get(name, safe(name)), count) for name, count in unwatched.items()]
    found = [(name, f"{count_text(count)} {text}") for name, text, count in texts if count]
    for each in view.snapshots:
        found += [(name, text) for name, text in (_memory(each.memory), _conntrack(each)) if text]
    return found


def _memory(memory: Memory | None) -> tuple[str, str]:
    if memory is None or memory.used <= FULL_SHARE * memory.limit:
        return "", ""
    return "memory limit", f"{memory.used >> 20} of {memory.limit >> 20} MB are in use"


def _conntrack(snapshot: Snapshot) -> tuple[str, str]:
    health = snapshot.conntrack
    if health is None or health.entries <= FULL_SHARE * health.limit:
        return "", ""
    dropped = max(0, health.dropped - health.insert_failed)
    text = f"{count_text(health.entries)} of {count_text(health.limit)} entries are in use"
    return "conntrack", f"{text}; {count_text(dropped)} packets were dropped because none was free"
