"""Query a running agent over its socket. agent/daemon/api.py describes the protocol."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from udpwatch.agent.client.lines import safe
from udpwatch.agent.daemon.api import VERSION
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing, Snapshot

DEFAULT_SOCKET = Path("/run/udpwatch/udpwatch.sock")
MAX_RESPONSE = 64 << 20  # octets in a line; the snapshot of an agent with the highest limits has 10 MB

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
        """Return the agent's snapshot, without fields that a newer agent adds. Raises OSError, UdpwatchError, and
        ValueError for a response in another form, as all methods do.
        """
        return from_json(Snapshot, self._request({"get": "snapshot"}, "snapshot"))

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest events, the newest at the end. Raises OSError, UdpwatchError."""
        with expected_form():
            return list(map(_object, self._request({"get": "events", "limit": limit}, "events")))

    def doctor(self) -> dict[str, Any]:
        """Return the agent's own state, for `udpwatch doctor`. Raises OSError, UdpwatchError."""
        return _object(self._request({"get": "doctor"}, "doctor"))

    def heal(self, on: bool | None = None, ports: Sequence[int] = ()) -> Healing:
        """Return what is healed; before that, switch ports, or everything, on or off. Raises OSError, UdpwatchError."""
        request = {"get": "heal"} if on is None else {"heal": "on" if on else "off", "ports": list(ports)}
        response = self._ask(request)
        if "heal" not in response:
            raise UdpwatchError(_error_of(response))
        return from_json(Healing, response["heal"])

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield {"event": ...} for each new event, and {"lost": N} if this reader was too slow, until the agent ends.

        The connection accepts no other request afterwards. Raises OSError, UdpwatchError.
        """
        self._request({"follow": "events"}, "following")
        self._socket.settimeout(None)
        return iter(self._read, None)

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
            raise UdpwatchError(f"cannot query the agent on {self._path}: {_error_of(response)}")
        return response[field]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the response."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        response = self._read()
        if response is None:
            raise ConnectionResetError(f"the agent on {self._path} closed the connection")
        if response.get("v") != VERSION:
            raise UdpwatchError(
                f"cannot query the agent on {self._path}: it uses protocol version {response.get('v')!r}, this program "
                f"uses version {VERSION}; run the agent's version of udpwatch"
            )
        return response

    def _read(self) -> dict[str, Any] | None:
        """Return the next line's object; None: the agent has closed the connection."""
        line = self._lines.readline(MAX_RESPONSE)
        if not line:
            return None
        try:
            message = _object(json.loads(line))
        except RecursionError:
            raise ValueError("nested too deeply") from None
        _object(message.get("event", {}))
        return message


@contextmanager
def expected_form() -> Iterator[None]:
    """Raise ValueError for what a response in another form leads to."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"unexpected response: {error!r}") from error


def from_json(kind: type[_Model], encoded: Any) -> _Model:
    """Build a frozen dataclass of the model from its JSON form (asdict()); ignore unknown keys. Raises ValueError for
    missing ones and for values of another type.
    """
    with expected_form():
        return _built(kind, encoded)


def _built(kind: type[_Model], encoded: Any) -> _Model:
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
        return _built(hint, value)
    origin = get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_decoded(get_args(hint)[0], each) for each in value)
    if origin is dict and isinstance(value, dict):
        return {name: _decoded(get_args(hint)[1], each) for name, each in value.items()}
    if not isinstance(value, (int, float) if hint is float else str if issubclass(hint, str) else hint):
        raise ValueError(f"expected {hint.__name__}, not {type(value).__name__}")
    if (isinstance(value, bool) and hint is not bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"unexpected value {value}")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, not {type(value).__name__}")
    return value


def _error_of(response: dict[str, Any]) -> str:
    return safe(str(response.get("error", "invalid response")))
