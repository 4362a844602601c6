"""What an agent knows outlives it (--state): restarts, kills and upgrades lose no reply and count none twice."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, before_all, run_cli
from next_version import make_next_version
from scene import PATIENCE_SECONDS, V4, bound
from scene_agent import NodeAgent
from terminals import Prometheus, free_port
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

WINDOW = 3  # seconds: how long another version's programs learn
REPLIES = int(os.environ.get("UDPWATCH_REPLIES", "0"))  # at least so many in a rolling upgrade; 1000000: takes minutes


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with other layouts of the records that the programs and the agent share."""
    return make_next_version(tmp_path_factory.mktemp("next"))


class Stream:
    """Wrong replies in the background, until the block ends: `sent` then says how many. Or right ones."""

    def __init__(self, host: ContainerHost, port: int, bind: str = V4.wildcard, source: str = V4.docker0) -> None:
        self.sent = 0
        self._host, self._port, self._bind, self._source = host, port, bind, source
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        host = self._host
        with bound(host.node, V4.inet, self._bind, self._port) as server, host.container.socket(V4.inet) as client:

            def serve() -> None:
                while (request := server.recvfrom(100))[0] != b"end":
                    server.sendto(*request)

            process = host.node.spawn("wrong-server", serve)
            client.settimeout(PATIENCE_SECONDS)
            while not self._stopping.is_set():
                client.sendto(b"request", (V4.eth0, self._port))
                assert client.recvfrom(100)[1][0] == self._source
                self.sent += 1
            client.sendto(b"end", (V4.eth0, self._port))
            assert process.wait() == 0

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()


def events(agent: Agent, port: int) -> list[dict[str, Any]]:
    """Return the events of a port, by all agents of this folder."""
    written = map(json.loads, agent.events_file.read_text().splitlines())
    return [each for each in written if each["port"] == port]


def more_are_counted(agent: Agent, port: int) -> None:
    """Wait until an agent counts wrong replies."""
    before = agent.wrong(port)
    wait_for(lambda: agent.wrong(port) > before, "more wrong replies")


def settled(state: Path) -> None:
    """Wait until one generation of programs is left."""
    wait_for(lambda: len(list(state.glob("*/manifest"))) == 1, "the end of the other version's programs")


def test_replies_are_counted_while_no_agent_runs(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    with Agent(folder, f"--state={state}") as agent:
        wrong_replies(host, port, 10)
        agent.counted(port, 10)
        assert agent.stop() == 0
    wrong_replies(host, port, 7)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, 17) == 17
        wrong_replies(host, port, 3)
        assert agent.counted(port, 20) == 20
        agent.stop(signal.SIGKILL)
    wrong_replies(host, port, 5)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, 25) == 25
    assert "were removed" in run_cli("detach", f"--state={state}").stdout
    assert not state.exists()


def test_restarts_under_load_lose_nothing_and_count_nothing_twice(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    with Agent(folder, f"--state={state}") as agent, Stream(host, port) as stream:
        more_are_counted(agent, port)
        agent.stop()
        for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            with Agent(folder, f"--state={state}") as another:
                more_are_counted(another, port)
                another.stop(end)
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, stream.sent) == stream.sent


def test_rolling_upgrade_under_load_is_exact_in_prometheus(
    host: ContainerHost, folder: Path, port: int, other_port: int, state: Path, next_version: Path
) -> None:
    """To another layout and back, with a kill after each; `increase()` sees one counter that never falls. No right
    reply is judged wrong.
    """
    listen = f"127.0.0.1:{free_port()}"
    flags = (f"--state={state}", f"--window={WINDOW}", f"--metrics-listen={listen}")
    env = os.environ | before_all(next_version)
    series = f'udpwatch_reply_source_mismatch_total{{port="{port}"}}'
    with Prometheus(folder, [listen]) as prometheus, Agent(folder, *flags) as agent:
        prometheus.ready()
        wrong_replies(host, port)
        wait_for(lambda: prometheus.value(series) == 1, "the first scrape with a wrong reply")
        with Stream(host, other_port, V4.eth0, V4.eth0) as right, Stream(host, port) as stream:

            def sent(share: float) -> None:
                wait_for(lambda: stream.sent >= share * REPLIES, f"{share * REPLIES:.0f} wrong replies", 1_000)

            more_are_counted(agent, port)
            sent(0.25)
            agent.stop()
            with Agent(folder, *flags, env=env) as another:
                more_are_counted(another, port)
                settled(state)
                more_are_counted(another, port)
                sent(0.5)
                another.stop(signal.SIGKILL)
            with Agent(folder, *flags) as another:
                settled(state)
                more_are_counted(another, port)
                sent(1)
                another.stop(signal.SIGKILL)
        with Agent(folder, *flags) as another:
            assert another.counted(port, stream.sent + 1) == stream.sent + 1
            assert another.wrong(other_port) == 0
            print(f"{stream.sent} wrong replies and {right.sent} right ones")
            wait_for(lambda: prometheus.value(series) == stream.sent + 1, "the last scrape")
            assert prometheus.value(f"resets({series}[1h])") == 0
            increase = prometheus.value(f"increase({series}[1h])")
    # Prometheus extrapolates to the ends of the range, by half a scrape interval at most at each end.
    assert stream.sent <= increase <= stream.sent * 1.1


