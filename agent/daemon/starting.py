"""Signals to stop that arrive while the agent starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Stopped(BaseException):
    """A signal to stop while the agent is still starting."""


class Starting:
    """Handles signals until the event loop does. A signal interrupts only what `interruptible` marks: raised elsewhere,
    an exception could leave a socket behind just before its clean-up is registered, or get lost in a destructor."""

    def __init__(self) -> None:
        self.to_be_stopped = self._may_raise = False

    def note(self, _number: int, _frame: object) -> None:
        """Handle a signal."""
        self.to_be_stopped = True
        if self._may_raise:
            raise Stopped

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark what may take long and leaves nothing behind. Raises Stopped if a signal has arrived or arrives."""
        try:
            self._may_raise = True
            if self.to_be_stopped:
                raise Stopped
            yield
        finally:
            self._may_raise = False
        if self.to_be_stopped:
            raise Stopped
