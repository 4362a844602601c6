"""The agent: wires its parts, starts and stops them in order, handles signals.

Three kinds of threads: the main thread serves the socket and DNS. The sensor's thread reads the source, finds senders
and owns the state, because netlink, /proc and many findings may keep it busy. HTTP and the event log, which may block
on their readers, have their own. They share the last snapshot; what the sensor's thread posts to the main thread is
bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udpwatch.agent import __version__
from udpwatch.agent.config import Settings
from udpwatch.agent.daemon import api, systemd
from udpwatch.agent.daemon.event_log import EventWriter, as_json
from udpwatch.agent.daemon.http import HttpServer
from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.daemon.node_faults import NodeFaults
from udpwatch.agent.daemon.sensor_thread import CPU_SHARE, SensorThread
from udpwatch.agent.daemon.starting import Starting, Stopped
from udpwatch.agent.daemon.startup import watch_kernel, watch_recording
from udpwatch.agent.daemon.state import About, State
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.kernel.clock import read_clocks
from udpwatch.agent.kernel.cpu import Cpus, Pace, favour_servers
from udpwatch.agent.kernel.loader import COMPILER_BYTES
from udpwatch.agent.kernel.memory import read_memory
from udpwatch.agent.kernel.pins import opened
from udpwatch.agent.kernel.rlimits import raise_descriptor_limit
from udpwatch.agent.model import Cause, Event, Healing, Probe, Row, Sample, Snapshot, StateKeep

if TYPE_CHECKING:
    from udpwatch.dns.service import Service

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FINDING_LINES = 60  # logged in a minute
DESCRIPTORS = 256  # about fifty for the programs, the rest for connections
STALLED_SECONDS = 30.0  # without a sample for this long, the agent is not healthy

log = logging.getLogger(__name__)


def open_dns(conf: Path | None, cpus: Cpus) -> Service:
    """Create the responder and bind its sockets. Raises UdpwatchError. Imported only if enabled: it takes memory."""
    from udpwatch.dns.errors import DnsError  # noqa: PLC0415
    from udpwatch.dns.options import read_conf  # noqa: PLC0415
    from udpwatch.dns.service import Service  # noqa: PLC0415
    from udpwatch.dns.settings import Settings as DnsSettings  # noqa: PLC0415

    try:
        dns = read_conf(conf) if conf else DnsSettings()
        if dns.metrics_listen != DnsSettings().metrics_listen:
            raise UdpwatchError(f"{conf}: metrics-listen is only for `udpwatch dns`; use --metrics-listen instead")
        if dns.pid_file:
            raise UdpwatchError(f"{conf}: pid-file is only for `udpwatch dns`; remove it")
        if dns.log_facility != "-":
            raise UdpwatchError(f"{conf}: log-facility is only for `udpwatch dns`; the agent logs to stderr")
        if dns.user or dns.group:
            option = "user" if dns.user else "group"
            raise UdpwatchError(f"{conf}: {option} is only for `udpwatch dns`; the agent must run as root")
        return Service(dns, __version__, cpus)
    except DnsError as error:
        raise UdpwatchError(f"--dns: {error}") from None


class App:
    """The agent. `run` runs it and closes it."""

    def __init__(self, settings: Settings, starting: Starting) -> None:
        """Open everything that can fail, the cheapest first. Raises UdpwatchError and leaves nothing behind."""
        if not settings.replay:
            capabilities.require()
        if not raise_descriptor_limit(DESCRIPTORS):
            raise UdpwatchError(
                f"cannot open {DESCRIPTORS} files: the hard limit is lower; raise it with ulimit -n, or with "
                "LimitNOFILE= in a unit"
            )
        self._settings, self._starting = settings, starting
        if (memory := read_memory()) and memory.limit < COMPILER_BYTES and not settings.replay:
            log.warning(
                "the memory limit of this cgroup is %d MB; compiling the kernel programs takes up to %d MB, and the "
                "kernel may kill the agent meanwhile: raise the limit",
                memory.limit >> 20,
                COMPILER_BYTES >> 20,
            )
        self._cpus = Cpus()
        self._started = time.time()
        self._failure: BaseException | None = None
        self._is_crash = True  # unless a signal stops the agent
        self._logged_ready: bool | None = None  # in the log
        self._done = asyncio.Event()
        self._read_at = self._logged_at = time.monotonic()
        self._may_log, self._not_logged = float(FINDING_LINES), 0
        self._left_out = 0  # lookups, as counted in the last sample
        with contextlib.ExitStack() as opened:
            self._http: HttpServer | None = None
            if settings.metrics_listen:
                self._http = HttpServer(settings.metrics_listen.host, settings.metrics_listen.port, self._cpus)
                opened.callback(self._http.stop)
            self._events: EventWriter | None = None
            if settings.events:
                self._events = EventWriter(settings.events, self._lose, self._reader_gone)
            self._api: api.Api | None = None
            if settings.socket:
                listener = api.bind(settings.socket, settings.socket_group)
                opened.callback(settings.socket.unlink, missing_ok=True)
                opened.callback(listener.close)
                self._api = api.Api(listener, settings.socket, lambda: self._snapshot, self._doctor, self._heal)
            with starting.interruptible():
                self._pace = Pace(CPU_SHARE, self._cpus)
                self._watching = watch_recording(settings) if settings.replay else watch_kernel(settings, self._pace)
            self._source, self._senders = self._watching.source, self._watching.senders
            self._healer = self._watching.healer
            opened.callback(self._watching.close)
            self._dns = open_dns(settings.dns_conf, self._cpus) if settings.dns else None
            if self._dns:
                opened.callback(self._dns.close)
            about = About(
                version=__version__,
                kernel=os.uname().release,
                node=settings.node,
                mode=self._source.mode,
                started=self._started,
                notes=self._watching.notes,
            )
            self._state = State(about, settings.max_series, settings.forget, self._senders, settings.max_servers)
            self._node = NodeFaults(read_clocks(), read_memory)
            self._continuity = self._watching.continuity
            if self._continuity:
                self._continuity.restore(self._state)
            self._snapshot: Snapshot = self._state.snapshot(False, self._started)
            opened.pop_all()

    async def run(self) -> None:
        """Run until SIGTERM, SIGINT or SIGHUP, then close everything. Raises any other error that ends it."""
        self._loop = asyncio.get_running_loop()
        self._thread: SensorThread | None = None
        try:
            await self._run()
        finally:
            await self._close()
        if self._failure:
            raise self._failure

    async def _run(self) -> None:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._stop)
        if self._dns:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload_dns)
            self._loop.add_signal_handler(signal.SIGUSR1, self._log_dns_statistics)
        if self._starting.to_be_stopped:
            self._stop()
        self._drop_capabilities()
        self._announce()
        for line in self._watching.self_test.run():
            log.warning("%s", line)
        forget = self._settings.forget
        self._on_sample(self._source.sample(int(forget * 1e9)), [], self._watching.self_test.passed)
        if self._events:
            self._events.start()
        if self._http:
            collectors = [SnapshotCollector(lambda: self._snapshot), self._http.collector]
            collectors += [self._dns.collector] if self._dns else []
            self._http.start(exposition(*collectors), self._healthy, self._ready)
        if self._dns:
            await self._dns.start()
        if self._api:
            await self._api.start()
        if self._healer:
            self._healer.start()
        handlers = self._on_events, self._on_sample, self._on_failure
        self._thread = SensorThread(self._source, forget, *handlers, self._watching.self_test, self._pace)
        self._thread.start()
        systemd.notify("READY=1")
        self._watchdog = self._loop.create_task(self._notify_watchdog())
        self._logged_ready, reason = self._ready()
        favour_servers()
        if self._logged_ready:
            log.info("ready")
        else:
            log.warning("not ready: %s", reason)
        await self._done.wait()

    def _stop(self) -> None:
        """Stop as asked from outside; every other end is a crash."""
        self._is_crash = False
        self._done.set()

    async def _notify_watchdog(self) -> None:
        """Tell systemd that the agent works: the sensor's thread takes samples, and this event loop runs."""
        limit = systemd.watchdog_seconds()
        notified_at = 0.0
        while limit is not None:
            if self._read_at > notified_at:
                notified_at = time.monotonic()
                systemd.notify("WATCHDOG=1")
            await asyncio.sleep(limit / 4)

    def _reload_dns(self) -> None:
        assert self._dns
        self._reloading = self._loop.create_task(self._dns.reload())

    def _log_dns_statistics(self) -> None:
        assert self._dns
        for line in self._dns.statistics():
            log.info("dns: %s", line)

    async def _close(self) -> None:
        systemd.notify("STOPPING=1")
        if self._dns:
            await self._dns.stop()
        ended = await asyncio.to_thread(self._thread.stop) if self._thread else True
        await asyncio.sleep(0)  # for what the sensor's thread posted last
        if self._events:
            await asyncio.to_thread(self._events.stop)
        if self._api:
            await self._api.stop()
        if self._http:
            await asyncio.to_thread(self._http.stop)
        if self._continuity and not self._is_crash and self._settings.state_keep is StateKeep.CRASH:
            await asyncio.to_thread(self._continuity.remove)
        if ended:  # else the thread still uses the descriptors, and the process's end closes them
            self._watching.close()

    def _announce(self) -> None:
        log.info(
            "udpwatch %s on kernel %s watches %s (mode %s)",
            __version__,
            os.uname().release,
            self._watching.description,
            self._source.mode,
        )
        for note in self._snapshot.notes:
            log.warning("%s", note)
        healing = self._healing(())
        if healing and not healing.reason:
            what = "dry run" if healing.dry_run else "on" if healing.on else "standby"
            log.info("healing: %s, %s", what, healing.selected)

    def _drop_capabilities(self) -> None:
        """Keep the capabilities that the source still needs, one to open an event file again whatever its owner, and
        one to bind addresses later: the responder's, and that of metrics whose port is in use."""
        keep = set(self._watching.capabilities)
        if self._settings.events not in (None, "-"):
            keep.add(Capability.DAC_OVERRIDE)
        if self._dns or (self._http and self._http.problem):
            keep.add(Capability.NET_BIND_SERVICE)
        capabilities.drop_all_but(keep)

    def _on_events(self, events: list[Event]) -> None:
        """Handle events, in the sensor's thread."""
        offset, node = self._source.clock_offset(), self._settings.node
        objects = [as_json(event, self._senders.lookup(event), node, event.time / 1e9 + offset) for event in events]
        if self._events:
            for each in objects:
                self._events.put(each)
        if self._api and (lost := self._api.post(objects)):
            self._lose("queue", lost)

    def _on_sample(self, sample: Sample, changes: list[str], self_test_passed: bool) -> None:
        """Handle a sample, in the sensor's thread."""
        clocks = read_clocks()
        for line in changes + self._node.add(clocks):
            log.warning("%s", line)
        if self._node.step:
            self._state.move_times(self._node.step)
        now = clocks.wall
        sample = replace(sample, node_faults=self._node.counts, memory=self._node.memory)
        for row in self._state.add(sample, now, clocks.monotonic):
            self._log_finding(row)
        left_out = self._senders.left_out
        self._lose("attribution", left_out - self._left_out)
        self._left_out = left_out
        if self._healer:
            self._healer.update(self._state.servers_of(sample))
            self._healer.note_elsewhere(self._snapshot.servers)
        snapshot = self._state.snapshot(self_test_passed, now, self._healing(sample.probes))
        # What is published is stored first, so that no counter falls if this process is killed.
        if self._continuity is None or self._continuity.store(
            self._state, at_once=sample.is_last or self._done.is_set()
        ):
            self._snapshot = snapshot
        ready, reason = self._ready()
        if self._logged_ready not in (None, ready) and not self._done.is_set():
            self._logged_ready = ready
            log.warning("ready again" if ready else "not ready: %s", *([] if ready else [reason]))
        self._read_at = time.monotonic()

    def _log_finding(self, row: Row) -> None:
        """Log a new finding, at most FINDING_LINES a minute: packets cause these lines."""
        now = time.monotonic()
        self._may_log = min(FINDING_LINES, self._may_log + (now - self._logged_at) * FINDING_LINES / 60)
        self._logged_at = now
        if self._may_log < 1:
            self._not_logged += 1
            return
        self._may_log -= 1
        if self._not_logged:
            log.warning("%d new findings not logged: more than %d in a minute", self._not_logged, FINDING_LINES)
            self._not_logged = 0
        log.warning("%s", describe(row))

    def _healing(self, probes: Iterable[Probe]) -> Healing | None:
        return self._healer.status(probes) if self._healer else None

    def _heal(self, on: bool | None, ports: list[int]) -> Healing:
        """Return what is healed; before that, switch it on or off. Raises UdpwatchError."""
        if self._healer is None:
            reason = "the agent was started without healing; start it with --heal standby, or --heal PORT"
            if on:
                raise UdpwatchError(f"cannot heal: {reason}")
            return Healing("no port", False, False, reason=reason)
        if on is not None:
            self._healer.switch(on, ports)
            listed = f"port{'s' * (len(ports) > 1)} {', '.join(map(str, ports))}"
            what = listed if ports else "what the settings select" if on else "everything"
            log.warning("healing of %s was switched %s over the socket", what, "on" if on else "off")
        return self._healer.status(self._snapshot.probes)

    def _doctor(self) -> dict[str, Any]:
        """Return the agent's report about itself, for its socket."""
        snapshot = self._snapshot
        healing = self._healing(snapshot.probes)
        return {
            "version": snapshot.version,
            "pid": os.getpid(),
            "kernel": snapshot.kernel,
            "mode": snapshot.mode,
            "ready": self._ready()[0],
            "reason": self._ready()[1],
            "notes": snapshot.notes,
            "capabilities": sorted(map(str, capabilities.effective())),
            "probes": [asdict(probe) for probe in snapshot.probes],
            "healing": asdict(healing) if healing else None,
            "state": {"folder": str(self._settings.state), "resumed": self._continuity.is_resumed}
            if self._continuity
            else None,
        }

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        self._end()

    def _lose(self, stage: str, count: int = 1) -> None:
        self._state.lose(stage, count)

    def _reader_gone(self) -> None:
        """Stop, as other programs in a pipe do when the reader exits."""
        self._end()

    def _end(self) -> None:
        """Stop; any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._done.set)

    def _healthy(self) -> tuple[bool, str]:
        age = time.monotonic() - self._read_at
        return age < STALLED_SECONDS, f"last sample {age:.1f} s ago"

    def _ready(self) -> tuple[bool, str]:
        if self._dns and not self._dns.ready:
            return False, "dns: loading tables, or stopping"
        if self._http and self._http.problem:
            return False, self._http.problem
        if self._snapshot.ready:
            warnings = self._dns.warnings() if self._dns else []
            return True, "\n".join(["ready", *(f"warning: dns: {line}" for line in warnings)])
        probes = self._snapshot.probes
        missing = [f"{probe.name}: {probe.reason}" for probe in probes if probe.required and not probe.attached]
        return False, "; ".join(missing) or "the self-test failed: the programs did not see our own datagram"


def describe(row: Row) -> str:
    """Describe a finding in one line."""
    if row.is_healed:
        return (
            f"healed reply: {row.sender.process} (pid {row.sender.pid}), port {row.port}/udp, was asked at "
            f"{row.expected}; udpwatch sets this source until the server is fixed: udpwatch explain {row.port}"
        )
    source = f"from {row.actual}" if row.actual != row.expected else "from another port of it, by source NAT"
    sender = f"{row.sender.process} (pid {row.sender.pid})"
    if row.cause == Cause.FORWARDED:
        sender = f"a machine behind {row.interface}" if row.interface else "another machine"
    return (
        f"wrong reply: {sender}, port {row.port}/udp, was asked at {row.expected} and replied "
        f"{source}; cause {row.cause}, conntrack verdict {row.verdict}"
    )


def run(settings: Settings) -> None:
    """Run the agent in the foreground until a signal stops it. Raises UdpwatchError."""
    starting = Starting()

    async def main() -> None:
        await App(settings, starting).run()

    before = {}
    try:
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, starting.note)
        asyncio.run(main())
    except Stopped:
        log.info("stopped while starting")
        if settings.state and settings.state_keep is StateKeep.CRASH:
            with contextlib.suppress(UdpwatchError, OSError), opened(settings.state) as pins:
                pins.remove()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
