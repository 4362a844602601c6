"""Environments that lack something: udpwatch ends with one clear line and the documented exit status, or works."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from agents import COMMAND, Agent, before_all, run_cli
from machine import own_cgroup
from restricted import NOBODY, assert_refused, held_exclusively, in_mount_namespace, run
from scene import PATIENCE_SECONDS, ask
from waiting import wait_for

from udpwatch.agent.commands import doctor
from udpwatch.agent.kernel.loader_child import SOURCES
from udpwatch.agent.testing.lab import ContainerHost, Lab

# ---- missing parts ----


def test_missing_btf_path_is_refused(folder: Path) -> None:
    assert_refused(run(folder, "--btf=/nowhere/vmlinux"), 2, "--btf", "/nowhere/vmlinux", "No such file")


def test_kernel_without_btf_uses_netlink(folder: Path, host: ContainerHost, port: int) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /sys/kernel/btf")
    with Agent(folder, wrapper=wrapper) as agent:
        assert any("cannot read BTF from /sys/kernel/btf/vmlinux" in line for line in agent.log)
        assert agent.snapshot()["mode"] == "netlink"
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
            assert agent.counted(port, 1) == 1


def test_missing_bcc_is_refused(folder: Path) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages")
    assert_refused(run(folder, "--cache=off", wrapper=wrapper), 77, "bcc", "python3-bpfcc")


def test_bcc_that_is_an_empty_folder_is_refused(folder: Path) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages/bcc")
    assert_refused(run(folder, "--cache=off", wrapper=wrapper), 77, "bcc", "python3-bpfcc")


def test_compiler_error_is_shown(folder: Path) -> None:
    """bcc's exception does not have the compiler's message."""
    (folder / "sockets.c").write_text("int ingress(struct __sk_buff *skb) { return 1 }\n")
    wrapper = in_mount_namespace(f"mount --bind {folder}/sockets.c {SOURCES}/sockets.c")
    assert_refused(run(folder, "--cache=off", wrapper=wrapper), 1, "cannot compile sockets.c", "error: expected ';'")


def test_long_output_of_the_loader_does_not_block(folder: Path) -> None:
    """It is more than a pipe holds, and not all of it is text."""
    (folder / "bcc").mkdir()
    (folder / "bcc" / "__init__.py").write_text(
        "import sys\nsys.stderr.buffer.write(b'\\xff noise\\n' * 100_000)\nraise ImportError('no such thing')\n"
    )
    assert_refused(run(folder, "--cache=off", env=before_all(folder)), 77, "cannot import bcc", "no such thing")


def test_loader_that_dies_is_reported(folder: Path) -> None:
    (folder / "bcc").mkdir()
    words = "import os, sys\nsys.stderr.write('out of order\\n')\nsys.stderr.flush()\nos._exit(3)\n"
    (folder / "bcc" / "__init__.py").write_text(words)
    assert_refused(run(folder, "--cache=off", env=before_all(folder)), 1, "status 3", "out of order")


def test_descriptor_limit_is_raised_or_named(folder: Path) -> None:
    """A soft limit is raised; a hard limit that is too low is named."""
    assert_refused(
        run(folder, wrapper=["sh", "-c", 'ulimit -n 255; exec "$@"', "sh"]),
        1,
        "cannot open 256 files",
        "ulimit -n",
    )
    with Agent(folder, wrapper=["sh", "-c", 'ulimit -S -n 20; exec "$@"', "sh"]) as agent:
        assert agent.get("/readyz")[0] == 200


def test_too_few_descriptors_for_the_loaders_programs_is_one_error(folder: Path) -> None:
    """When most descriptors are in use, some limits are too low for all programs: one line says how to raise it."""
    said: list[str] = []
    for free in range(28, 64, 2):
        taken = range(256 - free)

        def take(taken: range = taken) -> None:
            for _ in taken:
                os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)

        script = 'ulimit -n 256; exec "$@"'
        with Agent(folder, wrapper=["sh", "-c", script, "sh"], ready=False, preexec_fn=take, close_fds=False) as agent:
            ready = wait_for(lambda: agent.process.poll() or any("ready" in line for line in agent.log), "its end")
        agent._reader.join(5)
        if ready is True:
            break
        assert len(agent.log) == 1, agent.log
        said += agent.log
    assert any("from the loader: Too many open files (limit 256)" in line and "ulimit -n" in line for line in said), (
        said
    )


@pytest.mark.parametrize("offset", [1_000_000, -100])
def test_events_have_the_right_time_in_a_time_namespace(
    folder: Path, host: ContainerHost, port: int, offset: int
) -> None:
    """The programs use the host's clock, the agent that of its time namespace."""
    wrapper = ["unshare", "--time", f"--monotonic={offset}", "--fork", "--kill-child"]
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip("by design: this kernel has no time namespaces")
    begun = datetime.now(UTC)
    with Agent(folder, wrapper=wrapper) as agent, host.node.socket() as server, host.container.socket() as client:
        server.bind(("0.0.0.0", port))
        server.sendto(*ask(client, host.ETH0, port, server))
        agent.counted(port, 1)
        wait_for(agent.events_file.read_text, "the event")
        (event,) = map(json.loads, agent.events_file.read_text().splitlines())
        told = datetime.fromisoformat(event["time"])
    assert begun - timedelta(seconds=0.1) < told < datetime.now(UTC) + timedelta(seconds=0.1)


