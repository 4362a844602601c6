"""`udpwatch events`: which events are wanted, the kept ones first, then each as it happens."""

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
    """There is none, or none that this user may ask."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events to show; None: all. Names may be patterns (dns-*), as a pod's end changes with each roll-out."""

    pod: str | None = None
    namespace: str | None = None
    port: int | None = None
    process: str | None = None
    verdict: str | None = None

    def has(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is one of these."""
        names = ("pod", "namespace", "process", "verdict")
        wanted = ((getattr(self, name), event.get(name)) for name in names)
        return self.port in (None, event.get("port")) and all(
            pattern is None or (value is not None and (value == pattern or fnmatchcase(str(value), pattern)))
            for pattern, value in wanted
        )


def moment(text: str, now: float) -> float:
    """What --since means, in seconds since the epoch; raises UsageError."""
    if (ago := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)) is not None:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.timestamp()
    except (ValueError, OverflowError):
        pass
    raise UsageError(
        f"--since: {text!r} is not accepted; it takes seconds, 90s, 5m, 2h, 1d, or a time with its zone such as "
        "2026-11-24T07:44:20Z"
    )


def events(
    path: Path, wanted: Wanted, since: float | None, follow: bool, connect: Callable[[Path], Client] = Client
) -> Iterator[dict[str, Any]]:
    """{"event": ...} of each event that is wanted, {"lost": N} where this reader was too slow.

    Those that the agent keeps come first: from ``since`` on, all of them where it is None and nothing is followed.
    Raises UdpwatchError, also when the agent ends.
    """

    def kept(client: Client) -> Iterator[dict[str, Any]]:
        for event in client.events(KEPT_EVENTS):
            ahead[_identity(event)] += 1
            if wanted.has(event) and (since is None or _time(event) >= since):
                yield {"event": event}

    ahead: Counter[str] = Counter()  # told, and perhaps to be met again at the start of what is followed
    with reaching(path), connect(path) as client:
        if not follow:
            yield from kept(client)
            return
        words = client.follow()
        if since is not None:  # asked for after the following began: what happens between comes twice, and is known
            with connect(path) as other:
                yield from kept(other)
        for word in _to_the_end(words):
            event = word.get("event")
            if event is not None and ahead:
                if ahead[identity := _identity(event)]:
                    ahead[identity] -= 1
                    continue
                ahead.clear()  # they come in order: this one is newer than all that were kept
            if "lost" in word or (event is not None and wanted.has(event)):
                yield word
        raise ConnectionResetError


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turns what goes wrong between us and the agent on ``path`` into a line that says what to do.

    Only around what speaks with the agent: a reader of our own that went away is another matter.
    """
    try:
        yield
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAgent(
            f"no agent answers on {path}: start one with `udpwatch run`, or name its socket with --connect"
        ) from None
    except PermissionError:
        raise NoAgent(f"{path} may not be opened by this user: run this as root, or in the socket's group") from None
    except TimeoutError:
        raise UdpwatchError(f"{path}: the agent does not answer; is it stopped, or its machine very busy?") from None
    except ConnectionError:
        raise UdpwatchError(f"{path}: the agent has ended the connection; its own log says why") from None
    except OSError as error:
        raise UdpwatchError(f"{path}: {error.strerror or error}; name the agent's socket with --connect") from None
    except ValueError:
        raise UdpwatchError(f"{path}: no agent speaks there; name its socket with --connect") from None


def _to_the_end(words: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with suppress(ValueError):  # an agent may end in the middle of a line
        yield from words


def _identity(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
