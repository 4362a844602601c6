"""The judgement on sockets: which are servers, and which will reply wrongly to whom."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import pytest

from udpwatch.agent.model import Risk, Row, Sender, Server, UdpSocket
from udpwatch.agent.servers.audit import (
    MAX_KINDS,
    MAX_REPLIES,
    MAX_WRONG,
    SocketRisk,
    has_pktinfo,
    is_server,
    judge,
    servers_of,
    servers_of_agent,
)
from udpwatch.agent.servers.networks import Address, AddressKind, Networks, PeerKind, Peers, is_private

ETH0, DOCKER0, TUN0, RED = 2, 3, 4, 9
INTERFACES = {1: "lo", ETH0: "eth0", DOCKER0: "docker0", TUN0: "tun0", RED: "red"}


def address(
    text: str, index: int = ETH0, kind: AddressKind = AddressKind.ADDRESS, host_source: str = "", vrf: int = 0
) -> Address:
    family = 6 if ":" in text else 4
    return Address(text, family, INTERFACES[index], index, kind, vrf, is_private(text), host_source or text)


def peers(network: str, *sources: str, index: int = ETH0, kind: PeerKind = PeerKind.ATTACHED, device: int = 0) -> Peers:
    family = 6 if ":" in sources[0] else 4
    return Peers(family, network, 0, kind, INTERFACES[index], index, device, network.startswith("fe80"), sources)


def networks(addresses: Iterable[Address], groups: Iterable[Peers], *vrfs: int, complete: bool = True) -> Networks:
    groups = tuple(groups)
    devices = frozenset({0, *(each.device for each in groups)})
    return Networks(tuple(addresses), groups, frozenset(vrfs), devices, (32_768, 60_999), complete)


LO = address("127.0.0.1", 1, AddressKind.HOST), address("::1", 1, AddressKind.HOST)
ONE = networks([*LO, address("192.168.1.5")], [peers("192.168.1.0/24", "192.168.1.5"), peers("default", "192.168.1.5")])
DOCKER = networks(
    [*LO, address("192.168.1.5"), address("172.17.0.1", DOCKER0, AddressKind.BRIDGE)],
    [
        peers("default", "192.168.1.5", kind=PeerKind.DEFAULT),
        peers("192.168.1.0/24", "192.168.1.5"),
        peers("172.17.0.0/16", "172.17.0.1", index=DOCKER0, kind=PeerKind.CONTAINERS),
    ],
)
VIP = networks(
    [address("192.168.1.5"), address("192.168.1.100", kind=AddressKind.VIRTUAL)],
    [peers("192.168.1.0/24", "192.168.1.5")],
)
TUNNEL = networks(
    [address("192.168.1.5"), address("10.8.0.1", TUN0)],
    [peers("192.168.1.0/24", "192.168.1.5"), peers("10.8.0.0/24", "10.8.0.1", index=TUN0)],
)
SIX = networks(
    [address("192.168.1.5"), address("fd00::5"), address("fd00::6")],
    [peers("192.168.1.0/24", "192.168.1.5"), peers("fd00::/64", "fd00::6")],
)
WILDCARD = UdpSocket("0.0.0.0", 53, 4, pktinfo=False, pktinfo6=False)
DUAL = replace(WILDCARD, address="::", family=6)


def the(socket: UdpSocket, where: Networks | None, *others: UdpSocket) -> SocketRisk:
    """Judge one socket."""
    return judge([socket, *others], where)[0]


def wrong_of(judged: SocketRisk) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(each.address, each.peers.network if each.peers else "host", each.sources) for each in judged.wrong}


def test_one_address_is_not_at_risk() -> None:
    judged = the(WILDCARD, ONE)
    assert judged.risk is Risk.NONE
    assert judged.addresses == ("127.0.0.1", "192.168.1.5")


def test_container_that_asks_the_nodes_address_gets_a_wrong_reply() -> None:
    judged = the(WILDCARD, DOCKER)
    assert judged.risk is Risk.VIRTUAL
    assert wrong_of(judged) == {("192.168.1.5", "172.17.0.0/16", ("172.17.0.1",))}


def test_nobody_outside_asks_the_bridge() -> None:
    assert all(each.address != "172.17.0.1" for each in the(WILDCARD, DOCKER).wrong)


def test_vip_is_at_risk_for_the_whole_network() -> None:
    judged = the(WILDCARD, VIP)
    assert judged.risk is Risk.VIRTUAL
    assert wrong_of(judged) == {("192.168.1.100", "192.168.1.0/24", ("192.168.1.5",))}


def test_two_networks_are_a_possible_risk() -> None:
    judged = the(WILDCARD, TUNNEL)
    assert judged.risk is Risk.POSSIBLE
    assert wrong_of(judged) == {
        ("10.8.0.1", "192.168.1.0/24", ("192.168.1.5",)),
        ("192.168.1.5", "10.8.0.0/24", ("10.8.0.1",)),
    }


def test_public_peers_do_not_ask_a_private_address() -> None:
    where = networks(
        [address("203.0.113.5"), address("10.0.0.5", TUN0)],
        [
            peers("default", "203.0.113.5", kind=PeerKind.DEFAULT),
            peers("10.0.0.0/24", "10.0.0.5", index=TUN0),
        ],
    )
    assert the(WILDCARD, where).risk is Risk.NONE


def test_public_vip_behind_private_addresses_is_at_risk() -> None:
    where = networks(
        [address("10.0.0.5"), address("203.0.113.5", 1, AddressKind.VIRTUAL)],
        [peers("default", "10.0.0.5", kind=PeerKind.DEFAULT)],
    )
    assert the(WILDCARD, where).risk is Risk.VIRTUAL


def test_pktinfo_is_not_at_risk() -> None:
    judged = the(replace(WILDCARD, pktinfo=True), DOCKER)
    assert judged.risk is Risk.NONE
    assert "PKTINFO is set" in judged.reason


def test_unknown_pktinfo_is_unknown_only_where_it_matters() -> None:
    unknown = replace(WILDCARD, pktinfo=None)
    assert the(unknown, DOCKER).risk is Risk.UNKNOWN
    assert the(unknown, ONE).risk is Risk.NONE


def test_unknown_networks_are_unknown_without_pktinfo() -> None:
    assert the(WILDCARD, None).risk is Risk.UNKNOWN
    assert the(replace(WILDCARD, pktinfo=True), None).risk is Risk.NONE
    assert the(replace(WILDCARD, address="192.168.1.5"), None).risk is Risk.NONE


def test_incomplete_networks_are_no_proof() -> None:
    assert the(WILDCARD, replace(ONE, complete=False)).risk is Risk.UNKNOWN
    assert the(replace(WILDCARD, address="192.168.1.5"), replace(ONE, complete=False)).risk is Risk.NONE
    assert the(WILDCARD, replace(DOCKER, complete=False)).risk is Risk.VIRTUAL


@pytest.mark.parametrize("bound", ["192.168.1.5", "127.0.0.1", "224.0.0.251", "::1", "::ffff:192.168.1.5"])
def test_socket_bound_to_an_address_is_not_at_risk(bound: str) -> None:
    family = 6 if ":" in bound else 4
    assert the(replace(WILDCARD, address=bound, family=family), DOCKER).risk is Risk.NONE


def test_families_are_judged_separately() -> None:
    """net-snmp: right over IPv4, wrong over IPv6."""
    assert the(replace(WILDCARD, pktinfo=False), SIX).risk is Risk.NONE
    assert wrong_of(the(DUAL, SIX)) == {("fd00::5", "fd00::/64", ("fd00::6",))}
    assert the(replace(DUAL, pktinfo=True), SIX).risk is Risk.POSSIBLE
    assert the(replace(DUAL, pktinfo6=True), SIX).risk is Risk.NONE


def test_ipv6_socket_serves_ipv4_too() -> None:
    assert the(DUAL, DOCKER).risk is Risk.VIRTUAL
    assert the(replace(DUAL, only_ipv6=True), DOCKER).risk is Risk.NONE
    assert the(replace(DUAL, address="::ffff:0.0.0.0"), DOCKER).risk is Risk.VIRTUAL


def test_ipv4_socket_takes_the_requests_from_an_ipv6_socket() -> None:
    assert the(DUAL, DOCKER, replace(WILDCARD, pktinfo=True)).risk is Risk.NONE
    assert the(DUAL, DOCKER, replace(WILDCARD, pktinfo=True, port=54)).risk is Risk.VIRTUAL


def test_recvpktinfo_of_ipv6_counts_for_ipv4() -> None:
    assert has_pktinfo(replace(DUAL, pktinfo6=True), 4)
    assert has_pktinfo(replace(DUAL, pktinfo=True), 4)
    assert has_pktinfo(replace(DUAL, pktinfo=True), 6) is False
    assert has_pktinfo(replace(DUAL, pktinfo=None, pktinfo6=None), 4) is None
    assert has_pktinfo(replace(DUAL, pktinfo=False, pktinfo6=None), 4) is None
    assert has_pktinfo(replace(DUAL, pktinfo=None, pktinfo6=False), 4) is None


def test_socket_of_an_address_takes_its_requests() -> None:
    own = replace(WILDCARD, address="192.168.1.5")
    judged = the(WILDCARD, DOCKER, own)
    assert judged.risk is Risk.NONE
    assert judged.addresses == ("127.0.0.1", "172.17.0.1")


def test_transparent_proxy_is_not_judged_by_its_options() -> None:
    judged = the(replace(WILDCARD, transparent=True), DOCKER)
    assert judged.risk is Risk.NONE
    assert "transparent" in judged.reason


def test_socket_of_the_kernel_is_not_at_risk() -> None:
    assert the(replace(WILDCARD, kernel=True, port=4789, process="flanneld"), DOCKER).risk is Risk.NONE


@pytest.mark.parametrize("process", ["dhclient", "rsyslogd"])
def test_program_that_never_replies_is_not_at_risk(process: str) -> None:
    assert the(replace(WILDCARD, process=process), DOCKER).risk is Risk.NONE


def test_device_decides_who_can_ask() -> None:
    where = networks(DOCKER.addresses, [*DOCKER.peers, peers("192.168.1.0/24", "192.168.1.5", device=ETH0)])
    assert the(replace(WILDCARD, device=ETH0), where).risk is Risk.NONE
    assert the(replace(WILDCARD, device=DOCKER0), where).risk is Risk.UNKNOWN


def test_address_in_a_vrf_is_not_asked_at_a_socket_outside() -> None:
    where = networks(
        [address("192.168.1.5"), address("10.8.0.1", TUN0, vrf=RED), address("10.8.0.2", RED, vrf=RED)],
        [
            peers("192.168.1.0/24", "192.168.1.5"),
            peers("10.8.0.0/24", "10.8.0.1", index=TUN0, device=RED),
        ],
        RED,
    )
    assert the(WILDCARD, where).risk is Risk.NONE
    assert wrong_of(the(replace(WILDCARD, device=RED), where)) == {("10.8.0.2", "10.8.0.0/24", ("10.8.0.1",))}


def test_client_on_this_host_is_a_peer() -> None:
    where = networks([address("10.0.0.6", kind=AddressKind.VIRTUAL, host_source="10.0.0.5")], [])
    judged = the(WILDCARD, where)
    assert judged.risk is Risk.VIRTUAL
    assert wrong_of(judged) == {("10.0.0.6", "host", ("10.0.0.5",))}


def test_link_local_address_is_only_asked_on_its_link() -> None:
    where = networks(
        [address("fd00::5"), address("fe80::5", kind=AddressKind.LINK), address("fe80::6", kind=AddressKind.LINK)],
        [peers("default", "fd00::5", kind=PeerKind.DEFAULT), peers("fe80::/64", "fe80::5")],
    )
    assert wrong_of(the(DUAL, where)) == {("fe80::6", "fe80::/64", ("fe80::5",))}
    assert the(DUAL, where).risk is Risk.POSSIBLE


def test_peers_that_get_different_sources_are_wrong_sometimes() -> None:
    where = networks(
        [address("fd00::5"), address("fd01::5")], [peers("default", "fd00::5", "fd01::5", kind=PeerKind.DEFAULT)]
    )
    judged = the(DUAL, where)
    assert {(each.address, each.sources, each.sometimes) for each in judged.wrong} == {
        ("fd00::5", ("fd01::5",), True),
        ("fd01::5", ("fd00::5",), True),
    }


def test_clients_are_not_servers() -> None:
    assert not is_server(replace(WILDCARD, port=40_000))
    assert is_server(replace(WILDCARD, port=40_000), busy=[40_000])
    assert is_server(replace(WILDCARD, port=40_000), (50_000, 60_000))
    assert not is_server(replace(WILDCARD, peer="192.0.2.1", peer_port=53))
    assert judge([replace(WILDCARD, port=40_000)], DOCKER) == []


def test_port_that_bind_named_is_a_servers() -> None:
    assert is_server(replace(WILDCARD, port=40_000, named=True))
    assert not is_server(replace(WILDCARD, named=False))
    assert is_server(replace(WILDCARD, named=False), busy=[53])


def test_random_ports_of_a_server_are_a_clients() -> None:
    upstream = replace(WILDCARD, port=40_000, named=True, pid=7)
    assert [each.socket.port for each in judge([replace(WILDCARD, pid=7), upstream], DOCKER)] == [53]
    assert [each.socket.port for each in judge([replace(WILDCARD, pid=8), upstream], DOCKER)] == [53, 40_000]


# ---- servers ----

SENDER = Sender("dns", 7, container_id="abc", container="web")


def row(**changes: object) -> Row:
    fields: dict[str, object] = {
        "sender": SENDER,
        "port": 53,
        "expected": "192.168.1.5",
        "actual": "172.17.0.1",
        "verdict": "new",
        "cause": "kernel-chosen",
        "family": 4,
        "count": 23,
        "first": 0.0,
        "last": 0.0,
        **changes,
    }
    return Row(**fields)  # type: ignore[arg-type]


def test_reuseport_group_is_one_server() -> None:
    group = judge([replace(WILDCARD, inode=number, reuseport=True) for number in range(4)], DOCKER)
    (server,) = servers_of((each, SENDER) for each in group)
    assert (server.sockets, server.at_risk, len(server.wrong)) == (4, 4, 1)


def test_servers_of_two_containers_stay_apart() -> None:
    judged = the(WILDCARD, DOCKER)
    assert len(servers_of([(judged, SENDER), (judged, replace(SENDER, container_id="def"))])) == 2


def test_wrong_replies_that_were_seen_count_more_than_pktinfo() -> None:
    judged = the(replace(WILDCARD, pktinfo=True), DOCKER)
    (server,) = servers_of([(judged, SENDER)], [row()])
    assert server.risk is Risk.WRONG
    assert server.at_risk == 1
    assert server.seen == (row(),)


@pytest.mark.parametrize(
    "other",
    [
        row(port=54),
        row(cause="forwarded"),
        row(sender=replace(SENDER, pid=8, process="other")),
        row(sender=replace(SENDER, pid=8, container_id="def")),
    ],
)
def test_findings_of_others_do_not_count(other: Row) -> None:
    (server,) = servers_of([(the(WILDCARD, ONE), SENDER)], [other])
    assert server.risk is Risk.NONE


COUNTED = Server(
    *(SENDER, 53, 7, ("0.0.0.0",)),
    requests=9,
    replies=0,
    unanswered=9,
    wrong=0,
    drops=0,
    queue=0,
    queue_limit=0,
    pktinfo=False,
    risk=Risk.VIRTUAL,
    first=0.0,
    last=0.0,
    at_risk=2,
)


def test_server_has_the_counts_of_the_agent() -> None:
    judged = the(replace(WILDCARD, netns=7), DOCKER)
    (server,) = servers_of([(judged, SENDER)], counted=[COUNTED])
    assert (server.requests, server.replies) == (9, 0)
    (server,) = servers_of([(judged, SENDER)], counted=[replace(COUNTED, netns=8)])
    assert server.requests is None


def test_without_sockets_the_agents_judgement_remains() -> None:
    quiet = replace(COUNTED, port=54, risk=Risk.NONE, at_risk=0)
    found = servers_of_agent([quiet, COUNTED], [row(port=54, sender=replace(SENDER, pid=0))])
    assert [(each.port, each.risk, each.at_risk) for each in found] == [(54, Risk.WRONG, 0), (53, Risk.VIRTUAL, 2)]
    assert found[1].addresses == ()


def test_servers_are_sorted_by_risk() -> None:
    ports = (1, 2, 3, 4, 5)
    where = (ONE, TUNNEL, VIP, None, ONE)
    owned = [
        (the(replace(WILDCARD, port=port), each), replace(SENDER, pid=port, process=f"p{port}"))
        for port, each in zip(ports, where, strict=True)
    ]
    found = servers_of(owned, [row(port=5, sender=replace(SENDER, pid=5, process="p5"))])
    assert [(each.port, str(each.risk)) for each in found] == [
        (5, "wrong"),
        (3, "virtual"),
        (2, "possible"),
        (4, "unknown"),
        (1, "none"),
    ]


# ---- a hostile tenant ----

CROWDED = networks(
    [address(f"10.0.{number // 250}.{number % 250 + 1}", kind=AddressKind.VIRTUAL) for number in range(512)],
    [peers(f"10.1.{number}.0/24", "10.9.9.9") for number in range(64)],
)


def test_sockets_that_are_alike_are_judged_once() -> None:
    """8,000 sockets of one port, or of a port each: comparing each with each, or with each address, took minutes."""
    for ports in ([5] * 8_000, range(1, 8_001)):
        group = [replace(WILDCARD, port=port, inode=number, named=True) for number, port in enumerate(ports, start=1)]
        begin = time.process_time()
        judged = judge(group, CROWDED)
        servers = servers_of((each, SENDER) for each in judged)
        assert time.process_time() - begin < 5
        assert {each.risk for each in judged} == {Risk.VIRTUAL}
        assert len({id(each.wrong) for each in judged}) == 1, "they share their replies"
        assert len(judged[0].wrong) == MAX_REPLIES
        assert sum(each.sockets for each in servers) == 8_000
        assert {(len(each.wrong), each.more) for each in servers} == {(MAX_WRONG, MAX_REPLIES - MAX_WRONG)}


def test_sockets_of_too_many_kinds_are_unknown() -> None:
    group = [
        each
        for port in range(1, 400)
        for each in (
            replace(WILDCARD, port=port, named=True),
            replace(WILDCARD, port=port, named=True, address=CROWDED.addresses[port].address),
        )
    ]
    risks = [each.risk for each in judge(group, CROWDED) if each.socket.address == "0.0.0.0"]
    assert risks == [Risk.VIRTUAL] * MAX_KINDS + [Risk.UNKNOWN] * (399 - MAX_KINDS)


def test_replies_beyond_the_limit_are_not_taken_for_none() -> None:
    """The addresses of all replies that were looked at are served by other sockets."""
    listed = {each.address for each in the(WILDCARD, CROWDED).wrong}
    others = [replace(WILDCARD, address=each) for each in listed]
    assert the(WILDCARD, CROWDED, *others).risk is Risk.UNKNOWN
    assert the(replace(WILDCARD, pktinfo=True), CROWDED, *others).risk is Risk.NONE
