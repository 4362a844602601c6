"""One hostile client or upstream server: what other clients still get, and how much memory it costs."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator

import dns.flags
import dns.message
import pytest
from attacks import LONG_RECORD, TXT, long_answer
from dns_server import (
    PORT,
    Asked,
    FakeServer,
    Responder,
    ask,
    bare_query,
    connected,
    rcode,
    receive_message,
    right,
    send_message,
    texts,
)
from machine import AGENT_MEMORY, limited, memory_kib
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

NODE, CLIENT, OTHER, UPSTREAM = "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.2.0.2"
GOOD = ["192.0.2.80"]
LIMIT = 1_000  # --dns-forward-max, by default
LONG_ANSWERS = 900
QUESTIONS = 100  # of the other client, one every 30 ms


class Scene:
    """A client with hundreds of addresses, a node, and an upstream server's host."""

    def __init__(self, lab: Lab) -> None:
        self.node, self.client, self.servers = (lab.namespace(name) for name in ("node", "client", "servers"))
        lab.link(self.node, "eth0", self.client, "eth0")
        lab.link(self.node, "eth1", self.servers, "eth0")
        self.node.ip(f"addr add {NODE}/16 dev eth0", "addr add 10.2.0.1/24 dev eth1")
        self.client.ip(*(f"addr add 10.1.{each >> 8}.{each & 255}/16 dev eth0" for each in range(2, 600)))
        self.servers.ip(f"addr add {UPSTREAM}/24 dev eth0")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab() as lab:
        yield Scene(lab)


@contextlib.contextmanager
def running(namespace: Namespace, code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in its own process, so that the test does not slow it down."""
    process = namespace.popen([sys.executable, "-c", textwrap.dedent(code), *words])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe
            pipe.close()


# ---- upstream servers ----

#: Asks for one name in the cache over one TCP connection, over and over; prints the longest time, in milliseconds.
STOPWATCH = """
    import signal, socket, sys, time
    link = socket.create_connection((sys.argv[1], 53), 60)
    query, longest = bytes.fromhex(sys.argv[2]), 0.0
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    print("ready", flush=True)
    while not stopping:
        begun = time.monotonic()
        link.sendall(query)
        size, got = int.from_bytes(link.recv(2, socket.MSG_WAITALL), "big"), 0
        while got < size:
            got += len(link.recv(size - got))
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.001)
    print(int(longest * 1000), flush=True)
"""


def test_long_responses_released_at_once(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """900 responses of 60 KB: memory stays bounded, the event loop continues, and every refusal is counted."""
    held: list[Asked] = []

    def script(asked: Asked) -> bytes | None:
        if b"long" not in asked.data:
            return right(asked)
        if asked.tcp and not released.is_set():
            held.append(asked)
            released.wait(20)
        return long_answer(asked.data, asked.tcp)

    released = threading.Event()
    with FakeServer(scene.servers, UPSTREAM, script) as server, Responder(scene.node, f"--server={UPSTREAM}") as dnsd:
        server.tcp.listen(2 * LONG_ANSWERS)
        assert texts(ask(scene.client, NODE, "cached.example")) == GOOD
        query = bare_query("cached.example")
        words = NODE, (struct.pack("!H", len(query)) + query).hex()
        before = dnsd.resident_kib()
        with (
            limited(dnsd.process.pid, AGENT_MEMORY) as kept,
            running(scene.client, STOPWATCH, *words) as stopwatch,
            connected(scene.client, NODE) as client,
        ):
            assert stopwatch.stdout and stopwatch.stdout.readline() == b"ready\n"
            client.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
            for number in range(LONG_ANSWERS):
                client.send(bare_query(f"{number}.long.example", number))
            _wait_until_steady(held)
            released.set()
            answers = [dns.message.from_wire(client.recv(2000), raise_on_truncation=False) for _ in range(LONG_ANSWERS)]
            stopwatch.terminate()
            stalled = int(stopwatch.stdout.read())
            assert kept.oom_kills() == 0
        codes = Counter("long" if each.flags & 0x0200 else rcode(each) for each in answers)
        busy = dnsd.metric("upstream_failures_total", reason="busy")
        timeouts = dnsd.metric("upstream_failures_total", reason="timeout")
        grown = memory_kib(dnsd.process.pid, "VmHWM") - before
        with capsys.disabled():
            print(f" [{dict(codes)}, {busy} busy, {timeouts} timeouts: {grown >> 10} MB, {stalled} ms]", end="")
        assert grown < 50 << 10
        assert stalled < 300  # about 50 on an idle machine
        assert codes["long"] >= 64
        assert codes["REFUSED"] <= busy
        assert codes["SERVFAIL"] <= timeouts
        # Nothing is left behind, and all of it works as before.
        wait_for(lambda: dnsd.metric("in_flight") == 0, "everything to end")
        assert ask(scene.client, NODE, "1.after.long.example").flags & dns.flags.TC
        assert dnsd.metric("cache_bytes") <= 32 << 20


def _wait_until_steady(growing: list[Asked]) -> None:
    def is_steady() -> bool:
        before = len(growing)
        time.sleep(0.2)  # the thing under test: no more connections come
        return len(growing) == before > 0

    wait_for(is_steady, "all connections that will come")


# ---- clients ----

#: Sends RATE queries a second from each address in turn: %d in NAME is a number.
FLOOD = """
    import random, socket, struct, sys, time
    node, name, rate, *addresses = sys.argv[1:]
    links = []
    for address in addresses:
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        link.bind((address, 0))
        link.connect((node, 53))
        link.setblocking(False)
        links.append(link)
    begun, number, first = time.monotonic(), 0, random.getrandbits(30)
    while True:
        while number < (time.monotonic() - begun) * int(rate):
            text = name.replace("%d", str(first + number))
            wire = b"".join(bytes((len(each),)) + each.encode() for each in text.split(".")) + b"\\0\\0\\1\\0\\1"
            try:
                links[number % len(links)].send(struct.pack("!HHHHHH", number & 0xFFFF, 256, 1, 0, 0, 0) + wire)
            except OSError:
                pass
            number += 1
        time.sleep(0.001)
