"""Heal what the settings and the operator select, and report what was healed.

Three threads use it: the sensor's (`update`, `status`), the main one (`switch`, `status`), and the one that follows
addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from itertools import islice

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.heal.modes import Modes
from udpwatch.agent.heal.namespaces import Namespaces, Wanted
from udpwatch.agent.kernel import bpf, records
from udpwatch.agent.model import REFUSALS, Healing, HealSelection, Probe, Sender, Server, ServerCount

FAMILIES = {"heal4": "IPv4", "heal6": "IPv6"}  # program -> what it heals

MAX_ELSEWHERE = 8  # reported servers that are not healed because of their namespace


class Healer:
    """Uses the maps of bpf/heal.c; the caller closes them, after `close`."""

    def __init__(self, selection: HealSelection, maps: dict[str, int], cpus: int, reason: str = "") -> None:
        """``reason``: why the programs are not attached; then nothing is healed."""
        self._selection, self._maps, self._cpus, self._reason = selection, maps, cpus, reason
        self._lock = threading.Lock()
        self._namespaces: Namespaces | None = None
        self._modes: Modes | None = None
        self._elsewhere: tuple[str, ...] = ()
        if reason:
            return
        try:
            self._namespaces = Namespaces(maps["local_devices"])
        except OSError as error:
            self._reason = f"cannot read the local addresses: {error.strerror}"
            return
        self._modes = Modes(selection, maps["heal_ports"], maps["heal_slots"])

    def start(self) -> None:
        """Begin to follow addresses."""
        if self._namespaces:
            self._namespaces.start()

    def close(self) -> None:
        """Heal nothing any longer."""
        with self._lock:
            if self._modes:
                self._modes.switch(False, ())
        if self._namespaces:
            self._namespaces.close()

    def update(self, servers: Iterable[tuple[ServerCount, Sender]]) -> None:
        """Select among the servers of the node."""
        if not self._modes or not self._namespaces or not self._selection.by_server:
            return
        with self._lock:
            selected = self._modes.update(servers)
        wanted: dict[int, Wanted] = {}
        for count, sender in selected:
            if count.netns and (count.netns not in wanted or not wanted[count.netns].pid):
                tenant = "/".join((sender.namespace, sender.pod, sender.container or sender.cgroup))
                wanted[count.netns] = Wanted(sender.pid or count.pid, tenant, sender.title)
        self._namespaces.want(wanted)

    def note_elsewhere(self, servers: Iterable[Server]) -> None:
        """Note which servers with wrong replies have a port that is to be healed, but not the namespace."""
        if not self._modes or not self._namespaces:
            return
        wrong = (each for each in servers if each.wrong and each.netns and self._modes.names(each.port))
        elsewhere = (each for each in wrong if not self._namespaces.is_followed(each.netns))
        self._elsewhere = tuple(
            f"port {each.port} of {each.sender.title}: it is in another network namespace than the agent; select it "
            "with --heal-process"
            for each in islice(elsewhere, MAX_ELSEWHERE)
        )

    def switch(self, on: bool, ports: Collection[int]) -> None:
        """Switch ports, or everything, on or off at once (`Modes.switch`). Raises UdpwatchError if there is nothing to
        switch on.
        """
        if not self._modes:
            if on:
                raise UdpwatchError(f"cannot heal: {self._reason}")
            return
        if on and not ports and self._selection.is_empty:
            raise UdpwatchError("cannot switch healing on: the settings select no server; use `udpwatch heal on PORT`")
        with self._lock:
            self._modes.switch(on, ports)

    def status(self, probes: Iterable[Probe]) -> Healing:
        """Return what is healed, and what was refused. ``probes``: the programs in their current state."""
        if not self._modes or not self._namespaces:
            refused = dict.fromkeys(REFUSALS, 0)
            return Healing(str(self._selection), False, self._selection.dry_run, reason=self._reason, refused=refused)
        raw = bpf.map_lookup(self._maps["heal_counts"], bytes(4), records.HEAL_COUNTS_BYTES * self._cpus)
        dry_run_replies, refused = records.decode_heal_counts(raw or b"")
        with self._lock:
            on, ports_on, ports_off = self._modes.on, self._modes.ports_on.copy(), self._modes.ports_off.copy()
        detached = [f"{FAMILIES[each.name]}: {each.reason}" for each in probes if _is_detached(each)]
        reason = "; ".join(detached) if len(detached) == len(FAMILIES) else ""
        if not reason and not self._namespaces.followed:
            reason = next(iter(self._namespaces.not_healed()), "no network namespace is followed")
        return Healing(
            selected=str(self._selection),
            on=on and not self._selection.is_empty,
            dry_run=self._selection.dry_run,
            ports_on=tuple(sorted(ports_on)),
            ports_off=tuple(sorted(ports_off)),
            reason=reason,
            namespaces=self._namespaces.followed,
            not_healed=(*detached, *self._namespaces.not_healed(), *self._elsewhere),
            addresses=self._namespaces.addresses,
            dry_run_replies=dry_run_replies,
            refused=refused,
        )


def _is_detached(probe: Probe) -> bool:
    return probe.name in FAMILIES and not probe.attached
