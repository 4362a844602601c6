"""The image, built by its Dockerfile, and run with what the chart gives its container."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import image
import pytest
import yaml
from charts import needs_helm, render
from machine import cgroup_folders, first_pid, listening, untouched
from pods import CGROUP_PARENT, Pod, Podman, blocks, counted, get
from repository import DOCS
from runtimes import SERVER, Docker, RuntimeHost, ask_inside, build_server, image_tar
from waiting import wait_for

from udpwatch.agent import __version__
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.testing.lab import Namespace

PORT = 32_001
ADDRESS = "169.254.20.10"
FIELDS = {"status.podIP": RuntimeHost.NODE, "spec.nodeName": "node-1"}

pytestmark = needs_helm


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    _clear_up_after_a_killed_run()
    with untouched("builder", "docker", "podman") as place:
        yield place


def _clear_up_after_a_killed_run() -> None:
    """Remove the cgroups of a killed run; all else ended with its processes. A cgroup in use stays."""
    for folder in sorted(cgroup_folders(), key=lambda path: -len(path.parts)):
        if CGROUP_PARENT.strip("/") in folder.parts:
            with suppress(OSError):
                folder.rmdir()


@pytest.fixture(scope="module")
def docker(place: Path, node: Namespace) -> Iterator[Docker]:
    """The daemon of the other containers."""
    with Docker(place / "docker", node) as daemon:
        daemon.import_image(image_tar(place, build_server(place)))
        yield daemon


@pytest.fixture(scope="module")
def archive(place: Path) -> Path:
    return image.obtain(place / "builder")


@pytest.fixture(scope="module")
def podman(place: Path, docker: Docker, archive: Path) -> Podman:
    """The runtime of the agent's containers, on a host whose /var/lib and /var/log are folders of the test."""
    podman = Podman(place / "podman", docker)
    podman.mount(
        "mount -t tmpfs none /var/lib\nmount -t tmpfs none /var/log\nmkdir /var/lib/docker\n"
        f"mount --bind {Docker.root_in(place / 'docker')} /var/lib/docker"
    )
    podman.call("load", f"--input={archive}")
    return podman


@pytest.fixture
def pod(podman: Podman, folder: Path) -> Pod:
    """The pod that the chart makes on a node with Docker."""
    return Pod(podman, folder, render({"dockerContainers": True}), FIELDS)


def ended_or_ready(podman: Podman, name: str) -> list[str]:
    """Wait until a container's agent is ready or has ended; returns its log."""
    ended = podman.call("inspect", "--format={{.State.Status}}", name) == "exited"
    said = podman.log(name)
    return said if ended or "udpwatch: ready" in said else []


@pytest.fixture
def started(podman: Podman) -> Iterator[Callable[[Pod], Agent]]:
    """Start containers of pods, each ready when the call returns; end them with the test."""
    with ExitStack() as stack:
        yield lambda pod: Agent(podman, stack.enter_context(pod.running()))


class Agent:
    """The agent of a container; ready."""

    def __init__(self, podman: Podman, name: str) -> None:
        self.podman, self.name = podman, name
        said = wait_for(lambda: ended_or_ready(podman, name), "the agent to be ready")
        assert "udpwatch: ready" in said, said
        self.pid = first_pid(f"libpod-{podman.call('inspect', '--format={{.Id}}', name)}")

    @property
    def said(self) -> list[str]:
        return self.podman.log(self.name)

    def status(self, field: str) -> str:
        """A line of /proc/PID/status of the agent itself."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(.*)$", text, re.MULTILINE)
        assert found
        return found.group(1)

    def has(self, field: str) -> set[str]:
        """Capabilities of a set of the agent's; whatever has no name here is a number."""
        mask = int(self.status(field), 16)
        names = {int(each): each.name for each in Capability}
        return {names.get(number, str(number)) for number in range(64) if mask >> number & 1}

    def udpwatch(self, *arguments: str) -> tuple[int, str]:
        """A command inside: (exit status, what it wrote)."""
        done = self.podman.done("exec", self.name, "udpwatch", *arguments)
        return done.returncode, done.stdout + done.stderr


