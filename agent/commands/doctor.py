"""`udpwatch doctor`: tries everything that udpwatch needs and prints what works, what does not, and what to change.

Nothing is derived from a version number: doctor loads and attaches the programs for a moment and runs the self-test. It
also asks the running agent for its state and its capabilities; with --agent, it asks only the agent.
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
from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client, expected_form, from_json
from udpwatch.agent.client.follow import NoAgent, translated_errors
from udpwatch.agent.client.lines import safe
from udpwatch.agent.commands.run import settings_file
from udpwatch.agent.config import LIMITS, SETTINGS, Settings, resolve
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf, capabilities, cgroup, features, mounts
from udpwatch.agent.kernel.capabilities import PURPOSE, Capability
from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.pins import DEFAULT_FOLDER, Busy, opened
from udpwatch.agent.kernel.programs import BY_NAME, HOOKS
from udpwatch.agent.model import Forwarded, Healing, Probe
from udpwatch.agent.sources.sensor import Sensor

_WIDTH = 80
_NAME_WIDTH = 14


class Status(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARN = "warn"  # udpwatch works with limitations
    FAIL = "fail"  # udpwatch cannot work


@dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    name: str
    status: Status
    found: str
    change: str = ""  # how to fix it


@dataclass(frozen=True, slots=True)
class Report:
    """All checks and the conclusion."""

    version: str
    checks: tuple[Check, ...]
    mode: str | None  # None: udpwatch does not work here
    works: bool
    running: bool = False  # the report of a running agent, not of this machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to check."""
    parser.description = (
        "Test everything that udpwatch needs on this machine and print the result, with the state of a running agent. "
        "Exit status 77: udpwatch cannot run here. With --agent, ask only the agent: 0 if it is ready, 1 if not."
    )
    parser.add_argument("--agent", action="store_true", help="print only the running agent's own report; test nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, metavar in (("--config", "FILE"), ("--cgroup", "PATH"), ("--btf", "PATH"), ("--state", "DIR")):
        parser.add_argument(flag, metavar=metavar, help="as in `udpwatch run`")
    parser.add_argument("--connect", metavar="SOCKET", help=f"the agent's socket [{DEFAULT_SOCKET}]")


def run(parsed: argparse.Namespace) -> int:
    """Print the report; return 0 if udpwatch works, else 77, or 1 with --agent. Raises UdpwatchError."""
    flags = {"cgroup": parsed.cgroup, "btf": parsed.btf, "socket": parsed.connect, "state": parsed.state}
    settings = resolve(flags, os.environ, settings_file(parsed))
    report = ask(settings.socket) if parsed.agent else examine(settings)
    print(as_json(report) if parsed.json else as_text(report, sys.stdout.isatty()))
    return 0 if report.works else 1 if parsed.agent else 77


def ask(path: Path | None) -> Report:
    """Ask the agent on this socket for its report; it works if it is ready. Raises UdpwatchError."""
    if path is None:
        raise UdpwatchError(
            "the agent's socket is disabled (--socket off): ask its /readyz, or give a socket with --connect"
        )
    with translated_errors(path), Client(path) as client, expected_form():
        report = client.doctor()
        checks = [_agent(report)]
        checks += [Check("note", Status.WARN, str(note)) for note in report["notes"]]
        checks += [_probe(from_json(Probe, probe)) for probe in report["probes"]]
        if report.get("healing"):
            checks.append(_healing(from_json(Healing, report["healing"])))
        if report.get("state"):
            checks.append(_state(report["state"]))
        return Report(report["version"], tuple(checks), report["mode"], bool(report["ready"]), running=True)


def _agent(report: dict[str, Any]) -> Check:
    kept = " ".join(report["capabilities"]) or "none"
    found = f"{report['version']}, process {report['pid']}, mode {report['mode']}, capabilities: {kept}"
    if report["ready"]:
        return Check("agent", Status.OK, f"ready: {found}")
    return Check("agent", Status.FAIL, f"not ready ({report['reason']}): {found}", "read its log")


def _healing(healing: Healing) -> Check:
    if healing.reason:
        return Check("healing", Status.WARN, f"nothing is healed: {healing.reason}")
    state = "dry run" if healing.dry_run else "on" if healing.is_active else "off"
    return Check("healing", Status.OK, f"{state}; the settings select: {healing.selected}")


def _state(state: dict[str, Any]) -> Check:
    how = "the programs of the last agent were taken over" if state["resumed"] else "the programs were loaded anew"
    return Check("state", Status.OK, f"kept in {state['folder']}; at the start, {how}")


def _pinned(folder: Path) -> Check | None:
    """Check what agents have left in a state folder; None: nothing, or it cannot be read."""
    try:
        with opened(folder) as pins:
            manifests = [each.manifest() or {} for each in pins.generations()]
    except Busy:
        return Check("pinned", Status.OK, f"an agent uses the programs in {folder}")
    except (UdpwatchError, OSError) as error:
        exists = os.access(folder.parent, os.X_OK) and folder.exists()
        return Check("pinned", Status.WARN, str(error)) if exists else None
    if not manifests:
        return None
    versions = sorted({str(manifest.get("version", "of an unknown version")) for manifest in manifests})
    return Check(
        "pinned",
        Status.WARN,
        f"programs of udpwatch {', '.join(versions)} are pinned in {folder}, and no agent uses them; they go on "
        "counting, and take CPU time for each UDP packet",
        "start udpwatch with this --state, or remove them: udpwatch detach"
        + (f" --state {folder}" if folder != DEFAULT_FOLDER else ""),
    )


def _running(path: Path | None) -> Check:
    """Check the running agent. One that is not ready is a warning: this machine may still be able to run udpwatch."""
    if path is None:
        return Check("agent", Status.OK, "the agent's socket is disabled (--socket off)")
    try:
        with translated_errors(path), Client(path) as client, expected_form():
            check = _agent(client.doctor())
    except NoAgent:
        return Check("agent", Status.OK, f"no agent runs here ({path})")
    except UdpwatchError as error:
        return Check("agent", Status.WARN, str(error))
    return check if check.status is Status.OK else replace(check, status=Status.WARN)


def examine(settings: Settings) -> Report:
    """Try everything as `udpwatch run` would with these settings. Raises UsageError for an invalid cgroup path."""
    btf = settings.btf or features.VMLINUX_BTF
    conntrack = _conntrack()  # first: the kernel loads the module, which has types of its own
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
            sensor = Sensor.open(watched, Limits(), btf, settings.hooks, settings.forwarded, heal=True)
        except UdpwatchError as error:
            checks.append(Check("sensor", Status.FAIL, str(error)))
        else:
            with contextlib.closing(sensor):
                mode = sensor.mode
                checks += _sensor(sensor, watched, settings.forwarded)
    folders = {DEFAULT_FOLDER, settings.state or DEFAULT_FOLDER}
    checks += [check for check in map(_pinned, sorted(folders)) if check]
    checks += [_limits(settings), _running(settings.socket)]
    works = all(check.status is not Status.FAIL for check in checks)
    return Report(__version__, tuple(checks), mode if works else None, works)


def _limits(settings: Settings) -> Check:
    """List the limits that differ from their defaults."""
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
            return Check("lockdown", Status.OK, "this kernel does not support lockdown")
        if os.geteuid() == 0:  # in a container: the checks below show what works
            return Check(
                "lockdown",
                Status.OK,
                f"cannot be read here ({error.strerror}); the checks below try what it may forbid",
            )
        return Check("lockdown", Status.WARN, f"cannot be read: {error.strerror}", "run doctor as root")
    level = text.partition("[")[2].partition("]")[0] or text.strip()
    if level == "confidentiality":
        return Check(
            "lockdown",
            Status.WARN,
            f"{level}: programs cannot read kernel memory, so udpwatch asks conntrack over netlink",
            "boot with lockdown=integrity to read conntrack from the packet",
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
    # The missing ones are needed only without CAP_PERFMON.
    return Check("capabilities", Status.OK, " ".join(str(c) for c in Capability if c in have))


def _cgroup(watched: cgroup.Cgroup) -> Check:
    if watched.is_root:
        return Check("cgroup v2", Status.OK, f"{watched.path}, the root: all processes of this node")
    reason = "a container with a cgroup namespace of its own" if cgroup.in_own_namespace() else "not the root"
    return Check(
        "cgroup v2",
        Status.WARN,
        f"{watched.path} ({reason}): udpwatch sees only processes below it",
        "mount the host's /sys/fs/cgroup into the container and give its path with --cgroup",
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
            f"Cilium is present: {found}",
            "Cilium 1.18 without socket load balancing may detach other programs; udpwatch attaches its programs "
            "again and counts that in udpwatch_probe_reattached_total",
        )
    return Check("other programs", Status.OK, f"{found}; they do not conflict with udpwatch")


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
            f"cannot be read over netlink: {error.strerror}",
            "load nf_conntrack_netlink if this node uses NAT; without NAT, udpwatch does not need it",
        )
    found = f"read over netlink; {health.entries} of {health.limit} entries in this namespace"
    if health.dropped or health.insert_failed or health.early_dropped:
        found += f"; {health.dropped} packets dropped, {health.insert_failed} inserts failed, {health.early_dropped} "
        found += "entries evicted early"
    if health.entries > health.limit * 0.9:
        return Check(
            "conntrack",
            Status.WARN,
            found,
            "raise net.netfilter.nf_conntrack_max: a full table drops UDP",
        )
    return Check("conntrack", Status.OK, found)


def _sensor(sensor: Sensor, watched: cgroup.Cgroup, forwarded: Forwarded) -> list[Check]:
    checks = [Check("bcc", Status.OK, f"{sensor.compiler} compiles without kernel headers")]
    checks += [_probe(probe) for probe in sensor.probes()]
    for name, count in sensor.unattached().items():
        checks.append(Check(name, Status.OK, f"loaded; the verifier walked {count} instructions"))
    if watched.contains(os.getpid()):
        seen = sensor.self_test()
        checks.append(
            Check("self-test", Status.OK, "the programs saw a datagram and its reply over loopback")
            if seen
            else Check(
                "self-test",
                Status.FAIL,
                "the programs did not see a datagram sent over loopback",
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
    conntrack = "from each packet" if found.conntrack else found.conntrack_reason
    checks = [Check("conntrack read", Status.OK if found.conntrack else Status.WARN, conntrack)]
    for name, has, without in (
        ("namespace", found.scope == "netns", "wrong replies through another socket are missed"),
        ("sender", found.sender, "the process of a connected socket is unknown"),
    ):
        text = "known to the programs" if has else f"unknown to the programs: {without}"
        checks.append(Check(name, Status.OK if has else Status.WARN, text))
    return checks


def _forwarded(sensor: Sensor, forwarded: Forwarded) -> Check:
    if sensor.unwatched:
        change = "sysctl net.netfilter.nf_conntrack_events=2 in these namespaces, or raise the limit of open files"
        return Check("forwarded", Status.WARN, "; ".join(sensor.unwatched), change)
    if sensor.listens:
        return Check("forwarded", Status.OK, "replies of machines behind this node are checked in conntrack's events")
    if sensor.sees_forwarded:
        return Check("forwarded", Status.OK, "replies of machines behind this node are checked by function probes")
    if forwarded is Forwarded.OFF:
        return Check("forwarded", Status.OK, "replies of machines behind this node are not checked (--no-forwarded)")
    return Check(
        "forwarded",
        Status.WARN,
        f"replies of machines behind this node are not checked: {sensor.forwarded_reason}",
        "udpwatch run --forwarded reads conntrack's events over netlink instead, which costs more per flow",
    )


def as_json(report: Report) -> str:
    """Render the report as one JSON object."""
    return json.dumps(asdict(report), indent=2)


def as_text(report: Report, colour: bool) -> str:
    """Render the report as text, 80 columns wide."""
    paint = _painter(colour and "NO_COLOR" not in os.environ)
    lines = []
    for check in report.checks:
        name, found = safe(check.name), textwrap.wrap(check.found, _WIDTH - _NAME_WIDTH - 8)
        body = list(map(safe, found)) or [""]
        # A name that is wider than its column gets its own line.
        beside = body.pop(0) if len(name) <= _NAME_WIDTH else ""
        lines.append(f"{paint(check.status)}  {name:<{_NAME_WIDTH}}  {beside}".rstrip())
        lines += [" " * (_NAME_WIDTH + 8) + line for line in body]
        for index, line in enumerate(textwrap.wrap(check.change, _WIDTH - _NAME_WIDTH - 11)):  # our own words
            lines.append(" " * (_NAME_WIDTH + 8) + ("-> " if index == 0 else "   ") + line)
    lines.append("")
    meaning = {
        "packet": "udpwatch works here, mode packet: it reads conntrack's verdict from each packet.",
        "netlink": "udpwatch works here, mode netlink: it asks conntrack about each suspected reply.",
        "function": "udpwatch works here, mode function: it checks only conntrack's new flows.",
    }
    if report.running:
        lines.append("The agent works." if report.works else "The agent does not work: see the line marked 'fail'.")
    else:
        lines.append(meaning.get(report.mode or "", "udpwatch does not work here: see the lines marked 'fail'."))
    return "\n".join(lines)


def _painter(colour: bool) -> Callable[[Status], str]:
    codes = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31"}

    def paint(status: Status) -> str:
        text = f"{status:<4}"
        return f"\x1b[{codes[status]}m{text}\x1b[0m" if colour else text

    return paint