# ---- cgroup v2 ----


def test_cgroup_v2_is_mounted_privately_when_missing(folder: Path, host: ContainerHost, port: int) -> None:
    """Nobody else sees the mount, and it goes with the agent."""
    wrapper = in_mount_namespace("umount /sys/fs/cgroup/unified 2>/dev/null || umount -l /sys/fs/cgroup")
    with Agent(folder, wrapper=wrapper) as agent:
        assert "cgroup2" not in Path(f"/proc/{agent.pid}/mountinfo").read_text().replace("/proc/1", "")
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        assert agent.counted(port, 1) == 1


@pytest.fixture
def container() -> Iterator[Sequence[str]]:
    """A wrapper that runs a command as container runtimes do: in a cgroup below the root, with its own cgroup and
    process namespace, and a mount of cgroup v2 that shows only that cgroup.
    """
    with own_cgroup() as inner:
        inside = f'umount -l {inner.parent}; mount -t cgroup2 none {inner.parent}; exec "$@"'
        script = (
            f"echo $$ > {inner}/cgroup.procs\n"
            f"exec unshare --cgroup --pid --fork --kill-child --mount-proc sh -e -c '{inside}' sh \"$@\""
        )
        yield ["unshare", "--mount", "sh", "-e", "-c", script, "sh"]


def test_doctor_warns_in_a_cgroup_namespace(container: Sequence[str]) -> None:
    """The container sees its own part of the tree as the root."""
    done = run_cli("doctor", "--json", wrapper=container)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["cgroup v2"]["status"] == "warn"
    assert "cgroup namespace of its own" in checks["cgroup v2"]["found"]
    assert "--cgroup" in checks["cgroup v2"]["change"]


def test_agent_in_a_cgroup_namespace_watches_its_part(container: Sequence[str], folder: Path) -> None:
    """It logs what it cannot see, and watches the rest, including its own packets."""
    with Agent(folder, wrapper=container) as agent:
        assert any("only this container's part of the node" in line for line in agent.log)
        assert agent.get("/readyz")[0] == 200


