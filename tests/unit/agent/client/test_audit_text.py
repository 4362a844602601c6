"""What `udpwatch audit` prints: text in 80 columns, and its JSON twin."""

from __future__ import annotations

import json
from dataclasses import replace

from golden import compare
from repository import DOCS

from udpwatch.agent.client.audit_text import LEAST_LISTED, report_object, report_text
from udpwatch.agent.model import Risk, Row, Sender, Server, UdpSocket
from udpwatch.agent.servers.audit import ServerRisk, WrongReply, judge, servers_of, servers_of_agent
from udpwatch.agent.servers.networks import Address, AddressKind, Networks, PeerKind, Peers

CONTAINERS = Peers(4, "172.17.0.0/16", 0, PeerKind.CONTAINERS, "docker0", 3, 0, False, ("172.17.0.1",))
LAN = Peers(4, "172.16.13.0/24", 0, PeerKind.ATTACHED, "eth0", 2, 0, False, ("172.16.13.13",))
NETWORKS = Networks(
    (
        Address("127.0.0.1", 4, "lo", 1, AddressKind.HOST, 0, False, "127.0.0.1"),
        Address("172.16.13.13", 4, "eth0", 2, AddressKind.ADDRESS, 0, True, "172.16.13.13"),
        Address("172.16.13.100", 4, "eth0", 2, AddressKind.VIRTUAL, 0, True, "172.16.13.100"),
        Address("172.17.0.1", 4, "docker0", 3, AddressKind.BRIDGE, 0, True, "172.17.0.1"),
    ),
    (LAN, CONTAINERS),
    frozenset(),
    frozenset({0}),
    (32_768, 60_999),
    True,
)
OPENVPN = Sender("openvpn", 4242, container_id="1f", container="vpn", namespace="edge", pod="vpn-0")
SNMPD = Sender("snmpd", 77, "/usr/sbin/snmpd")
SEEN = Row(SNMPD, 161, "172.16.13.13", "172.17.0.1", "new", "kernel-chosen", 4, 23, 0.0, 0.0)


def servers() -> list[ServerRisk]:
    sockets = {
        OPENVPN: UdpSocket("0.0.0.0", 1194, 4, netns=1, pktinfo=False),
        SNMPD: UdpSocket("::", 161, 6, netns=1, pktinfo=True, pktinfo6=True),
        Sender("chronyd", 9): UdpSocket("127.0.0.1", 323, 4, netns=1, pktinfo=True),
        Sender("dhclient", 10): UdpSocket("0.0.0.0", 68, 4, netns=1, pktinfo=False, process="dhclient"),
    }
    owned = [(judge([socket], NETWORKS)[0], sender) for sender, socket in sockets.items()]
    return servers_of(owned, [SEEN])


def test_golden_text() -> None:
    compare("audit.txt", report_text(servers(), True, False) + "\n")


def test_documented_output_is_what_audit_prints() -> None:
    command, _, shown = (DOCS / "audit.md").read_text().split("```\n")[1].partition("\n")
    assert command == "$ sudo udpwatch audit"
    assert shown == report_text(servers(), False, False) + "\n"


def test_text_fits_80_columns_and_is_coloured_only_on_a_terminal() -> None:
    text = report_text(servers(), True, False)
    assert max(map(len, text.splitlines())) < 80
    assert "\x1b" not in text
    assert "\x1b[1;31m" in report_text(servers(), True, True)


