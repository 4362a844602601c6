"""HTTP for Prometheus and the kubelet: /metrics, /healthz, /readyz. Nothing else, nothing is ever changed by it.

Rules
1. Memory is bounded: MAX_CONNECTIONS, each with a request of MAX_REQUEST_BYTES at most, and one page for all that ask
   for it at the same time.
2. No client takes the places of others: the client with the most connections loses its oldest one first.
3. A port that another program holds is no reason not to watch: HttpView binds it as soon as it is free.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import ipaddress
import logging
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from udpwatch.agent.daemon.metrics import CONTENT_TYPE
from udpwatch.agent.errors import UdpwatchError

REQUEST_SECONDS = 10
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_CLIENT = 8  # an IPv6 client is its /64
MAX_REQUEST_BYTES = 16_384  # request line and headers together
SLOT_SECONDS = 1.0
BIND_SECONDS = 2.0  # between two attempts to bind a port that another program holds

#: What an address may lack for a while; the attempt is repeated.
_PASSING = {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
#: Why a connection was closed before its response was complete, with the limit that it met.
CLOSED = {
    "client": "its client opened more than MAX_CONNECTIONS_PER_CLIENT",
    "full": "all of MAX_CONNECTIONS were taken",
    "size": "its request was longer than MAX_REQUEST_BYTES",
    "time": "it took longer than REQUEST_SECONDS",
}

_WAY_OUT = "choose another address with --metrics-listen HOST:PORT, or --metrics-listen off"

#: (status, body) of a health question
Health = Callable[[], tuple[bool, str]]

log = logging.getLogger(__name__)


class HttpCollector(Collector):
    """The metric of HTTP itself, for a registry."""

    def __init__(self, closed: Counter[str]) -> None:
        """``closed``: connections by reason, of CLOSED."""
        self._closed = closed

    def collect(self) -> Iterator[Metric]:
        """All reasons, those that never occurred at 0."""
        family = CounterMetricFamily(
            "udpwatch_http_connections_closed",
            "HTTP connections closed before their response was complete, by the limit that they met: a client that "
            "opens too many (client), all places taken (full), a request that is too long (size) or too slow (time).",
            labels=["reason"],
        )
        for reason in CLOSED:
            family.add_metric([reason], self._closed[reason])
        yield family


class _Connection(NamedTuple):
    begun: float  # monotonic seconds
    client: bytes
    socket: socket.socket


class _Server(ThreadingHTTPServer):
    """A thread for each connection, MAX_CONNECTIONS at once, none for longer than REQUEST_SECONDS."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int],
        family: socket.AddressFamily,
        handler: type[_Handler],
        count: Callable[[str], None],
    ) -> None:
        self.address_family, self.count = family, count
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        #: What may be closed for others. A closed one is no longer here, but holds its slot until its thread ends.
        self._open: dict[int, _Connection] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of this host's name: DNS may be what is broken here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], address: object) -> None:
        """Give the connection a thread; where none is left, close another connection first."""
        assert isinstance(request, socket.socket) and isinstance(address, tuple)  # a stream server's
        client = _client_of(address[0])
        mine = [each for each in self._open.copy().values() if each.client == client]
        if len(mine) >= MAX_CONNECTIONS_PER_CLIENT:
            self._close_oldest(mine, "client")
        if not self._slots.acquire(blocking=False):
            if len(self._open) == MAX_CONNECTIONS:  # else a thread is about to end
                self._close_oldest(self._greediest(), "full")
            if not self._slots.acquire(timeout=SLOT_SECONDS):
                self.count("full")
                self.shutdown_request(request)
                return
        self._open[id(request)] = _Connection(time.monotonic(), client, request)
        try:
            super().process_request(request, address)
        except BaseException:  # no thread is available
            self._forget(request)
            raise

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], address: object) -> None:
        """Answer, in the connection's own thread."""
        try:
            super().process_request_thread(request, address)
        finally:
            self._forget(request)

    def service_actions(self) -> None:
        """Close what takes too long; the serving loop calls this twice a second."""
        now = time.monotonic()
        for each in self._open.copy().values():
            if now - each.begun > REQUEST_SECONDS:
                self._close_oldest([each], "time")

    def handle_error(self, request: object, address: object) -> None:
        """Ignore it: a scraper that disconnects is not an error of ours."""

    def _greediest(self) -> list[_Connection]:
        """The connections of the client that has the most."""
        clients: dict[bytes, list[_Connection]] = {}
        for each in self._open.copy().values():
            clients.setdefault(each.client, []).append(each)
        return max(clients.values(), key=len, default=[])

    def _close_oldest(self, connections: list[_Connection], reason: str) -> None:
        """Wake the thread of the oldest connection, which then ends."""
        if not connections:
            return
        oldest = min(connections, key=lambda each: each.begun)
        if self._open.pop(id(oldest.socket), None):
            self.count(reason)
            with contextlib.suppress(OSError):
                oldest.socket.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: object) -> None:
        self._open.pop(id(request), None)
        self._slots.release()


