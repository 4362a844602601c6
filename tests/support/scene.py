"""The host of most scenes, its addresses in both families, and the steps that scenes are made of."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from sensors import Watch

from udpwatch.agent.model import Finding, Verdict
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, Namespace

PATIENCE_SECONDS = 30.0  # guests of the kernel matrix share their CPUs
SECOND, SECOND_6 = "172.16.13.14", "fd00:13::14"
VIP, VIP_6 = "10.99.0.1", "fd00:99::1"


@dataclass(frozen=True)
class Family:
    """The addresses of the scene in one family."""

    name: str
    inet: socket.AddressFamily
    wildcard: str
    eth0: str
    second: str
    docker0: str
    vip: str
    outside: str
    number: int


V4 = Family(
    "IPv4",
    socket.AF_INET,
    "0.0.0.0",
    ContainerHost.ETH0,
    SECOND,
    ContainerHost.DOCKER0,
    VIP,
    ContainerHost.OUTSIDE,
    4,
)
V6 = Family(
    "IPv6",
    socket.AF_INET6,
    "::",
    ContainerHost.ETH0_6,
    SECOND_6,
    ContainerHost.DOCKER0_6,
    VIP_6,
    ContainerHost.OUTSIDE_6,
    6,
)
both = pytest.mark.parametrize("family", [V4, V6], ids=lambda family: family.name)


@contextmanager
def host_with_more_addresses() -> Iterator[ContainerHost]:
    """Build the demo's machine with a second address on eth0 and two virtual ones on loopback, in both families."""
    with ContainerHost() as host:
        host.node.add_addresses("eth0", SECOND, SECOND_6)
        host.node.ip(f"addr add {VIP}/32 dev lo", f"addr add {VIP_6}/128 dev lo nodad")
        yield host


@contextmanager
def bound(
    namespace: Namespace, inet: socket.AddressFamily, address: str, port: int, *options: tuple[int, int, int]
) -> Iterator[socket.socket]:
    """Yield a bound UDP socket."""
    with namespace.socket(inet) as made:
        for option in options:
            made.setsockopt(*option)
        made.bind((address, port))
        yield made


def finding_of(watch: Watch, port: int) -> Finding:
    """Return the only finding on a port."""
    (finding,) = watch.findings(port)
    return finding


def verdict_of(watch: Watch, expected: Verdict) -> Verdict:
    """Return the expected verdict, which is always unknown in mode netlink."""
    return expected if watch.sensor.features.mode == "packet" else Verdict.UNKNOWN


def picked_source(namespace: Namespace, family: Family, peer: str) -> str:
    """Return the address that routing picks for a peer: the first one for IPv4, by RFC 6724 for IPv6."""
    with namespace.socket(family.inet) as probe:
        probe.connect((peer, 9))
        picked: str = probe.getsockname()[0]
        return picked


def ask(client: socket.socket, address: str, port: int, server: socket.socket) -> tuple[bytes, tuple[str, int]]:
    """Send a request and wait until the server's socket has it; returns the request and the client's address.

    On a busy machine the kernel may drop a datagram, or take long to find a neighbour: the request is then repeated.
    """
    client.settimeout(PATIENCE_SECONDS)
    for last in (False, False, True):
        server.settimeout(PATIENCE_SECONDS if last else PATIENCE_SECONDS / 10)
        client.sendto(b"request", (address, port))
        try:
            data, peer = server.recvfrom(65535)
            break
        except TimeoutError:
            if last:
                raise
    server.settimeout(PATIENCE_SECONDS)
    return data, peer


def source_control(family: Family, address: str) -> tuple[int, int, bytes]:
    raw = socket.inet_pton(family.inet, address)
    if family is V6:
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, raw + bytes(4)
    return socket.IPPROTO_IP, servers.IP_PKTINFO, struct.pack("=i4s4s", 0, raw, bytes(4))
