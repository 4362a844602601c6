"""UDP sockets to upstream servers, several queries on each in its lifetime.

How hard a response is to forge (RFC 5452, section 9): an attacker must guess 16 bits of the query's id and its source
port, 14.8 bits of the kernel's default range (28,232 ports), while the query is in flight. Up to POOL_SOCKETS ports of
a server are open at the same time, each connected, so that the kernel delivers what comes from the server's address
only. A query uses a new port, or, when the pool is full, a random one of it. A port closes after SOCKET_QUERIES queries
or SOCKET_SECONDS, and takes no further query after the first mismatch. An attacker who knew all open ports would still
have to guess 23 bits; the kernel's limit on ICMP errors makes finding them take longer than they stay open.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import partial

from udpwatch.dns.resolution import Attempt, PooledSocket, Upstream
from udpwatch.dns.transport import Transport, UdpConnection

POOL_SOCKETS = 128  # per server
SOCKET_QUERIES = 64
SOCKET_SECONDS = 10.0
BIND_ATTEMPTS = 16  # random ports of --min-port and --max-port that are tried
_RANDOM_BYTES = 4096


class Sockets:
    """Opens sockets and chooses among them."""

    def __init__(
        self,
        transport: Transport,
        on_readable: Callable[[PooledSocket], None],
        on_open: Callable[[PooledSocket], None],
        ports: tuple[int, int] = (0, 0),
    ) -> None:
        """``ports``: the lowest and the highest source port; (0, 0): the kernel's choice. ``on_open``: starts the
        socket's timer of SOCKET_SECONDS."""
        self._transport, self._on_readable, self._on_open, self._ports = transport, on_readable, on_open, ports
        low, high = ports
        self._most = min(POOL_SOCKETS, high - low + 1) if high else POOL_SOCKETS
        #: Whether sockets are replaced by new ones; else new ports would be hard to find.
        self.renews = not high or high - low >= 4 * POOL_SOCKETS
        self._random, self._random_at = b"", _RANDOM_BYTES

    def send(self, attempt: Attempt, message: bytes) -> None:
        """Send a query, given without its id, from a random port with a random id. Raises OSError."""
        upstream = attempt.member.upstream
        pool = upstream.pool
        chance = self._chance()
        chosen = int.from_bytes(chance[2:], "big") % self._most
        link = pool[chosen] if len(pool) == self._most else self._open(upstream)
        while (ident := chance[:2]) in link.attempts:
            chance = self._chance()
        link.attempts[ident] = attempt
        attempt.ident, attempt.socket = ident, link
        link.left -= 1
        if not link.left and self.renews:
            self.retire(link)
        try:
            link.send(ident + message)
        except BaseException:
            self.release(attempt)
            raise

    def ident(self) -> bytes:
        """Return a random id."""
        return self._chance()[:2]

    def release(self, attempt: Attempt) -> None:
        """Free an attempt's id; a response to it is a mismatch from now on."""
        link = attempt.socket
        if link is None:
            return
        attempt.socket = None
        del link.attempts[attempt.ident]
        if not link.attempts and not link.is_pooled:
            link.close()

    def retire(self, link: PooledSocket) -> None:
        """Send nothing over a socket any more; close it once nothing is expected on it."""
        if link.is_pooled:
            link.is_pooled = False
            link.upstream.pool.remove(link)
        if not link.attempts:
            link.close()

    def _open(self, upstream: Upstream) -> PooledSocket:
        link = PooledSocket(upstream, SOCKET_QUERIES)
        try:
            link.open(self._bind(upstream, link))
        except OSError:
            if not upstream.pool:  # no descriptor is free: an open socket will do
                raise
            return upstream.pool[0]
        upstream.pool.append(link)
        link.is_pooled = True
        self._on_open(link)
        return link

    def _bind(self, upstream: Upstream, link: PooledSocket) -> UdpConnection:
        low, high = self._ports
        on_readable = partial(self._on_readable, link)
        for left in reversed(range(BIND_ATTEMPTS if high else 1)):
            port = low + secrets.randbelow(high - low + 1)
            try:
                return self._transport.open_udp(upstream.server, port, low == high, on_readable)
            except OSError:  # most likely the port is in use
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _chance(self) -> bytes:
        """Return four random octets. They are read many at a time: each system call costs as much as a lookup."""
        at = self._random_at
        if at >= len(self._random):
            self._random, at = os.urandom(_RANDOM_BYTES), 0
        self._random_at = at + 4
        return self._random[at : at + 4]
