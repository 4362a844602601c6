"""Rows: addition, the limit, aging, with a clock that the tests set."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.daemon.state import CHECK_SECONDS, ENDED_SECONDS, LOSS_STAGES, About, SenderLookup, State
from udpwatch.agent.model import NODE_FAULTS, Cause, Counters, Event, Finding, Increase, Probe, Sample, Sender, Verdict


def finding(port: int = 53, process: str = "dns", cgroup: int = 1) -> Finding:
    return Finding("10.0.0.2", "10.0.0.1", port, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, process, cgroup, 1)


def sample(*increases: Increase, counters: Counters = Counters(), **others: Any) -> Sample:
    return Sample(increases, counters, **({"probes": (), "undecided": 0} | others), tracked_peers=0, evicted_peers=0)


class Senders:
    """A SenderLookup that gives the process of the finding; no sender ever ends."""

    left_out = 0

    def lookup(self, seen: Increase | Event) -> Sender:
        return Sender(seen.finding.process, seen.pid)

    def has_ended(self, _sender: Sender, _now: float) -> bool:
        return False

    def namespace_of(self, tenant: int) -> str:
        return f"ns{tenant}"


def state(max_series: int = 10, forget: float = 60, mode: str = "packet", senders: SenderLookup = Senders()) -> State:
    return State(About("1", "6", "node", mode, 0, ()), max_series, forget, senders)


def test_counts_add_up_and_new_rows_are_returned() -> None:
    summed = state()
    assert [row.port for row in summed.add(sample(Increase(finding(), 3, 0, 7)), 1, 1)] == [53]
    assert summed.add(sample(Increase(finding(), 2, 0, 8)), 2, 2) == []
    (row,) = summed.snapshot(True, 3).rows
    assert (row.count, row.sender.pid, row.last) == (5, 8, 2)


def test_state_is_ready_with_required_probes_and_a_passed_self_test() -> None:
    summed = state()
    assert not summed.snapshot(True, 0).ready  # nothing was read yet
    ingress = Probe("ingress", True, True, 0, 0.0, 0, 1)
    optional = Probe("sendmsg4", False, False, 0, 0.0, 0, 1)
    summed.add(sample(probes=(ingress, optional)), 1, 1)
    assert summed.snapshot(True, 1).ready
    assert not summed.snapshot(False, 1).ready
    summed.add(sample(probes=(replace(ingress, attached=False), optional)), 2, 2)
    assert not summed.snapshot(True, 2).ready


def test_findings_with_equal_labels_are_one_row() -> None:
    summed = state()
    summed.add(sample(Increase(finding(cgroup=1), 3, 0, 7), Increase(finding(cgroup=2), 4, 0, 8)), 1, 1)
    assert [row.count for row in summed.snapshot(True, 1).rows] == [7]


def test_replies_past_the_limit_count_under_other() -> None:
    summed = state(max_series=2)
    for port in range(10):
        summed.add(sample(Increase(finding(port), port, 0, 7)), 1, 1)
    snapshot = summed.snapshot(True, 1)
    assert len(snapshot.rows) == 2
    assert sum(row.count for row in snapshot.rows) + snapshot.other == sum(range(10))
    # A finding that has its row keeps it.
    summed.add(sample(Increase(finding(1), 100, 0, 7)), 2, 2)
    assert summed.snapshot(True, 2).rows[0].count == 101


def test_times_move_with_a_wall_clock_that_was_set() -> None:
    summed = state()
    summed.add(sample(Increase(finding(), 3, 0, 7)), 100, 1)
    summed.add(sample(Increase(finding(), 2, 0, 7)), 160, 61)
    summed.move_times(3600)
    (row,) = summed.snapshot(True, 3770).rows
    assert (row.first, row.last) == (3700, 3760)


def test_faults_of_the_node_go_on_where_the_last_process_stopped() -> None:
    first, second = state(), state()
    first.add(sample(node_faults={"suspend": 2, "memory": 1}), 1, 1)
    second.restore(json.loads(json.dumps(first.to_store())))
    second.add(sample(node_faults={"suspend": 3, "memory": 0}), 2, 2)
    assert second.snapshot(True, 2).node_faults == dict.fromkeys(NODE_FAULTS, 0) | {"suspend": 5, "memory": 1}


def test_quiet_rows_expire_and_make_room() -> None:
    summed = state(max_series=1, forget=60)
    summed.add(sample(Increase(finding(1), 1, 0, 7)), 0, 0)
    summed.add(sample(), 60, 60)
    assert len(summed.snapshot(True, 60).rows) == 1
    summed.add(sample(), 61, 61)
    assert summed.snapshot(True, 61).rows == ()
    summed.add(sample(Increase(finding(2), 1, 0, 7)), 62, 62)
    assert [row.port for row in summed.snapshot(True, 62).rows] == [2]


class OfContainers(Senders):
    """A SenderLookup for which each cgroup is a container in a namespace of its own."""

    def lookup(self, seen: Increase | Event) -> Sender:
        number = seen.finding.cgroup
        return Sender("dns", seen.pid, container=f"c{number}", namespace=f"ns{number}", pod=f"p{number}")


def test_tenant_with_the_most_rows_makes_room() -> None:
    summed = state(max_series=10, senders=OfContainers())
    greedy = [Increase(finding(port, cgroup=1), 1, 0, 7) for port in range(100)]
    summed.add(sample(*greedy), 1, 1)
    innocent = [Increase(finding(port, cgroup=2), 1, 0, 8) for port in range(4)]
    assert len(summed.add(sample(*innocent), 2, 2)) == 4
    summed.add(sample(*greedy), 3, 3)
    snapshot = summed.snapshot(True, 3)
    assert len(snapshot.rows) == 10
    assert sum(row.sender.namespace == "ns2" for row in snapshot.rows) == 4
    assert snapshot.other_of.keys() == {"ns1"}
    assert sum(row.count for row in snapshot.rows) + snapshot.other == 204


def test_each_interface_is_a_tenant() -> None:
    summed = state(max_series=10)

    def forwarded(port: int, interface: str) -> Increase:
        found = replace(finding(port, process="", cgroup=0), cause=Cause.FORWARDED, interface=interface)
        return Increase(found, 1, 0, 0)

    summed.add(sample(*(forwarded(port, "vnet0") for port in range(100))), 1, 1)
    summed.add(sample(*(forwarded(port, "vnet1") for port in range(200, 204))), 2, 2)
    assert sum(row.interface == "vnet1" for row in summed.snapshot(True, 3).rows) == 4


def test_shares_become_equal_and_stay() -> None:
    summed = state(max_series=10, senders=OfContainers())
    for turn in range(20):
        both = [Increase(finding(port, cgroup=1 + port % 2), 1, 0, 7) for port in range(40)]
        fresh = summed.add(sample(*both), turn, turn)
        assert not fresh or turn == 0
    rows = summed.snapshot(True, 30).rows
    assert sorted(row.sender.namespace for row in rows) == ["ns1"] * 5 + ["ns2"] * 5


def test_replies_without_room_in_the_kernel_count_under_their_namespace() -> None:
    summed = state(senders=OfContainers())
    summed.add(sample(beyond={1: 5, 2: 7}), 1, 1)
    summed.add(sample(beyond={1: 6, 2: 7}), 2, 2)
    summed.add(sample(beyond={1: 2}), 3, 3)  # the kernel forgot it meanwhile
    snapshot = summed.snapshot(True, 3)
    assert snapshot.other_of == {"ns1": 8, "ns2": 7}
    assert snapshot.other == 15
    text = exposition(SnapshotCollector(lambda: snapshot), process=False)().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    other = {s.labels["namespace"]: s.value for s in samples if s.labels.get("port") == "other"}
    assert other == {"other": 0, "ns1": 8, "ns2": 7}


def test_number_of_namespaces_under_other_is_bounded() -> None:
    summed = state(senders=OfContainers())
    summed.add(sample(beyond=dict.fromkeys(range(1000), 1)), 1, 1)
    snapshot = summed.snapshot(True, 1)
    assert len(snapshot.other_of) <= 101
    assert snapshot.other == 1000


def test_losses_add_up_by_stage() -> None:
    summed = state()
    counters = Counters(overflow=1, rate_limited=2, ring_full=3, unremembered=4, unparsed=5, undecided=9, candidates=8)
    probe = Probe("nf_ct_delete", True, False, 0, 0, 0, 100, how="kprobe", missed=11)
    lost = {"undecided": 6, "overruns": 10, "held_back": 20, "beyond": {7: 1}}
    summed.add(sample(counters=counters, probes=(probe,), **lost), 0, 0)
    summed.lose("queue")
    summed.lose("output", 7)
    snapshot = summed.snapshot(True, 0)
    assert snapshot.lost == {
        "rate_limit": 22,
        "ring_full": 3,
        "findings_full": 1,
        "undecided": 15,
        "flows_full": 8,
        "conntrack_overrun": 10,
        "probe_missed": 11,
        "remember": 4,
        "unparsed": 5,
        "attribution": 0,
        "queue": 1,
        "output": 7,
    }
    assert snapshot.other == 1
    assert snapshot.lost.keys() == LOSS_STAGES.keys()


def test_suspected_reply_is_undecided_not_wrong() -> None:
    """In mode netlink, a reply that had no room in the kernel may be NAT."""
    summed = state(mode="netlink")
    summed.add(sample(counters=Counters(overflow=9), beyond={7: 9}), 0, 0)
    snapshot = summed.snapshot(True, 0)
    assert snapshot.other == 0
    assert snapshot.lost["undecided"] == 9


def test_rows_expire_by_the_monotonic_clock() -> None:
    summed = state(forget=60)
    summed.add(sample(Increase(finding(), 1, 0, 7)), now=1e9, monotonic=0)
    summed.add(sample(), now=2e9, monotonic=1)
    assert len(summed.snapshot(True, 2e9).rows) == 1
    summed.add(sample(), now=1, monotonic=61)
    assert summed.snapshot(True, 1).rows == ()


def ten_thousand() -> tuple[Increase, ...]:
    """Return distinct findings, each with another count."""
    return tuple(Increase(finding(number, f"p{number % 7}"), number + 1, 0, 7) for number in range(10_000))


def test_ten_thousand_findings_stop_at_the_limit_and_the_sum_is_exact() -> None:
    """`other` holds the excess; the sum is taken as Prometheus reads it."""
    summed = state(max_series=1_000, forget=1e6)
    total = 10_000 * 10_001 // 2
    for round_ in range(1, 4):
        summed.add(sample(*ten_thousand()), round_, round_)
        snapshot = summed.snapshot(True, round_)
        assert len(snapshot.rows) == 1_000
        text = exposition(SnapshotCollector(lambda snapshot=snapshot: snapshot), process=False)().decode()
        values = {
            sample.labels["port"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "udpwatch_reply_source_mismatch_total"
        }
        assert len(values) == 1_001
        assert sum(values.values()) == total * round_
        assert values["other"] == snapshot.other == sum(range(1_001, 10_001)) * round_


# ---- pods and containers that end ----


class Containers(Senders):
    """A SenderLookup of containers that end; counts how often it is asked."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.asked = 0

    def has_ended(self, sender: Sender, _now: float) -> bool:
        self.asked += 1
        return sender.container_id in self.ended

    def lookup(self, seen: Increase | Event) -> Sender:
        """The sender of a port below 1000 is a container, named after the process."""
        name = seen.finding.process
        return Sender(name, seen.pid, container_id=name if seen.finding.port < 1000 else "")


