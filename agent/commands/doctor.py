"""`udpwatch doctor`: tries what udpwatch needs and says what works, what does not, what follows, what to change.

Everything is tried, nothing is concluded from a version number: the programs are really loaded and attached for a
moment, and a datagram of our own must be seen by them. The agent that runs here is asked what it has, and what it has
kept of its capabilities; with --agent it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from udpwatch.agent import __version__
from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client, shaped
from udpwatch.agent.client.follow import NoAgent, reaching
from udpwatch.agent.commands.run import settings_file
from udpwatch.agent.config import LIMITS, SETTINGS, Settings, resolve
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf, capabilities, cgroup, features, mounts
from udpwatch.agent.kernel.capabilities import PURPOSE, Capability
from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.programs import BY_NAME, HOOKS
from udpwatch.agent.model import Forwarded, Probe
from udpwatch.agent.sources.sensor import Sensor

_WIDTH = 80
_NAME_WIDTH = 14


class Status(StrEnum):
    """What a check says of the machine."""

    OK = "ok"
    WARN = "warn"  # udpwatch works, with less
    FAIL = "fail"  # udpwatch cannot work


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    status: Status
    found: str
    change: str = ""  # what to do about it


@dataclass(frozen=True, slots=True)
class Report:
    """All checks, and what follows from them."""

    version: str
    checks: tuple[Check, ...]
    mode: str | None  # None: it cannot work
    works: bool
    running: bool = False  # it is about an agent that runs, not about what one could do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to check."""
    parser.description = (
        "Try everything that udpwatch needs and print the result. Exit status 77: udpwatch cannot run here. With "
        "--agent, ask the running agent instead: exit status 0 if it is ready, 1 if not."
    )
    parser.add_argument("--agent", action="store_true", help="print the running agent's own report; try nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, metavar in (("--config", "FILE"), ("--cgroup", "PATH"), ("--btf", "PATH")):
        parser.add_argument(flag, metavar=metavar, help="as in `udpwatch run`")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Print the report; return 0 if udpwatch works, else 77, or 1 with --agent. Raises UdpwatchError."""
    flags = {"cgroup": parsed.cgroup, "btf": parsed.btf, "socket": parsed.connect}
    settings = resolve(flags, os.environ, settings_file(parsed))
    report = ask(settings.socket) if parsed.agent else examine(settings)
    print(as_json(report) if parsed.json else as_text(report, sys.stdout.isatty()))
    return 0 if report.works else 1 if parsed.agent else 77


def ask(path: Path | None) -> Report:
    """What the agent that answers on this socket says of itself; it works if it is ready. Raises UdpwatchError."""
    if path is None:
        raise UdpwatchError("the agent has no socket, as it is set: ask its /readyz, or name a socket with --connect")
    with reaching(path), Client(path) as client:
        told = client.doctor()
    checks = [_agent(told)]
    checks += [Check("note", Status.WARN, note) for note in told["notes"]]
    checks += [_probe(shaped(Probe, probe)) for probe in told["probes"]]
    return Report(told["version"], tuple(checks), told["mode"], told["ready"], running=True)


def _agent(told: dict[str, Any]) -> Check:
    kept = " ".join(told["capabilities"]) or "no capability"
    found = f"{told['version']}, process {told['pid']}, mode {told['mode']}, has kept {kept}"
    if told["ready"]:
        return Check("agent", Status.OK, f"ready: {found}")
    return Check("agent", Status.FAIL, f"not ready ({told['reason']}): {found}", "read its log")


def _running(path: Path | None) -> Check:
    """A line about the agent that runs; that it is not ready does not say that this machine cannot run one."""
    if path is None:
        return Check("agent", Status.OK, "has no socket, as it is set")
    try:
        with reaching(path), Client(path) as client:
            check = _agent(client.doctor())
    except NoAgent:
        return Check("agent", Status.OK, f"none answers on {path}")
    except UdpwatchError as error:
        return Check("agent", Status.WARN, str(error))
    return check if check.status is Status.OK else replace(check, status=Status.WARN)


def examine(settings: Settings) -> Report:
    """Try everything as `udpwatch run` would with these settings. Raises UsageError for a cgroup path that is none."""
    btf = settings.btf or features.VMLINUX_BTF
    conntrack = _conntrack()  # first: asking makes the kernel load it, and its module may have types of its own
    checks = [_kernel(), _lockdown(), _btf(btf), _capabilities()]
    mode = None
    try:
        watched = cgroup.find(settings.cgroup)
    except UdpwatchError as error:
        if error.exit_status == 2:
            raise
        checks.append(Check("cgroup v2", Status.FAIL, str(error)))
        return Report(__version__, tuple(checks), None, False)
    with contextlib.closing(watched):
        checks += [_cgroup(watched), _neighbours(watched), conntrack]
        try:
            sensor = Sensor.open(watched, Limits(), btf, settings.hooks, settings.forwarded)
        except UdpwatchError as error:
            checks.append(Check("sensor", Status.FAIL, str(error)))
        else:
            with contextlib.closing(sensor):
                mode = sensor.mode
                checks += _sensor(sensor, watched, settings.forwarded)
    checks += [_limits(settings), _running(settings.socket)]
    works = all(check.status is not Status.FAIL for check in checks)
    return Report(__version__, tuple(checks), mode if works else None, works)


def _limits(settings: Settings) -> Check:
    """The limits that differ from their defaults."""
    changed = []
    for setting in SETTINGS:
        value = getattr(settings, setting.name)
        if setting.name in LIMITS and value != setting.parse(setting.default):
            changed.append(f"{setting.flag} {value:g} (default {setting.default})")
    return Check("limits", Status.OK, ", ".join(changed) or "all at their defaults (docs/limits.md)")


def _kernel() -> Check:
    name = os.uname()
    return Check("kernel", Status.OK, f"{name.sysname} {name.release} {name.machine}")


def _lockdown() -> Check:
    try:
        try:
            text = Path("/sys/kernel/security/lockdown").read_text()
        except FileNotFoundError:
            folder = mounts.open_private("securityfs")
            try:
                with os.fdopen(os.open("lockdown", os.O_RDONLY, dir_fd=folder)) as file:
                    text = file.read()
            finally:
                os.close(folder)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return Check("lockdown", Status.OK, "this kernel has none")
        if os.geteuid() == 0:  # in a container: nothing is concluded from it
            return Check("lockdown", Status.OK, f"not to be read here ({error.strerror}); what it forbids is tried")
        return Check("lockdown", Status.WARN, f"cannot be read: {error.strerror}", "run doctor as root")
    level = text.partition("[")[2].partition("]")[0] or text.strip()
    if level == "confidentiality":
        return Check(
            "lockdown",
            Status.WARN,
            f"{level}: kernel memory may not be read, so conntrack is asked over netlink",
            "boot with lockdown=integrity if conntrack shall be read from the packet",
        )
    return Check("lockdown", Status.OK, level)


def _btf(path: Path) -> Check:
    try:
        features.conntrack_offsets(path)
    except OSError as error:
        return Check(
            "BTF", Status.WARN, f"{path}: {error.strerror}", "use a kernel with CONFIG_DEBUG_INFO_BTF=y, or give --btf"
        )
    except LookupError as error:
        return Check(
            "BTF",
            Status.WARN,
            f"{path} does not describe {error.args[0]}",
            "load nf_conntrack (a module describes itself with CONFIG_DEBUG_INFO_BTF_MODULES=y), or give --btf",
        )
    except UdpwatchError as error:
        return Check("BTF", Status.FAIL, str(error))
    return Check("BTF", Status.OK, f"{path} describes sk_buff and nf_conn")


def _capabilities() -> Check:
    have = capabilities.effective()
    if Capability.SYS_ADMIN in have:
        have |= {Capability.BPF, Capability.PERFMON}
    missing = sorted(set(Capability) - have - {Capability.DAC_OVERRIDE})
    if not missing:
        return Check("capabilities", Status.OK, " ".join(str(c) for c in Capability if c in have))
    found = "missing: " + "; ".join(f"{capability} ({PURPOSE[capability]})" for capability in missing)
    if not capabilities.may_load(have):
        return Check("capabilities", Status.FAIL, found, "run udpwatch as root, or with CAP_BPF and CAP_NET_ADMIN")
    if Capability.PERFMON not in have:
        return Check("capabilities", Status.WARN, found, "add CAP_PERFMON")
    # What is missing is needed only without CAP_PERFMON, which is there.
    return Check("capabilities", Status.OK, " ".join(str(c) for c in Capability if c in have))


def _cgroup(watched: cgroup.Cgroup) -> Check:
    if watched.is_root:
        return Check("cgroup v2", Status.OK, f"{watched.path}, the root: every process of this node is below it")
    reason = "a container with a cgroup namespace of its own" if cgroup.in_own_namespace() else "not the root"
    return Check(
        "cgroup v2",
        Status.WARN,
        f"{watched.path} ({reason}): only processes below it are watched",
        "mount the host's /sys/fs/cgroup into the container and give it with --cgroup",
    )


def _neighbours(watched: cgroup.Cgroup) -> Check:
    names: dict[str, list[str]] = {}
    try:
        for _, hook in HOOKS:
            for program in bpf.program_query(watched.fd, hook.attach):
                names.setdefault(_program_name(program), []).append(hook.attach.name)
    except OSError as error:
        return Check("other programs", Status.WARN, f"cannot be listed: {error.strerror}", "run doctor as root")
    if not names:
        return Check("other programs", Status.OK, "none on these hooks of this cgroup")
    found = "; ".join(f"{name} on {', '.join(hooks)}" for name, hooks in sorted(names.items()))
    if any(name.startswith("cil_") for name in names):
        return Check(
            "other programs",
            Status.WARN,
            f"Cilium is here: {found}",
            "Cilium 1.18 without socket load balancing may detach other programs; udpwatch attaches again and counts "
            "it in udpwatch_probe_reattached_total",
        )
    return Check("other programs", Status.OK, f"{found}; they and udpwatch do not disturb each other")


def _program_name(program: int) -> str:
    try:
        fd = bpf.program_fd(program)
    except OSError:
        return f"program {program}"
    try:
        return bpf.program_info(fd).name or f"program {program}"
    finally:
        os.close(fd)


def _conntrack() -> Check:
    try:
        with Table() as table:
            health = table.health()
    except OSError as error:
        return Check(
            "conntrack",
            Status.WARN,
            f"cannot be asked over netlink: {error.strerror}",
            "load nf_conntrack_netlink if this node uses NAT; without NAT nothing is lost",
        )
    found = f"answers over netlink; {health.entries} of {health.limit} entries in this namespace"
    if health.dropped or health.insert_failed or health.early_dropped:
        found += f"; {health.dropped} packets dropped, {health.insert_failed} inserts failed, {health.early_dropped} "
        found += "entries thrown out early"
    if health.entries > health.limit * 0.9:
        return Check("conntrack", Status.WARN, found, "raise net.netfilter.nf_conntrack_max: a full table drops UDP")
    return Check("conntrack", Status.OK, found)


def _sensor(sensor: Sensor, watched: cgroup.Cgroup, forwarded: Forwarded) -> list[Check]:
    checks = [Check("bcc", Status.OK, f"{sensor.compiler} compiles without kernel headers")]
    checks += [_probe(probe) for probe in sensor.probes()]
    for name, count in sensor.unattached().items():
        checks.append(Check(name, Status.OK, f"loaded; the verifier walked {count} instructions"))
    if watched.contains(os.getpid()):
        seen = sensor.self_test()
        checks.append(
            Check("test packet", Status.OK, "a datagram and its answer over loopback were seen")
            if seen
            else Check(
                "test packet",
                Status.FAIL,
                "a datagram sent over loopback was not seen",
                "bring lo up in this namespace",
            )
        )
    if sensor.mode != "function":
        checks += _sockets(sensor.features)
    checks.append(_forwarded(sensor, forwarded))
    return checks


def _probe(probe: Probe) -> Check:
    if probe.attached:
        how = f" by {probe.how}" if probe.how else ""
        return Check(probe.name, Status.OK, f"attached{how}; the verifier walked {probe.instructions} instructions")
    # A newer agent that answers on the socket may have programs that this doctor does not know.
    without = BY_NAME[probe.name].without if probe.name in BY_NAME else ""
    return Check(probe.name, Status.WARN, probe.reason, without)


def _sockets(found: features.Features) -> list[Check]:
    conntrack = "its verdict is read from each packet" if found.conntrack else found.conntrack_reason
    checks = [Check("conntrack read", Status.OK if found.conntrack else Status.WARN, conntrack)]
    for name, has, without in (
        ("namespace", found.scope == "netns", "an answer through another socket of it is missed"),
        ("sender", found.sender, "the process behind a connected socket is not known"),
    ):
        text = "known to the packet programs" if has else f"not known to the packet programs: {without}"
        checks.append(Check(name, Status.OK if has else Status.WARN, text))
    return checks


def _forwarded(sensor: Sensor, forwarded: Forwarded) -> Check:
    if sensor.unwatched:
        change = "sysctl net.netfilter.nf_conntrack_events=2 in these namespaces, or raise the limit of open files"
        return Check("forwarded", Status.WARN, "; ".join(sensor.unwatched), change)
    if sensor.listens:
        return Check("forwarded", Status.OK, "wrong replies of other machines are looked for in conntrack's events")
    if sensor.sees_forwarded:
        return Check("forwarded", Status.OK, "wrong replies of other machines are looked for by function probes")
    if forwarded is Forwarded.OFF:
        return Check("forwarded", Status.OK, "wrong replies of other machines are not looked for, as it is set")
    return Check(
        "forwarded",
        Status.WARN,
        f"wrong replies of machines behind this node are not looked for: {sensor.forwarded_reason}",
        "udpwatch run --forwarded reads conntrack's events over netlink instead; it costs more a flow",
    )


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(asdict(report), indent=2)


def as_text(report: Report, colour: bool) -> str:
    """The report for people, 80 columns."""
    paint = _painter(colour and "NO_COLOR" not in os.environ)
    lines = []
    for check in report.checks:
        body = textwrap.wrap(check.found, _WIDTH - _NAME_WIDTH - 8) or [""]
        # A name that is too long for its column has a line of its own.
        beside = body.pop(0) if len(check.name) <= _NAME_WIDTH else ""
        lines.append(f"{paint(check.status)}  {check.name:<{_NAME_WIDTH}}  {beside}".rstrip())
        lines += [" " * (_NAME_WIDTH + 8) + line for line in body]
        for index, line in enumerate(textwrap.wrap(check.change, _WIDTH - _NAME_WIDTH - 11)):
            lines.append(" " * (_NAME_WIDTH + 8) + ("-> " if index == 0 else "   ") + line)
    lines.append("")
    meaning = {
        "packet": "udpwatch works here, mode packet: conntrack's verdict is read from each packet.",
        "netlink": "udpwatch works here, mode netlink: conntrack is asked about each suspected reply.",
        "function": "udpwatch works here, mode function: by conntrack's new flows alone.",
    }
    if report.running:
        lines.append("The agent works." if report.works else "The agent does not work: see the line marked fail.")
    else:
        lines.append(meaning.get(report.mode or "", "udpwatch cannot work here: see the lines marked fail."))
    return "\n".join(lines)


def _painter(colour: bool) -> Callable[[Status], str]:
    codes = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31"}

    def paint(status: Status) -> str:
        text = f"{status:<4}"
        return f"\x1b[{codes[status]}m{text}\x1b[0m" if colour else text

    return paint
