"""The UDP server: a batch of datagrams in, a batch out, each response from the address that was asked.

Rules
1. One thread reads all UDP sockets and answers queries from memory. Queries that need an upstream server go to the
   event loop, a batch at a time.
2. Until something changes, the same bytes get the same response: a memo per family stores responses under the query
   without its id. A hit costs one lookup and one copy. Every change of a table replaces the memos with empty ones.
3. IP_PKTINFO and IPV6_PKTINFO are sent back as received, so that the source of the response is the address that was
   asked. The interface in them is set to 0, so that routing picks the outgoing interface; link-local addresses, which
   need their interface, keep it.
4. The thread owns its sockets: other threads ask it to add or close one, because a descriptor that is closed while it
   is being read may be another file's a moment later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from udpwatch.dns.admission import Admission
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Cell, Metrics
from udpwatch.dns.responder import Drop, Forward, LogQuery, Reply, Responder
from udpwatch.dns.udp_socket import (
    BATCH,
    CONTROL_BYTES,
    HEADER_WORDS,
    LAYOUTS,
    LEN_WORD,
    NAME_BYTES,
    SLOT,
    Batch,
    Layout,
    UdpSocket,
    is_unicast,
    peer_of,
)

BATCHES_IN_A_ROW = 8  # from one socket before the others get their turn
MEMO_ENTRIES = 4096  # per family
MEMO_KEY_BYTES = 600
SEEN_ADDRESSES = 65_536

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A query that needs an upstream server, with all that its response needs to get back to the client."""

    socket: UdpSocket
    name: bytes  # the client's sockaddr
    control: bytes  # the query's control message, prepared for the response
    forward: Forward
    received: float  # monotonic seconds

    @property
    def peer(self) -> bytes:
        """The client's address, 4 or 16 octets."""
        return self.name[self.socket.layout.address]


#: until (monotonic seconds), the response without its id, the counter of its kind
_Remembered = tuple[float, bytes, Cell]


def _no_memos() -> dict[socket.AddressFamily, dict[bytes, _Remembered]]:
    return {family: {} for family in LAYOUTS}


