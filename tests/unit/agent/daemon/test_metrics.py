"""The metrics of healing, as Prometheus reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from golden import HEALED_ROW, ROW, SNAPSHOT
from prometheus_client.parser import text_string_to_metric_families

from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.model import REFUSALS, Healing, Snapshot


def values(snapshot: Snapshot, metric: str, label: str) -> dict[str, float]:
    """Return the samples of a metric by the value of one label; "": a sample without it."""
    text = exposition(SnapshotCollector(lambda: snapshot), process=False)().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels.get(label, ""): sample.value for sample in samples if sample.name == metric}


def test_healed_replies_are_not_wrong_replies() -> None:
    assert values(SNAPSHOT, "udpwatch_reply_source_mismatch_total", "port") == {"1194": ROW.count, "other": 2}
    assert values(SNAPSHOT, "udpwatch_healed_replies_total", "asked") == {HEALED_ROW.expected: 41, "other": 4}


def test_counters_of_healing_exist_at_0_where_nothing_is_to_be_healed() -> None:
    off = replace(SNAPSHOT, rows=(ROW,), healing=None, other_healed={})
    assert values(off, "udpwatch_healed_replies_total", "port") == {"other": 0}
    assert values(off, "udpwatch_heal_refused_total", "reason") == dict.fromkeys(REFUSALS, 0)
    assert not values(off, "udpwatch_heal_dry_run_replies_total", "") | values(off, "udpwatch_heal_active", "")


def test_refusals_count_by_reason() -> None:
    expected = dict.fromkeys(REFUSALS, 0) | {"several-addresses": 3}
    assert values(SNAPSHOT, "udpwatch_heal_refused_total", "reason") == expected


@pytest.mark.parametrize(
    ("healing", "active"),
    [
        (Healing("all ports", on=True, dry_run=False), 1),
        (Healing("nothing", on=False, dry_run=False), 0),
        (Healing("nothing", on=False, dry_run=False, ports_on=(53,)), 1),
        (Healing("all ports", on=True, dry_run=True, dry_run_replies=7), 0),
        (Healing("all ports", on=True, dry_run=False, reason="this kernel has no cgroup/sendmsg4"), 0),
    ],
)
def test_healing_is_active_only_if_replies_are_healed(healing: Healing, active: int) -> None:
    snapshot = replace(SNAPSHOT, healing=healing)
    assert values(snapshot, "udpwatch_heal_active", "") == {"": active}
    assert values(snapshot, "udpwatch_heal_dry_run_replies_total", "") == {"": healing.dry_run_replies}
