"""Fixtures: real sensors, real agents, and the host of most scenes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from agents import Agent, temporary
from runtimes import RuntimeHost
from scene import host_with_more_addresses
from sensors import Watch, open_netlink_watch

from udpwatch.agent.kernel.mounts import open_private
from udpwatch.agent.testing.lab import ContainerHost, Namespace

# Each process of pytest-xdist has ports of its own.
_ports = count(20_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all sensors and agents of this run cache compiled programs; removed after the run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["UDPWATCH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def packet_watch() -> Iterator[Watch]:
    """A sensor that reads conntrack's verdict from the packet."""
    watch = Watch()
    assert watch.sensor.features.mode == "packet", watch.sensor.features.conntrack_reason
    yield watch
    watch.close()


@pytest.fixture(scope="session")
def netlink_watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    watch = open_netlink_watch(tmp_path_factory.mktemp("btf"))
    yield watch
    watch.close()


_OTHER_SOCKET = "the reply leaves through another socket"
_NO_CONNTRACK = "there is no conntrack, but the process is in other namespaces, too"
#: What mode netlink misses by design when the kernel reports no namespace (before 6.15; docs/kernels.md), and why.
MISSED_WITHOUT_NAMESPACE = {
    "test_wrong_replies_of_a_connected_server_socket": "the sender is unknown, so nobody knows whose conntrack to ask",
    "test_wrong_reply_of_a_second_connected_socket": _OTHER_SOCKET,
    "test_wrong_reply_of_a_reuseport_sibling": _OTHER_SOCKET,
    "test_wrong_reply_through_the_socket_bound_to_the_other_address": _OTHER_SOCKET,
    "test_wrong_reply_of_the_listener_to_a_request_at_the_connected_socket_is_found": _OTHER_SOCKET,
    "test_replies_to_many_addresses_asked_from_one_socket_are_judged_exactly": _NO_CONNTRACK,
    "test_address_that_was_answered_stays_a_right_source": _NO_CONNTRACK,
    "test_datagrams_after_a_right_reply_are_not_replies": _NO_CONNTRACK,
    "test_one_reply_answers_a_group_and_an_address": _NO_CONNTRACK,
    "test_wrong_reply_over_loopback_between_own_addresses": _NO_CONNTRACK,
}


@pytest.fixture(params=["packet", "netlink"])
def watch(request: pytest.FixtureRequest) -> Watch:
    """A sensor in each mode: every scene must give the same counts in both."""
    found: Watch = request.getfixturevalue(f"{request.param}_watch")
    name = request.function.__name__
    if found.sensor.features.scope == "socket" and name in MISSED_WITHOUT_NAMESPACE:
        pytest.skip(f"by design, mode netlink without namespaces: {MISSED_WITHOUT_NAMESPACE[name]}")
    return found


@pytest.fixture
def port() -> int:
    """A port that no other test uses."""
    return next(_ports)


@pytest.fixture
def other_port() -> int:
    """Another one."""
    return next(_ports)


@pytest.fixture(scope="session")
def host() -> Iterator[ContainerHost]:
    """The demo's machine, with a second address on eth0 and two virtual ones on loopback."""
    with host_with_more_addresses() as lab:
        yield lab


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[RuntimeHost]:
    """The host of container runtimes, for modules with a folder ``place``; closed before that folder is removed."""
    assert place
    with RuntimeHost() as lab:
        yield lab


@pytest.fixture(scope="module")
def node(lab: RuntimeHost) -> Namespace:
    """The node of that host."""
    return lab.node


@pytest.fixture(scope="module")
def outside(lab: RuntimeHost) -> Namespace:
    """The machine outside of it."""
    return lab.outside


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path (a Unix socket's has 107 bytes at most)."""
    with temporary() as name:
        yield Path(name)


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder in a bpffs of its own, which ends with this process."""
    fd = open_private("bpf")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}/udpwatch")
    finally:
        os.close(fd)


@pytest.fixture
def agent(folder: Path) -> Iterator[Agent]:
    """A ready agent with default settings."""
    with Agent(folder) as running:
        yield running