def wrong_server(docker: Docker, node: Namespace, name: str, port: int) -> str:
    """Run a container on docker0 that is asked at its second address and replies from its first; returns its id."""
    container = docker.run(name, f"/{SERVER}", str(port))
    ask_inside(node, first_pid(container), docker.address(container), port)
    return container


# ---- contents ----


def test_image_has_labels_and_a_command(podman: Podman, loaded: Docker) -> None:
    """Its health check is tested under Docker: podman reads none from an image that a newer Docker saved in OCI's
    format.
    """
    (told,) = json.loads(podman.call("image", "inspect", image.IMAGE))
    config = told["Config"]
    health = json.loads(loaded.call("image", "inspect", "--format={{json .Config.Healthcheck}}", image.IMAGE))
    assert (config["Entrypoint"], config["Cmd"], config["StopSignal"]) == (["udpwatch"], ["run"], "SIGTERM")
    assert health["Test"] == ["CMD", "udpwatch", "doctor", "--agent"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels["title"] == "udpwatch"
    assert "version" not in labels  # only a release has one (release/image.py)
    assert labels["licenses"] == "Apache-2.0 AND GPL-2.0-only"
    assert labels["description"]
    (size,) = re.findall(r"^The image takes (\d+) MB", (DOCS / "docker.md").read_text(), re.MULTILINE)
    assert told["Size"] / 1e6 == pytest.approx(int(size), rel=0.05)


_LOOK = """
import importlib.metadata, json, pathlib, shutil, sys
site = next(path for path in sys.path if path.startswith("/opt/udpwatch"))
sources = [path for path in pathlib.Path(site).rglob("*.py")]
compiled = [path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc" for path in sources]
print(json.dumps({
    "pins": sorted(f"{each.name}=={each.version}" for each in importlib.metadata.distributions(path=[site])),
    "tools": [tool for tool in ("cc", "gcc", "clang", "pip", "pip3", "curl", "wget") if shutil.which(tool)],
    "not compiled": [str(path) for path in compiled if not path.exists() or path.read_bytes()[4] != 1],  # and unchecked
    "bcc": bool(list(pathlib.Path("/usr/lib/python3/dist-packages/bcc").glob("__pycache__/*.pyc"))),
    "sources": len(sources),
}))
"""


def test_image_has_pinned_packages_and_nothing_to_compile(podman: Podman) -> None:
    """Every dependency is pinned, there are no tools, and Python files are compiled, since the root is read-only."""
    words = ["run", "--rm", f"--cgroup-parent={CGROUP_PARENT}", "--network=none", "--no-healthcheck"]
    words += ["--entrypoint=/opt/udpwatch/bin/python", image.IMAGE]
    found = json.loads(podman.call(*words, "-c", _LOOK))
    pinned = [line for line in (image.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert found["pins"] == sorted([*pinned, f"udpwatch=={__version__}"])
    assert (found["tools"], found["not compiled"], found["bcc"]) == ([], [], True)
    assert found["sources"] > 500


_SBOM = """
import sys, pathlib, checks, image, sbom
print(sbom.write(image.contents(pathlib.Path(sys.argv[1])), "image", "1", checks.Commit("0" * 40, 1)))
"""


def test_sbom_of_the_image_lists_its_packages(podman: Podman, archive: Path) -> None:
    """The list that a release reads from the archive is compared with what dpkg and Python list inside."""
    environment = {**os.environ, "PYTHONPATH": str(image.ROOT / "release")}
    command = [sys.executable, "-c", _SBOM, archive]
    bom = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    found = {kind: set() for kind in ("deb/debian", "pypi")}
    for component in bom["components"]:
        kind, _, _ = component["purl"].removeprefix("pkg:").rpartition("/")
        found[kind].add(f"{component['name']}=={component['version']}")
    words = ["run", "--rm", f"--cgroup-parent={CGROUP_PARENT}", "--network=none", "--no-healthcheck"]
    words += ["--entrypoint=/usr/bin/dpkg-query", image.IMAGE]
    assert found["deb/debian"] == set(podman.call(*words, "-W", "-f=${Package}==${Version}\\n").splitlines())
    pinned = {line for line in (image.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    assert found["pypi"] == {*pinned, f"udpwatch=={__version__}"}


# ---- as the chart runs it ----


def test_agent_in_the_image_finds_and_names_a_wrong_server(
    started: Callable[[Pod], Agent], pod: Pod, docker: Docker, node: Namespace
) -> None:
    agent = started(pod)
    container = wrong_server(docker, node, "dns-of-the-shop", PORT)
    labels = counted(node, PORT, RuntimeHost.NODE)
    assert (labels["process"], labels["container"]) == (SERVER, "dns-of-the-shop")
    assert labels["actual"] == docker.address(container)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert get(node, RuntimeHost.NODE, *probed(pod, probe))[0] == 200
    status, told = agent.udpwatch("explain", SERVER)
    assert status == 0, told
    assert "dns-of-the-shop" in told


def probed(pod: Pod, probe: str) -> tuple[int, str]:
    """Return (port, path) that kubelet requests."""
    asked = pod.container[probe]["httpGet"]
    (port,) = (port["containerPort"] for port in pod.container["ports"] if port["name"] == asked["port"])
    return port, asked["path"]


def written(diff: str) -> list[str]:
    """Return what a container's own layer has beside the folders that its runtime mounts on."""
    mounts = ("/host/sys/fs/cgroup", "/var/log/pods", "/var/log/containers", "/var/lib/docker/containers", "/etc/mtab")
    folders = {str(folder) for mount in mounts for folder in (Path(mount), *Path(mount).parents)}
    return [line for line in diff.splitlines() if line.split()[1] not in folders]


def test_container_has_only_the_charts_capabilities_and_little_memory(
    started: Callable[[Pod], Agent], pod: Pod, podman: Podman
) -> None:
    """It has the chart's capabilities, and fewer once it runs; it writes only where it may."""
    agent = started(pod)
    assert agent.has("CapBnd") == set(pod.capabilities)
    assert agent.has("CapEff") == agent.has("CapPrm") == {"BPF", "NET_ADMIN"}
    assert (agent.status("NoNewPrivs"), agent.status("Seccomp")) == ("1", "2")
    assert int(agent.status("VmRSS").split()[0]) < 48 * 1024
    assert not written(podman.call("diff", agent.name))
    status, told = agent.udpwatch("doctor")
    assert status == 0, told
    assert "/host/sys/fs/cgroup" in told
    assert "udpwatch works here, mode packet" in told
    status, told = agent.udpwatch("doctor", "--agent")
    assert (status, "capabilities: CAP_BPF CAP_NET_ADMIN" in " ".join(told.split())) == (0, True), told


def test_restarted_container_starts_with_an_empty_cache(
    started: Callable[[Pod], Agent], pod: Pod, folder: Path, podman: Podman
) -> None:
    """An attacker in the earlier container could have left programs (docs/security.md)."""
    agent = started(pod)
    podman.call("restart", "--time=10", agent.name)
    wait_for(lambda: agent.said.count("udpwatch: ready") == 2, "the second start")
    assert not list(folder.rglob("*.json"))
    assert not written(podman.call("diff", agent.name))


# ---- fewer rights ----

#: capability -> what is said without it
MISSED = {
    "BPF": "cannot load BPF programs: CAP_BPF missing; see `udpwatch doctor`",
    "NET_ADMIN": "cannot load BPF programs: CAP_NET_ADMIN missing; see `udpwatch doctor`",
    "PERFMON": "CAP_PERFMON",
}


def test_doctor_names_each_missing_capability(pod: Pod) -> None:
    assert set(pod.capabilities) == set(MISSED)


@pytest.mark.parametrize("name", ["BPF", "NET_ADMIN"])
def test_agent_without_a_needed_capability_ends_with_one_line(pod: Pod, name: str) -> None:
    done = pod.to_its_end(without=name)
    assert (done.returncode, said_by_udpwatch(done.stderr)) == (77, [f"udpwatch: {MISSED[name]}"])


def test_agent_without_perfmon_uses_netlink_or_ends_with_one_line(podman: Podman, pod: Pod) -> None:
    """Some kernels' verifiers reject the programs without CAP_PERFMON."""
    with pod.running(without="PERFMON") as name:
        said = wait_for(lambda: ended_or_ready(podman, name), "it to be ready or to end")
        if "udpwatch: ready" in said:
            assert any(MISSED["PERFMON"] in line and "netlink" in line for line in said), said
        else:
            assert any(MISSED["PERFMON"] in line for line in said), said
            assert podman.call("wait", name) == "77"


def said_by_udpwatch(text: str) -> list[str]:
    """Return udpwatch's lines, without podman's."""
    return [line for line in text.splitlines() if line.startswith("udpwatch: ")]


def test_agent_under_an_old_seccomp_profile_names_it(pod: Pod, podman: Podman) -> None:
    """The capabilities are there, and bpf(2) is refused all the same."""
    words = [word for word in pod.arguments() if not word.startswith("--security-opt=seccomp=")]
    done = podman.done("run", "--rm", f"--security-opt=seccomp={podman.old_seccomp}", *words)
    (line,) = said_by_udpwatch(done.stderr)
    assert done.returncode == 77
    assert "a seccomp profile forbids bpf(2)" in line


# ---- DNS ----


def test_responder_in_the_pod_answers_containers_of_the_node(
    started: Callable[[Pod], Agent], podman: Podman, folder: Path, docker: Docker, node: Namespace
) -> None:
    """Its address is added with the pod and removed with it."""
    values = {
        "dns": {"enabled": True, "clusterDNS": RuntimeHost.OUTSIDE, "options": ["host-record=udpwatch.test,10.1.2.3"]}
    }
    pod = Pod(podman, folder, render(values), FIELDS)
    assert ADDRESS not in node.run(["ip", "-o", "address", "show", "dev", "lo"])
    for container in pod.spec["initContainers"]:
        done = pod.to_its_end(container)
        assert done.returncode == 0, done.stderr
    assert f"{ADDRESS}/32" in node.run(["ip", "-o", "address", "show", "dev", "lo"])

    agent = started(pod)
    assert agent.has("CapBnd") == set(pod.capabilities) == {"BPF", "NET_ADMIN", "PERFMON", "NET_BIND_SERVICE"}
    ask = f"busybox nslookup udpwatch.test {ADDRESS}"
    container = docker.run("client", "/bin/sh", "-c", f"{ask} && exec busybox sleep 3600", flags=["--env=PATH=/bin"])
    wait_for(lambda: "10.1.2.3" in docker.call("logs", container), "an answer", seconds=30)
    status, told = agent.udpwatch("doctor", "--agent")
    assert status == 0, told

    podman.call("exec", agent.name, *pod.container["lifecycle"]["preStop"]["exec"]["command"])
    assert ADDRESS not in node.run(["ip", "-o", "address", "show", "dev", "lo"])


# ---- as docs/docker.md says ----


@pytest.fixture(scope="module")
def documented() -> list[str]:
    return blocks(DOCS / "docker.md")


def options(command: str, *left_out: str) -> list[str]:
    """Return what follows `docker run`, without options that a test sets itself; cgroups are found by their parent."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["docker", "run"]
    rest, result = words[2:], [f"--cgroup-parent={CGROUP_PARENT}"]
    while rest:
        word = rest.pop(0)
        if word in ("--name", "--restart", *left_out):
            rest.pop(0)
        else:
            result.append(word)
    return result


def test_documented_command_works(documented: list[str], podman: Podman, docker: Docker, node: Namespace) -> None:
    """podman runs it, which knows its capabilities. "The host's process ids" are the daemon's here."""
    (command,) = (block for block in documented if block.startswith("docker run") and "PERFMON" in block)
    seccomp = f"--security-opt=seccomp={podman.seccomp}"
    podman.call("run", "--name=documented", "--no-healthcheck", seccomp, *options(command))
    try:
        agent = Agent(podman, "documented")
        wrong_server(docker, node, "dns-of-the-market", PORT + 1)
        labels = counted(node, PORT + 1, "127.0.0.1")
        assert (labels["process"], labels["container"]) == (SERVER, "dns-of-the-market")
        assert agent.has("CapBnd") == {"BPF", "NET_ADMIN", "PERFMON"}
        assert podman.call("exec", agent.name, "ls", "/var/cache/udpwatch"), "the volume is not used as a cache"
    finally:
        podman.call("rm", "--force", "--time=0", "documented")


def test_compose_file_has_the_options_of_the_command(documented: list[str]) -> None:
    (command,) = (block for block in documented if block.startswith("docker run") and "PERFMON" in block)
    (compose,) = (yaml.safe_load(block) for block in documented if block.startswith("services:"))
    ((name, service),) = compose["services"].items()
    names = {"network_mode": "network", "security_opt": "security-opt", "mem_limit": "memory", "volumes": "volume"}
    names |= {"container_name": "name"}
    words = ["docker", "run", "--detach"]
    for key, value in service.items():
        flag = f"--{names.get(key, key.replace('_', '-'))}"
        values = value if isinstance(value, list) else [value]
        if key != "image":
            words += [flag] if value is True else [word for each in values for word in (flag, each)]
    words.append(service["image"])
    assert name in compose["volumes"]
    assert sorted(words) == sorted(shlex.split(command.replace("\\\n", " ")))


@pytest.fixture(scope="module")
def loaded(docker: Docker, archive: Path) -> Docker:
    """The Docker of Debian 12, with the image."""
    docker.call("load", f"--input={archive}")
    return docker


def test_documented_command_works_under_docker_of_debian_12(
    documented: list[str], loaded: Docker, node: Namespace
) -> None:
    """That Docker has no names for the two capabilities; with the one that replaces them, the agent works and becomes
    healthy.
    """
    (command,) = (block for block in documented if block.startswith("docker run") and "SYS_ADMIN" in block)
    words = options(command)
    container = loaded.call("run", "--health-interval=1s", *words).splitlines()[-1]
    status = "{{.State.Health.Status}}"
    wait_for(lambda: loaded.call("inspect", f"--format={status}", container) == "healthy", "it to be healthy")
    wrong_server(loaded, node, "dns-of-the-harbour", PORT + 2)
    assert counted(node, PORT + 2, "127.0.0.1")["container"] == "dns-of-the-harbour"
    assert not written(loaded.call("diff", container))
    loaded.call("rm", "--force", container)


def test_responder_alone_needs_no_root(
    documented: list[str], loaded: Docker, node: Namespace, outside: Namespace
) -> None:
    """It runs in a container with its own network, where Docker lets any user listen on port 53."""
    (command,) = (block for block in documented if block.startswith("docker run") and " dns " in block)
    container = loaded.call("run", *options(command.replace("192.0.2.53", RuntimeHost.NODE)))
    listening(first_pid(container), 53)
    with outside.socket() as client:
        client.settimeout(30)
        client.sendto(QUESTION, (RuntimeHost.NODE, 53))
        assert client.recvfrom(512)[1][0] == RuntimeHost.NODE
    loaded.call("rm", "--force", container)


#: localhost, A
QUESTION = bytes.fromhex("000101000001000000000000 09") + b"localhost" + bytes.fromhex("00 0001 0001")
