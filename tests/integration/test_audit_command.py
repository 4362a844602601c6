"""`udpwatch audit` on a node with real programs: what it says before the first packet, and what they then do."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, as_nobody, run_cli
from audited import REPLY_SECONDS, Tally
from programs import PROGRAMS, Program
from scene import PATIENCE_SECONDS, V4, ask, bound, host_with_more_addresses
from terminals import Terminal, top
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

PORTS = count(21_000)
PKTINFO = (socket.IPPROTO_IP, servers.IP_PKTINFO, 1)


def audit(*arguments: str, status: int | None = None, **options: Any) -> dict[str, Any]:
    """Run audit; return its JSON."""
    done = run_cli("audit", "--json", *arguments, **options)
    assert done.returncode in (0, 1, 77) if status is None else done.returncode == status, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def server_at(port: int, *arguments: str) -> dict[str, Any] | None:
    """Return what audit says about the servers on a port; None: nothing."""
    found = [each for each in audit("--all", *arguments)["servers"] if each["port"] == port]
    assert len(found) <= 1, found
    return found[0] if found else None


@contextlib.contextmanager
def running(node: Namespace, program: Program, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on the node until it is asked to stop."""
    path = shutil.which(program.executable) or shutil.which(program.executable, path="/usr/sbin:/sbin")
    if not path:
        pytest.skip(f"needs {program.executable}: apt-get install {program.package}")
    process = subprocess.Popen(
        [path, *program.configure(folder, port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=node.enter_in_child,
    )
    try:
        if program.once:
            assert process.stdin
            process.stdin.write(b"reply\n")
            process.stdin.flush()
        wait_for(lambda: f":{port} " in node.run(["ss", "-Hlun"]) or process.poll(), f"{program.name} to listen")
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def source_of_reply(client: Namespace, address: str, port: int, request: bytes) -> str:
    """Ask a server; return the source of its reply, or "" without one."""
    with client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as asking:
        for seconds in REPLY_SECONDS:
            asking.settimeout(seconds)
            with contextlib.suppress(OSError):
                asking.sendto(request, (address, port))
                source: str = asking.recvfrom(1000)[1][0]
                return source
    return ""


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Count all programs, and print precision and recall at the end."""
    counted = Tally()
    yield counted
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\naudit, real programs: {counted}")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_verdict_before_the_first_packet_is_what_the_program_does(
    host: ContainerHost, tmp_path: Path, program: Program, tally: Tally
) -> None:
    port = next(PORTS)
    addresses = (host.ETH0, "172.16.13.14", "10.99.0.1", host.ETH0_6, "fd00:13::14", "fd00:99::1")
    cases = [(client, address) for client in (host.container, host.outside) for address in addresses]
    with running(host.node, program, tmp_path, port):
        verdict = server_at(port)
        assert verdict
        assert verdict["process"] == program.executable
        if not program.once:
            sources = [source_of_reply(client, address, port, program.request) for client, address in cases]
    if program.once:
        sources = []
        for client, address in cases:
            with running(host.node, program, tmp_path, port):
                sources.append(source_of_reply(client, address, port, program.request))
    replies = [(address, source) for (_, address), source in zip(cases, sources, strict=True) if source]
    is_wrong = any(address != source for address, source in replies)
    assert replies
    assert is_wrong == program.wrong
    tally.add(verdict["risk"] in ("virtual", "possible"), is_wrong, program.name)
    assert tally.mistakes == []
    predicted = {each["asked"] for each in verdict["wrong"]}
    assert {address for address, source in replies if address != source} <= predicted


def test_pktinfo_that_is_set_but_not_used_is_wrong_once_it_was_seen(
    host: ContainerHost, folder: Path, port: int
) -> None:
    with Agent(folder) as agent, bound(host.node, V4.inet, "0.0.0.0", port, PKTINFO) as server:
        connect = ("--connect", str(agent.socket))
        before = server_at(port, *connect)
        assert before and (before["risk"], before["pktinfo"]) == ("none", True)
        assert "PKTINFO is set" in before["reason"]
        with host.container.socket() as client:
            for _ in range(3):
                data, peer = ask(client, host.ETH0, port, server)
                server.sendto(data, peer)
        agent.counted(port, 3)
        after = wait_for(lambda: (now := server_at(port, *connect)) and now["risk"] == "wrong" and now, "the finding")
        assert after["seen"] == [{"expected": host.ETH0, "actual": host.DOCKER0, "count": 3}]
        assert after["remedy"]["do"]


# ---- the command ----


@pytest.fixture(scope="module")
def empty() -> Iterator[ContainerHost]:
    """A host where no other test leaves a socket: a process that was killed closes its own some time later."""
    with host_with_more_addresses() as lab:
        yield lab


def alone(node: Namespace, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a server and then audit in a process namespace of their own, where audit sees no other process."""
    shell = 'python3 -c "$0" & until ss -Hlun | grep -q :; do :; done; shift 0; exec "$@"'
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", shell, script)
    return run_cli("audit", *arguments, wrapper=unshare, preexec_fn=node.enter_in_child)


def script(address: str, *options: tuple[int, int, int]) -> str:
    """Return a Python server that waits."""
    sets = "".join(f"s.setsockopt(*{option});" for option in options)
    return f"import socket; s = socket.socket(2, 2); {sets} s.bind(('{address}', 5000)); s.recv(1)"


@pytest.mark.parametrize(
    ("address", "options", "status", "said"),
    [
        ("0.0.0.0", (), 1, "At risk: 1 of 1 UDP servers (1 virtual)."),
        ("0.0.0.0", (PKTINFO,), 0, "At risk: 0 of 1 UDP servers."),
        ("127.0.0.1", (), 0, "At risk: 0 of 1 UDP servers."),
    ],
    ids=["wildcard", "PKTINFO", "bound"],
)
def test_exit_status_tells_whether_a_server_is_at_risk(
    empty: ContainerHost, address: str, options: Sequence[tuple[int, int, int]], status: int, said: str
) -> None:
    done = alone(empty.node, script(address, *options))
    assert (done.returncode, done.stdout.splitlines()[0]) == (status, said), done.stderr
    assert "no agent is running" in done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_pod_with_one_address_is_not_at_risk(empty: ContainerHost) -> None:
    done = alone(empty.container, script("0.0.0.0"), "--all")
    assert done.returncode == 0, done.stdout
    assert "port 5000/udp, on 0.0.0.0: routing selects the address that was asked" in " ".join(done.stdout.split())


def test_user_without_privilege_learns_what_is_missing() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", script("127.0.0.1").replace("s.recv(1)", "print(flush=True); s.recv(1)")],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout and holder.stdout.readline()
        done = run_cli("audit", wrapper=as_nobody())
    finally:
        holder.kill()
        holder.communicate()
    assert done.returncode == 77
    assert "cannot examine the sockets of" in done.stderr
    assert "run this as root" in done.stderr


def test_user_without_privilege_sees_what_the_agent_knows(host: ContainerHost, folder: Path, port: int) -> None:
    folder.chmod(0o755)
    with Agent(folder, "--socket-group=nogroup") as agent:
        wrong_replies(host, port, 3, "wrong-server")
        agent.counted(port, 3)
        wait_for(lambda: any(each["port"] == port for each in agent.snapshot()["servers"]), "the server")
        report = audit("--connect", str(agent.socket), status=1, wrapper=as_nobody())
    (server,) = [each for each in report["servers"] if each["port"] == port]
    assert (server["risk"], server["process"], server["requests"], server["replies"]) == ("wrong", "wrong-server", 3, 3)
    assert "what the agent knows" in report["notes"][0]


def test_five_thousand_sockets_in_300_namespaces(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It answers in two seconds on an idle machine. Its CPU time, about two seconds, doubles on a busy one; work for
    each pair of sockets would take minutes. The agent's memory stays within its budget, and top answers keys.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_192), hard))
    ready, told = os.pipe()
    try:
        with Lab() as lab:
            for number in range(300):

                def serve() -> None:
                    made = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(17)]
                    for port, each in enumerate(made, start=10_000):
                        each.bind(("0.0.0.0", port))
                    os.write(told, b"1")
                    signal.pause()

                lab.namespace(f"n{number}").spawn("crowd", serve)
                os.read(ready, 1)
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            report = audit("--all")
            took, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
            with Agent(folder) as agent:
                wait_for(lambda: len(agent.snapshot()["servers"]) == 500, "as many servers as may be listed")
                with Terminal(folder, *top("--servers", "--connect", str(agent.socket))) as terminal:
                    terminal.shows("of 500")
                    for order in ("req/s▼", "rep/s▼", "unans▼"):
                        terminal.press("s")
                        terminal.shows(order)
                    terminal.press("q")
                    assert terminal.ended() == 0
                for _ in range(15):
                    agent.get("/metrics")
                    time.sleep(1)
                resident = agent.resident_kib() / 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(ready)
        os.close(told)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        print(f" [{took:.1f} s, {spent:.1f} s of CPU time; the agent has {resident:.1f} MB]", end="")
    assert sum(each["process"] == "crowd" for each in report["servers"]) == 300 * 17
    assert spent < 15
    assert resident < 45


def test_wrong_usage_and_missing_agent() -> None:
    assert run_cli("audit", "--nonsense").returncode == 2
    done = run_cli("audit", "--connect", "/nonexistent.sock")
    assert done.returncode == 1
    assert "no agent is listening" in done.stderr


def test_servers_of_all_namespaces_are_found(host: ContainerHost, port: int) -> None:
    with bound(host.node, V4.inet, "0.0.0.0", port), bound(host.container, V4.inet, "0.0.0.0", port):
        found = [each for each in audit("--all")["servers"] if each["port"] == port]
    risks = {each["netns"]: each["risk"] for each in found}
    assert risks == {host.node.inode: "virtual", host.container.inode: "none"}


def test_wrong_replies_in_one_namespace_say_nothing_of_another(host: ContainerHost, folder: Path, port: int) -> None:
    with Agent(folder) as agent, bound(host.container, V4.inet, "0.0.0.0", port) as other:
        process = host.container.spawn("wrong-server", lambda: other.sendto(*other.recvfrom(100)))
        with host.node.socket() as client:
            client.settimeout(PATIENCE_SECONDS)
            client.sendto(b"request", (host.CONTAINER, port))
            assert client.recvfrom(100)[1][0] == host.CONTAINER
        assert process.wait() == 0
        wrong_replies(host, port, 3, "wrong-server")

        def servers() -> list[dict[str, Any]]:
            return [each for each in agent.snapshot()["servers"] if each["port"] == port]

        wait_for(lambda: sum(each["wrong"] for each in servers()) == 3, "the wrong replies")
        assert {each["netns"]: each["wrong"] for each in servers()} == {host.node.inode: 3, host.container.inode: 0}
        assert {each["netns"] for each in servers() if each["risk"] == "wrong"} == {host.node.inode}
