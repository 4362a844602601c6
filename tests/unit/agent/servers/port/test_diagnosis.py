"""What `udpwatch explain PORT` concludes from facts. tests/integration/test_explain_port.py and
test_explain_losses.py provoke each statement."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
from repository import DOCS

from udpwatch.agent.client.port_text import port_object, port_text
from udpwatch.agent.kernel.packet_tap import Conversation, Traffic
from udpwatch.agent.model import ConntrackHealth, Risk, Sender, Server, UdpSocket
from udpwatch.agent.servers.counters import NetworkCounters
from udpwatch.agent.servers.port.case import Case
from udpwatch.agent.servers.port.diagnosis import diagnose
from udpwatch.agent.servers.port.facts import Look, NamespaceFacts, SocketFacts
from udpwatch.agent.servers.port.firewall import Effect, Firewall, Rule
from udpwatch.agent.servers.port.matching import Mismatch, Sockets
from udpwatch.agent.servers.port.statements import Kind, Statement

PORT = 5300
HERE = "10.0.0.1"
SOCKET = UdpSocket(
    "0.0.0.0", PORT, 4, netns=1, inode=10, pid=42, process="server", queue=0, queue_limit=212_992, drops=0
)
FACTS = NamespaceFacts(
    "this network namespace",
    1,
    True,
    (SocketFacts(SOCKET),),
    local=frozenset({HERE}),
    addresses=(HERE,),
    counters=NetworkCounters(received=5, sent=5),
    traffic=Traffic(()),
    buffer_default=212_992,
    buffer_max=212_992,
)


def asked(requests: int = 5, replies: int = 5, address: str = HERE, device: str = "eth0") -> Conversation:
    return Conversation("10.0.0.2", 4444, address, device, False, requests, replies)


def told(facts: NamespaceFacts, *others: NamespaceFacts, address: str = "") -> list[Statement]:
    return diagnose(Look(PORT, 3.0, (facts, *others), address))


def wrong(statements: list[Statement]) -> list[Kind]:
    return [each.kind for each in statements if each.wrong]


def test_right_server() -> None:
    facts = replace(FACTS, traffic=Traffic((asked(), replace_peer(asked(2, 0)))))
    statements = told(replace(facts, counters=NetworkCounters(received=7)))
    assert [each.kind for each in statements] == [Kind.LISTENS, Kind.REPLIES]
    assert wrong(statements) == []
    assert "7 requests of 2 client sockets, 5 replies in 3 s" in statements[1].text
    assert "2 requests of clients that got no reply" in statements[1].text


def replace_peer(each: Conversation) -> Conversation:
    return replace(each, peer_port=5555)


@pytest.mark.parametrize(
    ("sock", "address", "expected"),
    [
        (SOCKET, HERE, None),
        (SOCKET, "fd00::1", Mismatch.FAMILY),
        (replace(SOCKET, address="10.0.0.9"), HERE, Mismatch.ADDRESS),
        (replace(SOCKET, address="::", family=6), HERE, None),
        (replace(SOCKET, address="::", family=6), "fd00::1", None),
        (replace(SOCKET, address="::", family=6, only_ipv6=True), HERE, Mismatch.ONLY_IPV6),
        (replace(SOCKET, address="::", family=6, only_ipv6=True), "fd00::1", None),
        (replace(SOCKET, address="fd00::1", family=6), HERE, Mismatch.FAMILY),
        (replace(SOCKET, address="fd00::1", family=6), "fd00::2", Mismatch.ADDRESS),
        (replace(SOCKET, address=f"::ffff:{HERE}", family=6), HERE, None),
        (replace(SOCKET, address=f"::ffff:{HERE}", family=6), "fd00::1", Mismatch.FAMILY),
        (replace(SOCKET, peer="10.0.0.2", peer_port=4444), HERE, None),
        (replace(SOCKET, peer="10.0.0.2", peer_port=4445), HERE, Mismatch.PEER),
        (replace(SOCKET, peer="::ffff:10.0.0.2", peer_port=4444), HERE, None),
    ],
)
def test_socket_that_a_request_reaches(sock: UdpSocket, address: str, expected: Mismatch | None) -> None:
    assert Sockets([SocketFacts(sock)]).mismatch(asked(address=address)) is expected


def test_nearest_socket_tells_the_reason() -> None:
    sockets = (
        SocketFacts(replace(SOCKET, address="fd00::1", family=6)),
        SocketFacts(SOCKET, device="eth1"),
        SocketFacts(replace(SOCKET, address="10.0.0.9")),
    )
    facts = replace(FACTS, sockets=sockets, traffic=Traffic((asked(),)))
    assert Case(Look(PORT, 3.0, (facts,)), facts).refused.keys() == {Mismatch.DEVICE}
    assert wrong(told(facts)) == [Kind.OTHER_DEVICE]


@pytest.mark.parametrize(
    ("bound", "shared", "expected"),
    [
        ("", False, Mismatch.DEVICE),
        ("", True, None),
        ("red", False, None),
        ("eth0", False, None),
        ("eth1", True, Mismatch.DEVICE),
    ],
)
def test_socket_that_a_request_in_a_vrf_reaches(bound: str, shared: bool, expected: Mismatch | None) -> None:
    assert Sockets([SocketFacts(SOCKET, device=bound)], {"eth0": "red"}, shared).mismatch(asked()) is expected


def test_thousands_of_sockets_and_of_requests_are_compared_in_no_time() -> None:
    """Each request was compared with each socket: 4,096 of 5,000 took half a minute."""
    connected = [
        SocketFacts(replace(SOCKET, inode=number, peer="10.9.0.1", peer_port=number)) for number in range(1, 5_001)
    ]
    requests = [replace(asked(), peer_port=number) for number in range(4_096)]
    facts = replace(FACTS, sockets=tuple(connected), traffic=Traffic(tuple(requests)))
    begin = time.process_time()
    case = Case(Look(PORT, 3.0, (facts,)), facts)
    assert {reason: len(found) for reason, found in case.refused.items()} == {Mismatch.PEER: 4_096}
    assert case.matched == []
    assert time.process_time() - begin < 2


def test_multicast_requests_match_every_socket() -> None:
    group = Conversation("10.0.0.2", 5353, "224.0.0.251", "eth0", True, 3, 0)
    facts = replace(FACTS, traffic=Traffic((group,)))
    assert Kind.NOT_LOCAL not in [each.kind for each in told(facts)]


def test_lost_requests_are_counted_from_below() -> None:
    facts = replace(FACTS, traffic=Traffic((asked(10, 0),)))

    def lost(counters: NetworkCounters, queue: int = 0) -> int:
        changed = replace(facts, counters=counters, sockets=(SocketFacts(replace(SOCKET, queue=queue)),))
        return Case(Look(PORT, 3.0, (changed,)), changed).lost

    assert lost(NetworkCounters()) == 10
    assert lost(NetworkCounters(received=4, receive_full=1, no_memory=1)) == 4
    assert lost(NetworkCounters(received=100)) == 0
    dropped = replace(facts, counters=NetworkCounters(), sockets=(SocketFacts(SOCKET, drops=7),))
    assert Case(Look(PORT, 3.0, (dropped,)), dropped).lost == 3, "a filter of the socket drops them"
    assert lost(NetworkCounters(), queue=2 * 768) == 4  # a datagram takes 256 bytes at least: up to six wait
    statements = told(replace(facts, counters=NetworkCounters(received=4)))
    assert wrong(statements) == [Kind.LOST]
    assert "10 requests arrived at a device in 3 s, and at least 6 of them reached no socket" in statements[1].text


def test_kernels_own_socket_is_not_said_to_lose() -> None:
    """The kernel takes WireGuard's datagrams without counting them as read."""
    facts = replace(FACTS, traffic=Traffic((asked(10, 0),)), counters=NetworkCounters())
    facts = replace(facts, sockets=(SocketFacts(replace(SOCKET, pid=0, process="", uid=0)),))
    statements = told(facts)
    assert wrong(statements) == []
    assert statements[0].text == (
        "The kernel itself (a tunnel such as VXLAN), or a process of uid 0 that this user may not examine, listens on "
        "0.0.0.0:5300."
    )
    assert "10 requests arrived in 3 s and no reply left." in statements[1].text


