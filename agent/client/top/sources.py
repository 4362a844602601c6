"""Where `udpwatch top` gets its looks from: the running agent, an agent of its own, or Prometheus (prometheus.py).

A source's `read` raises OSError where nobody answers (it may answer again: the caller retries) and UdpwatchError where
trying again is no use.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from udpwatch.agent.client.connection import DEFAULT_SOCKET, Client
from udpwatch.agent.client.top.rows import Look
from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.testing.child import Child

STOP_SECONDS = 10.0
MAX_WORDS = 20  # of an agent's last ones

#: What a private agent takes from the environment. It serves no DNS, heals nothing and writes no events.
_INHERITED = ("CGROUP", "BTF", "HOOKS", "FORWARDED", "WINDOW", "NODE", "MAX_PEERS", "MAX_SERIES", "EVENTS_PER_SECOND")
MAX_ROWS = 10_000  # a private agent's; no Prometheus has to store them


class Source(Protocol):
    """Gives looks."""

    @property
    def name(self) -> str:
        """What the user reads it as."""

    def read(self) -> Look:
        """A look, without rates unless the source knows them better."""

    def events(self, limit: int) -> list[dict[str, Any]]:
        """The newest events, the newest last; none where the source has none."""

    def close(self) -> None:
        """Let go of it; from any thread."""


class AgentSource:
    """A running agent, by its socket. Connects again when it went away."""

    def __init__(self, path: Path, name: str = "") -> None:
        self._path = path
        self._client: Client | None = None
        self.name = name or str(path)

    def read(self) -> Look:
        """Raises OSError where nobody answers."""
        snapshot = self._ask(Client.snapshot)
        return Look(snapshot.time, (snapshot,))

    def events(self, limit: int) -> list[dict[str, Any]]:
        """What the agent still has."""
        events: list[dict[str, Any]] = self._ask(lambda client: client.events(limit))
        return events

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client:
            with contextlib.suppress(OSError, RuntimeError):  # another thread may be reading from it
                client.close()

    def _ask(self, question: Callable[[Client], Any]) -> Any:
        try:
            if self._client is None:
                self._client = Client(self._path)
            return question(self._client)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise ConnectionError(f"{self._path}: what answers there is no udpwatch agent of this version") from error
        except (OSError, UdpwatchError) as error:
            self.close()
            if isinstance(error, UdpwatchError):  # another version: it may be replaced while we look
                raise ConnectionError(str(error)) from None
            raise


class PrivateAgent:
    """`udpwatch run` as a child of our own, asked over the same socket as any other. It ends with us."""

    def __init__(self, flags: Sequence[str], name: str) -> None:
        """Start it and wait until it answers; raises UdpwatchError with its last words where it does not."""
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="udpwatch-top-")
        path = Path(self._folder.name, "udpwatch.sock")
        self._child = Child(
            "run",
            f"--socket={path}",
            "--metrics-listen=off",
            *flags,
            name=name,
            keep_lines=MAX_WORDS,
            env=_environment(),
            start_new_session=True,  # the terminal's keys are ours
        )
        self._agent = AgentSource(path, name)
        try:
            self._child.wait_until_ready(self._answers)
        except BaseException:
            self.close()
            raise
        # We are connected: nobody else needs the path, and what is gone cannot be left behind, even by SIGKILL.
        self._folder.cleanup()

    def read(self) -> Look:
        """Raises UdpwatchError once the child has ended."""
        try:
            return self._agent.read()
        except OSError as error:
            # The connection ends a moment before the process.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.process.wait(STOP_SECONDS)
            raise UdpwatchError(f"{self.name} has ended: {self._child.last_message or error}") from None

    def events(self, limit: int) -> list[dict[str, Any]]:
        """What it still has."""
        return self._agent.events(limit)

    def close(self) -> None:
        """End it, gently first, and clean up."""
        self._agent.close()
        self._child.stop(seconds=STOP_SECONDS)
        self._folder.cleanup()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self._agent.read()
            return True
        return False


def _environment() -> dict[str, str]:
    inherited = {f"UDPWATCH_{name}" for name in _INHERITED}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UDPWATCH_") or name in inherited}
    return {"UDPWATCH_MAX_SERIES": str(MAX_ROWS), **kept}


def open_agent(connect: str | None) -> Source:
    """The agent that runs here; where none does and we are root, one of our own. Raises UdpwatchError."""
    path = Path(connect) if connect else DEFAULT_SOCKET
    source = AgentSource(path)
    try:
        source.read()
    except PermissionError:
        raise CannotRun(f"{path} may not be opened: run this as root, or as a member of the socket's group") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if connect or not isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise UdpwatchError(f"no agent answers on {path} ({reason}): start `udpwatch run`") from None
        if os.geteuid() != 0:
            raise CannotRun(
                f"no agent answers on {path} ({reason}): start `udpwatch run` as root, or run this as root, which "
                "starts an agent for as long as it runs; --prometheus URL and --replay FILE need neither"
            ) from None
        return PrivateAgent((), "an agent of its own")
    return source


def open_replay(file: str) -> Source:
    """A recording, played by an agent of our own. Raises UdpwatchError."""
    return PrivateAgent((f"--replay={file}",), f"replay of {Path(file).name}")
