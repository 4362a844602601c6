"""Loading, seen from the agent: a child process compiles, loads, attaches, and hands over descriptors.

LLVM (over 100 MB) and the right to load programs are then no part of the long-lived process. The two talk over a
Unix socket: one JSON request down, one JSON answer up, descriptors beside it (SCM_RIGHTS).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.features import VMLINUX_BTF, Features
from udpwatch.agent.model import Hooks

LOAD_SECONDS = 240  # far above what any machine needs; a child that hangs must not hang the agent
_MAX_ANSWER = 1 << 20
_MAX_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Constants of the compile, bpf/sockets.c and bpf/conntrack.c."""

    window_ns: int = 30_000_000_000
    max_peers: int = 131_072  # conversations that are remembered
    max_findings: int = 8_192
    events_per_second: int = 10  # of one finding
    ring_pages: int = 64  # a power of two
    max_candidates: int = 4_096  # new flows that wait for their decision
    max_reported: int = 8_192  # wrong replies of sockets that conntrack may book as new flows, too


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the child handed over; every descriptor is the caller's to close."""

    maps: dict[str, int]
    programs: dict[str, int]
    links: dict[str, int]
    refused: dict[str, str]  # hook or function -> why it could not be attached
    instructions: dict[str, int]  # program -> how many the verifier walked
    features: Features
    compiler: str  # with its version


def load(
    cgroup: Cgroup,
    limits: Limits,
    btf: Path = VMLINUX_BTF,
    hooks: Hooks = Hooks.ALL,
    forwarded: bool = True,
    cache: Path | None = None,
) -> Loaded:
    """Compile, load and attach in a child; without ``forwarded`` what passes this node is not looked at. Nothing is
    compiled whose object is in ``cache`` (objects.py).

    Raises CannotRun where this machine or user cannot (no bcc, no privilege, no such hooks), UdpwatchError where
    it failed otherwise. The message names the thing and the way out.
    """
    capabilities.require()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, contextlib.ExitStack() as stack:
        ours.settimeout(LOAD_SECONDS)
        request = {
            "cgroup": cgroup.fd,
            "path": cgroup.path,
            "limits": asdict(limits),
            "btf": str(btf.absolute()),
            "hooks": hooks,
            "forwarded": forwarded,
            "cache": str(cache.absolute()) if cache else "",
        }
        ours.send(json.dumps(request).encode())
        # Its words go to a file: compiler and verifier may say more than a pipe holds. -P and the folder: nothing
        # that lies where udpwatch was started is imported, least of all by root. A session of its own: Ctrl-C is
        # for us, and we end it.
        said = stack.enter_context(tempfile.TemporaryFile())
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "udpwatch.agent.kernel.loader_child", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), cgroup.fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            start_new_session=True,
        ) as child:
            theirs.close()
            try:
                raw, descriptors, flags, _address = socket.recv_fds(ours, _MAX_ANSWER, _MAX_DESCRIPTORS)
            except TimeoutError:
                child.kill()
                raise UdpwatchError(f"loading the programs took longer than {LOAD_SECONDS} s") from None
            except ConnectionError:
                raw, descriptors, flags = b"", [], 0
            except BaseException:
                child.kill()
                raise
            child.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if not raw:
        raise UdpwatchError(
            f"the loader ended with status {child.returncode}: {lines[-1] if lines else 'it said nothing'}"
        )
    answer = json.loads(raw)
    if "error" in answer:
        raise (CannotRun if answer["cannot_run"] else UdpwatchError)(answer["error"])
    if flags & socket.MSG_CTRUNC:  # the kernel hands over as many as fit below the limit
        for descriptor in descriptors:
            os.close(descriptor)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UdpwatchError(
            f"cannot take over the programs from the loader: Too many open files (limit {limit}); raise the limit with "
            "ulimit -n, or LimitNOFILE= in a unit"
        )
    return _unpack(answer, descriptors)


def _unpack(answer: dict[str, object], descriptors: list[int]) -> Loaded:
    groups: dict[str, dict[str, int]] = {"map": {}, "program": {}, "link": {}}
    names = answer["descriptors"]
    assert isinstance(names, list) and len(names) == len(descriptors)
    for (kind, name), descriptor in zip(names, descriptors, strict=True):
        groups[kind][name] = descriptor
    features, refused, instructions = answer["features"], answer["refused"], answer["instructions"]
    assert isinstance(features, dict) and isinstance(refused, dict) and isinstance(instructions, dict)
    return Loaded(
        maps=groups["map"],
        programs=groups["program"],
        links=groups["link"],
        refused=refused,
        instructions=instructions,
        features=Features(**features),
        compiler=str(answer["compiler"]),
    )
