"""The agent's socket: any bytes get a response or the end of the connection, and disturb no other client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzzing import mutated, rounds, values
from hypothesis import example, given
from hypothesis import strategies as st
from top_snapshots import row, snapshot

from udpwatch.agent.client.connection import Client
from udpwatch.agent.daemon import api
from udpwatch.agent.daemon.api import Api, bind
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.model import Healing

REQUESTS: list[Any] = [
    {"get": "snapshot"},
    {"get": "doctor"},
    {"get": "events", "limit": 10},
    {"get": "heal"},
    {"heal": "on", "ports": [53]},
    {"heal": "off", "ports": []},
    {"follow": "events"},
]
EVENT = {"port": 53, "process": "x"}
SECONDS = 20.0  # for a response; far more than it takes


class Served:
    """An Api in a thread of its own, with what it was told to heal and what the event loop complained of."""

    def __init__(self, path: Path) -> None:
        self.path, self.faults, self.switched = path, list[dict[str, Any]](), list[tuple[bool | None, list[int]]]()
        self._thread = ThreadPoolExecutor(1)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _loop, context: self.faults.append(context))
        self._running = self._thread.submit(self._loop.run_forever)
        self.api = Api(bind(path), path, lambda: snapshot(row()), lambda: {"version": "1"}, self._heal)
        self._call(self.api.start())

    def _heal(self, on: bool | None, ports: list[int]) -> Healing:
        self.switched.append((on, ports))
        if 1 in ports:
            raise UdpwatchError("cannot heal port 1")
        return Healing("x", bool(on), False)

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def close(self) -> None:
        self._call(self.api.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._running.result(SECONDS)
        self._loop.close()
        self._thread.shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("api") / "s")
    yield made
    made.close()
    assert not made.path.exists()
    assert made.faults == []


def responses(path: Path, pieces: list[bytes]) -> list[Any]:
    """Send the pieces, then the end; return all responses until the agent closes the connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while data := client.recv(1 << 16):
                received += data
    return [json.loads(line) for line in received.splitlines(keepends=True) if line.endswith(b"\n")]


lines = st.one_of(
    mutated(REQUESTS).map(lambda request: json.dumps(request).encode() + b"\n"),
    values.map(lambda request: json.dumps(request).encode() + b"\n"),
    st.binary(max_size=200),
    st.binary(max_size=50).map(lambda data: data + b"\n"),
    st.sampled_from([b"\n", b"\0\n", b"{\n", b"[" * 50_000 + b"\n", b'{"a":' * 10_000 + b"\n", b"x" * (1 << 17)]),
    st.sampled_from(["utf-16", "utf-32"]).map(lambda code: json.dumps(REQUESTS[0]).encode(code) + b"\n"),
)


@rounds(300)
@given(pieces=st.lists(lines, max_size=5))
@example(pieces=[b'{"heal": "on", "ports": [1]}\n'])
@example(pieces=[b'{"heal": "on", "ports": [true, 1.0, "53"]}\n'])
@example(pieces=[b'{"get": "events", "limit": 1' + b"0" * 5000 + b"}\n"])
def test_any_bytes_get_a_response_or_the_end(served: Served, pieces: list[bytes]) -> None:
    served.api.post([EVENT])
    switched = len(served.switched)
    got = responses(served.path, pieces)
    assert len(got) <= sum(piece.count(b"\n") for piece in pieces) + 2  # of followed events
    for response in got:
        assert response["v"] == 1
        kinds = response.keys() - {"v"}
        assert kinds in ({"snapshot"}, {"doctor"}, {"events"}, {"heal"}, {"error"}, {"following"}, {"event"}, {"lost"})
    for on, ports in served.switched[switched:]:
        assert on in (True, False, None)
        assert all(type(port) is int and 0 < port < 65536 for port in ports)
    with Client(served.path, SECONDS) as other:
        assert len(other.snapshot().rows) == 1
    assert served.faults == []


def test_line_without_an_end_closes_its_connection(served: Served) -> None:
    """Every client is closed: for its line, or because there are too many."""
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3 * api.MAX_CLIENTS)]
    try:
        for client in clients:
            client.settimeout(SECONDS)
            client.connect(str(served.path))
        for client in clients:
            with suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(1000):
                    client.sendall(b"x" * 4096)
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
    finally:
        for client in clients:
            client.close()
    assert served.faults == []