def test_counters_of_other_ports_are_not_blamed() -> None:
    counters = NetworkCounters(received=5, reverse_path=9, bad_checksum=9, no_memory=9, send_full=9)
    assert wrong(told(replace(FACTS, traffic=Traffic((asked(),)), counters=counters))) == []
    assert wrong(told(replace(FACTS, traffic=Traffic((asked(50, 0),)), counters=counters))) == [
        Kind.REVERSE_PATH,
        Kind.CHECKSUM,
        Kind.NO_MEMORY,
        Kind.SEND_QUEUE,
    ]


def test_rule_is_blamed_for_what_it_counted_in_the_look() -> None:
    rule = Rule("inet t input", "udp dport 5300 counter drop", Effect.DROP, False, True, 100, key="1")
    before = Firewall((replace(rule, packets=95),))
    facts = replace(FACTS, traffic=Traffic((asked(),)), firewall=Firewall((rule,)), firewall_before=before)
    (one,) = (each for each in told(facts) if each.kind is Kind.FIREWALL)
    assert one.wrong
    assert "5 packets in 3 s, 100 in all" in one.text
    (one,) = (each for each in told(replace(facts, firewall_before=facts.firewall)) if each.kind is Kind.FIREWALL)
    assert not one.wrong


def test_conntrack_counts_a_failed_insertion_once() -> None:
    before = ConntrackHealth(10, 1000, 5, 5, 0)
    facts = replace(FACTS, traffic=Traffic((asked(),)), conntrack_before=before)
    assert wrong(told(replace(facts, conntrack=before))) == []
    failed = replace(before, insert_failed=7, dropped=7)
    assert wrong(told(replace(facts, conntrack=failed))) == [Kind.CONNTRACK_INSERT]
    assert wrong(told(replace(facts, conntrack=replace(before, dropped=9)))) == [Kind.CONNTRACK_DROP]
    assert wrong(told(replace(facts, conntrack=replace(before, entries=1000)))) == [Kind.CONNTRACK_FULL]
    assert wrong(told(replace(facts, conntrack=replace(before, early_dropped=1)))) == [Kind.CONNTRACK_FULL]


