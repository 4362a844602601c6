"""The programs that heal, loaded without an agent, with the addresses of a namespace followed beside the test."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
import time
from pathlib import Path
from typing import Self

from udpwatch.agent.heal.addresses import Bounds, LocalAddresses
from udpwatch.agent.kernel import bpf, cgroup, loader
from udpwatch.agent.kernel.records import (
    FINDING_BYTES,
    FINDING_KEY_BYTES,
    HEAL_COUNTS_BYTES,
    decode_finding,
    decode_finding_key,
    decode_heal_counts,
)
from udpwatch.agent.model import Verdict
from udpwatch.agent.sources.sensor import possible_cpus
from udpwatch.agent.testing.lab import Namespace

OFF, DRY_RUN, ON, NEVER = range(4)  # enum healing
ALL_PORTS = 0
BOUNDS = Bounds(addresses=1_000, changes_per_second=1e6, burst=1_000_000)


class Healing:
    """Loads and attaches the programs; a context manager. Nothing is healed before `set_mode`."""

    def __init__(
        self, *namespaces: Namespace, limits: loader.Limits = loader.Limits(), watched: Path | None = None
    ) -> None:
        """Heal in these namespaces. ``watched``: only in this cgroup."""
        with contextlib.closing(cgroup.find(str(watched) if watched else None)) as root:
            cache = Path(os.environ["UDPWATCH_CACHE"])
            self.loaded = loader.load(root, limits, cache=cache, heal=True)
        assert {"heal4", "heal6"} <= self.loaded.links.keys(), self.loaded.refused
        self._followed: dict[int, tuple[threading.Event, threading.Thread]] = {}
        for namespace in namespaces:
            self.follow(namespace)

    def follow(self, namespace: Namespace) -> None:
        """Heal in a namespace, too."""
        ended = threading.Event()
        with namespace.entered():
            followed = LocalAddresses(self.loaded.maps["local_devices"], BOUNDS, time.monotonic())
        thread = threading.Thread(target=self._follow, args=(followed, ended))
        self._followed[namespace.inode] = ended, thread
        thread.start()

    @staticmethod
    def _follow(followed: LocalAddresses, ended: threading.Event) -> None:
        while not ended.is_set():
            if select.select([followed.fileno()], [], [], 0.1)[0]:
                time.sleep(0.005)  # as the agent: many changes at once are cheaper to read
            followed.read(time.monotonic())
        followed.close()

    def leave(self, namespace: Namespace) -> None:
        """Heal no longer in a namespace."""
        ended, thread = self._followed.pop(namespace.inode)
        ended.set()
        thread.join()

    def set_mode(self, port: int, mode: int) -> None:
        """Set what to do with replies from a port, or from ALL_PORTS."""
        bpf.map_update(self.loaded.maps["heal_ports"], struct.pack("=I", port), bytes([mode]))

    def refused(self) -> dict[str, int]:
        """Return how many replies were refused, by reason; without those of which there are none."""
        cpus = possible_cpus()
        raw = bpf.map_lookup(self.loaded.maps["heal_counts"], bytes(4), HEAL_COUNTS_BYTES * cpus)
        _, counts = decode_heal_counts(raw or b"")
        return {reason: count for reason, count in counts.items() if count}

    def healed(self, port: int) -> int:
        """Return the number of healed datagrams from a port."""
        items = bpf.map_items(self.loaded.maps["findings"], FINDING_KEY_BYTES, FINDING_BYTES)
        found = ((decode_finding_key(key)[0], decode_finding(value)[0]) for key, value in items)
        return sum(count for finding, count in found if finding.port == port and finding.verdict is Verdict.HEALED)

    def addresses(self, namespace: int) -> int:
        """Return the number of addresses of a namespace that the programs know; ``namespace``: its inode."""
        keys = (key for key, _ in bpf.map_items(self.loaded.maps["local_devices"], 24, 4))
        return sum(struct.unpack_from("=I", key, 16)[0] == namespace for key in keys)

    def close(self) -> None:
        for ended, _ in self._followed.values():
            ended.set()
        for _, thread in self._followed.values():
            thread.join()
        for group in (self.loaded.links, self.loaded.programs, self.loaded.maps):
            for descriptor in group.values():
                os.close(descriptor)
            group.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