"""


def dead_zone(asked: Asked) -> bytes | None:
    return None if b"dead" in asked.data else right(asked)


def truncated(asked: Asked) -> bytes:
    """A response without records, with TC."""
    response = asked.reply()
    response.flags |= dns.flags.TC
    return response.to_wire()


@pytest.mark.parametrize(
    ("name", "rate", "addresses", "victim", "share"),
    [
        pytest.param("x%d.dead.example", 1_000, (CLIENT,), OTHER, 0.9, id="random names"),
        pytest.param("same.dead.example", 3_000, (CLIENT,), OTHER, 0.9, id="the same name"),
        pytest.param("x%d.dead.example", 1_000, (CLIENT,), CLIENT, 0.8, id="behind the same address"),
        pytest.param(
            "x%d.dead.example",
            1_000,
            tuple(f"10.1.{each >> 8}.{each & 255}" for each in range(10, 510)),
            OTHER,
            0.9,
            id="from hundreds of addresses",
        ),
    ],
)
def test_flood_of_one_client(
    scene: Scene,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rate: int,
    addresses: tuple[str, ...],
    victim: str,
    share: float,
) -> None:
    """Queries for a dead zone: another client's uncached queries still get responses."""
    with (
        FakeServer(scene.servers, UPSTREAM, dead_zone),
        Responder(scene.node, f"--server={UPSTREAM}") as dnsd,
        running(scene.client, FLOOD, NODE, name, str(rate), *addresses),
    ):
        full = LIMIT if "%d" in name else 1
        wait_for(lambda: dnsd.metric("in_flight") >= full, "the limit to be reached")
        wait_for(lambda: dnsd.metric("forward_rejects_total") > 0, "the first to be refused")
        codes: Counter[str] = Counter()
        for number in range(QUESTIONS):
            with scene.client.socket() as link:
                link.bind((victim, 0))
                link.settimeout(2)
                link.connect((NODE, PORT))
                link.send(bare_query(f"n{number}.alive.example", number))
                try:
                    codes[rcode(dns.message.from_wire(link.recv(2000)))] += 1
                except TimeoutError:
                    codes["nothing"] += 1
            time.sleep(0.03)  # the thing under test: a client that asks now and then
        rejects = {
            reason: dnsd.metric("forward_rejects_total", reason=reason)
            for reason in ("servers", "shed", "repeat", "queue_share")
        }
        with capsys.disabled():
            print(f" [{dict(codes)}, {rejects}]", end="")
        assert codes["NOERROR"] >= share * QUESTIONS
        assert rejects["shed" if "%d" in name else "repeat"] > 0
        assert dnsd.metric("in_flight") <= LIMIT


