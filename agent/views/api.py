"""The agent's Unix socket: newline-delimited JSON, one question a line, one answer a line.

Question {"get": "snapshot"}, answer {"v": 1, "snapshot": {...}}; anything else is answered {"v": 1, "error": "..."}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Snapshot

VERSION = 1
MODE = 0o660
MAX_CLIENTS = 32
MAX_LINE = 64 * 1024
IDLE_SECONDS = 60.0


def bind(path: Path) -> socket.socket:
    """A listening socket at ``path``, mode 0660. A stale one is replaced, a live one is refused.

    Raises UdpwatchError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_live(path):
            raise UdpwatchError(f"another agent answers on {path}: stop it, or choose another --socket PATH")
        # Bound beside and moved into place: nobody ever sees it with a wider mode.
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        listener.bind(str(beside))
        beside.chmod(MODE)
        beside.rename(path)
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        raise UdpwatchError(
            f"cannot make the socket {path}: {error.strerror or error}; choose another with --socket PATH, or "
            "--socket off"
        ) from None
    except UdpwatchError:
        listener.close()
        raise
    return listener


def _is_live(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UdpwatchError(f"{path} exists and is no socket: choose another --socket PATH")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


class Api:
    """Answers questions on a socket made by `bind`."""

    def __init__(self, listener: socket.socket, path: Path, snapshot: Callable[[], Snapshot]) -> None:
        self._listener, self._path, self._snapshot = listener, path, snapshot
        self._inode = path.lstat().st_ino
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to answer."""
        self._server = await asyncio.start_unix_server(self._client, sock=self._listener, limit=MAX_LINE)

    async def stop(self) -> None:
        """Stop, and take the socket away if it is still ours."""
        if self._server:
            self._server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= MAX_CLIENTS:
            writer.close()
            return
        self._clients.add(task)
        try:
            # A client that asks and never reads stops at its full buffer and is dropped with the time.
            with contextlib.suppress(TimeoutError, ConnectionError, ValueError, asyncio.CancelledError):
                while line := await asyncio.wait_for(reader.readline(), IDLE_SECONDS):
                    writer.write(json.dumps({"v": VERSION, **self._answer(line)}).encode() + b"\n")
                    await asyncio.wait_for(writer.drain(), IDLE_SECONDS)
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            question = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "not JSON"}
        if question == {"get": "snapshot"}:
            return {"snapshot": asdict(self._snapshot())}
        return {"error": 'ask {"get": "snapshot"}'}


def ask_snapshot(path: Path, seconds: float = 5.0) -> dict[str, Any]:
    """Ask a running agent for its snapshot; raises OSError when there is none, UdpwatchError when it objects."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(seconds)
        client.connect(str(path))
        client.sendall(b'{"get": "snapshot"}\n')
        with client.makefile("rb") as lines:
            answer = json.loads(lines.readline() or b"{}")
    if "snapshot" not in answer:
        raise UdpwatchError(f"{path}: {answer.get('error', 'no answer')}")
    snapshot: dict[str, Any] = answer["snapshot"]
    return snapshot
