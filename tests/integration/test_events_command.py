"""`udpwatch events` and `udpwatch explain` beside a real agent."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from agents import COMMAND, Agent, as_nobody, run_cli
from jsonschema import Draft202012Validator
from repository import DOCS
from scene import V6, ask
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.client.connection import Client
from udpwatch.agent.testing.lab import ContainerHost, die_with_parent

SCHEMA = DOCS / "event.schema.json"
PATIENCE_SECONDS = 60


def kept(agent: Agent, port: int, count: int) -> list[dict[str, Any]]:
    """Wait until the agent keeps so many events of a port; returns them."""

    def events() -> list[dict[str, Any]] | None:
        with Client(agent.socket, PATIENCE_SECONDS) as client:
            found = [event for event in client.events(1000) if event["port"] == port]
        return found if len(found) >= count else None

    found: list[dict[str, Any]] = wait_for(events, f"{count} events")
    return found


class Command:
    """`udpwatch events`, running."""

    def __init__(self, agent: Agent, *words: str, stdout: int = subprocess.PIPE, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "events", f"--connect={agent.socket}", *words],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
            env={**os.environ, **environment},
        )

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout
        return self.process.stdout

    def line(self) -> str:
        """Read the next line."""
        assert select.select([self.out], [], [], PATIENCE_SECONDS)[0], "no line came"
        return self.out.readline()

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Wait for the end, or send a signal; returns exit status and stderr."""
        if number is not None:
            self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, complaints


@contextmanager
def following(agent: Agent, *words: str, **options: Any) -> Iterator[Command]:
    command = Command(agent, *words, **options)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()
        for stream in (command.process.stdout, command.process.stderr):
            if stream:
                stream.close()


def test_wrong_reply_is_printed_as_it_happens(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, name="first")
    kept(agent, port, 1)
    with following(agent, "--since=1h", f"--port={port}") as command:
        assert " first " in command.line()  # what is kept comes after the following began
        wrong_replies(host, port, name="second")
        words = command.line().split()
        assert words[1:8] == ["second", str(port), host.ETH0, "->", host.DOCKER0, "new", "kernel-chosen"]
        assert words[8] == host.CONTAINER
        assert command.end(signal.SIGINT) == (130, "")


def test_filters_select_events(agent: Agent, host: ContainerHost, port: int) -> None:
    for name in ("alpha-1", "alpha-2", "beta"):
        wrong_replies(host, port, name=name)
    kept(agent, port, 3)

    def shown(*words: str) -> list[str]:
        done = run_cli("events", f"--connect={agent.socket}", "--no-follow", "--json", f"--port={port}", *words)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line)["process"] for line in done.stdout.splitlines()]

    assert shown() == ["alpha-1", "alpha-2", "beta"]
    assert shown("--process=alpha-2") == ["alpha-2"]
    assert shown("--process=alpha-*", "--verdict=new") == ["alpha-1", "alpha-2"]
    assert shown("--verdict=untracked") == []
    assert shown("--pod=none") == []
    assert shown("--namespace=none") == []
    assert shown("--since=1h") == ["alpha-1", "alpha-2", "beta"]


def test_since_selects_events(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, name="earlier")
    first = kept(agent, port, 1)[0]["time"]

    def later() -> bool:
        """Wait until the clock shows another millisecond."""
        wrong_replies(host, port, name="later")
        return bool(kept(agent, port, 2)[-1]["time"] > first)

    wait_for(later, "a later event")
    events = kept(agent, port, 2)
    done = run_cli("events", f"--connect={agent.socket}", f"--since={events[-1]['time']}", "--no-follow", "--json")
    told = [event for event in map(json.loads, done.stdout.splitlines()) if event["port"] == port]
    assert [event["process"] for event in told] == ["later"] * len(told)
    assert events[-1] in told


@pytest.mark.parametrize("words", [["--since=yesterday"], ["--port=0"], ["--port=x"], ["--verdict=bad"]])
def test_wrong_usage_ends_with_status_2(words: list[str]) -> None:
    done = run_cli("events", *words)
    assert done.returncode == 2
    assert words[0].partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_real_events_are_valid(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port)
    wrong_replies(host, port, family=V6)
    kept(agent, port, 2)
    done = run_cli("events", f"--connect={agent.socket}", "--json", "--no-follow")
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()), format_checker=Draft202012Validator.FORMAT_CHECKER)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["family"] for event in events if event["port"] == port} == {4, 6}
    for event in (*events, *map(json.loads, agent.events_file.read_text().splitlines())):
        validator.validate(event)


