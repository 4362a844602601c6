"""The HTTP server alone; integration/test_agent.py tests it with slow clients."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.daemon import http
from udpwatch.agent.daemon.http import MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT, MAX_REQUEST_BYTES, HttpServer
from udpwatch.agent.errors import UdpwatchError

LONG_HEADERS = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 65_000) for number in range(99))


@contextlib.contextmanager
def serving(metrics: Callable[[], bytes] = lambda: b"metrics") -> Iterator[HttpServer]:
    view = HttpServer("127.0.0.1", 0)
    view.start(metrics, lambda: (True, "well"), lambda: (False, "not yet"))
    try:
        yield view
    finally:
        view.stop()


def connect(url: str, source: str = "127.0.0.1") -> socket.socket:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=5, source_address=(source, 0))


def respond(link: socket.socket, path: str = "/healthz") -> bytes:
    """Send a request over this connection; returns the whole response, b"" when the connection was closed."""
    with link, contextlib.suppress(ConnectionError):
        link.sendall(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        return b"".join(iter(lambda: link.recv(65_536), b""))
    return b""


def closed(view: HttpServer, reason: str) -> float:
    """Return the count of connections that were closed early."""
    (family,) = view.collector.collect()
    return next(sample.value for sample in family.samples if sample.labels == {"reason": reason})


def test_server_does_not_spin_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits before it accepts again, and serves the connection once there are descriptors."""
    attempts, pauses, sleep = Counter[str](), Counter[str](), time.sleep
    accept = http._Server.get_request

    def fail(server: http._Server) -> tuple[socket.socket, object]:
        attempts["http"] += 1
        if attempts["http"] > 5:
            return accept(server)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def pause(seconds: float) -> None:
        pauses[threading.current_thread().name] += 1
        sleep(seconds)

    monkeypatch.setattr(http._Server, "get_request", fail)
    monkeypatch.setattr(http.time, "sleep", pause)
    with serving() as view:
        assert respond(connect(view.url)).startswith(b"HTTP/1.0 200")
    assert (attempts["http"], pauses["http"]) == (6, 5)


def test_server_can_be_stopped_before_its_start() -> None:
    """The agent closes what it opened even when it never started it; that must not wait forever."""
    view = HttpServer("127.0.0.1", 0)
    stopping = threading.Thread(target=view.stop, daemon=True)
    stopping.start()
    stopping.join(5)
    assert not stopping.is_alive()


def test_pages_are_served_over_ipv6() -> None:
    view = HttpServer("::1", 0)
    view.start(lambda: b"metrics", lambda: (True, "well"), lambda: (False, "not yet"))
    try:
        assert view.url.startswith("http://[::1]:")
        with urllib.request.urlopen(view.url + "/metrics", timeout=5) as answer:
            assert answer.read() == b"metrics"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(view.url + "/readyz", timeout=5)
        with refused.value as answer:
            assert (answer.code, answer.read()) == (503, b"not yet\n")
    finally:
        view.stop()


# ---- ports in use ----


def test_used_port_is_bound_once_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BIND_SECONDS", 0.05)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        view = HttpServer("127.0.0.1", port)
        view.start(lambda: b"metrics", lambda: (True, "well"), lambda: (True, "ready"))
        assert view.problem == f"cannot listen on 127.0.0.1:{port} for metrics: Address already in use"
        assert view.url == ""
    try:
        wait_for(lambda: not view.problem, "the port")
        assert respond(connect(view.url)).endswith(b"well\n")
    finally:
        view.stop()


def test_server_can_be_stopped_while_the_port_is_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        view = HttpServer("127.0.0.1", other.getsockname()[1])
        view.start(lambda: b"metrics", lambda: (True, "well"), lambda: (True, "ready"))
        begun = time.monotonic()
        view.stop()
        assert time.monotonic() - begun < http.BIND_SECONDS


def test_missing_address_is_a_problem_that_may_pass() -> None:
    """192.0.2.0/24 is for documentation (RFC 5737): no host has it."""
    view = HttpServer("192.0.2.1", 9953)
    assert view.problem == "cannot listen on 192.0.2.1:9953 for metrics: Cannot assign requested address"
    view.stop()


@pytest.mark.parametrize("host", ["a..b", "255.255.255.255.255"])
def test_invalid_address_is_refused(host: str) -> None:
    with pytest.raises(UdpwatchError, match=f"cannot listen on {host}:80 .*--metrics-listen off"):
        HttpServer(host, 80)


