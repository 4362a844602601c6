"""The UDP server: a batch of datagrams in, a batch out, each response from the address that was asked.

Rules
1. The packet loop's thread reads all UDP sockets and answers queries from memory. Queries that need an upstream server
   go to the forwarder, in the same thread.
2. Until something changes, the same bytes get the same response: a memo per family stores responses under the query
   without its id. A hit costs one lookup and one copy. Every change of a table replaces the memos with empty ones.
3. IP_PKTINFO and IPV6_PKTINFO are sent back as received, so that the source of the response is the address that was
   asked. The interface in them is set to 0, so that routing picks the outgoing interface; link-local addresses, which
   need their interface, keep it.
4. The thread owns its sockets: other threads ask it to add or close one, because a descriptor that is closed while it
   is being read may be another file's a moment later.
5. Responses of upstream servers are collected and sent at the end of a turn, a batch at a time.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from udpwatch.dns.admission import Admission
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Cell, Metrics
from udpwatch.dns.packet_loop import PacketLoop
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
    Outgoing,
    UdpSocket,
    is_unicast,
    peer_of,
)

BATCHES_IN_A_ROW = 8  # from one socket before the others get their turn
MEMO_ENTRIES = 4096  # per family
MEMO_KEY_BYTES = 600
SEEN_ADDRESSES = 65_536

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class UdpQuery:
    """A query that needs an upstream server, with all that its response needs to get back to the client.

    It is a `forwarder.ClientQuery`.
    """

    server: UdpServer
    socket: UdpSocket
    name: bytes  # the client's sockaddr
    control: bytes  # the query's control message, prepared for the response
    client: bytes  # the client's address, 4 or 16 octets
    forward: Forward
    received: float  # monotonic seconds

    @property
    def origin(self) -> Hashable:
        """The client's port, and the id: the same again if the client repeats its query."""
        return self.name, self.forward.query.id

    @property
    def must_answer(self) -> bool:
        """The client repeats its query if there is no response."""
        return False

    def peer(self) -> tuple[str, int]:
        """Return the client's address and port."""
        return peer_of(self.name)

    def deliver(self, reply: Reply) -> None:
        """Send the response at the end of this turn."""
        self.server.send_later(self, reply)


#: until (monotonic seconds), the response without its id, the counter of its kind
_Remembered = tuple[float, bytes, Cell]


def _no_memos() -> dict[socket.AddressFamily, dict[bytes, _Remembered]]:
    return {family: {} for family in LAYOUTS}


class UdpServer:
    """Answers queries on all UDP sockets."""

    def __init__(
        self,
        loop: PacketLoop,
        responder: Responder,
        metrics: Metrics,
        admission: Admission,
        forward: Callable[[list[UdpQuery]], None],
        log_query: LogQuery | None,
    ) -> None:
        """``forward`` takes queries that cannot be answered from memory. With ``log_query``, which gets every query, no
        response is remembered.
        """
        self._loop, self._responder, self._metrics, self._admission = loop, responder, metrics, admission
        self._forward, self._log_query = forward, log_query
        self._memos = _no_memos()
        self._peers: set[bytes] = set()  # clients known to be served
        self._destinations: set[bytes] = set()  # pktinfo (address and interface) known to be served
        self._batches = {family: Batch(layout) for family, layout in LAYOUTS.items()}
        self._outgoing = {family: Outgoing(layout) for family, layout in LAYOUTS.items()}
        self._sockets: set[UdpSocket] = set()

    # ---- for other threads ----

    def add(self, link: UdpSocket) -> None:
        """Serve a socket; the thread owns it from now on."""
        self._loop.post(lambda: self._add(link))

    def remove(self, link: UdpSocket) -> None:
        """Close a socket."""
        self._loop.post(lambda: self._remove(link))

    def invalidate(self) -> None:
        """Forget remembered responses, after a table that they depend on has been replaced."""
        self._memos = _no_memos()

    def readmit(self) -> None:
        """Forget which clients and addresses are served, after `Admission` has changed."""
        self._peers, self._destinations = set(), set()

    # ---- the thread ----

    def _add(self, link: UdpSocket) -> None:
        self._sockets.add(link)
        self._loop.register(link.fd, partial(self.serve, link))

    def _remove(self, link: UdpSocket) -> None:
        if link in self._sockets:
            self._sockets.discard(link)
            self._loop.unregister(link.fd)
            link.close()

    def close(self) -> None:
        """Send what is left, and close all sockets."""
        self._flush()
        for link in list(self._sockets):
            self._remove(link)

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
        pending: list[UdpQuery] = []
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
        pending: list[UdpQuery],
    ) -> bytes | None:
        """Answer a query that is not remembered. Return the response without its id, or None if there is none (yet)."""
        layout, name_at, control_at = link.layout, slot * NAME_BYTES, slot * CONTROL_BYTES
        name = batch.names[name_at : name_at + layout.name_bytes]
        control = batch.control[control_at : control_at + layout.control_bytes]
        peer = name[layout.address]
        is_known = peer in self._peers and control[layout.pktinfo] in self._destinations
        if not is_known and not self._is_admitted(link, name, control):
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
        pending.append(UdpQuery(self, link, name, control, peer, found, now))
        return None

    # ---- responses of upstream servers ----

    def send_later(self, query: UdpQuery, reply: Reply) -> None:
        """Send a response at the end of this turn."""
        link = query.socket
        if reply.query is not None:
            self._metrics.cell("udp", link.layout.name, reply.query.type, reply.rcode, reply.source)[0] += 1
        outgoing = self._outgoing[link.family]
        if outgoing.link is not link or outgoing.is_full:
            self._flush()
        if not outgoing.count:
            outgoing.link = link
            self._loop.call_soon(self._flush)
        outgoing.add(query.name, query.control, reply.data)

    def _flush(self) -> None:
        for outgoing in self._outgoing.values():
            if outgoing.count and outgoing.link is not None:
                count, link = outgoing.take(), outgoing.link
                is_open = link in self._sockets  # else its address has disappeared
                failed = link.send_batch(outgoing, 0, count) if is_open else count
                if failed:
                    self._metrics.dropped["send"][0] += failed

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
