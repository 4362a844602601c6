"""Tell the programs of bpf/heal.c which ports and servers are healed.

Rules
1. Without processes and Kubernetes namespaces to select by, the mode belongs to ports, and a server is healed from its
   first reply. Otherwise it belongs to servers, and begins when the agent has identified the server.
2. What is switched at run time concerns ports and precedes the settings. Both switches are single writes to a map, so
   that they take effect for the next send.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import bpf
from udpwatch.agent.kernel.records import HEAL_BY_SLOT, HEAL_DRY_RUN, HEAL_NEVER, HEAL_ON, HEAL_UNSET
from udpwatch.agent.model import HealSelection, Sender, ServerCount

MAX_PORTS = 1_024  # switched at run time
_ALL_PORTS = 0  # the element of heal_ports for all ports
_KEY = struct.Struct("=I")


class Modes:
    """The modes in the maps ``heal_ports`` and ``heal_slots``. Not thread-safe."""

    def __init__(self, selection: HealSelection, heal_ports: int, heal_slots: int) -> None:
        """Write the modes that the settings select."""
        self._selection, self._ports_map, self._slots_map = selection, heal_ports, heal_slots
        self._mode = HEAL_DRY_RUN if selection.dry_run else HEAL_ON
        modes = b"".join(bpf.array_values(heal_ports, 1))
        #: as written; an earlier agent with --state may have left some
        self._ports = {port: mode for port, mode in enumerate(modes) if mode != HEAL_UNSET}
        self._slots: set[int] = set()  # those that have the mode
        self.on = True  # the settings' selection is in force
        self.ports_on: set[int] = set()
        self.ports_off: set[int] = set()
        self._write()

    def switch(self, on: bool, ports: Collection[int]) -> None:
        """Switch ports on or off; without ports, switch on what the settings select, or switch everything off.

        Raises UdpwatchError if too many ports are switched.
        """
        here, there = (self.ports_on, self.ports_off) if on else (self.ports_off, self.ports_on)
        if len(here | set(ports)) > MAX_PORTS:
            raise UdpwatchError(f"cannot switch more than {MAX_PORTS:,} ports; use --heal all")
        if ports:
            here.update(ports)
            there.difference_update(ports)
        else:
            self.on = on
            self.ports_off.clear()
            if not on:
                self.ports_on.clear()
        self._write()

    def names(self, port: int) -> bool:
        """Return whether the replies of a port are to be healed because the operator has named this port."""
        return self._ports.get(port, HEAL_UNSET) not in (HEAL_UNSET, HEAL_NEVER)

    def update(self, servers: Iterable[tuple[ServerCount, Sender]]) -> list[tuple[ServerCount, Sender]]:
        """Set the modes of servers by their senders; return those that the settings select."""
        selected = [each for each in servers if self._selects(*each)] if self._selection.by_server else []
        slots = {count.slot for count, _ in selected}
        for slot in slots - self._slots:
            bpf.map_update(self._slots_map, _KEY.pack(slot), bytes([self._mode]))
        for slot in self._slots - slots:
            bpf.map_update(self._slots_map, _KEY.pack(slot), bytes([HEAL_UNSET]))
        self._slots = slots
        return selected

    def _selects(self, count: ServerCount, sender: Sender) -> bool:
        chosen = self._selection
        return (
            (chosen.all_ports or count.port in chosen.ports)
            and (not chosen.processes or any(fnmatchcase(sender.process, each) for each in chosen.processes))
            and (not chosen.namespaces or any(fnmatchcase(sender.namespace, each) for each in chosen.namespaces))
        )

    def _write(self) -> None:
        """Write what has changed, beginning with what is switched off."""
        wanted = dict.fromkeys(self.ports_on, self._mode)
        if self.on:
            if self._selection.by_server:
                wanted[_ALL_PORTS] = HEAL_BY_SLOT
            elif self._selection.all_ports:
                wanted[_ALL_PORTS] = self._mode
            else:
                wanted |= dict.fromkeys(self._selection.ports, self._mode)
        wanted |= dict.fromkeys(self.ports_off, HEAL_NEVER)
        changed = {port: wanted.get(port, HEAL_UNSET) for port in self._ports.keys() | wanted.keys()}
        for port, mode in sorted(changed.items(), key=lambda each: (each[1] not in (HEAL_UNSET, HEAL_NEVER), each[0])):
            if self._ports.get(port, HEAL_UNSET) != mode:
                bpf.map_update(self._ports_map, _KEY.pack(port), bytes([mode]))
        self._ports = wanted
