"""What continuous integration runs, against the files."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

TESTS = re.findall(r"tests/integration/\w+\.py(?:::\w+)?", (ROOT / ".ci/run").read_text())


@pytest.mark.parametrize("name", TESTS)
def test_each_test_that_ci_names_exists(name: str) -> None:
    """pytest ends with a usage error for a missing one, after the guests have booted."""
    path, _, function = name.partition("::")
    assert re.search(rf"^def {function or 'test_'}", (ROOT / path).read_text(), re.MULTILINE)


def test_ci_names_tests() -> None:
    assert len(TESTS) > 3
