"""Which network namespaces are healed: bounded, with a share for each tenant, and left when their server ends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.heal.namespaces import MAX_NAMESPACES, OTHER, Namespaces, Wanted
from udpwatch.agent.kernel import bpf, cgroup, loader
from udpwatch.agent.kernel.records import encode_local_key
from udpwatch.agent.testing.lab import Lab, Namespace


@pytest.fixture(scope="module")
def local_devices() -> Iterator[int]:
    """The map of healed addresses."""
    with contextlib.closing(cgroup.find(None)) as root:
        held = loader.load(root, loader.Limits(), cache=Path(os.environ["UDPWATCH_CACHE"]), heal=True)
    yield held.maps["local_devices"]
    for group in (held.links, held.programs, held.maps):
        for descriptor in group.values():
            os.close(descriptor)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def followed(local_devices: int) -> Iterator[Namespaces]:
    namespaces = Namespaces(local_devices)
    namespaces.start()
    yield namespaces
    namespaces.close()
    assert list(bpf.map_items(local_devices, 24, 4)) == []


def wanted(namespace: Namespace, tenant: str) -> Wanted:
    process = namespace.spawn("server", lambda: time.sleep(1000))
    wait_for(lambda: Path(f"/proc/{process.pid}/ns/net").stat().st_ino == namespace.inode, "the process to move")
    return Wanted(process.pid, tenant, "server")


def test_tenant_gets_half_of_the_free_namespaces(lab: Lab, followed: Namespaces) -> None:
    evil = [lab.namespace(f"evil{number}") for number in range(MAX_NAMESPACES)]
    want = {each.inode: wanted(each, "evil") for each in evil}
    followed.want(want)
    wait_for(followed.not_healed, "what is beyond the share")
    assert followed.followed == 1 + MAX_NAMESPACES // 2
    assert any("more than 64 network namespaces" in line for line in followed.not_healed())
    victim = lab.namespace("victim")
    followed.want(want | {victim.inode: wanted(victim, "victim")})
    wait_for(lambda: followed.followed == 2 + MAX_NAMESPACES // 2, "the other tenant's namespace")
    followed.want({})
    wait_for(lambda: followed.followed == 1 and not followed.not_healed(), "all of them to be left")


def test_namespace_whose_addresses_change_too_often_is_given_up(
    lab: Lab, followed: Namespaces, local_devices: int
) -> None:
    evil = lab.namespace("evil")
    followed.want({evil.inode: wanted(evil, "evil")})
    key = encode_local_key("127.0.0.1", evil.inode)
    wait_for(lambda: bpf.map_lookup(local_devices, key, 4), "its addresses")
    changes = [f"addr {what} 192.0.2.1/32 dev lo" for what in ("add", "del")] * (OTHER.burst // 2 + 200)
    evil.ip(*changes)
    (line,) = wait_for(followed.not_healed, "it to be given up")
    assert "its addresses change too often" in line
    assert bpf.map_lookup(local_devices, key, 4) is None
    assert followed.followed == 1


def test_message_that_a_tenant_forges_is_ignored(lab: Lab, followed: Namespaces, local_devices: int) -> None:
    """Whoever has CAP_NET_ADMIN in a namespace may send to the group that the agent listens to there."""
    evil = lab.namespace("evil")
    followed.want({evil.inode: wanted(evil, "evil")})
    key = encode_local_key("127.0.0.1", evil.inode)
    wait_for(lambda: bpf.map_lookup(local_devices, key, 4), "its addresses")
    with evil.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as forger:
        for content in (b"", bytes(8) + b"\x09\x00\x02\x00" + bytes(8)):
            header = struct.pack("=IHHII", 16 + len(content), 20, 0, 0, 0)  # RTM_NEWADDR
            forger.sendto(header + content, (0, 0x10 | 0x100))
    evil.ip("addr add 192.0.2.7/32 dev lo")
    fresh = encode_local_key("192.0.2.7", evil.inode)
    wait_for(lambda: followed.not_healed() or bpf.map_lookup(local_devices, fresh, 4), "what is no forgery")
    assert followed.not_healed() == ()
    assert followed.followed == 2


def test_namespace_ends_with_its_last_process(lab: Lab, followed: Namespaces) -> None:
    """Following keeps a namespace alive, so that it must end when the server's process has left it."""
    namespace = lab.namespace("short")
    inode = namespace.inode
    want = wanted(namespace, "tenant")
    followed.want({inode: want})
    wait_for(lambda: followed.followed == 2, "the namespace to be followed")
    namespace.close()
    wait_for(lambda: followed.followed == 1, "the namespace to be left")


def test_failure_of_the_thread_ends_healing(local_devices: int) -> None:
    """An address that nobody follows must not be used."""
    broken = threading.Event()

    def clock() -> float:
        if broken.is_set():
            raise RuntimeError("a bug")
        return time.monotonic()

    followed = Namespaces(local_devices, clock)
    followed.start()
    try:
        assert followed.addresses > 0
        broken.set()
        (line,) = wait_for(followed.not_healed, "the report")
        assert "internal error: RuntimeError('a bug')" in line
        assert list(bpf.map_items(local_devices, 24, 4)) == []
    finally:
        followed.close()
