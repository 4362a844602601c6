"""Faults of the node itself, provoked for real: what is lost is counted, and counted and lost add up to what was sent.

Each test also looks at `udpwatch top`, and the agent works on afterwards. UDPWATCH_OVERLOAD=full makes 10,000
namespaces and 100,000 containers.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from agents import Agent
from machine import AGENT_MEMORY, inside_own_cgroup, limited, memory_cgroup
from overload import (
    Clocks,
    ManyNamespaces,
    all_is_accounted,
    compiled,
    containers_that_answer_once,
    counted,
    lines_of,
    many_sockets,
    pour,
    started_in,
    top,
)
from restricted import NOBODY, in_mount_namespace
from scene import ask, bound
from sensors import IN_MATRIX
from waiting import wait_for

from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

FULL = os.environ.get("UDPWATCH_OVERLOAD") == "full"
NAMESPACES = 10_000 if FULL else 2_000
CONTAINERS = 100_000 if FULL else 3_000
FAULTS = "udpwatch_node_faults_total"
EVERY_EVENT = "--events-per-second=100000"


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cgroup for this process and its children, which is all that the agents watch: sums are exact whatever else runs
    on the machine.
    """
    with inside_own_cgroup() as path:
        monkeypatch.setenv("UDPWATCH_CGROUP", str(path))
        yield path


@pytest.fixture
def alone() -> Iterator[Namespace]:
    """A namespace for the servers of a test, without conntrack."""
    with Lab() as lab:
        yield lab.namespace("alone")


# ---- tables and buffers ----


def test_findings_beyond_the_table_are_counted_under_other(folder: Path, alone: Namespace, port: int) -> None:
    """One tenant may have half of the 8,192 findings; it has 20,000."""
    with Agent(folder, EVERY_EVENT) as agent:
        pour(alone, port, 40_000, names=20_000)
        lost = all_is_accounted(agent, 40_000)
        assert lost["findings_full"] > 0
        assert agent.snapshot()["other"] >= lost["findings_full"]
        table, node = top(agent)
        assert node["lost"]["findings_full"] == lost["findings_full"]
        assert "other 3" in table or "other 2" in table or "other 1" in table, table
        assert "lost 0" not in table


def test_events_beyond_the_ring_buffer_are_counted(folder: Path, alone: Namespace, port: int) -> None:
    with Agent(folder, EVERY_EVENT) as agent:
        pour(alone, port, 50_000)
        lost = all_is_accounted(agent, 50_000)
        assert lost["ring_full"] > 0
        assert agent.wrong(port) == 50_000
        table, node = top(agent)
        assert node["lost"]["ring_full"] == lost["ring_full"]
        assert "lost 0" not in table
        pour(alone, port, 1)
        all_is_accounted(agent, 50_001)


