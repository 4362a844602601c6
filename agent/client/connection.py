"""Query a running agent over its socket. agent/daemon/api.py describes the protocol."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from udpwatch.agent.daemon.api import VERSION
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing, Snapshot

DEFAULT_SOCKET = Path("/run/udpwatch/udpwatch.sock")

_Model = TypeVar("_Model")


class Client:
    """One connection to a running agent."""

    def __init__(self, path: Path = DEFAULT_SOCKET, seconds: float = 5.0) -> None:
        """Connect to the agent. ``seconds``: how long to wait for each response. Raises OSError."""
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
        """Return the agent's snapshot, without fields that a newer agent adds. Raises OSError, UdpwatchError."""
        return from_json(Snapshot, self._request({"get": "snapshot"}, "snapshot"))

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest events, the newest at the end. Raises OSError, UdpwatchError."""
        events: list[dict[str, Any]] = self._request({"get": "events", "limit": limit}, "events")
        return events

    def doctor(self) -> dict[str, Any]:
        """Return the agent's own state, for `udpwatch doctor`. Raises OSError, UdpwatchError."""
        report: dict[str, Any] = self._request({"get": "doctor"}, "doctor")
        return report

    def heal(self, on: bool | None = None, ports: Sequence[int] = ()) -> Healing:
        """Return what is healed; before that, switch ports, or everything, on or off. Raises OSError, UdpwatchError."""
        request = {"get": "heal"} if on is None else {"heal": "on" if on else "off", "ports": list(ports)}
        response = self._ask(request)
        if "heal" not in response:
            raise UdpwatchError(response.get("error", "invalid response"))
        return from_json(Healing, response["heal"])

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield {"event": ...} for each new event, and {"lost": N} if this reader was too slow, until the agent ends.

        The connection accepts no other request afterwards. Raises OSError, UdpwatchError.
        """
        self._request({"follow": "events"}, "following")
        self._socket.settimeout(None)
        return map(json.loads, iter(self._lines.readline, b""))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: dict[str, Any], field: str) -> Any:
        """Send a request and return one field of the response."""
        response = self._ask(request)
        if field not in response:
            raise UdpwatchError(f"cannot query the agent on {self._path}: {response.get('error', 'invalid response')}")
        return response[field]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the response."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError(f"the agent on {self._path} closed the connection")
        response: dict[str, Any] = json.loads(line)
        if response.get("v") != VERSION:
            raise UdpwatchError(
                f"cannot query the agent on {self._path}: it uses protocol version {response.get('v')}, this program "
                f"uses version {VERSION}; run the agent's version of udpwatch"
            )
        return response


def from_json(kind: type[_Model], encoded: Any) -> _Model:
    """Build a frozen dataclass of the model from its JSON form (asdict()); ignore unknown keys."""
    hashable: Any = kind  # mypy does not accept type[_Model] as hashable
    hints = _hints(hashable)
    return kind(**{name: _decoded(hints[name], value) for name, value in encoded.items() if name in hints})


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields. Cached, because finding them takes longer than decoding."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _decoded(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):
        if value is None:
            return None
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if get_origin(hint) is tuple:
        return tuple(_decoded(get_args(hint)[0], each) for each in value)
    return value
