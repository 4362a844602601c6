"""The agent's socket: followers that read, that are slow, that never read; and doctor's requests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
from pathlib import Path

from agents import Agent, run_cli
from scene import ask
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.client.connection import Client
from udpwatch.agent.testing.lab import ContainerHost, Lab


def test_follower_gets_each_wrong_reply(agent: Agent, host: ContainerHost, port: int) -> None:
    with Client(agent.socket, 30) as client:
        told = client.follow()
        client._socket.settimeout(60)  # nothing may come: then the test shall fail, not wait
        wrong_replies(host, port, 2)
        own = (answer["event"] for answer in told if answer.get("event", {}).get("port") == port)
        heard = list(itertools.islice(own, 2))
    assert [(event["port"], event["count"]) for event in heard] == [(port, 1), (port, 2)]
    with Client(agent.socket, 30) as client:
        assert [event for event in client.events(1000) if event["port"] == port] == heard
        assert len(client.events(1)) == 1
        assert client.events(0) == []


def test_follower_that_never_reads_loses_only_its_own_events(folder: Path, host: ContainerHost, port: int) -> None:
    """It gets the number of events that it lost, and delays nobody else."""
    with Agent(folder, "--events-per-second=100000") as agent, Client(agent.socket, 60) as lazy:
        told = lazy.follow()
        with Client(agent.socket, 60) as other, host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            request = ask(client, host.ETH0, port, server)

            def newest() -> list[tuple[int, int]]:
                """Another test may answer wrongly meanwhile."""
                return [(event["port"], event["count"]) for event in other.events(20)]

            for count in range(1, 5_001):
                server.sendto(*request)
                if count % 250 == 0:  # no more than the ring buffer holds
                    wait_for(lambda count=count: (port, count) in newest(), "the event")
            assert agent.counted(port, 5_000) == 5_000
        heard, lost = 0, 0
        while heard + lost < 5_000:
            answer = next(told)
            heard += "event" in answer
            lost += answer.get("lost", 0)
        assert lost > 0


def test_followers_may_disconnect(agent: Agent, host: ContainerHost, port: int) -> None:
    for _ in range(40):
        client = Client(agent.socket, 30)
        client.follow()
        client.close()
    wrong_replies(host, port, 1)
    wait_for(lambda: agent.wrong(port) == 1, "the count")
    descriptors = Path(f"/proc/{agent.pid}/fd")
    wait_for(lambda: len(list(descriptors.iterdir())) < 60, "the connections to be closed")


def test_invalid_request_gets_an_error(agent: Agent) -> None:
    requests = [b"{}", b"[1]", b'{"get":"events"}', b'{"get":"events","limit":-1}', b'{"get":"events","limit":true}']
    requests += [b'{"get":"snapshot","more":1}', b'{"follow":"everything"}', b"7", b'"x"']
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(agent.socket))
        with client.makefile("rwb") as lines:
            for request in requests:
                lines.write(request + b"\n")
                lines.flush()
                answer = json.loads(lines.readline())
                assert answer["v"] == 1
                assert ("error" in answer) == (request != b'{"get":"events","limit":true}'), request


def test_hostile_clients_disturb_nothing(agent: Agent, host: ContainerHost, port: int) -> None:
    """Random bytes, requests cut in half, lines without an end, and connections that end in between."""
    pick = random.Random(port)  # noqa: S311
    requests = [b'{"get": "snapshot"}\n', b'{"follow": "events"}\n', b'{"get": "events", "limit": 1000}\n']
    before = agent.resident_kib()
    for number in range(400):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(agent.socket))
            with contextlib.suppress(ConnectionError):
                request = pick.choice(requests)
                client.sendall(pick.choice([request, request[: pick.randrange(len(request))], b"[" * 60_000 + b"\n"]))
                client.sendall(pick.randbytes(pick.choice([0, 10, 1000, 200_000])))
                if number % 2:
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):
                        pass
    wrong_replies(host, port, 3)
    assert agent.counted(port, 3) == 3
    assert agent.get("/readyz")[0] == 200
    assert agent.resident_kib() < before + 16_384
    assert [line for line in agent.log if "Traceback" in line or "Error" in line] == []


def test_doctor_reports_on_the_running_agent(agent: Agent) -> None:
    with Client(agent.socket, 30) as client:
        report = client.doctor()
    assert report["ready"] is True
    assert "CAP_BPF" in report["capabilities"]
    assert "CAP_SYS_ADMIN" not in report["capabilities"] or report["mode"] == "netlink"
    assert {"ingress", "egress"} <= {probe["name"] for probe in report["probes"]}


def test_doctor_shows_the_running_agents_capabilities(agent: Agent) -> None:
    """They are shown alone and beside what this machine supports."""
    here = f"--connect={agent.socket}"
    done = run_cli("doctor", "--agent", here)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"process {agent.pid}, mode packet, capabilities: CAP_BPF CAP_DAC_OVERRIDE CAP_NET_ADMIN" in " ".join(
        done.stdout.split()
    )
    assert done.stdout.endswith("\nThe agent works.\n")
    report = json.loads(run_cli("doctor", "--json", here).stdout)
    (check,) = [check for check in report["checks"] if check["name"] == "agent"]
    assert check["status"] == "ok" and "capabilities: " in check["found"]
    agent.stop()
    done = run_cli("doctor", "--agent", here)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot connect to {agent.socket}: no agent is listening" in done.stderr


def test_doctor_fails_when_the_agent_is_not_ready(folder: Path) -> None:
    """The agent's loopback is down: it can load and attach everything, but does not see its own datagrams."""
    with Lab() as lab:
        silent = lab.namespace("silent")
        silent.ip("link set lo down")
        with Agent(folder, "--metrics-listen=off", preexec_fn=silent.enter_in_child, ready=False) as agent:
            wait_for(lambda: any("not ready" in line for line in agent.log), "its word")
            done = run_cli("doctor", "--agent", f"--connect={agent.socket}")
    assert done.returncode == 1
    assert "not ready (the self-test failed: the programs did not see our own datagram)" in " ".join(
        done.stdout.split()
    )
    assert "The agent does not work" in done.stdout


