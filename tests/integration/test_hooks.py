"""The programs alone and together: what the cgroup hooks find, what the function probes find, what both find."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, before_all, run_cli
from scene import V4, Family, ask, both, bound, source_control
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.programs import HOOKS
from udpwatch.agent.model import Cause, Event, Forwarded, Hooks, Verdict
from udpwatch.agent.sources import flows
from udpwatch.agent.testing.lab import ContainerHost


def skip_without_probes(watch: Watch) -> None:
    reason = watch.sensor.features.probes_reason
    if reason:
        pytest.skip(f"function probes are not allowed here ({reason}): `make test-kernels` boots kernels that do")


@pytest.fixture(scope="module")
def everything() -> Iterator[Watch]:
    """A sensor with all programs."""
    with closing(Watch()) as watch:
        skip_without_probes(watch)
        yield watch


@pytest.fixture(scope="module")
def functions() -> Iterator[Watch]:
    """A sensor with function probes alone."""
    with closing(Watch(hooks=Hooks.CGROUP)) as watch:
        skip_without_probes(watch)
    with closing(cgroup.find(None)) as root:
        kinds = (bpf.AttachType.CGROUP_INET_EGRESS, bpf.AttachType.CGROUP_INET_INGRESS)
        before = [bpf.program_query(root.fd, kind) for kind in kinds]  # the tests' other sensors
        with closing(Watch(hooks=Hooks.FUNCTION)) as watch:
            assert [bpf.program_query(root.fd, kind) for kind in kinds] == before
            yield watch


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "GRACE_SECONDS", 0.5)


def the_event(watch: Watch, port: int) -> Event:
    watch.read()
    time.sleep(flows.GRACE_SECONDS + 0.1)  # the grace itself
    assert watch.count(port) == 1
    (event,) = watch.events(port)
    return event


def test_cgroup_hooks_alone_find_a_wrong_reply(port: int) -> None:
    with ContainerHost() as host, closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.OFF)) as watch:
        assert [probe.name for probe in watch.sensor.probes()] == [program.name for program, _ in HOOKS]
        with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
            server.sendto(*ask(client, V4.eth0, port, server))
            event = the_event(watch, port)
            assert (event.finding.expected, event.finding.actual) == (V4.eth0, V4.docker0)
            assert (event.finding.cause, event.pktinfo) == (Cause.KERNEL_CHOSEN, None)


@both
def test_function_probes_alone_find_a_wrong_reply(
    functions: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """The demo's wrong reply is the same finding as with the hooks, counted in flows."""
    assert functions.sensor.mode == "function"
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        request = ask(client, family.eth0, port, server)
        for _ in range(3):
            server.sendto(*request)
        event = the_event(functions, port)
        finding = event.finding
        assert (finding.expected, finding.actual, finding.family) == (family.eth0, family.docker0, family.number)
        assert (finding.verdict, finding.cause, finding.interface) == (Verdict.NEW, Cause.KERNEL_CHOSEN, "")
        assert finding.process == Path("/proc/thread-self/comm").read_text().strip()
        assert event.pid == _pid()
        assert event.pktinfo is False
        assert event.netns_inode == host.node.inode


def _pid() -> int:
    """Return the process id as the kernel numbers it."""
    return int(Path("/proc/self").readlink().name)


@both
def test_function_probes_alone_find_nothing_at_a_right_server(
    functions: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], [source_control(family, family.eth0)], 0, peer)
        functions.read()
        time.sleep(flows.GRACE_SECONDS + 0.1)  # the grace itself
        assert not functions.findings(port)


@both
@pytest.mark.parametrize("which", ["everything", "functions"])
def test_function_probes_tell_cause_and_pktinfo(
    request: pytest.FixtureRequest, host: ContainerHost, port: int, family: Family, which: str
) -> None:
    """PKTINFO with the wrong address, and the plain send of a connected socket, which no cgroup hook sees."""
    watch: Watch = request.getfixturevalue(which)
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], [source_control(family, family.second)], 0, peer)
        event = the_event(watch, port)
        assert (event.finding.cause, event.pktinfo) == (Cause.EXPLICIT, True)
        assert event.pid == _pid()
    port += 10_000
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.connect(peer)
        server.send(data)
        event = the_event(watch, port)
        assert (event.finding.cause, event.pktinfo) == (Cause.CONNECTED, False)
        assert event.pid == _pid()