def ports(summed: State) -> list[int]:
    return sorted(row.port for row in summed.snapshot(True, 0).rows)


def with_containers(forget: float = 1e6, max_series: int = 10) -> tuple[State, Containers]:
    containers = Containers()
    summed = state(max_series, forget, senders=containers)
    increases = [Increase(finding(port, name), 1, 0, 7) for port, name in ((1, "a"), (2, "a"), (3, "b"), (1003, "a"))]
    summed.add(sample(*increases), 0, 0)
    return summed, containers


def test_series_ends_some_time_after_its_pod() -> None:
    summed, containers = with_containers()
    containers.ended = {"a"}
    summed.add(sample(), 0, 10)
    summed.add(sample(), 0, 10 + ENDED_SECONDS)
    assert ports(summed) == [1, 2, 3, 1003]
    summed.add(sample(), 0, 11 + ENDED_SECONDS)
    assert ports(summed) == [3, 1003]
    assert summed.snapshot(True, 0).other == 0


def test_restarted_container_keeps_its_series() -> None:
    summed, containers = with_containers()
    containers.ended = {"a"}
    summed.add(sample(), 0, 10)
    containers.ended = set()
    summed.add(sample(), 0, 10 + CHECK_SECONDS)
    summed.add(sample(), 0, 11 + ENDED_SECONDS)
    assert ports(summed) == [1, 2, 3, 1003]


