"""Read the findings and servers of a whole cluster from Prometheus' HTTP API.

They are summed over nodes by Prometheus (fold.py), or read as one row per node and finding.

Prometheus has totals at its scrapes only. Rates therefore come from Prometheus (irate), and "last seen" is the time
when a total was first seen to have increased.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.fold import (
    AT_RISK,
    BUILD_INFO,
    CHECKED,
    HEAL_ACTIVE,
    HEALED,
    LOST,
    MISMATCH,
    NODE_FAULTS,
    OTHER,
    REFUSED,
    UNWATCHED,
    WINDOW,
    Labels,
    Sample,
    folded_of,
    folded_query,
    healed_row_of,
    node_of,
    row_of,
    unfolded_query,
    view_of_folded,
)
from udpwatch.agent.client.top.rows import Key, View, key_of
from udpwatch.agent.client.top.sources import Wanted
from udpwatch.agent.client.top.traffic import ServerKey
from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import Healing, Row, Snapshot

TIMEOUT_SECONDS = 10.0
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_REASON = 200  # characters
MAX_VALUE = 2.0**64  # of a count or a rate; larger values are +Inf or would overflow to it in a sum
_CHUNK_BYTES = 64 * 1024

_METRICS = (MISMATCH, HEALED, REFUSED, HEAL_ACTIVE, CHECKED, LOST, NODE_FAULTS, UNWATCHED, BUILD_INFO)
_TOTALS = f'{{__name__=~"{"|".join(_METRICS)}"}}'


class PrometheusSource:
    """All agents that one Prometheus scrapes."""

    def __init__(self, url: str) -> None:
        """``url``: the base URL of Prometheus. Raises UsageError if it is invalid."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"invalid value {url!r} for --prometheus: expected http://HOST:PORT or https://HOST")
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        host = parts.netloc.rpartition("@")[2]
        self._url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/api/v1/query"
        self.name = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self._seen: dict[Key, tuple[int, float]] = {}  # count, and the time when it was first seen

        self._wanted = Wanted()
        self._groups: dict[Key | ServerKey, list[Labels]] = {}  # the labels behind each folded row

    def select(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def read(self) -> View:
        """Query Prometheus. Raises OSError if the response is missing or invalid."""
        wanted = self._wanted
        try:
            if wanted.only is not None and (groups := self._groups.get(wanted.only)):
                return self._read_sums(unfolded_query(groups, wanted.servers), False, wanted.servers)
            if wanted.folded:
                return self._read_sums(folded_query(wanted.servers), True, wanted.servers)
            view = self._read_nodes()
            if wanted.servers:
                view = replace(view, folded_servers=self._read_sums(folded_query(True), True, True))
        except (ValueError, OverflowError) as error:
            raise self._invalid_response(error) from None
        return view

    def _read_sums(self, query: str, folded: bool, servers: bool) -> View:
        """Run a query of fold.py."""
        now = time.time()
        found = folded_of(self._query(query))
        if folded:
            self._groups = found.groups
        found.rows, self._seen = _with_times(now, found.rows, self._seen)
        return view_of_folded(now, found, folded, servers)

    def _read_nodes(self) -> View:
        """Read each finding of each node."""
        now = time.time()
        totals = self._query(_TOTALS)
        rates = self._query(f"irate({MISMATCH}[{WINDOW}])")
        checked = self._query(f"sum(irate({CHECKED}[{WINDOW}]))")
        at_risk = self._query(f"sum({AT_RISK})")
        healed = self._query(f"irate({HEALED}[{WINDOW}])")
        view, self._seen = view_of(now, totals, rates, checked, self._seen, healed)
        return replace(view, at_risk=int(sum(value for _, value in at_risk)))

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Return nothing, because Prometheus stores no events."""
        del limit
        return []

    def close(self) -> None:
        """Do nothing: no connection is kept open."""

    def _query(self, query: str) -> list[Sample]:
        body = urllib.parse.urlencode({"query": query, "timeout": f"{TIMEOUT_SECONDS:g}s"}, errors="replace").encode()
        request = urllib.request.Request(self._url, body, self._headers)  # noqa: S310  the scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310
                return samples_of(_read(response))
        except urllib.error.HTTPError as error:
            with error:
                raise self._error(f"{error.code} {_reason(error)}") from None
        except urllib.error.URLError as error:
            raise self._error(str(error.reason)) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, HTTPException) as error:
            raise self._invalid_response(error) from None

    def _invalid_response(self, error: Exception) -> OSError:
        return self._error(f"the response is not from Prometheus' HTTP API ({error})")

    def _error(self, reason: str) -> OSError:
        """Return an error whose text is safe for a terminal, because the server chooses part of it."""
        return ConnectionError(f"{self.name}: {safe(reason[:MAX_REASON])}")


def _read(response: Any) -> bytes:
    """Read the body, limited in size and time. A server that sends a byte at a time would block the reader forever."""
    end = time.monotonic() + TIMEOUT_SECONDS
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise ValueError(f"more than {MAX_RESPONSE_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise TimeoutError(f"it took longer than {TIMEOUT_SECONDS:g} s")
    return bytes(body)


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the error in Prometheus' JSON; if the body is anything else, the reason in the status line."""
    try:
        return str(json.loads(_read(error))["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, HTTPException):
        return str(error.reason)


def samples_of(body: bytes) -> list[Sample]:
    """Parse an instant vector into (labels, value). Values that are neither count nor rate are left out.

    These are NaN, +Inf and negative values. Raises ValueError, LookupError, TypeError, AttributeError or RecursionError
    if the body is not an instant vector.
    """
    response = json.loads(body)
    if response["status"] != "success" or response["data"]["resultType"] != "vector":
        raise ValueError(str(response.get("error", "not a vector")))
    samples = [(_labels(each["metric"]), float(each["value"][1])) for each in response["data"]["result"]]
    return [(labels, value) for labels, value in samples if 0 <= value <= MAX_VALUE]


def _labels(metric: dict[str, object]) -> Labels:
    return {name: str(value) for name, value in metric.items()}


@dataclass(slots=True)
class _Node:
    kernel: str = ""
    version: str = ""
    mode: str = ""
    checked: int = 0
    other: int = 0
    other_healed: int = 0
    heals: bool | None = None  # None: healing is not enabled
    refused: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    unwatched: dict[str, int] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)

    def add(self, labels: Labels, value: int) -> None:
        """Add one sample of _TOTALS."""
        metric = labels.get("__name__")
        if metric == BUILD_INFO:
            self.kernel, self.version = labels.get("kernel", ""), labels.get("version", "")
            self.mode = labels.get("mode", "")
        elif metric == LOST:
            stage = labels.get("stage", "")
            self.lost[stage] = self.lost.get(stage, 0) + value
        elif metric == NODE_FAULTS:
            fault = labels.get("fault", "")
            self.faults[fault] = self.faults.get(fault, 0) + value
        elif metric == UNWATCHED:
            kind = labels.get("kind", "")
            self.unwatched[kind] = self.unwatched.get(kind, 0) + value
        elif metric == CHECKED:
            self.checked += value
        elif metric == HEAL_ACTIVE:
            self.heals = value == 1
        elif metric == REFUSED:
            reason = labels.get("reason", "")
            self.refused[reason] = self.refused.get(reason, 0) + value
        elif metric == HEALED and labels.get("port") == OTHER:
            self.other_healed += value
        elif labels.get("port") == OTHER:
            self.other += value
        else:
            row = healed_row_of(labels, value) if metric == HEALED else row_of(labels, value)
            key = key_of(node_of(labels), row)
            # For a scrape or two, the series of an agent that this one has replaced is still there.
            known = self.rows.get(key)
            self.rows[key] = replace(row, count=row.count + known.count) if known else row


def view_of(
    now: float,
    totals: list[Sample],
    rates: list[Sample],
    checked: list[Sample],
    seen: Mapping[Key, tuple[int, float]],
    healed: Sequence[Sample] = (),
) -> tuple[View, dict[Key, tuple[int, float]]]:
    """Build the view of all nodes.

    ``seen``: what the previous call returned as its second value; row key -> (count, time when it increased).
    ``rates``, ``healed``: of wrong and of healed replies.
    """
    nodes: dict[str, _Node] = {}
    for labels, value in totals:
        nodes.setdefault(node_of(labels), _Node()).add(labels, int(value))
    increased: dict[Key, tuple[int, float]] = {}
    for node in nodes.values():
        node.rows, times = _with_times(now, node.rows, seen)
        increased |= times
    by_key: dict[Key, float] = {}
    for samples, as_row in ((rates, row_of), (healed, healed_row_of)):
        for labels, value in samples:
            if labels.get("port") != OTHER:
                key = key_of(node_of(labels), as_row(labels, 0))
                by_key[key] = by_key.get(key, 0.0) + value
    view = View(
        time=now,
        snapshots=tuple(_snapshot(name, node, now) for name, node in sorted(nodes.items())),
        cluster=True,
        rates=by_key,
        wrong=sum(value for _, value in rates),
        checked=sum(value for _, value in checked),
        server_rates={},
        has_servers=False,
    )
    return view, increased


def _with_times(
    now: float, rows: Mapping[Key, Row], seen: Mapping[Key, tuple[int, float]]
) -> tuple[dict[Key, Row], dict[Key, tuple[int, float]]]:
    """Set when each row was seen to increase; also return it for the next call, with the counts."""
    timed, increased = {}, {}
    for key, row in rows.items():
        count, since = seen.get(key, (row.count, 0.0))
        increased[key] = (row.count, since if count == row.count else now)
        timed[key] = replace(row, last=increased[key][1])
    return timed, increased


def _snapshot(name: str, node: _Node, now: float) -> Snapshot:
    return Snapshot(
        version=node.version,
        kernel=node.kernel,
        node=name,
        mode=node.mode,
        started=0.0,
        time=now,
        ready=True,
        notes=(),
        rows=tuple(node.rows.values()),
        other=node.other,
        checked=node.checked,
        tracked_peers=0,
        evicted_peers=0,
        lost=node.lost,
        node_faults=node.faults,
        unwatched=node.unwatched,
        probes=(),
        healing=None if node.heals is None else Healing("", node.heals, False, refused=node.refused),
        other_healed={"": node.other_healed} if node.other_healed else {},
    )
