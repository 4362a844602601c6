"""A whole cluster's findings from Prometheus' HTTP API: a row per node and finding.

Prometheus knows totals at its scrapes only, so rates are its own (irate), and "last seen" is when a total was first
seen to have grown.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

from udpwatch.agent.client.lines import safe
from udpwatch.agent.client.top.rows import Key, Look, key_of
from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import Row, Sender, Snapshot

TIMEOUT_SECONDS = 10.0
MAX_REPLY_BYTES = 64 * 1024 * 1024
MAX_REASON = 200  # letters
MAX_PORT_DIGITS = 5
MAX_VALUE = 2.0**64  # of a count or a rate; beyond are +Inf, and what would overflow to it in a sum
_CHUNK_BYTES = 64 * 1024

_MISMATCH = "udpwatch_reply_source_mismatch_total"
_CHECKED = "udpwatch_replies_checked_total"
_TOTALS = f'{{__name__=~"{_MISMATCH}|{_CHECKED}|udpwatch_events_lost_total|udpwatch_build_info"}}'
# The last two scrapes that are not older than this: right for any usual scrape interval, and as fresh as can be.
_WINDOW = "5m"
_OTHER = "other"  # the value of all labels of what is beyond an agent's limit

_Labels = Mapping[str, str]
_Sample = tuple[_Labels, float]


class PrometheusSource:
    """All agents that a Prometheus scrapes."""

    def __init__(self, url: str) -> None:
        """``url``: where Prometheus' own pages are. Raises UsageError where it is none."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"--prometheus: {url!r} is not accepted; it takes http://HOST:PORT or https://HOST")
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        host = parts.netloc.rpartition("@")[2]
        self._url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/api/v1/query"
        self.name = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self._seen: dict[Key, tuple[int, float]] = {}  # count, and when it was first seen

    def read(self) -> Look:
        """Raises OSError where Prometheus does not answer as it should."""
        now = time.time()
        totals = self._query(_TOTALS)
        rates = self._query(f"irate({_MISMATCH}[{_WINDOW}])")
        checked = self._query(f"sum(irate({_CHECKED}[{_WINDOW}]))")
        try:
            look, self._seen = look_of(now, totals, rates, checked, self._seen)
        except (ValueError, OverflowError) as error:
            raise self._no_answer(error) from None
        return look

    def events(self, limit: int) -> list[dict[str, Any]]:
        """None: Prometheus stores no events."""
        del limit
        return []

    def close(self) -> None:
        """Nothing is kept open."""

    def _query(self, query: str) -> list[_Sample]:
        body = urllib.parse.urlencode({"query": query, "timeout": f"{TIMEOUT_SECONDS:g}s"}).encode()
        request = urllib.request.Request(self._url, body, self._headers)  # noqa: S310  the scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
                return samples_of(_read(answer))
        except urllib.error.HTTPError as error:
            with error:
                raise self._wrong(f"{error.code} {_reason(error)}") from None
        except urllib.error.URLError as error:
            raise self._wrong(str(error.reason)) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, HTTPException) as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> OSError:
        return self._wrong(f"no answer of Prometheus' HTTP API ({error})")

    def _wrong(self, reason: str) -> OSError:
        """Why there is no look, in letters that do no harm on a terminal: some are the server's own."""
        return ConnectionError(f"{self.name}: {safe(reason[:MAX_REASON])}")


