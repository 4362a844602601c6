"""Read what the programs of one generation (pins.py) count: findings, servers, and the counters of the programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from udpwatch.agent.kernel import bpf, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.records import OWN_LAYOUT, Layout
from udpwatch.agent.model import Counters, Increase, ServerCount
from udpwatch.agent.sources.servers import ServerCounter
from udpwatch.agent.sources.sockets import ReplySensor


class Counting:
    """Reads the maps of a generation; the caller closes them. Not thread-safe: one thread reads."""

    def __init__(
        self,
        maps: Mapping[str, int],
        count_waiting: int,
        limits: Limits,
        cpus: int,
        pace: Callable[[], None] = unpaced,
        layout: Layout = OWN_LAYOUT,
        resumed: bool = False,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        """Use the maps and the program `count_waiting`.

        ``resumed``: another process has read them before; ``stored`` is what its `to_store` returned, None if nothing
        is stored.
        """
        self._maps, self._cpus, self._layout = maps, cpus, layout
        known = stored or {}
        self.replies = ReplySensor(maps, limits, pace, layout, None if stored is None else known.get("findings", {}))
        self._servers = ServerCounter(
            maps, count_waiting, limits, cpus, pace, layout, resumed, known.get("servers", {})
        )
        #: the counters when these programs began to count (`begin`)
        self._begun = Counters(**{name: int(value) for name, value in known.get("counters", {}).items()})

    def close(self) -> None:
        self.replies.close()

    def begin(self) -> None:
        """Count from now on: what was counted until now is another version's."""
        self._begun = Counters()
        self._begun = self.counters()
        self._servers.begin()

    def servers(self, expire_ns: int) -> tuple[tuple[ServerCount, ...], ServerCount, int]:
        """Return what `ServerCounter.read` returns."""
        return self._servers.read(expire_ns)

    @property
    def tracked(self) -> int:
        """Conversations with a request within the window."""
        return self._servers.tracked

    def checked(self) -> int:
        """Return the datagrams that were sent to peers that had asked."""
        return self._servers.checked()

    def counters(self) -> Counters:
        """Return the counters of the programs."""
        return read_counters(self._maps, self._cpus, self._layout, self._begun)

    def end(self) -> Iterator[Increase]:
        """Yield what is left when no program counts any longer."""
        return self.replies.end()

    def to_store(self) -> dict[str, Any]:
        """Return what the next process needs to go on where this one stopped."""
        begun = {name: value for name, value in asdict(self._begun).items() if value}
        return {"findings": self.replies.to_store(), "servers": self._servers.to_store(), "counters": begun}

    def note_stored(self) -> None:
        """Note that what `to_store` returned last is stored."""
        self.replies.note_stored()


def is_readable(stored: Mapping[str, Any]) -> bool:
    """Return whether `Counting` can go on with what another process, maybe of another version, has stored."""
    try:
        for began, counted, _, since in dict(stored.get("findings", {})).values():
            int(began), int(counted), int(since or 0)
        servers = dict(stored.get("servers", {}))
        int(servers.get("ended", 0))
        for slot, (requests, replies, unanswered) in dict(servers.get("begun", {})).items():
            int(slot), int(requests), int(replies), int(unanswered)
        Counters(**{name: int(value) for name, value in dict(stored.get("counters", {})).items()})
    except (TypeError, ValueError):
        return False
    return True


def read_counters(maps: Mapping[str, int], cpus: int, layout: Layout, begun: Counters) -> Counters:
    """Return the counters of programs, less those when they began."""
    raw = bpf.map_lookup(maps["counters"], bytes(4), layout.size("stats") * cpus)
    now = records.decode_counters(layout.own("stats", raw or b""))
    names = (each.name for each in fields(Counters))
    return Counters(**{name: getattr(now, name) - getattr(begun, name) for name in names})
