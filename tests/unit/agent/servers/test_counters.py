"""The counters of a network namespace, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

from udpwatch.agent.servers.counters import NetworkCounters, network_counters, received_drops

SNMP = """\
Ip: Forwarding DefaultTTL InAddrErrors ReasmFails
Ip: 1 64 3 4
Icmp: InMsgs OutDestUnreachs
Icmp: 9 5
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors
Udp: 100 2 43008 90 7 8 9 0 1
UdpLite: InDatagrams NoPorts
UdpLite: 1000 1000
"""
NETSTAT = """\
TcpExt: SyncookiesSent IPReversePathFilter
TcpExt: 1 6
IpExt: InNoRoutes InTruncatedPkts
IpExt: 2 0
"""
SNMP6 = "Udp6InDatagrams                 \t11\nUdp6NoPorts\t22\nIcmp6OutDestUnreachs\t33\nIp6InAddrErrors\t44\n"


def test_both_families_are_added(tmp_path: Path) -> None:
    (tmp_path / "snmp").write_text(SNMP)
    (tmp_path / "netstat").write_text(NETSTAT)
    ipv4 = network_counters(tmp_path)
    assert ipv4 == NetworkCounters(
        received=100,
        sent=90,
        no_port=2,
        receive_full=7,
        send_full=8,
        bad_checksum=9,
        no_memory=1,
        unreachable=5,
        reverse_path=6,
        not_local=3,
        no_route=2,
        no_fragment=4,
    )
    (tmp_path / "snmp6").write_text(SNMP6)
    both = network_counters(tmp_path)
    assert both - ipv4 == NetworkCounters(received=11, no_port=22, unreachable=33, not_local=44)


def test_drops_of_devices(tmp_path: Path) -> None:
    head = "Inter-|   Receive\n face |bytes    packets errs drop fifo frame compressed multicast|bytes\n"
    (tmp_path / "dev").write_text(
        head + "    lo: 1 2 0 0 0 0 0 0 1 1 0 0 0 0 0 0\neth0:1: 9 9 1 20 300 0 0 0 1 1 5 5 5 0 0 0\n"
    )
    assert received_drops(tmp_path) == {"lo": 0, "eth0:1": 321}


def test_this_kernel_has_every_counter() -> None:
    """A misspelled name would read as 0 for ever."""
    text = Path("/proc/net/snmp").read_text() + Path("/proc/net/netstat").read_text()
    for name in ("NoPorts", "RcvbufErrors", "SndbufErrors", "InCsumErrors", "MemErrors", "InAddrErrors"):
        assert f" {name}" in text
    for name in ("OutDestUnreachs", "IPReversePathFilter", "InNoRoutes", "ReasmFails"):
        assert f" {name}" in text
    assert network_counters().sent >= 0
