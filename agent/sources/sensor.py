"""Watch the kernel: replies of local sockets, conntrack's flows, and the programs themselves."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from udpwatch.agent.kernel import bpf, clock, netns, records
from udpwatch.agent.kernel.attached import Attached
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.kernel.features import VMLINUX_BTF, Features
from udpwatch.agent.kernel.loader import Limits, Loaded, load
from udpwatch.agent.kernel.programs import FUNCTIONS
from udpwatch.agent.kernel.snmp import udp_sent
from udpwatch.agent.model import ConntrackHealth, Counters, Event, Forwarded, Hooks, Probe, Sample, UdpSocket
from udpwatch.agent.servers.inventory import Inventory
from udpwatch.agent.sources.flow_events import ListenedFlows
from udpwatch.agent.sources.flow_probes import ProbedFlows
from udpwatch.agent.sources.flows import FlowSensor, Reported
from udpwatch.agent.sources.servers import ServerCounter
from udpwatch.agent.sources.sockets import ReplySensor

MAX_EVENTS = 10_000
SELF_TEST_SECONDS = 0.5
HEALTH_SECONDS = 2.0
SOCKETS_SECONDS = 2.0  # how often the sockets of servers are listed


def possible_cpus(path: Path = Path("/sys/devices/system/cpu/possible")) -> int:
    """Return the number of values of an element of a per-CPU map: the highest possible CPU number plus 1."""
    return int(path.read_text().strip().replace(",", "-").split("-")[-1]) + 1


class Sensor:
    """The sensor; owns all descriptors. Not thread-safe: one thread reads it."""

    def __init__(
        self,
        cgroup: Cgroup,
        limits: Limits,
        loaded: Loaded,
        forwarded: Forwarded,
        pace: Callable[[], None] = unpaced,
    ) -> None:
        """``pace`` is called between small pieces of work, and may pause (cpu.Pace)."""
        self.maps, self._pace = loaded.maps, pace
        self._attached = Attached(cgroup, loaded)
        self.cpus = possible_cpus()
        self._replies: ReplySensor | None = None
        self._servers: ServerCounter | None = None
        if "findings" in loaded.maps:
            self._replies = ReplySensor(loaded.maps, limits, pace)
            self._servers = ServerCounter(loaded.maps, loaded.programs["count_waiting"], limits, self.cpus, pace)
        self._inventory = Inventory(loaded.links, pace=pace)
        self._sockets_at = -SOCKETS_SECONDS
        self._flows: FlowSensor | None = None
        self._poll = select.poll()
        if self._replies:
            self._poll.register(self._replies.fileno(), select.POLLIN)
        self.forwarded_reason = ""  # why forwarded replies are not watched
        self._health: ConntrackHealth | None = None
        self._health_at = -HEALTH_SECONDS
        self._table: Table | None = None
        self.heal_reason = ""  # why replies cannot be healed, if that was asked for
        if not {"heal4", "heal6"} & loaded.links.keys():
            self.heal_reason = loaded.refused.get("heal4", "the cgroup hooks are off (--hooks function)")
        self.features: Features = loaded.features
        self.compiler = loaded.compiler
        self._watch_flows(loaded, limits, forwarded)

    @classmethod
    def open(
        cls,
        cgroup: Cgroup,
        limits: Limits,
        btf: Path = VMLINUX_BTF,
        hooks: Hooks = Hooks.ALL,
        forwarded: Forwarded = Forwarded.AUTO,
        cache: Path | None = None,
        pace: Callable[[], None] = unpaced,
        heal: bool = False,
    ) -> Sensor:
        """Load and attach the programs, with ``heal`` also those that heal. Raises what `loader.load` raises."""
        if hooks is not Hooks.CGROUP:
            _load_conntrack()
        loaded = load(cgroup, limits, btf, hooks, forwarded is not Forwarded.OFF, cache, heal)
        return cls(cgroup, limits, loaded, forwarded, pace)

    def _watch_flows(self, loaded: Loaded, limits: Limits, forwarded: Forwarded) -> None:
        reported = Reported(self.maps.get("reported"), limits.window_ns)
        if {program.name for program, _ in FUNCTIONS if program.is_for_forwarded} <= loaded.links.keys():
            self._flows = FlowSensor(ProbedFlows(loaded, limits, self._pace), reported, limits)
        elif forwarded is Forwarded.ON:
            try:
                source = ListenedFlows(limits, self._replies is not None, reported, self._pace)
                self._flows = FlowSensor(source, reported, limits)
            except OSError as error:
                self.forwarded_reason = f"cannot listen to conntrack's events: {error.strerror}"
        elif forwarded is Forwarded.AUTO:
            self.forwarded_reason = loaded.features.probes_reason or "its function probes are not attached"

    @property
    def mode(self) -> str:
        """The mode, in one word for metrics and doctor."""
        return self.features.mode if self._replies else "function"

    @property
    def listens(self) -> bool:
        """Whether conntrack's events are read over netlink."""
        return self._flows is not None and self._flows.flows is not None

    @property
    def sees_forwarded(self) -> bool:
        return self._flows is not None

    @property
    def unwatched(self) -> tuple[str, ...]:
        """Namespaces that are not watched, and why, one line each."""
        return self._flows.unwatched if self._flows else ()

    def close(self) -> None:
        """Detach and free everything."""
        for part in (self._replies, self._flows, self._table, self._attached):
            if part:
                part.close()
        for descriptor in self.maps.values():
            os.close(descriptor)
        self.maps.clear()

    def clock_offset(self) -> float:
        """Return the seconds between the clock of the programs and the epoch."""
        return time.time() - clock.monotonic_ns() / 1e9

    def wait(self, seconds: float) -> None:
        """Block until the programs sent an event, or the time is over. Flows wait in their own buffers."""
        self._poll.poll(seconds * 1000)

    def events(self, most: int = MAX_EVENTS) -> Iterator[Event]:
        """Yield the events since the last call, about ``most`` of each kind."""
        parts = [part.events(most) for part in (self._replies, self._flows) if part]
        return itertools.chain.from_iterable(parts)

    def sample(self, expire_ns: int) -> Sample:
        """Read everything; findings that were quiet for ``expire_ns`` expire."""
        replies, flows = self._replies, self._flows
        parts = (replies.increases(expire_ns) if replies else (), flows.increases() if flows else ())
        increases = tuple(itertools.chain.from_iterable(parts))
        servers, other, checked = self._servers.read(expire_ns) if self._servers else ((), None, 0)
        counters = replace(self._counters(), checked=checked)
        return Sample(
            increases=increases,
            counters=counters,
            probes=self.probes(),
            tracked_peers=self._servers.tracked if self._servers else 0,
            evicted_peers=counters.evicted + (flows.evicted if flows else 0),
            undecided=(replies.undecided if replies else 0) + (flows.undecided if flows else 0),
            beyond=replies.beyond() if replies else {},
            dropped=(replies.dropped if replies else 0) + (flows.dropped if flows else 0),
            held_back=flows.held_back if flows else 0,
            overruns=flows.overruns if flows else 0,
            flows=counters.flows if flows is None or flows.flows is None else flows.flows,
            conntrack=self._conntrack_health(),
            udp_sent=udp_sent(),
            servers=servers,
            other_servers=other,
            sockets=self._sockets(),
            unwatched={"namespaces": flows.missing if flows else 0, "sockets": self._inventory.left_out},
        )

    def _sockets(self) -> tuple[UdpSocket, ...] | None:
        """Return the sockets of servers; None: it is not yet time to list them, or that failed."""
        now = time.monotonic()
        if now - self._sockets_at < SOCKETS_SECONDS:
            return None
        self._sockets_at = now
        with contextlib.suppress(OSError):
            return self._inventory.read()
        return None

    def counters(self) -> Counters:
        """Return the counters of the programs."""
        return replace(self._counters(), checked=self._servers.checked() if self._servers else 0)

    def _counters(self) -> Counters:
        raw = bpf.map_lookup(self.maps["counters"], bytes(4), records.STATS_BYTES * self.cpus)
        return records.decode_counters(raw or b"")

    def self_test(self) -> bool:
        """Send a request to each of two addresses over loopback, reply once, and return whether the programs counted
        this reply.

        The result is also False if the packets of this process do not pass the watched cgroup, or if loopback is down.
        Without the cgroup hooks, the result is whether the kernel reports the programs as attached.
        """
        if not self._replies:
            return self.attached
        before = self.counters().self_tests
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            ):
                client.bind(("127.0.0.1", 0))
                server.bind(("0.0.0.0", 0))  # noqa: S104 the client asks two addresses
                for end in (client, server):
                    end.settimeout(SELF_TEST_SECONDS)
                port, peer_port = server.getsockname()[1], client.getsockname()[1]
                cookie = netns.cookie_here() if self.features.netns_cookie else 0
                bpf.map_update(self.maps["self_test"], bytes(4), records.encode_self_test(cookie, port, peer_port))
                for address in ("127.0.0.2", "127.0.0.1"):
                    client.sendto(b"udpwatch", (address, port))
                    server.recvfrom(16)
                server.sendto(b"udpwatch", client.getsockname())  # from 127.0.0.1, by routing
                client.recvfrom(16)
        except OSError:
            return False
        finally:
            bpf.map_update(self.maps["self_test"], bytes(4), records.encode_self_test(0, 0, 0))
        return self.counters().self_tests == before + 1

    def keep_attached(self) -> list[str]:
        """Attach again what was detached; return a line for each change."""
        return self._attached.keep()

    @property
    def attached(self) -> bool:
        """Whether the kernel reports every required program as attached."""
        return self._attached.complete

    def probes(self) -> tuple[Probe, ...]:
        """Return every program in its current state."""
        return self._attached.probes()

    def unattached(self) -> dict[str, int]:
        """Return the number of instructions that the verifier walked for each program that is not attached."""
        return self._attached.unattached()

    def _conntrack_health(self) -> ConntrackHealth | None:
        now = time.monotonic()
        if now - self._health_at >= HEALTH_SECONDS:
            self._health_at = now
            try:
                # A request would make the kernel load conntrack; without conntrack there is nothing to read.
                if self._table is None and Path("/proc/sys/net/netfilter/nf_conntrack_max").exists():
                    self._table = Table()
                self._health = self._table.health() if self._table else None
            except OSError:
                self._health = None
        return self._health


def _load_conntrack() -> None:
    """Make the kernel load conntrack, because only functions of loaded modules can be probed."""
    with contextlib.suppress(OSError), Table() as table:
        table.entries()
