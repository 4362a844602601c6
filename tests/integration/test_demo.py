"""`udpwatch demo`: it shows what it says, notices when something does not, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
from contextlib import closing

import pytest
from agents import COMMAND, Agent, run_cli
from repository import ROOT
from restricted import held_exclusively
from waiting import wait_for

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType
from udpwatch.agent.testing.lab import die_with_parent


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """The demo on an idle machine."""
    return run_cli("demo")


def test_demo_succeeds(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ok  ")]) == 27
    assert not [line for line in lines if line.startswith("NO  ")]
    assert max(map(len, lines)) <= 80
    assert "172.16.13.13" in done.stdout
    assert done.stderr == ""


def test_screen_in_the_readme_is_the_demos(done: subprocess.CompletedProcess[str]) -> None:
    """Only process ids and the client's ports differ."""

    def masked(lines: list[str]) -> list[str]:
        return [re.sub(r"pid \d+|(?<=172\.17\.0\.3):\d+", "N", line).rstrip() for line in lines]

    readme = (ROOT / "README.md").read_text()
    command, *screen = readme.split("```\n")[1].splitlines()
    assert command == "$ sudo make demo"
    assert len(screen) > 10
    shown = masked(done.stdout.splitlines())
    assert [line for line in masked(screen) if line not in shown] == []


def test_demo_fails_when_the_cause_is_unknown() -> None:
    """Another program holds the sendmsg hooks, so the cause stays unknown: the demo must not claim success."""
    with held_exclusively() as path:
        join = ["sh", "-e", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh"]
        done = run_cli("demo", wrapper=join, env={"UDPWATCH_CGROUP": str(path), "UDPWATCH_HOOKS": "cgroup"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("NO  ")]) == 1
    assert "they are marked NO" in done.stdout


def test_two_demos_succeed_at_once() -> None:
    with subprocess.Popen([*COMMAND, "demo"], stdout=subprocess.DEVNULL, preexec_fn=die_with_parent) as other:
        assert run_cli("demo").returncode == 0
        assert other.wait(30) == 0


def test_demo_succeeds_beside_a_running_agent(agent: Agent) -> None:
    assert run_cli("demo").returncode == 0
    assert agent.get("/readyz")[0] == 200


@pytest.mark.parametrize("number", [2, 9, 15], ids=["SIGINT", "SIGKILL", "SIGTERM"])
def test_interrupted_demo_leaves_nothing_behind(number: int) -> None:
    """No process, program or namespace stays, whatever ends the demo, and the next demo works."""
    with closing(cgroup.find(None)) as root:

        def programs() -> list[int]:
            return bpf.program_query(root.fd, AttachType.CGROUP_INET_EGRESS)

        before, links = programs(), _network_namespaces()
        with subprocess.Popen([*COMMAND, "demo"], stdout=subprocess.PIPE, preexec_fn=die_with_parent) as demo:
            assert demo.stdout
            while b"ICMP port unreachable" not in demo.stdout.readline():
                pass
            demo.send_signal(number)
            demo.wait(20)
        wait_for(lambda: programs() == before, "its programs to be gone")
        wait_for(lambda: _network_namespaces() <= links, "its namespaces to be gone")


def _network_namespaces() -> set[str]:
    done = subprocess.run(["lsns", "-t", "net", "-n", "-o", "NS"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
