"""Read the source of findings in a thread with a limited share of the CPU."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from udpwatch.agent.daemon.self_test import SelfTest
from udpwatch.agent.kernel.cpu import Pace, show_name
from udpwatch.agent.model import Event, Sample
from udpwatch.agent.sources.source import FindingSource

SAMPLE_SECONDS = 0.5
EVENTS_PER_SECOND = 1_000  # of all findings together; more stay in the ring buffer, and the kernel counts its losses
#: The share of a CPU, or of the quota if that is less, that this thread may use; beyond it, the thread pauses. Counts
#: wait in the kernel, and other threads serve DNS and health meanwhile.
CPU_SHARE = 0.2
SENSOR_NICE = 5  # the threads that serve requests go first
HEALTH_SECONDS = 2.0
STOP_SECONDS = 10.0


class SensorThread(threading.Thread):
    """Reads the source; the handlers run in this thread."""

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
        next_sample = next_health = 0.0
        show_name()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SENSOR_NICE)
        self._pace.start(self._stopping.wait)
        while not self._stopping.is_set():
            self._source.wait(SAMPLE_SECONDS)
            self._pace()
            self._pass_events()
            now = time.monotonic()
            if now >= next_sample:
                changes = []
                if now >= next_health:
                    changes = self._source.keep_attached() + self._self_test.run()
                    next_health = now + HEALTH_SECONDS
                self._pass_sample(changes)
                next_sample = time.monotonic() + SAMPLE_SECONDS
        self._may_take = EVENTS_PER_SECOND  # the last events, whatever was taken before
        self._pass_events()
        self._pass_sample([])

    def _pass_sample(self, changes: list[str]) -> None:
        self._on_sample(self._source.sample(self._forget_ns), changes, self._self_test.passed)

    def _pass_events(self) -> None:
        now = time.monotonic()
        gained = (now - self._taken_at) * EVENTS_PER_SECOND
        self._may_take, self._taken_at = min(self._may_take + gained, EVENTS_PER_SECOND * SAMPLE_SECONDS), now
        if self._may_take < 1:
            self._stopping.wait(SAMPLE_SECONDS / 10)  # source.wait() returns at once while there are events
            return
        events = list(self._source.events(int(self._may_take)))
        self._may_take -= len(events)
        if events:
            self._on_events(events)

    def stop(self) -> bool:
        """Take a last sample and end; return False if that takes too long."""
        self._stopping.set()
        self.join(STOP_SECONDS)
        return not self.is_alive()
