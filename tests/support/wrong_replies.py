"""A server on the node that replies to the container from the wrong address."""

from __future__ import annotations

from scene import PATIENCE_SECONDS, V4, Family, bound

from udpwatch.agent.testing.lab import ContainerHost


def wrong_replies(
    host: ContainerHost, port: int, times: int = 1, name: str = "wrong-server", family: Family = V4
) -> None:
    """Have a process of this name on the node reply ``times`` times; the container sends a request for each reply."""
    with bound(host.node, family.inet, family.wildcard, port) as server, host.container.socket(family.inet) as client:

        def serve() -> None:
            for _ in range(times):
                server.sendto(*server.recvfrom(100))

        process = host.node.spawn(name, serve)
        client.settimeout(PATIENCE_SECONDS)
        for _ in range(times):
            client.sendto(b"request", (family.eth0, port))
            assert client.recvfrom(100)[1][0] == family.docker0
        assert process.wait() == 0
