"""Notifications to systemd: sd_notify(3), datagrams to the socket that $NOTIFY_SOCKET names."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state, e.g. "READY=1", if a service manager wants it. Never blocks: the state is lost if the manager does
    not read.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path[0] == "@" else path  # "@": an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(state.encode(), address)


def watchdog_seconds() -> float | None:
    """Seconds without "WATCHDOG=1" after which systemd restarts this process; None: systemd does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    with contextlib.suppress(ValueError):
        seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        return seconds if seconds > 0 else None
    return None
