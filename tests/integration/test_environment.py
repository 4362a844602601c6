"""Wrong environments, each for real in a restricted process: one clear line, the documented exit status."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from agents import COMMAND, Agent, before_all, run_cli, temporary, wait_for
from conftest import PATIENCE_SECONDS, ask

from udpwatch.agent import app, cli  # noqa: F401  app: cli would import it as nobody
from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType, ProgramType
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.lab import ContainerHost, Lab, Namespace, die_with_parent

NOBODY = 65534
_PR_CAPBSET_DROP = 24
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """For programs of our own: before Linux 5.11 they count as locked memory."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with contextlib.suppress(ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def without(*capabilities: Capability) -> Callable[[], None]:
    """For preexec_fn: root, but for these."""

    def drop() -> None:
        die_with_parent()
        for capability in capabilities:
            _libc.prctl(_PR_CAPBSET_DROP, int(capability))

    return drop


def in_mount_namespace(script: str) -> Sequence[str]:
    """A wrapper that changes what is mounted for the command alone."""
    return ["unshare", "--mount", "sh", "-e", "-c", f'{script}\nexec "$@"', "sh"]


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("udpwatch: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""


def run(folder: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`udpwatch run` with places of its own."""
    given = {flag.partition("=")[0] for flag in flags}
    places = {"--metrics-listen": "127.0.0.1:0", "--socket": str(folder / "s")}
    defaults = [f"{flag}={value}" for flag, value in places.items() if flag not in given]
    return run_cli("run", *defaults, *flags, **options)


# ---- who may not ----


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


# ---- what is missing ----


def test_btf_path_that_is_not_there(folder: Path) -> None:
    assert_refused(run(folder, "--btf=/nowhere/vmlinux"), 2, "--btf", "/nowhere/vmlinux", "No such file")


def test_kernel_without_btf(folder: Path, host: ContainerHost, port: int) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /sys/kernel/btf")
    with Agent(folder, wrapper=wrapper) as agent:
        assert any("cannot read BTF from /sys/kernel/btf/vmlinux" in line for line in agent.said)
        assert agent.snapshot()["mode"] == "netlink"
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
            assert agent.counted(port, 1) == 1


def test_bcc_missing(folder: Path) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages")
    assert_refused(run(folder, "--cache=off", wrapper=wrapper), 77, "bcc", "python3-bpfcc")


def test_bcc_is_an_empty_folder(folder: Path) -> None:
    wrapper = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages/bcc")
    assert_refused(run(folder, "--cache=off", wrapper=wrapper), 77, "bcc", "python3-bpfcc")


# ---- compiled before ----

WITHOUT_BCC = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages/bcc")


@pytest.fixture(scope="module")
def compiled() -> Iterator[Path]:
    """A cache as one start leaves it."""
    with temporary() as folder, Agent(Path(folder), f"--cache={folder}/cache"):
        yield Path(folder, "cache")


@pytest.fixture
def kept(compiled: Path, folder: Path) -> Path:
    """One's own copy of it."""
    return shutil.copytree(compiled, folder / "cache")


def test_second_start_needs_no_bcc(kept: Path, folder: Path, host: ContainerHost, port: int) -> None:
    with Agent(folder, f"--cache={kept}", wrapper=WITHOUT_BCC) as agent:
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        assert agent.counted(port, 1) == 1


@pytest.mark.parametrize("flag", ["--window=29", "--max-peers=1024", "--events-per-second=9"])
def test_other_settings_are_compiled_anew(kept: Path, folder: Path, flag: str) -> None:
    assert_refused(run(folder, f"--cache={kept}", flag, wrapper=WITHOUT_BCC), 77, "cannot import bcc")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes().replace(b"b7", b"b6", 1)),
        lambda path: os.chown(path, NOBODY, NOBODY),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
    ],
    ids=["damaged", "another owner", "others may write", "others may write to the folder"],
)
def test_what_others_could_have_written_is_not_used(kept: Path, folder: Path, spoil: Callable[[Path], object]) -> None:
    """Root would load it into the kernel."""
    for path in kept.iterdir():
        spoil(path)
    assert_refused(run(folder, f"--cache={kept}", wrapper=WITHOUT_BCC), 77, "cannot import bcc")


def test_what_is_not_used_is_compiled_anew(kept: Path, folder: Path) -> None:
    for path in kept.iterdir():
        path.chmod(0o666)
    with Agent(folder, f"--cache={kept}"):
        assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}