# ---- limits ----


def test_long_headers_are_refused() -> None:
    with serving() as view:
        with connect(view.url) as link:
            link.sendall(b"GET /metrics HTTP/1.0\r\nX: " + b"x" * (MAX_REQUEST_BYTES - 25))  # one too many
            assert link.recv(100).startswith(b"HTTP/1.0 431 ")
        wait_for(lambda: closed(view, "size") == 1, "closed connections")
        with connect(view.url) as link:
            padding = MAX_REQUEST_BYTES - len(b"GET /healthz HTTP/1.0\r\nX: \r\n\r\n")
            link.sendall(b"GET /healthz HTTP/1.0\r\nX: " + b"x" * padding + b"\r\n\r\n")
            assert link.recv(100).startswith(b"HTTP/1.0 200 ")
        assert closed(view, "size") == 1


def test_many_short_headers_are_refused() -> None:
    """The limit applies to the sum, 99 headers of 1,000 octets here."""
    with serving() as view, connect(view.url) as link:
        with contextlib.suppress(ConnectionError):
            link.sendall(b"GET /metrics HTTP/1.0\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 99)
        wait_for(lambda: closed(view, "size") == 1, "closed connections")


def test_long_request_line_is_refused() -> None:
    with serving() as view, connect(view.url) as link:
        link.sendall(b"GET /" + b"x" * (MAX_REQUEST_BYTES - 4))
        assert link.recv(100).startswith(b"HTTP/1.0 414 ")
        wait_for(lambda: closed(view, "size") == 1, "closed connections")


SERVER = """
from udpwatch.agent.daemon.http import HttpServer
view = HttpServer("127.0.0.1", 0)
view.start(lambda: b"metrics", lambda: (True, "well"), lambda: (True, "ready"))
print(view.url, flush=True)
input()
"""


def test_long_headers_on_all_connections_take_little_memory() -> None:
    """32 connections with 99 headers of 65,000 octets once took 370 MB. Meanwhile another client is answered."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin and server.stdout
        url = server.stdout.readline().strip()
        peak_before = peak_kib(server.pid)

        def attack() -> None:
            with connect(url, "127.0.0.2") as link, contextlib.suppress(OSError):
                link.sendall(b"GET /metrics HTTP/1.1\r\n" + LONG_HEADERS)
                link.recv(100)

        threads = [threading.Thread(target=attack, daemon=True) for _ in range(MAX_CONNECTIONS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert respond(connect(url, "127.0.0.3")).endswith(b"well\n")
        grown = peak_kib(server.pid) - peak_before
        server.communicate("\n", timeout=10)
    assert grown < 8_192


def peak_kib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found.group(1))


def test_client_with_too_many_connections_loses_its_own() -> None:
    with serving() as view:
        innocent = [connect(view.url, "127.0.0.2") for _ in range(MAX_CONNECTIONS_PER_CLIENT)]
        greedy = [connect(view.url, "127.0.0.3") for _ in range(3 * MAX_CONNECTIONS)]
        wait_for(
            lambda: closed(view, "client") == 3 * MAX_CONNECTIONS - MAX_CONNECTIONS_PER_CLIENT, "closed connections"
        )
        assert all(respond(link).endswith(b"well\n") for link in innocent)
        assert all(respond(link).endswith(b"well\n") for link in greedy[-MAX_CONNECTIONS_PER_CLIENT:])
        assert not any(respond(link) for link in greedy[:-MAX_CONNECTIONS_PER_CLIENT])
        assert closed(view, "full") == 0


def test_full_server_closes_a_connection_of_the_client_with_the_most() -> None:
    with serving() as view:
        oldest = connect(view.url, "127.0.0.2")
        others = [
            connect(view.url, f"127.0.0.{client}")
            for client in range(3, 3 + MAX_CONNECTIONS // MAX_CONNECTIONS_PER_CLIENT)
            for _ in range(MAX_CONNECTIONS_PER_CLIENT)
        ]
        wait_for(lambda: closed(view, "full") == 1, "closed connections")
        assert respond(oldest).endswith(b"well\n")
        for link in others:
            link.close()
        assert closed(view, "client") == 0


class Closed:
    """A budget that is used up until the test opens it, for one connection or for all."""

    def __init__(self) -> None:
        self.places = 0.0

    def delay(self) -> float:
        if self.places >= 1:
            self.places -= 1
            return 0.0
        return 60.0


def test_client_that_has_cost_less_goes_first_when_cpu_is_short() -> None:
    with serving() as view:
        assert respond(connect(view.url, "127.0.0.3")).endswith(b"well\n")  # it has cost something by now
        wait_for(lambda: not view._server._open, "that connection to end")  # type: ignore[union-attr]
        budget = view._server._budget = Closed()  # type: ignore[union-attr, assignment]
        greedy = [connect(view.url, "127.0.0.3") for _ in range(MAX_CONNECTIONS_PER_CLIENT + 2)]
        innocent = connect(view.url, "127.0.0.2")
        wait_for(lambda: len(view._server._open) == MAX_CONNECTIONS_PER_CLIENT + 1, "open connections")  # type: ignore[union-attr]
        assert closed(view, "client") == 2, "those that wait count, and are closed at once"
        assert greedy[0].recv(10) == b""
        budget.places = 1
        assert respond(innocent).endswith(b"well\n")
        budget.places = math.inf
        assert all(respond(link).endswith(b"well\n") for link in greedy[2:])
        greedy[0].close()
        greedy[1].close()


def test_new_client_does_not_go_before_one_that_has_been_served_for_long() -> None:
    with serving() as view:
        server = view._server
        assert server
        for _ in range(20):  # a scraper; in all it has cost more than the newcomer will
            assert respond(connect(view.url, "127.0.0.2")).endswith(b"well\n")
        wait_for(lambda: not server._open, "the end of these connections")
        budget = server._budget = Closed()  # type: ignore[assignment]
        with contextlib.ExitStack() as links:
            scraper, *newcomers = [
                links.enter_context(connect(view.url, source))
                for source in ["127.0.0.2", *["127.0.0.3"] * MAX_CONNECTIONS_PER_CLIENT]
            ]
            for link in (scraper, *newcomers):
                link.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            wait_for(lambda: len(server._waiting) == 1 + len(newcomers), "waiting connections")
            for left in range(len(newcomers), 2, -1):
                budget.places = 1
                wait_for(lambda left=left: len(server._open) == left, "the end of one")  # type: ignore[misc]
            scraper.settimeout(0.1)
            assert scraper.recv(10)
            budget.places = math.inf


def test_connections_that_are_accepted_do_not_stop_those_that_wait_for_the_cpu() -> None:
    class Busy:
        """A budget that accepting alone uses up."""

        asked = 0

        def delay(self) -> float:
            self.asked += 1
            return 0.05

    with serving() as view:
        budget = view._server._budget = Busy()  # type: ignore[union-attr, assignment]
        links = [connect(view.url) for _ in range(MAX_CONNECTIONS_PER_CLIENT)]
        assert all(respond(link).endswith(b"well\n") for link in links)
        assert budget.asked > len(links), "each of them has waited"


def test_client_is_an_ipv4_address_or_an_ipv6_network() -> None:
    assert http._client_of("192.0.2.1") == http._client_of("::ffff:192.0.2.1") != http._client_of("::ffff:192.0.2.2")
    assert http._client_of("fe80::1%lo") == http._client_of("fe80::2") != http._client_of("fe80:0:0:1::1")


def test_simultaneous_requests_share_a_page() -> None:
    """32 requests at once take neither 32 times the memory of a page nor 32 threads' work."""
    made, go_on, begun = 0, threading.Event(), threading.Event()

    def metrics() -> bytes:
        nonlocal made
        made += 1
        begun.set()
        go_on.wait(10)
        return b"%d" % made

    with serving(metrics) as view:
        links = [connect(view.url, f"127.0.0.{2 + number % 4}") for number in range(MAX_CONNECTIONS)]
        for link in links[:1]:
            link.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert begun.wait(5)
        for link in links[1:]:
            link.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        time.sleep(0.2)  # for them to be read; one that is late would only share the next page
        go_on.set()
        pages = [link.makefile("rb").read().rpartition(b"\n")[2] for link in links]
        for link in links:
            link.close()
        assert pages[0] == b"1"
        assert b"1" not in pages[1:]  # it was begun before they asked
        assert made < MAX_CONNECTIONS / 2
