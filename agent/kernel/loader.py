"""Load the programs in a child process, which compiles, loads, attaches and passes descriptors to the agent.

So LLVM (over 100 MB) and the capabilities to load programs stay out of the long-lived process. The processes talk over
a Unix socket: one JSON request, one JSON answer with descriptors (SCM_RIGHTS).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.features import VMLINUX_BTF, Features
from udpwatch.agent.kernel.memory import read_memory
from udpwatch.agent.kernel.pins import Pins
from udpwatch.agent.model import Hooks

LOAD_SECONDS = 240  # far more than any machine needs; a child that hangs must not block the agent for ever
COMPILER_BYTES = 130 << 20  # of memory, for a moment; half of it is LLVM's code, which other processes may share
_MAX_ANSWER = 1 << 20
_MAX_DESCRIPTORS = 200  # the kernel passes 253 at most (SCM_MAX_FD)


@dataclass(frozen=True, slots=True)
class Limits:
    """The constants that bpf/sockets.c and bpf/conntrack.c are compiled with."""

    window_ns: int = 30_000_000_000
    max_peers: int = 131_072  # conversations
    max_findings: int = 8_192
    events_per_second: int = 10  # for one finding
    ring_pages: int = 64  # a power of two
    max_servers: int = 1_000  # counted by themselves; at most 4,093
    max_candidates: int = 4_096  # candidates that wait for a decision
    max_reported: int = 8_192  # wrong replies of local sockets, to recognise their conntrack flows


@dataclass(frozen=True, slots=True)
class Kept:
    """Which generation of a state folder (pins.py) was loaded or taken over."""

    digest: str
    resumed: bool  # it was taken over
    before: str  # the generation that counts until this one has learned, or whose counts wait to be read; "": none
    unpinned: str  # why it is not pinned; "": it is
    learns_until: int  # nanoseconds of the programs' clock; 0: it does not learn
    removed: str  # why what was pinned under this digest was removed; "": it was not


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the child passed on; the caller closes every descriptor."""

    maps: dict[str, int]
    programs: dict[str, int]
    links: dict[str, int]
    refused: dict[str, str]  # hook or function -> why it is not attached
    instructions: dict[str, int]  # program -> number of instructions that the verifier walked
    features: Features
    compiler: str  # with its version
    kept: Kept | None = None  # None: nothing is kept over the agent's end


def load(
    cgroup: Cgroup,
    limits: Limits,
    btf: Path = VMLINUX_BTF,
    hooks: Hooks = Hooks.ALL,
    forwarded: bool = True,
    cache: Path | None = None,
    heal: bool = False,
    pins: Pins | None = None,
) -> Loaded:
    """Compile, load and attach in a child process; or take over what is pinned in ``pins``, if it is the same.

    Without ``forwarded``, forwarded replies are not watched. Objects in ``cache`` are not compiled again (objects.py).
    Raises CannotRun if this machine or user cannot load the programs, and UdpwatchError on any other failure.
    """
    request = {
        "cgroup": cgroup.fd,
        "cgroup_id": cgroup.id,
        "path": cgroup.path,
        "state": pins.fd if pins else -1,
        "limits": asdict(limits),
        "hooks": hooks,
        "forwarded": forwarded,
        "heal": heal,
        "only_inventory": False,
    }
    return _load(request, btf, cache)


def load_inventory(btf: Path = VMLINUX_BTF, cache: Path | None = None) -> Loaded:
    """Load the iterators over sockets, and attach nothing to a cgroup. Raises what `load` raises."""
    request = {
        "cgroup": -1,
        "cgroup_id": 0,
        "state": -1,
        "path": "",
        "limits": asdict(Limits()),
        "hooks": Hooks.CGROUP,
        "forwarded": False,
        "heal": False,
        "only_inventory": True,
    }
    return _load(request, btf, cache)


def _load(request: dict[str, Any], btf: Path, cache: Path | None) -> Loaded:
    capabilities.require()
    request |= {"btf": str(btf.absolute()), "cache": str(cache.absolute()) if cache else ""}
    answer, descriptors, truncated = _ask_child(request)
    if "error" in answer:
        raise (CannotRun if answer["cannot_run"] else UdpwatchError)(answer["error"])
    if truncated:
        for descriptor in descriptors:
            os.close(descriptor)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UdpwatchError(
            f"cannot receive the programs from the loader: Too many open files (limit {limit}); raise the limit with "
            "ulimit -n, or with LimitNOFILE= in a unit"
        )
    return _unpack(answer, descriptors)


def _ask_child(request: dict[str, Any]) -> tuple[dict[str, Any], list[int], bool]:
    """Run the child; return (its answer, descriptors, whether some are missing, because the limit is too low)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The output of the child goes to a file, because compiler and verifier may print more than a pipe holds.
    with ours, theirs, tempfile.TemporaryFile() as output:
        ours.settimeout(LOAD_SECONDS)
        ours.send(json.dumps(request).encode())
        # -P and the folder ensure that nothing is imported from the current folder. The session of its own keeps
        # Ctrl-C away from the child; we end it.
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "udpwatch.agent.kernel.loader_child", str(theirs.fileno())],
            pass_fds=[fd for fd in (theirs.fileno(), request["cgroup"], request["state"]) if fd >= 0],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd="/",
            start_new_session=True,
        ) as child:
            theirs.close()
            try:
                raw, descriptors, flags, _address = socket.recv_fds(ours, _MAX_ANSWER, _MAX_DESCRIPTORS)
            except TimeoutError:
                child.kill()
                raise UdpwatchError(
                    f"cannot load the programs: the loader did not finish within {LOAD_SECONDS} s"
                ) from None
            except ConnectionError:
                raw, descriptors, flags = b"", [], 0
            except BaseException:
                child.kill()
                raise
            child.wait()
        if raw:
            return json.loads(raw), descriptors, bool(flags & socket.MSG_CTRUNC)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if child.returncode == -signal.SIGKILL:
        memory = read_memory()
        limit = f"the memory limit of this cgroup is {memory.limit >> 20} MB" if memory else "memory is short"
        raise UdpwatchError(
            f"cannot load the programs: the loader was killed, probably because {limit}; compiling takes up to "
            f"{COMPILER_BYTES >> 20} MB"
        )
    raise UdpwatchError(
        f"cannot load the programs: the loader exited with status {child.returncode}: "
        f"{lines[-1] if lines else 'no output'}"
    )


def _unpack(answer: dict[str, Any], descriptors: list[int]) -> Loaded:
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
        kept=Kept(**({"before": "", "unpinned": "", "learns_until": 0, "removed": ""} | answer["kept"]))
        if answer["kept"]
        else None,
    )