def test_reply_after_the_end_keeps_the_series_longer() -> None:
    """A container's last replies may be read after it has ended; Prometheus must have time to scrape them."""
    summed, containers = with_containers()
    containers.ended = {"a"}
    summed.add(sample(), 0, 10)
    summed.add(sample(Increase(finding(1, "a"), 1, 0, 7)), 0, 60)
    summed.add(sample(), 0, 11 + ENDED_SECONDS)
    assert ports(summed) == [1, 3, 1003]
    summed.add(sample(), 0, 200)
    assert ports(summed) == [3, 1003]


def test_ended_series_make_room() -> None:
    summed, containers = with_containers(max_series=4)
    summed.add(sample(Increase(finding(9, "b"), 5, 0, 7)), 0, 1)
    assert summed.snapshot(True, 0).other == 5
    containers.ended = {"a"}
    summed.add(sample(), 0, 10)
    summed.add(sample(), 0, 100)
    summed.add(sample(Increase(finding(9, "b"), 5, 0, 7)), 0, 101)
    assert ports(summed) == [3, 9, 1003]
    assert summed.snapshot(True, 0).other == 5


def test_each_container_is_checked_once_and_seldom() -> None:
    summed, containers = with_containers()
    containers.asked = 0
    for tenth in range(100, 300):
        summed.add(sample(), 0, tenth / 10)
    assert containers.asked == 2 * 20 / CHECK_SECONDS