def test_lines_beyond_a_full_disk_are_counted(folder: Path, alone: Namespace, port: int) -> None:
    """Lines that fit are whole; when there is room again, lines follow."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    events = disk / "events.jsonl"

    def whole(_: Agent) -> int:
        return events.read_text().count("\n")

    try:
        with Agent(folder, f"--events={events}", EVERY_EVENT) as agent:
            pour(alone, port, 1_000)
            lost = all_is_accounted(agent, 1_000, whole)
            assert lost["output"] > 0
            assert whole(agent) > 0
            assert len([line for line in agent.log if "No space left" in line]) == 1
            table, node = top(agent)
            assert node["lost"]["output"] == lost["output"]
            assert "lost 0" not in table
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
            pour(alone, port, 10)
            assert all_is_accounted(agent, 1_010, whole)["output"] == lost["output"]
            assert len([json.loads(line) for line in events.read_text().splitlines()]) == whole(agent)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- CPU and memory ----


def test_agent_without_cpu_is_late_and_loses_no_count(folder: Path, alone: Namespace, port: int) -> None:
    """Its quota is 5 % of a CPU, and another process in its cgroup uses it up."""

    def burn() -> None:
        while True:
            pass

    with Agent(folder, EVERY_EVENT) as agent, ExitStack() as held:
        limit = held.enter_context(limited(agent.pid, AGENT_MEMORY, 0.05))

        def burn_beside_the_agent() -> None:
            limit.join()
            burn()

        hogs = [alone.spawn("hog", burn_beside_the_agent) for _ in range(20)]
        held.callback(lambda: [each.stop() for each in hogs])
        wait_for(lambda: any("too little CPU" in line for line in agent.log), "a late sample")
        pour(alone, port, 20_000)
        periods, throttled, _ = limit.throttled()
        assert throttled > periods / 2
        held.close()
        all_is_accounted(agent, 20_000)
        assert agent.wrong(port) == 20_000
        late = int(agent.metric(FAULTS, fault="late_sample"))
        assert late > 0
        assert len([line for line in agent.log if "too little CPU" in line]) < 10
        table, node = top(agent)
        assert node["faults"]["late_sample"] == late
        assert f" fault: late_sample: {late} samples" in table
        assert "faults 1" in table
        assert agent.get("/healthz")[0] == 200


def test_memory_limit_that_is_nearly_reached_is_reported(folder: Path, alone: Namespace, port: int) -> None:
    with memory_cgroup() as memory, Agent(folder, EVERY_EVENT, wrapper=started_in(memory.folder)) as agent:
        pour(alone, port, 100)  # what is used for the first time takes memory
        all_is_accounted(agent, 100)
        top(agent)
        assert agent.metric("udpwatch_memory_limit_bytes") == 0  # no limit, no metric
        limit = int(memory.used() * 1.06) >> 12 << 12
        memory.limit(limit)
        wait_for(lambda: agent.metric(FAULTS, fault="memory") > 0, "the agent to notice it")
        assert agent.metric("udpwatch_memory_limit_bytes") == limit
        assert 0.9 * limit < agent.metric("udpwatch_memory_used_bytes") <= limit
        (line,) = [line for line in agent.log if "of the memory limit are in use" in line]
        assert f"of {limit >> 20} MB" in line
        table, node = top(agent)
        assert node["memory"]["limit"] == limit
        assert node["faults"]["memory"] > 0
        assert f"of {limit >> 20} MB are in use" in table
        pour(alone, port, 100)
        all_is_accounted(agent, 200)
        memory.limit(1 << 32)
        wait_for(lambda: "of the memory limit" not in top(agent)[0].partition("memory limit:")[2], "room")
        assert agent.process.poll() is None


def test_agent_that_the_kernel_kills_for_memory_loses_no_count(
    folder: Path, state: Path, alone: Namespace, port: int
) -> None:
    """With --state, the programs count on, and the next agent reads what the killed one did not."""
    with memory_cgroup() as memory, ExitStack() as held:
        flags = (f"--state={state}", EVERY_EVENT)
        agent = held.enter_context(Agent(folder, *flags, wrapper=started_in(memory.folder)))
        pour(alone, port, 100)
        wait_for(lambda: counted(agent) == 100, "the first replies")
        memory.limit(memory.used() + (256 << 10) >> 12 << 12)
        sent = 100
        while agent.process.poll() is None:  # each name takes memory
            pour(alone, port, 2_000, names=2_000, name=f"n{sent}")
            sent += 2_000
        assert agent.process.returncode == -signal.SIGKILL
        pour(alone, port, 500)
        held.close()
    with Agent(folder, *flags) as again:
        wait_for(lambda: counted(again) >= sent + 500, "what was sent while no agent ran")
        assert counted(again) == sent + 500
        assert again.metric("udpwatch_reply_source_mismatch_total") == sent + 500


def test_memory_limit_that_is_too_low_to_start_is_named(folder: Path) -> None:
    """The compiler does not fit: one line says so before the attempt, and the last one after it."""
    with memory_cgroup() as memory:
        memory.limit(48 << 20)
        with Agent(folder, "--cache=off", wrapper=started_in(memory.folder), ready=False) as agent:
            assert agent.process.wait(60) == 1
            agent._reader.join(10)
        first, *_, last = agent.log
        assert "the memory limit of this cgroup is 48 MB" in first and "130 MB" in first
        assert "cannot" in last
        assert not agent.socket.exists()


# ---- names ----


def test_process_that_proc_hides_keeps_the_name_from_the_kernel(folder: Path, alone: Namespace, port: int) -> None:
    """With hidepid, an agent without CAP_SYS_PTRACE sees no process of another user, unless it is in the group gid=."""
    wrapper = in_mount_namespace("mount -t proc -o hidepid=2,gid=65534 proc /proc")
    with Agent(folder, EVERY_EVENT, wrapper=wrapper) as agent:
        pour(alone, port, 50, name="hidden-one", uid=NOBODY)
        lost = all_is_accounted(agent, 50)
        server = bound(alone, socket.AF_INET, "0.0.0.0", port + 1)
        with server as serving, alone.socket() as client:
            _, peer = ask(client, "127.0.0.2", port + 1, serving)

            def serve() -> None:
                os.setresuid(NOBODY, NOBODY, NOBODY)
                serving.sendto(b"x", peer)
                while True:
                    time.sleep(60)

            child = alone.spawn("hidden-two", serve)
            wait_for(lambda: agent.snapshot()["lost"]["attribution"] > lost["attribution"], "the loss")
            (row,) = [each for each in agent.snapshot()["rows"] if each["port"] == port + 1]
            assert (row["sender"]["process"], row["sender"]["pid"]) == ("hidden-two", child.pid)
            assert row["sender"]["executable"] == ""
        lost = all_is_accounted(agent, 51)
        table, node = top(agent)
        assert node["lost"]["attribution"] >= lost["attribution"]  # names are looked up again
        assert "lost 0" not in table


def test_short_lived_containers_take_no_more_rows_than_allowed(
    folder: Path, alone: Namespace, port: int, watched: Path
) -> None:
    """Each has a name of its own, answers wrongly once, and is gone."""
    with Agent(folder, "--max-series=100", EVERY_EVENT) as agent:
        before = agent.resident_kib()
        containers_that_answer_once(agent, watched, alone, port, CONTAINERS)
        lost = all_is_accounted(agent, CONTAINERS)
        grown = agent.resident_kib() - before
        print(f"{CONTAINERS} containers: {before} + {grown} KiB, lost {lost}")
        assert grown < 40 * 1024
        snapshot = agent.snapshot()
        assert len(snapshot["rows"]) <= 100
        assert snapshot["other"] > CONTAINERS / 2  # some are in the row without a name
        assert len(agent.samples("udpwatch_reply_source_mismatch_total")) <= 100 + 1
        assert lost["attribution"] > 0
        table, node = top(agent)
        assert node["other"] == snapshot["other"]
        assert "other " in table


# ---- namespaces and sockets ----


def test_namespaces_beyond_the_limit_are_counted(folder: Path, tmp_path: Path, port: int) -> None:
    """Conntrack's events of 1,000 are read; the wrong reply of a socket in each is counted all the same."""
    binary = compiled("namespaces", tmp_path)
    with ManyNamespaces(binary, NAMESPACES, port) as many:
        begin = time.monotonic()
        with Agent(folder, "--forwarded", "--hooks=cgroup", EVERY_EVENT) as agent:
            started = time.monotonic() - begin
            many.send()
            lost = all_is_accounted(agent, NAMESPACES)
            unwatched = agent.metric("udpwatch_unwatched", kind="namespaces")
            print(f"{NAMESPACES} namespaces: start {started:.1f} s, {agent.resident_kib()} KiB, lost {lost}")
            assert 1_000 <= unwatched <= NAMESPACES
            table, node = top(agent)
            assert node["unwatched"]["namespaces"] == unwatched
            assert f" fault: unwatched: {unwatched:g} network namespaces" in table
            assert agent.get("/readyz")[0] == 200


