"""Follows changes of this host's addresses and interfaces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from udpwatch.dns import addresses
from udpwatch.dns.addresses import Local
from udpwatch.dns.limited_log import LIMITED

RETRY_SECONDS = 1.0  # for addresses that could not be bound yet
SETTLE_SECONDS = 0.05  # for a burst of changes to end

log = logging.getLogger(__name__)


class AddressMonitor:
    """Calls ``changed`` with all addresses after a change; ``changed`` returns False to be called again soon."""

    def __init__(self, changed: Callable[[list[Local]], bool]) -> None:
        self._changed = changed
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Record changes from now on. Raises OSError."""
        self._socket = addresses.changes()

    def start(self) -> None:
        """Report changes from now on, and those since `open`."""
        assert self._socket
        asyncio.get_running_loop().add_reader(self._socket, self._on_change)
        self._schedule(SETTLE_SECONDS)

    def stop(self) -> None:
        """Stop; also if it was never started."""
        if self._timer:
            self._timer.cancel()
        if self._socket:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _on_change(self) -> None:
        assert self._socket
        addresses.drain(self._socket)
        self._schedule(SETTLE_SECONDS)

    def _schedule(self, seconds: float) -> None:
        if not self._timer:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._report)

    def _report(self) -> None:
        self._timer = None
        try:
            snapshot = addresses.snapshot()
        except OSError as error:
            LIMITED.write(log, logging.WARNING, "dns: cannot read this host's addresses: %s", error.strerror)
            self._schedule(RETRY_SECONDS)
            return
        try:
            complete = self._changed(snapshot)
        except Exception as error:
            LIMITED.write(log, logging.ERROR, "dns: cannot follow a change of addresses: %s", error, error=error)
            return
        if not complete:  # an address that exists but could not be bound yet: the kernel reports nothing more of it
            self._schedule(RETRY_SECONDS)
