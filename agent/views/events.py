"""Events as JSON lines, to standard output or a file.

Writing happens in a thread of its own behind a bounded queue: a slow disk or a pipe that nobody reads holds up
nothing else. What is not written is counted, never waited for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Event, Sender

MAX_QUEUED = 10_000
STOP_SECONDS = 2.0

log = logging.getLogger(__name__)


def as_json(event: Event, sender: Sender, node: str, time: float) -> dict[str, Any]:
    """The object of one event; the names are a promise (docs/events.md). ``time``: seconds since the epoch."""
    finding = event.finding
    return {
        "time": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "node": node,
        "expected": finding.expected,
        "actual": finding.actual,
        "peer": event.peer,
        "peer_port": event.peer_port,
        "port": finding.port,
        "family": finding.family,
        "verdict": str(finding.verdict),
        "cause": str(finding.cause),
        "conntrack": {
            "original": asdict(event.original) if event.original else None,
            "reply": asdict(event.reply) if event.reply else None,
            "request": asdict(event.request) if event.request else None,
        },
        "pid": event.pid or None,
        "process": sender.process or None,
        "uid": event.uid if event.pid else None,
        "pktinfo": event.pktinfo,
        "interface": finding.interface or None,
        "netns": event.netns_inode,
        "cgroup": sender.cgroup or None,
        "container": sender.container or None,
        "namespace": sender.namespace or None,
        "pod": sender.pod or None,
        "healed": False,
        "count": event.count,
    }


class EventWriter:
    """Appends lines to "-" or a file, which is opened again when it was moved away or deleted."""

    def __init__(self, target: str, lose: Callable[[str], None], broken: Callable[[], None]) -> None:
        """Open the target; raises UdpwatchError.

        ``lose(stage)`` is called for each event that is lost, ``broken()`` once when standard output's reader is
        gone; both from the writer's thread.
        """
        self._path = None if target == "-" else Path(target)
        self._lose, self._broken = lose, broken
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._failing = False
        self._gone = False  # a FIFO's reader
        try:
            self._fd = self._open()
        except OSError as error:
            raise UdpwatchError(
                f"cannot write events to {target!r}: {error.strerror}; give a file that can be written, or - for "
                "standard output"
            ) from None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, event: dict[str, Any]) -> None:
        """Queue one event; never blocks."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._lose("queue")

    def stop(self) -> None:
        """Write what is queued, for STOP_SECONDS at most; nothing to do if it has not begun."""
        if not self._thread.ident:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=STOP_SECONDS)
        self._thread.join(STOP_SECONDS)

    def _open(self) -> int:
        if self._path is None:
            return sys.stdout.fileno()
        # A FIFO that nobody reads must not hold up the start.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o640)
        os.set_blocking(fd, True)
        return fd

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
            except BrokenPipeError:
                self._lose("output")
                if self._path is None:
                    self._broken()
                    return
                self._gone = True
            except OSError as error:
                self._lose("output")
                if not self._failing:
                    log.error("cannot write events to %s: %s; lost events are counted", self._path, error.strerror)
                self._failing = True
            else:
                if self._failing:
                    log.warning("events can be written to %s again", self._path)
                self._failing = False

    def _write(self, line: bytes) -> None:
        if self._path is not None and self._is_elsewhere():
            self._reopen()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            if written and stat.S_ISREG(os.fstat(self._fd).st_mode):  # the disk took half a line: take it back
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise

    def _is_elsewhere(self) -> bool:
        """Whether the path leads to another file by now, or to none (logrotate moves it away)."""
        if self._gone:
            return True
        try:
            here, there = os.fstat(self._fd), os.stat(self._path or "")  # noqa: PTH116
        except FileNotFoundError:
            return True
        except OSError:
            return False  # it may not be looked at; the open one is as good as ever
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def _reopen(self) -> None:
        try:
            fresh = self._open()
        except OSError:
            if self._gone or os.fstat(self._fd).st_nlink == 0:
                raise
            return  # better in the file that was moved away than lost
        os.close(self._fd)
        self._fd, self._gone = fresh, False