@both
def test_pktinfo_with_an_interface_alone_is_chosen_by_the_kernel(
    everything: Watch, host: ContainerHost, port: int, family: Family
) -> None:
    """Routing still chooses the source."""
    anything = "0.0.0.0" if family is V4 else "::"
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], [source_control(family, anything)], 0, peer)
        event = the_event(everything, port)
        assert (event.finding.cause, event.pktinfo) == (Cause.KERNEL_CHOSEN, True)


def test_function_probes_alone_count_a_pods_wrong_reply_once(functions: Watch, host: ContainerHost, port: int) -> None:
    """It has an entry in the pod's namespace and one on the node; the sender is known in the first."""
    host.container.ip("addr add 172.17.0.4/16 dev eth0")
    host.container.nft("table inet here { chain o { type filter hook output priority 0; ct state invalid drop; }; }")
    host.outside.ip(f"route add 172.17.0.0/16 via {host.ETH0}")
    try:
        with host.container.socket() as server, host.outside.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, "172.17.0.4", port, server))
            event = the_event(functions, port)
            assert (event.finding.cause, event.netns_inode) == (Cause.KERNEL_CHOSEN, host.container.inode)
            assert event.pid == _pid()
    finally:
        host.container.ip("addr del 172.17.0.4/16 dev eth0")
        host.container.nft("delete table inet here")
        host.outside.ip(f"route del 172.17.0.0/16 via {host.ETH0}")


@both
@pytest.mark.parametrize("which", ["everything", "functions"])
def test_pktinfo_behind_many_other_messages_is_unknown(
    request: pytest.FixtureRequest, host: ContainerHost, port: int, family: Family, which: str
) -> None:
    """There are more control messages than the probe reads, so it does not claim that there is none. The cgroup hooks
    see the result of all of them.
    """
    watch: Watch = request.getfixturevalue(which)
    hops = (socket.IPPROTO_IP, socket.IP_TTL) if family is V4 else (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT)
    others = [(*hops, struct.pack("=i", 64))] * 4
    cause = Cause.EXPLICIT if which == "everything" else Cause.UNKNOWN
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.outside.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], [*others, source_control(family, family.second)], 0, peer)
        event = the_event(watch, port)
        assert (event.finding.cause, event.pktinfo) == (cause, None)
    port += 10_000
    with (
        bound(host.node, family.inet, family.wildcard, port) as server,
        host.container.socket(family.inet) as client,
    ):
        data, peer = ask(client, family.eth0, port, server)
        server.sendmsg([data], others, 0, peer)
        event = the_event(watch, port)
        assert (event.finding.cause, event.pktinfo) == (Cause.KERNEL_CHOSEN, False)


def test_function_probes_find_the_wrong_reply_of_an_ipv6_socket_to_ipv4(
    functions: Watch, host: ContainerHost, port: int
) -> None:
    dual = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    with bound(host.node, socket.AF_INET6, "::", port, dual) as server, host.container.socket() as client:
        server.sendto(*ask(client, V4.eth0, port, server))
        event = the_event(functions, port)
        assert (event.finding.family, event.finding.cause) == (4, Cause.KERNEL_CHOSEN)


def test_every_function_probe_is_attached(everything: Watch) -> None:
    probes = {probe.name: probe for probe in everything.sensor.probes()}
    for name in ("udp_sendmsg", "udpv6_sendmsg", "__nf_conntrack_confirm", "nf_ct_delete"):
        assert probes[name].attached, probes[name].reason
        assert probes[name].how in ("fentry", "kprobe")
        assert probes[name].instructions > 0


