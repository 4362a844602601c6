"""Real sensors, real agents, and the host that most scenes play on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from agents import Agent, temporary
from scene import host_with_more_addresses
from sensors import Watch, open_netlink_watch

from udpwatch.agent.testing.lab import ContainerHost

_ports = count(20_000)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all sensors and agents of this run keep compiled programs; as long as it lasts, and no longer."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["UDPWATCH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def packet_watch() -> Iterator[Watch]:
    """Conntrack read from the packet."""
    watch = Watch()
    assert watch.sensor.features.mode == "packet", watch.sensor.features.conntrack_reason
    yield watch
    watch.close()


@pytest.fixture(scope="session")
def netlink_watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    watch = open_netlink_watch(tmp_path_factory.mktemp("btf"))
    yield watch
    watch.close()


#: What mode netlink misses by design where the kernel tells no namespace (before 6.15; docs/kernels.md), and why.
MISSED_WITHOUT_NAMESPACE = {
    "test_connected_server_socket": "who sends through a connected socket is not known, nor whose conntrack to ask",
    "test_connected_second_socket": "the answer leaves through another socket",
    "test_reuseport_sibling_answers": "the answer leaves through another socket",
    "test_sibling_bound_to_the_other_address": "the answer leaves through another socket",
    "test_connected_socket_asked_and_listener_answers": "the answer leaves through another socket",
    **dict.fromkeys(
        (
            "test_addresses_asked_from_one_socket",
            "test_an_address_that_was_answered_is_a_right_source",
            "test_a_host_that_speaks_after_a_right_reply",
            "test_a_group_and_an_address_answered_by_one_reply",
        ),
        "no conntrack there, but the process is in other namespaces, too",
    ),
    "test_loopback_to_own_addresses": "no conntrack there, but the process is in other namespaces, too",
}


@pytest.fixture(params=["packet", "netlink"])
def watch(request: pytest.FixtureRequest) -> Watch:
    """Every scene is played in both modes and must come out with the same counts."""
    found: Watch = request.getfixturevalue(f"{request.param}_watch")
    name = request.function.__name__
    if found.sensor.features.scope == "socket" and name in MISSED_WITHOUT_NAMESPACE:
        pytest.skip(f"by design, mode netlink without namespaces: {MISSED_WITHOUT_NAMESPACE[name]}")
    return found


@pytest.fixture
def port() -> int:
    """A port that no other test uses."""
    return next(_ports)


@pytest.fixture(scope="session")
def host() -> Iterator[ContainerHost]:
    """The demo's machine, with a second address on eth0 and two virtual ones on loopback."""
    with host_with_more_addresses() as lab:
        yield lab


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path (a Unix socket's has 107 bytes at most)."""
    with temporary() as name:
        yield Path(name)


@pytest.fixture
def agent(folder: Path) -> Iterator[Agent]:
    """A ready agent with default settings."""
    with Agent(folder) as running:
        yield running
