"""The HTTP server for Prometheus and the kubelet: /metrics, /healthz, /readyz. It is read-only.

Rules
1. Memory is bounded: MAX_CONNECTIONS, each with a request of MAX_REQUEST_BYTES at most. Simultaneous scrapes share one
   page.
2. A full server closes the oldest connection of the client that has the most.
3. Where the CPU is short (dns/budget.py), connections wait; those of clients that have cost less go first.
4. The agent runs even if another program holds the port: HttpServer binds it as soon as it is free.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import ipaddress
import logging
import math
import selectors
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
from udpwatch.agent.kernel.cpu import show_name
from udpwatch.dns.budget import Budget

REQUEST_SECONDS = 10
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_CLIENT = 8  # an IPv6 client is its /64
MAX_REQUEST_BYTES = 16_384  # request line and headers together
CPU_SHARE = 0.2  # of the quota, for all of HTTP
BACKLOG = 128
SLOT_SECONDS = 0.05  # between two looks for a thread that has ended
IDLE_SECONDS = 0.5  # between two looks for connections that take too long
MAX_CLIENTS = 1_024  # whose CPU is remembered
BIND_SECONDS = 2.0  # between two attempts to bind a port that another program holds

#: Errors of bind(2) that can end by themselves: HttpServer tries again.
_PASSING = {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
#: Errors of accept(2) that leave the connection in the backlog.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: Reasons to close a connection before its response is complete.
CLOSED = {
    "client": "its client had more than MAX_CONNECTIONS_PER_CLIENT",
    "full": "there were MAX_CONNECTIONS",
    "size": "its request was longer than MAX_REQUEST_BYTES",
    "time": "it took longer than REQUEST_SECONDS",
}

_WAY_OUT = "choose another address with --metrics-listen HOST:PORT, or --metrics-listen off"

#: whether it is healthy, and the text to show
Health = Callable[[], tuple[bool, str]]

log = logging.getLogger(__name__)


class HttpCollector(Collector):
    """The HTTP server's own metric, for a registry."""

    def __init__(self, closed: Counter[str]) -> None:
        """``closed``: connections by reason, of CLOSED."""
        self._closed = closed

    def collect(self) -> Iterator[Metric]:
        """All reasons, also those at 0."""
        family = CounterMetricFamily(
            "udpwatch_http_connections_closed",
            "HTTP connections closed before the response was complete, by reason: too many of one client (client), too "
            "many in all (full), a request that is too long (size) or too slow (time).",
            labels=["reason"],
        )
        for reason in CLOSED:
            family.add_metric([reason], self._closed[reason])
        yield family


class _Connection(NamedTuple):
    begun: float  # monotonic seconds
    client: bytes
    socket: socket.socket
    address: object


