"""`udpwatch run` as its users know it: counts, events, metrics, health, the end, and what the agent survives."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from agents import Agent
from machine import own_cgroup
from scene import PATIENCE_SECONDS, ask
from sensors import Watch
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.daemon import api, self_test
from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.programs import HOOKS, Hook, Program
from udpwatch.agent.model import Forwarded
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

EVENT_KEYS = [
    *("time", "node", "expected", "actual", "peer", "peer_port", "port", "family", "verdict", "cause", "conntrack"),
    *("pid", "process", "uid", "pktinfo", "interface", "netns", "cgroup", "container", "namespace", "pod", "healed"),
    "count",
]

_libc = ctypes.CDLL(None, use_errno=True)


def event_lines(agent: Agent, port: int) -> list[dict[str, object]]:
    lines = agent.events_file.read_text().splitlines() if agent.events_file.exists() else []
    return [event for event in map(json.loads, lines) if event["port"] == port]


# ---- output ----


@contextmanager
def capture(namespace: Namespace, *words: str) -> Iterator[list[str]]:
    """Run tcpdump during the body, which begins when tcpdump listens; yields tcpdump's lines."""
    process = namespace.popen(["tcpdump", "-l", "-n", "--immediate-mode", "-i", "eth0", *words])
    lines: list[str] = []
    assert process.stderr and process.stdout
    while b"listening on" not in (said := process.stderr.readline()):
        assert said, "tcpdump ended"
    os.set_blocking(process.stdout.fileno(), False)
    rest = b""

    def drain() -> list[str]:
        nonlocal rest
        assert process.stdout
        rest += process.stdout.read() or b""
        *whole, rest = rest.split(b"\n")
        lines.extend(line.decode() for line in whole)
        return lines

    try:
        yield lines
        # A right answer after the wrong ones marks the end of what is to be counted.
        wait_for(lambda: any("fence" in line or f"{ContainerHost.ETH0}." in line for line in drain()), "the fence")
    finally:
        process.terminate()
        process.communicate()


def test_23_wrong_replies_are_counted_and_a_capture_agrees(agent: Agent, host: ContainerHost, port: int) -> None:
    with capture(host.container, "udp", "src", "port", str(port)) as lines:
        wrong_replies(host, port, 23)
        with host.node.socket() as server, host.container.socket() as client:
            server.bind((host.ETH0, port))
            server.sendto(*ask(client, host.ETH0, port, server))
    captured = [line for line in lines if f"IP {host.DOCKER0}.{port} >" in line]
    assert len(captured) == 23
    assert agent.counted(port, 23) == 23
    series = {"process": "wrong-server", "expected": host.ETH0, "actual": host.DOCKER0}
    assert (
        agent.metric(
            "udpwatch_reply_source_mismatch_total", verdict="new", cause="kernel-chosen", port=str(port), **series
        )
        == 23
    )
    assert agent.metric("udpwatch_replies_checked_total") >= 24


def test_wrong_reply_is_an_event_with_all_keys(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, 1, "one-shot")
    (event,) = wait_for(lambda: event_lines(agent, port), "the event")
    assert list(event) == EVENT_KEYS
    assert event["process"] == "one-shot"
    assert (event["expected"], event["actual"], event["peer"]) == (host.ETH0, host.DOCKER0, host.CONTAINER)
    assert (event["verdict"], event["cause"], event["family"], event["count"]) == ("new", "kernel-chosen", 4, 1)
    assert event["netns"] == host.node.inode
    assert event["uid"] == 0
    assert event["healed"] is False
    assert event["conntrack"] == {
        "original": {
            "source": host.DOCKER0,
            "source_port": port,
            "destination": host.CONTAINER,
            "destination_port": event["peer_port"],
        },
        "reply": {
            "source": host.CONTAINER,
            "source_port": event["peer_port"],
            "destination": host.DOCKER0,
            "destination_port": port,
        },
        "request": None,
    }
    told = time.strptime(str(event["time"])[:19], "%Y-%m-%dT%H:%M:%S")
    assert abs(time.mktime(told) - time.mktime(time.gmtime())) < 60