@pytest.mark.parametrize("place", ["read-only", "/proc/nowhere"])
def test_cache_that_cannot_be_written(folder: Path, place: str) -> None:
    """Nothing is said: it works, a compile later."""
    cache = folder / place
    (folder / "read-only").mkdir()
    wrapper = in_mount_namespace(f"mount -t tmpfs -o ro none {folder}/read-only")
    with Agent(folder, f"--cache={cache}", wrapper=wrapper) as agent:
        assert not [line for line in agent.said if "cache" in line]


def test_folder_that_systemd_gives(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UDPWATCH_CACHE"}
    with Agent(folder, env={**environment, "CACHE_DIRECTORY": f"{folder}/cache:{folder}/other"}):
        assert list((folder / "cache").iterdir())


# ---- cgroup v2 ----


def test_cgroup2_that_nobody_mounted(folder: Path, host: ContainerHost, port: int) -> None:
    """It is mounted privately: seen by nobody, gone with the agent."""
    wrapper = in_mount_namespace("umount /sys/fs/cgroup/unified 2>/dev/null || umount -l /sys/fs/cgroup")
    with Agent(folder, wrapper=wrapper) as agent:
        assert "cgroup2" not in Path(f"/proc/{agent.pid}/mountinfo").read_text().replace("/proc/1", "")
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
        assert agent.counted(port, 1) == 1


@pytest.fixture
def container() -> Iterator[Sequence[str]]:
    """A wrapper that puts a command where container runtimes put theirs: a cgroup below, its own cgroup and process
    namespace, and a mount of cgroup v2 that shows no more than that cgroup."""
    with closing(cgroup.find(None)) as root:
        inner = Path(root.path, f"udpwatch-test-{os.getpid()}")
    inner.mkdir()
    inside = f'umount -l {inner.parent}; mount -t cgroup2 none {inner.parent}; exec "$@"'
    script = (
        f"echo $$ > {inner}/cgroup.procs\n"
        f"exec unshare --cgroup --pid --fork --kill-child --mount-proc sh -e -c '{inside}' sh \"$@\""
    )
    yield ["unshare", "--mount", "sh", "-e", "-c", script, "sh"]
    wait_for(lambda: not (inner / "cgroup.procs").read_text(), "the cgroup to be empty")
    inner.rmdir()


def test_doctor_in_a_container(container: Sequence[str]) -> None:
    """The container sees its own part of the tree as the root: noticed, and said."""
    done = run_cli("doctor", "--json", wrapper=container)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["cgroup v2"]["status"] == "warn"
    assert "cgroup namespace of its own" in checks["cgroup v2"]["found"]
    assert "--cgroup" in checks["cgroup v2"]["change"]


def test_agent_in_a_container(container: Sequence[str], folder: Path) -> None:
    """It says what it cannot see, and watches what it can: its own packets among them."""
    with Agent(folder, wrapper=container) as agent:
        assert any("only this container's part of the node is watched" in line for line in agent.said)
        assert agent.get("/readyz")[0] == 200


def test_loopback_down(folder: Path) -> None:
    """No packet of our own can prove that the sensor sees: not ready, and the reason is told."""
    with Lab() as lab:
        bare = lab.namespace("bare")
        bare.ip("link set lo down")
        with Agent(folder, "--metrics-listen=off", preexec_fn=bare._enter_child, ready=False) as agent:
            wait_for(lambda: any("not ready" in line for line in agent.said), "its word")
            assert any("is lo up here" in line for line in agent.said)
            assert agent.snapshot()["ready"] is False
            bare.ip("link set lo up")
            wait_for(lambda: agent.snapshot()["ready"], "ready")


# ---- what is taken ----


def test_port_taken(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        assert_refused(run(folder, f"--metrics-listen={taken}"), 1, taken, "in use", "--metrics-listen")


def test_address_that_is_no_name(folder: Path) -> None:
    assert_refused(run(folder, "--metrics-listen=a..b:80"), 1, "a..b:80", "--metrics-listen")


def test_unwritable_socket_folder(folder: Path) -> None:
    assert_refused(run(folder, "--socket=/proc/udpwatch/s"), 1, "/proc/udpwatch/s", "--socket")


def test_read_only_socket_folder(folder: Path) -> None:
    wrapper = in_mount_namespace(f"mount -t tmpfs -o ro none {folder}")
    assert_refused(run(folder, wrapper=wrapper), 1, f"{folder}/s", "Read-only", "--socket")


def test_socket_path_is_a_file(folder: Path) -> None:
    (folder / "s").write_text("precious")
    assert_refused(run(folder), 1, "is no socket")
    assert (folder / "s").read_text() == "precious"


def test_events_file_that_cannot_be(folder: Path) -> None:
    assert_refused(run(folder, "--events=/nowhere/events"), 1, "/nowhere/events", "No such file")


def test_exclusive_program_on_the_hook(folder: Path, host: ContainerHost, port: int) -> None:
    """Cilium from before 1.14 holds sendmsg4 with flags 0: udpwatch says so and goes on without the cause."""
    with closing(cgroup.find(None)) as root:
        path = Path(root.path, f"udpwatch-test-{os.getpid()}")
    path.mkdir()
    program = _named_program("exclusive")
    with closing(cgroup.find(str(path))) as watched:
        try:
            attach_exclusively(program, watched.fd)
            with Agent(folder, f"--cgroup={path}", "--hooks=cgroup") as agent:  # function probes know the cause, too
                assert agent.metric("udpwatch_probe_attached", probe="sendmsg4") == 0
                assert agent.metric("udpwatch_probe_attached", probe="egress") == 1
                assert any("sendmsg4" in line and "Cilium" in line for line in agent.said)

                server = host.node.socket()
                server.bind(("0.0.0.0", port))

                def serve() -> None:
                    Path(path, "cgroup.procs").write_text(str(os.getpid()))
                    # A socket belongs to the cgroup in which it was made.
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
                        own.bind(("0.0.0.0", port))
                        own.sendto(*own.recvfrom(100))

                server.close()
                process = host.node.spawn("in-cgroup", serve)
                with host.container.socket() as client:
                    client.connect((host.ETH0, port))
                    wait_for(lambda: _sent(client, process), "the server")
                assert agent.counted(port, 1) == 1
                (row,) = agent.snapshot()["rows"]
                assert (row["cause"], row["sender"]["process"]) == ("unknown", "in-cgroup")
        finally:
            os.close(program)
    wait_for(lambda: not (path / "cgroup.procs").read_text(), "the cgroup to be empty")
    path.rmdir()


def _sent(client: socket.socket, process: object) -> bool:
    """Ask until the server has had a question and ended."""
    with contextlib.suppress(ConnectionRefusedError):
        client.send(b"x")
    pid = process.pid  # type: ignore[attr-defined]
    done, _ = os.waitpid(pid, os.WNOHANG)
    if done:
        process.pid = 0  # type: ignore[attr-defined]
    return bool(done)


def attach_exclusively(program: int, folder: int) -> None:
    """BPF_PROG_ATTACH with flags 0; it goes with the cgroup."""
    attribute = ctypes.create_string_buffer(128)
    attribute[:16] = b"".join(
        value.to_bytes(4, sys.byteorder) for value in (folder, program, AttachType.CGROUP_UDP4_SENDMSG, 0)
    )
    assert _libc.syscall(321 if os.uname().machine == "x86_64" else 280, 8, attribute, 128) == 0


# ---- how it is started and stopped ----


def test_nothing_is_imported_from_where_it_is_started(folder: Path) -> None:
    """Root starts it in a folder that somebody else can write to."""
    for name in ("json.py", "bcc.py", "socket.py"):
        (folder / name).write_text(f"open({str(folder / 'imported')!r}, 'w')\nraise SystemExit(3)\n")
    code = "import sys; sys.path.remove(''); from udpwatch.agent import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "imported").exists()


def test_least_rights(folder: Path) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are all that it needs, as the documents say; before 5.11, where maps count
    as locked memory, CAP_SYS_RESOURCE too, which it asks for.
    """
    wrapper = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon"]
    if "add CAP_SYS_RESOURCE" in " ".join(run_cli("doctor", wrapper=wrapper).stdout.split()):
        wrapper[1] += ",+sys_resource"
    with Agent(folder, wrapper=wrapper) as agent:
        assert agent.snapshot()["mode"] == "packet"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("after", [0.0, 0.1, 0.2, 0.4])
def test_stopped_while_starting(folder: Path, number: int, after: float) -> None:
    """As the first process of a container, too, whose signals nobody handles by default."""
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
        assert not [line for line in agent.said if "Traceback" in line], agent.said


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (caught,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_standard_streams_closed(folder: Path) -> None:
    for command in (f"doctor <&- >{folder}/out", "doctor >&-", "--help >&-"):
        shell = f"{' '.join(COMMAND)} {command}"
        done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), shell
    assert "udpwatch works here" in (folder / "out").read_text()


def test_output_that_cannot_be_written() -> None:
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


def test_few_descriptors(folder: Path) -> None:
    done = run(folder, wrapper=["sh", "-c", 'ulimit -n 12; exec "$@"', "sh"])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Too many open files" in done.stderr


def test_firewall_that_lets_nothing_in(folder: Path) -> None:
    """No proof that packets are seen; the agent says so once, answers, and stops when told."""
    with Lab() as lab:
        closed = lab.namespace("closed")
        closed.nft("table inet f { chain i { type filter hook input priority 0; policy drop; }; }")
        with Agent(folder, "--metrics-listen=off", preexec_fn=closed._enter_child, ready=False) as agent:
            wait_for(lambda: any("not ready" in line for line in agent.said), "its word")
            for _ in range(5):
                assert agent.snapshot()["ready"] is False
            assert agent.stop() == 0
            assert len([line for line in agent.said if "sent over loopback was not seen" in line]) == 1


def test_loader_that_says_much(folder: Path) -> None:
    """More than a pipe holds, and not all of it text."""
    (folder / "bcc").mkdir()
    (folder / "bcc" / "__init__.py").write_text(
        "import sys\nsys.stderr.buffer.write(b'\\xff noise\\n' * 100_000)\nraise ImportError('no such thing')\n"
    )
    assert_refused(run(folder, "--cache=off", env=before_all(folder)), 77, "cannot import bcc", "no such thing")


def test_loader_that_dies(folder: Path) -> None:
    (folder / "bcc").mkdir()
    words = "import os, sys\nsys.stderr.write('out of order\\n')\nsys.stderr.flush()\nos._exit(3)\n"
    (folder / "bcc" / "__init__.py").write_text(words)
    assert_refused(run(folder, "--cache=off", env=before_all(folder)), 1, "status 3", "out of order")


def test_event_file_of_somebody_else(folder: Path, host: ContainerHost, port: int) -> None:
    """A folder that only its owner may enter, and logrotate's `create 0640 nobody`."""
    logs = folder / "logs"
    logs.mkdir(mode=0o700)
    os.chown(logs, NOBODY, NOBODY)
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


def test_doctor_reads_the_settings_file(folder: Path) -> None:
    (folder / "settings.toml").write_text('cgroup = "/nowhere"\n')
    done = run_cli("doctor", env={"UDPWATCH_CONFIG": str(folder / "settings.toml")})
    assert done.returncode == 2
    assert "/nowhere" in done.stderr


# ---- wrong words ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window=soon"], ["--window", "'soon'", "0.1 to 3600"]),
        (["--window=nan"], ["--window", "'nan'"]),
        (["--metrics-listen=9953"], ["--metrics-listen", "'9953'", "HOST:PORT"]),
        (["--metrics-listen=[::1]:99999"], ["--metrics-listen", "HOST:PORT"]),
        (["--max-peers=-1"], ["--max-peers", "'-1'", "whole number"]),
        (["--metrics-listen=127.0.0.1:" + "9" * 5000], ["--metrics-listen", "HOST:PORT"]),
        (["--cgroup=/tmp"], ["cgroup", "/tmp", "not a cgroup v2 folder"]),
        (["--cgroup=/nowhere"], ["cgroup", "/nowhere", "No such file"]),
        (["--config=/nowhere"], ["--config", "/nowhere", "No such file"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_setting(folder: Path, flags: list[str], words: list[str]) -> None:
    assert_refused(run(folder, *flags), 2, *words)


def test_bad_variable_and_bad_file(folder: Path) -> None:
    assert_refused(run(folder, env={"UDPWATCH_WINDOW": "0"}), 2, "UDPWATCH_WINDOW", "'0'")
    settings = folder / "settings.toml"
    settings.write_text("windows = 3\n")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings), "'windows'", "window")
    settings.write_text("window = \n")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings), "TOML")
    settings.write_bytes(b"\xff\xfe")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings))


