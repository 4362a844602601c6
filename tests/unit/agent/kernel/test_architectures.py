"""Numbers that differ between architectures, for those that have an image: amd64 and arm64."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from udpwatch.agent.kernel import bpf, mounts, probes
from udpwatch.agent.kernel.probes import How

# unistd_64.h of x86; include/uapi/asm-generic/unistd.h, which arm64 uses
NUMBERS = {
    "x86_64": {"bpf": 321, "perf_event_open": 298, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
    "aarch64": {"bpf": 280, "perf_event_open": 241, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
}


@pytest.mark.parametrize("machine", NUMBERS)
def test_system_call_numbers(machine: str) -> None:
    everywhere = {"fsopen": mounts._FSOPEN, "fsconfig": mounts._FSCONFIG, "fsmount": mounts._FSMOUNT}
    here = {"bpf": bpf._SYSCALL_NUMBER[machine], "perf_event_open": probes._PERF_EVENT_OPEN[machine]}
    assert everywhere | here == NUMBERS[machine]


def test_system_call_numbers_match_this_machines_headers() -> None:
    header = next(iter(Path("/usr/include").glob(f"{platform.machine()}-linux-gnu/asm/unistd_64.h")), None)
    header = header or Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("no kernel headers of user space here: apt-get install linux-libc-dev")
    found = dict(re.findall(r"^#define __NR_(\w+)\s+(\d+)", header.read_text(), re.MULTILINE))
    wanted = NUMBERS[platform.machine()]
    assert {name: int(found[name]) for name in wanted} == wanted


@pytest.mark.parametrize(("machine", "registers"), [("x86_64", (14, 13, 12)), ("aarch64", (0, 1, 2))])
def test_registers_of_a_probed_functions_arguments(
    monkeypatch: pytest.MonkeyPatch, machine: str, registers: tuple[int]
) -> None:
    """rdi, rsi and rdx in x86's struct pt_regs; x0, x1 and x2 in arm64's."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert probes.argument_indices(How.KPROBE) == registers
    assert probes.argument_indices(How.FENTRY) == (0, 1, 2)


def test_unknown_architecture_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="unsupported architecture vax"):
        bpf.map_create(bpf.MapDefinition("x", 1, 4, 4, 1, 0))
