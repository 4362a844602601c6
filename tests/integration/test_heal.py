"""Healing: replies leave from the address that was asked, and never from another one than before."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scene import V4, V6, Family, bound

from udpwatch.agent.heal.addresses import Bounds, LocalAddresses
from udpwatch.agent.kernel import bpf, cgroup, loader
from udpwatch.agent.testing.lab import ContainerHost

OFF, DRY_RUN, ON, NEVER = range(4)
BOUNDS = Bounds(addresses=1_000, changes_per_second=1e6, burst=1_000_000)
MAPPED = replace(V4, name="IPv4-mapped", inet=V6.inet, wildcard=V6.wildcard)
CHURN_SECONDS = 4.0


@pytest.fixture(scope="module")
def healing() -> Iterator[loader.Loaded]:
    with contextlib.closing(cgroup.find(None)) as root:
        held = loader.load(root, loader.Limits(), cache=Path(os.environ["UDPWATCH_CACHE"]), heal=True)
    assert {"heal4", "heal6"} <= held.links.keys(), held.refused
    yield held
    for group in (held.links, held.programs, held.maps):
        for descriptor in group.values():
            os.close(descriptor)


@pytest.fixture(scope="module")
def following(healing: loader.Loaded, host: ContainerHost) -> Iterator[None]:
    """Follow the node's addresses beside the tests."""
    ended = threading.Event()
    with host.node.entered():
        followed = LocalAddresses(healing.maps["local_devices"], BOUNDS, time.monotonic())

    def follow() -> None:
        with host.node.entered():
            while not ended.is_set():
                select.select([followed.fileno()], [], [], 0.2)
                followed.read(time.monotonic())

    thread = threading.Thread(target=follow)
    thread.start()
    yield
    ended.set()
    thread.join()
    followed.close()


def set_mode(healing: loader.Loaded, port: int, mode: int) -> None:
    bpf.map_update(healing.maps["heal_ports"], struct.pack("=I", port), bytes([mode]))


def sources(host: ContainerHost, family: Family, address: str, port: int, replies: int = 2) -> set[str]:
    """Ask a plain server; return the sources of its replies."""
    asking = socket.AF_INET6 if ":" in address else socket.AF_INET
    with bound(host.node, family.inet, family.wildcard, port) as server, host.container.socket(asking) as client:
        client.settimeout(5)
        client.sendto(b"request", (address, port))
        _, peer = server.recvfrom(100)
        for _ in range(replies):
            server.sendto(b"reply", peer)
        return {client.recvfrom(100)[1][0] for _ in range(replies)}


@pytest.mark.parametrize("family", [V4, V6, MAPPED], ids=lambda family: family.name)
def test_every_reply_leaves_from_the_address_that_was_asked(
    healing: loader.Loaded, following: None, host: ContainerHost, family: Family, port: int
) -> None:
    assert sources(host, family, family.eth0, port) == {family.docker0}
    set_mode(healing, port, ON)
    assert sources(host, family, family.eth0, port) == {family.eth0}
    set_mode(healing, port, DRY_RUN)
    assert sources(host, family, family.eth0, port) == {family.docker0}
    set_mode(healing, port, ON)
    assert sources(host, family, family.eth0, port) == {family.eth0}
    set_mode(healing, port, OFF)
    assert sources(host, family, family.eth0, port) == {family.docker0}


@pytest.mark.parametrize("family", [V4, V6, MAPPED], ids=lambda family: family.name)
def test_address_that_comes_and_goes_makes_no_send_fail(
    healing: loader.Loaded, following: None, host: ContainerHost, family: Family, port: int
) -> None:
    """At thousands of changes a minute: no error that routing would not make, and no source but the node's own."""
    address, prefix, option = ("fd00:13::50", 64, " nodad") if family is V6 else ("172.16.13.50", 24, "")
    asking = V6.inet if family is V6 else V4.inet
    set_mode(healing, port, ON)
    host.node.ip(f"addr add {address}/{prefix} dev eth0{option}")
    time.sleep(1.5)  # until it is stable
    ended, seen, errors = threading.Event(), Counter[str](), Counter[str]()
    changes = 0

    def change() -> None:
        nonlocal changes
        while not ended.is_set():
            host.node.ip(f"addr del {address}/{prefix} dev eth0")
            host.node.ip(f"addr add {address}/{prefix} dev eth0{option}")
            changes += 2

    with bound(host.node, family.inet, family.wildcard, port) as server, host.container.socket(asking) as client:
        client.settimeout(0.1)
        client.sendto(b"request", (address, port))
        _, peer = server.recvfrom(100)
        server.sendto(b"reply", peer)
        assert client.recvfrom(100)[1][0] == address  # healed while it is stable

        def receive() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    seen[client.recvfrom(100)[1][0]] += 1

        threads = [threading.Thread(target=each) for each in (change, receive)]
        for each in threads:
            each.start()
        until = time.monotonic() + CHURN_SECONDS
        while time.monotonic() < until:
            try:
                server.sendto(b"reply", peer)
            except OSError as error:
                errors[errno.errorcode[error.errno or 0]] += 1
        ended.set()
        for each in threads:
            each.join()
    host.node.ip(f"addr del {address}/{prefix} dev eth0")
    assert changes > 100
    assert not errors
    assert seen.keys() <= {address, family.docker0}
