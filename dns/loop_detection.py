"""Find upstream servers that send our queries back to us: `--dns-loop-detect`.

When the servers change, each default one gets a TXT query for a name below `test.` that nobody can guess, as in
dnsmasq. If a query for that name arrives, its server is not used until the servers change again.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from udpwatch.dns import message
from udpwatch.dns.message import RD, Class, Type
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.settings import Server
from udpwatch.dns.timers import DelayQueue
from udpwatch.dns.transport import Transport, UdpConnection

MAX_TESTED = 64  # servers
OPEN_SECONDS = 2.0  # a socket, so that the server's response meets one
_MOST = 512  # octets read of a response

log = logging.getLogger(__name__)


class LoopDetector:
    """Sends the queries, and recognizes them."""

    def __init__(self, loop: PacketLoop, transport: Transport, on_loop: Callable[[], None]) -> None:
        """``on_loop`` is called when a loop is found, in the thread that has received the query."""
        self._loop, self._transport, self._on_loop = loop, transport, on_loop
        self._closing: DelayQueue[Any] = loop.delay_queue(OPEN_SECONDS, lambda link: link.close())
        self._names: dict[bytes, Server] = {}
        self._looping: frozenset[Server] = frozenset()
        self._tested: tuple[Server, ...] = ()

    def usable(self, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        """Return these servers without looping ones. If they are others than the last time, all are tested again."""
        if servers != self._tested:
            self._tested, self._looping = servers, frozenset()
            names = {_new_name(): server for server in servers[:MAX_TESTED]}
            self._names = names
            self._loop.post(partial(self._send, list(names.items())))
        return tuple(server for server in servers if server not in self._looping)

    def is_test(self, name: bytes) -> bool:
        """Return whether a query (its name in lower case) is one of ours that has come back. Any thread may ask."""
        server = self._names.get(name)
        if server is None:
            return False
        if server not in self._looping:
            self._looping |= {server}
            log.warning("dns: not using nameserver %s: it sends queries back to this responder", server)
            self._on_loop()
        return True

    def close(self) -> None:
        """Close the sockets."""
        while len(self._closing):
            link = self._closing.oldest()
            self._closing.stop(link)
            link.close()

    def _send(self, tests: Sequence[tuple[bytes, Server]]) -> None:
        for name, server in tests:
            with contextlib.suppress(OSError):  # the servers' health is failover.py's subject
                links: list[UdpConnection] = []
                link = self._transport.open_udp(server, 0, False, partial(_drop, links))
                links.append(link)
                self._closing.start(link, self._loop.now)
                question = name + struct.pack("!HH", Type.TXT, Class.IN)
                link.send(message.build_query(secrets.randbits(16), question, RD, b""))


def _drop(links: Sequence[UdpConnection]) -> None:
    """Read a response; it means nothing."""
    for link in links:
        with contextlib.suppress(OSError):
            link.receive(_MOST)


def _new_name() -> bytes:
    """Return a name of eight random hexadecimal digits."""
    return b"\x08" + secrets.token_hex(4).encode() + b"\x04test\x00"
