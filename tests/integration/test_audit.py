"""What audit predicts is what happens: real servers, asked at each address from each network of real nodes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from audited import Tally, compare
from layouts import LAYOUTS

from udpwatch.agent.errors import UdpwatchError


@pytest.fixture(scope="module")
def tallies(request: pytest.FixtureRequest) -> Iterator[tuple[Tally, Tally]]:
    """Count all cases, and print precision and recall at the end."""
    pairs, verdicts = Tally(), Tally()
    yield pairs, verdicts
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\naudit, replies by address and peers: {pairs}\naudit, servers: {verdicts}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_verdict_agrees_with_the_replies(name: str, tallies: tuple[Tally, Tally]) -> None:
    kind, make = LAYOUTS[name]
    found = Tally(), Tally()
    with kind() as lab:
        try:
            layout = make(lab)
        except UdpwatchError as error:
            if "Unknown device type" in str(error):
                pytest.skip(f"this kernel lacks a device type: {error}")
            raise
        compare(layout, count(20_000), found)
    for mine, total in zip(found, tallies, strict=True):
        total.include(mine)
    pairs, verdicts = found
    assert verdicts.true + verdicts.right + verdicts.false + verdicts.missed == len(layout.kinds)
    assert pairs.true or name == "pod", "a layout in which no reply is wrong shows nothing"
    assert pairs.mistakes == [] and verdicts.mistakes == []