def test_snapshot_and_log_name_the_sender(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, 2, "loud-server")
    assert agent.counted(port, 2) == 2
    rows = [row for row in agent.snapshot()["rows"] if row["port"] == port]
    assert [(row["sender"]["process"], row["count"]) for row in rows] == [("loud-server", 2)]
    (line,) = [line for line in agent.log if f"port {port}/udp" in line]
    assert "loud-server" in line
    assert f"was asked at {host.ETH0} and replied from {host.DOCKER0}" in line


def test_every_error_series_exists_at_0_from_the_start(agent: Agent) -> None:
    _, text = agent.get("/metrics")
    for stage in ["rate_limit", "ring_full", "findings_full", "undecided", "remember", "unparsed", "queue", "output"]:
        assert f'udpwatch_events_lost_total{{stage="{stage}"}} 0.0' in text
    for program, _ in HOOKS:
        assert f'udpwatch_probe_attached{{probe="{program.name}"}} 1.0' in text
        assert f'udpwatch_probe_reattached_total{{probe="{program.name}"}} 0.0' in text
    assert 'mode="packet"' in text
    assert 'process="other"' in text


def test_health_pages_are_ok(agent: Agent) -> None:
    assert agent.get("/readyz") == (200, "ready\n")
    assert agent.get("/healthz")[0] == 200
    status, text = agent.get("/nothing")
    assert status == 404
    assert "/metrics" in text


def test_events_are_written_to_standard_output(host: ContainerHost, folder: Path, port: int) -> None:
    with Agent(folder, "--events=-", stdout=subprocess.PIPE) as agent:
        wrong_replies(host, port, 1)
        assert agent.process.stdout
        event = json.loads(agent.process.stdout.readline())
        assert event["port"] == port
        # The reader goes away, as `| head -1` does: at the next event the agent ends, and ends well.
        agent.process.stdout.close()
        wrong_replies(host, port, 1)
        assert agent.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_agent_stops_cleanly(host: ContainerHost, folder: Path, port: int, number: int) -> None:
    with Agent(folder) as agent:
        before = attached_programs()
        wrong_replies(host, port, 3)
        assert agent.stop(number) == 0
        assert not agent.socket.exists()
        assert len(attached_programs()) == len(before) - len(HOOKS)
        assert [event["count"] for event in event_lines(agent, port)] == [1, 2, 3]  # nothing on the way was lost
        assert not [line for line in agent.log if "Traceback" in line]


def attached_programs() -> list[int]:
    """Return the ids of all programs on the root cgroup's hooks."""
    with closing(cgroup.find(None)) as root:
        return [program for _, hook in HOOKS for program in bpf.program_query(root.fd, hook.attach)]


def test_agent_has_no_compiler_and_few_capabilities(agent: Agent) -> None:
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    assert "libbcc" not in maps
    assert "LLVM" not in maps
    status = Path(f"/proc/{agent.pid}/status").read_text()
    effective = int(re.findall(r"CapEff:\s+(\w+)", status)[0], 16)
    assert effective == 1 << 39 | 1 << 12 | 1 << 1  # CAP_BPF, CAP_NET_ADMIN; CAP_DAC_OVERRIDE for the event file
    threads = [path.read_text() for path in Path(f"/proc/{agent.pid}/task").glob("*/status")]
    assert {re.findall(r"CapEff:\s+(\w+)", text)[0] for text in threads} == {f"{effective:016x}"}


# ---- load ----


def test_flood_is_counted_exactly(agent: Agent, host: ContainerHost, port: int) -> None:
    """Two processes send 200,000 wrong replies: the counter is exact, and so is the count of lost events."""
    each = 100_000
    before = agent.resident_kib()

    def flood(server: socket.socket) -> None:
        data, peer = server.recvfrom(100)
        sent = 0
        while sent < each:
            try:
                server.sendto(data, peer)
            except ConnectionRefusedError:
                continue
            sent += 1

    with (
        host.node.socket() as one,
        host.node.socket() as other,
        host.container.socket() as client,
    ):
        processes = []
        for server, at in ((one, port), (other, port + 10_000)):
            server.bind(("0.0.0.0", at))
            processes.append(host.node.spawn("flood", lambda server=server: flood(server)))
            client.sendto(b"x", (host.ETH0, at))
        assert [process.wait() for process in processes] == [0, 0]
    total = wait_for(
        lambda: (count := agent.wrong(port) + agent.wrong(port + 10_000)) >= 2 * each and count, "all of the flood"
    )
    assert total == 2 * each

    def accounted() -> int:
        delivered = len(event_lines(agent, port)) + len(event_lines(agent, port + 10_000))
        # What a function probe misses while another thread is in it is no event.
        missed = agent.metric("udpwatch_events_lost_total", stage="probe_missed")
        return delivered + int(agent.metric("udpwatch_events_lost_total") - missed)

    assert wait_for(lambda: (sum_ := accounted()) >= 2 * each and sum_, "all events to be accounted for") == 2 * each
    assert agent.resident_kib() - before < 8 * 1024
    assert agent.get("/healthz")[0] == 200


