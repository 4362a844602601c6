"""The other end of the agent's socket, for `top`, `events` and `explain` (api.py says what is spoken there)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from udpwatch.agent.daemon.api import VERSION
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Snapshot

DEFAULT_SOCKET = Path("/run/udpwatch/udpwatch.sock")

_Shape = TypeVar("_Shape")


class Client:
    """One connection to a running agent."""

    def __init__(self, path: Path = DEFAULT_SOCKET, seconds: float = 5.0) -> None:
        """Raises OSError when nobody answers; ``seconds`` is the time that an answer may take."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(seconds)
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def snapshot(self) -> Snapshot:
        """The agent's snapshot; what a newer agent adds to it is passed over. Raises OSError, UdpwatchError."""
        return shaped(Snapshot, self._ask({"get": "snapshot"}, "snapshot"))

    def events(self, limit: int) -> list[dict[str, Any]]:
        """The newest events, the newest last. Raises OSError, UdpwatchError."""
        events: list[dict[str, Any]] = self._ask({"get": "events", "limit": limit}, "events")
        return events

    def doctor(self) -> dict[str, Any]:
        """What the agent says of itself. Raises OSError, UdpwatchError."""
        report: dict[str, Any] = self._ask({"get": "doctor"}, "doctor")
        return report

    def follow(self) -> Iterator[dict[str, Any]]:
        """{"event": ...} of each event from now on, {"lost": N} where this reader was too slow. Ends with the agent.

        The connection can be asked nothing else afterwards. Raises OSError, UdpwatchError.
        """
        self._ask({"follow": "events"}, "following")
        self._socket.settimeout(None)
        return map(json.loads, iter(self._lines.readline, b""))

    def close(self) -> None:
        """Let go of the connection."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any], wanted: str) -> Any:
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError(f"{self._path}: the agent has ended the connection")
        answer = json.loads(line)
        if answer.get("v") != VERSION:
            raise UdpwatchError(f"{self._path}: it speaks version {answer.get('v')}, this is version {VERSION}")
        if wanted not in answer:
            raise UdpwatchError(f"{self._path}: {answer.get('error', 'no answer')}")
        return answer[wanted]


def shaped(kind: type[_Shape], told: Any) -> _Shape:
    """A frozen dataclass of the model from what asdict() and JSON made of it; unknown keys are passed over."""
    of: Any = kind  # to mypy a type variable's type is not hashable
    hints = _hints(of)
    return kind(**{name: _value(hints[name], value) for name, value in told.items() if name in hints})


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields; to find them out takes longer than to fill them in."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _value(hint: Any, told: Any) -> Any:
    if isinstance(hint, UnionType):
        if told is None:
            return None
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if is_dataclass(hint) and isinstance(hint, type):
        return shaped(hint, told)
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], each) for each in told)
    return told