def test_unknown_command() -> None:
    done = run_cli("walk")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# ---- doctor and demo ----


def test_doctor_here() -> None:
    done = run_cli("doctor")
    assert done.returncode == 0, done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "mode packet" in done.stdout
    for name in ("kernel", "lockdown", "BTF", "capabilities", "cgroup v2", "conntrack", "bcc", "egress", "test packet"):
        assert f"  {name} " in done.stdout


def test_doctor_sees_its_neighbours(agent: Agent) -> None:
    report = json.loads(run_cli("doctor", "--json").stdout)
    (check,) = [check for check in report["checks"] if check["name"] == "other programs"]
    assert "egress on CGROUP_INET_EGRESS" in check["found"]


def test_doctor_recognises_cilium(host: ContainerHost) -> None:
    """A program that is called as Cilium's are, on our hook."""
    with closing(cgroup.find(None)) as root:
        program = _named_program("cil_sock4_sendm")
        link = bpf.link_create(program, root.fd, AttachType.CGROUP_UDP4_SENDMSG)
    try:
        done = run_cli("doctor")
        assert done.returncode == 0
        assert "Cilium is here" in done.stdout
    finally:
        os.close(link)
        os.close(program)


def _named_program(name: str) -> int:
    """As bpf.program_load, with a name."""
    code = ctypes.create_string_buffer(bytes.fromhex("b7000000010000009500000000000000"), 16)
    licence = ctypes.create_string_buffer(b"GPL")
    attribute = ctypes.create_string_buffer(128)
    fields = [(0, 4, ProgramType.CGROUP_SOCK_ADDR), (4, 4, 2), (8, 8, ctypes.addressof(code))]
    fields += [(16, 8, ctypes.addressof(licence)), (68, 4, AttachType.CGROUP_UDP4_SENDMSG)]
    for at, size, value in fields:
        attribute[at : at + size] = int(value).to_bytes(size, sys.byteorder)
    attribute[48 : 48 + len(name)] = name.encode()
    with unlimited():
        fd: int = _libc.syscall(321 if os.uname().machine == "x86_64" else 280, 5, attribute, 128)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def test_doctor_without_rights() -> None:
    done = run_cli("doctor", preexec_fn=without(*Capability))
    assert done.returncode == 77
    assert "udpwatch cannot work here" in done.stdout
    assert "CAP_NET_ADMIN" in done.stdout
    assert done.stderr == ""


