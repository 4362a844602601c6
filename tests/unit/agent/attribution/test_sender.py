"""All lookups together, on a host that the tests write."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from udpwatch.agent.attribution.sender import KEEP_SECONDS, RETRY_SECONDS, Roots, Senders
from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.daemon.state import About, State
from udpwatch.agent.model import Cause, Counters, Finding, Increase, Sample, Sender, Verdict

ID = "3f2a" * 16
UID = "0d6b4a5f-7c1a-4f4e-9a3b-5f0e2c6d7a89"
PID = 12
DOCKER = f"/docker/{ID}"
POD = f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice"
SCOPE = f"{POD}/cri-containerd-{ID}.scope"


class Host:
    """The folders of a node."""

    def __init__(self, root: Path) -> None:
        self.roots = Roots(root / "proc", root / "log", root / "docker", root / "cgroup")
        self.senders = Senders(self.roots)
        for folder in (self.roots.proc, self.roots.log, self.roots.docker, self.roots.cgroup):
            assert folder
            folder.mkdir()

    def cgroup(self, path: str) -> int:
        """Make a cgroup; returns its id."""
        assert self.roots.cgroup
        folder = self.roots.cgroup / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder.stat().st_ino

    def process(self, cgroups: str, name: str = "server") -> None:
        folder = self.roots.proc / str(PID)
        folder.mkdir()
        (folder / "comm").write_text(f"{name}\n")
        (folder / "cgroup").write_text(cgroups)
        (folder / "cmdline").write_bytes(b"/bin/server\0-v\0")
        (folder / "stat").write_text(f"{PID} ({name}) S 10 0")

    def watcher(self, *arguments: str) -> None:
        folder = self.roots.proc / "10"
        folder.mkdir()
        (folder / "stat").write_text("10 (containerd-shim) S 1 0")
        (folder / "cgroup").write_text("0::/system.slice/containerd.service\n")
        (folder / "cmdline").write_text("\0".join(("containerd-shim-runc-v2", *arguments)))

    def exits(self) -> None:
        shutil.rmtree(self.roots.proc / str(PID))

    def docker(self, name: str) -> None:
        folder = self.roots.docker / "containers" / ID
        folder.mkdir(parents=True)
        (folder / "config.v2.json").write_text(json.dumps({"Name": name}))

    def kubelet(self, container: str = "dns") -> None:
        (self.roots.log / "pods" / f"shop_dns-7c9_{UID}" / container).mkdir(parents=True)
        (self.roots.log / "containers").mkdir(exist_ok=True)
        (self.roots.log / "containers" / f"dns-7c9_shop_{container}-{ID}.log").touch()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def seen(cgroup: int = 0, comm: str = "server", cause: Cause = Cause.KERNEL_CHOSEN) -> Increase:
    return Increase(Finding("10.0.0.2", "10.0.0.1", 53, 4, Verdict.NEW, cause, comm, cgroup, 1), 1, 0, PID)


SERVER = Sender("server", PID, "/bin/server", "/bin/server -v")


def test_process_of_the_host_has_no_container(host: Host) -> None:
    host.process("0::/system.slice/named.service\n")
    assert host.senders.lookup(seen(), 0) == replace(SERVER, cgroup="/system.slice/named.service")


def test_container_of_docker_is_named(host: Host) -> None:
    host.process(f"0::{DOCKER}\n")
    host.docker("/web-1")
    expected = replace(SERVER, cgroup=DOCKER, runtime="docker", container_id=ID, container="web-1")
    assert host.senders.lookup(seen(), 0) == expected


def test_container_without_a_name_has_its_id(host: Host) -> None:
    host.process(f"0::{DOCKER}\n")
    assert host.senders.lookup(seen(), 0).container == ID[:12]


def test_pod_is_named(host: Host) -> None:
    host.process(f"0::{SCOPE}\n")
    host.kubelet()
    expected = replace(
        SERVER, cgroup=SCOPE, runtime="containerd", container_id=ID, container="dns", namespace="shop", pod="dns-7c9"
    )
    assert host.senders.lookup(seen(), 0) == expected


def test_names_of_kubernetes_win_over_names_of_docker(host: Host) -> None:
    host.process(f"0::{POD}/docker-{ID}.scope\n")
    host.docker("/k8s_dns_dns-7c9_shop_0")
    host.kubelet()
    assert host.senders.lookup(seen(), 0).container == "dns"


@pytest.mark.parametrize(
    "cgroups", [f"4:memory:{DOCKER}\n1:name=systemd:{DOCKER}\n0::/\n", f"4:memory:{DOCKER}\n"], ids=["hybrid", "v1"]
)
def test_container_is_taken_from_cgroup_v1_when_v2_shows_none(host: Host, cgroups: str) -> None:
    host.process(cgroups)
    sender = host.senders.lookup(seen(host.cgroup("/")), 0)
    assert (sender.cgroup, sender.container_id) == (DOCKER, ID)


def test_runtime_is_found_when_the_path_does_not_name_it(host: Host) -> None:
    host.process(f"0::/kubepods/pod{UID}/{ID}\n")
    host.watcher("-namespace", "k8s.io", "-id", "5" * 64)
    sender = host.senders.lookup(seen(), 0)
    assert (sender.runtime, sender.container_id) == ("containerd", ID)


def test_container_id_may_be_a_name(host: Host) -> None:
    """ctr lets its user choose the id."""
    host.cgroup("/default/five")
    host.process("0::/default/five\n")
    host.watcher("-namespace", "default", "-id", "five")
    sender = host.senders.lookup(seen(), 0)
    assert (sender.runtime, sender.container_id, sender.container) == ("containerd", "five", "five")
    assert not host.senders.has_ended(sender, 1)
    shutil.rmtree(host.roots.cgroup / "default")  # type: ignore[operator]
    assert host.senders.has_ended(sender, 2)


def test_ended_process_has_the_name_from_the_kernel_and_the_container_of_its_cgroup(host: Host) -> None:
    number = host.cgroup(SCOPE)
    host.kubelet()
    sender = host.senders.lookup(seen(number, "short"), 0)
    assert (sender.process, sender.pid, sender.cgroup) == ("short", PID, SCOPE)
    assert (sender.container, sender.namespace, sender.pod) == ("dns", "shop", "dns-7c9")


def test_sender_is_remembered_after_its_process_has_ended(host: Host) -> None:
    number = host.cgroup(DOCKER)
    host.process(f"0::{DOCKER}\n")
    host.docker("/web-1")
    alive = host.senders.lookup(seen(number), 0)
    host.exits()
    assert host.senders.lookup(seen(number), KEEP_SECONDS - 1) == alive
    late = host.senders.lookup(seen(number), KEEP_SECONDS + 1)
    assert (late.process, late.command, late.container) == ("server", "", "web-1")


def test_relative_path_is_replaced_by_the_path_of_the_id(host: Host) -> None:
    """In a cgroup namespace, /proc shows paths relative to the agent's own container."""
    number = host.cgroup(SCOPE)
    host.process(f"0::/../cri-containerd-{ID}.scope\n")
    sender = host.senders.lookup(seen(number), 0)
    assert (sender.cgroup, sender.command) == (SCOPE, "/bin/server -v")


