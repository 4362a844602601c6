"""`udpwatch doctor`: its report on this machine, and other programs that it recognises."""

from __future__ import annotations

import json
import os
from contextlib import closing

from agents import Agent, run_cli
from restricted import in_mount_namespace, sendmsg_program, without

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.testing.lab import ContainerHost


def test_doctor_reports_on_this_machine() -> None:
    done = run_cli("doctor")
    assert done.returncode == 0, done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "mode packet" in done.stdout
    for name in ("kernel", "lockdown", "BTF", "capabilities", "cgroup v2", "conntrack", "bcc", "egress", "self-test"):
        assert f"  {name} " in done.stdout


def test_doctor_names_limits_that_differ() -> None:
    report = json.loads(run_cli("doctor", "--json", env={**os.environ, "UDPWATCH_MAX_PEERS": "1024"}).stdout)
    (check,) = [check for check in report["checks"] if check["name"] == "limits"]
    assert check["found"] == "--max-peers 1024 (default 131072)"


def test_doctor_lists_other_programs_on_the_hooks(agent: Agent) -> None:
    report = json.loads(run_cli("doctor", "--json").stdout)
    (check,) = [check for check in report["checks"] if check["name"] == "other programs"]
    assert "egress on CGROUP_INET_EGRESS" in check["found"]


def test_doctor_recognises_cilium(host: ContainerHost) -> None:
    """A program on our hook has a name like Cilium's."""
    with closing(cgroup.find(None)) as root:
        program = sendmsg_program("cil_sock4_sendm")
        link = bpf.link_create(program, root.fd, AttachType.CGROUP_UDP4_SENDMSG)
    try:
        done = run_cli("doctor")
        assert done.returncode == 0
        assert "Cilium is present" in done.stdout
    finally:
        os.close(link)
        os.close(program)


def test_doctor_fails_without_capabilities() -> None:
    done = run_cli("doctor", preexec_fn=without(*Capability))
    assert done.returncode == 77
    assert "udpwatch does not work here" in done.stdout
    assert "CAP_NET_ADMIN" in done.stdout
    assert done.stderr == ""


def test_doctor_fails_without_bcc(agent: Agent) -> None:
    """Doctor runs the compiler whichever capabilities a running agent has."""
    done = run_cli("doctor", wrapper=in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages"))
    assert done.returncode == 77
    assert "python3-bpfcc" in done.stdout