def test_socket_belongs_to_the_group_in_the_settings(folder: Path) -> None:
    with Agent(folder, "--socket-group=nogroup") as agent:
        assert agent.socket.stat().st_gid == 65534
        assert oct(agent.socket.stat().st_mode & 0o777) == "0o660"
    done = run_cli("run", f"--socket={folder}/other", "--metrics-listen=off", "--socket-group=nobody-has-it")
    assert done.returncode == 1
    assert "--socket-group: unknown group 'nobody-has-it'" in done.stderr


def test_replay_needs_no_root(folder: Path, host: ContainerHost, port: int) -> None:
    """Events of a real agent are replayed as user nobody: the same findings with the same counts."""
    with Agent(folder, "--events-per-second=1000") as agent:
        wrong_replies(host, port, 23)
        wait_for(lambda: agent.events_file.read_text().count("\n") >= 23, "the events")
        assert agent.counted(port, 23) == 23
        (before,) = [row for row in agent.snapshot()["rows"] if row["port"] == port]
        agent.stop()
    folder.chmod(0o1777)
    agent.events_file.chmod(0o644)
    recorded = folder / "recorded.jsonl"
    agent.events_file.rename(recorded)

    def nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    reachable = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-r", __file__], check=False
    )
    as_nobody = {"preexec_fn": nobody} if reachable.returncode == 0 else {}  # the checkout may be root's alone
    with Agent(folder, f"--replay={recorded}", **as_nobody) as played:
        wait_for(lambda: played.wrong(port) == 23, "what was recorded")
        (after,) = [row for row in played.snapshot()["rows"] if row["port"] == port]
        assert played.snapshot()["mode"] == "replay"
        same = ("port", "expected", "actual", "verdict", "cause", "family", "count")
        assert {key: after[key] for key in same} == {key: before[key] for key in same}
        assert after["sender"]["process"] == before["sender"]["process"]
