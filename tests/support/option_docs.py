"""The lists of options in docs/dns-options.md, which `make golden` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from udpwatch.dns.option_table import OPTIONS
from udpwatch.dns.other_options import IDLE, MISSING


def markdown() -> str:
    """Return the list of options in docs/dns-options.md."""
    items = []
    for option in OPTIONS:
        short = f", `-{option.short}`" if option.short else ""
        differs = f" Differs: {option.differs}." if option.differs else ""
        items.append(f"`{option.flag}`{short}: {option.help}.{differs}")
    return _list(items)


def markdown_idle() -> str:
    """Return the list of accepted options without effect."""
    return _list([f"without `--{name}`: {_names(option.name for option in rows)}." for name, rows in IDLE.items()])


def markdown_refused() -> str:
    """Return the list of refused options."""
    return _list(
        [f"{_names(word.partition(':')[0] for word in words.split())}: {why}." for words, why in MISSING.items()]
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _list(items: list[str]) -> str:
    wrapped = [
        textwrap.fill(
            text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for text in items
    ]
    return "\n".join(wrapped) + "\n"
