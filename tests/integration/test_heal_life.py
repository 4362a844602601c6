"""Healing ends with the agent, at once, and nothing is left; switching it on and off loses no reply."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from agents import Agent, temporary
from scene import PATIENCE_SECONDS, V4, V6, Family, bound
from scene_agent import NodeAgent
from waiting import wait_for

from udpwatch.agent.client.connection import Client
from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType
from udpwatch.agent.testing.lab import ContainerHost

SWITCHES = 1_000
GROWTH_KIB = 2_048


class Conversation:
    """A plain server on the node and a client in the container that takes replies from any source."""

    def __init__(self, host: ContainerHost, family: Family, port: int, held: ExitStack) -> None:
        self._server = held.enter_context(bound(host.node, family.inet, family.wildcard, port))
        self._client = held.enter_context(host.container.socket(family.inet))
        self._asked = family.eth0, port
        for end in (self._server, self._client):
            end.settimeout(PATIENCE_SECONDS)

    def source(self) -> str:
        """Ask once; return the source of the reply. Raises TimeoutError."""
        self._client.sendto(b"request", self._asked)
        self._server.sendto(*self._server.recvfrom(100))
        source: str = self._client.recvfrom(100)[1][0]
        return source


def attached() -> set[int]:
    """Return the ids of the programs on the sendmsg hooks of the node."""
    with closing(cgroup.find(None)) as root:
        kinds = (AttachType.CGROUP_UDP4_SENDMSG, AttachType.CGROUP_UDP6_SENDMSG)
        return {program for kind in kinds for program in bpf.program_query(root.fd, kind)}


@contextmanager
def asking(*conversations: Conversation) -> Iterator[Counter[str]]:
    """Ask all the time during the body; yields how many replies came from which source."""
    ended, seen = threading.Event(), Counter[str]()

    def ask(conversation: Conversation) -> None:
        while not ended.is_set():
            seen[conversation.source()] += 1

    threads = [threading.Thread(target=ask, args=(each,)) for each in conversations]
    for thread in threads:
        thread.start()
    yield seen
    ended.set()
    for thread in threads:
        thread.join()


def open_both(host: ContainerHost, port: int, held: ExitStack) -> list[Conversation]:
    return [Conversation(host, family, port + number, held) for number, family in enumerate((V4, V6))]


def test_killed_agent_heals_nothing_any_longer_and_the_next_one_does(host: ContainerHost, port: int) -> None:
    healed, alone = [V4.eth0, V6.eth0], [V4.docker0, V6.docker0]
    with ExitStack() as held:
        conversations = open_both(host, port, held)
        others = attached()
        assert [each.source() for each in conversations] == alone
        for ending in (signal.SIGKILL, signal.SIGTERM):
            with temporary() as folder, NodeAgent(host, Path(folder), "--heal=all") as agent:
                assert [each.source() for each in conversations] == healed
                own = attached() - others
                assert len(own) >= 4
                agent.stop(ending)
                assert [each.source() for each in conversations] == alone
                wait_for(lambda own=own: not own & attached(), "the programs to be gone")


def test_agent_that_takes_over_heals_without_a_gap(host: ContainerHost, port: int) -> None:
    """The new one starts before the old one ends, as in a rolling update with a surge."""
    with ExitStack() as held, temporary() as one, temporary() as other:
        conversations = open_both(host, port, held)
        old = held.enter_context(NodeAgent(host, Path(one), "--heal=all"))
        with asking(*conversations) as seen:
            new = held.enter_context(NodeAgent(host, Path(other), "--heal=all"))
            old.stop(signal.SIGTERM)
            total = seen.total()
            wait_for(lambda: seen.total() > total + 200, "replies after the old one")
        assert seen.keys() == {V4.eth0, V6.eth0}
        assert [new.wrong(port), new.wrong(port + 1)] == [0, 0]


def test_switching_on_and_off_loses_no_reply_and_leaks_nothing(host: ContainerHost, port: int) -> None:
    with ExitStack() as held, temporary() as folder:
        conversations = open_both(host, port, held)
        agent = held.enter_context(NodeAgent(host, Path(folder), "--heal=all"))

        def switch(times: int) -> None:
            for number in range(times):
                with Client(agent.socket) as client:
                    assert client.heal(bool(number % 2)).on == bool(number % 2)

        with asking(*conversations) as seen:
            switch(SWITCHES // 10)
            memory, descriptors = agent.resident_kib(), len(os.listdir(f"/proc/{agent.pid}/fd"))  # noqa: PTH208
            switch(SWITCHES)
            assert len(os.listdir(f"/proc/{agent.pid}/fd")) <= descriptors + 1  # noqa: PTH208
            assert agent.resident_kib() <= memory + GROWTH_KIB
        assert seen.keys() == {V4.eth0, V6.eth0, V4.docker0, V6.docker0}  # and none timed out

        def wrong() -> list[int]:
            return [_count(agent, each, "reply_source_mismatch") for each in (port, port + 1)]

        wait_for(lambda: wrong() == [seen[V4.docker0], seen[V6.docker0]], "the wrong replies")
        # A reply that was on its way when the switch came is healed, and not counted as such.
        for each, source in ((port, V4.eth0), (port + 1, V6.eth0)):
            assert seen[source] - SWITCHES <= _count(agent, each, "healed_replies") <= seen[source]


def _count(agent: Agent, port: int, name: str) -> int:
    return int(agent.metric(f"udpwatch_{name}_total", port=str(port)))


def test_frozen_agent_uses_no_address_that_is_gone(host: ContainerHost, port: int) -> None:
    """It cannot follow the addresses any longer; the kernel's own lists still decide."""
    extra = "172.16.13.99"
    with ExitStack() as held, temporary() as folder:
        host.node.ip(f"addr add {extra}/32 dev eth0")
        server = held.enter_context(bound(host.node, socket.AF_INET, "0.0.0.0", port))
        client = held.enter_context(host.container.socket())
        agent = held.enter_context(NodeAgent(host, Path(folder), "--heal=all"))
        client.settimeout(PATIENCE_SECONDS)
        client.sendto(b"request", (extra, port))
        _, peer = server.recvfrom(100)
        server.sendto(b"reply", peer)
        assert client.recvfrom(100)[1][0] == extra
        os.kill(agent.pid, signal.SIGSTOP)
        held.callback(os.kill, agent.pid, signal.SIGCONT)
        host.node.ip(f"addr del {extra}/32 dev eth0")
        server.sendto(b"reply", peer)
        assert client.recvfrom(100)[1][0] == host.DOCKER0
