"""The table of BPF programs against the C sources and the documentation."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

from udpwatch.agent.kernel.programs import FUNCTIONS, HEAL_HOOKS, HOOKS, MAPS, PROGRAMS, Program

SOURCES = {program.source for program in PROGRAMS}


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_each_c_program_has_a_row_and_each_row_a_c_program(source: str) -> None:
    """bcc loads every function that is not static."""
    text = (ROOT / "bpf" / source).read_text()
    functions = set(re.findall(r"^int (\w+)\(", text, re.MULTILINE))
    assert functions == {program.function for program in PROGRAMS if program.source == source}


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_each_map_that_the_agent_reads_is_in_the_source(source: str) -> None:
    text = "".join(path.read_text() for path in (ROOT / "bpf").glob("*.[ch]"))
    assert {name for name in MAPS[source] if not re.search(rf"\b{name}\b", text)} == set()


@pytest.mark.parametrize(
    "program", [program for program, _ in (*HOOKS, *HEAL_HOOKS, *FUNCTIONS)], ids=lambda each: each.name
)
def test_each_attached_program_is_documented(program: Program) -> None:
    assert program.name in (ROOT / "docs/kernels.md").read_text()
    assert program.required or program.without
