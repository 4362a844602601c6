"""What the agent looks at: the kernel's sensor, or a recording in its place, with what follows from it for the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.config import Settings
from udpwatch.agent.kernel import capabilities, cgroup
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.kernel.features import VMLINUX_BTF
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.sources.replay import Replay
from udpwatch.agent.sources.sensor import Sensor

PROOF_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Watching:
    """A source of findings, opened."""

    sensor: Sensor | Replay
    proof: Proof
    what: str  # for people
    notes: tuple[str, ...]  # what this machine does not allow and what follows, a line each
    close: Callable[[], None]
    capabilities: frozenset[Capability]  # that it goes on to need
    cgroups: Path | None = None  # the tree of cgroups that it watches


def watch_kernel(settings: Settings) -> Watching:
    """Load and attach; raises UdpwatchError."""
    watched = cgroup.find(settings.cgroup)
    try:
        btf = settings.btf or VMLINUX_BTF
        sensor = Sensor.open(watched, limits(settings), btf, settings.hooks, settings.forwarded, settings.cache)
    except BaseException:
        watched.close()
        raise

    def close() -> None:
        sensor.close()
        watched.close()

    return Watching(
        sensor=sensor,
        proof=Proof(sensor, watched.contains(os.getpid())),
        what="the whole node" if watched.is_root else watched.path,
        notes=notes(sensor, watched),
        close=close,
        capabilities=_needed(sensor),
        cgroups=Path(f"/proc/self/fd/{watched.fd}"),  # its mount may be nobody else's
    )


def watch_recording(settings: Settings) -> Watching:
    """Read a recording; raises UsageError."""
    assert settings.replay
    replay = Replay(settings.replay)
    words = (f"this is a recording, {settings.replay}: nothing of this machine is looked at",)
    return Watching(replay, Proof(replay, True), str(settings.replay), words, replay.close, frozenset())


def _needed(sensor: Sensor) -> frozenset[Capability]:
    """What attaching again needs; where conntrack is asked or listened to over netlink, what entering namespaces
    needs."""
    keep = {Capability.BPF, Capability.NET_ADMIN}
    if not sensor.features.conntrack or sensor.listens:
        keep |= {Capability.SYS_ADMIN, Capability.SYS_PTRACE}
    if Capability.BPF not in capabilities.effective():
        keep.add(Capability.SYS_ADMIN)
    return frozenset(keep)


def limits(settings: Settings) -> Limits:
    """The kernel programs' limits that follow from the settings."""
    return Limits(
        window_ns=int(settings.window * 1e9),
        max_peers=settings.max_peers,
        max_findings=max(8_192, 2 * settings.max_series),
        events_per_second=settings.events_per_second,
    )


def notes(sensor: Sensor, watched: cgroup.Cgroup) -> tuple[str, ...]:
    """What this machine does not allow and what follows, a line each."""
    lines = _socket_notes(sensor, watched) if sensor.mode != "function" else []
    if sensor.mode == "function":
        lines.append("only conntrack's new flows are looked at: findings count flows, not datagrams")
    if sensor.forwarded_reason:
        lines.append(
            f"wrong replies of machines behind this node are not looked for ({sensor.forwarded_reason}); --forwarded "
            "reads conntrack's events instead, --no-forwarded ends this message"
        )
    lines += [f"wrong replies of machines behind this node are missed: {reason}" for reason in sensor.unheard]
    lines += [probe.reason for probe in sensor.probes() if not probe.attached]
    return tuple(lines)


def _socket_notes(sensor: Sensor, watched: cgroup.Cgroup) -> list[str]:
    features, lines = sensor.features, []
    if not watched.is_root:
        where = "this container's part of the node" if cgroup.in_own_namespace() else "a part of the node"
        lines.append(
            f"only {where} is watched: {watched.path} is not the root of cgroup v2; give the host's with --cgroup"
        )
    if not features.conntrack:
        lines.append(
            f"conntrack cannot be read from the packet ({features.conntrack_reason}); each suspected reply is "
            "checked over netlink before it is reported, and the verdict is 'unknown'"
        )
    if features.scope != "netns":
        lines.append(
            "this kernel does not tell a packet's network namespace: an answer through another socket is missed"
        )
    if not features.sender:
        lines.append("this kernel does not tell who sends through a connected socket: process 'unknown'")
    return lines


class Proof:
    """Whether the sensor sees packets: by a datagram of our own, where ours pass the watched cgroup; elsewhere the
    kernel's word that the programs are attached has to do."""

    def __init__(self, sensor: Sensor | Replay, inside: bool) -> None:
        self._sensor, self._inside = sensor, inside
        self._told = False
        self._due = 0.0
        self.seen = False

    def look(self) -> list[str]:
        """Try once, PROOF_SECONDS after the last time that it was seen; the line to say when it is not any more."""
        if self.seen and time.monotonic() < self._due:
            return []
        self.seen = self._sensor.self_test() if self._inside else self._sensor.attached
        self._due = time.monotonic() + PROOF_SECONDS
        if self.seen or self._told:
            self._told = not self.seen
            return []
        self._told = True
        return [
            "a datagram sent over loopback was not seen by the programs: is lo up here, and let in by the firewall?"
        ]