def test_sockets_beyond_the_limit_are_counted(folder: Path, alone: Namespace, port: int) -> None:
    """A namespace may have half of the 16,384: of 9,000 the rest is not listed, and a wrong reply is counted."""
    with many_sockets(alone, 9_000), Agent(folder, EVERY_EVENT) as agent:
        wait_for(lambda: agent.metric("udpwatch_unwatched", kind="sockets") >= 9_000 - 8_192, "the count")
        pour(alone, port, 10)
        all_is_accounted(agent, 10)
        _, node = top(agent)
        assert node["unwatched"]["sockets"] >= 9_000 - 8_192


# ---- conntrack ----


@contextmanager
def full_table(host: ContainerHost) -> Iterator[None]:
    """Let conntrack's table have no room for another entry; its limit is the machine's."""
    limit = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    before = limit.read_text()
    try:
        with host.node.entered():
            used = int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())
        limit.write_text(str(used))
        yield
    finally:
        limit.write_text(before)


def test_replies_that_a_full_conntrack_table_drops_are_counted(folder: Path, host: ContainerHost, port: int) -> None:
    """A wrong reply needs an entry of its own. What was sent is counted, or dropped and counted by the kernel."""
    if not IN_MATRIX:
        pytest.skip("needs a machine whose conntrack table may be too small: `make test-kernels` has such guests")
    with Agent(folder, EVERY_EVENT, preexec_fn=host.node.enter_in_child) as agent, ExitStack() as held:
        server = held.enter_context(bound(host.node, socket.AF_INET, "0.0.0.0", port))
        clients = [held.enter_context(host.container.socket()) for _ in range(50)]
        requests = [ask(client, host.ETH0, port, server) for client in clients]
        before = agent.snapshot()["conntrack"]
        refused = 0
        with full_table(host):
            for request in requests:
                try:
                    server.sendto(*request)
                except OSError:
                    refused += 1
            wait_for(lambda: agent.snapshot()["conntrack"]["dropped"] > before["dropped"], "the drops")
            table, node = top(agent)
            assert node["conntrack"]["dropped"] > 0
            assert " fault: conntrack: " in table
        after = agent.snapshot()["conntrack"]
        assert refused > 0
        assert after["dropped"] - before["dropped"] >= refused
        found = [row["count"] for row in agent.snapshot()["rows"] if row["port"] == port]
        assert sum(found) + refused == 50


