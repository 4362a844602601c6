"""UDP sockets to upstream servers, several queries on each in its lifetime.

How hard a response is to forge (RFC 5452, section 9): an attacker must guess 16 bits of the query's id and its source
port, 14.8 bits of the kernel's default range (28,232 ports), while the query is in flight. Up to POOL_SOCKETS ports of
a server are open at the same time, each connected, so that the kernel delivers what comes from the server's address
only. A query uses a new port, or, when the pool is full, a random one of it. A port closes after SOCKET_QUERIES queries
or SOCKET_SECONDS, and takes no further query after the first mismatch. An attacker who knew all open ports would still
have to guess 23 bits; the kernel's limit on ICMP errors makes finding them take longer than they stay open.

A range of fewer ports (`--min-port`, `--max-port`) leaves fewer bits, and one port (`--query-port`) only those of the
id. Sockets to several servers share the ports of a small range. No two sockets to one server have the same port at the
same time: the kernel would deliver the responses of both to one of them.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial

from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.resolution import Attempt, PooledSocket, Upstream
from udpwatch.dns.settings import Ports
from udpwatch.dns.transport import Transport

POOL_SOCKETS = 128  # per server
MAX_SOCKETS = 32 * POOL_SOCKETS  # in all; fewer with a low limit on open files
SOCKET_QUERIES = 64
SOCKET_SECONDS = 10.0
BIND_ATTEMPTS = 100  # random ports of a range that are tried: as many as dnsmasq tries
SHARED_RANGE = 16 * POOL_SOCKETS  # servers share the ports of a smaller range
RENEWED_RANGE = 4 * POOL_SOCKETS  # the ports of a smaller range stay open: there are few others
_RANDOM_BYTES = 4096
#: Errors that say nothing about a server or a socket: this process or this host has run out of something.
OUR_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}
_PORT_IN_USE = {errno.EADDRINUSE, errno.EACCES}

log = logging.getLogger(__name__)


class Sockets:
    """Opens sockets and chooses among them."""

    def __init__(
        self,
        transport: Transport,
        on_readable: Callable[[PooledSocket], None],
        on_open: Callable[[PooledSocket], None],
        ports: Ports,
        limit: int,
    ) -> None:
        """``on_open``: starts the socket's timer of SOCKET_SECONDS. ``limit``: about how many sockets may be open; each
        server has one also beyond that."""
        self._transport, self._on_readable, self._on_open, self._ports = transport, on_readable, on_open, ports
        count = 1 if ports.single else ports.high - ports.low + 1 if ports.high else SHARED_RANGE
        self._count, self._limit = count, limit
        self.share_among(1)
        self._shared = count < SHARED_RANGE
        #: Whether sockets are replaced by new ones; else new ports would be hard to find.
        self.renews = count >= RENEWED_RANGE
        self._random, self._random_at = b"", _RANDOM_BYTES

    def share_among(self, servers: int) -> None:
        """Share the sockets among so many servers."""
        self._share = max(1, self._limit // servers)
        self._most = min(POOL_SOCKETS, self._count, self._share)

    def has_room(self, upstream: Upstream) -> bool:
        """Return whether a server's socket may be replaced while it still waits for responses."""
        return upstream.opened < self._share

    def send(self, attempt: Attempt, message: bytes) -> None:
        """Send a query, given without its id, from a random port with a random id. Raises OSError."""
        upstream = attempt.member.upstream
        pool, chance = upstream.pool, self._chance()
        chosen = int.from_bytes(chance[2:], "big")
        link = pool[chosen % len(pool)] if len(pool) >= self._most else self._open(upstream)
        try:
            self._send(link, attempt, chance, message)
        except OSError as error:
            if error.errno in OUR_ERRORS:
                raise
            # The report of an earlier packet's fate, or the socket's source address is no longer this host's.
            if self.renews:
                self.retire(link)
                link = self._open(upstream)
            try:
                self._send(link, attempt, self._chance(), message)
            except OSError:
                self.retire(link)
                raise

    def _send(self, link: PooledSocket, attempt: Attempt, chance: bytes, message: bytes) -> None:
        while (ident := chance[:2]) in link.attempts:
            chance = self._chance()
        link.attempts[ident] = attempt
        attempt.ident, attempt.socket = ident, link
        link.left -= 1
        if link.left <= 0 and self.renews and self.has_room(link.upstream):
            self.retire(link)
        try:
            link.send(ident + message)
        except BaseException:
            self.release(attempt)
            raise

    def ident(self) -> bytes:
        """Return a random id."""
        return self._chance()[:2]

    def random(self, size: int) -> bytes:
        """Return random octets, at most _RANDOM_BYTES."""
        if self._random_at + size > len(self._random):
            self._random, self._random_at = os.urandom(_RANDOM_BYTES), 0
        at = self._random_at
        self._random_at = at + size
        return self._random[at : at + size]

    def release(self, attempt: Attempt) -> None:
        """Free an attempt's id; a response to it is a mismatch from now on."""
        link = attempt.socket
        if link is None:
            return
        attempt.socket = None
        del link.attempts[attempt.ident]
        if not link.attempts and not link.is_pooled:
            self._close(link)

    def retire(self, link: PooledSocket) -> None:
        """Send nothing over a socket any more; close it once nothing is expected on it."""
        if link.is_pooled:
            link.is_pooled = False
            link.upstream.pool.remove(link)
        if not link.attempts:
            self._close(link)

    def _close(self, link: PooledSocket) -> None:
        link.upstream.opened -= link.close()

    def _open(self, upstream: Upstream) -> PooledSocket:
        if upstream.pool and not self.has_room(upstream):
            return secrets.choice(upstream.pool)
        link = PooledSocket(upstream, SOCKET_QUERIES)
        try:
            self._bind(upstream, link)
        except OSError as error:
            if upstream.pool:  # no descriptor or port is free: an open socket will do
                return secrets.choice(upstream.pool)
            if self._ports.high and error.errno in _PORT_IN_USE:
                text = "dns: cannot query %s from %s: %s"
                LIMITED.write(log, logging.WARNING, text, upstream.server, self._ports, error.strerror)
            raise
        upstream.opened += 1
        upstream.pool.append(link)
        link.is_pooled = True
        self._on_open(link)
        return link

    def _bind(self, upstream: Upstream, link: PooledSocket) -> None:
        """Open the socket, on a random port of the range. Raises OSError."""
        ports, on_readable = self._ports, partial(self._on_readable, link)
        if not ports.high:
            link.open(self._transport.open_udp(upstream.server, 0, False, on_readable))
            return
        size = ports.high - ports.low + 1
        if size <= BIND_ATTEMPTS:
            chosen = secrets.SystemRandom().sample(range(ports.low, ports.high + 1), size)
        else:
            chosen = [ports.low + secrets.randbelow(size) for _ in range(BIND_ATTEMPTS)]
        problem = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        for port in chosen:
            if port in upstream.ports:
                continue
            try:
                link.open(self._transport.open_udp(upstream.server, port, self._shared, on_readable), port)
                return
            except OSError as error:
                problem = error
                if error.errno not in _PORT_IN_USE:
                    raise
        raise problem

    def _chance(self) -> bytes:
        """Return four random octets. They are read many at a time: each system call costs as much as a lookup."""
        at = self._random_at
        if at + 4 > len(self._random):
            self._random, at = os.urandom(_RANDOM_BYTES), 0
        self._random_at = at + 4
        return self._random[at : at + 4]
