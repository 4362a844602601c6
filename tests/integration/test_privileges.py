"""Who may not watch, who may with less, and what is said to them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import Agent, run_cli, temporary, wait_for
from conftest import PATIENCE_SECONDS, ask
from restricted import NOBODY, assert_refused, run, without

from udpwatch.agent import app, cli  # noqa: F401  app: cli would import it as nobody
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.lab import ContainerHost, Namespace


def test_no_root(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As nobody, in a forked process: the checkout itself may lie where only root can read it."""
    pid = os.fork()
    if pid == 0:
        status = 99
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            status = cli.main(["run", "--metrics-listen=127.0.0.1:0", f"--socket={folder}/s"])
            sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    captured = capfd.readouterr()
    assert os.waitstatus_to_exitcode(status) == 77
    assert captured.err == "udpwatch: watching the kernel needs root: run udpwatch as root\n"


@pytest.mark.parametrize("missing", [Capability.NET_ADMIN, Capability.BPF], ids=str)
def test_root_without_a_needed_capability(folder: Path, missing: Capability) -> None:
    drop = {missing, Capability.SYS_ADMIN}  # CAP_SYS_ADMIN stands in for CAP_BPF
    assert_refused(run(folder, preexec_fn=without(*drop)), 77, str(missing), "doctor")


@pytest.fixture(scope="module")
def without_perfmon() -> Callable[[], None]:
    """For preexec_fn. Before Linux kernel commits d75e30dddf73 ("bpf: Fix issue in verifying allow_ptr_leaks") (in
    v6.6) and ab125ed3ec1c ("bpf: fix check for attempt to corrupt spilled pointer") (in v6.8) the verifier takes no
    such programs from whom CAP_PERFMON is missing; that this is said is asserted.
    """
    drop = without(Capability.PERFMON, Capability.SYS_ADMIN)
    done = run_cli("doctor", preexec_fn=drop)
    assert "add CAP_PERFMON" in done.stdout
    if done.returncode == 0:
        assert "mode netlink" in done.stdout
        return drop
    assert done.returncode == 77
    assert "this kernel takes the program ingress only from whom has CAP_PERFMON" in " ".join(done.stdout.split())
    with temporary() as folder:
        assert_refused(run(Path(folder), preexec_fn=drop), 77, "CAP_PERFMON", "ingress")
    pytest.skip("by design: this kernel's verifier needs CAP_PERFMON (docs/kernels.md)")


#: PORT: sends each datagram back, from the address that routing picks
PLAIN_SERVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", int(sys.argv[1])))
print(flush=True)
while True:
    server.sendto(*server.recvfrom(100))
"""


@contextlib.contextmanager
def plain_server(namespace: Namespace, port: int) -> Iterator[None]:
    """A process that has to do with this one namespace; this one here holds them all, and without a namespace's cookie
    (before 6.15) each of them would have to be asked.
    """
    process = namespace.popen([sys.executable, "-c", PLAIN_SERVER, str(port)])
    try:
        assert process.stdout and process.stdout.readline() == b"\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_without_perfmon_conntrack_is_asked(without_perfmon: Callable[[], None], folder: Path, port: int) -> None:
    """Runs all the same, says what it costs, finds the wrong reply and not the translated one."""
    with ContainerHost() as host, plain_server(host.node, port):
        host.node.nft(
            "table inet service { chain prerouting { type nat hook prerouting priority dstnat;"
            f" ip daddr 10.99.0.9 udp dport {port} dnat ip to {host.ETH0}:{port}; }}; }}"
        )

        def enter_node() -> None:
            host.node._enter_child()
            without_perfmon()

        with Agent(folder, preexec_fn=enter_node) as agent:
            assert any("CAP_PERFMON" in line and "netlink" in line for line in agent.said)
            with host.outside.socket() as client, host.container.socket() as inside:
                client.settimeout(PATIENCE_SECONDS)
                for _ in range(3):
                    client.sendto(b"x", ("10.99.0.9", port))
                    assert client.recvfrom(100)[1][0] == "10.99.0.9"
                inside.sendto(b"x", (host.ETH0, port))
                wait_for(lambda: [row for row in agent.snapshot()["rows"] if row["port"] == port], "the finding")
            (row,) = [row for row in agent.snapshot()["rows"] if row["port"] == port]
            assert (row["count"], row["verdict"], row["actual"]) == (1, "unknown", host.DOCKER0)
            assert agent.snapshot()["lost"]["undecided"] == 0


def test_without_perfmon_other_namespaces_are_not_guessed(
    without_perfmon: Callable[[], None], folder: Path, host: ContainerHost, port: int
) -> None:
    """What cannot be asked is counted as undecided and never reported."""
    with Agent(folder, "--window=0.5", preexec_fn=without_perfmon) as agent:
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        wait_for(lambda: agent.snapshot()["lost"]["undecided"] == 1, "the undecided one")
        assert not [row for row in agent.snapshot()["rows"] if row["port"] == port]


def test_least_rights(folder: Path) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are all that it needs, as the documents say; before 5.11, where maps count
    as locked memory, CAP_SYS_RESOURCE too, which it asks for, whether it is bcc that makes maps or the agent.
    """
    wrapper = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon"]
    if "add CAP_SYS_RESOURCE" in " ".join(run_cli("doctor", wrapper=wrapper).stdout.split()):
        assert_refused(run(folder, "--cache=off", wrapper=wrapper), 1, "add CAP_SYS_RESOURCE", "LimitMEMLOCK")
        wrapper[1] += ",+sys_resource"
    with Agent(folder, wrapper=wrapper) as agent:
        assert agent.snapshot()["mode"] == "packet"
