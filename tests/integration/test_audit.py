"""What audit predicts is what happens: real servers, asked at each address from each network of real nodes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterator
from itertools import count

import pytest
from audited import Tally, compare
from layouts import LAYOUTS
from waiting import wait_for

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel.capabilities import Capability, drop_all_but
from udpwatch.agent.model import UdpSocket
from udpwatch.agent.servers.audit import judge
from udpwatch.agent.servers.held import held_sockets
from udpwatch.agent.servers.inventory import list_all
from udpwatch.agent.servers.namespaces import Risks
from udpwatch.agent.servers.networks import read_networks
from udpwatch.agent.testing.lab import ContainerHost, Namespace, die_with_parent


@pytest.fixture(scope="module")
def tallies(request: pytest.FixtureRequest) -> Iterator[tuple[Tally, Tally]]:
    """Count all cases, and print precision and recall at the end."""
    pairs, verdicts = Tally(), Tally()
    yield pairs, verdicts
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\naudit, replies by address and peers: {pairs}\naudit, servers: {verdicts}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_verdict_agrees_with_the_replies(name: str, tallies: tuple[Tally, Tally]) -> None:
    kind, make = LAYOUTS[name]
    found = Tally(), Tally()
    with kind() as lab:
        try:
            layout = make(lab)
        except UdpwatchError as error:
            if "Unknown device type" in str(error):
                pytest.skip(f"this kernel lacks a device type: {error}")
            raise
        compare(layout, count(20_000), found)
    for mine, total in zip(found, tallies, strict=True):
        total.include(mine)
    pairs, verdicts = found
    assert verdicts.true + verdicts.right + verdicts.false + verdicts.missed == len(layout.kinds)
    assert pairs.true or name == "pod", "a layout in which no reply is wrong shows nothing"
    assert pairs.mistakes == [] and verdicts.mistakes == []


def test_tunnel_of_the_kernel_is_not_at_risk() -> None:
    with ContainerHost() as host:
        try:
            host.node.ip("link add vx type vxlan id 5 dstport 4789 local 172.16.13.13", "link set vx up")
        except UdpwatchError as error:
            pytest.skip(f"this kernel has no VXLAN: {error}")
        with host.node.socket() as made:
            made.bind(("0.0.0.0", 4900))
            sockets = [each for each in list_all().sockets if each.netns == host.node.inode]
        with host.node.entered():
            judged = judge(sockets, read_networks())
        found = {each.socket.port: (str(each.risk), each.socket.kernel) for each in judged}
        assert found == {4789: ("none", True), 4900: ("virtual", False)}


# ---- the agent ----


def wildcard_server(namespace: Namespace, port: int) -> UdpSocket:
    """Start a server in a process of the namespace, and return its socket as it describes itself."""

    def serve() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.bind(("0.0.0.0", port))
            made.recv(1)

    child = namespace.spawn("server", serve)
    found: UdpSocket = wait_for(
        lambda: next((each for each in held_sockets().sockets if each.pid == child.pid), None), "the server"
    )
    return found


def risks_with(capabilities: Collection[Capability] | None, sockets: list[UdpSocket]) -> dict[int, str]:
    """Return what an agent with only these capabilities makes of sockets; None: as root."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            if capabilities is not None:
                drop_all_but(capabilities)
            risks = Risks()
            found = risks(sockets, 100.0) | risks(sockets, 200.0)
            os.write(writing, json.dumps({str(number): str(risk) for number, risk in found.items()}).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = json.load(pipe)
    os.waitpid(pid, 0)
    return {int(number): risk for number, risk in told.items()}


def test_agent_with_the_charts_capabilities_judges_pods(host: ContainerHost, port: int) -> None:
    """Without CAP_SYS_ADMIN it cannot enter namespaces; one address of each family is harmless in any of them."""
    on_node, in_pod = wildcard_server(host.node, port), wildcard_server(host.container, port)
    assert (on_node.netns, in_pod.netns) == (host.node.inode, host.container.inode)
    assert (on_node.pktinfo, on_node.address) == (False, "0.0.0.0")
    chart = (Capability.BPF, Capability.NET_ADMIN, Capability.PERFMON)
    sockets = [on_node, in_pod]
    assert risks_with(None, sockets) == {on_node.cookie: "virtual", in_pod.cookie: "none"}
    for capabilities in (chart, (*chart, Capability.SYS_PTRACE)):
        assert risks_with(capabilities, sockets) == {on_node.cookie: "unknown", in_pod.cookie: "none"}
