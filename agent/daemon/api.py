"""The agent's Unix socket: newline-delimited JSON, one request a line, one response a line (docs/events.md).

    {"get": "snapshot"}              {"v": 1, "snapshot": {...}}
    {"get": "doctor"}                {"v": 1, "doctor": {...}}
    {"get": "events", "limit": 10}   {"v": 1, "events": [...]}: the newest ones, the newest at the end
    {"get": "heal"}                  {"v": 1, "heal": {...}}
    {"heal": "on", "ports": [53]}    the same, after healing was switched on or off (root only; no ports: all)
    {"follow": "events"}             {"v": 1, "following": "events"}, then {"v": 1, "event": {...}} for each, and
                                     {"v": 1, "lost": 3} if this reader was too slow for 3 of them

The response to anything else is {"v": 1, "error": "..."}. A slow reader loses its own events and delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing, Snapshot

VERSION = 1
MODE = 0o660
MAX_CLIENTS = 32
MAX_LINE = 64 * 1024
IDLE_SECONDS = 60.0
STOP_SECONDS = 0.5  # for followers to read the last events
KEPT_EVENTS = 1_000
MAX_WAITING_EVENTS = 1_000  # per follower
MAX_POSTED_EVENTS = 1_000  # from the sensor's thread to the event loop
EVENTS_PER_TURN = 100  # the event loop also serves DNS


def bind(path: Path, group: str | None = None) -> socket.socket:
    """Listen at ``path``, mode 0660, for ``group`` (a name or number). Replace a stale socket. Raises UdpwatchError,
    also if another agent listens there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_live(path):
            raise UdpwatchError(
                f"cannot listen on {path}: another agent does; stop it, or choose another --socket PATH"
            )
        # Bind under a temporary name, then rename: the socket never has a wider mode.
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        listener.bind(str(beside))
        beside.chmod(MODE)
        if group is not None:
            os.chown(beside, -1, _group_id(group))
        beside.rename(path)
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        raise UdpwatchError(
            f"cannot create the socket {path}: {error.strerror or error}; choose another --socket PATH, or --socket off"
        ) from None
    except UdpwatchError:
        listener.close()
        raise
    return listener


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UdpwatchError(f"--socket-group: unknown group {group!r}; give another group, or its number") from None


