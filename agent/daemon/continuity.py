"""Go on where the last agent stopped: its pinned programs, and what it knew (--state)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from udpwatch.agent import __version__
from udpwatch.agent.daemon.state import State
from udpwatch.agent.kernel.ledger import Ledger
from udpwatch.agent.kernel.pins import Pins

STORE_SHARE = 0.05  # of a CPU; what takes longer to store is stored less often
MAX_PAUSE_SECONDS = 10.0
FORMAT = 1
TRIES = 5  # to go on with a record; an agent must not crash for ever because of one

log = logging.getLogger(__name__)


class Storing(Protocol):
    """A source of findings that the next process can go on to read."""

    def to_store(self) -> dict[str, Any]:
        """Return what the next process needs."""

    def note_stored(self) -> None:
        """Note that what `to_store` returned last is stored."""


class Continuity:
    """The state folder of this agent."""

    def __init__(self, folder: Path, pace: Callable[[], None]) -> None:
        """Open the folder and lock it. ``pace``: as `Ledger.write` takes it. Raises what `Pins` raises."""
        self.pins, self._pace = Pins(folder), pace
        try:
            self._ledger = Ledger(self.pins)
        except BaseException:
            self.pins.close()
            raise
        self._record = self._read()
        self.is_resumed = False  # whether the programs of the last agent were taken over
        self._source: Storing | None = None
        self._not_before = 0.0  # monotonic seconds
        self._is_logged = False

    def _read(self) -> dict[str, Any]:
        """Return what the last agent stored, if this one can go on with it."""
        record, reason = self._ledger.read(), ""
        if record is None:
            reason = "" if self._ledger.is_empty else "what it stored cannot be read"
        elif record.get("format") != FORMAT:
            reason = "another version stored them"
        elif self._ledger.tries >= TRIES:
            reason = f"{self._ledger.tries} agents ended with them before their first sample"
        if reason:
            log.warning("cannot go on with the last agent's counts, they begin at 0: %s", reason)
        return record if record and not reason else {}

    def close(self) -> None:
        """Leave the folder to the next agent."""
        self._ledger.close()
        self.pins.close()

    def remove(self) -> None:
        """Detach and remove everything, so that the next agent begins anew (--state-keep crash)."""
        try:
            removed = self.pins.remove()
        except OSError as error:
            log.warning("cannot remove the state folder: %s; run `udpwatch detach`", error)
        else:
            log.info("detached: %d programs, maps and links were removed", removed)

    @property
    def sensor(self) -> Mapping[str, Any]:
        """What the last agent's source stored, by generation."""
        found = self._record.get("sensor")
        return found if isinstance(found, dict) else {}

    def follow(self, source: Storing) -> None:
        """Store also what this source knows."""
        self._source = source

    def begin_anew(self, digest: str) -> None:
        """Note that the programs of a generation count from 0, whatever is stored of one of the same name."""
        state = self._record.get("state")
        for part in (state, state.get("servers") if isinstance(state, dict) else None):
            if isinstance(part, dict) and part.get("generation") == digest:
                part["generation"] = ""

    def restore(self, state: State) -> None:
        """Let a state go on with what the last agent stored."""
        record, self._record = self._record, {}
        if "state" not in record:
            return
        self._ledger.note_try()
        try:
            state.restore(record["state"])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            log.warning(
                "cannot go on with the last agent's counts, they begin at 0: %s: %s", type(error).__name__, error
            )
            return
        log.info("goes on with the counts of udpwatch %s", record.get("version", "of an unknown version"))

    def store(self, state: State, at_once: bool = False) -> bool:
        """Store everything, unless that was done a short while ago. Return False in that case: what was not stored must
        not be published.
        """
        if time.monotonic() < self._not_before and not at_once:
            return False
        begin = time.thread_time()
        sensor = self._source.to_store() if self._source else {}
        try:
            self._write(state.to_store(), sensor)
        except ValueError as error:
            # The next agent takes for rows what the kernel's table holds then, and for servers what its array does.
            self._write(state.to_store(rows=False), {"counting": sensor.get("counting")})
            if not self._is_logged:
                self._is_logged = True
                log.warning("cannot store rows and servers for the next agent: %s; lower --max-series", error)
        if self._source:
            self._source.note_stored()
        took = time.thread_time() - begin  # without pauses
        self._not_before = time.monotonic() + min(took / STORE_SHARE, MAX_PAUSE_SECONDS)
        return True

    def _write(self, state: dict[str, Any], sensor: dict[str, Any]) -> None:
        record = {"format": FORMAT, "version": __version__, "state": state, "sensor": sensor}
        self._ledger.write(record, self._pace)
