"""A real `udpwatch dns` in a namespace, upstream servers that follow a test's script, and clients."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from agents import Command
from waiting import wait_for

from udpwatch.agent.testing.lab import Namespace

PORT = 53
ANSWER_SECONDS = 6.0  # a client gets a response or SERVFAIL within this time, whatever the upstream servers do
LOG_SECONDS = 0.3  # from an event to its line
SO_RCVBUFFORCE = 33
METRICS = "127.0.0.1:9953"


def needs(program: str, package: str) -> None:
    """Skip the test if a program is missing."""
    if not shutil.which(program):
        pytest.skip(f"{program} is missing: apt-get install {package}")


class Responder(Command):
    """`udpwatch dns` in a namespace, without the machine's own files; ready when the constructor returns."""

    url = f"http://{METRICS}"

    def __init__(self, namespace: Namespace, *options: str, ready: bool = True, wrapper: tuple[str, ...] = ()) -> None:
        self.namespace = namespace
        files = [] if any(each.startswith("--resolv-file") for each in options) else ["--no-resolv"]
        # Only their owner can enter pytest's folders.
        user = ["--user=root"] if any(tempfile.gettempdir() in each for each in options) else []
        user = [] if any(each.startswith("--user") for each in options) else user
        arguments = ("dns", "--no-hosts", *files, *user, *options)
        super().__init__(*arguments, ready=ready, wrapper=wrapper, preexec_fn=namespace.enter_in_child)

    def has_logged(self, text: str) -> bool:
        """Whether a log line contains this text. A thread writes the log: what happened just now may be logged soon."""
        end = time.monotonic() + LOG_SECONDS
        while not (found := any(text in line for line in list(self.log))) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def get(self, path: str) -> tuple[int, str]:
        """Send an HTTP request in its namespace; returns status and body."""
        with self.namespace.entered():
            return super().get(path)

    def metric(self, name: str, **labels: str) -> int:
        """Return the sum of the series udpwatch_dns_NAME that have these labels; there is at least one series."""
        samples = self.samples(f"udpwatch_dns_{name}")
        assert samples, f"no series of udpwatch_dns_{name}"
        return int(sum(sample.value for sample in samples if labels.items() <= sample.labels.items()))

    def reload(self) -> None:
        """Send SIGHUP and wait for the reload."""
        before = self.metric("hosts_reloads_total") + self.metric("hosts_reload_errors_total")
        self.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: self.metric("hosts_reloads_total") + self.metric("hosts_reload_errors_total") > before, "a reload"
        )

    def descriptors(self) -> int:
        """Open files."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Stop and wait; returns the exit status."""
        return super().stop(number, seconds)

    def __exit__(self, *_: object) -> None:
        healthy = self.process.poll() is None
        self.stop(signal.SIGKILL)
        assert healthy, self.log
        for line in self.log:
            assert "Traceback" not in line and "never retrieved" not in line, "\n".join(self.log)


#: What a fake server sends for a query, in order; None: nothing
Script = Callable[["Asked"], bytes | list[bytes] | None]


class Asked:
    """A query that reached a fake server."""

    def __init__(self, data: bytes, peer: tuple[str, int], tcp: bool, link: socket.socket) -> None:
        self.data, self.peer, self.tcp, self.link = data, peer, tcp, link
        self.id = int.from_bytes(data[:2], "big")

    @functools.cached_property
    def message(self) -> dns.message.Message:
        return dns.message.from_wire(self.data)

    @property
    def name(self) -> str:
        return self.message.question[0].name.to_text()

    @property
    def type(self) -> str:
        return dns.rdatatype.to_text(self.message.question[0].rdtype)

    def reply(self, *records: str, rcode: int = 0, authority: tuple[str, ...] = ()) -> dns.message.Message:
        """A response; records as "TTL TYPE DATA"."""
        response = dns.message.make_response(self.message, recursion_available=True)
        response.set_rcode(rcode)
        for section, lines in ((response.answer, records), (response.authority, authority)):
            for line in lines:
                ttl, kind, data = line.split(" ", 2)
                section.append(dns.rrset.from_text(self.name, int(ttl), "IN", kind, data))
        return response

    def answer(self, *records: str, rcode: int = 0, authority: tuple[str, ...] = ()) -> bytes:
        """The same response as bytes."""
        return self.reply(*records, rcode=rcode, authority=authority).to_wire()


def right(asked: Asked) -> bytes:
    """An honest server: every name has an A record and nothing else."""
    if asked.type == "A":
        return asked.answer("300 A 192.0.2.80")
    return asked.answer(authority=("300 SOA ns. admin. 1 2 3 4 300",))