def _is_live(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UdpwatchError(f"cannot listen on {path}: the file is not a socket; choose another --socket PATH")
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


_UNKNOWN_REQUEST = {
    "error": 'ask {"get": "snapshot"}, "doctor", "heal", {"get": "events", "limit": 10}, {"heal": "off", "ports": []} '
    'or {"follow": "events"}'
}
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_Result = TypeVar("_Result")


class _Follower:
    """The events that wait for one reader."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.lost = 0
        self.word = asyncio.Event()

    def put(self, line: bytes) -> None:
        if len(self.waiting) >= MAX_WAITING_EVENTS:
            self.lost += 1
        else:
            self.waiting.append(line)
        self.word.set()

    def take(self) -> bytes:
        lines = b"".join(self.waiting)
        self.waiting.clear()
        if self.lost:
            lines += _line({"lost": self.lost})
            self.lost = 0
        self.word.clear()
        return lines


class Api:
    """Serves requests on a socket from `bind`."""

    def __init__(
        self,
        listener: socket.socket,
        path: Path,
        snapshot: Callable[[], Snapshot],
        doctor: Callable[[], dict[str, Any]],
        heal: Callable[[bool | None, list[int]], Healing],
    ) -> None:
        """``heal`` switches healing on or off (None: neither) for ports, or for all; it raises UdpwatchError."""
        self._listener, self._path, self._snapshot, self._doctor = listener, path, snapshot, doctor
        self._heal = heal
        self._inode = path.lstat().st_ino
        self._clients: set[asyncio.Task[None]] = set()
        self._followers: set[_Follower] = set()
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[dict[str, Any]] = deque()
        self._is_due = False  # whether the event loop has been told to take them

    async def start(self) -> None:
        """Begin to serve."""
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_unix_server(self._client, sock=self._listener, limit=MAX_LINE)

    async def stop(self) -> None:
        """Send followers the last events, stop, and remove the socket if it is still ours."""
        while self._posted:
            self._publish(self._posted.popleft())
        until = time.monotonic() + STOP_SECONDS
        while any(follower.waiting for follower in self._followers) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._server:
            self._server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()

    def post(self, events: list[dict[str, Any]]) -> int:
        """Publish events from one other thread. Never blocks; return how many were dropped because the event loop is
        busy.
        """
        room = MAX_POSTED_EVENTS - len(self._posted)
        self._posted.extend(events[:room])
        if self._posted and not self._is_due and self._loop:
            self._is_due = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._publish_posted)
        return max(0, len(events) - room)

    def _publish_posted(self) -> None:
        self._is_due = False
        for _ in range(min(len(self._posted), EVENTS_PER_TURN)):
            self._publish(self._posted.popleft())
        if self._posted and not self._is_due and self._loop:
            self._is_due = True
            self._loop.call_soon(self._publish_posted)

    def _publish(self, event: dict[str, Any]) -> None:
        """Keep an event and send it to all followers."""
        self._events.append(event)
        if self._followers:
            line = _line({"event": event})
            for follower in self._followers:
                follower.put(line)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        # Root has places of its own, so that no reader can keep the switch of healing from it.
        most = 2 * MAX_CLIENTS if _is_root(writer) else MAX_CLIENTS
        if task is None or len(self._clients) >= most:
            writer.close()
            return
        self._clients.add(task)
        try:
            # A client that never reads is disconnected after IDLE_SECONDS with a full buffer.
            with contextlib.suppress(TimeoutError, ConnectionError, ValueError, asyncio.CancelledError):
                while line := await _within(reader.readline()):
                    question = _question(line)
                    if question == {"follow": "events"}:
                        await self._follow(reader, writer)
                        break
                    await _write(writer, _line(self._answer(question, _is_root(writer))))
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        follower = _Follower()
        self._followers.add(follower)
        gone = asyncio.ensure_future(reader.read(1))  # the connection's end, or bytes, which end it too
        try:
            await _write(writer, _line({"following": "events"}))
            while not gone.done():
                word = asyncio.ensure_future(follower.word.wait())
                await asyncio.wait([gone, word], return_when=asyncio.FIRST_COMPLETED)
                word.cancel()
                await _write(writer, follower.take())
        finally:
            gone.cancel()
            self._followers.discard(follower)

    def _answer(self, question: object, is_root: bool) -> dict[str, Any]:
        match question:
            case {"get": "snapshot", **rest} if not rest:
                return {"snapshot": asdict(self._snapshot())}
            case {"get": "doctor", **rest} if not rest:
                return {"doctor": self._doctor()}
            case {"get": "events", "limit": int(limit), **rest} if not rest and limit >= 0:
                return {"events": list(islice(self._events, max(0, len(self._events) - limit), None))}
            case {"get": "heal"} | {"heal": "on" | "off"}:
                return self._answer_heal(question, is_root)
            case None:
                return {"error": "not JSON"}
        return _UNKNOWN_REQUEST

    def _answer_heal(self, question: object, is_root: bool) -> dict[str, Any]:
        match question:
            case {"get": "heal", **rest} if not rest:
                return self._switch(None, [])
            case {"heal": to, "ports": list(ports), **rest} if not rest and all(map(_is_port, ports)):
                if is_root:
                    return self._switch(to == "on", ports)
                return {"error": "only root may switch healing on or off"}
        return _UNKNOWN_REQUEST

    def _switch(self, on: bool | None, ports: list[int]) -> dict[str, Any]:
        try:
            return {"heal": asdict(self._heal(on, ports))}
        except UdpwatchError as error:
            return {"error": str(error)}


def _is_port(value: object) -> bool:
    return type(value) is int and 0 < value < 65536


def _is_root(writer: asyncio.StreamWriter) -> bool:
    """Return whether the process at the other end was root's, or of the agent's own user, when it connected."""
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return uid in (0, os.geteuid())


def _question(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps({"v": VERSION, **answer}, separators=(",", ":")).encode() + b"\n"


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await _within(writer.drain())


async def _within(waited_for: Coroutine[Any, Any, _Result]) -> _Result:
    """Await with a time-out. wait_for() is no choice: before Python 3.12 it loses a cancellation that arrives together
    with the result."""
    async with asyncio.timeout(IDLE_SECONDS):
        return await waited_for
