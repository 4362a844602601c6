"""Missing privileges: who may not watch, who may with less, and the errors."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import Agent, run_cli, temporary
from dns_server import Responder, needs, texts, write
from dns_server import ask as ask_dns
from repository import GOLDEN
from restricted import NOBODY, assert_refused, run, without
from scene import PATIENCE_SECONDS, ask
from waiting import wait_for

from udpwatch.agent import cli
from udpwatch.agent.daemon import app  # noqa: F401  app: cli would import it as nobody
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace


def test_user_without_root_gets_one_line_and_status_77(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The process is forked: only root may be able to read the checkout."""
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
    assert captured.err == "udpwatch: cannot load BPF programs: this user is not root; run udpwatch as root\n"


@pytest.mark.parametrize("missing", [Capability.NET_ADMIN, Capability.BPF], ids=str)
def test_root_without_a_needed_capability_gets_its_name(folder: Path, missing: Capability) -> None:
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
    assert "cannot load the program ingress: this kernel requires CAP_PERFMON" in " ".join(done.stdout.split())
    with temporary() as folder:
        assert_refused(run(Path(folder), preexec_fn=drop), 77, "CAP_PERFMON", "ingress")
    pytest.skip("by design: this kernel's verifier needs CAP_PERFMON (docs/kernels.md)")


#: PORT: sends each datagram back, from the address that routing picks
PLAIN_SERVER = """
import socket, sys
from udpwatch.agent.testing import servers
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", int(sys.argv[1])))
print(flush=True)
servers.plain(server)
"""


@contextlib.contextmanager
def plain_server(namespace: Namespace, port: int) -> Iterator[None]:
    """Run a server in a process of this namespace alone. This process has all namespaces, and without a namespace's
    cookie (before 6.15) each of them would have to be asked.
    """
    process = namespace.popen([sys.executable, "-P", "-c", PLAIN_SERVER, str(port)])
    try:
        assert process.stdout and process.stdout.readline() == b"\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_agent_without_perfmon_asks_conntrack(without_perfmon: Callable[[], None], folder: Path, port: int) -> None:
    """It works, logs what it lacks, and finds the wrong reply but not the translated one."""
    with ContainerHost() as host, plain_server(host.node, port):
        host.node.nft(
            "table inet service { chain prerouting { type nat hook prerouting priority dstnat;"
            f" ip daddr 10.99.0.9 udp dport {port} dnat ip to {host.ETH0}:{port}; }}; }}"
        )

        def enter_node() -> None:
            host.node.enter_in_child()
            without_perfmon()

        with Agent(folder, preexec_fn=enter_node) as agent:
            assert any("CAP_PERFMON" in line and "netlink" in line for line in agent.log)
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


def test_agent_without_perfmon_counts_other_namespaces_as_undecided(
    without_perfmon: Callable[[], None], folder: Path, host: ContainerHost, port: int
) -> None:
    with Agent(folder, "--window=0.5", preexec_fn=without_perfmon) as agent:
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        wait_for(lambda: agent.snapshot()["lost"]["undecided"] == 1, "the undecided one")
        assert not [row for row in agent.snapshot()["rows"] if row["port"] == port]


