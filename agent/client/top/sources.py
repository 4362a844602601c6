"""The sources of `udpwatch top`: a running agent, a private agent, or Prometheus (prometheus.py).

`read` raises OSError for a temporary error, after which the caller retries, and UdpwatchError for a permanent one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.top.rows import Key, View
from udpwatch.agent.client.top.traffic import ServerKey
from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.testing.child import Child

STOP_SECONDS = 10.0
MAX_LOG_LINES = 20  # the last ones of a private agent

#: The settings that a private agent takes from the environment. It serves no DNS, heals nothing and writes no events.
_INHERITED = (
    *("CGROUP", "BTF", "HOOKS", "FORWARDED", "WINDOW", "NODE"),
    *("MAX_PEERS", "MAX_SERIES", "MAX_SERVERS", "EVENTS_PER_SECOND"),
)
MAX_ROWS = 10_000  # of a private agent; the limit may be high because Prometheus does not store these rows
MAX_SERVERS = 2_000  # likewise


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a source of a whole cluster reads; a source of one node reads everything."""

    servers: bool = False  # the servers, too
    folded: bool = True  # sum each process and port over all nodes
    only: Key | ServerKey | None = None  # single rows of this folded row


class ViewSource(Protocol):
    """Provides the views that `udpwatch top` displays."""

    @property
    def name(self) -> str:
        """The name shown to the user."""

    def read(self) -> View:
        """Return the current view; its rates are None unless the source computes rates itself."""

    def select(self, wanted: Wanted) -> None:
        """Choose what `read` reads, in the thread that reads."""

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest events, the newest at the end; empty if the source has no events."""

    def close(self) -> None:
        """Close the source; any thread may call this."""


class AgentSource:
    """A running agent, read over its socket. It reconnects after an error."""

    def __init__(self, path: Path, name: str = "") -> None:
        self._path = path
        self._client: Client | None = None
        self.name = name or str(path)

    def read(self) -> View:
        """Read the agent's snapshot. Raises OSError."""
        snapshot = self._query(Client.snapshot)
        return View(snapshot.time, (snapshot,))

    def select(self, wanted: Wanted) -> None:
        """Do nothing: a snapshot contains everything."""

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest events that the agent keeps. Raises OSError."""
        events: list[dict[str, Any]] = self._query(lambda client: client.events(limit))
        return events

    def close(self) -> None:
        client, self._client = self._client, None
        if client:
            with contextlib.suppress(OSError, RuntimeError):  # another thread may be reading from it
                client.close()

    def _query(self, request: Callable[[Client], Any]) -> Any:
        try:
            if self._client is None:
                self._client = Client(self._path)
            return request(self._client)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise ConnectionError(f"{self._path} is not the socket of an agent of this version") from error
        except OSError:
            self.close()
            raise
        except UdpwatchError as error:
            # An agent of another version may be replaced while this runs, so the error is temporary.
            self.close()
            raise ConnectionError(str(error)) from None


class PrivateAgent:
    """A `udpwatch run` as a child process, read over its socket. It ends with this process."""

    def __init__(self, flags: Sequence[str], name: str) -> None:
        """Start the agent and wait until it responds. Raises UdpwatchError with its last log line if it does not."""
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="udpwatch-top-")
        path = Path(self._folder.name, "udpwatch.sock")
        self._child = Child(
            "run",
            f"--socket={path}",
            "--metrics-listen=off",
            *flags,
            name=name,
            keep_lines=MAX_LOG_LINES,
            env=_environment(),
            start_new_session=True,  # signals from the terminal's keys must not reach the agent
        )
        self._agent = AgentSource(path, name)
        try:
            self._child.wait_until_ready(self._responds)
        except BaseException:
            self.close()
            raise
        # The connection stays open without the path. Removed now, it cannot be left behind even after SIGKILL.
        self._folder.cleanup()

    def read(self) -> View:
        """Read the agent's snapshot. Raises UdpwatchError if the agent has exited."""
        try:
            return self._agent.read()
        except OSError as error:
            # The agent closes the connection shortly before it exits.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.process.wait(STOP_SECONDS)
            raise UdpwatchError(f"{self.name} has ended: {self._child.last_message or error}") from None

    def select(self, wanted: Wanted) -> None:
        """Do nothing: a snapshot contains everything."""

    def events(self, limit: int) -> list[dict[str, Any]]:
        return self._agent.events(limit)

    def close(self) -> None:
        """Stop the agent with SIGTERM, after STOP_SECONDS with SIGKILL, and remove its directory."""
        self._agent.close()
        self._child.stop(seconds=STOP_SECONDS)
        self._folder.cleanup()

    def _responds(self) -> bool:
        with contextlib.suppress(OSError):
            self._agent.read()
            return True
        return False


def _environment() -> dict[str, str]:
    """Return the environment without the settings that a private agent must not inherit."""
    inherited = {f"UDPWATCH_{name}" for name in _INHERITED}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UDPWATCH_") or name in inherited}
    return {"UDPWATCH_MAX_SERIES": str(MAX_ROWS), "UDPWATCH_MAX_SERVERS": str(MAX_SERVERS), **kept}


def open_agent(connect: str | None) -> ViewSource:
    """Connect to the running agent; if none runs and the user is root, start a private one. Raises UdpwatchError."""
    path = Path(connect) if connect else DEFAULT_SOCKET
    source = AgentSource(path)
    try:
        source.read()
    except PermissionError:
        raise CannotRun(
            f"cannot connect to {path}: permission denied; run this as root, or as a member of the socket's group"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if connect or not isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise UdpwatchError(f"cannot connect to {path}: {reason}; start an agent with `udpwatch run`") from None
        if os.geteuid() != 0:
            raise CannotRun(
                f"cannot connect to {path}: {reason}; start `udpwatch run` as root, or run this as root to start a "
                "private agent, or use --prometheus URL or --replay FILE"
            ) from None
        return PrivateAgent((), "private agent")
    return source


def open_replay(file: str) -> ViewSource:
    """Play a recording in a private agent. Raises UdpwatchError."""
    return PrivateAgent((f"--replay={file}",), f"replay of {Path(file).name}")
