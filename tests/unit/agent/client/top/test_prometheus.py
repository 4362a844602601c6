"""A cluster as Prometheus reports it, and servers that are not Prometheus."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from udpwatch.agent.client.top import prometheus
from udpwatch.agent.client.top.healing import healed_of
from udpwatch.agent.client.top.prometheus import PrometheusSource, samples_of, view_of
from udpwatch.agent.client.top.rows import Healed, Order, rows
from udpwatch.agent.errors import UsageError

MISMATCH = "udpwatch_reply_source_mismatch_total"


def mismatch(instance: str, port: str = "53", **labels: str) -> dict[str, str]:
    known = {"process": "dnsd", "expected": "10.0.0.1", "actual": "10.0.0.2", "verdict": "new", "cause": "explicit"}
    return {"__name__": MISMATCH, "instance": instance, "port": port, **known, **labels}


def test_each_node_and_finding_has_a_row() -> None:
    totals = [
        ({"__name__": "udpwatch_build_info", "instance": "a:9953", "mode": "packet", "kernel": "6.1"}, 1.0),
        ({"__name__": "udpwatch_replies_checked_total", "instance": "a:9953"}, 100.0),
        ({"__name__": "udpwatch_replies_checked_total", "instance": "b:9953"}, 10.0),
        ({"__name__": "udpwatch_events_lost_total", "instance": "b:9953", "stage": "queue"}, 3.0),
        ({"__name__": "udpwatch_node_faults_total", "instance": "b:9953", "fault": "suspend"}, 4.0),
        ({"__name__": "udpwatch_unwatched", "instance": "b:9953", "kind": "sockets"}, 6.0),
        (mismatch("a:9953"), 7.0),
        (mismatch("b:9953", pod="exporter", exported_pod="dns-0", exported_namespace="shop"), 9.0),
        (mismatch("b:9953", "other", process="other"), 5.0),
    ]
    rates = [(mismatch("a:9953"), 0.5), (mismatch("b:9953", "other"), 2.0)]
    view, seen = view_of(1000.0, totals, rates, [({}, 4.0)], {})
    shown = [(line.key.node, line.key.port, line.location, line.rate, line.total) for line in rows(view, Order.TOTAL)]
    assert shown == [("b:9953", 53, "shop/dns-0", 0.0, 9), ("a:9953", 53, "", 0.5, 7)]
    assert (view.wrong, view.checked, len(view.snapshots)) == (2.5, 4.0, 2)
    assert [(each.other, each.checked, each.mode, each.lost) for each in view.snapshots] == [
        (0, 100, "packet", {}),
        (5, 10, "", {"queue": 3}),
    ]
    assert [(each.node_faults, each.unwatched) for each in view.snapshots] == [
        ({}, {}),
        ({"suspend": 4}, {"sockets": 6}),
    ]
    # Prometheus does not say when a counter grew: known once we saw it grow.
    assert [row.last for each in view.snapshots for row in each.rows] == [0.0, 0.0]
    again, _ = view_of(1015.0, [(mismatch("a:9953"), 8.0)], rates, [], seen)
    assert [row.last for each in again.snapshots for row in each.rows] == [1015.0]


def test_healed_replies_of_a_cluster_are_not_wrong() -> None:
    healed = {"instance": "a", "process": "tftpd", "port": "69", "asked": "10.0.0.1"}
    series = {"__name__": "udpwatch_healed_replies_total", **healed}
    refused = {"__name__": "udpwatch_heal_refused_total", "instance": "a"}
    totals = [
        (series, 7.0),
        ({**series, "port": "other"}, 2.0),
        ({**refused, "reason": "not-local"}, 3.0),
        ({**refused, "reason": "group"}, 9.0),
        ({"__name__": "udpwatch_heal_active", "instance": "a"}, 1.0),
        (mismatch("a"), 1.0),
    ]
    view, seen = view_of(1000.0, totals, [(mismatch("a"), 0.5)], [], {}, [(healed, 4.0)])
    wrong, healed_line = rows(view, Order.TOTAL)
    assert (wrong.key.verdict, wrong.rate) == ("new", 0.5)
    key = healed_line.key
    assert (key.expected, key.actual, key.verdict, key.cause) == ("10.0.0.1", "10.0.0.1", "healed", "kernel-chosen")
    assert (healed_line.rate, healed_line.total, view.wrong) == (4.0, 7, 0.5)
    assert healed_of(view) == Healed(9, 1, 3, 0)
    again, _ = view_of(1015.0, [(series, 8.0)], [], [], seen)
    assert [row.last for each in again.snapshots for row in each.rows] == [1015.0]


def test_node_has_the_name_that_the_scrape_adds() -> None:
    """Two agents of one node, while one replaces the other, are one node."""
    old, new = ({**mismatch(f"10.0.0.{number}:9953"), "node": "worker-1"} for number in (1, 2))
    view, seen = view_of(1000.0, [(old, 7.0), (new, 1.0)], [(old, 0.5), (new, 1.0)], [], {})
    (line,) = rows(view, Order.TOTAL)
    assert (line.key.node, line.total, line.rate) == ("worker-1", 8, 1.5)
    again, _ = view_of(1015.0, [(new, 2.0), (old, 7.0)], [], [], seen)
    assert [row.last for each in again.snapshots for row in each.rows] == [1015.0]


def vector(*samples: tuple[dict[str, Any], str]) -> bytes:
    result = [{"metric": labels, "value": [1.0, value]} for labels, value in samples]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()


def test_values_that_are_not_counts_are_ignored() -> None:
    """Another exporter's counter, or a rate over an empty range."""
    bad = ("NaN", "+Inf", "-Inf", "-1", "1e308")
    totals = samples_of(vector((mismatch("a"), "3"), *((mismatch("b"), value) for value in bad)))
    assert totals == [(mismatch("a"), 3.0)]
    odd = samples_of(vector((mismatch("a", "9" * 5000), "3"), ({**mismatch("a"), "port": 53}, "4")))
    view, _ = view_of(1000.0, odd, odd, odd, {})
    assert sorted((line.key.port, line.total) for line in rows(view, Order.TOTAL)) == [(0, 3), (53, 4)]


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server on loopback that answers as the test wants; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def say(status: int, body: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_path_and_password_reach_the_server_and_no_findings_are_valid(serve: Callable[[Answer], str]) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, handler.headers["Authorization"]))
        say(200, json.dumps({"status": "success", "data": {"resultType": "vector", "result": []}}).encode())(handler)

    url = serve(answer).replace("http://", "http://me:p%40ss@") + "/prom/"
    source = PrometheusSource(url)
    view = source.read()
    assert (view.node_count, view.wrong, view.cluster) == (0, 0.0, True)
    assert rows(view, Order.RATE) == []
    assert set(asked) == {("/prom/api/v1/query", "Basic bWU6cEBzcw==")}
    assert "p%40ss" not in source.name


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"<html>a router</html>", "not from Prometheus' HTTP API"),
        (200, b"[]", "not from Prometheus' HTTP API"),
        (200, b'{"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}', "not a vector"),
        (200, b"x" * 5000, "more than 0 MiB"),
        (422, b'{"status": "error", "error": "query timed out"}', "422 query timed out"),
        (503, b"<html>", "503 Service Unavailable"),
        (400, json.dumps({"error": "\x1b]0;x\x07" * 100}).encode(), "400 \ufffd]0;x\ufffd"),
        (200, json.dumps({"status": "\x1b[2J", "data": {}, "error": "\x1b[2J"}).encode(), r"\(\ufffd\[2J\)"),
        (200, b"[" * 3000, "not from Prometheus' HTTP API"),
        (503, b"[" * 3000, "503 Service Unavailable"),
    ],
)
def test_response_that_is_not_prometheus_is_an_error(
    serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, reason: str
) -> None:
    monkeypatch.setattr(prometheus, "MAX_RESPONSE_BYTES", 3000)
    with pytest.raises(OSError, match=reason) as caught:
        PrometheusSource(serve(say(status, body))).read()
    assert str(caught.value).isprintable()


def test_response_that_is_not_http_is_an_error(serve: Callable[[Answer], str]) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH_9\x1b[2J\r\n")

    with pytest.raises(OSError, match="not from Prometheus' HTTP API") as caught:
        PrometheusSource(serve(answer)).read()
    assert str(caught.value).isprintable()


def test_invalid_numbers_are_an_error(serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "MAX_VALUE", float("inf"))
    with pytest.raises(OSError, match="infinity"):
        PrometheusSource(serve(say(200, vector(({**mismatch("a"), "what": "wrong"}, "+Inf"))))).read()


def test_slow_response_is_an_error(serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "TIMEOUT_SECONDS", 0.3)
    gone = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while not gone.wait(0.02):
                handler.wfile.write(b" ")
        except OSError:
            pass

    with pytest.raises(OSError, match="longer than"):
        PrometheusSource(serve(answer)).read()
    gone.set()


def test_refused_connection_is_an_error() -> None:
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        PrometheusSource("http://127.0.0.1:9").read()


@pytest.mark.parametrize("url", ["", "prometheus:9090", "file:///etc/passwd", "http://", "ftp://x"])
def test_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="http://HOST:PORT"):
        PrometheusSource(url)
