"""Networks from /proc/PID/net, and what the agent keeps of other namespaces."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from udpwatch.agent.model import Risk, UdpSocket
from udpwatch.agent.servers import namespaces
from udpwatch.agent.servers.namespaces import KEEP_SECONDS, MAX_KEPT, Risks, read_all, single_addresses
from udpwatch.agent.servers.networks import Address, AddressKind, Networks

POD = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
     |-- 10.244.1.5
        /32 host LOCAL
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
        |-- 127.255.255.255
           /32 link BROADCAST
     |-- 10.244.1.5
        /32 host LOCAL
"""
POD6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fd000244000000000000000000000005 02 40 00 80     eth0
fe80000000000000dcad00fffe000001 02 40 20 80     eth0
"""
SOCKET = UdpSocket("0.0.0.0", 53, 4, pktinfo=False, pktinfo6=False, pid=7)
HERE = Path("/proc/self/ns/net").stat().st_ino


def folder(path: Path, trie: str = POD, six: str | None = POD6) -> Path:
    (path / "fib_trie").write_text(trie)
    if six is not None:
        (path / "if_inet6").write_text(six)
    return path


def test_pod_with_one_address_of_each_family(tmp_path: Path) -> None:
    found = single_addresses(folder(tmp_path))
    assert found
    assert [(each.address, each.kind) for each in found.addresses] == [
        ("10.244.1.5", AddressKind.ADDRESS),
        ("fd00:244::5", AddressKind.ADDRESS),
        ("fe80::dcad:ff:fe00:1", AddressKind.LINK),
    ]
    assert found.peers == () and found.complete


def test_kernel_without_ipv6(tmp_path: Path) -> None:
    found = single_addresses(folder(tmp_path, six=None))
    assert found and [each.address for each in found.addresses] == ["10.244.1.5"]


@pytest.mark.parametrize(
    ("trie", "six"),
    [
        (POD + "     |-- 10.244.1.6\n        /32 host LOCAL\n", POD6),
        (POD, POD6 + "fd000244000000000000000000000006 02 40 00 80     eth0\n"),
        (POD, POD6 + "fe800000000000000000000000000001 02 40 20 80     eth0\n"),
    ],
    ids=["IPv4", "IPv6", "link-local"],
)
def test_several_addresses_are_unknown(tmp_path: Path, trie: str, six: str) -> None:
    assert single_addresses(folder(tmp_path, trie, six)) is None


@pytest.mark.parametrize(
    ("trie", "six"),
    [
        (POD + "     |-- 10.50.0.0\n        /24 host LOCAL\n", POD6),
        (POD, "garbage\n"),
        (POD * 1_000, POD6),
        (POD, POD6 * 2_000),
    ],
    ids=["local network", "garbage", "long trie", "long list"],
)
def test_what_cannot_be_judged_is_an_error(tmp_path: Path, trie: str, six: str) -> None:
    with pytest.raises(ValueError):
        single_addresses(folder(tmp_path, trie, six))


def test_servers_of_the_own_namespace_are_judged() -> None:
    group = [UdpSocket("127.0.0.1", 53, 4, HERE, 1), UdpSocket("0.0.0.0", 40_000, 4, HERE, 2, named=False)]
    assert Risks()(group) == {1: Risk.NONE}


def networks(addresses: int) -> Networks:
    made = Address("10.0.0.1", 4, "eth0", 2, AddressKind.ADDRESS, 0, True, "10.0.0.1")
    return Networks((made,) * addresses, (), frozenset(), frozenset({0}), (32_768, 60_999), True)


class Read:
    """Counts the namespaces that are read; each has so many addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, addresses: int = 1) -> None:
        self.inodes: list[int] = []
        self.addresses = addresses
        monkeypatch.setattr(namespaces, "read_of_process", self)
        monkeypatch.setattr(namespaces, "READ_SECONDS", 1e9)

    def __call__(self, _pid: int, inode: int, _devices: Collection[int], _socket: int) -> Networks:
        self.inodes.append(inode)
        return networks(self.addresses)


