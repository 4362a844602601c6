"""`udpwatch top` in a real terminal (tmux), with real agents, and with a real Prometheus that scrapes them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, as_nobody, run_cli
from repository import GOLDEN
from terminals import Prometheus, Terminal, row_of, search, top, widened
from waiting import PATIENCE_SECONDS, wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

EVENTS = GOLDEN / "events.jsonl"
MANY = 5_000


@pytest.fixture
def port() -> int:
    """Return a port that no other run of the tests on this machine uses: an agent sees all of them."""
    return 40_000 + (os.getpid() * 7 + next(_ports)) % 20_000


_ports = count()


def only(terminal: Terminal, port: int) -> None:
    """Show only the rows of this port, since the whole machine is watched."""
    terminal.shows("q quit", "s ago")
    search(terminal, str(port))
    terminal.shows("No row contains these words")


def test_finding_is_shown_and_every_key_works(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    with Terminal(folder, *top("--connect", str(agent.socket))) as terminal:
        only(terminal, port)
        wrong_replies(host, port, 23)
        row = row_of(terminal.shows(f" {port} {host.ETH0}"), port)
        assert row[2:6] == [str(port), host.ETH0, host.DOCKER0, "new"]
        wait_for(lambda: row_of(terminal.text, port)[-2] == "23", "the total")
        assert len(terminal.lines) == 24

        terminal.press("Enter")
        terminal.shows(" fix ")
        terminal.resize(200, 50)
        terminal.shows("kernel-chosen", "pod or container", f"conntrack {host.DOCKER0}:{port} > {host.CONTAINER}")
        text = terminal.text
        assert len(text.splitlines()) == 50
        assert max(map(len, text.splitlines())) == 200
        terminal.press("Enter")
        terminal.hides(" fix ")
        terminal.resize(80, 24)
        terminal.shows("total last")

        terminal.press("c")
        terminal.shows("totals since", "No row contains these words")
        wrong_replies(host, port, 2)
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "2", "what came since the clear")
        terminal.press("/")
        terminal.press(*"nothing")
        terminal.shows("nothing", "No row contains these words")
        terminal.press(*["BSpace"] * 7, "Enter")
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "2", "the row again")
        terminal.press("p")
        terminal.shows("paused at")
        wrong_replies(host, port, 1)
        agent.counted(port, 26)
        assert row_of(terminal.text, port)[-2] == "2"
        terminal.press("p")
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "3", "what came since the pause")
        terminal.press("?")
        terminal.shows("sort by the next column")
        terminal.press("Escape")
        terminal.hides("sort by the next column")
        terminal.press("s")
        terminal.shows("total▼")
        terminal.press("q")
        assert terminal.ended() == 0


def test_restarted_agent_is_reconnected(folder: Path, host: ContainerHost, port: int) -> None:
    agent = Agent(folder)
    try:
        with Terminal(folder, *top("--connect", str(agent.socket))) as terminal:
            only(terminal, port)
            wrong_replies(host, port, 5)
            terminal.shows(f" {port} {host.ETH0}")
            agent.stop()
            terminal.shows("not connected: retrying", f" {port} {host.ETH0}")
            agent = Agent(folder)
            terminal.shows("No row contains these words")
            wrong_replies(host, port, 3)
            wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "3", "the new agent's count")
            agent.stop(signal.SIGKILL)
            terminal.shows("not connected: retrying")
            terminal.press("s")
            terminal.shows("total▼")
            terminal.press("q")
            assert terminal.ended() == 0
    finally:
        agent.stop(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_restores_the_terminal(folder: Path, number: signal.Signals) -> None:
    with Terminal(folder, *top("--replay", str(EVENTS))) as terminal:
        terminal.shows("q quit", "plain-server")
        (child,) = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        os.kill(terminal.pid, number)
        assert terminal.ended() == 0
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "its agent to end")


@pytest.mark.parametrize("signalled", [True, False], ids=["SIGHUP", "no signal"])
def test_closed_terminal_ends_it(signalled: bool) -> None:
    """As when the connection of ssh breaks. Nothing must go on in the background."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        top("--replay", str(EVENTS)),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
        # Only the owner of a controlling terminal gets a signal.
        preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if signalled else None,
    )
    os.close(terminal)
    try:
        shown = b""
        while b"plain-server" not in shown:
            shown += os.read(master, 65_536)
        os.close(master)
        assert process.wait(PATIENCE_SECONDS) in (0, -signal.SIGHUP)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("milliseconds", [300, 500, 700, 900, 1100, 1300])
def test_signal_at_any_time_of_the_start_restores_the_terminal(folder: Path, milliseconds: int) -> None:
    with Terminal(folder, *top("--replay", str(EVENTS))) as terminal:
        time.sleep(milliseconds / 1000)  # no condition marks these moments
        os.kill(terminal.pid, signal.SIGTERM)
        terminal.ended()


def test_exception_restores_the_terminal(folder: Path) -> None:
    code = (
        "from udpwatch.agent.client.top import screen; import sys; from udpwatch.agent.cli import main\n"
        "screen.TopApp.action_sort = lambda self: 1 / 0\n"
        f"sys.exit(main(['top', '--replay', {str(EVENTS)!r}]))"
    )
    with Terminal(folder, sys.executable, "-P", "-c", code) as terminal:
        terminal.shows("q quit", "plain-server")
        terminal.press("s")
        assert terminal.ended() == 1
        assert "ZeroDivisionError" in terminal.text


def test_private_agent_is_started_when_none_runs(folder: Path, host: ContainerHost, port: int) -> None:
    if Path("/run/udpwatch/udpwatch.sock").exists():
        pytest.skip("an agent runs here")
    with Terminal(folder, *top()) as terminal:
        only(terminal, port)
        wrong_replies(host, port, 4)
        terminal.shows(f" {port} {host.ETH0}")
        (child,) = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        os.kill(terminal.pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "its agent to end")
    assert not list(Path("/tmp").glob("udpwatch-top-*"))