def test_doctor_without_bcc(agent: Agent) -> None:
    """It tries the compiler, whatever the agent beside it has kept."""
    done = run_cli("doctor", wrapper=in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages"))
    assert done.returncode == 77
    assert "python3-bpfcc" in done.stdout


def test_demo() -> None:
    done = run_cli("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ok  ")]) == 18
    assert not [line for line in lines if line.startswith("NO  ")]
    assert max(map(len, lines)) <= 80
    assert "172.16.13.13" in done.stdout
    assert done.stderr == ""


def test_demo_notices_what_does_not_come_out() -> None:
    """With the sendmsg hooks held by another program the cause stays unknown: the demo must not claim success."""
    with closing(cgroup.find(None)) as root:
        path = Path(root.path, f"udpwatch-test-{os.getpid()}")
    path.mkdir()
    program = _named_program("exclusive")
    try:
        with closing(cgroup.find(str(path))) as watched:
            attach_exclusively(program, watched.fd)
        join = ["sh", "-e", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh"]
        done = run_cli("demo", wrapper=join, env={"UDPWATCH_CGROUP": str(path), "UDPWATCH_HOOKS": "cgroup"})
    finally:
        os.close(program)
        wait_for(lambda: not (path / "cgroup.procs").read_text(), "the cgroup to be empty")
        path.rmdir()
    assert done.returncode == 1, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("NO  ")]) == 1
    assert "they are marked NO" in done.stdout


def test_two_demos_at_once() -> None:
    with subprocess.Popen([*COMMAND, "demo"], stdout=subprocess.DEVNULL, preexec_fn=die_with_parent) as other:
        assert run_cli("demo").returncode == 0
        assert other.wait(30) == 0


def test_demo_beside_a_running_agent(agent: Agent) -> None:
    assert run_cli("demo").returncode == 0
    assert agent.get("/readyz")[0] == 200


@pytest.mark.parametrize("number", [2, 9, 15], ids=["SIGINT", "SIGKILL", "SIGTERM"])
def test_demo_interrupted(number: int) -> None:
    """Whatever ends it: no process, no program, no namespace stays, and the next one works."""
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
