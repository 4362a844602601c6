"""What yields findings, whether the kernel's sensor or a recording: the agent does not know which one it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from udpwatch.agent.model import Event, Probe, Sample


class FindingSource(Protocol):
    """Not thread-safe: one thread reads."""

    @property
    def mode(self) -> str:
        """One word for metrics and doctor."""

    @property
    def attached(self) -> bool:
        """Whether every required program is attached."""

    def clock_offset(self) -> float:
        """Seconds to add to an event's time to get seconds since the epoch."""

    def wait(self, seconds: float) -> None:
        """Block until there are events, or the time is over."""

    def events(self, most: int) -> Iterator[Event]:
        """The events since the last call, about ``most`` of them."""

    def sample(self, expire_ns: int) -> Sample:
        """Read everything; findings that were quiet for ``expire_ns`` are forgotten."""

    def self_test(self) -> bool:
        """Send a datagram with a wrong reply of our own; return whether it was seen."""

    def keep_attached(self) -> list[str]:
        """Attach again what was detached; return a line for each change."""

    def probes(self) -> tuple[Probe, ...]:
        """Every program and its state."""

    def close(self) -> None:
        """Detach and free everything."""
