"""Find the known fix for a sender's program, with its reference (remedies.toml)."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udpwatch.agent.model import Sender

FILE = Path(__file__).resolve().parent / "remedies.toml"
COMM_CHARACTERS = 15  # the kernel cuts longer process names (TASK_COMM_LEN, without the final zero byte)


@dataclass(frozen=True, slots=True)
class Remedy:
    """How to fix one program."""

    name: str
    processes: tuple[str, ...]  # its process names; "x*": every name with this prefix
    do: str  # one or two sentences
    config: str  # the exact line with placeholders such as {address}; "": none
    source: str  # link
    code: str  # language of the `Code` that shows the fix; "": a setting is enough
    run: tuple[str, ...]  # Debian packages with version that were run with this fix (docs/census.md); (): none

    def matches(self, process: str) -> bool:
        return any(
            process.startswith(known[:-1]) if known.endswith("*") else process in (known, known[:COMM_CHARACTERS])
            for known in self.processes
        )


@dataclass(frozen=True, slots=True)
class Code:
    """A complete small server that replies from the address that was asked."""

    language: str
    source: str  # link that explains why this code is needed
    text: str


def remedies() -> tuple[Remedy, ...]:
    return _read()[0]


def codes() -> tuple[Code, ...]:
    """Return one server per language."""
    return _read()[1]


def remedy_of(sender: Sender) -> Remedy | None:
    """Return the remedy for a sender by the name of its process or executable; None if the program is unknown.

    The process name takes precedence: `certbot` runs in Python, and the setting of certbot is the better fix.
    """
    executable = sender.executable.removesuffix(" (deleted)")  # the kernel's suffix for a replaced program
    for name in (sender.process, executable.rpartition("/")[2]):
        for remedy in remedies():
            if name and remedy.matches(name):
                return remedy
    return None


def remedy_named(name: str) -> Remedy | None:
    """Return the remedy for the name of a program or process, in upper or lower case; None if it is unknown."""
    lower = name.lower()
    for remedy in remedies():
        if lower == remedy.name.lower() or remedy.matches(name) or lower in map(str.lower, remedy.processes):
            return remedy
    return None


@functools.cache
def _read() -> tuple[tuple[Remedy, ...], tuple[Code, ...]]:
    content: dict[str, list[dict[str, Any]]] = tomllib.loads(FILE.read_text(encoding="utf-8"))
    servers = tuple(
        Remedy(
            entry["name"],
            tuple(entry["processes"]),
            entry["do"],
            entry.get("config", ""),
            entry["source"],
            entry.get("code", ""),
            tuple(entry.get("run", ())),
        )
        for entry in content["server"]
    )
    return servers, tuple(Code(**entry) for entry in content["code"])
