"""Run a `udpwatch` command as a child process: read its log, wait until it is ready, stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.testing.lab import die_with_parent

#: -P: nothing is imported from the working directory.
COMMAND = (sys.executable, "-P", "-m", "udpwatch.agent.cli")
READY_SECONDS = 240.0  # under emulation, starting takes a minute
STOP_SECONDS = 30.0
_PREFIX = "udpwatch: "


class Child:
    """A command that runs from the constructor to `stop`. It is killed when this process ends."""

    def __init__(
        self,
        *arguments: str,
        name: str = "",
        wrapper: Sequence[str] = (),
        keep_lines: int | None = None,
        **options: Any,
    ) -> None:
        """Start `udpwatch ARGUMENTS`.

        Errors begin with ``name``. ``wrapper`` is a command that runs this one. The newest ``keep_lines`` lines of the
        log are kept; None keeps all. ``options`` are those of subprocess.Popen.
        """
        self._name, self._keep_lines = name, keep_lines
        self.log: list[str] = []
        self._ready = threading.Event()
        parent = os.getpid()

        def begin() -> None:
            die_with_parent()
            if os.getppid() != parent:  # the parent ended before die_with_parent() took effect
                os._exit(1)

        for option, value in (("stdin", subprocess.DEVNULL), ("stdout", subprocess.DEVNULL), ("preexec_fn", begin)):
            options.setdefault(option, value)
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*wrapper, *COMMAND, *arguments], stderr=subprocess.PIPE, text=True, errors="replace", **options
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {self.process.pid}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if self._keep_lines is not None:
                del self.log[: -self._keep_lines]
            if self.log[-1] == f"{_PREFIX}ready":
                self._ready.set()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def is_ready(self) -> bool:
        """Whether the command has logged that it is ready."""
        return self._ready.is_set()

    @property
    def last_message(self) -> str:
        """The last line of the log, without the program's name; "" while there is none."""
        return self.log[-1].strip().removeprefix(_PREFIX) if self.log else ""

    def wait_until_ready(self, condition: Callable[[], bool] | None = None, seconds: float = READY_SECONDS) -> None:
        """Wait for the condition; by default, that the command has logged that it is ready.

        Raises CannotRun or UdpwatchError with the last message if the command ends first or the time is up.
        """
        end = time.monotonic() + seconds
        while not (condition() if condition else self.is_ready):
            status = self.process.poll()
            if status is not None:
                self._reader.join(STOP_SECONDS)
                reason = self.last_message or f"exit status {status}"
            elif time.monotonic() > end:
                reason = f"not ready after {seconds:.0f} s: {self.last_message or 'nothing was logged'}"
            else:
                time.sleep(0.02)
                continue
            text = f"{self._name}: {reason}" if self._name else reason
            raise CannotRun(text) if status == CannotRun.exit_status else UdpwatchError(text)

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Send the signal, wait, kill a command that does not end in time, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(5)  # a process that the command left behind may keep the pipe open
        if self.process.stderr and not self._reader.is_alive():
            self.process.stderr.close()
        return status