#: the loader's view of a kernel that was built without IPv6
NO_IPV6 = """
from udpwatch.agent.kernel import libbpf, probes

real_offset, real_target = libbpf.Btf.offset, probes.Target.__init__

def offset(btf, structure, member):
    if "v6" in member:
        raise LookupError(f"{structure}.{member}")
    return real_offset(btf, structure, member)

def target(self, function, how, vmlinux):
    if "v6" in function.name:
        raise LookupError(function.name)
    real_target(self, function, how, vmlinux)

libbpf.Btf.offset, probes.Target.__init__ = offset, target
"""


@pytest.mark.usefixtures("everything")
def test_kernel_without_ipv6_lacks_one_probe_and_nothing_else(folder: Path, host: ContainerHost, port: int) -> None:
    (folder / "sitecustomize.py").write_text(NO_IPV6)
    with Agent(folder, env={**os.environ, **before_all(folder)}) as agent:
        probes = {probe["name"]: probe for probe in agent.snapshot()["probes"]}
        assert [name for name, probe in probes.items() if not probe["attached"]] == ["udpv6_sendmsg"]
        assert probes["udpv6_sendmsg"]["reason"].startswith("cannot probe udpv6_sendmsg: fentry: no udpv6_sendmsg")
        with bound(host.node, socket.AF_INET, "0.0.0.0", port) as server, host.container.socket() as client:
            server.sendto(*ask(client, V4.eth0, port, server))
            assert agent.counted(port, 1) == 1
        wait_for(agent.events_file.exists, "the event file")

        def events() -> list[dict[str, Any]]:
            found = map(json.loads, agent.events_file.read_text().splitlines())
            return [event for event in found if event["port"] == port]

        (event,) = wait_for(events, "the event")
        assert event["pktinfo"] is False


@pytest.mark.parametrize("hooks", list(Hooks))
def test_demo_succeeds_with_each_kind_of_program_alone(hooks: Hooks, everything_allowed: bool) -> None:
    if hooks is Hooks.FUNCTION and not everything_allowed:
        done = run_cli("demo", env={"UDPWATCH_HOOKS": hooks})
        assert done.returncode == 77
        assert "cannot probe functions" in done.stderr
        return
    done = run_cli("demo", env={"UDPWATCH_HOOKS": hooks})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def everything_allowed() -> bool:
    with closing(Watch(hooks=Hooks.CGROUP)) as watch:
        return not watch.sensor.features.probes_reason


def test_agent_reports_a_forwarded_wrong_reply_everywhere(folder: Path, port: int) -> None:
    """From the first packet to the metric, the event and the log line."""
    from router import Router  # noqa: PLC0415  it needs /dev/net/tun

    with Router() as router, Agent(folder, "--forwarded") as agent:
        router.ask("10.1.0.9", 4444, "10.2.0.5", port)
        router.answer("10.2.0.6", port, "10.1.0.9", 4444)
        assert agent.counted(port, 1) == 1
        labels = {"process": "", "cause": "forwarded", "expected": "10.2.0.5", "actual": "10.2.0.6"}
        assert agent.metric("udpwatch_reply_source_mismatch_total", port=str(port), **labels) == 1
        assert agent.metric("udpwatch_flows_checked_total") >= 1
        assert agent.metric("udpwatch_conntrack_limit") > 0
        line = f"wrong reply: a machine behind right, port {port}/udp, was asked at 10.2.0.5 and replied from 10.2.0.6"
        assert any(line in said for said in agent.log)


@pytest.mark.parametrize("flag", ["--no-forwarded", "--forwarded"])
def test_explicit_choice_about_machines_behind_the_node_is_not_logged(folder: Path, flag: str) -> None:
    with Agent(folder, flag) as agent:
        assert not any("machines behind this node" in line for line in agent.log)


def test_unknown_hooks_are_refused() -> None:
    done = run_cli("run", "--hooks", "most")
    assert done.returncode == 2
    assert "invalid value 'most' for --hooks: expected all, cgroup or function" in done.stderr
