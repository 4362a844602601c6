"""Format what `udpwatch explain PORT` says about a port without a finding: text in 80 columns, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from udpwatch.agent.client.explain import advice, advice_object
from udpwatch.agent.client.explain_text import Page
from udpwatch.agent.client.lines import safe, safe_lines
from udpwatch.agent.servers.port.facts import Look
from udpwatch.agent.servers.port.statements import Statement

_SHOWN = 8  # namespaces in the heading


def port_text(look: Look, statements: Sequence[Statement], colour: bool) -> str:
    """Return the statements below a heading for each namespace, and what could not be looked at."""
    page = Page(colour)
    for namespace, told in groupby(statements, key=lambda each: each.namespace):
        where = safe(namespace) if namespace else "this machine"
        page.head(f"Port {look.port}/udp, {where}")
        for each in told:
            page.item(safe(each.text), each.wrong)
            if each.fix:
                page.verbatim(safe_lines(each.fix))
            if each.row:
                page.gap()
                page.advise(advice(each.row))
    if not statements:
        page.head(f"Port {look.port}/udp")
        page.paragraph("nothing could be looked at")
    page.gap()
    names = [safe(each.name) for each in look.namespaces if each.is_watched]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    page.paragraph(f"{', '.join(names[:_SHOWN])}{more}.", f"Looked for {look.seconds:g} s in ")
    for reason in look.unseen:
        page.paragraph(f"{safe(reason)}.", "Not looked at: ")
    page.code({language for each in statements if each.row for language in advice(each.row).languages})
    return str(page)


def port_object(look: Look, statements: Sequence[Statement]) -> dict[str, Any]:
    """Return the statements as one JSON object."""
    return {
        "findings": [],
        "port": look.port,
        "seconds": look.seconds,
        "wrong": any(each.wrong for each in statements),
        "statements": [
            {
                "kind": each.kind,
                "wrong": each.wrong,
                "text": each.text,
                "fix": each.fix or None,
                "namespace": each.namespace or None,
                "netns": each.netns or None,
                "remedy": advice_object(advice(each.row)) if each.row else None,
            }
            for each in statements
        ],
        "namespaces": [{"name": each.name, "netns": each.inode} for each in look.namespaces if each.is_watched],
        "unseen": list(look.unseen),
    }
