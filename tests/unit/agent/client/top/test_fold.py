"""The sums over a cluster's nodes: queries, and the views of their results. test_top.py runs them in Prometheus."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from udpwatch.agent.client.top.fold import Labels, Sample, folded_of, folded_query, unfolded_query, view_of_folded
from udpwatch.agent.client.top.healing import healing_text
from udpwatch.agent.client.top.layout import findings_table
from udpwatch.agent.client.top.rows import Order, View, rows, total_of
from udpwatch.agent.client.top.servers import ServerOrder, at_risk_of, server_rows
from udpwatch.agent.client.top.traffic import Rates
from udpwatch.agent.model import Risk

DNSD = {"process": "dnsd", "port": "53", "namespace": "shop"}


def results(**values: float) -> list[Sample]:
    return [({"what": name}, value) for name, value in values.items()]


def of(labels: Labels, **values: float) -> list[Sample]:
    return [({**labels, "what": name}, value) for name, value in values.items()]


def view(samples: list[Sample], **changes: Any) -> View:
    return view_of_folded(1000.0, folded_of(samples), **{"folded": True, "servers": True, **changes})


def test_sums_of_findings() -> None:
    seen = view(
        [
            *results(nodes=1000, checked=5e6, checked_rate=700, at_risk=12, found=4321, all_wrong_rate=9.5, other=3),
            ({"what": "lost", "stage": "queue"}, 2.0),
            ({"what": "faults", "fault": "suspend"}, 4.0),
            ({"what": "unwatched", "kind": "sockets"}, 6.0),
            *of(DNSD, wrong=900, wrong_rate=4.5, wrong_on=300),
            *of({"process": "ntpd", "port": "123"}, wrong=7, wrong_on=1),
            *of({"process": "other", "port": "other", "namespace": "other"}, wrong=3, wrong_rate=5, wrong_on=1),
        ]
    )
    lines = rows(seen, Order.RATE)
    assert [(line.key.process, line.location, line.key.port, line.nodes, line.rate, line.total) for line in lines] == [
        ("dnsd", "shop", 53, 300, 4.5, 900),
        ("ntpd", "", 123, 1, 0.0, 7),
    ]
    assert (seen.node_count, seen.found, at_risk_of(seen), seen.wrong, seen.checked) == (1000, 4321, 12, 9.5, 700)
    (whole,) = seen.snapshots
    assert (whole.other, whole.checked, whole.lost) == (3, 5_000_000, {"queue": 2})
    assert (whole.node_faults, whole.unwatched) == ({"suspend": 4}, {"sockets": 6})


def test_sums_of_healed_replies_have_rows_of_their_own() -> None:
    seen = view(
        [
            *results(all_healed=950, healed_servers=301, refused=7, idle=2, all_wrong_rate=4.5),
            *of(DNSD, wrong=900, wrong_rate=4.5, wrong_on=300, healed=40, healed_rate=2, healed_on=5),
        ]
    )
    lines = rows(seen, Order.RATE)
    assert [(line.key.is_healed, line.nodes, line.rate, line.total) for line in lines] == [
        (False, 300, 4.5, 900),
        (True, 5, 2.0, 40),
    ]
    assert (seen.wrong, total_of(seen, None)) == (4.5, 900)
    assert healing_text(seen)[0] == "heal: off on 2 nodes, healed 950 replies of 301 servers, refused 7"
    assert [column.headings[0] for column in findings_table(seen).columns][-4:] == [
        "replies",
        "rate/s",
        "total",
        "last seen",
    ]
    assert healing_text(view([*results(all_healed=0)]))[0] == ""


def test_sums_of_servers() -> None:
    counts = {"requests": 9000, "replies": 8000, "unanswered": 500, "drops": 20, "queue": 4096, "on": 300}
    rates = {"requests_rate": 40, "replies_rate": 30, "drops_rate": 2, "unanswered_rate": 5, "asked_rate": 50}
    seen = view(
        [
            *of(DNSD, **counts, **rates, risk=3),
            *of({**DNSD, "process": "right"}, requests=1, on=1),
            *of({**DNSD, "process": "bad"}, requests=1, on=2, wrong=4, wrong_rate=1, wrong_on=2),
            *of({"process": "other", "port": "other"}, requests=4),
        ]
    )
    bad, dnsd, right = server_rows(seen, ServerOrder.RISK)
    assert [each.server.risk for each in (bad, dnsd, right)] == [Risk.WRONG, Risk.POSSIBLE, Risk.NONE]
    assert (dnsd.rates, dnsd.nodes, dnsd.location) == (Rates(40, 30, 0, 2, 0.1), 300, "shop")
    assert (bad.rates, bad.nodes) == (Rates(0, 0, 1, 0, None), 2)
    server = dnsd.server
    assert (server.requests, server.unanswered, server.drops, server.queue, server.at_risk) == (9000, 500, 20, 4096, 3)
    assert (right.server.drops, right.server.queue) == (None, None)


def test_labels_that_the_scrape_renamed_are_the_same_row() -> None:
    renamed = {"process": "dnsd", "port": "53", "namespace": "monitoring", "exported_namespace": "shop"}
    found = folded_of([*of(DNSD, wrong=5, wrong_rate=1, wrong_on=2), *of(renamed, wrong=6, wrong_rate=2, wrong_on=3)])
    (line,) = rows(view_of_folded(1000.0, found, True, False), Order.RATE)
    assert (line.location, line.nodes, line.rate, line.total) == ("shop", 5, 3.0, 11)
    assert found.groups[line.key] == [DNSD, renamed]
    query = unfolded_query(found.groups[line.key], servers=False)
    assert '{process="dnsd",exported_process="",port="53",exported_port="",namespace="shop",exported_name' in query
    assert 'namespace="monitoring",exported_namespace="shop"}' in query


def test_unfolded_row_has_the_rows_of_each_node() -> None:
    first, second = ({**DNSD, "node": node, "expected": "10.0.0.1", "pod": f"dns-{node}"} for node in "ab")
    seen = view([*of(first, wrong=5, requests=7), *of(second, wrong=6, wrong_rate=2, requests=8, requests_rate=1)],
                folded=False)  # fmt: skip
    lines = rows(seen, Order.RATE)
    assert [(line.key.node, line.location, line.key.expected, line.total) for line in lines] == [
        ("b", "shop/dns-b", "10.0.0.1", 6),
        ("a", "shop/dns-a", "10.0.0.1", 5),
    ]
    assert [
        (line.key.node, line.server.requests, line.server.risk) for line in server_rows(seen, ServerOrder.RISK)
    ] == [
        ("b", 8, "wrong"),
        ("a", 7, "wrong"),
    ]


@pytest.mark.parametrize(
    ("name", "quoted"),
    [('a"b', 'process="a\\"b"'), ("a\\", 'process="a\\\\"'), ("a\nb", 'process="a\\nb"'), ("}", 'process="}"')],
)
def test_names_of_tenants_are_quoted_in_queries(name: str, quoted: str) -> None:
    assert quoted in unfolded_query([{**DNSD, "process": name}], servers=True)


def test_servers_are_queried_only_if_wanted() -> None:
    assert "udpwatch_server_" not in folded_query(servers=False)
    assert "udpwatch_server_receive_drops_total" in folded_query(servers=True)
    assert "udpwatch_server_" not in unfolded_query([DNSD], servers=False)


def test_results_of_another_query_are_ignored() -> None:
    """Whatever answers there."""
    odd = [({}, 5.0), ({"what": "x", "port": "9" * 5000}, 3.0), ({"what": "wrong", "port": "²"}, 4.0)]
    (line,) = rows(view(odd), Order.RATE)
    assert (line.key.port, line.total) == (0, 4)
    assert rows(replace(view([])), Order.RATE) == []
