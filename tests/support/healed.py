"""Heal the replies of servers in one network namespace, with the programs of a sensor."""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Iterator

from waiting import wait_for

from udpwatch.agent.heal.healer import Healer
from udpwatch.agent.kernel.interfaces import addresses
from udpwatch.agent.model import HealSelection
from udpwatch.agent.sources.sensor import Sensor
from udpwatch.agent.testing.lab import Namespace


class Healed:
    """Healing for all ports of one namespace, as of an agent that runs there; off at first."""

    def __init__(self, sensor: Sensor, node: Namespace) -> None:
        """``sensor``: opened with ``heal``."""
        assert not sensor.heal_reason, sensor.heal_reason
        self._node = node
        with node.entered():
            self._healer = Healer(HealSelection(all_ports=True), sensor.maps, sensor.cpus)
            self._healer.switch(False, ())
            self._healer.start()

    def close(self) -> None:
        self._healer.close()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on for a while."""
        self._healer.switch(True, ())
        try:
            yield
        finally:
            self._healer.switch(False, ())

    def follow(self) -> None:
        """Wait until all addresses of the namespace are known, but link-local ones of IPv6.

        An address that was removed must have stayed for a second.
        """
        wait_for(lambda: self._healer.status(()).addresses == self._usable(), "the addresses to be followed")

    def _usable(self) -> int:
        with self._node.entered():
            found = {each.address for each in addresses(1_000) if each.is_usable}
        return sum(":" not in each or not ipaddress.ip_address(each).is_link_local for each in found)

    def refused(self) -> Counter[str]:
        """Return the number of replies that were not healed, by reason (model.REFUSALS)."""
        return Counter(self._healer.status(()).refused)
