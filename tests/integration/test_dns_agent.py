"""The agent with the responder: one process, one set of metrics, one shutdown."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from dns_server import FakeServer, ask, bare_query, connected, texts, write
from scene_agent import InNamespace
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

RESIDENT_MB = 45  # design, section 9


@pytest.fixture(scope="module")
def scene() -> Iterator[ContainerHost]:
    with ContainerHost() as lab:
        yield lab


@pytest.fixture
def hosts(folder: Path) -> Path:
    return write(folder / "hosts", "10.0.0.1 host.test")


@pytest.fixture
def conf(folder: Path, hosts: Path) -> Path:
    lines = ["no-hosts", "no-resolv", f"addn-hosts={hosts}", f"server={ContainerHost.OUTSIDE}"]
    return write(folder / "dns.conf", *lines)


def test_sensor_and_responder_together(
    scene: ContainerHost, folder: Path, conf: Path, hosts: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(scene.outside, scene.OUTSIDE), InNamespace(scene, folder, f"--dns-conf={conf}") as agent:
        for address in (scene.ETH0, scene.DOCKER0, scene.ETH0_6, scene.DOCKER0_6):
            for tcp in (False, True):
                assert texts(ask(scene.container, address, "host.test", tcp=tcp)) == ["10.0.0.1"]
                assert texts(ask(scene.container, address, "www.example", tcp=tcp)) == ["192.0.2.80"]
        wrong_replies(scene, port)
        assert agent.counted(port, 1) == 1
        assert agent.wrong(53) == 0
        assert agent.metric("udpwatch_dns_responses_total", source="hosts") == 8
        assert agent.metric("udpwatch_dns_hosts_entries") >= 1
        assert agent.get("/readyz")[0] == agent.get("/healthz")[0] == 200
        # one process: no children, and its threads belong to it
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
        assert not children.split()

        with connected(scene.container, scene.ETH0) as client:
            for number in range(2_000):
                client.send(bare_query(f"x{number}.example", number))
                client.recv(1000)
        resident = agent.resident_kib() / 1024
        with capsys.disabled():
            print(f" [{resident:.1f} MB with sensor, responder and 2,000 answers kept]", end="")

        write(hosts, "10.0.0.2 host.test")
        agent.process.send_signal(signal.SIGHUP)  # the agent alone would end
        wait_for(lambda: texts(ask(scene.container, scene.ETH0, "host.test")) == ["10.0.0.2"], "the new table")
        agent.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: any("dns: cache size 10000, " in line for line in agent.log), "the statistics")
        assert agent.process.poll() is None
        assert agent.stop() == 0
        assert not any("Traceback" in line for line in agent.log), agent.log
        with scene.node.socket() as link, scene.node.socket(kind=socket.SOCK_STREAM) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            link.bind(("0.0.0.0", 53))  # all of it has been let go
            other.bind(("0.0.0.0", 53))
        assert resident <= RESIDENT_MB


def test_addresses_that_appear_later(scene: ContainerHost, folder: Path, hosts: Path) -> None:
    """By then most capabilities are dropped; port 53 still needs one."""
    lines = ["no-hosts", "no-resolv", f"addn-hosts={hosts}", "listen-address=172.17.0.53,fd00:17::53"]
    conf = write(folder / "dns.conf", *lines)
    with InNamespace(scene, folder, f"--dns-conf={conf}") as agent:
        effective = re.search(r"CapEff:\s+(\w+)", Path(f"/proc/{agent.pid}/status").read_text())
        assert effective
        assert int(effective.group(1), 16).bit_count() < 8
        scene.node.ip("addr add 172.17.0.53/16 dev docker0", "addr add fd00:17::53/64 dev docker0 nodad")
        try:
            for address in ("172.17.0.53", "fd00:17::53"):
                wait_for(lambda address=address: _answers(scene, address), f"{address} to be served")
                assert texts(ask(scene.container, address, "host.test", tcp=True)) == ["10.0.0.1"]
        finally:
            scene.node.ip("addr del 172.17.0.53/16 dev docker0", "addr del fd00:17::53/64 dev docker0")


def _answers(scene: ContainerHost, address: str) -> bool:
    try:
        return texts(ask(scene.container, address, "host.test", seconds=0.5)) == ["10.0.0.1"]
    except OSError:
        return False


def test_port_in_use(scene: ContainerHost, folder: Path) -> None:
    conf = write(folder / "dns.conf", f"listen-address={scene.ETH0}")
    with scene.node.socket() as other:
        other.bind((scene.ETH0, 53))
        agent = InNamespace(scene, folder, f"--dns-conf={conf}", ready=False)
        assert agent.process.wait(60) == 1
        agent.stop()
        assert agent.log[-1].startswith("udpwatch: --dns: cannot listen on 172.16.13.13 port 53")
        assert len(agent.log) == 1


@pytest.mark.parametrize(
    "line", ["log-facility=/var/log/dns.log", "log-facility=daemon", "pid-file=/run/dns.pid", "user=nobody"]
)
def test_options_of_a_process_of_its_own(scene: ContainerHost, folder: Path, line: str) -> None:
    conf = write(folder / "own.conf", line)
    agent = InNamespace(scene, folder, f"--dns-conf={conf}", ready=False)
    assert agent.process.wait(60) == 1
    agent.stop()
    assert f"{conf}: {line.partition('=')[0]} is only for `udpwatch dns`" in agent.log[-1]


def test_stop_while_tables_are_read(scene: ContainerHost, folder: Path, hosts: Path, conf: Path) -> None:
    write(hosts, *(f"10.{each >> 16}.{each >> 8 & 255}.{each & 255} host{each}.test" for each in range(200_000)))
    agent = InNamespace(scene, folder, f"--dns-conf={conf}", ready=False)
    wait_for(lambda: any("metrics on" in line for line in agent.log), "it to start")
    assert agent.stop() == 0
    assert not any("Traceback" in line or "rror" in line for line in agent.log), agent.log
