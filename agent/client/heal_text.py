"""What `udpwatch heal` prints."""

from __future__ import annotations

from collections.abc import Iterator

from udpwatch.agent.model import REFUSALS, Healing, Row


def lines(healing: Healing, rows: tuple[Row, ...]) -> Iterator[str]:
    """Yield the lines about what is healed. ``rows``: of healed replies."""
    yield f"healing        {_state(healing)}"
    yield f"settings       {healing.selected}{' (dry run)' if healing.dry_run else ''}"
    if healing.ports_on:
        yield f"switched on    port {_ports(healing.ports_on)}"
    if healing.ports_off:
        yield f"switched off   port {_ports(healing.ports_off)}"
    if healing.reason:
        return
    plural = "s" if healing.namespaces != 1 else ""
    yield f"addresses      {healing.addresses} of {healing.namespaces} network namespace{plural}"
    yield from (f"not healed     {line}" for line in healing.not_healed)
    if healing.dry_run:
        yield f"dry run        {healing.dry_run_replies:,} replies would have got the address that was asked"
    for reason, count in healing.refused.items():
        if count:
            yield f"refused        {count:,} {reason}: {REFUSALS[reason]}"
    yield from _healed(rows)


def _state(healing: Healing) -> str:
    if healing.reason:
        return f"impossible: {healing.reason}"
    if healing.dry_run:
        return "dry run: replies are counted, and none is changed"
    if healing.on:
        return "on"
    return "on for the switched ports only" if healing.ports_on else "off"


def _ports(ports: tuple[int, ...]) -> str:
    return ", ".join(map(str, ports))


def _healed(rows: tuple[Row, ...]) -> Iterator[str]:
    if not rows:
        return
    yield ""
    yield f"{'healed replies':>14}  port   asked at           server"
    for row in sorted(rows, key=lambda row: -row.count):
        yield f"{row.count:>14,}  {row.port:<5}  {row.expected:<17}  {row.sender.title}"
    yield ""
    yield "These servers still need a fix: udpwatch explain"
