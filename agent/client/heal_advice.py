"""Say whether udpwatch can heal a finding, and how to switch that on. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from udpwatch.agent.client.lines import safe
from udpwatch.agent.model import REFUSALS, Cause, Healing, Row

#: why udpwatch cannot heal a finding, by its cause
_NOT_HEALED = {
    Cause.CONNECTED: "udpwatch cannot heal this: connect() chose the source before the reply, and the hook that heals "
    "does not run for sends of connected sockets. A redirect in the firewall can help "
    "(docs/heal.md#redirect-a-connected-server).",
    Cause.EXPLICIT: "udpwatch cannot heal this: the server names its source itself, and udpwatch sets only a source "
    "that is left to routing.",
    Cause.FORWARDED: "udpwatch cannot heal this here: another machine sent the reply. The agent on that machine may.",
    Cause.UNKNOWN: "Whether udpwatch can heal this is unknown: it can if the server sends with the client's address "
    "and leaves the source to routing.",
}


def heal_sentence(row: Row, healing: Healing | None, rows: Sequence[Row] = ()) -> str:
    """Return whether udpwatch can heal the replies of a row, and how.

    ``healing``: the agent's; None: not enabled. ``rows``: of the same agent.
    """
    if row.is_healed:
        return _healed_sentence(row.port, healing)
    if row.cause != Cause.KERNEL_CHOSEN:
        return _NOT_HEALED[Cause(row.cause)]
    if any(_is_healed_twin(each, row) and each.last > row.last for each in rows):
        return "udpwatch heals these replies now: its last healed reply is newer than the last wrong one."
    return f"If you cannot change the server, let udpwatch set the right source: {_how(row.port, healing)}"


def _healed_sentence(port: int, healing: Healing | None) -> str:
    if healing and not healing.heals(port):
        return (
            "Healing is off now, so routing chooses the source of these replies. To switch it on: udpwatch heal on "
            f"{port}."
        )
    return (
        f"udpwatch heals these replies while it runs. To stop that: udpwatch heal off {port}. When the server is "
        "fixed, it sets the source itself and udpwatch leaves its replies alone."
    )


def _is_healed_twin(healed: Row, wrong: Row) -> bool:
    same = ("process", "namespace", "pod", "container")
    return (
        healed.is_healed
        and (healed.port, healed.expected) == (wrong.port, wrong.expected)
        and all(getattr(healed.sender, name) == getattr(wrong.sender, name) for name in same)
    )


def _how(port: int, healing: Healing | None) -> str:
    if healing is None:
        return f"start its agent with --heal {port} (Helm chart: heal: [{port}])."
    if healing.reason:
        return f"its agent has healing enabled, but it does not work here ({safe(healing.reason)})."
    if healing.dry_run:
        return "its agent runs with --heal-dry-run and only counts; start it without."
    if port in healing.ports_on:
        return (
            f"it does since healing of port {port} was switched on, except for what it refuses (udpwatch heal status)."
        )
    return (
        f"udpwatch heal on {port} (as root; until the agent restarts). If the server runs in another network "
        f"namespace, start the agent with --heal-process instead. What is healed and refused: udpwatch heal status."
    )


def refusal_sentences(healing: Healing | None) -> Iterator[str]:
    """Yield what the agent has left alone although it was to be healed, of all servers together."""
    if healing is None:
        return
    for reason, count in healing.refused.items():
        if count:
            replies = f"{count} repl{'ies' if count != 1 else 'y'}"
            yield f"{replies} ({safe(reason)}): {safe(REFUSALS.get(reason, 'docs/metrics.md says why'))}."
    for line in healing.not_healed:
        yield f"{safe(line)}."
