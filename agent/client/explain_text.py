"""Format the output of `udpwatch explain`: text in 80 columns, or one JSON object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from udpwatch.agent.client.explain import (
    Advice,
    advice,
    advice_object,
    explanation,
    remedy_advice,
    row_object,
    sender_text,
)
from udpwatch.agent.client.heal_advice import heal_sentence, refusal_sentences
from udpwatch.agent.client.lines import safe, safe_lines, safe_paragraph
from udpwatch.agent.client.remedies import Code, Remedy, codes, remedies
from udpwatch.agent.model import Healing, Row

MAX_ROWS = 20
WIDTH = 78


class Page:
    """Collects wrapped lines, which are safe on a terminal; the text of `verbatim` must be so already."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour
        self._lines: list[str] = []

    def head(self, text: str) -> None:
        """Add a blank line and a bold heading."""
        if self._lines:
            self._lines.append("")
        text = safe(text)
        self._lines.append(f"\x1b[1m{text}\x1b[0m" if self._colour else text)

    def gap(self) -> None:
        self._lines.append("")

    def paragraph(self, text: str, label: str = "") -> None:
        """Add wrapped text that begins with ``label``."""
        self._lines += safe_paragraph(label + text, WIDTH, "  ", "  ")

    def item(self, text: str, marked: bool) -> None:
        """Add wrapped text as an item of a list; ``!`` marks what is wrong."""
        self._lines += safe_paragraph(text, WIDTH, "! " if marked else "- ", "  ")

    def verbatim(self, text: str) -> None:
        """Add lines for the user to copy, unwrapped, with a blank line before and after."""
        self._lines += ["", *(f"      {line}".rstrip() for line in text.splitlines()), ""]

    def advise(self, fix: Advice) -> None:
        """Add what to do, the line to copy and the link."""
        self.paragraph(fix.do, f"What to do ({fix.server}): " if fix.server else "What to do: ")
        if fix.config:
            self.verbatim(safe_lines(fix.config))
        if fix.source:
            self._lines.append(f"  {fix.source}")
        if fix.run:
            self.paragraph(f"This was run with {', '.join(fix.run)}: it then replied from the right address.")
        elif fix.server:
            self.paragraph("This was not run with udpwatch: it is what the linked page says.")

    def code(self, languages: Iterable[str]) -> None:
        """Add the servers in these languages."""
        for code in _codes(languages):
            self.head(f"In {code.language}: reply from the address that was asked")
            self.paragraph(code.source)
            self.verbatim(code.text)

    def __str__(self) -> str:
        return "\n".join(self._lines).rstrip("\n")


def rows_text(rows: Sequence[Row], colour: bool, healing: Healing | None = None) -> str:
    """Explain each row. Advice that applies to several rows is printed once, and code at the end.

    ``healing``: what the agent heals; None: nothing.
    """
    page = Page(colour)
    advised: dict[tuple[str, str], str] = {}
    languages: set[str] = set()
    for row in rows[:MAX_ROWS]:
        fix = advice(row)
        head = f"{sender_text(row)}, port {row.port}/udp"
        page.head(head)
        page.paragraph(" ".join(explanation(row)))
        page.gap()
        first = advised.setdefault((fix.do, fix.config), head)
        if first is head:
            page.advise(fix)
        else:
            page.paragraph(f"What to do: the same as for {first}.")
        page.gap()
        page.paragraph(heal_sentence(row, healing, rows), "" if row.is_healed else "Heal: ")
        languages.update(fix.languages)
    if len(rows) > MAX_ROWS:
        page.head(f"{len(rows) - MAX_ROWS} more findings are less frequent: pass a process or a port to see them")
    add_refusals(page, healing)
    page.code(languages)
    return str(page)


def add_refusals(page: Page, healing: Healing | None) -> None:
    """Add what the agent left alone although it was to be healed."""
    refusals = list(refusal_sentences(healing))
    if refusals:
        page.head("Not healed so far, of all servers selected for healing")
    for each in refusals:
        page.item(each, marked=False)


def rows_object(rows: Sequence[Row], healing: Healing | None = None) -> dict[str, Any]:
    """Explain all rows as one JSON object."""
    findings = [row_object(row, healing, rows) for row in rows]
    languages = {language for finding in findings for language in finding["remedy"]["languages"]}
    return {"findings": findings, "not_healed": list(refusal_sentences(healing)), "code": _code_object(languages)}


def remedy_text(remedy: Remedy, colour: bool) -> str:
    """Format how to fix a program without a finding."""
    page = Page(colour)
    fix = remedy_advice(remedy)
    page.advise(fix)
    page.code(fix.languages)
    return str(page)


def remedy_only_object(remedy: Remedy) -> dict[str, Any]:
    """Return how to fix a program without a finding, as a JSON object."""
    fix = remedy_advice(remedy)
    return {"findings": [], "remedy": advice_object(fix), "code": _code_object(fix.languages)}


def known_text() -> str:
    """List the known programs, one per line, with their process names."""
    width = max(len(remedy.name) for remedy in remedies())
    return "\n".join(f"{remedy.name:<{width}}  {' '.join(remedy.processes)}" for remedy in remedies())


def known_object() -> list[dict[str, Any]]:
    """Return the known programs as JSON objects."""
    return [{"processes": list(remedy.processes), **advice_object(remedy_advice(remedy))} for remedy in remedies()]


def _codes(languages: Iterable[str]) -> list[Code]:
    languages = set(languages)
    return [code for code in codes() if code.language in languages]


def _code_object(languages: Iterable[str]) -> dict[str, str]:
    return {code.language: code.text for code in _codes(languages)}