@pytest.mark.parametrize("path", [DOCKER, f"/../docker/{ID}", "/../../elsewhere"])
def test_process_id_reused_by_another_container_gives_nothing_of_it(host: Host, path: str) -> None:
    """The cgroup that the kernel reported decides."""
    number = host.cgroup(SCOPE)
    host.cgroup(DOCKER)
    host.kubelet()
    host.process(f"0::{path}\n")
    sender = host.senders.lookup(seen(number, "server"), 0)
    assert (sender.process, sender.executable, sender.command) == ("server", "", "")
    assert (sender.cgroup, sender.container, sender.pod) == (SCOPE, "dns", "dns-7c9")


def test_process_is_not_shown_when_its_cgroup_is_unknown(host: Host) -> None:
    """Neither the id nor the path leads to a cgroup, so the process may be another one."""
    host.process(f"0::{DOCKER}\n")
    sender = host.senders.lookup(seen(7), 0)
    assert (sender.process, sender.command, sender.container_id) == ("server", "", "")


def test_name_from_the_kernel_is_left_when_nothing_is_found(host: Host) -> None:
    for root in host.roots.proc, host.roots.log, host.roots.docker, host.roots.cgroup:
        assert root
        root.rmdir()
    assert host.senders.lookup(seen(), 0) == Sender("server", PID)
    assert Senders(Roots(host.roots.proc)).lookup(seen(comm=""), 0) == Sender("unknown", PID)


