"""Attribution in containers of a real Docker and a real containerd, and on the host."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from agents import Agent
from looks import asking, explain
from machine import first_pid, ip_in, listening, name_pod, untouched
from restricted import in_mount_namespace
from runtimes import (
    SERVER,
    Containerd,
    Docker,
    RuntimeHost,
    answered_from,
    ask_inside,
    build_server,
    image_tar,
)
from waiting import wait_for

from udpwatch.agent.attribution.sender import Roots, Senders
from udpwatch.agent.kernel import cgroup
from udpwatch.agent.model import Cause, Finding, Increase, Verdict
from udpwatch.agent.testing.lab import Namespace

POD_UID = "0d6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a89"
OTHER_UID = "1e6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a90"
COUNTER = "udpwatch_reply_source_mismatch_total"
_ports = count(31_000)


@pytest.fixture
def port() -> int:
    """Return a port outside the range of other tests: the agent sees the whole machine, including other test runs."""
    return next(_ports)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with untouched("log", "docker", "containerd") as place:
        yield place


@pytest.fixture(scope="module")
def server(place: Path) -> Path:
    return build_server(place)


@pytest.fixture(scope="module")
def image(place: Path, server: Path) -> Path:
    return image_tar(place, server)


@pytest.fixture(scope="module")
def docker(place: Path, node: Namespace, image: Path) -> Iterator[Docker]:
    with Docker(place / "docker", node) as daemon:
        daemon.import_image(image)
        yield daemon


@pytest.fixture(scope="module")
def containerd(place: Path, node: Namespace, image: Path) -> Iterator[Containerd]:
    with Containerd(place / "containerd", node) as daemon:
        daemon.import_image(image)
        yield daemon


@pytest.fixture(scope="module")
def agent(place: Path) -> Iterator[Agent]:
    """An agent whose /var/log and /var/lib/docker are folders of the test."""
    script = (
        f"mount --bind {place}/log /var/log\nmount -t tmpfs none /var/lib\nmkdir /var/lib/docker\n"
        f"mount --bind {Docker.root_in(place / 'docker')} /var/lib/docker"
    )
    with Agent(place, wrapper=in_mount_namespace(script)) as agent:
        yield agent


def row_of(agent: Agent, port: int) -> dict[str, Any]:
    """Wait for the one finding on a port."""
    (row,) = wait_for(lambda: [row for row in agent.snapshot()["rows"] if row["port"] == port], "the finding")
    assert row["count"] == 1
    assert isinstance(row, dict)
    return row


def event_of(agent: Agent, port: int) -> dict[str, Any]:
    """Return the one event on a port."""

    def read() -> list[dict[str, Any]]:
        lines = agent.events_file.read_text().splitlines() if agent.events_file.exists() else []
        return [event for event in map(json.loads, lines) if event["port"] == port]

    (event,) = wait_for(read, "the event")
    assert isinstance(event, dict)
    return event


def assert_names(agent: Agent, port: int, runtime: str, container_id: str, **names: str) -> None:
    """Assert that snapshot, metrics and event agree on the sender."""
    sender = row_of(agent, port)["sender"]
    labels = {"process": SERVER, "container": "", "namespace": "", "pod": ""} | names
    assert {label: sender[label] for label in labels} == labels
    assert (sender["runtime"], sender["container_id"]) == (runtime, container_id)
    assert sender["command"] == f"{sender['executable']} {port}"
    assert Path(sender["executable"]).name == SERVER
    assert agent.metric(COUNTER, port=str(port), **labels) == 1
    event = event_of(agent, port)
    assert {label: event[label] for label in labels} == {label: text or None for label, text in labels.items()}
    assert (event["pid"], event["cgroup"]) == (sender["pid"], sender["cgroup"])
    assert container_id in event["cgroup"]


def ask_from_outside(outside: Namespace, pid: int, port: int) -> None:
    """Send a request from another machine to the node's second address."""
    listening(pid, port)
    assert answered_from(outside, RuntimeHost.SECOND, port) == RuntimeHost.NODE


# ---- Docker ----


def test_container_of_docker_with_its_own_network_is_named(
    agent: Agent, docker: Docker, node: Namespace, port: int
) -> None:
    container = docker.run(f"own-{port}", f"/{SERVER}", str(port))
    ask_inside(node, first_pid(container), docker.address(container), port)
    assert_names(agent, port, "docker", container, container=f"own-{port}")


def test_container_cannot_choose_its_name(agent: Agent, docker: Docker, outside: Namespace, port: int) -> None:
    """One of its processes claims to be conmon, with the container's id and another container's name."""
    lie = f"printf conmon > /proc/$$/comm; /{SERVER} {port} & wait"
    own = r"$(sed -n 's|.*/containers/\([0-9a-f]*\)/hostname.*|\1|p' /proc/self/mountinfo)"
    run = f"exec /bin/sh -c '{lie}' sh -c {own} -n billing-db"
    container = docker.run(f"liar-{port}", "/bin/sh", "-c", run, flags=["--network=host"])
    pid = server_pid(container, port)
    above = Path(f"/proc/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]}")
    assert (above / "comm").read_text() == "conmon\n"
    assert f"\0-c\0{container}\0-n\0billing-db" in (above / "cmdline").read_text()
    ask_from_outside(outside, pid, port)
    assert_names(agent, port, "docker", container, container=f"liar-{port}")


