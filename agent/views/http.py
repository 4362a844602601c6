"""HTTP for Prometheus and the kubelet: /metrics, /healthz, /readyz. Nothing else, nothing is ever changed by it."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.views.metrics import CONTENT_TYPE

REQUEST_SECONDS = 10
MAX_CONNECTIONS = 32
SLOT_SECONDS = 1.0

#: (status, body) of a health question
Health = Callable[[], tuple[bool, str]]


class _Server(ThreadingHTTPServer):
    """A thread a connection, MAX_CONNECTIONS at once, none for longer than REQUEST_SECONDS whatever it does."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, handler: type[_Handler]) -> None:
        self.address_family = family
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._begun: dict[int, tuple[float, socket.socket]] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without the look-up of our own name that HTTPServer adds: DNS may be what is broken here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client: object) -> None:
        """Give the connection a thread; when all are taken, the oldest connection has to go."""
        assert isinstance(request, socket.socket)  # a stream server's
        if not self._slots.acquire(blocking=False):
            self._end_older_than(-1.0, at_most=1)
            if not self._slots.acquire(timeout=SLOT_SECONDS):
                self.shutdown_request(request)
                return
        self._begun[id(request)] = (time.monotonic(), request)
        try:
            super().process_request(request, client)
        except BaseException:  # no thread can be had
            self._forget(request)
            raise

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client: object) -> None:
        """Answer, in the connection's own thread."""
        try:
            super().process_request_thread(request, client)
        finally:
            self._forget(request)

    def service_actions(self) -> None:
        """Called by the serving loop twice a second."""
        self._end_older_than(REQUEST_SECONDS, at_most=MAX_CONNECTIONS)

    def handle_error(self, request: object, client: object) -> None:
        """A scraper that went away is not our error."""

    def _end_older_than(self, seconds: float, at_most: int) -> None:
        now = time.monotonic()
        for begun, connection in sorted(self._begun.copy().values(), key=lambda item: item[0])[:at_most]:
            if now - begun > seconds:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: object) -> None:
        if self._begun.pop(id(request), None):
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection a request: nobody holds one for later
    timeout = REQUEST_SECONDS
    server_version = "udpwatch"
    sys_version = ""
    pages: dict[str, Callable[[], tuple[int, str, bytes]]]

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
        """Scrapes are not news."""


class HttpView:
    """Listens from the moment it is made; serves once started, in threads of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Bind; port 0 takes a free one. Raises UdpwatchError when the address cannot be had."""
        self._handler = type("Handler", (_Handler,), {"pages": {}})
        self._thread: threading.Thread | None = None
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server((str(address[0]), int(address[1])), family, self._handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UdpwatchError(
                f"cannot listen on {host}:{port} for metrics: {reason}; choose another address with "
                "--metrics-listen HOST:PORT, or --metrics-listen off"
            ) from None

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        host = str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self, metrics: Callable[[], bytes], healthy: Health, ready: Health) -> None:
        """Begin to answer."""

        def verdict(question: Health) -> tuple[int, str, bytes]:
            good, reason = question()
            return (200 if good else 503), "text/plain; charset=utf-8", f"{reason}\n".encode()

        self._handler.pages = {  # type: ignore[attr-defined]
            "/metrics": lambda: (200, CONTENT_TYPE, metrics()),
            "/healthz": lambda: verdict(healthy),
            "/readyz": lambda: verdict(ready),
        }
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, begun or not; answers under way are finished by their own threads."""
        if self._thread:  # shutdown() waits for a loop that must have begun
            self._server.shutdown()
        self._server.server_close()
