"""Replace another version's programs by ours, so that each reply is judged by one of them, and none by neither.

1. The others judge and count. Our own programs are attached beside them and learn: which requests are pending, and
   which of them are answered. The loader has begun this.
2. After one window they know every request that can still be answered. One system call puts our program `egress` in
   the place of the other one, in its own link: each packet meets one of the two.
3. What the others have counted is read for the last time and stored. Then they are removed.

The kernel shows which step was the last one, so an agent that is killed leaves something with which the next one can
go on (pins.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from udpwatch.agent.kernel import bpf, clock
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.pin_check import check_layout
from udpwatch.agent.kernel.pins import Generation
from udpwatch.agent.kernel.programs import MAPS
from udpwatch.agent.kernel.records import Layout
from udpwatch.agent.sources.counting import Counting


class Handover:
    """The generation that counts until ours has learned."""

    def __init__(
        self,
        before: Generation,
        ours: Generation,
        cpus: int,
        pace: Callable[[], None],
        stored: Mapping[str, Any] | None,
        learns_until: int,
    ) -> None:
        """Open what is pinned. Ours learns until ``learns_until``, in nanoseconds of the programs' clock.

        Raises OSError, LookupError, TypeError or ValueError if it cannot be read.
        """
        self._before, self._ours = before, ours
        self.is_done = ours.counts or not before.counts  # whether our programs count
        described = before.manifest() or {}
        self._learns_until = learns_until
        names = Limits.__dataclass_fields__.keys() & dict(described["limits"]).keys()
        limits = Limits(**{name: int(described["limits"][name]) for name in names})
        self.layout = Layout(described["layout"])
        with contextlib.ExitStack() as opened:

            def get(kind: str, name: str) -> int:
                descriptor = before.get(kind, name)
                opened.callback(os.close, descriptor)
                return descriptor

            self.link = get("link", "egress")
            held = {name for kind, name in described["names"] if kind == "map"}
            self.maps = {name: get("map", name) for name in sorted(held & MAPS["sockets.c"])}
            check_layout(self.maps, self.layout)
            count_waiting = get("program", "count_waiting")
            self.counting = Counting(
                self.maps, count_waiting, limits, cpus, pace, self.layout, resumed=True, stored=stored or {}
            )
            opened.callback(self.counting.close)
            self._close = opened.pop_all().close

    @property
    def digest(self) -> str:
        """The name of the other generation."""
        return self._before.digest

    @property
    def is_due(self) -> bool:
        """Whether our programs know every request that can still be answered."""
        return clock.monotonic_ns() >= self._learns_until

    @property
    def seconds_left(self) -> float:
        """How long our programs have to learn."""
        return max(0.0, (self._learns_until - clock.monotonic_ns()) / 1e9)

    def switch(self, egress: int) -> None:
        """Put our program in the place of the other one. Raises OSError, and then nothing has changed."""
        bpf.link_update(self.link, egress)
        self.is_done = True
        bpf.wait_for_programs()
        self.pin_link()

    def pin_link(self) -> None:
        """Pin the link as our own; an agent that was killed may not have come to that."""
        if self._ours.manifest():  # else our programs end with the agent
            with contextlib.suppress(OSError):
                self._ours.pin("link", "egress", self.link)

    def note_switched(self) -> None:
        """Note that our program counts, because the link of the other one was detached from outside."""
        self.is_done = self.is_done or self._ours.counts

    def remove(self) -> None:
        """Detach and free the other programs. Raises OSError."""
        self._before.remove()

    def close(self) -> None:
        """Close everything that was opened; the programs go on."""
        self._close()