@pytest.mark.parametrize(
    ("limit", "advice", "fix"),
    [
        (212_992, "That is the default", "sysctl -w net.core.rmem_default=1048576"),
        (425_984, "asked for as much as net.core.rmem_max (212,992) allows", "sysctl -w net.core.rmem_max=4194304"),
        (4_096, "The server sets the size itself", ""),
    ],
)
def test_advice_on_the_receive_buffer(limit: int, advice: str, fix: str) -> None:
    sock = SocketFacts(replace(SOCKET, queue_limit=limit, drops=9), drops=4)
    facts = replace(FACTS, sockets=(sock,), counters=NetworkCounters(received=5, receive_full=4))
    (one,) = (each for each in told(facts) if each.kind is Kind.RECEIVE_BUFFER)
    assert "4 datagrams dropped in 3 s, 9 since the socket was opened" in one.text
    assert advice in one.text
    assert one.fix == fix


def test_drops_of_a_socket_whose_buffer_was_not_full_are_a_filters() -> None:
    sock = SocketFacts(replace(SOCKET, drops=9), drops=4)
    for counters, kinds in (
        (NetworkCounters(), [Kind.SOCKET_FILTER]),
        (NetworkCounters(receive_full=1), [Kind.RECEIVE_BUFFER]),
        (NetworkCounters(bad_checksum=4), [Kind.RECEIVE_BUFFER]),
        (None, [Kind.RECEIVE_BUFFER]),
    ):
        assert wrong(told(replace(FACTS, sockets=(sock,), counters=counters))) == kinds
    past = told(replace(FACTS, sockets=(SocketFacts(replace(SOCKET, drops=9), drops=0),)))
    assert wrong(past) == []
    assert (
        "server lost 9 datagrams since the socket was opened, none in this look: its receive buffer of " in past[1].text
    )


def test_thousands_of_sockets_have_few_statements() -> None:
    """SO_REUSEPORT: the sockets of a process share statements, and only some processes have their own."""
    own = [SocketFacts(replace(SOCKET, inode=number, drops=3, queue=768), drops=2, waiting=3) for number in range(100)]
    others = [replace(each, socket=replace(each.socket, pid=100 + each.socket.inode)) for each in own]
    counters = NetworkCounters(receive_full=400)
    few = told(replace(FACTS, sockets=tuple(own), counters=counters))
    assert [each.kind for each in few] == [Kind.LISTENS, Kind.RECEIVE_BUFFER, Kind.NOT_READ, Kind.NOTHING_ARRIVES]
    assert "200 datagrams dropped in 3 s, 300 since its 100 sockets were opened" in few[1].text
    assert "76,800 bytes have waited in the receive buffers of 100 sockets for 3.0 s" in few[2].text
    many = told(replace(FACTS, sockets=(*own, *others), counters=counters))
    assert len(many) == 3 * 9 + 1
    assert "93 more sockets of other processes: 186 datagrams dropped in 3 s, 279 since" in many[17].text


