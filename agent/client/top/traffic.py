"""The rates of servers, from the counts of consecutive snapshots. No I/O.

Rules
1. A rate is the increase over the last RATE_SECONDS, or over less if the first snapshot is newer. The share of
   unanswered requests covers the last SHARE_SECONDS, because a request counts as unanswered only after the window.
2. A count that fell has started again from 0. After a restart of the agent, rates begin anew.
3. A server that is older than the copy, but not in it, had other names then: its rates begin with the next copy.
4. Memory is bounded by the number of listed servers: about a dozen copies of their counts are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from udpwatch.agent.model import Server, Snapshot

RATE_SECONDS = 5.0
SHARE_SECONDS = 60.0
_RATE_SPACING, _SHARE_SPACING = 0.9, 9.0  # seconds between two kept copies


class ServerKey(NamedTuple):
    """Identifies a server across views."""

    node: str
    process: str
    namespace: str
    pod: str
    container: str
    port: int
    netns: int = 0  # 0: unknown, or the sum of several


def server_key(node: str, server: Server) -> ServerKey:
    sender = server.sender
    names = (sender.process, sender.namespace, sender.pod, sender.container)
    return ServerKey(node, *names, server.port, server.netns)


class Rates(NamedTuple):
    """What a server does, per second."""

    requests: float = 0.0
    replies: float = 0.0
    wrong: float = 0.0
    drops: float = 0.0
    unanswered: float | None = None  # share of the requests, 0 to 1; None: there was no request


_Counts = tuple[int, int, int, int, int]  # requests, replies, wrong, drops, unanswered
_NONE: _Counts = (0, 0, 0, 0, 0)
_Copy = tuple[float, dict[ServerKey, _Counts]]  # time, counts


class ServerMeter:
    """Computes the rates of consecutive snapshots."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._recent: deque[_Copy] = deque()
        self._older: deque[_Copy] = deque()

    def add(self, time: float, snapshots: Iterable[Snapshot]) -> Mapping[ServerKey, Rates] | None:
        """Return the rates of each server; None if they are not known yet. ``time``: seconds since the epoch."""
        servers = {server_key(each.node, server): server for each in snapshots for server in each.servers}
        counts = {key: _counts(server) for key, server in servers.items()}
        started = {each.node: each.started for each in snapshots}
        if started != self._started or (self._recent and time < self._recent[-1][0]):
            self._recent.clear()
            self._older.clear()
        self._started = started
        rates = self._rates(time, counts, {key: server.first for key, server in servers.items()})
        _keep(self._recent, (time, counts), _RATE_SPACING, RATE_SECONDS)
        _keep(self._older, (time, counts), _SHARE_SPACING, SHARE_SECONDS)
        return rates

    def _rates(
        self, time: float, counts: dict[ServerKey, _Counts], first: Mapping[ServerKey, float]
    ) -> dict[ServerKey, Rates] | None:
        if not self._recent or time <= self._recent[0][0]:
            return None
        since, before = self._recent[0]
        seconds = time - since
        asof, minute = self._older[0]
        rates = {}
        for key, now in counts.items():
            added = _increases(now, before.get(key, now if first[key] < since else _NONE))
            longer = _increases(now, minute.get(key, now if first[key] < asof else _NONE))
            asked, unanswered = longer[0], longer[4]
            share = min(1.0, unanswered / asked) if asked else None
            requests, replies, wrong, drops = (each / seconds for each in added[:4])
            rates[key] = Rates(requests, replies, wrong, drops, share)
        return rates


def _counts(server: Server) -> _Counts:
    return server.requests, server.replies, server.wrong, server.drops or 0, server.unanswered


def _increases(now: _Counts, before: _Counts) -> _Counts:
    if now == before:
        return _NONE
    return tuple(new - old if new >= old else new for new, old in zip(now, before, strict=True))  # type: ignore[return-value]


def _keep(copies: deque[_Copy], copy: _Copy, spacing: float, seconds: float) -> None:
    """Keep a copy unless the last one is newer than ``spacing``; forget those older than ``seconds``, except one."""
    if not copies or copy[0] - copies[-1][0] >= spacing:
        copies.append(copy)
    while len(copies) > 1 and copies[1][0] <= copy[0] - seconds:
        copies.popleft()