def test_wrong_reply_in_each_of_a_thousand_namespaces_is_counted(agent: Agent, port: int) -> None:
    """Each namespace is made, sends one wrong reply and is removed. A slow machine makes at least a hundred (0.4 s each
    without KVM).
    """
    busy = Lab()
    load = busy.namespace("load")

    def chatter() -> None:
        server, client = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        server.bind(("127.0.0.1", 0))
        while True:
            client.sendto(b"x", server.getsockname())
            server.sendto(*server.recvfrom(100))

    with busy:
        load.spawn("chatter", chatter)
        made, enough = 0, time.monotonic() + 60
        while made < 100 or (made < 1000 and time.monotonic() < enough):
            made += 1
            with Lab() as lab:
                namespace = lab.namespace("short-lived")
                with namespace.socket() as server, namespace.socket() as client:
                    server.bind(("0.0.0.0", port))
                    server.sendto(*ask(client, "127.0.0.2", port, server))
    assert agent.counted(port, made) == made
    assert len([row for row in agent.snapshot()["rows"] if row["port"] == port]) == 1
    assert agent.get("/readyz")[0] == 200


# ---- failures ----


def test_full_ring_buffer_loses_events_and_no_counts(host: ContainerHost, port: int) -> None:
    """While nobody reads, what fits is delivered later and the rest is counted as lost."""
    with closing(Watch(Limits(ring_pages=1, events_per_second=1_000_000))) as watch:
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            data, peer = ask(client, host.ETH0, port, server)
            for _ in range(500):
                server.sendto(data, peer)
        lost = watch.sensor.counters().ring_full
        assert lost > 0
        assert watch.count(port) == 500
        assert len(watch.events(port)) + lost == 500
        # and once there is room again, events come again
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        assert watch.events(port)[-1].count == 501