def test_requests_to_a_group_are_not_expected_among_noports() -> None:
    group = Conversation("10.0.0.2", 4444, "10.0.0.255", "eth0", True, 5, 0)
    facts = replace(FACTS, sockets=(), traffic=Traffic((group,)), counters=NetworkCounters(ignored_group=5))
    (one,) = told(facts)
    assert "the kernel counted 5 datagrams to groups without a socket (IgnoredMulti)" in one.text


def test_no_reply_among_those_that_were_looked_at_is_no_proof() -> None:
    facts = replace(FACTS, traffic=Traffic((asked(10, 0),), missed=90), counters=NetworkCounters(received=100))
    (_, one) = told(facts)
    assert (one.kind, one.wrong) == (Kind.NO_REPLY, False)
    assert "no reply was seen (90 more datagrams were not looked at)" in one.text


def test_commands_act_in_the_namespace_that_they_are_about() -> None:
    rule = Rule("inet t input", "udp dport 5300 counter drop", Effect.DROP, False, True, 9, key="1")
    facts = replace(FACTS, traffic=Traffic((asked(),)), firewall=Firewall((rule,)), firewall_before=Firewall(()))
    command = "nft insert rule inet t input udp dport 5300 accept"
    for changed, fix in (
        (facts, command),
        (replace(facts, here=False, path="/run/netns/a b"), f"nsenter --net='/run/netns/a b' {command}"),
    ):
        assert [each.fix for each in told(changed) if each.kind is Kind.FIREWALL] == [fix]
    (state,) = (each for each in told(waiting_socket(here=False, path="/run/netns/a")) if each.kind is Kind.NOT_READ)
    assert state.fix == "kill -CONT 42"


def waiting_socket(**changes: Any) -> NamespaceFacts:
    return replace(FACTS, sockets=(SocketFacts(replace(SOCKET, queue=768), waiting=3, state="T"),), **changes)


@pytest.mark.parametrize(
    "place", ["inet t c; flush ruleset", "inet $(reboot) c", "inet t -c", "inet t c\nd", "inet t é"]
)
def test_names_of_a_tenants_chains_are_not_part_of_a_command(place: str) -> None:
    """A user of the machine, not of the namespace, copies it into a shell; the kernel allows any name."""
    for by_iptables in (False, True):
        rule = Rule(place, "counter drop", Effect.DROP, False, True, 9, key="1", by_iptables=by_iptables)
        facts = replace(FACTS, traffic=Traffic((asked(),)), firewall=Firewall((rule,)), firewall_before=Firewall(()))
        (one,) = (each for each in told(facts) if each.kind is Kind.FIREWALL)
        assert one.wrong and not one.fix


def test_counter_of_a_rule_that_was_not_read_before_is_not_of_this_look() -> None:
    rule = Rule("inet t input", "udp dport 5300 counter drop", Effect.DROP, False, True, 100, key="1")
    for unread, wrong_kinds in ((("nft: its list takes longer than 5.0 s",), []), ((), [Kind.FIREWALL])):
        before = Firewall((), unread)
        facts = replace(FACTS, traffic=Traffic((asked(),)), firewall=Firewall((rule,)), firewall_before=before)
        assert wrong(told(facts)) == wrong_kinds


@pytest.mark.parametrize(
    ("state", "received", "text"),
    [
        ("T", 100, "does not read its requests"),
        ("S", 0, "does not read its requests"),
        ("R", 100, "does not keep up with its requests"),
        ("D", 0, "cat /proc/42/stack"),
        ("", 0, "does not read its requests"),
    ],
)
def test_requests_that_wait(state: str, received: int, text: str) -> None:
    sock = SocketFacts(replace(SOCKET, queue=4000), waiting=2.5, state=state)
    facts = replace(
        FACTS, sockets=(sock,), counters=NetworkCounters(received=received), traffic=Traffic((asked(9, 0),))
    )
    statements = told(facts)
    assert wrong(statements) == [Kind.NOT_READ]
    assert text in statements[1].text + statements[1].fix
    assert "4,000 bytes have waited in its receive buffer for 2.5 s" in statements[1].text
    assert Kind.NOT_READ not in wrong(told(replace(facts, sockets=(replace(sock, waiting=0.5),))))