def _read(answer: Any) -> bytes:
    """The body, bounded in size and time: a server that trickles would keep us for ever."""
    end = time.monotonic() + TIMEOUT_SECONDS
    body = bytearray()
    while chunk := answer.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            raise ValueError(f"more than {MAX_REPLY_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise TimeoutError(f"it took longer than {TIMEOUT_SECONDS:g} s")
    return bytes(body)


def _reason(error: urllib.error.HTTPError) -> str:
    """Prometheus says in JSON what it does not like; anything else has its status line."""
    try:
        return str(json.loads(_read(error))["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, HTTPException):
        return str(error.reason)


def samples_of(body: bytes) -> list[_Sample]:
    """An instant vector as (labels, value), without what is no count and no rate: NaN, +Inf, less than 0.

    Raises ValueError, LookupError, TypeError, AttributeError, RecursionError for anything else.
    """
    told = json.loads(body)
    if told["status"] != "success" or told["data"]["resultType"] != "vector":
        raise ValueError(str(told.get("error", "not a vector")))
    found = [(_labels(each["metric"]), float(each["value"][1])) for each in told["data"]["result"]]
    return [(labels, value) for labels, value in found if 0 <= value <= MAX_VALUE]


def _labels(metric: dict[str, object]) -> _Labels:
    return {name: str(value) for name, value in metric.items()}


@dataclass(slots=True)
class _Node:
    kernel: str = ""
    version: str = ""
    mode: str = ""
    checked: int = 0
    other: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)


def look_of(
    now: float,
    totals: list[_Sample],
    rates: list[_Sample],
    checked: list[_Sample],
    seen: Mapping[Key, tuple[int, float]],
) -> tuple[Look, dict[Key, tuple[int, float]]]:
    """The look, and what has to be remembered for the next one."""
    nodes: dict[str, _Node] = {}
    remembered: dict[Key, tuple[int, float]] = {}
    for labels, value in totals:
        name = _node(labels)
        node = nodes.setdefault(name, _Node())
        match labels.get("__name__"):
            case "udpwatch_build_info":
                node.kernel, node.version = labels.get("kernel", ""), labels.get("version", "")
                node.mode = labels.get("mode", "")
            case "udpwatch_events_lost_total":
                stage = labels.get("stage", "")
                node.lost[stage] = node.lost.get(stage, 0) + int(value)
            case name_ if name_ == _CHECKED:
                node.checked += int(value)
            case _ if labels.get("port") == _OTHER:
                node.other += int(value)
            case _:
                row = _row(labels, int(value))
                key = key_of(name, row)
                known = node.rows.get(key)  # by an agent that this one replaced, for a scrape or two
                node.rows[key] = replace(row, count=row.count + known.count) if known else row
    for node in nodes.values():
        for key, row in node.rows.items():
            count, since = seen.get(key, (row.count, 0.0))
            remembered[key] = (row.count, since if count == row.count else now)
            node.rows[key] = replace(row, last=remembered[key][1])
    by_key: dict[Key, float] = {}
    for labels, value in rates:
        if labels.get("port") != _OTHER:
            key = key_of(_node(labels), _row(labels, 0))
            by_key[key] = by_key.get(key, 0.0) + value
    look = Look(
        time=now,
        snapshots=tuple(_snapshot(name, node, now) for name, node in sorted(nodes.items())),
        cluster=True,
        rates=by_key,
        wrong=sum(value for _, value in rates),
        checked=sum(value for _, value in checked),
    )
    return look, remembered


def _node(labels: _Labels) -> str:
    """The node by its name, where the scrape adds it (the chart's monitors do), else by where it is scraped."""
    return labels.get("node") or labels.get("instance", "")


def _row(labels: _Labels, count: int) -> Row:
    def label(name: str) -> str:
        # Where the scrape's own target has a label of that name, Prometheus has moved the agent's aside.
        return labels.get(f"exported_{name}", labels.get(name, ""))

    expected = label("expected")
    port = label("port")
    return Row(
        sender=Sender(label("process"), container=label("container"), namespace=label("namespace"), pod=label("pod")),
        port=int(port) if port.isdecimal() and len(port) <= MAX_PORT_DIGITS else 0,
        expected=expected,
        actual=label("actual"),
        verdict=label("verdict"),
        cause=label("cause"),
        family=6 if ":" in expected else 4,
        count=count,
        first=0.0,
        last=0.0,
    )


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
        probes=(),
    )