def test_self_test_logs_once_while_it_fails(packet_watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent looks for its own datagram again and again, and logs once that it is missing. Right replies of others,
    from all ports, do not count.
    """
    monkeypatch.setattr(self_test, "INTERVAL_SECONDS", 0.0)
    test = self_test.SelfTest(packet_watch.sensor, True)
    with Lab() as lab:
        place, others = lab.namespace("place"), lab.namespace("others")

        def converse() -> None:
            with others.socket() as server, others.socket() as client:
                server.bind(("0.0.0.0", 0))
                while True:
                    for address in ("127.0.0.2", "127.0.0.1"):
                        _, peer = ask(client, address, server.getsockname()[1], server)
                    server.sendto(b"x", peer)

        others.spawn("others", converse)
        for _ in range(2):
            with place.entered():
                assert (test.run(), test.passed) == ([], True)
            place.ip("link set lo down")
            with place.entered():
                said = test.run()
                assert ("did not see" in said[0], test.passed) == (True, False)
                assert (test.run(), test.passed) == ([], False)
            place.ip("link set lo up")


def test_full_map_of_peers_evicts_the_oldest(host: ContainerHost, port: int) -> None:
    """Evictions are counted, and the newest peers are still judged."""
    with closing(Watch(Limits(max_peers=64), forwarded=Forwarded.OFF)) as watch, host.node.socket() as server:
        server.bind(("0.0.0.0", port))
        peers = set()
        for _ in range(500):
            with host.container.socket() as client:
                request = ask(client, host.ETH0, port, server)
                peers.add(request[1])
        server.sendto(*request)
        assert watch.count(port) == 1
        sample = watch.sensor.sample(1 << 62)
        assert len(peers) > 400  # the client's kernel may have used a port twice
        assert sample.counters.remembered >= len(peers)
        assert sample.tracked_peers <= 64
        assert sample.evicted_peers == sample.counters.remembered - sample.tracked_peers


def test_full_map_of_findings_counts_under_overflow(host: ContainerHost, port: int) -> None:
    """The sum stays exact. One tenant may fill half of the map."""
    with closing(Watch(Limits(max_findings=8))) as watch:
        for at in range(port, port + 20):
            with host.node.socket() as server, host.container.socket() as client:
                server.bind(("0.0.0.0", at))
                request = ask(client, host.ETH0, at, server)
                server.sendto(*request)
                server.sendto(*request)
        kept = sum(watch.count(at) for at in range(port, port + 20))
        assert kept == 8
        counters = watch.sensor.counters()
        assert counters.overflow >= 32
        assert kept + counters.overflow == counters.wrong
        assert sum(watch.sensor.sample(1 << 62).beyond.values()) == counters.overflow


def test_replies_past_the_series_limit_count_under_other(host: ContainerHost, folder: Path, port: int) -> None:
    with Agent(folder, "--max-series=3") as agent:
        for at in range(port, port + 10):
            wrong_replies(host, at, 2)
        name = "udpwatch_reply_source_mismatch_total"
        assert wait_for(lambda: (count := agent.metric(name)) >= 20 and count, "all of them") == 20
        assert agent.metric(name, process="other") == 14
        assert len(agent.snapshot()["rows"]) == 3


def test_killed_agent_leaves_nothing_that_stops_the_next_one(host: ContainerHost, folder: Path, port: int) -> None:
    """SIGKILL leaves no program attached, and a socket that the next agent replaces."""
    programs = attached_programs()
    with Agent(folder) as agent:
        agent.stop(signal.SIGKILL)
        wait_for(lambda: attached_programs() == programs, "the programs to go with their agent")
        assert agent.socket.exists()
        with Agent(folder) as again:
            wrong_replies(host, port, 1)
            assert again.counted(port, 1) == 1


def test_second_agent_on_one_socket_is_refused(agent: Agent, folder: Path) -> None:
    with Agent(folder, ready=False) as second:
        assert second.process.wait(20) == 1
        wait_for(lambda: second.log, "its word")
        assert "another agent does" in second.log[0]
        assert len(second.log) == 1
    assert agent.snapshot()["ready"]


def _stolen_link(agent: Agent, attach: AttachType) -> int:
    """Return a descriptor of one of the agent's links, as root can take it from outside (pidfd_getfd(2))."""
    pidfd = os.pidfd_open(agent.pid)
    try:
        for info in Path(f"/proc/{agent.pid}/fdinfo").iterdir():
            text = info.read_text()
            if "link_type:\tcgroup" in text and f"attach_type:\t{int(attach)}\n" in text:
                fd: int = _libc.syscall(438, pidfd, int(info.name), 0)
                assert fd >= 0, os.strerror(ctypes.get_errno())
                return fd
    finally:
        os.close(pidfd)
    raise AssertionError(f"no {attach.name} link")


@pytest.mark.parametrize(("program", "hook"), HOOKS, ids=[program.name for program, _ in HOOKS])
def test_program_detached_from_outside_is_attached_again(
    agent: Agent, host: ContainerHost, port: int, program: Program, hook: Hook
) -> None:
    """As by `bpftool link detach`: noticed within 10 s, logged, counted."""
    name = program.name
    link = _stolen_link(agent, hook.attach)
    try:
        bpf.link_detach(link)
    finally:
        os.close(link)
    wait_for(lambda: agent.metric("udpwatch_probe_reattached_total", probe=name) == 1, "it to be attached again", 10)
    assert agent.metric("udpwatch_probe_attached", probe=name) == 1
    assert any(f"{name} was detached" in line for line in agent.log)
    wrong_replies(host, port, 2)
    assert agent.counted(port, 2) == 2
    assert agent.metric("udpwatch_reply_source_mismatch_total", port=str(port), cause="kernel-chosen") == 2


def test_agent_is_not_ready_after_its_cgroup_is_removed(folder: Path) -> None:
    """A watched cgroup is removed under the agent: blind from there on, and it says so."""
    with own_cgroup() as path, Agent(folder, f"--cgroup={path}") as agent:
        assert agent.get("/readyz")[0] == 200
        path.rmdir()
        wait_for(lambda: agent.get("/readyz")[0] == 503, "not ready", 10)
        assert agent.metric("udpwatch_probe_attached", probe="egress") == 0
        assert "egress" in agent.get("/readyz")[1]
        assert agent.get("/healthz")[0] == 200


def test_moved_events_file_is_created_again(agent: Agent, host: ContainerHost, port: int) -> None:
    """This is how logrotate works."""
    wrong_replies(host, port, 1)
    wait_for(lambda: event_lines(agent, port), "the first event")
    agent.events_file.rename(agent.events_file.with_suffix(".1"))
    wrong_replies(host, port, 1)
    wait_for(lambda: event_lines(agent, port), "an event in the new file")


def test_events_that_a_full_disk_loses_are_counted(host: ContainerHost, folder: Path, port: int) -> None:
    """When there is room again, complete lines follow."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], check=True)
    try:
        filler = disk / "filler"
        with Agent(folder, f"--events={disk}/events.jsonl") as agent:
            filler.write_bytes(bytes(4096))
            wrong_replies(host, port, 2)
            wait_for(lambda: agent.metric("udpwatch_events_lost_total", stage="output") == 2, "the loss")
            assert len([line for line in agent.log if "No space left" in line]) == 1
            filler.unlink()
            wrong_replies(host, port, 1)
            wait_for(lambda: (disk / "events.jsonl").read_text().count("\n") == 1, "an event")
            assert json.loads((disk / "events.jsonl").read_text())["count"] == 3
            assert agent.counted(port, 3) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


def test_misbehaving_socket_clients_do_no_harm(agent: Agent) -> None:
    clients = []
    for _ in range(40):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(agent.socket))
        clients.append(client)
    for client in clients[:20]:  # ask and never read
        client.setblocking(False)
        try:
            while True:
                client.send(b'{"get": "snapshot"}\n' * 100)
        except OSError:
            pass
    clients[20].setblocking(True)
    for client in clients:
        client.close()
    assert _connect_until_refused(agent.socket, 100) <= 2 * api.MAX_CLIENTS  # the tests run as root
    wait_for(lambda: _answers(agent), "an answer")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(agent.socket))
        lines = client.makefile("rwb")
        for request in (b"not json\n", b"[]\n", b'{"get": "everything"}\n', b"[" * 5000 + b"\n"):
            lines.write(request)
            lines.flush()
            assert "error" in json.loads(lines.readline())
        # Longer than a line may be: the connection is closed, maybe before all of it was written.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"x" * 100_000 + b"\n")
            assert lines.readline() == b""
        lines.close()
    assert agent.get("/healthz")[0] == 200
    assert oct(agent.socket.stat().st_mode & 0o777) == "0o660"


def _connect_until_refused(path: Path, tries: int) -> int:
    """Return how many of ``tries`` clients are answered at the same time."""
    clients, answered = [], 0
    for _ in range(tries):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE_SECONDS)
        client.connect(str(path))
        clients.append(client)
        with contextlib.suppress(OSError):
            client.sendall(b"{}\n")
            answered += bool(client.recv(100))
    for client in clients:
        client.close()
    return answered


def _answers(agent: Agent) -> bool:
    try:
        return bool(agent.snapshot()["ready"])
    except OSError:
        return False


def test_slow_http_clients_do_not_block_the_kubelet(agent: Agent) -> None:
    """There are more of them than connections allowed; they are idle or send a byte now and then."""
    host, port = agent.url.removeprefix("http://").split(":")
    slow = []
    try:
        for number in range(80):
            slow.append(socket.create_connection((host, int(port))))
            if number % 2:
                slow[-1].send(b"GET /metrics HTTP/1.1\r\nX: ")
        assert agent.get("/healthz")[0] == 200
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.send(b"x")
        assert agent.get("/metrics")[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_slow_http_connection_is_closed(agent: Agent) -> None:
    """A client that sends a byte a second is disconnected."""
    host, port = agent.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.settimeout(1)
        begun = time.monotonic()
        ended = False
        while not ended:
            assert time.monotonic() - begun < 30
            try:
                slow.send(b"x")
                ended = slow.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True


def test_connections_recover_after_threads_ran_short(agent: Agent) -> None:
    """Connections are refused while no thread can start, and accepted again afterwards: no slot is lost."""
    before = resource.prlimit(agent.pid, resource.RLIMIT_AS)
    size = int(re.findall(r"VmSize:\s+(\d+)", Path(f"/proc/{agent.pid}/status").read_text())[0]) * 1024
    host, port = agent.url.removeprefix("http://").split(":")
    resource.prlimit(agent.pid, resource.RLIMIT_AS, (size + 1_000_000, before[1]))  # no room for a thread's stack
    refused = 0
    for _ in range(50):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                refused += client.recv(100) == b""
    resource.prlimit(agent.pid, resource.RLIMIT_AS, before)
    assert refused > 40
    assert agent.get("/healthz")[0] == 200


def test_odd_process_name_is_escaped_everywhere(agent: Agent, host: ContainerHost, port: int) -> None:
    """A process may have any name; label, JSON and log stay one line."""
    wrong_replies(host, port, 1, 'a"\x1b[31m\\\t')
    (event,) = wait_for(lambda: event_lines(agent, port), "the event")
    assert event["process"] == 'a"\\x1b[31m\\\\x09'
    assert agent.counted(port, 1) == 1
    assert not [line for line in agent.log if "\x1b" in line]


def test_short_lived_process_is_named(agent: Agent, host: ContainerHost, port: int) -> None:
    for number in range(5):
        wrong_replies(host, port, 1, f"gone-{number}")
    wait_for(lambda: len(event_lines(agent, port)) == 5, "the events")
    assert {event["process"] for event in event_lines(agent, port)} == {f"gone-{number}" for number in range(5)}


def test_thread_is_named_after_its_process(agent: Agent, host: ContainerHost, port: int) -> None:
    """Runtimes name their threads, but the operator looks for the process."""
    with host.node.socket() as server, host.container.socket() as client:
        server.bind(("0.0.0.0", port))

        def serve() -> None:
            def work() -> None:
                Path("/proc/thread-self/comm").write_text("worker-17")
                while True:
                    server.sendto(*server.recvfrom(100))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

        process = host.node.spawn("runtime", serve)
        client.settimeout(PATIENCE_SECONDS)
        client.sendto(b"x", (host.ETH0, port))
        client.recvfrom(100)
        (event,) = wait_for(lambda: event_lines(agent, port), "the event")
        assert event["process"] == "runtime"
        assert event["pid"] == process.pid


def test_idle_series_expires(host: ContainerHost, folder: Path, port: int) -> None:
    with Agent(folder, "--forget=1") as agent:
        wrong_replies(host, port, 2)
        wait_for(lambda: agent.wrong(port) == 2, "the count")
        wait_for(lambda: f'port="{port}"' not in agent.get("/metrics")[1], "the series to end")
        wrong_replies(host, port, 1)
        assert agent.counted(port, 1) == 1


def test_settings_come_from_file_environment_and_flags(host: ContainerHost, folder: Path, port: int) -> None:
    settings = folder / "settings.toml"
    settings.write_text('window = 0.2\nnode = "from-file"\nevents_per_second = 1\n')
    environment = {**os.environ, "UDPWATCH_NODE": "from-environment", "UDPWATCH_EVENTS_PER_SECOND": "2"}
    with Agent(folder, f"--config={settings}", "--events-per-second=3", env=environment) as agent:
        wrong_replies(host, port, 8)
        wait_for(lambda: agent.wrong(port) == 8, "the count")
        wait_for(lambda: agent.metric("udpwatch_events_lost_total", stage="rate_limit") > 0, "the limit")
        assert agent.snapshot()["node"] == "from-environment"
        assert event_lines(agent, port)[0]["node"] == "from-environment"
        lost = agent.metric("udpwatch_events_lost_total", stage="rate_limit")
        wait_for(lambda: len(event_lines(agent, port)) + lost == 8, "all events accounted for")