def test_wrong_source_has_the_advice_of_a_finding() -> None:
    request = asked(3, 0)
    request.wrong["10.0.0.9"] = 3
    sock = SocketFacts(replace(SOCKET, process="openvpn"))
    statements = told(replace(FACTS, sockets=(sock,), traffic=Traffic((request,))))
    assert wrong(statements) == [Kind.WRONG_SOURCE]
    look = Look(PORT, 3.0, (FACTS,))
    assert "multihome" in port_text(look, statements, False)
    assert port_object(look, statements)["statements"][1]["remedy"]["config"] == "multihome"


def test_agent_adds_what_it_counted() -> None:
    server = Server(Sender("server"), PORT, 1, ("0.0.0.0",), 1000, 900, 100, 0, 0, 0, 0, None, Risk.NONE, 0.0, 0.0)
    facts = replace(FACTS, servers=((None, server),))
    (one,) = (each for each in told(facts) if each.kind is Kind.NOTHING_ARRIVES)
    assert one.text.endswith("The agent has counted 1,000 requests, 900 replies, 100 unanswered.")
    (one,) = (each for each in told(replace(facts, traffic=None)) if each.kind is Kind.REPLIES)
    assert one.text.startswith("The agent has counted")


def test_without_privilege_it_says_what_is_known() -> None:
    facts = replace(FACTS, traffic=None, counters=NetworkCounters(reverse_path=3, no_port=2))
    assert wrong(told(facts)) == [Kind.REVERSE_PATH]
    (one,) = told(replace(facts, sockets=()))
    assert "In 3 s, the kernel counted 2 datagrams without a socket (NoPorts)" in one.text
    assert "for all ports" in one.text


def test_namespaces_that_were_not_watched_share_a_statement() -> None:
    others = [replace(FACTS, name=f"namespace {number}", inode=number, is_watched=False) for number in range(2, 302)]
    look = Look(PORT, 3.0, (FACTS, *others))
    statements = diagnose(look)
    assert len(statements) == 3
    assert "server (pid 42) in namespace 5 and 296 more." in statements[-1].text
    assert "Looked for 3 s in this network namespace." in port_text(look, statements, False)


def test_text_has_a_heading_for_each_namespace_and_what_was_not_seen() -> None:
    other = replace(FACTS, name="namespace \x1b[2Jblue", inode=2, here=False)
    look = Look(PORT, 3.0, (FACTS, other), unseen=("nft: not installed",))
    text = port_text(look, diagnose(look), False)
    assert "Port 5300/udp, this network namespace\n- server (pid 42) listens on 0.0.0.0:5300.\n" in text
    assert "Port 5300/udp, namespace \ufffd[2Jblue\n" in text
    assert "  Looked for 3 s in this network namespace, namespace \ufffd[2Jblue." in text
    assert text.endswith("  Not looked at: nft: not installed.")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_every_kind_is_documented() -> None:
    named = re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", (DOCS / "explain.md").read_text(), re.M)))
    assert sorted(named) == sorted(Kind)


def test_server_that_only_the_agent_sees() -> None:
    sender = Sender("coredns", 7, pod="dns-1", namespace="kube-system")
    old = Server(sender, PORT, 9, ("::",), 100, 90, 10, 0, 3, 0, 8192, None, Risk.NONE, 0.0, 0.0)

    def told_of(after: Server) -> list[Statement]:
        return diagnose(Look(PORT, 3.0, (replace(FACTS, sockets=()),), servers=((old, after),)))

    first, second = told_of(replace(old, requests=105, replies=94))
    assert first.text == (
        "By the agent, coredns (pid 7) in pod kube-system/dns-1 listens on [::]:5300: 5 requests and 4 replies in 3 s, "
        "105 and 94 in all, 10 unanswered."
    )
    assert "It listens elsewhere: coredns (pid 7) in pod kube-system/dns-1." in second.text
    assert wrong([first, second]) == []
    assert wrong(told_of(replace(old, requests=105))) == [Kind.NO_REPLY]
    assert wrong(told_of(replace(old, requests=105, replies=95, drops=4))) == [Kind.RECEIVE_BUFFER]
