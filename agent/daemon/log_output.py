"""Where `udpwatch dns` logs: stderr, a file or syslog.

Rules
1. A thread of its own writes, behind a bounded queue: no query waits for a disk, a pipe or syslog.
2. Lines that cannot be queued or written are counted. stderr says how many and why, at most once a minute; and so does
   the log itself once it can be written again.
3. A file is opened before root is given up, and then belongs to the new user. As root it is only opened where no other
   user could choose what is opened (event_log.py); else it is opened as the new user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator
from logging.handlers import SysLogHandler
from pathlib import Path
from typing import Protocol

from udpwatch.agent.daemon.event_log import open_for_append
from udpwatch.agent.kernel.cpu import show_name

MAX_QUEUED = 10_000  # lines
MAX_LINE = 2048  # characters; not of a traceback
LINES_AT_ONCE = 256
GATHER_SECONDS = 0.01  # for more lines to be written at once
REPORT_SECONDS = 60.0
STOP_SECONDS = 2.0
SYSLOG_SECONDS = 1.0  # for a syslog daemon to take a line
STDERR = 2
DEV_LOG = "/dev/log"
_LENIENT = {"errors": "backslashreplace"}
_SEVERITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

#: time (seconds since the epoch), level, text
_Line = tuple[float, int, str]


class _Lost(Exception):
    """Lines that could not be written: how many, and why."""

    def __init__(self, lines: int, reason: str) -> None:
        super().__init__(reason)
        self.lines = lines


class _Sink(Protocol):
    def write(self, lines: list[_Line]) -> None:
        """Write lines. Raises _Lost."""

    def reopen(self) -> str:
        """Open the file again. Return the problem, or ""."""

    def close(self) -> None:
        """Write no more."""


class LogOutput(logging.Handler):
    """A handler for the root logger. Use `installed`, `open` before root is given up, and then `start`."""

    def __init__(self, target: str) -> None:
        """``target``: "-" for stderr, the path of a file (with a slash), or the name of a syslog facility."""
        super().__init__()
        self._target = target
        self._queue: deque[_Line] = deque()
        self._wake = threading.Event()
        self._sink: _Sink = _Stderr()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._stopping = self._reopening = False
        self.lost = [0]  # lines; a cell for the metrics
        self._in_log = self._on_stderr = 0  # of the lost lines, those that were reported there
        self._report_at = 0.0
        self._reason = ""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the lines of all loggers; write the last ones at the end."""
        root = logging.getLogger()
        former, root.handlers = root.handlers, [self]
        try:
            yield
        finally:
            root.handlers = former
            self._finish()

    def open(self, uid: int | None) -> None:
        """Open the target before root is given up. ``uid``: who will own the file; None: who owns it now. Raises
        OSError."""
        if "/" in self._target:
            self._sink = _File(Path(self._target), uid)
        elif self._target != "-":
            self._sink = _Syslog(self._target)

    def start(self) -> None:
        """Write, with the present user and capabilities. Raises OSError if the file can only be opened now, and not."""
        if isinstance(self._sink, _File):
            self._sink.open()
        self._thread.start()

    def reopen(self) -> None:
        """Open a file again, after it was moved (SIGUSR2)."""
        self._reopening = True
        self._wake.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; never block. `handle` holds the lock."""
        if len(self._queue) >= MAX_QUEUED:
            self.lost[0] += 1
            self._reason = "too many lines"
            return
        text = self.format(record)
        if not record.exc_info:
            text = text[:MAX_LINE]
        self._queue.append((record.created, record.levelno, text))
        if not self._wake.is_set():
            self._wake.set()

    # ---- the thread ----

    def _run(self) -> None:
        show_name()
        stopping = False
        while not stopping:
            self._wake.wait(REPORT_SECONDS)
            self._wake.clear()
            stopping = self._stopping
            if not stopping:
                time.sleep(GATHER_SECONDS)
            if self._reopening:
                self._reopening = False
                if problem := self._sink.reopen():
                    _to_stderr(f"cannot open log {self._target} again: {problem}; still writing to the former file")
            self._drain()
            self._report()

    def _drain(self) -> None:
        while self._queue:
            lines = [self._queue.popleft() for _ in range(min(LINES_AT_ONCE, len(self._queue)))]
            try:
                self._sink.write(lines)
                if missing := self.lost[0] - self._in_log:
                    self._sink.write([(time.time(), logging.WARNING, f"dns: {missing} log lines lost: {self._reason}")])
                    self._in_log += missing
            except _Lost as lost:
                self._lose(lost.lines, str(lost))
            except OSError as error:  # of fstat, on a network file system
                self._lose(len(lines), error.strerror or str(error))

    def _lose(self, lines: int, reason: str) -> None:
        self.acquire()
        self.lost[0] += lines
        self._reason = reason
        self.release()

    def _report(self) -> None:
        """Report lost lines to stderr, where the log itself cannot."""
        now, lost = time.monotonic(), self.lost[0]
        if lost > max(self._in_log, self._on_stderr) and now >= self._report_at and self._target != "-":
            self._report_at, self._on_stderr = now + REPORT_SECONDS, lost
            _to_stderr(f"cannot write log to {self._target}: {self._reason}; {lost} lines lost so far")

    def _finish(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.ident:
            self._thread.join(STOP_SECONDS)
            if not self._thread.is_alive():
                self._sink.close()
        else:  # it could not start: these lines say why
            self._sink = _Stderr()
            self._drain()


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(STDERR, f"udpwatch: {text}\n".encode(**_LENIENT))


def _write(fd: int, lines: list[str]) -> None:
    """Write lines to a file. Raises _Lost."""
    data, written = memoryview("".join(f"{line}\n" for line in lines).encode(**_LENIENT)), 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError as error:
        raise _Lost(bytes(data[written:]).count(b"\n"), error.strerror or str(error)) from None


class _Stderr:
    def write(self, lines: list[_Line]) -> None:
        _write(STDERR, [f"udpwatch: {text}" for _, _, text in lines])

    def reopen(self) -> str:
        return ""

    def close(self) -> None:
        pass


class _File:
    """A file with dnsmasq's lines: `Nov 27 07:45:50 NAME[PID]: TEXT`."""

    def __init__(self, path: Path, uid: int | None) -> None:
        self._path, self._fd = path, -1
        try:
            self._fd = self._open()
        except PermissionError:
            if uid is None:
                raise
            return  # it is opened as the new user
        status = os.fstat(self._fd)
        if uid is not None and stat.S_ISREG(status.st_mode) and status.st_uid == 0 and status.st_nlink == 1:
            os.fchown(self._fd, uid, -1)

    def open(self) -> None:
        """Open it unless that is done. Raises OSError."""
        if self._fd < 0:
            self._fd = self._open()

    def _open(self) -> int:
        try:
            fd = open_for_append(self._path)
        except PermissionError:
            if os.geteuid() == 0:
                raise
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(self._path, flags, 0o640)  # it can do no more than its user
        os.set_blocking(fd, True)
        return fd

    def write(self, lines: list[_Line]) -> None:
        if os.fstat(self._fd).st_nlink == 0 and (problem := self.reopen()):
            raise _Lost(len(lines), f"the file was removed and cannot be created again: {problem}")
        _write(self._fd, [_stamped(line) for line in lines])

    def reopen(self) -> str:
        try:
            fresh = self._open()
        except OSError as error:
            return error.strerror or str(error)
        with contextlib.suppress(OSError):  # of writes that a network file system had postponed
            os.close(self._fd)
        self._fd = fresh
        return ""

    def close(self) -> None:
        os.close(self._fd)


