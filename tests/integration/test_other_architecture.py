"""The BPF programs, compiled as on another architecture: bcc reads its name from ARCH."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from agents import Agent
from scene import V4, V6
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

OTHER = {"x86_64": "arm64", "aarch64": "x86"}


def test_programs_compiled_for_the_other_architecture_find_a_wrong_reply(
    folder: Path, host: ContainerHost, port: int
) -> None:
    """BPF is the same on both, and both are little-endian. Only the registers that kprobes read differ;
    tests/unit/agent/kernel/test_architectures.py tests them.
    """
    environment = {**os.environ, "ARCH": OTHER[platform.machine()], "UDPWATCH_CACHE": "off"}
    with Agent(folder, "--hooks=cgroup", env=environment) as agent:
        for family in (V4, V6):
            wrong_replies(host, port, family=family)
        assert agent.counted(port, 2) == 2
        assert agent.metric("udpwatch_reply_source_mismatch_total", port=str(port), verdict="new") == 2
