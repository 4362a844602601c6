"""The kernel programs, compiled as on another architecture: bcc takes its name from ARCH."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from agents import Agent
from scene import V4, V6
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

OTHER = {"x86_64": "arm64", "aarch64": "x86"}


def test_programs_of_the_other_architecture(folder: Path, host: ContainerHost, port: int) -> None:
    """The verifier takes them, and they find the wrong reply: BPF is BPF, and both are little-endian. What differs, the
    registers that kprobes read, is in tests/unit/agent/kernel/test_architectures.py.
    """
    environment = {**os.environ, "ARCH": OTHER[platform.machine()], "UDPWATCH_CACHE": "off"}
    with Agent(folder, "--hooks=cgroup", env=environment) as agent:
        for family in (V4, V6):
            wrong_replies(host, port, family=family)
        assert agent.counted(port, 2) == 2
        assert agent.metric("udpwatch_reply_source_mismatch_total", port=str(port), verdict="new") == 2
