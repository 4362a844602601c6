"""What conntrack loses, lost for real, and told as it is: by what came out at the other side, and by conntrack(8)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from router import Router
from sensors import IN_MATRIX

from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.model import ConntrackHealth

CLIENT, SERVER = "10.1.0.9", "10.2.0.5"
SETTINGS = Path("/proc/sys/net/netfilter")


@pytest.fixture
def router() -> Iterator[Router]:
    with Router() as made:
        made.node.sysctl("net/netfilter/nf_conntrack_udp_timeout", "600")  # nothing goes by itself
        yield made


@pytest.fixture
def setting() -> Iterator[Callable[[str, int], None]]:
    """Sets what counts for the namespaces of the whole machine alike; as it was, afterwards."""
    if not IN_MATRIX:
        pytest.skip("needs a machine whose conntrack table may be too small: `make test-kernels` has such guests")
    with ExitStack() as before:

        def set_one(name: str, value: int) -> None:
            path = SETTINGS / name
            before.callback(path.write_text, path.read_text())
            path.write_text(str(value))

        yield set_one


def health(router: Router) -> ConntrackHealth:
    """As the agent asks for it."""
    with router.node.entered(), Table() as table:
        return table.health()


def confirmed(router: Router) -> bool:
    """Whether conntrack(8) says the same of this namespace, asked between two of our questions."""
    before = health(router)
    total = Counter[str]()
    for name, value in re.findall(r"\b(insert_failed|drop|early_drop)=(\d+)", router.node.run(["conntrack", "-S"])):
        total[name] += int(value)
    after = health(router)
    return (
        before.insert_failed <= total["insert_failed"] <= after.insert_failed
        and before.dropped <= total["drop"] <= after.dropped
        and before.early_dropped <= total["early_drop"] <= after.early_dropped
    )


def flood(router: Router, port: int, flows: int, first: int = 20_000) -> None:
    """New flows through the router, from one port each; not more than a device's queue holds."""
    for number in range(flows):
        router.left.send(CLIENT, first + number, SERVER, port)


def passed(router: Router, port: int) -> int:
    """How many of the flood came out, up to one more datagram, whose flow is booked or for which there is room."""
    router.left.send(CLIENT, 4444, SERVER, port)
    count = 0
    while router.right.receive() != (CLIENT, 4444, SERVER, port):
        count += 1
    return count


def test_a_full_table(router: Router, port: int, setting: Callable[[str, int], None]) -> None:
    """So many buckets that the few around a new flow's own hold nothing that could go for it."""
    before = health(router)
    roomy = before.limit
    setting("nf_conntrack_max", 50)
    assert health(router).limit == 50
    flood(router, port, 200)
    setting("nf_conntrack_max", roomy)
    lost = 200 - passed(router, port)
    after = health(router)
    assert after.dropped - before.dropped >= lost >= 100
    assert confirmed(router)


def test_unanswered_flows_make_room(router: Router, port: int, setting: Callable[[str, int], None]) -> None:
    """So few buckets that there is always one that can go: nothing is lost but what had not been answered."""
    setting("nf_conntrack_buckets", 512)
    setting("nf_conntrack_max", 300)
    before = health(router)
    flood(router, port, 450)
    came = passed(router, port)
    after = health(router)
    assert after.early_dropped - before.early_dropped >= came - after.entries >= 100
    assert after.dropped - before.dropped >= 450 - came
    assert confirmed(router)


def test_buckets_that_are_full(router: Router, port: int, setting: Callable[[str, int], None]) -> None:
    """Room in the table, none where the flow belongs: its packet is dropped when it should be booked."""
    if "chaintoolong" not in router.node.run(["conntrack", "-S"]):
        pytest.skip("this kernel lets buckets grow without end: newer ones of `make test-kernels` do not")
    setting("nf_conntrack_buckets", 512)
    setting("nf_conntrack_max", 65_536)
    before = health(router)
    came = 0
    for chunk in range(125):
        flood(router, port, 200, 20_000 + 200 * chunk)
        came += passed(router, port)
    after = health(router)
    assert after.insert_failed - before.insert_failed >= 25_000 - came >= 1_000
    assert confirmed(router)
