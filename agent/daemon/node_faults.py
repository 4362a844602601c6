"""Count faults of the node that are no losses: late samples, short memory, a wall clock that was set, suspends.

Rules
1. Counts of wrong replies wait in the kernel, so a late sample loses none.
2. The wall clock is only shown. When it is set, the caller moves the times that it keeps (`step`), so that their ages
   stay right.
3. A line is logged when a fault begins, and not again while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable

from udpwatch.agent.kernel.clock import Clocks
from udpwatch.agent.model import NODE_FAULTS, Memory

LATE_SECONDS = 5.0  # between two samples; `udpwatch top` shows an age beyond this in red
CALM_SECONDS = 60.0  # without a late sample, until the next one is logged again
STEP_SECONDS = 1.0  # by which the wall clock was set; adjusting its rate moves it by less than a millisecond a second
SUSPEND_SECONDS = 1.0  # a thread without CPU reads the clocks at different times
MEMORY_SECONDS = 5.0  # between two checks
MEMORY_SHARE = 0.9  # of the limit


class NodeFaults:
    """Compares each sample's clocks with those of the sample before. Not thread-safe."""

    def __init__(self, clocks: Clocks, read_memory: Callable[[], Memory | None]) -> None:
        """``clocks``: at the first sample."""
        self._read_memory = read_memory
        self._before = clocks
        self._checked_at = clocks.monotonic - MEMORY_SECONDS
        self._late_at = clocks.monotonic - CALM_SECONDS
        self._counts = dict.fromkeys(NODE_FAULTS, 0)
        self.memory: Memory | None = None
        self.step = 0.0  # seconds that the wall clock was set forward before this sample

    @property
    def counts(self) -> dict[str, int]:
        """Return NODE_FAULTS -> how many since the start."""
        return dict(self._counts)

    def add(self, clocks: Clocks) -> list[str]:
        """Add a sample; return the lines to log."""
        before, self._before = self._before, clocks
        lines = self._add_clocks(before, clocks)
        if clocks.monotonic - self._checked_at >= MEMORY_SECONDS:
            self._checked_at = clocks.monotonic
            lines += self._check_memory()
        return lines

    def _add_clocks(self, before: Clocks, now: Clocks) -> list[str]:
        lines = []
        passed = now.monotonic - before.monotonic
        if passed > LATE_SECONDS:
            self._counts["late_sample"] += 1
            if now.monotonic - self._late_at >= CALM_SECONDS:
                lines.append(
                    f"the agent gets too little CPU: the last sample is {passed:.1f} s old; counts wait in the kernel"
                )
            self._late_at = now.monotonic
        slept = now.boot - before.boot - passed
        if slept > SUSPEND_SECONDS:
            self._counts["suspend"] += 1
            lines.append(f"the machine was suspended for {slept:.1f} s")
        self.step = now.wall - before.wall - (now.boot - before.boot)
        if abs(self.step) < STEP_SECONDS:
            self.step = 0.0
        else:
            self._counts["clock_step"] += 1
            lines.append(f"the wall clock was set {'forward' if self.step > 0 else 'back'} by {abs(self.step):.1f} s")
        return lines

    def _check_memory(self) -> list[str]:
        was_short = is_short(self.memory)
        self.memory = self._read_memory()
        if self.memory is None or not is_short(self.memory):
            return []
        self._counts["memory"] += 1
        if was_short:
            return []
        used, limit = (value >> 20 for value in (self.memory.used, self.memory.limit))
        return [f"{used} of {limit} MB of the memory limit are in use; the kernel kills the agent when none is left"]


def is_short(memory: Memory | None) -> bool:
    """Return whether less than a tenth of the limit is free."""
    return memory is not None and memory.used > MEMORY_SHARE * memory.limit
