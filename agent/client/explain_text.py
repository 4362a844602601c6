"""What `udpwatch explain` says, laid out for people (80 columns) or as one object for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from udpwatch.agent.client.explain import Advice, advice, as_object, of_remedy, remedy_object, who, why
from udpwatch.agent.client.remedies import Code, Remedy, codes, remedies
from udpwatch.agent.model import Row

MAX_ROWS = 20
WIDTH = 78


class Page:
    """Lines, folded and painted."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour
        self._lines: list[str] = []

    def head(self, text: str) -> None:
        """A line that stands out, after a free one."""
        if self._lines:
            self._lines.append("")
        self._lines.append(f"\x1b[1m{text}\x1b[0m" if self._colour else text)

    def gap(self) -> None:
        """A free line."""
        self._lines.append("")

    def paragraph(self, text: str, label: str = "") -> None:
        """Folded text, ``label`` before its first line."""
        self._lines += textwrap.wrap(
            label + text,
            WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    def verbatim(self, text: str) -> None:
        """Lines to be copied, as they are, between free ones."""
        self._lines += ["", *(f"      {line}".rstrip() for line in text.splitlines()), ""]

    def advise(self, todo: Advice) -> None:
        """What to do, the line to copy, the link."""
        self.paragraph(todo.do, f"What to do ({todo.server}): " if todo.server else "What to do: ")
        if todo.config:
            self.verbatim(todo.config)
        if todo.source:
            self._lines.append(f"  {todo.source}")

    def code(self, wanted: Iterable[str]) -> None:
        """The programs in these languages."""
        for code in _codes(wanted):
            self.head(f"In {code.language}: answer from the address that was asked")
            self.paragraph(code.source)
            self.verbatim(code.text)

    def __str__(self) -> str:
        return "\n".join(self._lines).rstrip("\n")


def rows_text(rows: Sequence[Row], colour: bool) -> str:
    """Each row explained; a cure that serves several is written once, the code at the end."""
    page = Page(colour)
    told: dict[tuple[str, str], str] = {}
    languages: set[str] = set()
    for row in rows[:MAX_ROWS]:
        todo = advice(row)
        head = f"{who(row)}, port {row.port}/udp"
        page.head(head)
        page.paragraph(" ".join(why(row)))
        page.gap()
        before = told.setdefault((todo.do, todo.config), head)
        if before is head:
            page.advise(todo)
        else:
            page.paragraph(f"What to do: as for {before}.")
        languages.update(todo.languages)
    if len(rows) > MAX_ROWS:
        page.head(f"{len(rows) - MAX_ROWS} more, less frequent ones: name a process or a port to see them")
    page.code(languages)
    return str(page)


def rows_object(rows: Sequence[Row]) -> dict[str, Any]:
    """The same for programs; all rows."""
    told = [as_object(row) for row in rows]
    languages = {language for each in told for language in each["remedy"]["languages"]}
    return {"findings": told, "code": _code_object(languages)}


def remedy_text(remedy: Remedy, colour: bool) -> str:
    """What is known of a program, of no case in particular."""
    page = Page(colour)
    todo = of_remedy(remedy)
    page.advise(todo)
    page.code(todo.languages)
    return str(page)


def remedy_only_object(remedy: Remedy) -> dict[str, Any]:
    """The same for programs."""
    todo = of_remedy(remedy)
    return {"findings": [], "remedy": remedy_object(todo), "code": _code_object(todo.languages)}


def known_text() -> str:
    """All programs that are known, a line each."""
    width = max(len(remedy.name) for remedy in remedies())
    return "\n".join(f"{remedy.name:<{width}}  {' '.join(remedy.processes)}" for remedy in remedies())


def known_object() -> list[dict[str, Any]]:
    """The same for programs."""
    return [{"processes": list(remedy.processes), **remedy_object(of_remedy(remedy))} for remedy in remedies()]


def _codes(wanted: Iterable[str]) -> list[Code]:
    wanted = set(wanted)
    return [code for code in codes() if code.language in wanted]


def _code_object(wanted: Iterable[str]) -> dict[str, str]:
    return {code.language: code.text for code in _codes(wanted)}
