"""Losses of conntrack, made for real, and reported as conntrack(8) and the other side of the router see them."""

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
    """Set a limit that all namespaces of the machine share; it is restored afterwards."""
    if not IN_MATRIX:
        pytest.skip("needs a machine whose conntrack table may be too small: `make test-kernels` has such guests")
    with ExitStack() as before:

        def set_one(name: str, value: int) -> None:
            path = SETTINGS / name
            before.callback(path.write_text, path.read_text())
            path.write_text(str(value))

        yield set_one


def health(router: Router) -> ConntrackHealth:
    """Read conntrack's health as the agent does."""
    with router.node.entered(), Table() as table:
        return table.health()


def confirmed(router: Router) -> bool:
    """Whether conntrack(8) reports the same for this namespace, read between two of our readings."""
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
    """Send new flows through the router, each from another port; not more than a device's queue holds."""
    for number in range(flows):
        router.left.send(CLIENT, first + number, SERVER, port)


def passed(router: Router, port: int) -> int:
    """Return how many packets of the flood came out, including one more whose flow is tracked or has room."""
    router.left.send(CLIENT, 4444, SERVER, port)
    count = 0
    while router.right.receive() != (CLIENT, 4444, SERVER, port):
        count += 1
    return count


def test_flows_dropped_by_a_full_table_are_counted(
    router: Router, port: int, setting: Callable[[str, int], None]
) -> None:
    """There are so many buckets that those around a new flow hold nothing that could be evicted."""
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


def test_evictions_of_unanswered_flows_are_counted(
    router: Router, port: int, setting: Callable[[str, int], None]
) -> None:
    """There are so few buckets that something can always be evicted: only unanswered flows are lost."""
    setting("nf_conntrack_buckets", 512)
    setting("nf_conntrack_max", 300)
    before = health(router)
    flood(router, port, 450)
    came = passed(router, port)
    after = health(router)
    assert after.early_dropped - before.early_dropped >= came - after.entries >= 100
    assert after.dropped - before.dropped >= 450 - came
    assert confirmed(router)


def test_packets_dropped_for_full_buckets_are_counted(
    router: Router, port: int, setting: Callable[[str, int], None]
) -> None:
    """The table has room, but not where the flow belongs: its packet is dropped at confirmation."""
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
