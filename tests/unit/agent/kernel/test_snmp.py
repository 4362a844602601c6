"""The kernel's own count of UDP datagrams, as each kernel writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from udpwatch.agent.kernel.snmp import udp_sent

SNMP = """\
Ip: Forwarding DefaultTTL InReceives
Ip: 1 64 12
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors
Udp: 1 2 3 40 5 6 7 8 9
UdpLite: InDatagrams NoPorts InErrors OutDatagrams
UdpLite: 0 0 0 9000
"""
SNMP6 = f"""\
{"Ip6InReceives":<32}\t9
{"Udp6InDatagrams":<32}\t7
{"Udp6OutDatagrams":<32}\t2
"""


def test_both_families_are_summed(tmp_path: Path) -> None:
    (tmp_path / "snmp").write_text(SNMP)
    (tmp_path / "snmp6").write_text(SNMP6 + f"{'UdpLite6OutDatagrams':<32}\t9000\n")
    assert udp_sent(tmp_path) == 42


def test_kernel_without_ipv6_counts_ipv4_alone(tmp_path: Path) -> None:
    (tmp_path / "snmp").write_text(SNMP)
    assert udp_sent(tmp_path) == 40


@pytest.mark.parametrize("text", ["", "Udp: InDatagrams\nUdp: 1\n", "Udp: OutDatagrams\nUdp: many\n"])
def test_unknown_format_gives_no_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "snmp").write_text(text)
    assert udp_sent(tmp_path) is None
    assert udp_sent(tmp_path / "nowhere") is None
