"""Wires the stages together: kernel -> enrich -> state -> views. Signals, order of start, order of stop.

Three kinds of threads: the main one answers the socket and DNS; one reads the sensor, names who is behind what it
read and owns the state, because netlink, /proc and the number of findings may keep it busy; views that may block on
their reader (HTTP, event file) have their own. The others read the snapshot that the sensor's thread put down last.
What it posts to the main thread is bounded, and counted beyond that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udpwatch.agent import __version__
from udpwatch.agent.config import Settings
from udpwatch.agent.daemon import api, systemd
from udpwatch.agent.daemon.event_log import EventWriter, as_json
from udpwatch.agent.daemon.http import HttpServer
from udpwatch.agent.daemon.metrics import SnapshotCollector, exposition
from udpwatch.agent.daemon.self_test import SelfTest
from udpwatch.agent.daemon.startup import watch_kernel, watch_recording
from udpwatch.agent.daemon.state import About, State
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.kernel.cpu import Cpus, Pace, make_way, show_name
from udpwatch.agent.kernel.rlimits import raise_descriptor_limit
from udpwatch.agent.model import Cause, Event, Row, Sample, Snapshot
from udpwatch.agent.sources.source import FindingSource

if TYPE_CHECKING:
    from udpwatch.dns.service import Service

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
READ_SECONDS = 0.5
EVENTS_PER_SECOND = 1_000  # of all findings together: more stay in the ring buffer, where the kernel counts the excess
#: The sensor's thread may take this part of a CPU, or of the quota where that is less; beyond that it is slower. Counts
#: wait in the kernel, and the same process answers DNS and the health page.
CPU_SHARE = 0.2
SENSOR_NICE = 5  # whoever answers goes first
FINDING_LINES = 60  # logged in a minute
HEALTH_SECONDS = 2.0
DESCRIPTORS = 256  # some fifty for the programs, the rest for connections
STOP_SECONDS = 10.0
STALLED_SECONDS = 30.0  # without a sample for so long the agent is not healthy

log = logging.getLogger(__name__)


def open_dns(conf: Path | None, cpus: Cpus) -> Service:
    """The responder, bound; raises UdpwatchError. Imported only where it is wanted: it takes memory."""
    from udpwatch.dns.errors import DnsError  # noqa: PLC0415
    from udpwatch.dns.options import read_conf  # noqa: PLC0415
    from udpwatch.dns.service import Service  # noqa: PLC0415
    from udpwatch.dns.settings import Settings as DnsSettings  # noqa: PLC0415

    try:
        dns = read_conf(conf) if conf else DnsSettings()
        if dns.metrics_listen != DnsSettings().metrics_listen:
            raise UdpwatchError(f"{conf}: metrics-listen is for `udpwatch dns`; the agent has --metrics-listen")
        if dns.user:
            raise UdpwatchError(f"{conf}: user is for `udpwatch dns`; the agent needs root")
        return Service(dns, __version__, cpus)
    except DnsError as error:
        raise UdpwatchError(f"--dns: {error}") from None


class _SensorThread(threading.Thread):
    """Reads the sensor; its handlers run in this thread."""

    def __init__(
        self,
        source: FindingSource,
        forget: float,
        on_events: Callable[[list[Event]], None],
        on_sample: Callable[[Sample, list[str], bool], None],
        on_failure: Callable[[BaseException], None],
        self_test: SelfTest,
        pace: Pace,
    ) -> None:
        super().__init__(name="sensor", daemon=True)
        self._source, self._forget_ns = source, int(forget * 1e9)
        self._on_events, self._on_sample, self._on_failure = on_events, on_sample, on_failure
        self._self_test, self._pace = self_test, pace
        self._stopping = threading.Event()
        self._may_take, self._taken_at = 0.0, time.monotonic()  # events, by EVENTS_PER_SECOND

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._on_failure(error)

    def _run(self) -> None:
        next_reading = next_health = 0.0
        show_name()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SENSOR_NICE)
        self._pace.start(self._stopping.wait)
        while not self._stopping.is_set():
            self._source.wait(READ_SECONDS)
            self._pace()
            self._pass_events()
            now = time.monotonic()
            if now >= next_reading:
                changes = []
                if now >= next_health:
                    changes = self._source.keep_attached() + self._self_test.run()
                    next_health = now + HEALTH_SECONDS
                self._pass_reading(changes)
                next_reading = time.monotonic() + READ_SECONDS
        self._may_take = EVENTS_PER_SECOND  # the last ones: whatever was taken before
        self._pass_events()
        self._pass_reading([])

    def _pass_reading(self, changes: list[str]) -> None:
        self._on_sample(self._source.sample(self._forget_ns), changes, self._self_test.passed)

    def _pass_events(self) -> None:
        now = time.monotonic()
        gained = (now - self._taken_at) * EVENTS_PER_SECOND
        self._may_take, self._taken_at = min(self._may_take + gained, EVENTS_PER_SECOND * READ_SECONDS), now
        if self._may_take < 1:
            self._stopping.wait(READ_SECONDS / 10)  # the sensor has events, so it does not wait
            return
        events = list(self._source.events(int(self._may_take)))
        self._may_take -= len(events)
        if events:
            self._on_events(events)

    def stop(self) -> bool:
        """Take a last sample and end; False where that takes too long."""
        self._stopping.set()
        self.join(STOP_SECONDS)
        return not self.is_alive()


class Stopped(BaseException):
    """A signal to stop while the agent is still starting."""


class Starting:
    """Signals to stop until the event loop takes them: noted, and acted on only where nothing is half done. Raised
    anywhere, they leave a socket behind whose removal was the next line, or get lost in a destructor."""

    def __init__(self) -> None:
        self.to_be_stopped = self._may_raise = False

    def note(self, _number: int, _frame: object) -> None:
        """A signal's handler."""
        self.to_be_stopped = True
        if self._may_raise:
            raise Stopped

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what may take long and leaves nothing behind: raises Stopped at a signal that came, or comes."""
        try:
            self._may_raise = True
            if self.to_be_stopped:
                raise Stopped
            yield
        finally:
            self._may_raise = False
        if self.to_be_stopped:
            raise Stopped


class App:
    """The agent; once made, `run` works and closes it."""

    def __init__(self, settings: Settings, starting: Starting) -> None:
        """Bind and open everything that can fail, cheapest first; raises UdpwatchError with nothing left behind."""
        if not settings.replay:
            capabilities.require()
        if not raise_descriptor_limit(DESCRIPTORS):
            raise UdpwatchError(
                f"cannot open {DESCRIPTORS} files: the hard limit is lower; raise it with ulimit -n, or with "
                "LimitNOFILE= in a unit"
            )
        self._settings, self._starting = settings, starting
        self._cpus = Cpus()
        self._started = time.time()
        self._failure: BaseException | None = None
        self._said_ready: bool | None = None  # in the log
        self._done = asyncio.Event()
        self._read_at = self._logged_at = time.monotonic()
        self._may_log, self._not_logged = float(FINDING_LINES), 0
        self._left_out = 0  # look-ups, as counted so far
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
                self._api = api.Api(listener, settings.socket, lambda: self._snapshot, self._doctor)
            with starting.interruptible():
                self._pace = Pace(CPU_SHARE, self._cpus)
                self._watching = watch_recording(settings) if settings.replay else watch_kernel(settings, self._pace)
            self._source, self._senders = self._watching.source, self._watching.senders
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
            self._state = State(about, settings.max_series, settings.forget, self._senders)
            self._snapshot: Snapshot = self._state.snapshot(False, self._started)
            opened.pop_all()

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or SIGHUP; raises what ended it otherwise. Everything is closed afterwards."""
        self._loop = asyncio.get_running_loop()
        self._thread: _SensorThread | None = None
        try:
            await self._run()
        finally:
            await self._close()
        if self._failure:
            raise self._failure

    async def _run(self) -> None:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._done.set)
        if self._dns:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload_dns)
            self._loop.add_signal_handler(signal.SIGUSR1, self._tell_of_dns)
        if self._starting.to_be_stopped:
            self._done.set()
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
        handlers = self._on_events, self._on_sample, self._on_failure
        self._thread = _SensorThread(self._source, forget, *handlers, self._watching.self_test, self._pace)
        self._thread.start()
        systemd.notify("READY=1")
        self._watchdog = self._loop.create_task(self._notify_watchdog())
        self._said_ready, reason = self._ready()
        make_way()
        if self._said_ready:
            log.info("ready")
        else:
            log.warning("not ready: %s", reason)
        await self._done.wait()

    async def _notify_watchdog(self) -> None:
        """Tell systemd that the agent works: that the sensor's thread has made samples and that the loop runs."""
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

    def _tell_of_dns(self) -> None:
        assert self._dns
        for line in self._dns.statistics():
            log.info("dns: %s", line)

    async def _close(self) -> None:
        systemd.notify("STOPPING=1")
        if self._dns:
            await self._dns.stop()
        ended = await asyncio.to_thread(self._thread.stop) if self._thread else True
        await asyncio.sleep(0)  # what the sensor's thread posted last
        if self._events:
            await asyncio.to_thread(self._events.stop)
        if self._api:
            await self._api.stop()
        if self._http:
            await asyncio.to_thread(self._http.stop)
        if ended:  # else the process's end closes them, under nobody's hands
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

    def _drop_capabilities(self) -> None:
        """Keep what the sensor goes on to need; for an event file, what opening it again needs, whoever owns it by
        then; for the responder, and for metrics whose port is taken, what listening on an address later needs."""
        keep = set(self._watching.capabilities)
        if self._settings.events not in (None, "-"):
            keep.add(Capability.DAC_OVERRIDE)
        if self._dns or (self._http and self._http.problem):
            keep.add(Capability.NET_BIND_SERVICE)
        capabilities.drop_all_but(keep)

    def _on_events(self, events: list[Event]) -> None:
        """In the sensor's thread, as _on_sample."""
        offset, node = self._source.clock_offset(), self._settings.node
        told = [as_json(event, self._senders.lookup(event), node, event.time / 1e9 + offset) for event in events]
        if self._events:
            for each in told:
                self._events.put(each)
        if self._api and (lost := self._api.post(told)):
            self._lose("queue", lost)

    def _on_sample(self, sample: Sample, changes: list[str], self_test_passed: bool) -> None:
        now = time.time()
        for line in changes:
            log.warning("%s", line)
        for row in self._state.add(sample, now, time.monotonic()):
            self._log_finding(row)
        left_out = self._senders.left_out
        self._lose("attribution", left_out - self._left_out)
        self._left_out = left_out
        self._snapshot = self._state.snapshot(self_test_passed, now)
        ready, reason = self._ready()
        if self._said_ready not in (None, ready) and not self._done.is_set():
            self._said_ready = ready
            log.warning("ready again" if ready else "not ready: %s", *([] if ready else [reason]))
        self._read_at = time.monotonic()

    def _log_finding(self, row: Row) -> None:
        """A line for each new finding, as many as FINDING_LINES a minute: packets order them."""
        now = time.monotonic()
        self._may_log = min(FINDING_LINES, self._may_log + (now - self._logged_at) * FINDING_LINES / 60)
        self._logged_at = now
        if self._may_log < 1:
            self._not_logged += 1
            return
        self._may_log -= 1
        if self._not_logged:
            log.warning("%d new findings were not logged: too many in a minute", self._not_logged)
            self._not_logged = 0
        log.warning("%s", describe(row))

    def _doctor(self) -> dict[str, Any]:
        """What the agent says of itself to whoever asks its socket."""
        snapshot = self._snapshot
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
        }

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        self._end()

    def _lose(self, stage: str, count: int = 1) -> None:
        self._state.lose(stage, count)

    def _reader_gone(self) -> None:
        """Nobody reads standard output any more: as any program in a pipe, stop."""
        self._end()

    def _end(self) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._done.set)

    def _healthy(self) -> tuple[bool, str]:
        age = time.monotonic() - self._read_at
        return age < STALLED_SECONDS, f"last sample {age:.1f} s ago"

    def _ready(self) -> tuple[bool, str]:
        if self._dns and not self._dns.ready:
            return False, "dns: the tables are being read, or it is stopping"
        if self._http and self._http.problem:
            return False, self._http.problem
        if self._snapshot.ready:
            return True, "ready"
        probes = self._snapshot.probes
        missing = [f"{probe.name}: {probe.reason}" for probe in probes if probe.required and not probe.attached]
        return False, "; ".join(missing) or "the self-test failed: the programs did not see our own datagram"


def describe(row: Row) -> str:
    """A finding in one line."""
    answered = f"from {row.actual}" if row.actual != row.expected else "from another port of it, by source NAT"
    who = f"{row.sender.process} (pid {row.sender.pid})"
    if row.cause == Cause.FORWARDED:
        who = f"a machine behind {row.interface}" if row.interface else "another machine"
    return (
        f"wrong reply: {who}, port {row.port}/udp, was asked at {row.expected} and answered "
        f"{answered}; cause {row.cause}, conntrack verdict {row.verdict}"
    )


def run(settings: Settings) -> None:
    """Run the agent in the foreground until it is told to stop; raises UdpwatchError."""
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
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