# ---- clocks ----


def test_wall_clock_that_is_set_changes_no_count_and_no_age(
    folder: Path, tmp_path: Path, alone: Namespace, port: int
) -> None:
    """The clocks of the agent are moved as the kernel does it, an hour forward, then two hours back."""
    clocks = Clocks(tmp_path)
    with Agent(folder, EVERY_EVENT, env=clocks.environment) as agent:
        pour(alone, port, 5)
        all_is_accounted(agent, 5)
        for number, (added, words) in enumerate(((3600, "forward by 3600"), (-3600, "back by 7200")), start=1):
            clocks.add(wall=added)
            wait_for(lambda number=number: agent.metric(FAULTS, fault="clock_step") == number, "the step")
            assert len([line for line in agent.log if f"the wall clock was set {words}" in line]) == 1
            snapshot = agent.snapshot()
            (row,) = snapshot["rows"]
            assert -1 < snapshot["time"] - row["last"] < 60
            assert abs(snapshot["time"] - (time.time() + added)) < 60
        pour(alone, port, 5)
        all_is_accounted(agent, 10)
        *_, event = map(json.loads, agent.events_file.read_text().splitlines())
        told = datetime.fromisoformat(event["time"]).timestamp()
        assert abs(told - (datetime.now(UTC).timestamp() - 3600)) < 60
        assert agent.metric(FAULTS, fault="suspend") == 0
        table, node = top(agent)
        assert node["faults"]["clock_step"] == 2
        assert " fault: clock_step: 2 times that the wall clock was set" in table


def test_suspend_is_no_part_of_the_window(folder: Path, tmp_path: Path, alone: Namespace, port: int) -> None:
    """A request before eight hours of suspend is pending after them. The agent's clocks are moved as by the kernel."""
    clocks = Clocks(tmp_path)
    with (
        Agent(folder, EVERY_EVENT, env=clocks.environment) as agent,
        bound(alone, socket.AF_INET, "0.0.0.0", port) as server,
        alone.socket() as client,
    ):
        request = ask(client, "127.0.0.2", port, server)
        clocks.add(wall=28_800, boot=28_800)
        wait_for(lambda: agent.metric(FAULTS, fault="suspend") == 1, "the suspend")
        server.sendto(*request)
        all_is_accounted(agent, 1)
        (row,) = agent.snapshot()["rows"]
        assert abs(row["last"] - (time.time() + 28_800)) < 60
        assert agent.metric(FAULTS, fault="clock_step") == 0
        assert any("the machine was suspended for 28800" in line for line in agent.log)
        table, node = top(agent)
        assert node["faults"]["suspend"] == 1
        assert " fault: suspend: 1 times that the machine was suspended" in table


@pytest.mark.parametrize("offset", [1_000_000, -100])
def test_agent_in_a_time_namespace_decides_as_any_other(
    folder: Path, host: ContainerHost, port: int, offset: int
) -> None:
    """In mode netlink it compares its clock with times of the kernel programs. What conntrack cannot tell yet stays
    undecided for two windows, not for none or for days.
    """
    without_types = "mount -t tmpfs none /sys/kernel/btf"
    wrapper = [
        *in_mount_namespace(without_types),
        *("unshare", "--time", f"--monotonic={offset}", "--fork", "--kill-child"),
    ]
    if subprocess.run([*wrapper[-5:], "true"], capture_output=True, check=False).returncode:
        pytest.skip("by design: this kernel has no time namespaces")
    begun = time.time()
    with Agent(folder, EVERY_EVENT, wrapper=wrapper) as agent:
        assert agent.snapshot()["mode"] == "netlink"
        with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
            for _ in range(5):
                server.sendto(*ask(client, host.ETH0, port, server))
        lost = all_is_accounted(agent, 5)
        assert lost["undecided"] == 0
        assert lines_of(agent) == 5
        for event in map(json.loads, agent.events_file.read_text().splitlines()):
            assert begun - 1 < datetime.fromisoformat(event["time"]).timestamp() < time.time() + 1
        _, node = top(agent)
        (note,) = [note for note in node["notes"] if "time namespace" in note]
        assert f"{-offset:+d}.0 s" in note
