"""From a sender to what is known of its program: how to mend it, and where that was learned (remedies.toml)."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udpwatch.agent.model import Sender

FILE = Path(__file__).resolve().parent / "remedies.toml"
COMM_LETTERS = 15  # the kernel keeps so many of a name (TASK_COMM_LEN, less the final zero)


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is known of one program."""

    name: str
    processes: tuple[str, ...]  # that it goes by; "x*": all names that begin so
    do: str  # for people, a sentence or two
    config: str  # the exact line, with {address} and the like; "": there is none
    source: str  # link
    code: str  # language of `Code` that shows how; "": a setting does it

    def is_of(self, process: str) -> bool:
        """Whether a process of that name is this program's."""
        return any(
            process.startswith(known[:-1]) if known.endswith("*") else process in (known, known[:COMM_LETTERS])
            for known in self.processes
        )


@dataclass(frozen=True, slots=True)
class Code:
    """A whole small server that answers from the address asked."""

    language: str
    source: str  # link: why it takes this
    text: str


def remedies() -> tuple[Remedy, ...]:
    """All programs that are known."""
    return _read()[0]


def codes() -> tuple[Code, ...]:
    """The cure in code, a language each."""
    return _read()[1]


def find(sender: Sender) -> Remedy | None:
    """The remedy of a sender, by its name, else by its executable's; None: not a program that is known.

    The name goes first: behind `certbot` is a Python, and the setting of certbot is the nearer cure.
    """
    executable = sender.executable.removesuffix(" (deleted)")  # as the kernel says of a program that was replaced
    for name in (sender.process, executable.rpartition("/")[2]):
        for remedy in remedies():
            if name and remedy.is_of(name):
                return remedy
    return None


def named(name: str) -> Remedy | None:
    """The remedy that somebody means who types this, in whatever letters."""
    wanted = name.lower()
    for remedy in remedies():
        if wanted == remedy.name.lower() or remedy.is_of(name) or wanted in map(str.lower, remedy.processes):
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
        )
        for entry in content["server"]
    )
    return servers, tuple(Code(**entry) for entry in content["code"])
