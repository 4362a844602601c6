"""Read events from a running agent: first those that it keeps, then each new one. Filter them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from udpwatch.agent.client.connection import Client
from udpwatch.agent.daemon.api import KEPT_EVENTS
from udpwatch.agent.errors import UdpwatchError, UsageError

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class NoAgent(UdpwatchError):
    """No agent listens on the socket, or this user has no permission to open it."""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events to show; None: all. Names may be patterns such as dns-*, because roll-outs rename pods."""

    pod: str | None = None
    namespace: str | None = None
    port: int | None = None
    process: str | None = None
    verdict: str | None = None

    def matches(self, event: Mapping[str, Any]) -> bool:
        names = ("pod", "namespace", "process", "verdict")
        pairs = ((getattr(self, name), event.get(name)) for name in names)
        return self.port in (None, event.get("port")) and all(
            pattern is None or (value is not None and (value == pattern or fnmatchcase(str(value), pattern)))
            for pattern, value in pairs
        )


def parse_since(text: str, now: float) -> float:
    """Parse the value of --since; return seconds since the epoch. Raises UsageError."""
    if (ago := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)) is not None:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.timestamp()
    except (ValueError, OverflowError):
        pass
    raise UsageError(
        f"invalid value {text!r} for --since: expected seconds, 90s, 5m, 2h, 1d, or a time with its zone, such as "
        "2026-11-24T07:44:20Z"
    )


def read_events(
    path: Path, event_filter: EventFilter, since: float | None, follow: bool, connect: Callable[[Path], Client] = Client
) -> Iterator[dict[str, Any]]:
    """Yield {"event": ...} for each event that matches, and {"lost": N} if this reader was too slow.

    The events that the agent keeps come first: those since ``since``, or all of them if ``since`` is None and
    ``follow`` is False. Raises UdpwatchError, also when the agent ends.
    """

    def kept(client: Client) -> Iterator[dict[str, Any]]:
        for event in client.events(KEPT_EVENTS):
            delivered[_identity(event)] += 1
            if event_filter.matches(event) and (since is None or _time(event) >= since):
                yield {"event": event}

    delivered: Counter[str] = Counter()  # kept events, which may come again at the start of the followed ones
    with translated_errors(path), connect(path) as client:
        if not follow:
            yield from kept(client)
            return
        messages = client.follow()
        if since is not None:
            # Kept events are requested after following began, so that none is missed in between. Some come twice.
            with connect(path) as other:
                yield from kept(other)
        for message in _complete(messages):
            event = message.get("event")
            if event is not None and delivered:
                if delivered[identity := _identity(event)]:
                    delivered[identity] -= 1
                    continue
                delivered.clear()  # events are in order, so this one is newer than all kept ones
            if "lost" in message or (event is not None and event_filter.matches(event)):
                yield message
        raise ConnectionResetError


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Translate the errors of a connection to the agent on ``path`` into messages for the user.

    Use it around calls to the agent only, because output to a closed pipe raises the same errors.
    """
    try:
        yield
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAgent(
            f"cannot connect to {path}: no agent is listening; start one with `udpwatch run`, or pass the path of its "
            "socket with --connect"
        ) from None
    except PermissionError:
        raise NoAgent(
            f"cannot connect to {path}: permission denied; run this as root, or as a member of the socket's group"
        ) from None
    except TimeoutError:
        raise UdpwatchError(
            f"cannot query the agent on {path}: no response; check whether it is stopped or its machine overloaded"
        ) from None
    except ConnectionError:
        raise UdpwatchError(
            f"cannot read from the agent on {path}: it closed the connection; see the agent's log"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UdpwatchError(
            f"cannot connect to {path}: {reason}; pass the path of the agent's socket with --connect"
        ) from None
    except ValueError:
        raise UdpwatchError(
            f"cannot query {path}: it is not the socket of an agent; pass the path of the agent's socket with --connect"
        ) from None


def _complete(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the messages without an incomplete one at the end, which an agent that is killed may leave."""
    with suppress(ValueError):
        yield from messages


def _identity(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
