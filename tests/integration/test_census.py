"""Real servers of Debian on a host with several addresses; `make census` runs many more (docs/census.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from census import Census, Setup, setups
from census_table import result_of
from debian_trees import NotAvailable, tree

QUICK = [setup for setup in setups() if setup.quick]


@pytest.fixture(scope="module")
def census(cache: Path) -> Iterator[Census]:
    """The host of the servers."""
    with Census(cache) as running:
        yield running


@pytest.mark.parametrize("setup", QUICK, ids=lambda setup: setup.name)
def test_server_replies_as_the_census_says_and_its_fix_or_healing_works(census: Census, setup: Setup) -> None:
    try:
        version = tree(setup.packages).version
    except NotAvailable as error:
        pytest.skip(str(error))
    first = census.run(setup)
    fixed = census.run(setup, remedied=True) if setup.remedy else None
    result = result_of(setup, version, first, fixed, census.run_healed(setup))
    assert not result.failures, result.log