def test_slow_reader_gets_the_number_of_missed_events(folder: Path, host: ContainerHost, port: int) -> None:
    """The agent waits for no reader."""
    sent = 6_000
    with (
        Agent(folder, "--events-per-second=100000") as agent,
        following(agent, "--since=1h", f"--port={port}", "--json") as command,
        Client(agent.socket, PATIENCE_SECONDS) as other,
        host.node.socket() as server,
        host.container.socket() as client,
    ):
        server.bind(("0.0.0.0", port))
        request = ask(client, host.ETH0, port, server)

        def arrived(count: int) -> bool:
            """Whether the agent has the event or has lost it: events of other tests may fill the ring buffer."""
            told = [event["count"] for event in other.events(1_000) if event["port"] == port]
            return told[-1:] == [count] or agent.wrong(port) >= count

        server.sendto(*request)
        heard, said = [command.line()], list[str]()  # it follows
        for count in range(2, sent + 1):
            server.sendto(*request)
            if count % 250 == 0:  # no more than the ring buffer holds
                wait_for(lambda count=count: arrived(count), "the event")
        # Now it reads on, in threads: neither of its pipes must hold the other up.
        assert command.process.stderr
        readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for stream, lines in ((command.out, heard), (command.process.stderr, said))
        ]
        for reader in readers:
            reader.start()

        def caught_up() -> bool:
            server.sendto(*request)
            return bool(json.loads(heard[-1])["count"] > sent)

        wait_for(caught_up, "an event that came when it read on")
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(PATIENCE_SECONDS) == 130
        for reader in readers:
            reader.join(PATIENCE_SECONDS)
        counts = [json.loads(line)["count"] for line in heard]
        assert counts == sorted(set(counts))
        assert missing(said) > 0
        others = [line for line in agent.events_file.read_text().splitlines() if json.loads(line)["port"] != port]
        if not others and not agent.metric("udpwatch_events_lost_total"):
            assert counts[-1] - len(counts) == missing(said)


def missing(said: list[str]) -> int:
    """Return how many missed events `udpwatch events` reports."""
    found = [
        re.fullmatch(r"udpwatch: (\d+) events are missing here: this reader was too slow\n", line) for line in said
    ]
    assert all(found), said
    return sum(int(each[1]) for each in found if each)


def test_end_of_the_agent_ends_the_command_with_an_error(folder: Path, host: ContainerHost, port: int) -> None:
    with Agent(folder) as agent:
        wrong_replies(host, port)
        with following(agent, "--since=1h") as command:
            command.line()
            agent.stop()
            status, complaints = command.end()
    assert status == 1
    problem = f"cannot read from the agent on {agent.socket}: it closed the connection"
    assert complaints == f"udpwatch: {problem}; see the agent's log\n"


def test_missing_agent_is_an_error(folder: Path) -> None:
    for command in ("events", "explain"):
        done = run_cli(command, f"--connect={folder}/none")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no agent is listening" in done.stderr
        assert done.stderr.count("\n") == 1


def test_missing_permission_is_an_error(agent: Agent) -> None:
    done = run_cli("events", f"--connect={agent.socket}", wrapper=as_nobody())
    assert done.returncode == 1
    assert "permission denied" in done.stderr


def test_closed_output_ends_the_command_quietly(agent: Agent, host: ContainerHost, port: int) -> None:
    """As in `udpwatch events | head -1`."""
    wrong_replies(host, port)
    kept(agent, port, 1)
    with following(agent, "--since=1h", f"--port={port}") as command:
        command.line()
        command.out.close()
        wrong_replies(host, port)
        assert command.process.wait(PATIENCE_SECONDS) == 0
        assert command.process.stderr
        assert command.process.stderr.read() == ""


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_output_on_a_terminal_is_coloured(agent: Agent, host: ContainerHost, port: int, no_colour: str) -> None:
    wrong_replies(host, port)
    kept(agent, port, 1)
    ours, theirs = pty.openpty()
    try:
        command = Command(agent, f"--port={port}", "--no-follow", stdout=theirs, NO_COLOR=no_colour)
        assert command.end() == (0, "")
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    head, line = shown.splitlines()
    assert "ASKED" in head
    assert ("\x1b[" in line) == (no_colour == "")
    assert "wrong-server" in line


def test_control_characters_in_names_are_escaped(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, name="\x1b[2J\u202e[red]")
    kept(agent, port, 1)
    for words in (["events", "--no-follow", f"--port={port}"], ["explain", str(port)]):
        done = run_cli(*words, f"--connect={agent.socket}", env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0
        assert "[red]" in done.stdout
        assert all(line.replace("\t", "").isprintable() for line in done.stdout.splitlines())


def test_explain_names_the_addresses_and_the_fix(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, name="openvpn", times=3)
    assert agent.counted(port, 3) == 3
    done = run_cli("explain", str(port), f"--connect={agent.socket}")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert f"was asked at {host.ETH0}, port {port}/udp, and replied from {host.DOCKER0}, 3 times so far." in text
    assert f"so the kernel used {host.DOCKER0}, the source address" in text
    assert "Conntrack counts the reply as a new flow" in text
    assert " multihome https://github.com/OpenVPN/openvpn/issues/476" in text
    told = json.loads(run_cli("explain", "openvpn", "--json", f"--connect={agent.socket}").stdout)
    (finding,) = (each for each in told["findings"] if each["port"] == port)
    assert (finding["expected"], finding["actual"], finding["count"]) == (host.ETH0, host.DOCKER0, 3)
    assert finding["remedy"]["config"] == "multihome"


def test_explain_of_an_unknown_server_is_an_error(agent: Agent, folder: Path) -> None:
    done = run_cli("explain", "no-such", f"--connect={agent.socket}")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no wrong reply of 'no-such' so far" in done.stderr
    for path in (agent.socket, folder / "none"):  # the fix for a known server needs no agent
        done = run_cli("explain", "Unbound", f"--connect={path}")
        assert done.returncode == 0
        assert "interface-automatic: yes" in done.stdout
