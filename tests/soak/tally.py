"""Numbers in memory that processes share, and a gate that holds all traffic."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

from waiting import wait_for

_PAUSE = "pause"  # odd: traffic pauses
_POLL_SECONDS = 0.01


class Tally:
    """Numbers by name, shared with processes that are forked later. Each has one writer, so none needs a lock.

    ``guests`` are processes that call `pass_gate`. Their traffic begins with `resume`.
    """

    def __init__(self, names: Sequence[str], guests: Sequence[str]) -> None:
        self._guests = guests
        every = [*names, _PAUSE, *(_idle(name) for name in guests)]
        self._at = {name: index for index, name in enumerate(every)}
        self._values = memoryview(mmap.mmap(-1, 8 * len(every))).cast("Q")
        self[_PAUSE] = 1

    def __getitem__(self, name: str) -> int:
        return self._values[self._at[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self._values[self._at[name]] = value

    def add(self, name: str) -> None:
        """Add one."""
        self._values[self._at[name]] += 1

    def pause(self) -> None:
        """Stop all traffic; return when each guest waits at the gate."""
        self[_PAUSE] += 1
        number = self[_PAUSE]
        assert number % 2
        wait_for(lambda: all(self[_idle(name)] == number for name in self._guests), "traffic to pause")

    def resume(self) -> None:
        """Let traffic continue."""
        self[_PAUSE] += 1

    def pass_gate(self, guest: str) -> None:
        """Wait here during a pause. Call it while no request of this guest is pending."""
        while (number := self[_PAUSE]) % 2:
            self[_idle(guest)] = number
            time.sleep(_POLL_SECONDS)


def _idle(guest: str) -> str:
    return f"{guest} idle at"
