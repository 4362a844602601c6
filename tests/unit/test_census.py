"""The census' set-ups, the numbers of its table, and what remedies.toml says was run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from census import GENERAL, setups
from census_requests import request_named
from census_table import PAGE, Agreement, Result, agreement, table

from udpwatch.agent.client.explain import remedy_advice
from udpwatch.agent.client.explain_text import remedy_text
from udpwatch.agent.client.remedies import remedies

RIGHT = Result("", "a", "p", "1", "", "46", "", "", "", (), 0, False)
WRONG = replace(RIGHT, name="b", remedy="NSD", expected="46", predicted="4", wrong="46", findings=2)


def test_set_ups_are_complete() -> None:
    names = Counter(setup.name for setup in setups())
    assert max(names.values()) == 1
    for setup in setups():
        assert request_named(setup.request), setup.name
        assert set(setup.wrong) <= set(setup.families), setup.name
        if setup.remedy:
            assert setup.with_remedy() != setup or setup.with_remedy_for(setup.addresses[0]) != setup, setup.name


def test_fix_is_the_line_that_explain_prints() -> None:
    (nsd,) = (setup for setup in setups() if setup.remedy == "NSD")
    assert nsd.with_remedy().bind.splitlines()[1] == "ip-address: 172.16.13.13"
    assert nsd.known.config == "ip-address: {address}"


def test_agreement_counts_each_set_up_and_family() -> None:
    silent = replace(WRONG, silent=("172.17.0.1",))
    assert agreement([RIGHT, WRONG, silent]) == Agreement(right=1, false=0, missed=1, neither=2)
    assert "precision 1.00, recall 0.50" in table([RIGHT, WRONG, silent])


def test_result_that_differs_is_a_failure() -> None:
    assert not RIGHT.failures
    assert not WRONG.failures
    assert replace(WRONG, wrong="4").failures
    assert replace(WRONG, silent=("172.17.0.1",)).failures
    assert replace(WRONG, findings=0).failures
    assert replace(RIGHT, findings=1).failures
    assert replace(WRONG, fixed_wrong="6", fixed_findings=1).failures
    assert replace(WRONG, fixed_silent=("172.17.0.1",)).failures


def test_versions_that_were_run_are_those_of_the_table() -> None:
    """Each entry's `run` is what the census saw: wrong without the fix, right with it."""
    seen: dict[str, set[str]] = {}
    of = {setup.name: setup.remedy for setup in setups()}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[4].startswith("wrong") and cells[6] == "right":
            seen.setdefault(of[re.sub(r" \([^()]*\)$", "", cells[0]) if cells[0] not in of else cells[0]], set()).add(
                cells[1]
            )
    seen.pop(GENERAL, None)
    assert {remedy.name: set(remedy.run) for remedy in remedies() if remedy.run} == seen


def test_explain_says_whether_a_fix_was_run() -> None:
    assert any(remedy.run for remedy in remedies())
    for remedy in remedies():
        text = " ".join(remedy_text(remedy, False).split())
        assert ("was run with" in text) == bool(remedy.run)
        assert ("was not run" in text) == (not remedy.run)
        assert remedy_advice(remedy).run == remedy.run