def test_json_has_the_same_and_is_documented() -> None:
    report = json.loads(json.dumps(report_object(servers(), ["a note"], False)))
    assert report["counts"] == {"wrong": 1, "virtual": 1, "possible": 0, "unknown": 0, "none": 2}
    wrong, virtual = report["servers"]
    assert (wrong["process"], wrong["risk"], wrong["wrong"]) == ("snmpd", "wrong", [])
    assert wrong["seen"] == [{"expected": "172.16.13.13", "actual": "172.17.0.1", "count": 23}]
    assert virtual["wrong"][0] == {
        "asked": "172.16.13.13",
        "risk": "virtual",
        "peers": "containers",
        "network": "172.17.0.0/16",
        "interface": "docker0",
        "replies_from": ["172.17.0.1"],
        "always": True,
    }
    assert virtual["remedy"]["config"] == "multihome"
    page = (DOCS / "audit.md").read_text().partition("## JSON")[2].partition("\n## ")[0]
    for key in (*report, *wrong, *virtual["wrong"][0], *wrong["seen"][0]):
        assert f"`{key}`" in page, key
    everything = report_object(servers(), [], True)
    assert [each["risk"] for each in everything["servers"]] == ["wrong", "virtual", "none", "none"]
    assert everything["servers"][3]["remedy"] is None


def test_healed_server_stays_at_risk_and_is_not_wrong() -> None:
    """Its sockets are as they were, so it still needs the fix."""
    healed = replace(SEEN, sender=OPENVPN, port=1194, actual=SEEN.expected, verdict="healed")
    judged = judge([UdpSocket("0.0.0.0", 1194, 4, netns=1, pktinfo=False)], NETWORKS)[0]
    (server,) = servers_of([(judged, OPENVPN)], [healed])
    assert (server.risk, server.seen) == (Risk.VIRTUAL, ())
    assert "Healed: asked at 172.16.13.13, udpwatch set this source 23 times." in " ".join(
        report_text([server], False, False).split()
    )
    assert report_object([server], [], False)["servers"][0]["healed"] == [{"asked": "172.16.13.13", "count": 23}]
    counted = Server(OPENVPN, 1194, 1, ("0.0.0.0",), 1, 1, 0, 0, None, None, None, False, Risk.VIRTUAL, 0.0, 0.0, 1)
    (of_agent,) = servers_of_agent([counted], [healed])
    assert (of_agent.risk, of_agent.seen, of_agent.healed) == (Risk.VIRTUAL, (), (healed,))


def test_many_addresses_are_shortened() -> None:
    wrong = tuple(WrongReply(f"10.0.0.{number}", LAN, ("172.16.13.13",), False, Risk.VIRTUAL, 4) for number in range(9))
    (server,) = [each for each in servers() if each.risk is Risk.VIRTUAL]
    text = report_text([ServerRisk(**{**_fields(server), "wrong": wrong})], False, False)
    assert "Asked at 10.0.0.0, 10.0.0.1, 10.0.0.2 and 6 more by 172.16.13.0/24" in " ".join(text.split())


def test_details_of_many_servers_are_left_to_json() -> None:
    (server,) = [each for each in servers() if each.risk is Risk.VIRTUAL]
    text = report_text([server] * 53, False, False)
    assert text.splitlines()[0] == "At risk: 53 of 53 UDP servers (53 virtual)."
    assert text.endswith("\n\n3 more servers: see --json.")
    assert len(report_object([server] * 53, [], False)["servers"]) == 53


def test_hostile_process_name_is_harmless() -> None:
    evil = Sender("a\x1b[2Jb\n", 1)
    (judged,) = judge([UdpSocket("0.0.0.0", 1, 4, pktinfo=False)], NETWORKS)
    assert "\x1b" not in report_text(servers_of([(judged, evil)]), True, False)


def _fields(server: ServerRisk) -> dict[str, object]:
    return {name: getattr(server, name) for name in ServerRisk.__slots__}


def test_object_lists_fewer_replies_of_each_of_many_servers() -> None:
    reply = WrongReply("10.0.0.1", LAN, ("172.16.13.13",), False, Risk.VIRTUAL, 4)
    (server,) = [each for each in servers() if each.risk is Risk.VIRTUAL]
    busy = ServerRisk(**{**_fields(server), "wrong": (reply,) * 256, "more": 7})
    for number, share in ((1, 256), (1_024, 64), (16_384, LEAST_LISTED)):
        first = report_object([busy] * number, [], False)["servers"][0]
        assert (len(first["wrong"]), first["wrong_not_listed"]) == (share, 256 - share + 7)
