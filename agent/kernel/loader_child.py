"""The loading child: the only module that imports bcc. Started by loader.py, ends as soon as it has answered.

python3 -m udpwatch.agent.kernel.loader_child FD
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import capabilities, features
from udpwatch.agent.kernel.bpf import link_create
from udpwatch.agent.kernel.loader import HOOKS, MAPS, Hook, Limits

SOURCES = Path(__file__).resolve().parents[2] / "bpf"


def _import_bcc() -> Any:
    try:
        import bcc  # noqa: PLC0415  only here, and only now: it may be missing

        bcc.BPF.load_func  # noqa: B018  an empty folder of that name can be imported too
    except (ImportError, AttributeError) as error:
        raise CannotRun(
            f"cannot import bcc ({error}): install python3-bpfcc, and run udpwatch with the system's Python "
            "(a virtual environment needs --system-site-packages)"
        ) from None
    if "attach_type" not in inspect.signature(bcc.BPF.load_func).parameters:
        raise CannotRun(f"bcc {bcc.__version__} is too old to load sendmsg programs: 0.25 or newer is needed")
    return bcc


def _compile(bcc: Any, limits: Limits, found: features.Features) -> Any:
    constants = {
        "WINDOW_NS": f"{limits.window_ns}ULL",
        "MAX_PEERS": limits.max_peers,
        # Without conntrack's word each suspected conversation has an element of its own until it was asked for.
        "MAX_FINDINGS": limits.max_findings if found.conntrack else max(limits.max_findings, limits.max_peers),
        "EVENTS_PER_SECOND": limits.events_per_second,
        "RING_PAGES": limits.ring_pages,
        "PAGE_SIZE": os.sysconf("SC_PAGE_SIZE"),
        "HAVE_NETNS_COOKIE": int(found.netns_cookie),
        "HAVE_COARSE_CLOCK": int(found.coarse_clock),
        "HAVE_CURRENT": int(found.current),
        "HAVE_CURRENT_COMM": int(found.current_comm),
        "HAVE_CURRENT_TASK": int(found.current_task),
        "HAVE_SENDER_COMM": int(found.sender_comm),
        "HAVE_KERNEL_READ": int(found.conntrack),
        **found.offsets,
    }
    # bcc takes kernel headers from here; ours are a shim of a dozen lines each (bpf/include/README.md).
    os.environ["BCC_KERNEL_SOURCE"] = str(SOURCES)
    flags = [f"-I{SOURCES}", *(f"-D{name}={value}" for name, value in constants.items())]
    try:
        return bcc.BPF(src_file=str(SOURCES / "reply.c"), cflags=flags)
    except Exception as error:  # bcc raises plain Exception
        raise UdpwatchError(f"cannot compile reply.c or create its maps: {error}") from None


def _load(bcc: Any, module: Any, hook: Hook) -> int:
    try:
        descriptor: int = module.load_func(hook.name, int(hook.type), attach_type=int(hook.attach)).fd
    except Exception as error:  # bcc raises plain Exception; the verifier's words went to standard error
        raise UdpwatchError(f"the kernel refuses the program {hook.name}: {error}") from None
    return descriptor


def _attach(hook: Hook, program: int, cgroup: int, path: str) -> int:
    try:
        return link_create(program, cgroup, hook.attach)
    except OSError as error:
        reason = f"cannot attach {hook.name} to {path}: {errno.errorcode.get(error.errno or 0, '?')}"
        if error.errno == errno.EPERM and capabilities.may_load(capabilities.effective()):
            reason += (
                ": another program holds this hook exclusively (Cilium upgraded from before 1.14 does); "
                "see docs/kernels.md"
            )
        elif error.errno == errno.EPERM:
            reason += ": CAP_NET_ADMIN is missing"
        raise UdpwatchError(reason) from None


def _serve(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    try:
        found = features.probe(Path(request["btf"]))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise CannotRun("the kernel does not permit us BPF programs (EPERM): see `udpwatch doctor`") from None
        raise CannotRun(
            f"this kernel has no cgroup_skb programs ({error.strerror}): CONFIG_CGROUP_BPF is needed"
        ) from None
    bcc = _import_bcc()
    module = _compile(bcc, Limits(**request["limits"]), found)
    names: list[tuple[str, str]] = []
    descriptors: list[int] = []
    refused: dict[str, str] = {}
    for hook in HOOKS:
        try:
            program = _load(bcc, module, hook)
            names.append(("program", hook.name))
            descriptors.append(program)
            link = _attach(hook, program, request["cgroup"], request["path"])
        except UdpwatchError as error:
            if hook.required:
                raise
            refused[hook.name] = str(error)
            continue
        names.append(("link", hook.name))
        descriptors.append(link)
    for name in MAPS:
        names.append(("map", name))
        descriptors.append(module[name].map_fd if name != "events" else module[name.encode()].map_fd)
    answer = {
        "descriptors": names,
        "features": asdict(found),
        "refused": refused,
        "bcc_version": bcc.__version__,
    }
    return answer, descriptors


def main() -> None:
    """Answer one request and end, without bcc's clean-up at exit (it would detach nothing, and takes time)."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(channel.recv(1 << 16))
    try:
        answer, descriptors = _serve(request)
    except UdpwatchError as error:
        answer = {"error": str(error), "cannot_run": isinstance(error, CannotRun)}
        descriptors = []
    socket.send_fds(channel, [json.dumps(answer).encode()], descriptors)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