class _Server(ThreadingHTTPServer):
    """A thread for each connection, MAX_CONNECTIONS at once, none for longer than REQUEST_SECONDS."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = BACKLOG

    def __init__(
        self,
        address: tuple[str, int],
        family: socket.AddressFamily,
        handler: type[_Handler],
        count: Callable[[str], None],
        cpus: Callable[[], float],
    ) -> None:
        self.address_family, self.count = family, count
        self._spent = 0.0  # seconds of CPU, by threads that have ended
        #: By client: its CPU on a virtual clock (start-time fair queueing), which is the time of the last connection
        #: that got a thread. A new client, or one that comes after a pause, begins at the present.
        self._spent_for: dict[bytes, float] = {}
        self._turn = 0.0  # the virtual clock
        self._begin_at: float | None = None  # monotonic seconds, when the next connection has waited for the CPU
        self._budget = Budget(cpus, CPU_SHARE, used=lambda: self._spent + time.thread_time())
        self._lock = threading.Lock()
        self._stopping = False
        self._running = 0
        self._waiting: list[_Connection] = []  # for a thread
        #: What may be closed for others. A closed one is no longer here, but may have a thread that is about to end.
        self._open: dict[int, _Connection] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's lookup of the host name: DNS may be broken here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve(self) -> None:
        """Serve until `shutdown`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while not self._stopping:
                if selector.select(self._begin()):
                    try:
                        self.process_request(*self.get_request())
                    except OSError as error:  # the client has disconnected, or the system is short of something
                        if error.errno in _SHORTAGES:
                            time.sleep(SLOT_SECONDS)  # the socket stays readable: select() does not wait
                self._close_slow()
        for each in self._waiting:
            self.shutdown_request(each.socket)

    def shutdown(self) -> None:
        """Make `serve` return, within IDLE_SECONDS."""
        self._stopping = True

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], address: object) -> None:
        """Accept a connection; if there is no room, close another one first."""
        assert isinstance(request, socket.socket) and isinstance(address, tuple)  # a stream server's
        client = _client_of(address[0])
        mine = [each for each in self._open.copy().values() if each.client == client]
        if len(mine) >= MAX_CONNECTIONS_PER_CLIENT:
            self._close_oldest(mine, "client")
        if len(self._open) >= MAX_CONNECTIONS:
            self._close_oldest(self._greediest(), "full")
        connection = self._open[id(request)] = _Connection(time.monotonic(), client, request, address)
        self._waiting.append(connection)

    def _begin(self) -> float:
        """Start threads for waiting connections; return after how many seconds to try again."""
        while self._waiting:
            if self._running >= MAX_CONNECTIONS:
                return SLOT_SECONDS
            now, delay = time.monotonic(), self._budget.delay()
            if delay and self._begin_at is None:
                self._begin_at = now + delay
            if delay and self._begin_at is not None and now < self._begin_at:
                return min(self._begin_at - now, IDLE_SECONDS)
            self._begin_at = None  # the next one waits anew, but only once: a flood of connections must not stop all
            connection = min(self._waiting, key=lambda each: self._turn_of(each.client))
            self._waiting.remove(connection)
            self._turn = self._turn_of(connection.client)
            with self._lock:
                self._running += 1
            try:
                super().process_request(connection.socket, connection.address)
            except RuntimeError:  # the system allows no more threads
                self._end(connection.socket, connection.client, 0.0)
                self.shutdown_request(connection.socket)
        return IDLE_SECONDS

    def _turn_of(self, client: bytes) -> float:
        return max(self._turn, self._spent_for.get(client, 0.0))

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], address: object) -> None:
        """Answer, in the connection's own thread."""
        assert isinstance(request, socket.socket) and isinstance(address, tuple)
        try:
            super().process_request_thread(request, address)
        finally:
            self._end(request, _client_of(address[0]), time.thread_time())

    def _end(self, request: socket.socket, client: bytes, used: float) -> None:
        with self._lock:
            self._open.pop(id(request), None)
            self._running -= 1
            self._spent += used
            if len(self._spent_for) >= MAX_CLIENTS:
                self._spent_for.clear()
            self._spent_for[client] = self._turn_of(client) + used

    def _close_slow(self) -> None:
        now = time.monotonic()
        for each in self._open.copy().values():
            if now - each.begun > REQUEST_SECONDS:
                self._close_oldest([each], "time")

    def handle_error(self, request: object, address: object) -> None:
        """Ignore the error: it is normal that a scraper disconnects."""

    def _greediest(self) -> list[_Connection]:
        """Return the connections of the client that has the most."""
        clients: dict[bytes, list[_Connection]] = {}
        for each in self._open.copy().values():
            clients.setdefault(each.client, []).append(each)
        return max(clients.values(), key=len, default=[])

    def _close_oldest(self, connections: list[_Connection], reason: str) -> None:
        """Close the oldest connection, or wake its thread, which then ends."""
        if not connections:
            return
        oldest = min(connections, key=lambda each: each.begun)
        if self._open.pop(id(oldest.socket), None):
            self.count(reason)
            if oldest in self._waiting:
                self._waiting.remove(oldest)
                self.shutdown_request(oldest.socket)
                return
            with contextlib.suppress(OSError):
                oldest.socket.shutdown(socket.SHUT_RDWR)


def _client_of(host: str) -> bytes:
    """Return the client's identity: an IPv4 address, or the /64 of an IPv6 address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.packed if address.version == 4 else address.packed[:8]


class _Request(io.BufferedReader):
    """A request of at most MAX_REQUEST_BYTES: http.server itself reads 100 headers of 65,536 bytes each."""

    left = MAX_REQUEST_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read a line. Raises LineTooLong, which http.server handles."""
        most = self.left + 1
        line = super().readline(most if size is None or size < 0 else min(size, most))
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("request")
        return line


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # one connection for each request
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
            status, kind, body = 404, "text/plain", f"not found; udpwatch serves {names}\n".encode()
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
        """Log no request."""


class _Shared:
    """Renders one page for simultaneous requests; the page is never older than a request."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._making = threading.Lock()
        self._begun = self._made = 0  # numbers of pages; the first one is 1
        self._page = b""

    def __call__(self) -> bytes:
        """Return a page that was rendered after this call began."""
        wanted = self._begun + 1
        with self._making:
            if self._made < wanted:
                self._begun += 1
                self._page, self._made = self._make(), self._begun
            return self._page


class HttpServer:
    """Listens when it is created, if it can; serves after `start`, in its own threads."""

    def __init__(self, host: str, port: int, cpus: Callable[[], float] = lambda: math.inf) -> None:
        """Bind; port 0 is any free port. If another program holds the address, or this host does not have it yet,
        `start` tries again: see `problem`. Raises UdpwatchError for any other error. ``cpus``: how many
        this process may use.
        """
        self._handler = type("Handler", (_Handler,), {"pages": {}})
        self._where, self._cpus = f"{host}:{port}", cpus
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
        self._server = _Server(self._address, self._family, self._handler, self._count, self._cpus)
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
        """The URL it listens on; "" if it does not listen."""
        if not self._server:
            return ""
        host, port = self._server.server_address[:2]
        host = str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self, metrics: Callable[[], bytes], healthy: Health, ready: Health) -> None:
        """Begin to serve, or to wait for the address; log which."""
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
        show_name()
        while not self._server:
            if self._stopping.wait(BIND_SECONDS):
                return
            with self._bind_lock, contextlib.suppress(OSError):
                if not self._stopping.is_set():
                    self._bind()
        log.info("metrics on %s/metrics", self.url)
        self._server.serve()

    def stop(self) -> None:
        """Stop listening; threads finish the responses that they have begun."""
        with self._bind_lock:
            self._stopping.set()
        if self._server:
            self._server.shutdown()
            if self._thread:
                self._thread.join()
            self._server.server_close()
