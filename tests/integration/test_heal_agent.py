"""The agent heals what its settings and `udpwatch heal` select, reports it, and stops at once."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, as_nobody, run_cli, temporary
from scene import V4, V6, Family, bound
from scene_agent import NodeAgent
from waiting import wait_for

from udpwatch.agent.client.connection import Client
from udpwatch.agent.errors import CannotRun
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, die_with_parent


def exchange(host: ContainerHost, family: Family, port: int, count: int, asked: str = "") -> list[str]:
    """Ask a plain server on the node; return the source of each reply that the container's connected socket got."""
    sources = []
    with bound(host.node, family.inet, family.wildcard, port) as server, host.container.socket(family.inet) as client:
        client.settimeout(1)
        server.settimeout(5)
        client.connect((asked or family.eth0, port))
        for _ in range(count):
            client.send(b"request")
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)
            with contextlib.suppress(OSError):
                client.recv(100)
                sources.append(client.getpeername()[0])
    return sources


def healed(agent: Agent, port: int) -> int:
    return int(agent.metric("udpwatch_healed_replies_total", port=str(port)))


@pytest.fixture(scope="module")
def healing(host: ContainerHost) -> Iterator[Agent]:
    with temporary() as folder, NodeAgent(host, Path(folder), "--heal=standby") as agent:
        yield agent


@pytest.mark.parametrize("family", [V4, V6], ids=lambda family: family.name)
def test_switched_port_is_healed_counted_and_left_alone_again(
    host: ContainerHost, healing: Agent, family: Family, port: int
) -> None:
    with Client(healing.socket) as client:
        assert exchange(host, family, port, 1) == []
        client.heal(True, [port])
        assert len(exchange(host, family, port, 20)) == 20
        client.heal(False, [port])
        assert exchange(host, family, port, 1) == []
        client.heal(False)
        assert client.heal().ports_on == ()
        assert not client.heal().on
    wait_for(lambda: healed(healing, port) == 20, "20 healed replies")
    assert healing.counted(port, 2) == 2  # before and after
    events = [json.loads(line) for line in healing.events_file.read_text().splitlines()]
    own = [event for event in events if event["port"] == port]
    assert {(event["verdict"], event["healed"]) for event in own} == {("new", False), ("healed", True)}
    assert all(event["expected"] == family.eth0 for event in own)
    assert all(event["actual"] == family.eth0 for event in own if event["healed"])
    rows = [row for row in healing.snapshot()["rows"] if row["port"] == port]
    assert {(row["verdict"], row["count"]) for row in rows} == {("new", 2), ("healed", 20)}


def test_only_root_may_switch(host: ContainerHost, healing: Agent, port: int) -> None:
    healing.socket.chmod(0o666)
    healing.socket.parent.chmod(0o755)
    switch = run_cli("heal", "on", str(port), f"--connect={healing.socket}", wrapper=as_nobody())
    assert switch.returncode == 1
    assert "only root may switch healing on or off" in switch.stderr
    shown = run_cli("heal", "status", f"--connect={healing.socket}", wrapper=as_nobody())
    assert (shown.returncode, shown.stderr) == (0, "")
    assert str(port) not in shown.stdout


