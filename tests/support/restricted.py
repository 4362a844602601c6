"""Commands with fewer rights, other mounts or a busier kernel than this machine's, and how a refusal looks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from agents import run_cli
from machine import own_cgroup

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType, Command, ProgramType
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.testing.lab import die_with_parent

NOBODY = 65534
RETURN_1 = bytes.fromhex("b7000000010000009500000000000000")
_PR_CAPBSET_DROP = 24
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Lift the limit of locked memory, which counts BPF programs before Linux 5.11."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with contextlib.suppress(ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def without(*capabilities: Capability) -> Callable[[], None]:
    """Return a preexec_fn that drops these capabilities."""

    def drop() -> None:
        die_with_parent()
        for capability in capabilities:
            _libc.prctl(_PR_CAPBSET_DROP, int(capability))

    return drop


def in_mount_namespace(script: str) -> Sequence[str]:
    """Return a wrapper that changes mounts for the command alone."""
    return ["unshare", "--mount", "sh", "-e", "-c", f'{script}\nexec "$@"', "sh"]


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("udpwatch: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""


def run(folder: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `udpwatch run` with paths of its own."""
    given = {flag.partition("=")[0] for flag in flags}
    places = {"--metrics-listen": "127.0.0.1:0", "--socket": str(folder / "s")}
    defaults = [f"{flag}={value}" for flag, value in places.items() if flag not in given]
    return run_cli("run", *defaults, *flags, **options)


def sendmsg_program(name: str) -> int:
    """Load a program for sendmsg4 that allows everything; returns its descriptor."""
    with unlimited():
        return bpf.program_load(ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_UDP4_SENDMSG, RETURN_1, name)


@contextlib.contextmanager
def held_exclusively() -> Iterator[Path]:
    """Yield a cgroup whose sendmsg4 hook a program holds with flags 0, as Cilium before 1.14 does: no other program can
    be attached.
    """
    with own_cgroup() as path:
        program = sendmsg_program("exclusive")
        try:
            with closing(cgroup.find(str(path))) as held:
                _attach_exclusively(program, held.fd)
            yield path
        finally:
            os.close(program)


def _attach_exclusively(program: int, folder: int) -> None:
    """Attach by BPF_PROG_ATTACH with flags 0; the attachment ends with the cgroup."""
    values = struct.pack("=IIII", folder, program, AttachType.CGROUP_UDP4_SENDMSG, 0)
    bpf.bpf(Command.PROG_ATTACH, ctypes.create_string_buffer(values, 128))
