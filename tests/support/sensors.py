"""Real sensors and their findings."""

from __future__ import annotations

import os
from pathlib import Path

from udpwatch.agent.kernel import cgroup
from udpwatch.agent.kernel.features import VMLINUX_BTF
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Event, Finding, Forwarded, Hooks
from udpwatch.agent.sources.sensor import Sensor

FOREVER_NS = 1 << 62
#: Whether this is a guest of the kernel matrix (tests/kernels/guest.py): its kernel is known to allow everything that
#: its lockdown does not forbid, and the whole machine is the tests'.
IN_MATRIX = bool(os.environ.get("UDPWATCH_TEST_KERNEL"))


class Watch:
    """A sensor, and all its findings so far by local port. Each test uses other ports."""

    def __init__(
        self,
        limits: Limits = Limits(),
        btf: Path = VMLINUX_BTF,
        hooks: Hooks = Hooks.ALL,
        forwarded: Forwarded = Forwarded.AUTO,
        watched: Path | None = None,
        heal: bool = False,
    ) -> None:
        """``watched``: only this cgroup, so that nothing else on the machine disturbs. ``heal``: load the programs that
        heal, for healed.Healed.
        """
        self.cgroup = cgroup.find(str(watched) if watched else None)
        cache = Path(os.environ["UDPWATCH_CACHE"])
        self.sensor = Sensor.open(self.cgroup, limits, btf, hooks, forwarded, cache, heal=heal)
        self._findings: dict[Finding, int] = {}
        self._events: list[Event] = []

    def read(self) -> None:
        for increase in self.sensor.sample(FOREVER_NS).increases:
            self._findings[increase.finding] = self._findings.get(increase.finding, 0) + increase.count
        self._events += self.sensor.events()

    def findings(self, port: int) -> dict[Finding, int]:
        """Return the findings on a local port with their counts."""
        self.read()
        return {finding: number for finding, number in self._findings.items() if finding.port == port}

    def count(self, port: int) -> int:
        """Return the number of wrong replies from a local port."""
        return sum(self.findings(port).values())

    def events(self, port: int) -> list[Event]:
        """Return the events of a local port."""
        self.read()
        return [event for event in self._events if event.finding.port == port]

    def close(self) -> None:
        self.sensor.close()
        self.cgroup.close()


def open_netlink_watch(folder: Path) -> Watch:
    """Open a sensor that asks conntrack over netlink, because the file with the kernel's types is empty."""
    nothing = folder / "empty"
    nothing.touch()
    watch = Watch(btf=nothing)
    assert watch.sensor.features.mode == "netlink"
    return watch