class _Syslog:
    """The local syslog daemon. It may be started later, and again."""

    def __init__(self, facility: str) -> None:
        self._facility = SysLogHandler.facility_names[facility]
        self._link: socket.socket | None = None

    def write(self, lines: list[_Line]) -> None:
        for number, line in enumerate(lines):
            try:
                self._send(f"<{self._facility << 3 | _severity(line[1])}>{_stamped(line)}".encode(**_LENIENT))
            except OSError as error:
                raise _Lost(len(lines) - number, f"{DEV_LOG}: {error.strerror or error}") from None

    def _send(self, data: bytes) -> None:
        if self._link:
            try:
                self._link.send(data)
            except OSError:  # the daemon was restarted: try a new socket
                self._link.close()
                self._link = None
            else:
                return
        link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        link.settimeout(SYSLOG_SECONDS)
        try:
            link.connect(DEV_LOG)
            link.send(data)
        except BaseException:
            link.close()
            raise
        self._link = link

    def reopen(self) -> str:
        return ""

    def close(self) -> None:
        if self._link:
            self._link.close()


def _severity(level: int) -> int:
    """Return syslog's severity of a level of logging."""
    return next((severity for least, severity in _SEVERITIES if level >= least), 7)


def _stamped(line: _Line) -> str:
    """Return a line as syslog(3) and dnsmasq write it."""
    now = time.strftime("%b %e %H:%M:%S", time.localtime(line[0]))
    return f"{now} udpwatch[{os.getpid()}]: {line[2]}"
