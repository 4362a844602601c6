"""What follows from the kernel's lockdown level, whichever it was booted with."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from pathlib import Path

import pytest
from agents import Agent, run_cli
from scene import V4, ask, bound, finding_of
from sensors import IN_MATRIX, Watch

from udpwatch.agent.client.connection import Client
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Forwarded, Verdict
from udpwatch.agent.testing.lab import ContainerHost


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, str]]:
    """Return doctor's checks by name."""
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.fixture(scope="module")
def confidential(report: dict[str, dict[str, str]]) -> bool:
    return report["lockdown"]["found"].startswith("confidentiality")


def test_mode_follows_from_the_lockdown_level(report: dict[str, dict[str, str]], confidential: bool) -> None:
    with closing(Watch()) as watch:
        assert watch.sensor.mode == ("netlink" if confidential else "packet")
        if confidential:
            assert not watch.sensor.sees_forwarded
            assert "cannot read kernel memory" in report["conntrack read"]["found"]
            assert report["forwarded"]["status"] == "warn"
        elif IN_MATRIX:
            assert watch.sensor.sees_forwarded, watch.sensor.forwarded_reason
            assert report["forwarded"]["found"] == "replies of machines behind this node are checked by function probes"


def test_wrong_reply_is_found_at_any_lockdown_level(confidential: bool, port: int) -> None:
    with ContainerHost() as host, closing(Watch(Limits(), forwarded=Forwarded.ON)) as watch:
        with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
            server.sendto(*ask(client, V4.eth0, port, server))
            assert watch.count(port) == 1
            finding = finding_of(watch, port)
            assert (finding.expected, finding.actual) == (V4.eth0, V4.docker0)
            assert finding.verdict is (Verdict.UNKNOWN if confidential else Verdict.NEW)


def test_agent_runs_and_says_whether_it_heals(folder: Path, confidential: bool) -> None:
    """Healing needs kernel memory; the rest does not."""
    with Agent(folder, "--heal=all") as agent, Client(agent.socket) as client:
        assert ("cannot read kernel memory" in client.heal().reason) == confidential


def test_demo_succeeds_at_any_lockdown_level() -> None:
    done = run_cli("demo")
    assert done.returncode == 0, done.stdout + done.stderr