def test_without_root_and_agent_it_is_an_error() -> None:
    if Path("/run/udpwatch/udpwatch.sock").exists():
        pytest.skip("an agent runs here")
    done = run_cli("top", "--once", wrapper=as_nobody())
    assert done.returncode == 77
    assert "start `udpwatch run` as root" in done.stderr


def test_socket_without_permission_is_an_error(agent: Agent, folder: Path) -> None:
    folder.chmod(0o755)
    done = run_cli("top", "--once", "--connect", str(agent.socket), wrapper=as_nobody())
    assert done.returncode == 77
    assert "permission denied" in done.stderr


def test_once_prints_json_for_jq(agent: Agent, host: ContainerHost, port: int) -> None:
    if not shutil.which("jq"):
        pytest.skip("needs jq: apt-get install jq")
    wrong_replies(host, port, 7)
    agent.counted(port, 7)
    done = run_cli("top", "--once", "--json", "--connect", str(agent.socket))
    assert (done.returncode, done.stderr) == (0, "")
    query = f'.findings[] | select(.port == {port}) | "\\(.expected) \\(.actual) \\(.verdict) \\(.total)"'
    found = subprocess.run(["jq", "-r", query], input=done.stdout, capture_output=True, text=True, check=True).stdout
    assert found == f"{host.ETH0} {host.DOCKER0} new 7\n"
    table = run_cli("top", "--once", "--connect", str(agent.socket))
    assert row_of(table.stdout, port)[-2] == "7"


def test_once_works_in_a_locale_without_utf_8(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, 7)
    agent.counted(port, 7)
    done = run_cli("top", "--once", "--connect", str(agent.socket), env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert row_of(done.stdout, port)[-2] == "7"


# ---- many at once ----


def burst(path: Path, seconds: int) -> None:
    """A recording in which MANY servers send wrong replies every second."""
    told = json.loads(EVENTS.read_text().splitlines()[0])
    begin = datetime(2027, 1, 15, 8, tzinfo=UTC)
    with path.open("w") as file:
        for second in range(seconds):
            told["time"] = (begin + timedelta(seconds=second)).isoformat(timespec="milliseconds")
            for number in range(MANY):
                told |= {"port": 1024 + number, "process": f"srv-{number % 97}", "pod": f"pod-{number}"}
                file.write(json.dumps(told | {"count": (second + 1) * (1 + number % 9)}) + "\n")


def test_keys_work_during_a_burst(folder: Path) -> None:
    burst(folder / "burst.jsonl", 20)
    with Terminal(folder, *top("--replay", str(folder / "burst.jsonl"))) as terminal:
        terminal.shows(f"of {MANY}")
        took = []
        for order in ("total▼", "last▼", "process▲", "pod▲", "port▲", "/s▼"):
            begun = time.monotonic()
            terminal.press("s")
            terminal.shows(order)
            took.append(time.monotonic() - begun)
        print(f"a key is answered within {min(took):.2f} to {max(took):.2f} s while {MANY} rows change each second")
        terminal.press("G")
        terminal.shows(f"{MANY - 18}-{MANY} of {MANY}")
        terminal.press("/")
        terminal.press(*"pod-4321")
        terminal.shows("1-1 of 1", "5345 ")
        terminal.press("Escape")
        terminal.resize(200, 50)
        terminal.shows("pod or container", f"of {MANY}")
        terminal.press("q")
        assert terminal.ended() == 0


# ---- the cluster ----


def cluster(url: str) -> dict[str, Any]:
    done = run_cli("top", "--once", "--json", "--prometheus", url)
    told: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"findings": [], "nodes": []}
    return told


def test_cluster_of_two_nodes_is_shown(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    """One is a real agent, the other replays a recording."""
    second = folder / "second"
    second.mkdir()
    with Agent(second, f"--replay={EVENTS}") as replay:
        nodes = [each.url.removeprefix("http://") for each in (agent, replay)]
        with Prometheus(folder, nodes) as prometheus:
            wrong_replies(host, port, 5)
            agent.counted(port, 5)

            def totals() -> dict[tuple[str, int], int]:
                found = cluster(prometheus.url)["findings"]
                return {(each["node"], each["port"]): each["total"] for each in found}

            wait_for(lambda: totals().get((nodes[0], port)) == 5, "the real node's finding")
            wait_for(lambda: (nodes[1], 56789) in totals(), "the replaying node's finding")
            with Terminal(folder, *top("--prometheus", prometheus.url)) as terminal:
                terminal.shows("2 nodes", prometheus.url, "nodes", " 56789 ")
                search(terminal, str(port))
                wrong_replies(host, port, 20)
                assert agent.counted(port, 25) == 25
                wait_for(lambda: totals().get((nodes[0], port)) == 25, "the total in Prometheus")
                wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "25", "the total on the screen")
                terminal.press("g")
                terminal.resize(200, 50)
                assert row_of(terminal.shows(nodes[0], "kernel-chosen"), port)[0] == nodes[0]
                terminal.press("Escape", "Escape")
                terminal.hides("kernel-chosen")
                search(terminal, "56789 shop")
                widened(terminal, 190)
                terminal.press("g")
                terminal.shows(nodes[1], "shop/dns-7c9")
                terminal.press("Enter")
                terminal.shows(" fix ", "Prometheus stores no events")
                agent.stop()
                prometheus.__exit__()
                terminal.shows("not connected: retrying")
                terminal.press("q")
                assert terminal.ended() == 0
    gone = run_cli("top", "--once", "--prometheus", prometheus.url)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr
