"""The census' set-ups, the numbers of its table, and what remedies.toml says was run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from census import GENERAL, setups
from census_requests import request_named
from census_table import PAGE, Agreement, Result, Share, agreement, share_healed, short, table
from repository import DOCS, ROOT

from udpwatch.agent.client.explain import remedy_advice
from udpwatch.agent.client.explain_text import remedy_text
from udpwatch.agent.client.remedies import remedies

RIGHT = Result("", "a", "p", "1", "", "46", "", "", "", (), 0)
WRONG = replace(RIGHT, name="b", remedy="NSD", expected="46", predicted="4", wrong="46", findings=2, healed=4)
CONNECTED = replace(WRONG, name="c", healed=0, healed_wrong="46", healed_findings=2, unhealed=("connected",))


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
    assert nsd.with_remedy().bind.splitlines()[0] == "ip-address: 172.16.13.13"
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
    assert replace(WRONG, disagreements=("audit did not list it",)).failures
    assert replace(WRONG, fixed_predicted="6").failures
    assert replace(WRONG, fixed_wrong="6", fixed_findings=1).failures
    assert replace(WRONG, fixed_silent=("172.17.0.1",)).failures


def test_result_that_is_not_healed_needs_a_reason() -> None:
    assert not CONNECTED.failures
    assert replace(CONNECTED, unhealed=()).failures
    assert replace(WRONG, healed=0).failures
    assert replace(WRONG, healed_silent=("172.17.0.1",)).failures
    assert replace(RIGHT, healed_wrong="4", unhealed=("several-addresses",)).failures


def test_share_counts_what_healing_made_of_each_set_up() -> None:
    worse = replace(RIGHT, name="d", healed_wrong="4")
    share = share_healed([RIGHT, WRONG, CONNECTED, worse])
    assert share == Share(right=1, unhealed={"connected": 1}, before=2, worse=1)
    assert "1 of the 2" in str(share)
    assert "| c | wrong: 4, 6 | wrong: 4, 6 | connected |" in table([RIGHT, CONNECTED])


def rows_of_the_page(columns: int = 7) -> dict[str, list[str]]:
    """Return the cells of each row of the table with so many columns, by the name of the set-up."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    notes = {f"{setup.name} ({setup.note})" if setup.note else setup.name: setup.name for setup in setups()}
    return {notes[cells[0]]: cells for cells in rows if len(cells) == columns and cells[0] in notes}


def test_page_shows_every_set_up_and_what_it_expects() -> None:
    rows = rows_of_the_page()
    assert rows.keys() == {setup.name for setup in setups()}
    for setup in setups():
        asked, audit, replies, fixed = rows[setup.name][2:5] + rows[setup.name][6:]
        assert asked == short(setup.families)
        assert audit == (f"wrong: {short(setup.predicted)}" if setup.predicted else "right"), setup.name
        assert replies == (f"wrong: {short(setup.wrong)}" if setup.wrong else "right"), setup.name
        assert fixed == ("right" if setup.remedy else "no setting is known" if setup.wrong else ""), setup.name


def test_page_shows_what_healing_made_of_every_set_up_with_wrong_replies() -> None:
    rows = rows_of_the_page(4)
    assert rows.keys() == {setup.name for setup in setups() if setup.wrong}
    for _name, replies, healed, reason in rows.values():
        assert replies.startswith("wrong")
        assert healed == "right" if not reason else healed.startswith("wrong")


def test_pages_name_the_share_of_the_census() -> None:
    rows = rows_of_the_page(4).values()
    healed, wrong = sum(not reason for *_, reason in rows), len(rows)
    for page in (DOCS / "heal.md", ROOT / "README.md"):
        numbers = re.findall(r"Of (\d+) set-ups of real servers .*? makes (\d+) ", " ".join(page.read_text().split()))
        assert numbers == [(str(wrong), str(healed))], page


def test_versions_that_were_run_are_those_of_the_table() -> None:
    """Each entry's `run` is what the census saw: wrong without the fix, right with it."""
    seen: dict[str, set[str]] = {}
    rows = rows_of_the_page()
    for setup in setups():
        cells = rows[setup.name]
        if setup.remedy not in ("", GENERAL) and cells[4].startswith("wrong") and cells[6] == "right":
            seen.setdefault(setup.remedy, set()).add(cells[1])
    assert {remedy.name: set(remedy.run) for remedy in remedies() if remedy.run} == seen


def test_explain_says_whether_a_fix_was_run() -> None:
    assert any(remedy.run for remedy in remedies())
    for remedy in remedies():
        text = " ".join(remedy_text(remedy, False).split())
        assert ("was run with" in text) == bool(remedy.run)
        assert ("was not run" in text) == (not remedy.run)
        assert remedy_advice(remedy).run == remedy.run
