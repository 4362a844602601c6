"""The metrics port under a client that sends all that it can: `udpwatch run` and `udpwatch dns` serve it alike."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

from agents import Agent
from dns_server import METRICS, Responder
from machine import AGENT_MEMORY, limited, memory_kib

from udpwatch.agent.testing.lab import Lab, Namespace

#: what http.server takes by itself, but for the last header
LONG_HEADERS = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 65_000) for number in range(99))
CLIENTS = 32
MAX_GROWN_KIB = 8_192


def test_long_headers_take_no_memory_of_the_agent(folder: Path) -> None:
    with Lab() as lab:
        node = lab.namespace("node")
        with Agent(folder, "--metrics-listen=127.0.0.1:9953", preexec_fn=node.enter_in_child) as agent:
            assert flooded(node, agent.pid) < MAX_GROWN_KIB
            assert agent.process.poll() is None


def test_long_headers_take_no_memory_of_the_responder() -> None:
    with Lab() as lab:
        node = lab.namespace("node")
        with Responder(node) as responder:
            assert flooded(node, responder.process.pid) < MAX_GROWN_KIB
            assert 'http_connections_closed_total{reason="size"}' in responder.get("/metrics")[1]


def flooded(node: Namespace, pid: int) -> int:
    """Flood the port from one address and ask from another; by how many KiB the process's peak has grown, which has
    the memory that the chart gives it."""
    with limited(pid, AGENT_MEMORY) as kept:
        grown = _flooded(node, pid)
        assert kept.oom_kills() == 0
    return grown


def _flooded(node: Namespace, pid: int) -> int:
    before = memory_kib(pid, "VmHWM")
    threads = [threading.Thread(target=lambda: exchange(node, "127.0.0.2", LONG_HEADERS)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    asked = 0
    while any(thread.is_alive() for thread in threads) or not asked:
        assert exchange(node, "127.0.0.3", b"\r\n").startswith(b"HTTP/1.0 200 ")
        asked += 1
    for thread in threads:
        thread.join()
    return memory_kib(pid, "VmHWM") - before


def exchange(node: Namespace, source: str, headers: bytes) -> bytes:
    """Ask /healthz with these headers; what came back before the connection ended."""
    received = b""
    with node.socket(kind=socket.SOCK_STREAM) as link, contextlib.suppress(ConnectionError):
        link.settimeout(10)
        link.bind((source, 0))
        host, port = METRICS.split(":")
        link.connect((host, int(port)))
        link.sendall(b"GET /healthz HTTP/1.1\r\n" + headers)
        while data := link.recv(1000):
            received += data
    return received