def test_readers_cannot_keep_the_switch_from_root(healing: Agent) -> None:
    """A member of the socket's group may hold every place that others have."""
    healing.socket.chmod(0o666)
    healing.socket.parent.chmod(0o755)
    hold = (
        "import socket, sys, time\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(40)]\n"
        "for each in held:\n"
        "    each.connect(sys.argv[1])\n"
        '    each.sendall(b\'{"follow": "events"}\\n\')\n'
        "print(held[0].recv(100), flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = [*as_nobody(), "/usr/bin/python3", "-c", hold, str(healing.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent) as reader:
        assert reader.stdout
        assert b"following" in reader.stdout.readline()
        done = run_cli("heal", "off", f"--connect={healing.socket}")
        reader.kill()
    assert (done.returncode, done.stderr) == (0, "")


def test_command_shows_and_switches(host: ContainerHost, healing: Agent, port: int) -> None:
    connect = f"--connect={healing.socket}"
    on = run_cli("heal", "on", str(port), connect)
    assert f"switched on    port {port}" in on.stdout
    assert len(exchange(host, V4, port, 3)) == 3
    wait_for(lambda: healed(healing, port) == 3, "the counts")
    status = json.loads(run_cli("heal", "status", "--json", connect).stdout)
    assert status["ports_on"] == [port]
    assert [row["count"] for row in status["healed"] if row["port"] == port] == [3]
    assert f"no server on port {port + 1}/udp is known" in run_cli("heal", "on", f"{port},{port + 1}", connect).stderr
    off = run_cli("heal", "off", connect)
    assert off.stdout.splitlines()[0] == "healing        off"
    assert f"switched on    port {port}" not in off.stdout
    nothing = run_cli("heal", "on", connect)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "the settings select no server" in nothing.stderr
    report = run_cli("doctor", "--agent", connect).stdout
    assert "healing         off; the settings select: no port" in report


def test_client_of_two_addresses_is_refused_and_counted(host: ContainerHost, healing: Agent, port: int) -> None:
    def refused() -> float:
        return healing.metric("udpwatch_heal_refused_total", reason="several-addresses")

    before = refused()
    with Client(healing.socket) as client:
        client.heal(True, [port])
        with bound(host.node, V4.inet, V4.wildcard, port) as server, host.container.socket(V4.inet) as asking:
            for address in (V4.eth0, V4.docker0):
                asking.sendto(b"request", (address, port))
                _, peer = server.recvfrom(100)
            server.sendto(b"reply", peer)
        client.heal(False)
    wait_for(lambda: refused() == before + 1, "the refusal")
    assert healed(healing, port) == 0


def test_dry_run_changes_nothing_and_counts(host: ContainerHost, folder: Path, port: int) -> None:
    with NodeAgent(host, folder, f"--heal={port}", "--heal-dry-run") as agent:
        assert exchange(host, V4, port, 3) == []
        wait_for(lambda: agent.metric("udpwatch_heal_dry_run_replies_total") == 3, "the counts")
        assert agent.counted(port, 3) == 3
        assert healed(agent, port) == 0
        status = run_cli("heal", "status", f"--connect={agent.socket}").stdout
        assert "3 replies would be healed" in status
        assert re.search(rf"3  {port} +172.16.13.13 ", status)
        assert run_cli("heal", "off", f"--connect={agent.socket}").stdout.splitlines()[0] == "healing        off"


def test_all_ports_are_those_of_servers(host: ContainerHost, folder: Path, port: int) -> None:
    """A client's socket keeps the source that routing chooses, whoever writes to it."""
    with NodeAgent(host, folder, "--heal=all") as agent:
        assert len(exchange(host, V4, port, 3)) == 3
        with host.node.socket(V4.inet) as server, host.container.socket(V4.inet) as client:
            server.bind((V4.wildcard, 0))
            server.settimeout(5)
            chosen = server.getsockname()[1]
            client.settimeout(5)
            client.sendto(b"request", (V4.eth0, chosen))
            _, peer = server.recvfrom(100)
            server.sendto(b"reply", peer)
            assert client.recvfrom(100)[1][0] == V4.docker0
            with Client(agent.socket) as connection:
                connection.heal(True, [chosen])
            server.sendto(b"reply", peer)
            assert client.recvfrom(100)[1][0] == V4.eth0


def test_selected_process_is_healed_in_its_own_namespace(host: ContainerHost, folder: Path, port: int) -> None:
    """The agent runs elsewhere, finds the server's namespace, and follows it until the server has ended."""
    with Agent(folder, "--heal-process=heal-*") as agent:
        server = host.node.socket(V4.inet)
        other = host.node.socket(V4.inet)
        with server, other:
            server.bind((V4.wildcard, port))
            other.bind((V4.wildcard, port + 1))
            ours = host.node.spawn("heal-me", lambda: servers.plain(server))
            theirs = host.node.spawn("not-me", lambda: servers.plain(other))
        wait_for(lambda: _asks(host, port), "the server to be healed")
        assert not _asks(host, port + 1)
        status = run_cli("heal", "status", f"--connect={agent.socket}").stdout
        assert "2 network namespaces" in status
        ours.stop()
        theirs.stop()
        wait_for(lambda: agent.snapshot()["healing"]["namespaces"] == 1, "the namespace to be left")


def _asks(host: ContainerHost, port: int) -> bool:
    with host.container.socket(socket.AF_INET) as client:
        client.settimeout(0.3)
        client.connect((V4.eth0, port))
        client.send(b"request")
        try:
            return bool(client.recv(100))
        except OSError:
            return False


def test_port_of_another_namespace_is_reported(host: ContainerHost, folder: Path, port: int) -> None:
    """A port selects in the agent's own namespace; a server elsewhere stays wrong, and the status says why."""
    with Agent(folder, f"--heal={port}") as agent:
        with host.node.socket(V4.inet) as server:
            server.bind((V4.wildcard, port))
            process = host.node.spawn("elsewhere", lambda: servers.plain(server))

        def reported() -> bool:
            assert not _asks(host, port)
            return any("elsewhere" in each and "--heal-process" in each for each in _healing(agent)["not_healed"])

        wait_for(reported, "the report")
        process.stop()


def _healing(agent: Agent) -> dict[str, Any]:
    healing: dict[str, Any] = agent.snapshot()["healing"]
    return healing


def test_without_the_right_to_enter_it_says_which_namespace_is_not_healed(
    host: ContainerHost, folder: Path, port: int
) -> None:
    wrapper = ("setpriv", "--bounding-set=-sys_admin,-sys_ptrace", "--inh-caps=-sys_admin,-sys_ptrace")
    with Agent(folder, "--heal-process=heal-*", wrapper=wrapper) as agent:
        with host.node.socket(V4.inet) as server:
            server.bind((V4.wildcard, port))
            process = host.node.spawn("heal-me", lambda: servers.plain(server))
        assert not _asks(host, port)
        lines = wait_for(lambda: agent.snapshot()["healing"]["not_healed"], "the report")
        assert any("heal-me" in line and "CAP_SYS_ADMIN" in line for line in lines), lines
        assert not _asks(host, port)
        process.stop()


def test_without_kernel_memory_the_agent_runs_and_heals_nothing(host: ContainerHost, folder: Path, port: int) -> None:
    """The programs must read the kernel's own list of addresses."""
    wrapper = ("setpriv", "--bounding-set=-perfmon,-sys_admin", "--inh-caps=-perfmon,-sys_admin")
    try:
        agent = Agent(folder, f"--heal={port}", wrapper=wrapper)
    except CannotRun:
        pytest.skip("by design: this kernel's verifier needs CAP_PERFMON (docs/kernels.md)")
    with agent:
        assert len([line for line in agent.log if "cannot heal" in line]) == 1
        status = run_cli("heal", "status", f"--connect={agent.socket}")
        assert (status.returncode, status.stdout.splitlines()[0][:25]) == (1, "healing        nothing is")
        assert "cannot heal" in run_cli("heal", "on", f"--connect={agent.socket}").stderr
        assert agent.metric("udpwatch_heal_active") == 0


def test_agent_without_healing_refuses_to_switch(folder: Path) -> None:
    """The kill switch succeeds: nothing is healed."""
    with Agent(folder) as agent:
        on, off = (run_cli("heal", word, "53", f"--connect={agent.socket}") for word in ("on", "off"))
    assert on.returncode == 1
    assert "--heal standby" in on.stderr
    assert off.returncode == 0
    assert "nothing is healed" in off.stdout