def test_names_that_hang_over_tcp(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """All responses of a server are truncated, and it never responds over TCP to the names of one client. The names of
    others are not refused, and do not wait behind these."""

    def script(asked: Asked) -> bytes | None:
        if not asked.tcp:
            return truncated(asked)
        if b"dead" in asked.data:
            done.wait(30)
            return None
        return right(asked)

    done = threading.Event()
    with FakeServer(scene.servers, UPSTREAM, script), Responder(scene.node, f"--server={UPSTREAM}") as dnsd:
        with running(scene.client, FLOOD, NODE, "x%d.dead.example", "200", OTHER):
            wait_for(lambda: dnsd.samples("udpwatch_dns_upstream_failures_total"), "the first to time out")
            slowest = 0.0
            for number in range(QUESTIONS):
                started = time.monotonic()
                response = ask(scene.client, NODE, f"n{number}.alive.example")
                slowest = max(slowest, time.monotonic() - started)
                assert texts(response) == GOOD, number
                time.sleep(0.03)  # the thing under test: a client that asks now and then
        done.set()
        with capsys.disabled():
            print(f" [slowest {slowest * 1000:.0f} ms]", end="")
        assert dnsd.metric("upstream_failures_total", reason="busy") > 0, "the attack has not filled the slots"


# ---- clients that do not read ----


def test_slow_readers_of_many_addresses(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """500 connections of 20 clients ask for 60 KB and read nothing: memory is bounded, also the kernel's, a client
    that reads is answered, and what was closed is counted."""
    query = bare_query("huge.test", kind=TXT)
    records = [f"--{each}" for each in LONG_RECORD]
    with Responder(scene.node, *records) as dnsd, contextlib.ExitStack() as stack:
        kept = stack.enter_context(limited(dnsd.process.pid, AGENT_MEMORY))
        before = dnsd.resident_kib()
        for number in range(500):
            link = stack.enter_context(scene.client.socket(socket.AF_INET, socket.SOCK_STREAM))
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            link.bind((f"10.1.1.{number % 20}", 0))
            link.settimeout(10)
            link.connect((NODE, PORT))
            with contextlib.suppress(OSError):
                link.send((struct.pack("!H", len(query)) + query) * 20)
        wait_for(lambda: dnsd.metric("tcp_connections_closed_total", reason="held") > 0, "memory to be full")
        kernel_kib = _socket_kib(scene.node)
        answered = 0
        for number in range(20):
            with connected(scene.client, NODE, socket.SOCK_STREAM) as link:
                send_message(link, bare_query("huge.test", number, kind=TXT))
                with contextlib.suppress(OSError):
                    answered += len(receive_message(link)) > 50_000
        held, closed = dnsd.metric("tcp_held_bytes"), dnsd.metric("tcp_connections_closed_total", reason="held")
        grown = memory_kib(dnsd.process.pid, "VmHWM") - before
        with capsys.disabled():
            print(f" [{grown >> 10} MB, {kernel_kib >> 10} MB of the kernel, {closed} closed]", end="")
        assert answered == 20
        assert held <= 16 << 20
        assert grown < 40 << 10
        assert kernel_kib < 40 << 10
        assert kept.oom_kills() == 0
        wait_for(lambda: dnsd.metric("tcp_connections_closed_total", reason="slow") > 0, "the rest to be given up")
    del stack


def _socket_kib(namespace: Namespace) -> int:
    """The kernel's memory for TCP connections on port 53 (ss(8), skmem: r, t, w)."""
    with running(
        namespace, "import subprocess; print(subprocess.check_output(['ss', '-tmnH', 'sport = :53'], text=True))"
    ) as process:
        assert process.stdout
        text = process.stdout.read().decode()
    found = re.findall(r"skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f\d+,w(\d+)", text)
    assert found, text
    return sum(int(received) + int(queued) for received, queued in found) >> 10


# ---- the log ----


def test_rebind_attack_does_not_fill_the_log(scene: Scene) -> None:
    with (
        FakeServer(scene.servers, UPSTREAM, lambda asked: asked.answer("60 A 192.168.0.1")),
        Responder(scene.node, f"--server={UPSTREAM}", "--stop-dns-rebind") as dnsd,
    ):
        for number in range(100):
            assert rcode(ask(scene.client, NODE, f"n{number}.example")) == "REFUSED"
        assert dnsd.stop() == 0
        lines = [line for line in dnsd.log if "possible DNS-rebind attack detected" in line]
        assert len(lines) == 6, lines
        assert "left out 95 more lines like this, the last: " in lines[-1]
        dnsd.process.poll = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("descriptors", [64, 128])
@pytest.mark.parametrize("same", [True, False], ids=["the same server", "another server"])
def test_few_descriptors_beside_a_flood(scene: Scene, descriptors: int, same: bool) -> None:
    """A client asks for names that the server never answers, so that their sockets stay open. Others are served."""
    other = "10.2.0.3"

    def script(asked: Asked) -> bytes | None:
        return right(asked) if asked.name.endswith("good.example.") else None

    def flood() -> None:
        with scene.client.socket() as link:
            link.bind((OTHER, 0))
            number = 0
            while not done.is_set():
                link.sendto(bare_query(f"hole{number}.bad.example", number & 0xFFFF), (NODE, PORT))
                number += 1
                time.sleep(1 / 300)

    scene.servers.ip(f"addr replace {other}/24 dev eth0")
    servers = (f"--server={UPSTREAM}", f"--server=/good.example/{UPSTREAM if same else other}")
    done = threading.Event()
    with FakeServer(scene.servers, UPSTREAM, script), FakeServer(scene.servers, other, script):
        with Responder(scene.node, *servers, wrapper=("prlimit", f"--nofile={descriptors}:{descriptors}")) as running:
            attacker = threading.Thread(target=flood)
            attacker.start()
            try:
                time.sleep(3)  # as long as the sockets' queries pile up
                for number in range(100):
                    assert texts(ask(scene.client, NODE, f"n{number}.good.example")) == GOOD
            finally:
                done.set()
                attacker.join()
            assert running.metric("upstream_failures_total", reason="busy") == 0
