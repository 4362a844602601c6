"""Connected servers are not healed: connect() has fixed the source, and the sendmsg hooks do not run (decision 009)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from healed import Healed
from scene import Family, ask, both, bound
from sensors import Watch

from udpwatch.agent.model import Cause, Verdict
from udpwatch.agent.testing.lab import ContainerHost


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """A sensor that can heal."""
    with contextlib.closing(Watch(heal=True)) as opened:
        yield opened


@pytest.fixture(scope="module")
def healed(watch: Watch, host: ContainerHost) -> Iterator[Healed]:
    """Healing is on for every port of the node."""
    with contextlib.closing(Healed(watch.sensor, host.node)) as healing, healing.on():
        healing.follow()
        yield healing


def is_received(server: socket.socket) -> bool:
    server.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        return bool(server.recvfrom(100))
    return False


@both
def test_connected_server_stays_wrong_and_its_finding_says_connected(
    watch: Watch, healed: Healed, host: ContainerHost, family: Family, port: int
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as other,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(other, family.eth0, port, server)
        server.sendto(data, peer)
        assert other.recvfrom(100)[1][0] == family.eth0  # healed, as long as the server is not connected
        data, peer = ask(client, family.eth0, port, server)
        server.connect(peer)
        assert server.getsockname()[0] == family.docker0
        server.send(data)
        assert client.recvfrom(100)[1][0] == family.docker0
        client.sendto(data, (family.eth0, port))
        assert not is_received(server)  # the kernel delivers to this socket only what asks docker0's address
    causes = {(finding.verdict == Verdict.HEALED, finding.cause) for finding in watch.findings(port)}
    assert causes == {(True, Cause.KERNEL_CHOSEN), (False, Cause.CONNECTED)}
    assert not healed.refused().total()


@both
def test_redirect_makes_a_connected_server_right(
    watch: Watch, healed: Healed, host: ContainerHost, family: Family, port: int
) -> None:
    """docs/heal.md recommends this rule: NAT asks the address from which the server replies, and turns it back."""
    table = f"redirect_{port}_{family.number}"
    host.node.nft(
        f"table inet {table} {{ chain prerouting {{ type nat hook prerouting priority dstnat; "
        f"udp dport {port} redirect; }}; }}"
    )
    with bound(host.node, family.inet, family.wildcard, port) as server, host.container.socket(family.inet) as client:
        data, peer = ask(client, family.eth0, port, server)
        server.connect(peer)
        for _ in range(2):
            server.send(data)
            assert client.recvfrom(100)[1][0] == family.eth0
            client.sendto(data, (family.eth0, port))
            assert is_received(server)
    host.node.run(["nft", "delete", "table", "inet", table])
    assert not watch.findings(port)