def test_agent_works_without_the_cause_when_another_program_holds_the_hook(
    folder: Path, host: ContainerHost, port: int
) -> None:
    """Cilium before 1.14 holds sendmsg4 with flags 0."""
    with held_exclusively() as path, Agent(folder, f"--cgroup={path}", "--hooks=cgroup") as agent:  # probes know it too
        assert agent.metric("udpwatch_probe_attached", probe="sendmsg4") == 0
        assert agent.metric("udpwatch_probe_attached", probe="egress") == 1
        assert any("sendmsg4" in line and "Cilium" in line for line in agent.log)

        def serve() -> None:
            Path(path, "cgroup.procs").write_text(str(os.getpid()))
            # A socket belongs to the cgroup in which it was made.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
                own.bind(("0.0.0.0", port))
                own.sendto(*own.recvfrom(100))

        process = host.node.spawn("in-cgroup", serve)
        with host.container.socket() as client:
            client.connect((host.ETH0, port))
            wait_for(lambda: _sent(client, process), "the server")
        assert agent.counted(port, 1) == 1
        (row,) = agent.snapshot()["rows"]
        assert (row["cause"], row["sender"]["process"]) == ("unknown", "in-cgroup")


def _sent(client: socket.socket, process: object) -> bool:
    """Send requests until the server has received one and ended."""
    with contextlib.suppress(ConnectionRefusedError):
        client.send(b"x")
    pid = process.pid  # type: ignore[attr-defined]
    done, _ = os.waitpid(pid, os.WNOHANG)
    if done:
        process.pid = 0  # type: ignore[attr-defined]
    return bool(done)


# ---- self-test ----


def test_agent_is_not_ready_while_loopback_is_down(folder: Path) -> None:
    """The self-test cannot pass, and the reason is logged."""
    with Lab() as lab:
        bare = lab.namespace("bare")
        bare.ip("link set lo down")
        with Agent(folder, "--metrics-listen=off", preexec_fn=bare.enter_in_child, ready=False) as agent:
            wait_for(lambda: any("not ready" in line for line in agent.log), "its word")
            assert any("is lo up here" in line for line in agent.log)
            assert agent.snapshot()["ready"] is False
            bare.ip("link set lo up")
            wait_for(lambda: agent.snapshot()["ready"], "ready")


def test_agent_is_not_ready_behind_a_firewall_that_drops_everything(folder: Path) -> None:
    """It logs the failed self-test once, answers its clients, and stops when told to."""
    with Lab() as lab:
        closed = lab.namespace("closed")
        closed.nft("table inet f { chain i { type filter hook input priority 0; policy drop; }; }")
        with Agent(folder, "--metrics-listen=off", preexec_fn=closed.enter_in_child, ready=False) as agent:
            wait_for(lambda: any("not ready" in line for line in agent.log), "its word")
            for _ in range(5):
                assert agent.snapshot()["ready"] is False
            assert agent.stop() == 0
            assert len([line for line in agent.log if "did not see a datagram sent over loopback" in line]) == 1


# ---- paths and ports ----


def test_agent_watches_while_its_metrics_port_is_in_use(folder: Path, host: ContainerHost, port: int) -> None:
    """Any local user can take the port while the agent restarts: the agent watches, logs it, and binds the port once it
    is free.
    """
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"cannot listen on 127.0.0.1:{other.getsockname()[1]} for metrics: Address already in use"
        agent = Agent(folder, f"--metrics-listen=127.0.0.1:{other.getsockname()[1]}", ready=False)
        with agent:
            wait_for(lambda: f"udpwatch: not ready: {taken}" in agent.log, "the agent to watch")
            (line,) = [line for line in agent.log if "retrying every 2 s" in line]
            assert "--metrics-listen" in line
            with host.node.socket() as server, host.container.socket() as client:
                server.bind(("0.0.0.0", port))
                server.sendto(*ask(client, host.ETH0, port, server))
            wait_for(lambda: [row for row in agent.snapshot()["rows"] if row["port"] == port], "the finding")
            report = doctor.ask(agent.socket)
            assert not report.works and taken in report.checks[0].found
            other.close()
            wait_for(lambda: "udpwatch: ready again" in agent.log, "the port to be bound")
            assert agent.get("/readyz") == (200, "ready\n")
            assert agent.wrong(port) == 1
            assert doctor.ask(agent.socket).works


