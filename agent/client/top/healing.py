"""What `udpwatch top` says about healing: in its banner, its table and its help. Pure functions."""

from __future__ import annotations

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.layout import count_text
from udpwatch.agent.client.top.rows import Healed, View, key_of
from udpwatch.agent.model import Healing


def healed_of(view: View) -> Healed | None:
    """Return what is healed; None if healing is enabled nowhere and nothing was healed."""
    if view.healed is not None:
        return view.healed if view.healed != Healed(0, 0) else None
    keys = {key_of(each.node, row) for each in view.snapshots for row in each.healed_rows}
    replies = sum(row.count for each in view.snapshots for row in each.healed_rows)
    replies += sum(sum(each.other_healed.values()) for each in view.snapshots)
    found = [each.healing for each in view.snapshots if each.healing]
    if not found and not replies:
        return None
    servers = {(key.node, key.process, key.namespace, key.pod, key.container, key.port) for key in keys}
    idle = sum(not healing.is_active for healing in found)
    return Healed(replies, len(servers), sum(healing.harmful for healing in found), idle)


def healing_text(view: View) -> tuple[str, str]:
    """Return what is healed, in a few words, and their style; "" if healing is enabled nowhere."""
    healed = healed_of(view)
    if healed is None:
        return "", "label"
    words, style = [], "live"
    if healed.idle:
        healing = None if view.cluster else next((each.healing for each in view.snapshots if each.healing), None)
        words, style = [_idle_text(healing, healed.idle)], "paused"
    if healed.replies or not healed.idle:
        words.append(f"healed {count_text(healed.replies)} replies of {_servers_text(healed.servers)}")
    if healed.refused:
        words.append(f"refused {count_text(healed.refused)}")
        style = "paused"
    return ", ".join(words), style


def _servers_text(count: int) -> str:
    return f"{count_text(count)} server" + "s" * (count != 1)


def _idle_text(healing: Healing | None, nodes: int) -> str:
    """Say why nothing is healed. ``healing``: of the only node; None: there are several."""
    if healing is None:
        return f"heal: off on {count_text(nodes)} node" + "s" * (nodes != 1)
    if healing.reason:
        return "heal: does not work (?)"
    if healing.dry_run:
        return f"heal: dry run, {count_text(healing.dry_run_replies)} would be healed"
    return "heal: off"


def healing_facts(view: View) -> list[tuple[str, str]]:
    """Return what the help screen says about healing: (label, text)."""
    facts = []
    for each in view.snapshots:
        healing = each.healing
        if healing is None or not healing.selected:
            continue
        state = f"does not work: {safe(healing.reason)}" if healing.reason else "on" if healing.is_active else "off"
        if healing.dry_run and not healing.reason:
            state = "dry run: nothing is healed, only counted"
        facts.append(("healing", f"{safe(healing.selected)}: {state}"))
        facts += [("not healed", safe(line)) for line in healing.not_healed]
        facts += [
            ("refused", f"{count_text(count)} {safe(reason)} (docs/metrics.md)")
            for reason, count in healing.refused.items()
            if count
        ]
    return facts