def test_sender_on_another_machine_is_unknown(host: Host) -> None:
    host.process(f"0::{DOCKER}\n")
    assert host.senders.lookup(seen(cause=Cause.FORWARDED), 0) == Sender("")


def test_name_that_appears_later_is_found(host: Host) -> None:
    """kubelet makes its link a moment after the container has started."""
    host.process(f"0::{SCOPE}\n")
    assert host.senders.lookup(seen(), 0).pod == ""
    host.kubelet()
    assert host.senders.lookup(seen(), RETRY_SECONDS + 0.1).pod == "dns-7c9"


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "left empty"])
def test_pod_ends_with_its_last_container(host: Host, removed: bool) -> None:
    """A restarted container is not the end of its pod: the sandbox stays."""
    host.cgroup(SCOPE)
    sandbox = f"{POD}/cri-containerd-{'5' * 64}.scope"
    host.cgroup(sandbox)
    host.process(f"0::{SCOPE}\n")
    host.kubelet()
    sender = host.senders.lookup(seen(), 0)
    assert host.roots.cgroup
    (host.roots.cgroup / SCOPE.lstrip("/")).rmdir()
    assert not host.senders.has_ended(sender, 1)
    (host.roots.cgroup / sandbox.lstrip("/")).rmdir()
    if removed:
        (host.roots.cgroup / POD.lstrip("/")).rmdir()
    assert host.senders.has_ended(sender, 2)


def test_sender_whose_end_cannot_be_seen_never_ends(host: Host) -> None:
    host.process(f"0::{DOCKER}\n")
    assert not host.senders.has_ended(host.senders.lookup(seen(), 0), 1)
    assert not host.senders.has_ended(Sender("server"), 1)


def test_control_characters_in_names_are_escaped(host: Host) -> None:
    host.process(f"0::/user\x1b[2J/docker/{ID}\n", "a\x07")
    host.docker("/\x9b[red]")
    sender = host.senders.lookup(seen(comm="a\\x07"), 0)
    assert sender.process == r"a\x07"
    assert sender.cgroup == rf"/user\x1b[2J/docker/{ID}"
    assert sender.container == r"\x9b[red]"


def test_long_names_are_cut(host: Host) -> None:
    """Docker accepts names of any length; a label is as long as Kubernetes allows."""
    host.process(f"0::{DOCKER}\n")
    host.docker("/" + "a" * 100_000)
    assert host.senders.lookup(seen(), 0).container == "a" * 253


def test_special_characters_survive_in_labels_and_json(host: Host) -> None:
    """Quotes, backslashes and markup come through Prometheus' text format and JSON unchanged."""
    odd = 'a"b\\n{}[red]<b>'
    host.process(f"0::{DOCKER}\n", odd)
    host.docker(odd)
    state = State(About("1", "6", "node", "packet", 0, ()), 10, 60, host.senders)
    state.add(Sample((seen(comm=odd),), Counters(), (), 0, 0, 0), 0, 0)
    snapshot = state.snapshot(True, 0)
    text = exposition(SnapshotCollector(lambda: snapshot), process=False)().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (labels,) = [sample.labels for sample in samples if sample.labels.get("port") == "53"]
    assert (labels["process"], labels["container"]) == (odd, odd)
    assert json.loads(json.dumps(asdict(snapshot.rows[0])))["sender"]["container"] == odd
