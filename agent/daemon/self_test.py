"""The self-test: whether the source sees a datagram of our own."""

from __future__ import annotations

import time

from udpwatch.agent.sources.source import FindingSource

INTERVAL_SECONDS = 60.0


class SelfTest:
    """Runs the self-test when it is due. Where this process's packets do not pass the watched cgroup, the kernel's
    statement that the programs are attached has to do."""

    def __init__(self, source: FindingSource, inside: bool) -> None:
        """``inside``: whether this process is in the watched cgroup."""
        self._source, self._inside = source, inside
        self._is_logged = False
        self._due = 0.0
        self.passed = False

    def run(self) -> list[str]:
        """Run the self-test unless it passed within INTERVAL_SECONDS. Return the line to log when it begins to fail."""
        if self.passed and time.monotonic() < self._due:
            return []
        self.passed = self._source.self_test() if self._inside else self._source.attached
        self._due = time.monotonic() + INTERVAL_SECONDS
        if self.passed or self._is_logged:
            self._is_logged = not self.passed
            return []
        self._is_logged = True
        return ["the programs did not see a datagram sent over loopback: is lo up here, and allowed by the firewall?"]