def _client_of(host: str) -> bytes:
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.packed if address.version == 4 else address.packed[:8]


class _Request(io.BufferedReader):
    """What a client sends, MAX_REQUEST_BYTES at most: http.server itself takes 100 headers of 65,536 each."""

    left = MAX_REQUEST_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line. Raises LineTooLong, which http.server knows."""
        most = self.left + 1
        line = super().readline(most if size is None or size < 0 else min(size, most))
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("request")
        return line


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request: none is kept for later
    timeout = REQUEST_SECONDS
    rbufsize = 0  # _Request has the buffer
    server_version = "udpwatch"
    sys_version = ""
    server: _Server
    pages: dict[str, Callable[[], tuple[int, str, bytes]]]
    requestline, request_version, command = "", "HTTP/1.0", ""  # for an error in the request line

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.rfile, io.RawIOBase)
        self._request = _Request(self.rfile)
        self.rfile = self._request

    def handle(self) -> None:
        try:
            super().handle()
        except http.client.LineTooLong:
            self.send_error(414)
        finally:
            if self._request.left < 0:
                self.server.count("size")

    def do_GET(self) -> None:
        page = self.pages.get(self.path.partition("?")[0])
        if page is None:
            names = " ".join(self.pages)
            status, kind, body = 404, "text/plain", f"not here; udpwatch serves {names}\n".encode()
        else:
            status, kind, body = page()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes are not news."""


class _Shared:
    """Makes one page for all that ask for it at the same time, none of it older than their request."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._making = threading.Lock()
        self._begun = self._made = 0  # which page: the first is 1
        self._page = b""

    def __call__(self) -> bytes:
        """A page whose making began after this call."""
        wanted = self._begun + 1
        with self._making:
            if self._made < wanted:
                self._begun += 1
                self._page, self._made = self._make(), self._begun
            return self._page


class HttpView:
    """Listens from the moment it is made, where it can; serves once started, in threads of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Bind; port 0 takes a free one. An address that another program holds, or that this host does not have yet, is
        bound later: see `problem`. Raises UdpwatchError for one that cannot be bound at all.
        """
        self._handler = type("Handler", (_Handler,), {"pages": {}})
        self._where = f"{host}:{port}"
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None
        self._closed: Counter[str] = Counter()
        self._count_lock, self._bind_lock = threading.Lock(), threading.Lock()
        self._stopping = threading.Event()
        self.problem = ""  # why it does not listen
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._family, self._address = family, (str(address[0]), int(address[1]))
            self._bind()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            self.problem = f"cannot listen on {self._where} for metrics: {reason}"
            if not isinstance(error, OSError) or error.errno not in _PASSING:
                raise UdpwatchError(f"{self.problem}; {_WAY_OUT}") from None

    def _bind(self) -> None:
        self._server = _Server(self._address, self._family, self._handler, self._count)
        self.problem = ""

    def _count(self, reason: str) -> None:
        with self._count_lock:
            self._closed[reason] += 1

    @property
    def collector(self) -> HttpCollector:
        """For a registry of prometheus_client."""
        return HttpCollector(self._closed)

    @property
    def url(self) -> str:
        """Where it listens; "" where it does not."""
        if not self._server:
            return ""
        host, port = self._server.server_address[:2]
        host = str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self, metrics: Callable[[], bytes], healthy: Health, ready: Health) -> None:
        """Begin to answer, or to wait for the address; log which."""
        shared = _Shared(metrics)

        def verdict(question: Health) -> tuple[int, str, bytes]:
            good, reason = question()
            return (200 if good else 503), "text/plain; charset=utf-8", f"{reason}\n".encode()

        self._handler.pages = {  # type: ignore[attr-defined]
            "/metrics": lambda: (200, CONTENT_TYPE, shared()),
            "/healthz": lambda: verdict(healthy),
            "/readyz": lambda: verdict(ready),
        }
        if self.problem:
            log.warning("%s; retrying every %g s; %s", self.problem, BIND_SECONDS, _WAY_OUT)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._server:
            if self._stopping.wait(BIND_SECONDS):
                return
            with self._bind_lock, contextlib.suppress(OSError):
                if not self._stopping.is_set():
                    self._bind()
        log.info("metrics on %s/metrics", self.url)
        self._server.serve_forever()

    def stop(self) -> None:
        """Stop listening, whether started or not; responses under way are finished by their own threads."""
        with self._bind_lock:
            self._stopping.set()
        if self._server:
            if self._thread:  # shutdown() waits for a loop that must have begun, or be about to
                self._server.shutdown()
            self._server.server_close()