def test_container_of_docker_with_the_host_network_is_named(
    agent: Agent, docker: Docker, outside: Namespace, port: int
) -> None:
    container = docker.run(f"host-{port}", f"/{SERVER}", str(port), flags=["--network=host"])
    ask_from_outside(outside, first_pid(container), port)
    assert_names(agent, port, "docker", container, container=f"host-{port}")


def test_explain_finds_the_server_behind_a_published_port(
    docker: Docker, node: Namespace, outside: Namespace, port: int
) -> None:
    """docker-proxy holds the port on the host, and Docker's rule sends the requests to the container."""
    inside = port + 5000
    container = docker.run(f"published-{port}", f"/{SERVER}", str(inside), flags=[f"--publish={port}:{inside}/udp"])
    listening(first_pid(container), inside)
    with asking(outside, RuntimeHost.NODE, port):
        published, behind = (explain(node, number) for number in (port, inside))
    assert published.get("redirected")["fix"] == f"udpwatch explain {inside}"
    assert (
        f"sends requests for this port to {docker.address(container)}:{inside}" in published.get("redirected")["text"]
    )
    assert published.kinds == behind.kinds == set()
    assert (
        f"{SERVER} (pid {first_pid(container)}) in container {container[:12]} listens on 0.0.0.0:{inside}."
        in (behind.get("listens")["text"])
    )
    assert behind.get("replies")["namespace"] == f"container {container[:12]}"


def test_process_started_by_docker_exec_is_named(agent: Agent, docker: Docker, outside: Namespace, port: int) -> None:
    container = docker.run(f"exec-{port}", "/bin/busybox", "sleep", "3600", flags=["--network=host"])
    docker.call("exec", "--detach", container, f"/{SERVER}", str(port))
    ask_from_outside(outside, first_pid(container), port)
    assert_names(agent, port, "docker", container, container=f"exec-{port}")


def test_pod_under_docker_is_named(agent: Agent, docker: Docker, node: Namespace, place: Path, port: int) -> None:
    """Cgroups and names are as kubelet's cgroupfs driver makes them."""
    flags = [f"--cgroup-parent=/kubepods/besteffort/pod{POD_UID}"]
    container = docker.run(f"k8s_dns_dns-7c9_shop_{port}", f"/{SERVER}", str(port), flags=flags)
    name_pod(place / "log", "shop", "dns-7c9", POD_UID, "dns", container)
    ask_inside(node, first_pid(container), docker.address(container), port)
    assert_names(agent, port, "docker", container, container="dns", namespace="shop", pod="dns-7c9")


# ---- containerd ----


def own_id(port: int) -> str:
    """Return an id as kubelet and nerdctl choose it; ctr lets its user choose."""
    return f"{port:064x}"


def give_network(node: Namespace, pid: int, port: int) -> str:
    """Do what a network plugin does; returns the container's address."""
    net = f"10.88.{port % 256}"
    node.ip(
        f"link add ctr{port} type veth peer name eth0 netns {pid}",
        f"link set ctr{port} up",
        f"addr add {net}.1/24 dev ctr{port}",
    )
    ip_in(pid, "link set eth0 up", f"addr add {net}.2/24 dev eth0")
    return f"{net}.2"


def test_container_of_containerd_with_its_own_network_is_named(
    agent: Agent, containerd: Containerd, node: Namespace, port: int
) -> None:
    container = containerd.run(own_id(port), f"/{SERVER}", str(port))
    pid = first_pid(container)
    ask_inside(node, pid, give_network(node, pid, port), port)
    assert_names(agent, port, "containerd", container, container=container[:12])


def test_container_of_containerd_with_the_host_network_is_named(
    agent: Agent, containerd: Containerd, outside: Namespace, port: int
) -> None:
    container = containerd.run(f"named-{port}", f"/{SERVER}", str(port), flags=["--net-host"])
    ask_from_outside(outside, first_pid(container), port)
    assert_names(agent, port, "containerd", container, container=f"named-{port}")


def test_pod_under_containerd_is_named(
    agent: Agent, containerd: Containerd, node: Namespace, place: Path, port: int
) -> None:
    uid = "9b0f3c2d" * 4  # a static pod's
    flags = [f"--cgroup=/kubepods/burstable/pod{uid}/{own_id(port)}"]
    container = containerd.run(own_id(port), f"/{SERVER}", str(port), flags=flags)
    name_pod(place / "log", "kube-system", "dns-node-1", uid, "cache", container)
    pid = first_pid(container)
    ask_inside(node, pid, give_network(node, pid, port), port)
    names = {"container": "cache", "namespace": "kube-system", "pod": "dns-node-1"}
    assert_names(agent, port, "containerd", container, **names)


