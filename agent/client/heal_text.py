"""What `udpwatch heal` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from udpwatch.agent.client.lines import safe, safe_paragraph
from udpwatch.agent.model import REFUSALS, Cause, Healing, Row, Snapshot

_WIDTH = 80
_INDENT = 15


def status_text(healing: Healing, snapshot: Snapshot) -> str:
    """Return what is healed, as lines of 80 columns."""
    lines = []
    for label, text in _facts(healing):
        lines += safe_paragraph(text, _WIDTH, f"{label:<{_INDENT}}", " " * _INDENT)
    if healing.dry_run:
        wrong = [row for row in snapshot.wrong_rows if row.cause == Cause.KERNEL_CHOSEN]
        lines += _table("wrong replies", wrong, "Healing can change these, if their servers are selected.")
    lines += _table("healed replies", snapshot.healed_rows, "These servers still need a fix: udpwatch explain")
    return "\n".join(lines)


def _facts(healing: Healing) -> Iterator[tuple[str, str]]:
    yield "healing", _state(healing)
    yield "settings", safe(healing.selected)
    if healing.ports_on:
        yield "switched on", f"port {_ports(healing.ports_on)}"
    if healing.ports_off:
        yield "switched off", f"port {_ports(healing.ports_off)}"
    if healing.reason:
        return
    plural = "s" if healing.namespaces != 1 else ""
    yield "addresses", f"{healing.addresses}, in {healing.namespaces} network namespace{plural}"
    for line in healing.not_healed:
        yield "not healed", safe(line)
    if healing.dry_run:
        yield (
            "dry run",
            f"{healing.dry_run_replies:,} replies would be healed; routing may have chosen the right address for some",
        )
    for reason, count in healing.refused.items():
        if count:
            yield "refused", f"{count:,} {safe(reason)}: {safe(REFUSALS.get(reason, 'see docs/metrics.md'))}"


def _state(healing: Healing) -> str:
    if healing.reason:
        return f"nothing is healed: {safe(healing.reason)}"
    if not healing.on and not healing.ports_on:
        return "off"
    if healing.dry_run:
        return "dry run: replies are counted, and none is changed; to heal, restart the agent without --heal-dry-run"
    return "on" if healing.on else "on for the switched ports only"


def _ports(ports: tuple[int, ...]) -> str:
    return ", ".join(map(str, ports))


def _table(what: str, rows: Sequence[Row], note: str) -> list[str]:
    if not rows:
        return []
    lines = ["", f"{what:>14}  port   asked at           server"]
    for row in sorted(rows, key=lambda row: -row.count):
        lines.append(f"{row.count:>14,}  {row.port:<5}  {safe(row.expected):<17}  {safe(row.sender.title)}")
    return [*lines, "", note]