class UdpServer(threading.Thread):
    """Answers queries on all UDP sockets."""

    def __init__(
        self,
        responder: Responder,
        metrics: Metrics,
        admission: Admission,
        forward: Callable[[list[Pending]], None],
        log_query: LogQuery | None,
    ) -> None:
        """``forward`` takes queries that cannot be answered from memory; it is called in this thread. With
        ``log_query``, which gets every query, no response is remembered.
        """
        super().__init__(name="dns-udp", daemon=True)
        self._responder, self._metrics, self._admission = responder, metrics, admission
        self._forward, self._log_query = forward, log_query
        self._memos = _no_memos()
        self._peers: set[bytes] = set()  # clients known to be served
        self._destinations: set[bytes] = set()  # pktinfo (address and interface) known to be served
        self._batches = {family: Batch(layout) for family, layout in LAYOUTS.items()}
        self._orders: deque[tuple[bool, UdpSocket]] = deque()
        self._sockets: dict[int, UdpSocket] = {}
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._stopping = False

    # ---- for other threads ----

    def add(self, link: UdpSocket) -> None:
        """Serve a socket; the thread owns it from now on."""
        self._order(True, link)

    def remove(self, link: UdpSocket) -> None:
        """Close a socket."""
        self._order(False, link)

    def _order(self, add: bool, link: UdpSocket) -> None:
        self._orders.append((add, link))
        with contextlib.suppress(OSError):  # the thread has ended and closed everything
            os.eventfd_write(self._wake, 1)

    def invalidate(self) -> None:
        """Forget remembered responses, after a table that they depend on has been replaced."""
        self._memos = _no_memos()

    def readmit(self) -> None:
        """Forget which clients and addresses are served, after `Admission` has changed."""
        self._peers, self._destinations = set(), set()

    def stop(self) -> None:
        """Stop the thread and close all sockets; return when that is done."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if self.ident is None:  # never started
            self._close()
        else:
            self.join()

    # ---- the thread ----

    def run(self) -> None:
        """Serve until `stop`."""
        with contextlib.suppress(OSError), open("/proc/thread-self/comm", "w") as comm:  # noqa: PTH123
            comm.write(self.name)  # `top -H` shows it
        try:
            while not self._stopping:
                for fd, _ in self._epoll.poll():
                    if fd == self._wake:
                        self._obey()
                    elif (link := self._sockets.get(fd)) is not None:
                        self.serve(link)
        except BaseException:
            log.exception("dns: the UDP server has stopped after an internal error")
            raise
        finally:
            self._close()

    def _obey(self) -> None:
        os.eventfd_read(self._wake)
        while self._orders:
            add, link = self._orders.popleft()
            if add:
                self._sockets[link.fd] = link
                self._epoll.register(link.fd, select.EPOLLIN)
            elif self._sockets.pop(link.fd, None):
                self._epoll.unregister(link.fd)
                link.close()

    def _close(self) -> None:
        for link in (*self._sockets.values(), *(link for add, link in self._orders if add)):
            link.close()
        self._sockets.clear()
        self._epoll.close()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def serve(self, link: UdpSocket) -> None:
        """Answer what has arrived on one socket, up to BATCHES_IN_A_ROW batches."""
        batch = self._batches[link.family]
        for _ in range(BATCHES_IN_A_ROW):
            count = link.receive(batch)
            if not count:
                return
            self._answer(link, batch, count)
            if count < BATCH:
                return

    def _answer(self, link: UdpSocket, batch: Batch, count: int) -> None:
        """The hot loop: written for speed. Everything rare is elsewhere."""
        begun = time.monotonic()
        data, answers, names, control = batch.data, batch.answers, batch.names, batch.control
        lengths, answer_lengths = batch.lengths, batch.answer_lengths
        memo, peers, destinations = self._memos[link.family], self._peers, self._destinations
        layout, checked = link.layout, link.checked
        peer_from, peer_to = layout.address.start, layout.address.stop
        info_from, info_to = layout.pktinfo.start, layout.pktinfo.stop
        index_from, index_to = layout.index.start, layout.index.stop
        pending: list[Pending] = []
        first = answered = 0
        for slot in range(count):
            at, name_at, control_at = slot * SLOT, slot * NAME_BYTES, slot * CONTROL_BYTES
            key = data[at + 2 : at + lengths[slot * HEADER_WORDS + LEN_WORD]]
            remembered = memo.get(key)
            if (
                remembered is not None  # cheapest conditions first
                and remembered[0] > begun
                and names[name_at + peer_from : name_at + peer_to] in peers
                and (not checked or control[control_at + info_from : control_at + info_to] in destinations)
            ):
                _, body, cell = remembered
                cell[0] += 1
            else:
                packet = data[at : at + 2] + key
                found = self._look_up(link, batch, slot, packet, key, memo, begun, pending)
                if found is None:
                    if slot > first:
                        answered += self._send(link, batch, first, slot - first)
                    first = slot + 1
                    continue
                body = found
            size = len(body)
            answers[at : at + size] = body
            answer_lengths[4 * slot + 3] = size
            if layout.control_bytes == 32 or control[control_at + 16 : control_at + 18] != b"\xfe\x80":
                control[control_at + index_from : control_at + index_to] = b"\0\0\0\0"
        if count > first:
            answered += self._send(link, batch, first, count - first)
        if answered:
            self._metrics.duration["memory"].observe(time.monotonic() - begun, answered)
        if pending:
            self._forward(pending)

    def _send(self, link: UdpSocket, batch: Batch, first: int, count: int) -> int:
        failed = link.send_batch(batch, first, count)
        if failed:
            self._metrics.dropped["send"][0] += failed
        return count - failed

    def _look_up(
        self,
        link: UdpSocket,
        batch: Batch,
        slot: int,
        packet: bytes,
        key: bytes,
        memo: dict[bytes, _Remembered],
        now: float,
        pending: list[Pending],
    ) -> bytes | None:
        """Answer a query that is not remembered. Return the response without its id, or None if there is none (yet)."""
        name = batch.names[slot * NAME_BYTES :][: link.layout.name_bytes]
        control = batch.control[slot * CONTROL_BYTES :][: link.layout.control_bytes]
        if not self._is_admitted(link, name, control):
            return None
        try:
            found = self._responder.respond(packet, now, False, control[link.layout.destination])
            if self._log_query and not isinstance(found, Drop):
                self._log_query(found, *peer_of(name))
        except Exception as error:  # a bug must not cost the thread
            LIMITED.write(
                log, logging.ERROR, "dns: cannot answer query %s: internal error", packet[:64].hex(), error=error
            )
            return None
        if isinstance(found, Drop):
            self._metrics.malformed[found.reason][0] += 1
            return None
        if isinstance(found, Reply):
            cell = self._count(found, link.layout)
            cell[0] += 1
            if found.until > now and not self._log_query and len(key) <= MEMO_KEY_BYTES:
                if len(memo) >= MEMO_ENTRIES:
                    memo.clear()
                memo[key] = (found.until, found.data[2:], cell)
            return found.data[2:]
        if control[16:18] != b"\xfe\x80" or link.family == socket.AF_INET:
            index = link.layout.index
            control = control[: index.start] + b"\0\0\0\0" + control[index.stop :]
        pending.append(Pending(link, name, control, found, now))
        return None

    def _count(self, reply: Reply, layout: Layout) -> Cell:
        if reply.query is None:
            return self._metrics.malformed[reply.source]
        return self._metrics.cell("udp", layout.name, reply.query.type, reply.rcode, reply.source)

    def _is_admitted(self, link: UdpSocket, name: bytes, control: bytes) -> bool:
        """Return whether this client is served at this address. Both are remembered for the next query."""
        layout = link.layout
        peer, pktinfo = name[layout.address], control[layout.pktinfo]
        if name[2:4] == b"\0\0":  # no response can be sent to port 0
            self._metrics.dropped["source"][0] += 1
            return False
        if pktinfo not in self._destinations:
            if not is_unicast(link.family, pktinfo):
                self._metrics.dropped["group"][0] += 1
                return False
            index = int.from_bytes(control[layout.index], sys.byteorder)
            if not self._admission.admits_ingress(index, control[layout.destination]):
                self._metrics.dropped["policy"][0] += 1
                return False
            if len(self._destinations) >= SEEN_ADDRESSES:
                self._destinations.clear()
            self._destinations.add(pktinfo)
        if peer not in self._peers:
            if not self._admission.admits_client(peer):
                self._metrics.dropped["policy"][0] += 1
                return False
            if len(self._peers) >= SEEN_ADDRESSES:
                self._peers.clear()
            self._peers.add(peer)
        return True