# ---- the host itself ----


def test_process_of_the_host_is_named(
    agent: Agent, node: Namespace, outside: Namespace, server: Path, port: int
) -> None:
    with node.popen([str(server), str(port)]) as process:
        ask_from_outside(outside, process.pid, port)
        assert_names(agent, port, "", "")
        assert row_of(agent, port)["sender"]["pid"] == process.pid
        process.kill()


ODD = 'a"b\\[red]<b>\x1b[2J\n'


def test_odd_program_name_is_escaped_everywhere(
    agent: Agent, node: Namespace, outside: Namespace, server: Path, port: int
) -> None:
    """A program may have any name; labels, JSON and log stay intact."""
    odd = server.with_name(ODD)
    odd.hardlink_to(server)
    shown = ODD[:15].replace("\x1b", r"\x1b").replace("\n", r"\x0a")
    with node.popen([str(odd), str(port)]) as process:
        ask_from_outside(outside, process.pid, port)
        assert row_of(agent, port)["sender"]["process"] == shown
        assert agent.metric(COUNTER, port=str(port), process=shown) == 1
        assert event_of(agent, port)["process"] == shown
        assert row_of(agent, port)["sender"]["executable"].endswith(r"\x1b[2J\x0a")
        (line,) = wait_for(lambda: [line for line in agent.log if f"port {port}/udp" in line], "the line")
        assert line.isprintable()
        process.kill()


# ---- processes that have exited by the time they are looked up ----


def server_pid(container: str, port: int) -> int:
    """Return the id of the process that serves now."""

    def find() -> int:
        wanted = f"/{SERVER}\0{port}\0"
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_text().startswith(wanted) and container in (folder / "cgroup").read_text():
                    return int(folder.name)
            except OSError:
                continue
        return 0

    pid: int = wait_for(find, "the server")
    return pid


@pytest.mark.parametrize("network", ["bridge", "host"])
def test_short_lived_process_in_a_container_is_named(
    agent: Agent, docker: Docker, node: Namespace, outside: Namespace, port: int, network: str
) -> None:
    """It replies once and exits while the agent is stopped."""
    loop = f"while :; do /{SERVER} {port} 1; done"
    container = docker.run(f"short-{port}", "/bin/sh", "-c", loop, flags=[f"--network={network}"])
    pid = server_pid(container, port)
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        if network == "host":
            ask_from_outside(outside, pid, port)
        else:
            ask_inside(node, pid, docker.address(container), port)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "its end")
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    sender = row_of(agent, port)["sender"]
    assert (sender["process"], sender["pid"], sender["command"]) == (SERVER, pid, "")
    assert (sender["container"], sender["container_id"]) == (f"short-{port}", container)
    assert event_of(agent, port)["container"] == f"short-{port}"


def test_short_lived_container_is_named(agent: Agent, docker: Docker, outside: Namespace, port: int) -> None:
    """The container ends with its process. Until its runtime has cleaned up, everything is still there."""
    container = docker.run(f"brief-{port}", f"/{SERVER}", str(port), "1", flags=["--network=host"])
    pid = first_pid(container)
    shim = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGSTOP)
    try:
        ask_from_outside(outside, pid, port)
        sender = row_of(agent, port)["sender"]
    finally:
        os.kill(shim, signal.SIGCONT)
    assert (sender["process"], sender["container"], sender["container_id"]) == (SERVER, f"brief-{port}", container)


def test_short_lived_process_on_the_host_is_named(
    agent: Agent, node: Namespace, outside: Namespace, server: Path, port: int
) -> None:
    with node.popen([str(server), str(port), "1"]) as process:
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            ask_from_outside(outside, process.pid, port)
            assert process.wait(30) == 0
        finally:
            os.kill(agent.pid, signal.SIGCONT)
    sender = row_of(agent, port)["sender"]
    assert (sender["process"], sender["pid"], sender["container"]) == (SERVER, process.pid, "")
    assert event_of(agent, port)["process"] == SERVER


# ---- the end of a container ----


@pytest.mark.parametrize("parent", ["", f"/kubepods/besteffort/pod{OTHER_UID}"], ids=["container", "pod"])
def test_series_of_a_removed_container_expires(docker: Docker, port: int, parent: str) -> None:
    """The series of a stopped and restarted container stays."""
    flags = [f"--cgroup-parent={parent}"] if parent else []
    container = docker.run(f"end-{port}", f"/{SERVER}", str(port), flags=flags)
    with closing(cgroup.find(None)) as tree:
        senders = Senders(Roots(cgroup=Path(f"/proc/self/fd/{tree.fd}")))
        finding = Finding("10.0.0.2", "10.0.0.1", port, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, SERVER, 0, 0)
        sender = senders.lookup(Increase(finding, 1, 0, first_pid(container)))
        assert sender.container_id == container
        docker.call("restart", "--time=0", container)
        assert not senders.has_ended(sender, time.monotonic())
        docker.call("rm", "--force", container)
        wait_for(lambda: senders.has_ended(sender, time.monotonic()), "its end")