def test_documented_capabilities_are_enough(folder: Path) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are enough. Before 5.11, where maps count as locked memory,
    CAP_SYS_RESOURCE is needed, too, and its error names it, whether bcc or the agent makes the map.
    """
    wrapper = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon"]
    if "add CAP_SYS_RESOURCE" in " ".join(run_cli("doctor", wrapper=wrapper).stdout.split()):
        assert_refused(run(folder, "--cache=off", wrapper=wrapper), 1, "add CAP_SYS_RESOURCE", "LimitMEMLOCK")
        wrapper[1] += ",+sys_resource"
    with Agent(folder, wrapper=wrapper) as agent:
        assert agent.snapshot()["mode"] == "packet"


# ---- rights after the start ----


def credentials(pid: int) -> dict[str, str]:
    """Return user, group, capabilities and no_new_privs of a process; all of its threads must agree."""
    fields = "Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs"
    found = [
        dict(re.findall(rf"^({fields}):[ \t]*(.*?)[ \t]*$", task.read_text(), re.MULTILINE))
        for task in Path(f"/proc/{pid}/task").glob("*/status")
    ]
    assert len(found) > 1
    assert all(each == found[0] for each in found), found
    return found[0]


def names(mask: str) -> set[str]:
    """Return a mask of capabilities as libcap prints it."""
    needs("capsh", "libcap2-bin")
    done = subprocess.run(["capsh", f"--decode={mask}"], capture_output=True, text=True, check=True)
    return set(filter(None, done.stdout.strip().partition("=")[2].split(",")))


def assert_no_way_back(held: dict[str, str], capabilities: set[str]) -> None:
    assert names(held["CapEff"]) == names(held["CapPrm"]) == names(held["CapBnd"]) == capabilities
    assert names(held["CapInh"]) == names(held["CapAmb"]) == set()
    assert held["NoNewPrivs"] == "1"


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.namespace("node")


def test_agent_keeps_only_needed_capabilities_and_cannot_regain_others(folder: Path) -> None:
    with Agent(folder, "--hooks=cgroup") as agent:
        held = credentials(agent.pid)
        kept = {name for name in names(held["CapEff"]) if name != "cap_dac_override"}  # for --events FILE
        assert {"cap_bpf", "cap_net_admin"} <= kept <= {"cap_bpf", "cap_net_admin", "cap_sys_admin", "cap_sys_ptrace"}
        assert_no_way_back(held, names(held["CapEff"]))
        assert held["Uid"].split() == ["0"] * 4


def test_replay_keeps_no_capability(folder: Path) -> None:
    recording = GOLDEN / "replay.jsonl"
    with Agent(folder, f"--replay={recording}", "--events=-", stdout=subprocess.DEVNULL) as agent:
        assert_no_way_back(credentials(agent.pid), set())


def test_responder_started_as_root_runs_as_nobody(node: Namespace, folder: Path) -> None:
    """It still listens on port 53 of an address that is added later, and reads files that change."""
    folder.chmod(0o755)
    hosts = write(folder / "hosts", "10.0.0.1 a.test")
    options = ("--listen-address=127.0.0.1,10.1.0.7", f"--addn-hosts={hosts}", "--user=nobody")
    node.ip("link add test0 type veth peer name test1", "link set test0 up")
    with Responder(node, *options) as responder:
        assert responder.has_logged("changed to user nobody")
        held = credentials(responder.process.pid)
        assert_no_way_back(held, {"cap_net_bind_service"})
        assert (held["Uid"].split(), held["Gid"].split()) == ([str(NOBODY)] * 4, [str(NOBODY)] * 4)
        assert held["Groups"] == str(NOBODY)
        assert texts(ask_dns(node, "127.0.0.1", "a.test")) == ["10.0.0.1"]
        node.ip("addr add 10.1.0.7/24 dev test0")
        wait_for(lambda: responder.has_logged("listening on 10.1.0.7"), "the new address")
        write(hosts, "10.0.0.2 a.test")
        wait_for(lambda: texts(ask_dns(node, "10.1.0.7", "a.test")) == ["10.0.0.2"], "the new table")
        assert "process_open_fds" in responder.get("/metrics")[1]


def test_responder_changes_user_by_default(node: Namespace) -> None:
    with Responder(node) as responder:
        assert credentials(responder.process.pid)["Uid"].split() == [str(NOBODY)] * 4


@pytest.mark.parametrize("user", ["nobody", "root"])
def test_responder_changes_to_a_group(node: Namespace, user: str) -> None:
    uid, gid = pwd.getpwnam(user).pw_uid, grp.getgrnam("daemon").gr_gid
    with Responder(node, f"--user={user}", "--group=daemon") as responder:
        held = credentials(responder.process.pid)
        assert_no_way_back(held, {"cap_net_bind_service"})
        assert (held["Uid"].split(), held["Gid"].split()) == ([str(uid)] * 4, [str(gid)] * 4)


def test_responder_with_an_unknown_group_is_refused() -> None:
    done = run_cli("dns", "--port=5353", "--listen-address=127.0.0.1", "--metrics-listen=off", "--group=no-such-group")
    assert_refused(done, 1, "--group: there is no group 'no-such-group'")


def test_responder_that_stays_root_has_no_capabilities(node: Namespace) -> None:
    with Responder(node, "--user=root") as responder:
        held = credentials(responder.process.pid)
        assert_no_way_back(held, {"cap_net_bind_service"})
        assert held["Uid"].split() == ["0"] * 4


def test_responder_that_cannot_change_user_works_and_logs_it(node: Namespace) -> None:
    """As in a container with NET_BIND_SERVICE alone. If --user is given, it is an error."""
    needs("capsh", "libcap2-bin")
    drop = ("capsh", "--drop=cap_setuid", "--", "-c", 'exec "$@"', "sh")
    with Responder(node, wrapper=drop) as responder:
        assert responder.has_logged("cannot change to user nobody: Operation not permitted; still root")
        held = credentials(responder.process.pid)
        assert_no_way_back(held, {"cap_net_bind_service"})
        assert held["Uid"].split() == ["0"] * 4
    done = run_cli(
        "dns", "--port=5353", "--listen-address=127.0.0.1", "--metrics-listen=off", "-u", "daemon", wrapper=drop
    )
    assert_refused(done, 5, "cannot change to user daemon", "CAP_SETUID", "--user=root")


def test_responder_with_an_unknown_user_is_refused() -> None:
    done = run_cli("dns", "--port=5353", "--listen-address=127.0.0.1", "--metrics-listen=off", "--user=no-such-user")
    assert_refused(done, 1, "--user: there is no user 'no-such-user'")