def test_invalid_metrics_address_is_refused(folder: Path) -> None:
    assert_refused(run(folder, "--metrics-listen=a..b:80"), 1, "a..b:80", "--metrics-listen")


def test_socket_folder_that_cannot_be_created_is_refused(folder: Path) -> None:
    assert_refused(run(folder, "--socket=/proc/udpwatch/s"), 1, "/proc/udpwatch/s", "--socket")


def test_read_only_socket_folder_is_refused(folder: Path) -> None:
    wrapper = in_mount_namespace(f"mount -t tmpfs -o ro none {folder}")
    assert_refused(run(folder, wrapper=wrapper), 1, f"{folder}/s", "Read-only", "--socket")


def test_socket_path_that_is_a_file_is_refused(folder: Path) -> None:
    (folder / "s").write_text("precious")
    assert_refused(run(folder), 1, "the file is not a socket")
    assert (folder / "s").read_text() == "precious"


def test_invalid_events_file_is_refused(folder: Path) -> None:
    assert_refused(run(folder, "--events=/nowhere/events"), 1, "/nowhere/events", "No such file")


def test_events_file_of_another_user_is_written(folder: Path, host: ContainerHost, port: int) -> None:
    """The folder lets only root in, and logrotate creates the file with `create 0640 nobody`."""
    logs = folder / "logs"
    logs.mkdir(mode=0o700)
    events = logs / "events"

    def lines() -> int:
        return len(events.read_text().splitlines()) if events.exists() else 0

    with Agent(folder, f"--events={events}") as agent, host.node.socket() as server, host.container.socket() as client:
        server.bind(("0.0.0.0", port))
        server.sendto(*ask(client, host.ETH0, port, server))
        wait_for(lambda: lines() == 1, "the first event")
        events.rename(logs / "events.1")
        events.touch(mode=0o640)
        os.chown(events, NOBODY, NOBODY)
        server.sendto(*ask(client, host.ETH0, port, server))
        wait_for(lambda: lines() == 1, "an event in the new file")
        assert agent.metric("udpwatch_events_lost_total", stage="output") == 0


# ---- start and end ----


def test_nothing_is_imported_from_the_working_directory(folder: Path) -> None:
    """Root may start the agent in a folder that other users can write to."""
    for name in ("json.py", "bcc.py", "socket.py"):
        (folder / name).write_text(f"open({str(folder / 'imported')!r}, 'w')\nraise SystemExit(3)\n")
    code = "import sys; sys.path.remove(''); from udpwatch.agent import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("after", [0.0, 0.1, 0.2, 0.4])
def test_agent_can_be_stopped_while_it_starts(folder: Path, number: int, after: float) -> None:
    """It is also the first process of a container, for which signals have no default action."""
    wrapper = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with Agent(folder, "--events=off", wrapper=wrapper, ready=False, cwd=folder) as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
        child = int(wait_for(lambda: children.read_text().split(), "the agent")[0])
        wait_for(lambda: Path(f"/proc/{child}/exe").readlink().name.startswith("python"), "Python to run")
        wait_for(lambda: _handles(child, signal.SIGHUP), "its handlers")  # the last one that it installs
        time.sleep(after)  # somewhere between that and being ready
        os.kill(child, number)
        assert agent.process.wait(PATIENCE_SECONDS) == 0
        assert not agent.socket.exists()
        assert not [line for line in agent.log if "Traceback" in line], agent.log


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (caught,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_agent_works_with_closed_standard_streams(folder: Path) -> None:
    for command in (f"doctor <&- >{folder}/out", "doctor >&-", "--help >&-"):
        shell = f"{' '.join(COMMAND)} {command}"
        done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), shell
    assert "udpwatch works here" in (folder / "out").read_text()


def test_unwritable_output_ends_with_status_1() -> None:
    for command, status in (("doctor >/dev/full", 1), ("--help >/dev/full", 1)):
        shell = f"{' '.join(COMMAND)} {command}"
        done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (status, "udpwatch: No space left on device\n"), shell
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {' '.join(COMMAND)} doctor | true"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