def test_agent_that_is_killed_in_an_upgrade_is_followed_by_one_that_finishes_it(
    host: ContainerHost, folder: Path, port: int, state: Path, next_version: Path
) -> None:
    flags = (f"--state={state}", f"--window={WINDOW}")
    env = os.environ | before_all(next_version)
    with Agent(folder, *flags) as agent, Stream(host, port) as stream:
        more_are_counted(agent, port)
        agent.stop(signal.SIGKILL)
        with Agent(folder, *flags, env=env) as another:
            more_are_counted(another, port)
            assert len(list(state.glob("*/manifest"))) == 2
            another.stop(signal.SIGKILL)
        with Agent(folder, *flags, env=env) as another:
            settled(state)
            more_are_counted(another, port)
    with Agent(folder, *flags, env=env) as agent:
        assert agent.counted(port, stream.sent) == stream.sent
        assert not list(state.glob("*/programs/egress_learning*")), "they are of no use now"


def test_upgrade_that_is_abandoned_leaves_only_the_version_that_counts(
    host: ContainerHost, folder: Path, port: int, state: Path, next_version: Path
) -> None:
    env = os.environ | before_all(next_version)
    with Agent(folder, f"--state={state}") as agent, Stream(host, port) as stream:
        more_are_counted(agent, port)
        agent.stop()
        with Agent(folder, f"--state={state}", env=env) as another:  # it learns for 30 s
            more_are_counted(another, port)
            another.stop()
        with Agent(folder, f"--state={state}") as another:
            assert len(list(state.glob("*/manifest"))) == 1
            more_are_counted(another, port)
            another.stop()
    with Agent(folder, f"--state={state}") as agent:
        assert agent.counted(port, stream.sent) == stream.sent


def test_events_and_servers_go_on(host: ContainerHost, folder: Path, port: int, state: Path) -> None:
    def requests(agent: Agent) -> float:
        return agent.metric("udpwatch_server_requests_total", port=str(port))

    with Agent(folder, f"--state={state}") as agent:
        wrong_replies(host, port, 3)
        wait_for(lambda: requests(agent) == 3, "three requests")
        agent.stop()
    wrong_replies(host, port, 4)
    with Agent(folder, f"--state={state}") as agent:
        wait_for(lambda: requests(agent) == 7, "four more requests")
        wait_for(lambda: len(events(agent, port)) == 7, "the events that waited")
        assert [each["count"] for each in events(agent, port)] == list(range(1, 8))
        assert agent.metric("udpwatch_replies_checked_total") >= 7


def test_another_agent_may_not_use_the_folder(folder: Path, state: Path) -> None:
    with Agent(folder, f"--state={state}"):
        done = run_cli("run", f"--state={state}", "--socket=off", "--metrics-listen=off")
        assert (done.returncode, "another agent uses it" in done.stderr) == (1, True)
        done = run_cli("detach", f"--state={state}")
        assert (done.returncode, "another agent uses it" in done.stderr) == (1, True)


def test_agent_without_a_usable_folder_says_so_and_runs(folder: Path) -> None:
    with Agent(folder, f"--state={folder}/state") as agent:
        assert any("it is not in a bpffs; mount one" in line for line in agent.snapshot()["notes"])


def test_healing_ends_with_the_agent_and_the_next_one_has_its_own_selection(
    host: ContainerHost, folder: Path, port: int, state: Path
) -> None:
    def source() -> str:
        with host.container.socket(V4.inet) as client, bound(host.node, V4.inet, V4.wildcard, port) as server:
            client.settimeout(PATIENCE_SECONDS)
            client.sendto(b"request", (V4.eth0, port))
            server.sendto(*server.recvfrom(100))
            return str(client.recvfrom(100)[1][0])

    with NodeAgent(host, folder, f"--state={state}", f"--heal={port}") as agent:
        wait_for(lambda: source() == V4.eth0, "a healed reply")
        agent.stop(signal.SIGKILL)
    assert source() == V4.docker0
    with NodeAgent(host, folder, f"--state={state}", "--heal=standby") as agent:
        wait_for(lambda: agent.wrong(port) >= 1, "the reply that no agent healed")
        assert source() == V4.docker0
        assert agent.metric("udpwatch_healed_replies_total", port=str(port)) >= 1
