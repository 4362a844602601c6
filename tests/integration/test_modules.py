"""Conntrack as a module that is unloaded while its functions are probed. Skipped if it is built in or in use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from agents import Agent
from waiting import wait_for

CONNTRACK = ("__nf_conntrack_confirm", "nf_ct_delete")


def unload() -> bool:
    """Whether the kernel unloaded the module."""
    modules = ["nf_conntrack_netlink", "nf_conntrack"]
    return not any(subprocess.run(["rmmod", each], capture_output=True, check=False).returncode for each in modules)


@pytest.fixture
def _a_module_that_nothing_uses() -> None:
    if (
        not Path("/sys/module/nf_conntrack/initstate").exists()
        and subprocess.run(
            ["modprobe", "--dry-run", "--first-time", "nf_conntrack"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("conntrack is built into this kernel: `make test-kernels` boots kernels where it is a module")
    if Path("/sys/module/nf_conntrack/initstate").exists() and not unload():
        pytest.skip("conntrack is in use: run this test alone")


@pytest.mark.usefixtures("_a_module_that_nothing_uses")
def test_unloading_conntrack_detaches_its_probes_and_is_logged(folder: Path) -> None:
    """fentry holds the module. A kprobe does not: the kernel ends it silently, so the agent checks, logs and exports
    it.
    """
    with Agent(folder) as agent:
        probes = {probe["name"]: probe for probe in agent.snapshot()["probes"]}
        # A kernel that is locked down has none at all.
        if not all(name in probes and probes[name]["attached"] for name in CONNTRACK):
            pytest.skip("function probes are not allowed here: `make test-kernels` boots kernels that allow them")
        held = probes["nf_ct_delete"]["how"] == "fentry"
        assert unload() != held
        if held:
            assert all(agent.metric("udpwatch_probe_attached", probe=name) == 1 for name in CONNTRACK)
            return
        for name in CONNTRACK:
            wait_for(lambda name=name: agent.metric("udpwatch_probe_attached", probe=name) == 0, f"{name} to be missed")
            assert any(f"cannot probe {name} any longer: its module nf_conntrack was" in line for line in agent.log)
        subprocess.run(["modprobe", "nf_conntrack"], check=True)  # another one, in which nothing is probed
        assert all(agent.metric("udpwatch_probe_attached", probe=name) == 0 for name in CONNTRACK)
        assert agent.metric("udpwatch_probe_attached", probe="egress") == 1
