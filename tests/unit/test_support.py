"""Helpers of tests are in tests/support."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

TESTS = ROOT / "tests"


def imported_by(path: Path) -> Iterator[str]:
    """Yield the names of all modules that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_or_a_conftest(path: Path) -> None:
    names = {part for module in imported_by(path) for part in module.split(".")}
    assert [name for name in names if name == "conftest" or name.startswith("test_")] == []


def test_folders_of_tests_hold_tests_only() -> None:
    folders = (TESTS / "unit", TESTS / "integration")
    others = {path.name for folder in folders for path in folder.rglob("*.py") if not path.name.startswith("test_")}
    assert others == {"conftest.py"}


#: Tests of several modules at once.
OF_SEVERAL_MODULES = {"agent/kernel/test_architectures.py"}


def test_unit_tests_of_the_agent_are_named_after_the_module_that_they_test() -> None:
    unit = TESTS / "unit"
    found = {str(path.relative_to(unit)) for path in (unit / "agent").rglob("test_*.py")}
    assert found >= OF_SEVERAL_MODULES
    modules = {name: ROOT / name.replace("test_", "") for name in found - OF_SEVERAL_MODULES}
    assert [name for name, module in sorted(modules.items()) if not module.exists()] == []


def test_tests_that_are_named_elsewhere_exist() -> None:
    """The matrix, its fixtures and CI refer to integration tests by name."""
    files = list((TESTS / "integration").glob("test_*.py"))
    found = {path.stem for path in files}
    for path in files:
        tree = ast.parse(path.read_text())
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for page in (ROOT / ".ci/run", TESTS / "integration/conftest.py", TESTS / "kernels/matrix.py"):
        assert set(re.findall(r"\btest_\w+", page.read_text())) - found - {"test_"} == set(), page