def healed(port: int = 53, cgroup: int = 1) -> Finding:
    return replace(finding(port, cgroup=cgroup), actual="10.0.0.2", verdict=Verdict.HEALED)


def test_healed_replies_are_rows_of_their_own() -> None:
    summed = state()
    summed.add(sample(Increase(finding(), 3, 0, 7), Increase(healed(), 4, 0, 7)), 1, 1)
    snapshot = summed.snapshot(True, 1)
    assert [(row.count, row.is_healed) for row in snapshot.rows] == [(4, True), (3, False)]
    assert [row.count for row in snapshot.wrong_rows] == [3]
    assert [row.count for row in snapshot.healed_rows] == [4]


def test_healed_replies_without_a_row_are_not_counted_as_wrong() -> None:
    """They are those that the kernel had no room for, those beyond the limit, and those of evicted rows."""
    summed = state(max_series=2, senders=OfContainers())
    summed.add(
        sample(*(Increase(healed(port), 1, 0, 7) for port in range(5)), counters=Counters(healed_overflow=10)), 1, 1
    )
    summed.add(sample(Increase(finding(9, cgroup=2), 1, 0, 7), counters=Counters(healed_overflow=12)), 2, 2)
    snapshot = summed.snapshot(True, 2)
    assert snapshot.other == 0
    assert snapshot.other_healed == {"ns1": 4, "": 12}
    assert [row.is_healed for row in snapshot.rows] == [True, False]


def test_next_process_goes_on_with_every_count() -> None:
    counters = Counters(checked=100, ring_full=3, undecided=2)
    first = state()
    read = sample(Increase(finding(), 5, 0, 7), counters=counters, generation="a", dropped=4, beyond={9: 6})
    first.add(read, 1, 1)
    first.lose("output", 2)
    stored = json.loads(json.dumps(first.to_store()))

    second = state()
    second.restore(stored)
    assert replace(second.snapshot(True, 2), ready=True) == replace(first.snapshot(True, 2), ready=True)
    more = Counters(checked=110, ring_full=3, undecided=3)
    second.add(sample(Increase(finding(), 1, 0, 8), counters=more, generation="a", dropped=1, beyond={9: 7}), 3, 3)
    shown = second.snapshot(True, 3)
    assert [row.count for row in shown.rows] == [6]
    assert (shown.checked, shown.other) == (110, 7)
    lost = {stage: count for stage, count in shown.lost.items() if count}
    assert lost == {"ring_full": 3, "undecided": 3, "queue": 5, "output": 2}


def test_counters_of_other_programs_begin_at_0_and_are_added() -> None:
    summed = state()
    summed.add(sample(counters=Counters(checked=100, healed_overflow=1), generation="a", beyond={9: 6}), 1, 1)
    summed.add(sample(counters=Counters(checked=120, healed_overflow=2), generation="b", beyond={9: 8}), 2, 2)
    shown = summed.snapshot(True, 2)
    assert (shown.checked, shown.other, sum(shown.other_healed.values())) == (220, 14, 3)


def test_rows_beyond_a_lower_limit_count_under_other() -> None:
    first = state(max_series=3)
    first.add(sample(*(Increase(finding(port), port, 0, 1) for port in (1, 2, 3))), 1, 1)
    second = state(max_series=2)
    second.restore(json.loads(json.dumps(first.to_store())))
    shown = second.snapshot(True, 1)
    assert sum(row.count for row in shown.rows) + shown.other == 6
    assert len(shown.rows) == 2


@pytest.mark.parametrize("name", ["totals", "seen", "lost", "other", "rows", "servers", "beyond"])
@pytest.mark.parametrize("wrong", [None, 1, "x", [1], {"x": "y"}, {"x": None}], ids=repr)
def test_invalid_store_changes_nothing(name: str, wrong: object) -> None:
    first = state()
    first.add(sample(Increase(finding(), 5, 0, 7)), 1, 1)
    stored = json.loads(json.dumps(first.to_store()))
    second = state()
    before = second.snapshot(True, 1)
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        second.restore(stored | {name: wrong})
    assert second.snapshot(True, 1) == before
