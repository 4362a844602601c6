"""Watch the kernel: replies of local sockets, conntrack's flows, and the programs themselves."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from udpwatch.agent.kernel import bpf, clock, netns, records
from udpwatch.agent.kernel.attached import Attached
from udpwatch.agent.kernel.cgroup import Cgroup
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.kernel.features import VMLINUX_BTF, Features
from udpwatch.agent.kernel.loader import Limits, Loaded, load
from udpwatch.agent.kernel.pins import Generation, Pins
from udpwatch.agent.kernel.programs import FUNCTIONS
from udpwatch.agent.kernel.records import OWN_LAYOUT
from udpwatch.agent.kernel.snmp import udp_sent
from udpwatch.agent.model import (
    ConntrackHealth,
    Counters,
    Event,
    Forwarded,
    Hooks,
    Increase,
    Probe,
    Sample,
    ServerCount,
    UdpSocket,
)
from udpwatch.agent.servers.inventory import Inventory
from udpwatch.agent.sources.counting import Counting, is_readable, read_counters
from udpwatch.agent.sources.flow_events import ListenedFlows
from udpwatch.agent.sources.flow_probes import ProbedFlows
from udpwatch.agent.sources.flows import FlowSensor, Reported
from udpwatch.agent.sources.handover import Handover

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
        pins: Pins | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        """``pace`` is called between small pieces of work, and may pause (cpu.Pace).

        ``stored``: what `to_store` of an earlier process returned, None if nothing is stored.
        """
        self.lost_reason = ""  # why what another version has counted is lost
        self.maps, self._programs, self._pace = loaded.maps, loaded.programs, pace
        self.cpus = possible_cpus()
        self._kept = loaded.kept
        ours = pins.generation(loaded.kept.digest) if pins and loaded.kept else None
        self._handover = self._open_handover(cgroup, loaded, pins, ours, stored or {})
        self._attached = Attached(cgroup, loaded, ours if loaded.kept and not loaded.kept.unpinned else None)
        if not self._handover:
            self._attached.free_learning(loaded.maps)
        self._counting: Counting | None = None  # what counts now
        self._next: Counting | None = None  # what learns, and counts then
        if "findings" in loaded.maps:
            own = Counting(
                loaded.maps,
                loaded.programs["count_waiting"],
                limits,
                self.cpus,
                pace,
                resumed=self.is_resumed,
                stored=self._stored_of("" if self.loaded_anew else self._own_digest, stored),
            )
            self._counting, self._next = (self._handover.counting, own) if self._handover else (own, None)
        self._inventory = Inventory(loaded.links, pace=pace)
        self._sockets_at = -SOCKETS_SECONDS
        self._flows: FlowSensor | None = None
        self._poll = select.poll()
        if self._counting:
            self._poll.register(self._counting.replies.fileno(), select.POLLIN)
        self._told: list[str] = []  # lines for the log
        if self._handover and not self._handover.is_done:
            self._told.append(
                f"the programs of another version go on counting for {self._handover.seconds_left:.0f} s, until those "
                "of this one know all pending requests"
            )
        self._last_events: list[Event] = []  # of another version's programs
        self._undecided = self._dropped = 0  # of another version's programs
        self._last_servers: tuple[tuple[ServerCount, ...], ServerCount | None, int] = ((), None, 0)
        self._ended = False  # the last sample of another version's programs is due
        self._switched_ns = 0  # when they ended
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
        pins: Pins | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> Sensor:
        """Load and attach the programs, with ``heal`` also those that heal; or take over those in ``pins``. Raises what
        `loader.load` raises.
        """
        if hooks is not Hooks.CGROUP:
            _load_conntrack()
        loaded = load(cgroup, limits, btf, hooks, forwarded is not Forwarded.OFF, cache, heal, pins)
        return cls(cgroup, limits, loaded, forwarded, pace, pins, stored)

    def _open_handover(
        self, cgroup: Cgroup, loaded: Loaded, pins: Pins | None, ours: Generation | None, stored: Mapping[str, Any]
    ) -> Handover | None:
        """Open what another version has left; if that cannot be read, end it, and count from now on."""
        if not pins or not ours or not loaded.kept or not loaded.kept.before:
            return None
        before = pins.generation(loaded.kept.before)
        if stored.get("counting") == loaded.kept.digest and "egress" in loaded.links:
            with contextlib.suppress(OSError):  # the next start tries again
                before.remove()  # everything of it was read and stored
            return None
        try:
            stored_before = self._stored_of(before.digest, stored)
            handover = Handover(before, ours, self.cpus, self._pace, stored_before, loaded.kept.learns_until)
        except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            self.lost_reason = f"cannot read what another version of udpwatch has counted: {error}"
            if "egress" not in loaded.links:  # it was to take the link over
                loaded.links["egress"] = bpf.link_create(
                    loaded.programs["egress"], cgroup.fd, bpf.AttachType.CGROUP_INET_EGRESS
                )
                with contextlib.suppress(OSError):  # else the program ends with the agent
                    ours.pin("link", "egress", loaded.links["egress"])
                    ours.unpin("link", "egress_learning")
                os.close(loaded.links.pop("egress_learning"))
            with contextlib.suppress(OSError):  # the next start tries again
                before.remove()
            return None
        if "egress" not in loaded.links:
            loaded.links["egress"] = os.dup(handover.link)
            if handover.is_done:
                handover.pin_link()
        return handover

    def _stored_of(self, digest: str, stored: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return what is stored of a generation; None if nothing is stored at all."""
        if stored is None:
            return None
        found = stored.get(digest)
        return found if isinstance(found, dict) and is_readable(found) else {}

    def _watch_flows(self, loaded: Loaded, limits: Limits, forwarded: Forwarded) -> None:
        maps = [self.maps["reported"]] if "reported" in self.maps else []
        if self._handover and self._handover.layout.is_own("reported_key"):
            self.maps["reported_before"] = os.dup(self._handover.maps["reported"])
            maps.append(self.maps["reported_before"])
        self._reported = reported = Reported(maps, limits.window_ns)
        if {program.name for program, _ in FUNCTIONS if program.is_for_forwarded} <= loaded.links.keys():
            self._flows = FlowSensor(ProbedFlows(loaded, limits, self._pace), reported, limits)
        elif forwarded is Forwarded.ON:
            try:
                source = ListenedFlows(limits, self._counting is not None, reported, self._pace)
                self._flows = FlowSensor(source, reported, limits)
            except OSError as error:
                self.forwarded_reason = f"cannot listen to conntrack's events: {error.strerror}"
        elif forwarded is Forwarded.AUTO:
            self.forwarded_reason = loaded.features.probes_reason or "its function probes are not attached"

    @property
    def mode(self) -> str:
        """The mode, in one word for metrics and doctor."""
        return self.features.mode if self._counting else "function"

    @property
    def _own_digest(self) -> str:
        return self._kept.digest if self._kept else ""

    @property
    def loaded_anew(self) -> str:
        """The generation that was loaded now, whatever is stored of one of the same name; "": it was taken over."""
        return "" if self.is_resumed else self._own_digest

    @property
    def is_resumed(self) -> bool:
        """Whether the programs of the last agent were taken over."""
        return self._kept is not None and self._kept.resumed

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
        """Free everything; what is not pinned is detached."""
        for part in (self._next, self._counting, self._handover, self._flows, self._table, self._attached):
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
        last, self._last_events = self._last_events, []
        replies = self._counting.replies if self._counting else None
        parts = [part.events(most) for part in (replies, self._flows) if part]
        return itertools.chain(last, *parts)

    def sample(self, expire_ns: int) -> Sample:
        """Read everything; findings that were quiet for ``expire_ns`` expire."""
        if self._ended:
            self._go_on()
        if self._handover is None and "reported_before" in self.maps and self._reported.is_over(self._switched_ns):
            self._reported.keep(self.maps["reported"])
            os.close(self.maps.pop("reported_before"))
        handover = self._handover
        if handover and self._counting is handover.counting and (handover.is_done or handover.is_due):
            self._end_other()
        counting, flows = self._counting, self._flows
        found: Iterable[Increase] = ()
        if counting:
            found = counting.end() if self._ended else counting.replies.increases(expire_ns)
        increases = tuple(itertools.chain(found, flows.increases() if flows else ()))
        if self._ended:
            servers, other, checked = self._last_servers
        else:
            servers, other, checked = counting.servers(expire_ns) if counting else ((), None, 0)
        counters = replace(self._counters(), checked=checked)
        replies = counting.replies if counting else None
        return Sample(
            increases=increases,
            counters=counters,
            probes=self.probes(),
            generation=self._generation(),
            is_last=self._ended,
            tracked_peers=counting.tracked if counting else 0,
            evicted_peers=counters.evicted + (flows.evicted if flows else 0),
            undecided=self._undecided + (replies.undecided if replies else 0) + (flows.undecided if flows else 0),
            beyond=replies.beyond() if replies else {},
            dropped=self._dropped + (replies.dropped if replies else 0) + (flows.dropped if flows else 0),
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

    def _end_other(self) -> None:
        """Let our programs count instead of another version's. The next sample is the last one of those."""
        assert self._handover and self._counting and self._next
        if not self._handover.is_done:
            self._attached.unpin("egress_learning")  # so that it ends if this process is killed now
            self._next.begin()
            try:
                self._handover.switch(self._programs["egress"])
            except OSError:
                return  # tried again at the next sample
        self._attached.detach("egress_learning")
        self._last_servers = self._counting.servers(1 << 62)
        self._last_events = list(self._counting.replies.events(MAX_EVENTS))
        self._ended, self._switched_ns = True, clock.monotonic_ns()

    def _go_on(self) -> None:
        """Read our own programs from now on."""
        assert self._counting and self._next
        self._poll.unregister(self._counting.replies.fileno())
        self._undecided += self._counting.replies.undecided
        self._dropped += self._counting.replies.dropped
        self._counting, self._next, self._ended = self._next, None, False
        self._told.append("the programs of this version count now")
        self._poll.register(self._counting.replies.fileno(), select.POLLIN)

    def _generation(self) -> str:
        if self._handover and self._counting is self._handover.counting:
            return self._handover.digest
        return self._kept.digest if self._kept else ""

    def continuity_notes(self) -> list[str]:
        """What is not continued, one line each."""
        lines = [self.lost_reason] if self.lost_reason else []
        if self._kept and self._kept.removed:
            lines.append(f"the pinned programs were damaged ({self._kept.removed}) and were loaded anew")
        if self._kept and self._kept.unpinned:
            lines.append(f"cannot pin the programs: {self._kept.unpinned}; they end with the agent")
        return lines

    def to_store(self) -> dict[str, Any]:
        """Return what the next process needs to go on where this one stopped, by generation."""
        own = self._next or self._counting
        if not self._kept or not own:
            return {}
        found: dict[str, Any] = {"counting": self._generation(), self._kept.digest: own.to_store()}
        if self._handover:
            found[self._handover.digest] = self._handover.counting.to_store()
        return found

    def note_stored(self) -> None:
        """Note that what `to_store` returned last is stored."""
        for counting in (self._counting, self._next):
            if counting:
                counting.note_stored()
        if self._handover and self._counting is not self._handover.counting:
            # What the other programs counted is stored now, so they can go.
            with contextlib.suppress(OSError):
                self._handover.remove()
                self._attached.free_learning(self.maps)
            self._handover.close()
            self._handover = None

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
        return replace(self._counters(), checked=self._counting.checked() if self._counting else 0)

    def _counters(self) -> Counters:
        if self._counting:
            return self._counting.counters()
        return read_counters(self.maps, self.cpus, OWN_LAYOUT, Counters())

    def self_test(self) -> bool:
        """Send a request to each of two addresses over loopback, reply once, and return whether the programs counted
        this reply.

        The result is also False if the packets of this process do not pass the watched cgroup, or if loopback is down.
        Without the cgroup hooks, the result is whether the kernel reports the programs as attached.
        """
        if not self._counting:
            return self.attached
        before = self._self_tests()
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
        return self._self_tests() == before + 1

    def _self_tests(self) -> int:
        """Return how many replies of self-tests our programs saw, whether they count already or learn."""
        return read_counters(self.maps, self.cpus, OWN_LAYOUT, Counters()).self_tests

    def keep_attached(self) -> list[str]:
        """Attach again what was detached; return a line for each change."""
        lines = self._attached.keep()
        if lines and self._handover:
            self._handover.note_switched()
        told, self._told = self._told, []
        return told + lines

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
