"""Opens what the agent watches, the kernel or a recording, with everything that follows from the choice."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from udpwatch.agent.attribution.sender import Roots, Senders
from udpwatch.agent.config import Settings
from udpwatch.agent.daemon.continuity import Continuity
from udpwatch.agent.daemon.self_test import SelfTest
from udpwatch.agent.daemon.state import SenderLookup
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.heal.healer import FAMILIES, Healer
from udpwatch.agent.kernel import capabilities, cgroup, clock
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.kernel.features import VMLINUX_BTF
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.pins import Busy
from udpwatch.agent.sources.replay import Replay
from udpwatch.agent.sources.sensor import Sensor
from udpwatch.agent.sources.source import FindingSource


@dataclass(frozen=True, slots=True)
class Watching:
    """A source of findings, opened."""

    source: FindingSource
    senders: SenderLookup
    self_test: SelfTest
    description: str  # what is watched, for the log
    notes: tuple[str, ...]  # what does not work on this machine and what follows from it, one line each
    close: Callable[[], None]
    capabilities: frozenset[Capability]  # that the source still needs
    healer: Healer | None = None
    continuity: Continuity | None = None  # None: nothing is kept over the agent's end


def watch_kernel(settings: Settings, pace: Callable[[], None]) -> Watching:
    """Load and attach; raises UdpwatchError. ``pace``: as `Sensor` takes it."""
    watched = cgroup.find(settings.cgroup)
    top = watched.open_top()
    continuity, state_reason = None, ""
    try:
        if settings.state:
            try:
                continuity = Continuity(settings.state, pace)
            except Busy:
                raise
            except UdpwatchError as error:
                state_reason = f"{error}; replies are not counted while no agent runs, and counters begin at 0"
        btf = settings.btf or VMLINUX_BTF
        sensor = Sensor.open(
            watched,
            limits(settings),
            btf,
            settings.hooks,
            settings.forwarded,
            settings.cache,
            pace,
            heal=settings.healing is not None,
            pins=continuity.pins if continuity else None,
            stored=continuity.sensor if continuity else None,
        )
    except BaseException:
        if continuity:
            continuity.close()
        top.close()
        watched.close()
        raise
    if continuity:
        continuity.is_resumed = sensor.is_resumed
        continuity.begin_anew(sensor.loaded_anew)
        continuity.follow(sensor)
    healer = Healer(settings.healing, sensor.maps, sensor.cpus, sensor.heal_reason) if settings.healing else None

    def close() -> None:
        if healer:
            healer.close()
        sensor.close()
        if continuity:
            continuity.close()
        top.close()
        watched.close()

    return Watching(
        source=sensor,
        # Through our descriptor: another mount may go away.
        senders=Senders(Roots(cgroup=Path(f"/proc/self/fd/{top.fd}")), pace),
        self_test=SelfTest(sensor, watched.contains(os.getpid())),
        description="the whole node" if watched.is_root else watched.path,
        notes=(*notes(sensor, watched, healer), *([state_reason] if state_reason else [])),
        close=close,
        capabilities=_needed(sensor, settings),
        healer=healer,
        continuity=continuity,
    )


def watch_recording(settings: Settings) -> Watching:
    """Read a recording; raises UsageError."""
    assert settings.replay
    replay = Replay(settings.replay)
    return Watching(
        source=replay,
        senders=replay,
        self_test=SelfTest(replay, True),
        description=str(settings.replay),
        notes=(f"this is a recording, {settings.replay}: udpwatch does not watch this machine",),
        close=replay.close,
        capabilities=frozenset(),
    )


def _needed(sensor: Sensor, settings: Settings) -> frozenset[Capability]:
    """The capabilities to attach again; if conntrack is read over netlink, or servers of other namespaces may be
    healed, also those to enter namespaces."""
    keep = {Capability.BPF, Capability.NET_ADMIN}
    if not sensor.features.conntrack or sensor.listens or (settings.healing and settings.healing.by_server):
        keep |= {Capability.SYS_ADMIN, Capability.SYS_PTRACE}
    if Capability.BPF not in capabilities.effective():
        keep.add(Capability.SYS_ADMIN)
    return frozenset(keep)


def limits(settings: Settings) -> Limits:
    """Derive the kernel programs' limits from the settings."""
    return Limits(
        window_ns=int(settings.window * 1e9),
        max_peers=settings.max_peers,
        max_findings=max(8_192, 2 * settings.max_series),
        max_servers=2 * settings.max_servers,
        events_per_second=settings.events_per_second,
    )


def notes(sensor: Sensor, watched: cgroup.Cgroup, healer: Healer | None = None) -> tuple[str, ...]:
    """What does not work on this machine and what follows from it, one line each."""
    lines = _socket_notes(sensor, watched) if sensor.mode != "function" else []
    if sensor.mode == "function":
        lines.append("udpwatch checks only conntrack's new flows: findings count flows, not datagrams")
    if sensor.forwarded_reason:
        lines.append(
            f"udpwatch does not check the replies of machines behind this node ({sensor.forwarded_reason}); "
            "--forwarded reads conntrack's events instead, --no-forwarded removes this message"
        )
    lines += [f"wrong replies of machines behind this node are missed: {reason}" for reason in sensor.unwatched]
    lines += sensor.continuity_notes()
    lines += [probe.reason for probe in sensor.probes() if not probe.attached and probe.name not in FAMILIES]
    if offset := clock.offset_ns():
        lines.append(f"this process is in a time namespace: times are corrected by {-offset / 1e9:+.1f} s")
    if healer:
        healing = healer.status(sensor.probes())
        lines += [f"cannot heal: {line}" for line in ([healing.reason] if healing.reason else healing.not_healed)]
    return tuple(lines)


def _socket_notes(sensor: Sensor, watched: cgroup.Cgroup) -> list[str]:
    features, lines = sensor.features, []
    if not watched.is_root:
        where = "this container's part of the node" if cgroup.in_own_namespace() else "a part of the node"
        lines.append(
            f"udpwatch watches only {where}: {watched.path} is not the root of cgroup v2; give the host's with --cgroup"
        )
    if not features.conntrack:
        lines.append(
            f"cannot read conntrack from the packet ({features.conntrack_reason}): udpwatch checks each suspected "
            "reply over netlink before it reports it, with the verdict 'unknown'"
        )
    if features.scope != "netns":
        lines.append(
            "this kernel does not tell a packet's network namespace: udpwatch misses wrong replies through another "
            "socket"
        )
    if not features.sender:
        lines.append(
            "this kernel does not tell which process sends through a connected socket: the process is 'unknown'"
        )
    return lines