class FakeServer:
    """A name server over UDP and TCP that follows a script and records all queries."""

    def __init__(self, namespace: Namespace, address: str, script: Script = right, port: int = PORT) -> None:
        self.address, self.port, self.script, self.namespace = address, port, script, namespace
        self.asked: list[Asked] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.udp = namespace.socket(family)
        self.udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        self.tcp = namespace.socket(family, socket.SOCK_STREAM)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            name = sockaddr(namespace, address, port)[1]
            self.udp.bind(name)
            self.tcp.bind(name)
        except OSError:
            self.udp.close()
            self.tcp.close()
            raise
        self.tcp.listen(64)
        self._closing = False
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._udp, self._tcp)]
        for thread in self._threads:
            thread.start()

    def _udp(self) -> None:
        while not self._closing:
            try:
                data, peer = self.udp.recvfrom(65_535)
            except OSError:
                return
            if self._closing:
                return
            asked = Asked(data, peer[:2], False, self.udp)
            self.asked.append(asked)
            with contextlib.suppress(OSError):
                for message in _list(self.script(asked)):
                    self.udp.sendto(message, peer)

    def _tcp(self) -> None:
        while True:
            try:
                link, peer = self.tcp.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(link, peer), daemon=True).start()

    def _converse(self, link: socket.socket, peer: tuple[str, int]) -> None:
        with link, contextlib.suppress(OSError):
            link.settimeout(10)
            while data := receive_message(link):
                asked = Asked(data, peer[:2], True, link)
                self.asked.append(asked)
                answers = _list(self.script(asked))
                for message in answers:
                    link.sendall(struct.pack("!H", len(message)) + message)
                if not answers:
                    return

    def names(self, tcp: bool | None = None) -> list[str]:
        """The names of its queries."""
        return [each.name for each in list(self.asked) if tcp is None or each.tcp == tcp]

    def close(self) -> None:
        """End."""
        self._closing = True
        for link in (self.udp, self.tcp):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self.tcp.close()
        with self.namespace.entered():
            with socket.socket(self.udp.family, socket.SOCK_DGRAM) as waker, contextlib.suppress(OSError):
                waker.sendto(b"", sockaddr(self.namespace, self.address, self.port)[1])
        self._threads[0].join(5)
        self.udp.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _list(said: bytes | list[bytes] | None) -> list[bytes]:
    return [] if said is None else said if isinstance(said, list) else [said]


# ---- clients ----


def sockaddr(namespace: Namespace, address: str, port: int = PORT) -> tuple[socket.AddressFamily, tuple]:
    """Family and socket address of a numeric address, its %zone as the namespace knows it."""
    with namespace.entered():
        family, *_, name = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
    return family, name


@contextlib.contextmanager
def connected(
    namespace: Namespace, address: str, kind: socket.SocketKind = socket.SOCK_DGRAM, port: int = PORT
) -> Iterator[socket.socket]:
    """A connected socket: the kernel delivers responses of this address only."""
    family, name = sockaddr(namespace, address, port)
    with namespace.socket(family, kind) as link:
        link.settimeout(ANSWER_SECONDS)
        link.connect(name)
        yield link


def ask(
    namespace: Namespace,
    address: str,
    name: str,
    kind: str = "A",
    tcp: bool = False,
    port: int = PORT,
    seconds: float = ANSWER_SECONDS,
) -> dns.message.Message:
    """Query over a connected socket and return the response. Raises TimeoutError."""
    query = dns.message.make_query(name, kind)
    with connected(namespace, address, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM, port) as link:
        link.settimeout(seconds)
        response = exchange(link, query, tcp)
    assert query.is_response(response), response
    return response


def exchange(link: socket.socket, query: dns.message.Message, tcp: bool) -> dns.message.Message:
    """Send a query over a connected socket and return the response. Raises TimeoutError."""
    if tcp:
        send_message(link, query.to_wire())
        return dns.message.from_wire(receive_message(link))
    link.send(query.to_wire())
    return dns.message.from_wire(link.recv(65_535))


def texts(response: dns.message.Message) -> list[str]:
    """The data of the answer section, sorted."""
    return sorted(item.to_text() for rrset in response.answer for item in rrset)


def rcode(response: dns.message.Message) -> str:
    """The name of its response code."""
    return dns.rcode.to_text(response.rcode())


def send_message(link: socket.socket, data: bytes) -> None:
    """One message over TCP."""
    link.sendall(struct.pack("!H", len(data)) + data)


def receive_message(link: socket.socket) -> bytes:
    """One message over TCP; b"" at the end of the connection."""
    size = receive(link, 2)
    return receive(link, int.from_bytes(size, "big")) if len(size) == 2 else b""


def receive(link: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes, or fewer at the end of the connection."""
    data = b""
    while len(data) < size and (more := link.recv(size - len(data))):
        data += more
    return data


def bare_query(name: str, ident: int = 0, kind: int = 1) -> bytes:
    """Build a query quickly."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"
    return struct.pack("!HHHHHH", ident, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!HH", kind, 1)


class Load:
    """A client that sends one query after the other in its own thread and counts responses."""

    def __init__(self, namespace: Namespace, address: str, *names: str) -> None:
        self._names = names
        self.asked = self.answered = 0
        self.wrong: list[str] = []
        self.check: Callable[[dict[str, dns.message.Message]], str] = lambda answers: ""
        family, name = sockaddr(namespace, address)
        self._link = namespace.socket(family)
        self._link.settimeout(ANSWER_SECONDS)
        self._link.connect(name)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            answers = {}
            for name in self._names:
                query = dns.message.make_query(name, "A")
                self.asked += 1
                try:
                    self._link.send(query.to_wire())
                    answers[name] = dns.message.from_wire(self._link.recv(65_535))
                except OSError as error:
                    self.wrong.append(f"{name}: {error!r}")
                    continue
                if query.is_response(answers[name]):
                    self.answered += 1
                else:
                    self.wrong.append(f"{name}: another question's answer")
            if problem := self.check(answers):
                self.wrong.append(problem)

    def stop(self) -> None:
        """Stop, and check that each query had its response."""
        self._stopping.set()
        self._thread.join(30)
        self._link.close()
        assert not self.wrong, self.wrong[:5]
        assert self.answered == self.asked > 0

    def has_asked(self, more: int) -> None:
        """Wait until ``more`` queries have been sent."""
        goal = self.asked + more
        wait_for(lambda: self.asked >= goal or self.wrong, f"{more} more questions")


def write(path: Path, *lines: str) -> Path:
    """Write a file atomically, by rename."""
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.rename(path)
    return path


def environment(**variables: str) -> tuple[str, ...]:
    """A wrapper for `Responder`."""
    return ("env", *(f"{name}={value}" for name, value in variables.items()))


def elapsed(since: float) -> float:
    """Seconds since a time of time.monotonic()."""
    return time.monotonic() - since
