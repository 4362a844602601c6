"""What one tenant, one client or one upstream server may do to a node: each attack in processes of its own.

The attackers are without a capability where they are containers, and of the lowest priority, so that they take no CPU
from what they attack: that is the matter of the agent's own limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import cast

from dns_server import bare_query
from scene import ask, bound

from udpwatch.agent.testing.lab import Namespace

NOBODY = 65534
GREEDY_PROCESSES = 8
PR_SET_NAME = 15  # include/uapi/linux/prctl.h
TXT = 16
#: for a responder: 55 KB of one name
LONG_RECORD = tuple(f"txt-record=huge.test,{each:0240}" for each in range(230))
_libc = ctypes.CDLL(None)


def in_container(cgroup: Path, function: Callable[[], None]) -> Callable[[], None]:
    """Run a function as nobody in a cgroup, with a pod's small share of the CPU that has requested none."""

    def run() -> None:
        os.nice(19)
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        function()

    return run


@contextmanager
def attacking(namespace: Namespace, name: str, function: Callable[[], None]) -> Iterator[None]:
    """A process of the lowest priority that does this over and over."""

    def run() -> None:
        os.nice(19)
        function()

    child = namespace.spawn(name, run)
    try:
        yield
        assert os.waitpid(child.pid, os.WNOHANG) == (0, 0), f"{name} has ended"
    finally:
        child.stop()


# ---- wrong replies ----


@contextmanager
def greedy(namespace: Namespace, cgroup: Path, port: int) -> Iterator[None]:
    """Processes that answer wrongly as fast as they can, each time under another name: a finding each, with events."""
    with ExitStack() as opened:
        children = []
        for number in range(GREEDY_PROCESSES):
            server = opened.enter_context(bound(namespace, socket.AF_INET, "0.0.0.0", port + number))
            client = opened.enter_context(namespace.socket())
            _, peer = ask(client, "127.0.0.2", port + number, server)

            def pour(server: socket.socket = server, peer: tuple[str, int] = peer) -> None:
                for turn in count():
                    _libc.prctl(PR_SET_NAME, f"greedy-{turn % 5000}".encode(), 0, 0, 0)
                    for _ in range(4):
                        server.sendto(b"x", peer)

            children.append(namespace.spawn("greedy", in_container(cgroup, pour)))
        try:
            yield
        finally:
            for child in children:
                child.stop()


def keep_asking(client: socket.socket, port: int) -> None:
    """Ask a server at an address that it does not answer from, ten times a second."""
    client.settimeout(0.1)
    while True:
        client.sendto(b"question", ("127.0.0.2", port))
        with suppress(TimeoutError):
            while client.recv(100):
                pass


@contextmanager
def flood_of_flows(namespace: Namespace, load: Path, seconds: float) -> Iterator[None]:
    """New flows for conntrack, as many as go; ``load``: load.c, compiled. Of one address there are 64,000."""
    words = ["nice", "-n19", str(load), "flood", "127.1.0.1", "40", "127.0.0.2", "9", "0", str(seconds)]
    with namespace.popen(words) as process:
        try:
            yield
        finally:
            process.kill()
            process.communicate()


# ---- DNS ----


def ask_names(namespace: Namespace, server: str, domain: str, rate: int) -> None:
    """So many random names of a domain a second."""
    begin = time.monotonic()
    with namespace.socket() as client:
        client.setblocking(False)
        for number in count():
            while number > (time.monotonic() - begin) * rate:
                time.sleep(0.005)
            with suppress(BlockingIOError):
                client.sendto(bare_query(f"x{number}.{domain}", number & 0xFFFF), (server, 53))
                while client.recv(2000):
                    pass


def long_answer(query: bytes, tcp: bool) -> bytes:
    """60 KB of addresses over TCP; over UDP, that there is more."""
    question = query[12 : 12 + query[12:].index(b"\0") + 5]
    if not tcp:
        return query[:2] + struct.pack("!HHHHH", 0x8380, 1, 0, 0, 0) + question
    number = (60_000 - len(question)) // 16
    records = b"".join(b"\xc0\x0c" + struct.pack("!HHIHI", 1, 1, 300, 4, each) for each in range(number))
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, number, 0, 0) + question + records


def let_go_at_once(namespace: Namespace, address: str, seconds: float) -> None:
    """An upstream server that holds its long answers, and lets go of all that it holds every so many seconds."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            await gate.wait()
            answer = long_answer(query, tcp=True)
            writer.write(struct.pack("!H", len(answer)) + answer)
            await writer.drain()
        writer.close()

    class Truncating(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)  # no subclass of it before Python 3.12

        def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
            self.transport.sendto(long_answer(data, tcp=False), peer)

    async def serve() -> None:
        await asyncio.get_running_loop().create_datagram_endpoint(Truncating, (address, 53))
        await asyncio.start_server(converse, address, 53, backlog=1000)
        while True:
            await asyncio.sleep(seconds)
            gate.set()
            await asyncio.sleep(0.1)
            gate.clear()

    with namespace.entered():
        gate = asyncio.Event()
        asyncio.run(serve())


def take_nothing(namespace: Namespace, server: str, sources: Sequence[str], connections: int) -> None:
    """So many TCP connections that ask for LONG_RECORD 20 times and take nothing; a new one for each that ends."""
    query = bare_query("huge.test", kind=TXT)
    links: dict[int, socket.socket] = {}
    poll = select.poll()
    for number in count():
        if len(links) >= connections:
            for fd, _ in poll.poll(1000):
                poll.unregister(fd)
                links.pop(fd).close()
            continue
        link = namespace.socket(kind=socket.SOCK_STREAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.settimeout(1)
        with suppress(OSError):
            link.bind((sources[number % len(sources)], 0))
            link.connect((server, 53))
            link.send((struct.pack("!H", len(query)) + query) * 20)
        links[link.fileno()] = link
        poll.register(link, select.POLLRDHUP | select.POLLHUP | select.POLLERR)


# ---- HTTP ----


def send_headers(namespace: Namespace, server: str) -> None:
    """32 connections with headers without an end, again and again."""
    lines = b"x: " + b"a" * 65_000 + b"\r\n"
    while True:
        with ExitStack() as opened:
            for _ in range(32):
                client = opened.enter_context(namespace.socket(kind=socket.SOCK_STREAM))
                client.settimeout(1)
                with suppress(OSError):
                    client.connect((server, 9953))
                    client.sendall(b"GET / HTTP/1.0\r\n" + lines * 99)


# ---- cgroups ----


@contextmanager
def delegated(root: Path, number: int) -> Iterator[Path]:
    """A cgroup with so many in it, as a user makes them in a tree of its own."""
    folder = root / "user-1000.slice"
    made = [folder, *(folder / str(each) for each in range(number))]
    try:
        for each in made:
            each.mkdir()
        yield folder
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
