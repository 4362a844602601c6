"""The list of servers: counts, sockets, wrong replies, the limit and its shares, the end of servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from udpwatch.agent.daemon.servers import (
    ENDED_SECONDS,
    FREE_RENAMES,
    READ_SECONDS,
    RENAME_SECONDS,
    SENDER_SECONDS,
    Servers,
    socket_id,
)
from udpwatch.agent.model import (
    Cause,
    Counters,
    Finding,
    Risk,
    Sample,
    Sender,
    Server,
    ServerCount,
    ServerTotals,
    UdpSocket,
    Verdict,
)

FORGET_SECONDS = 600.0


class Senders:
    """Processes are named by their id; those of cgroup 2 and above are containers."""

    def __init__(self) -> None:
        self.ended: set[str] = set()

    def sender_of(self, pid: int, process: str, cgroup: int, _netns: int) -> Sender:
        inside = f"c{cgroup}" if cgroup > 1 else ""
        namespace = f"ns{cgroup}" if inside else ""
        return Sender(process or "unknown", pid, container_id=inside, container=inside, namespace=namespace)

    def has_ended(self, sender: Sender, _now: float) -> bool:
        return sender.container in self.ended


class Case:
    """Servers, and the time."""

    def __init__(self, most: int = 10, risks: dict[int, Risk] | None = None) -> None:
        self.senders, self.now = Senders(), 1000.0
        self.servers = Servers(most, self.senders, lambda sockets: risks or {}, FORGET_SECONDS)

    def add(
        self, *counts: ServerCount, sockets: Iterable[UdpSocket] | None = None, other: ServerCount | None = None
    ) -> None:
        self.now += READ_SECONDS
        sample = Sample(
            *((), Counters(), (), 0, 0, 0),
            servers=counts,
            other_servers=other,
            sockets=None if sockets is None else tuple(sockets),
        )
        self.servers.add(sample, 1e9 + self.now, self.now)

    def add_wrong(self, number: int = 3, port: int = 53, process: str = "dns", scope: int = 7, **others: Any) -> None:
        values = {"verdict": Verdict.NEW, "cause": Cause.KERNEL_CHOSEN, "cgroup": 1} | others
        finding = Finding("10.0.0.2", "10.0.0.1", port, 4, process=process, netns=scope, **values)
        self.servers.add_wrong(Sender(process, 5), finding, number)

    def one(self) -> Server:
        (server,) = self.servers.listed()
        return server

    def ports(self) -> set[int]:
        return {server.port for server in self.servers.listed()}


def count(port: int = 53, requests: int = 10, replies: int = 9, **others: Any) -> ServerCount:
    values = {"scope": 7, "netns": 4026, "address": "0.0.0.0", "cgroup": 1, "pid": 5, "process": "dns"}
    values |= {"unanswered": 1} | others
    return ServerCount(port=port, requests=requests, replies=replies, **values)


def opened(port: int = 53, **others: Any) -> UdpSocket:
    values = {"address": "0.0.0.0", "family": 4, "netns": 4026, "cookie": port, "pid": 5, "process": "dns", "drops": 0}
    return UdpSocket(port=port, **(values | others))


def test_count_socket_and_wrong_replies_are_one_server() -> None:
    case = Case(risks={53: Risk.POSSIBLE})
    case.add_wrong(3)
    case.add_wrong(99, port=54)
    case.add(count(), sockets=[opened(queue=700, queue_limit=1000, pktinfo=False)])
    server = case.one()
    assert (server.requests, server.replies, server.unanswered, server.wrong) == (10, 9, 1, 3)
    assert (server.queue, server.queue_limit, server.pktinfo, server.risk) == (700, 1000, False, Risk.WRONG)
    assert (server.sender.process, server.addresses, server.netns) == ("dns", ("0.0.0.0",), 4026)


def test_server_keeps_its_name_when_its_process_has_ended() -> None:
    """Its next process may have the same socket, or take a while. The kernel reports the name of the old thread."""
    case = Case()
    known = Sender("python3", 5, executable="/usr/bin/python3")
    case.senders.sender_of = lambda *_: known  # type: ignore[method-assign]
    case.add(count(process="dns-udp"))
    assert case.one().sender == known
    del case.senders.sender_of  # type: ignore[method-assign]
    for _ in range(int(2 * SENDER_SECONDS / READ_SECONDS)):
        case.add(count(process="dns-udp"))
    assert case.one().sender == known
    case.add(count(process="other", pid=6))
    assert case.one().sender.process == "other"


def test_counts_of_a_renamed_server_stay_with_those_of_its_old_labels() -> None:
    """A series in metrics is the sum of the servers of its labels: it may not fall, nor jump."""

    def sums() -> dict[str, int]:
        found = Counter[str]()
        for server in case.servers.listed():
            found[server.sender.process] += server.requests + server.inherited.requests
        return dict(found)

    case = Case()
    places = {"10.0.0.1": "python3", "10.0.0.2": "python3", "10.0.0.3": "dns-udp"}
    case.add(*(count(address=address, process=name, requests=100) for address, name in places.items()))
    assert sums() == {"python3": 200, "dns-udp": 100}
    places["10.0.0.2"] = "dns-udp"
    case.add(*(count(address=address, process=name, requests=110) for address, name in places.items()))
    assert sums() == {"python3": 210, "dns-udp": 120}
    places["10.0.0.1"] = "other"  # the last one takes its counts along
    case.add(*(count(address=address, process=name, requests=120) for address, name in places.items()))
    assert sums() == {"other": 220, "dns-udp": 140}


def test_wrong_replies_are_those_of_the_servers_namespace() -> None:
    case = Case()
    case.add_wrong(scope=8)
    case.add(count(scope=7, netns=4026), count(scope=8, netns=4027))
    assert {server.netns: server.wrong for server in case.servers.listed()} == {4026: 0, 4027: 3}


def test_wrong_replies_of_another_process_name_are_those_of_the_only_server_of_the_port() -> None:
    case = Case()
    case.add_wrong(process="worker")
    case.add(count())
    assert case.one().wrong == 3
    case.add_wrong(process="worker")
    case.add(count(), count(address="127.0.0.53", process="resolved"))
    assert sum(server.wrong for server in case.servers.listed()) == 3


def test_wrong_replies_of_a_server_that_is_not_yet_known_wait_for_it() -> None:
    case = Case()
    case.add_wrong()
    case.add()
    case.add(count())
    assert case.one().wrong == 3
    case.add_wrong(port=54)
    case.add(count())
    case.add(count())
    case.add(count(), count(54))
    assert sum(server.wrong for server in case.servers.listed()) == 3


def test_wrong_replies_that_are_forwarded_are_of_no_server_of_this_node() -> None:
    case = Case()
    case.add_wrong(cause=Cause.FORWARDED)
    case.add(count())
    assert case.one().wrong == 0


def test_wrong_replies_are_forgotten() -> None:
    case = Case(risks={53: Risk.POSSIBLE})
    case.add_wrong()
    case.add(count(), sockets=[opened()])
    case.now += FORGET_SECONDS
    case.add(count(requests=11), sockets=[opened()])
    assert (case.one().wrong, case.one().risk) == (0, Risk.POSSIBLE)


def test_socket_without_requests_is_a_server() -> None:
    case = Case()
    case.add(sockets=[opened(drops=None)])
    assert (case.one().requests, case.one().last, case.one().drops) == (0, 0.0, None)


def test_counts_go_on_when_the_kernel_begins_again() -> None:
    case = Case()
    case.add(count(requests=10))
    case.add(count(requests=4, replies=2, unanswered=0))
    assert (case.one().requests, case.one().replies, case.one().unanswered) == (14, 11, 1)


def test_drops_of_closed_sockets_stay_counted() -> None:
    case = Case()
    case.add(sockets=[opened(drops=5, cookie=1)])
    case.add(sockets=[opened(drops=7, cookie=1), opened(drops=2, cookie=2)])
    assert case.one().drops == 9
    case.add(sockets=[opened(drops=4, cookie=3)])
    assert case.one().drops == 13


def test_sockets_of_one_process_and_port_are_one_server() -> None:
    case = Case()
    case.add(count(address="10.0.0.1", requests=3), count(address="10.0.0.2", requests=4))
    assert (case.one().requests, case.one().addresses) == (7, ("10.0.0.1", "10.0.0.2"))


def test_other_process_on_another_address_of_the_port_is_another_server() -> None:
    case = Case()
    case.add(count(address="127.0.0.53", process="resolved"), count(address="10.0.0.2"))
    assert [server.sender.process for server in case.servers.listed()] == ["dns", "resolved"]


def test_process_becomes_known_later() -> None:
    case = Case()
    case.add(count(pid=0, process=""))
    assert case.one().sender.process == "unknown"
    case.add(count())
    assert (case.one().sender.process, case.one().requests) == ("dns", 10)


def test_process_that_changes_its_name_at_will_makes_few_series() -> None:
    case = Case()
    names = set()
    for number in range(int(RENAME_SECONDS / READ_SECONDS)):
        case.add(count(process=f"name{number}", requests=number))
        names.add(case.one().sender.process)
    assert len(names) == 1 + FREE_RENAMES
    case.now += RENAME_SECONDS
    case.add(count(process="later", requests=number))
    assert (case.one().sender.process, case.one().requests) == ("later", number)


def test_excess_counts_under_other_of_its_namespace_and_none_is_lost() -> None:
    case = Case(most=4)
    ports = range(1, 8)
    for more in (1, 2):
        case.add(*(count(port, requests=port * more, cgroup=2) for port in ports), other=count(0, requests=5 * more))
    listed = case.servers.listed()
    assert len(listed) == 4
    other = case.servers.other
    assert sum(each.requests for each in listed) + other["ns2"].requests == 2 * sum(ports)
    assert other[""].requests == 10


def test_tenant_with_the_most_servers_makes_room() -> None:
    case = Case(most=4)
    greedy = [count(port, cgroup=2) for port in range(1, 5)]
    case.add(*greedy)
    case.add(*greedy, count(100, cgroup=3), count(101, cgroup=3), count(102, cgroup=3))
    assert {100, 101} < case.ports()
    assert len(case.ports()) == 4
    assert case.servers.other["ns2"] == ServerTotals(20, 18, 2, 0)


def test_server_ends_a_while_after_its_socket() -> None:
    case = Case()
    case.add(count(), sockets=[opened()])
    case.add(count(), sockets=[])
    assert case.ports() == {53}
    case.now += ENDED_SECONDS
    case.add(count(), sockets=[])
    assert case.ports() == set()


def test_counts_of_a_server_do_not_fall_when_one_of_its_addresses_ends() -> None:
    case = Case()
    first, second = count(address="10.0.0.1", requests=1000), count(address="10.0.0.2")
    sockets = [opened(address="10.0.0.1", cookie=1, drops=4), opened(address="10.0.0.2", cookie=2)]
    case.add(first, second, sockets=sockets)
    before = case.one()
    for _ in range(2):
        case.add(second, sockets=sockets[1:])
        case.now += ENDED_SECONDS
    case.add(second, sockets=sockets[1:])
    after = case.one()
    assert (before.addresses, after.addresses) == (("10.0.0.1", "10.0.0.2"), ("10.0.0.2",))
    assert (after.requests, after.replies, after.drops) == (before.requests, before.replies, before.drops)
    assert (after.requests, after.drops) == (1010, 4)


def test_counts_of_a_server_do_not_fall_when_one_of_its_addresses_is_evicted() -> None:
    case = Case(most=3)
    same = [count(address=f"10.0.0.{last}", cgroup=2) for last in (1, 2, 3)]
    case.add(*same)
    case.add(*same, count(100, cgroup=3))
    assert {server.port: server.requests for server in case.servers.listed()} == {53: 30, 100: 10}
    assert sum(each.requests for each in case.servers.other.values()) == 0


@pytest.mark.parametrize("evicted", [False, True], ids=["ended", "evicted"])
def test_sum_of_servers_of_the_same_labels_does_not_fall(evicted: bool) -> None:
    """Their counts are one series, although their network namespaces differ."""
    case = Case(most=2 if evicted else 10)
    first = count(netns=4026, scope=7, cgroup=2, requests=1000)
    second = count(netns=4027, scope=8, cgroup=2)
    case.add(first, second)
    if evicted:
        case.add(first, second, count(100, cgroup=3))
        assert sorted(server.port for server in case.servers.listed()) == [53, 100]
    for _ in range(2):
        case.add(second)
        case.now += ENDED_SECONDS
    case.add(second)
    kept = [server for server in case.servers.listed() if server.port == 53]
    assert sum(server.requests + server.inherited.requests for server in kept) == 1010
    assert all(other.requests == 0 for other in case.servers.other.values())


def test_drops_do_not_fall_while_a_server_has_no_socket() -> None:
    case = Case()
    case.add(count(), sockets=[opened(drops=7)])
    case.add(count(), sockets=[])
    assert case.one().drops == 7


def test_server_whose_socket_cannot_be_seen_ends_with_the_kernels_count() -> None:
    case = Case()
    for _ in range(3):
        case.now += ENDED_SECONDS
        case.add(count(), sockets=[])
    assert case.ports() == {53}
    case.add(sockets=[])
    case.now += ENDED_SECONDS
    case.add(sockets=[])
    assert case.ports() == set()


def test_server_ends_with_its_container() -> None:
    case = Case()
    case.add(count(cgroup=2))
    case.senders.ended.add("c2")
    case.add(count(cgroup=2))
    case.now += ENDED_SECONDS
    case.add(count(cgroup=2))
    assert case.ports() == set()


@pytest.mark.parametrize(
    ("sockets", "expected"),
    [
        ([opened(pktinfo=True)], True),
        ([opened(pktinfo=True), opened(pktinfo=False)], False),
        ([opened(pktinfo=None), opened(pktinfo=True)], None),
        ([opened(address="10.0.0.1", pktinfo=False)], None),
        ([opened(address="::", family=6, pktinfo=False, pktinfo6=True)], False),
        ([opened(address="::", family=6, pktinfo=False, pktinfo6=True, only_ipv6=True)], True),
        ([opened(address="::", family=6, pktinfo=True, pktinfo6=True)], True),
    ],
)
def test_pktinfo_is_that_of_every_wildcard_socket(sockets: list[UdpSocket], expected: bool | None) -> None:
    case = Case()
    case.add(sockets=sockets)
    assert case.one().pktinfo is expected


def test_socket_without_a_cookie_is_known_by_its_file() -> None:
    assert socket_id(opened(cookie=0, inode=9)) == 9


def test_sockets_at_risk_are_counted() -> None:
    case = Case(risks={1: Risk.VIRTUAL, 2: Risk.POSSIBLE, 3: Risk.NONE, 4: Risk.UNKNOWN})
    case.add(sockets=[opened(cookie=number) for number in range(1, 5)])
    assert case.one().at_risk == 2
    case.add_wrong()
    case.add(count(), sockets=[opened(cookie=number) for number in range(1, 5)])
    assert case.one().at_risk == 2


def test_server_with_wrong_replies_is_at_risk_whatever_its_sockets_have_set() -> None:
    case = Case(risks={53: Risk.NONE})
    case.add(sockets=[opened(pktinfo=True)])
    assert case.one().at_risk == 0
    case.add_wrong()
    case.add(count(), sockets=[opened(pktinfo=True)])
    assert case.one().at_risk == 1


def test_sockets_at_risk_beyond_the_limit_count_under_other() -> None:
    case = Case(1, dict.fromkeys((1, 2, 3), Risk.VIRTUAL))
    case.add(sockets=[opened(port, cgroup=2) for port in (1, 2, 3)])
    assert len(case.ports()) == 1
    assert case.servers.other_at_risk() == {"ns2": 2}
