"""The interface of a source of findings. The agent does not know whether it is the sensor or a recording."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from udpwatch.agent.model import Event, Probe, Sample


class FindingSource(Protocol):
    """A source of findings. Not thread-safe: one thread reads it."""

    @property
    def mode(self) -> str:
        """The mode, in one word for metrics and doctor."""

    @property
    def attached(self) -> bool:
        """Whether every required program is attached."""

    def clock_offset(self) -> float:
        """Return the seconds to add to the time of an event to get seconds since the epoch."""

    def wait(self, seconds: float) -> None:
        """Block until events are waiting or the time is over."""

    def events(self, most: int) -> Iterator[Event]:
        """Yield the events since the last call, about ``most`` of them."""

    def sample(self, expire_ns: int) -> Sample:
        """Read everything; findings that were quiet for ``expire_ns`` expire."""

    def self_test(self) -> bool:
        """Send a datagram of our own, and return whether the programs saw it."""

    def keep_attached(self) -> list[str]:
        """Attach again what was detached; return a line for each change."""

    def probes(self) -> tuple[Probe, ...]:
        """Return every program and its state."""

    def close(self) -> None:
        """Detach and free everything."""
