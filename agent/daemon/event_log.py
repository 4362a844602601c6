"""Writes events as JSON lines to standard output or a file.

Rules
1. A thread of its own writes, behind a bounded queue: a slow disk or an unread pipe delays nothing else. Events that
   cannot be written are counted.
2. The agent is root, so no other user may choose what it writes to: root or the agent's user owns every folder of the
   path. In a folder that others can write to, no symbolic link is followed, and root or the agent's user owns the file.
"""

from __future__ import annotations

import contextlib
import errno
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
from udpwatch.agent.kernel.cpu import show_name
from udpwatch.agent.model import Event, Sender, Verdict

MAX_QUEUED = 10_000
STOP_SECONDS = 2.0
MAX_LINKS = 40  # symbolic links in a path, as in the kernel

log = logging.getLogger(__name__)


def as_json(event: Event, sender: Sender, node: str, time: float) -> dict[str, Any]:
    """Return the JSON object of one event; docs/events.md promises its names. ``time``: seconds since the epoch."""
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
        "healed": finding.verdict is Verdict.HEALED,
        "count": event.count,
    }


class EventWriter:
    """Appends lines to "-" or a file; opens the file again after it was moved or deleted."""

    def __init__(self, target: str, lose: Callable[[str], None], broken: Callable[[], None]) -> None:
        """Open the target; raises UdpwatchError.

        The writer's thread calls ``lose(stage)`` for each lost event, and ``broken()`` once when the reader of standard
        output is gone.
        """
        self._path = None if target == "-" else Path(target)
        self._lose, self._broken = lose, broken
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._failing = False
        self._gone = False  # a FIFO's reader
        self._refused: str | None = None  # why the file could not be opened again, as it was logged
        try:
            self._fd = self._open()
        except OSError as error:
            raise UdpwatchError(
                f"cannot write events to {target!r}: {error.strerror}; use a file in a folder that no other user can "
                "write to, or - for standard output"
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
        """Write the queued events for at most STOP_SECONDS; do nothing if not started."""
        if not self._thread.ident:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=STOP_SECONDS)
        self._thread.join(STOP_SECONDS)

    def _open(self) -> int:
        if self._path is None:
            return sys.stdout.fileno()
        fd = open_for_append(self._path)
        os.set_blocking(fd, True)
        return fd

    def _run(self) -> None:
        show_name()
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
                    log.error("cannot write events to %s: %s; counting lost events", self._path, error.strerror)
                self._failing = True
            else:
                if self._failing:
                    log.warning("writing events to %s again", self._path)
                self._failing = False

    def _write(self, line: bytes) -> None:
        if self._path is not None and self._is_elsewhere():
            self._reopen()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            if written and stat.S_ISREG(os.fstat(self._fd).st_mode):  # the disk took half a line: remove it
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise

    def _is_elsewhere(self) -> bool:
        """Return whether the path now names another file, or none (logrotate moves the file)."""
        if self._gone:
            return True
        try:
            here, there = os.fstat(self._fd), os.stat(self._path or "")  # noqa: PTH116
        except FileNotFoundError:
            return True
        except OSError:
            return False  # no permission to look; the open file still works
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def _reopen(self) -> None:
        try:
            fresh = self._open()
        except OSError as error:
            if self._gone or os.fstat(self._fd).st_nlink == 0:
                raise
            # An event in the moved file is better than a lost one.
            if self._refused != error.strerror:
                self._refused = error.strerror
                log.warning("cannot open %s again: %s; writing to the former file", self._path, error.strerror)
            return
        os.close(self._fd)
        self._fd, self._gone, self._refused = fresh, False, None


def open_for_append(path: Path) -> int:
    """Open or create (mode 0640) a file; return a non-blocking descriptor. Follow a symbolic link only if no other user
    could have made it. Raises OSError, PermissionError if another user could choose which file is opened.
    """
    folder, at, left, links = os.open("/", os.O_PATH | os.O_CLOEXEC), Path("/"), list(path.absolute().parts[1:]), 0
    try:
        while True:
            shared = _check_folder(folder, at)
            if not left:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            name = left.pop(0)
            link = _link(folder, name)
            if link is not None and (links := links + 1) > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if link is not None and shared:
                raise PermissionError(
                    errno.EPERM, f"{at / name} is a symbolic link in a folder that others can write to"
                )
            if link is not None:
                left = [*Path(link).parts, *left]
                name = left.pop(0) if link.startswith("/") else "."
            elif not left:
                return _open_in(folder, name, shared, at)
            opened = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder, at = opened, at / name
    finally:
        os.close(folder)


def _check_folder(folder: int, at: Path) -> bool:
    """Return whether others can write to the folder. Raises PermissionError if another user owns it, or if every user
    can replace its files (no sticky bit)."""
    status = os.fstat(folder)
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"the folder {at} belongs to another user (uid {status.st_uid})")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, f"every user can write to the folder {at}")
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _link(folder: int, name: str) -> str | None:
    """Return the target of a symbolic link; None for anything else, and for this process's open files (/dev/stdout),
    whose links are not paths."""
    with contextlib.suppress(OSError):
        link = os.readlink(name, dir_fd=folder)
        if not _is_own_files(folder):
            return link
    return None


def _is_own_files(folder: int) -> bool:
    try:
        return os.path.samestat(os.fstat(folder), os.stat("/proc/self/fd"))  # noqa: PTH116  for samestat
    except OSError:
        return False


def _open_in(folder: int, name: str, shared: bool, at: Path) -> int:
    # Opening a FIFO without a reader must not block the start.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    follow = 0 if _is_own_files(folder) else os.O_NOFOLLOW
    fd = os.open(name, flags | follow, 0o640, dir_fd=folder)
    status = os.fstat(fd)
    # Ownership proves nothing: a hard link to one of our files has our owner, too.
    hard_link = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
    if shared and (hard_link or status.st_uid not in (0, os.geteuid())):
        os.close(fd)
        what = "is a hard link" if hard_link else f"belongs to another user (uid {status.st_uid})"
        raise PermissionError(errno.EPERM, f"{at / name} {what}, in a folder that others can write to")
    return fd