def in_namespaces(*inodes: int) -> list[UdpSocket]:
    return [UdpSocket("0.0.0.0", 53, 4, inode, inode, pktinfo=False, pid=7) for inode in inodes]


def test_networks_are_read_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    read, risks = Read(monkeypatch), Risks()
    assert risks(in_namespaces(1, 2), 100.0) == {1: Risk.NONE, 2: Risk.NONE}
    risks(in_namespaces(1, 2), 101.0)
    assert read.inodes == [1, 2]
    risks(in_namespaces(1, 2), 100.0 + 2 * KEEP_SECONDS)
    assert read.inodes == [1, 2, 1, 2]


def test_namespaces_without_sockets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    read, risks = Read(monkeypatch), Risks()
    risks(in_namespaces(1), 100.0)
    risks([], 101.0)
    risks(in_namespaces(1), 110.0)
    assert read.inodes == [1, 1]


def test_time_bounds_what_one_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    read, risks = Read(monkeypatch), Risks()
    monkeypatch.setattr(namespaces, "READ_SECONDS", 0.0)
    assert risks(in_namespaces(1, 2, 3), 100.0) == {1: Risk.NONE, 2: Risk.UNKNOWN, 3: Risk.UNKNOWN}
    risks(in_namespaces(1, 2, 3), 110.0)
    assert risks(in_namespaces(1, 2, 3), 120.0) == dict.fromkeys((1, 2, 3), Risk.NONE)
    assert read.inodes == [1, 2, 3]


def test_large_namespaces_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read, risks = Read(monkeypatch, MAX_KEPT // 4), Risks()
    found = risks(in_namespaces(1, 2, 3, 4), 100.0)
    assert sorted(found.values()) == [Risk.NONE] * 3 + [Risk.UNKNOWN]
    assert risks.left_out == 1
    read.addresses = 2
    assert risks(in_namespaces(1, 2, 3, 5), 110.0)[5] is Risk.NONE


def test_changed_options_are_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Read(monkeypatch)
    risks = Risks()
    before = UdpSocket("0.0.0.0", 53, 4, 1, 9, named=True, pid=os.getpid())
    assert list(risks([before], 100.0)) == [9]
    assert list(risks([UdpSocket("0.0.0.0", 53, 4, 1, 9, named=False, pid=os.getpid())], 101.0)) == []


def test_time_bounds_what_one_call_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    Read(monkeypatch)
    risks = Risks()
    risks(in_namespaces(1, 2), 100.0)
    monkeypatch.setattr(namespaces, "JUDGE_SECONDS", -1.0)
    changed = [replace(each, cookie=each.inode + 10) for each in in_namespaces(1, 2)]
    assert risks(changed, 101.0) == {1: Risk.NONE, 2: Risk.NONE}, "the last judgement counts"
    assert risks([*changed, *in_namespaces(3)], 102.0)[3] is Risk.UNKNOWN
    monkeypatch.setattr(namespaces, "JUDGE_SECONDS", 1e9)
    assert risks([*changed, *in_namespaces(3)], 103.0) == {11: Risk.NONE, 12: Risk.NONE, 3: Risk.NONE}


def test_judgement_outlives_the_networks_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    Read(monkeypatch)
    risks = Risks()
    risks(in_namespaces(1), 100.0)
    monkeypatch.setattr(namespaces, "JUDGE_SECONDS", -1.0)
    assert risks(in_namespaces(1), 100.0 + 2 * KEEP_SECONDS) == {1: Risk.NONE}


def test_time_bounds_what_audit_reads() -> None:
    assert read_all({HERE: ()}, time.monotonic() + 60).keys() == {HERE}
    assert read_all({HERE: ()}, time.monotonic() - 1) == {}
