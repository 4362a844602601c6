"""The UDP path: a batch of datagrams in, a batch out, each answer from the address that was asked.

Rules
1. One thread reads all UDP sockets, and answers what is in memory. What needs somebody else's word is handed to the
   event loop, a batch at a time.
2. The same octets get the same answer until something changes: a `memo` per family, whose counters it holds, keeps
   answers under the datagram without its id. A hit costs one look-up and one copy. Every change of a table replaces
   the memos by empty ones.
3. IP_PKTINFO and IPV6_PKTINFO go back as they came, so that the answer's source is the address that was asked. The
   interface in them is set to 0, so that routing decides where the answer leaves; not so for link-local addresses,
   which mean nothing without.
4. The thread owns its sockets: others ask it to take one in or to close it, since a descriptor that is closed under a
   reader may be somebody else's a moment later.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.metrics import Cell, Metrics
from udpwatch.dns.responder import Drop, Forward, Reply, Responder

BATCH = 64
SLOT = 4096  # of a datagram read; no query is longer
BATCHES_IN_A_ROW = 8  # from one socket before the others have their turn
MEMO_ENTRIES = 4096  # of a family
MEMO_KEY_BYTES = 600
SEEN_ADDRESSES = 65_536
RECEIVE_BUFFER_BYTES = 4 << 20

_NAME_BYTES, _CONTROL_BYTES = 32, 64  # room for either family
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT = 10, 23, 5
_SO_RCVBUFFORCE = 33
_MSG_DONTWAIT = 0x40
_CMSG_HEADER_BYTES = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

log = logging.getLogger(__name__)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr, with the struct msghdr in it (recvmmsg(2))."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_uint32),  # struct msghdr ends here
        ("len", ctypes.c_uint32),
    )


assert ctypes.sizeof(_Mmsghdr) == 64, "struct mmsghdr of a 64-bit machine"
_LEN_WORD, _HEADER_WORDS = _Mmsghdr.len.offset // 4, ctypes.sizeof(_Mmsghdr) // 4


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things stand in a sockaddr and in the pktinfo control message of a family."""

    name: str  # metrics' family: 1 IPv4, 2 IPv6 (IANA address family numbers)
    name_bytes: int
    address: slice  # in the sockaddr
    control_bytes: int
    pktinfo: slice  # in the control message
    index: slice  # of the interface, in the control message
    destination: slice  # the address that was asked, in the control message


LAYOUTS = {
    socket.AF_INET: _Layout("1", 16, slice(4, 8), 32, slice(16, 28), slice(16, 20), slice(24, 28)),
    socket.AF_INET6: _Layout("2", 28, slice(8, 24), 40, slice(16, 36), slice(32, 36), slice(16, 32)),
}


def open_socket(
    address: tuple[str, int] | tuple[str, int, int, int], family: socket.AddressFamily, checked: bool
) -> UdpSocket:
    """Bind a socket that tells which address was asked; raises OSError. ``checked``: see `UdpSocket`."""
    link = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            link.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            link.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
        else:
            link.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            # A forged "fragmentation needed" must not make us send fragments that can be forged, too (RFC 9715).
            link.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)
        try:
            link.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        link.bind(address)
    except BaseException:
        link.close()
        raise
    return UdpSocket(link, family, checked)


class UdpSocket:
    """A bound socket and what its family needs. ``checked``: whether what comes is served depends on the address that
    was asked, or on the interface."""

    def __init__(self, link: socket.socket, family: socket.AddressFamily, checked: bool) -> None:
        self.link, self.family, self.checked = link, family, checked
        self.fd = link.fileno()
        self.layout = LAYOUTS[family]
        self._lock = threading.Lock()

    def close(self) -> None:
        """Not while another thread is sending: the descriptor may be another file's a moment later."""
        with self._lock:
            self.link.close()

    def send(self, data: bytes, name: bytes, control: bytes) -> None:
        """Send one answer to a peer (a raw sockaddr) by way of its request's control message; raises OSError."""
        level, kind = socket.IPPROTO_IPV6, _IPV6_PKTINFO
        address: tuple[str, int] | tuple[str, int, int, int] = peer_of(name)
        if self.family == socket.AF_INET:
            level, kind = socket.IPPROTO_IP, _IP_PKTINFO
        else:
            address = (*address[:2], *struct.unpack("!I", name[4:8]), *struct.unpack("=I", name[24:28]))
        with self._lock:
            self.link.sendmsg([data], [(level, kind, control[self.layout.pktinfo])], _MSG_DONTWAIT, address)


def peer_of(name: bytes) -> tuple[str, int]:
    """Address and port of a raw sockaddr."""
    port = struct.unpack_from("!H", name, 2)[0]
    if len(name) == LAYOUTS[socket.AF_INET].name_bytes:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port


@dataclass(frozen=True, slots=True)
class Pending:
    """A question on its way to an upstream server, with all that its answer needs to find its way back."""

    socket: UdpSocket
    name: bytes  # the peer's sockaddr
    control: bytes  # the request's control message, made ready for the answer
    forward: Forward
    received: float  # monotonic seconds

    @property
    def peer(self) -> bytes:
        """4 or 16 octets."""
        return self.name[self.socket.layout.address]


class _Batch:
    """Memory for BATCH datagrams of one family, in and out, that the kernel reads and writes in place."""

    def __init__(self, layout: _Layout) -> None:
        self.data = mmap.mmap(-1, BATCH * SLOT)
        self.answers = mmap.mmap(-1, BATCH * SLOT)
        self.names = mmap.mmap(-1, BATCH * _NAME_BYTES)
        self.control = mmap.mmap(-1, BATCH * _CONTROL_BYTES)
        data, answers, names, control = map(_address, (self.data, self.answers, self.names, self.control))
        self._iov_in, self._iov_out = (_Iovec * BATCH)(), (_Iovec * (2 * BATCH))()
        self._in, self._out = (_Mmsghdr * BATCH)(), (_Mmsghdr * BATCH)()
        for slot in range(BATCH):
            self._iov_in[slot] = _Iovec(data + slot * SLOT, SLOT)
            # An answer begins with its question's id, where that stands.
            self._iov_out[2 * slot] = _Iovec(data + slot * SLOT, 2)
            self._iov_out[2 * slot + 1] = _Iovec(answers + slot * SLOT, 0)
            for headers, iov, count in ((self._in, self._iov_in, 1), (self._out, self._iov_out, 2)):
                header = headers[slot]
                header.name, header.namelen = names + slot * _NAME_BYTES, layout.name_bytes
                header.control, header.controllen = control + slot * _CONTROL_BYTES, layout.control_bytes
                header.iov, header.iovlen = ctypes.addressof(iov) + slot * count * ctypes.sizeof(_Iovec), count
        self._fresh = bytes(self._in)
        self.lengths = memoryview(self._in).cast("B").cast("I")
        self.answer_lengths = memoryview(self._iov_out).cast("B").cast("Q")
        self._in_at, self._out_at = ctypes.addressof(self._in), ctypes.addressof(self._out)

    def receive(self, fd: int) -> int:
        """How many datagrams came; 0: none, or an error that the next read will tell again."""
        ctypes.memmove(self._in_at, self._fresh, len(self._fresh))  # the kernel writes lengths into it
        count: int = _libc.recvmmsg(fd, self._in_at, BATCH, _MSG_DONTWAIT, None)
        return max(count, 0)

    def send(self, fd: int, first: int, count: int) -> int:
        """Send the answers of consecutive slots; how many could not be sent."""
        failed = 0
        while count > 0:
            sent = _libc.sendmmsg(fd, self._out_at + first * ctypes.sizeof(_Mmsghdr), count, _MSG_DONTWAIT)
            if sent <= 0:  # the first of them: its address went away, the buffer is full, ...
                failed, sent = failed + 1, 1
            first, count = first + sent, count - sent
        return failed


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


#: until (monotonic seconds), the answer without its id, the counter of its kind
_Remembered = tuple[float, bytes, Cell]


def _no_memos() -> dict[socket.AddressFamily, dict[bytes, _Remembered]]:
    return {family: {} for family in LAYOUTS}


class UdpThread(threading.Thread):
    """Answers on all UDP sockets."""

    def __init__(
        self,
        responder: Responder,
        metrics: Metrics,
        admits: Callable[[bytes], bool],
        serves: Callable[[int, bytes], bool],
        forward: Callable[[list[Pending]], None],
        tell: Callable[[Reply | Forward, str, int], None] | None,
    ) -> None:
        """``admits``: whether a peer (4 or 16 octets) is served. ``serves``: whether what comes by an interface (its
        index) for an address (4 or 16 octets) is. ``forward`` takes what is not in memory; it is called
        in this thread. ``tell`` hears of every question (log); with it nothing is remembered.
        """
        super().__init__(name="dns-udp", daemon=True)
        self._responder, self._metrics, self._admits, self._serves = responder, metrics, admits, serves
        self._forward, self._tell = forward, tell
        self._memos = _no_memos()
        self._peers: set[bytes] = set()  # that are served
        self._destinations: set[bytes] = set()  # that are served: pktinfo, address and interface
        self._batches = {family: _Batch(layout) for family, layout in LAYOUTS.items()}
        self._orders: deque[tuple[bool, UdpSocket]] = deque()
        self._sockets: dict[int, UdpSocket] = {}
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._stopping = False

    # ---- asked for by others ----

    def add(self, link: UdpSocket) -> None:
        """Serve a socket; it is this thread's from now on."""
        self._order(True, link)

    def remove(self, link: UdpSocket) -> None:
        """Close one."""
        self._order(False, link)

    def _order(self, add: bool, link: UdpSocket) -> None:
        self._orders.append((add, link))
        with contextlib.suppress(OSError):  # it has ended, and closed everything
            os.eventfd_write(self._wake, 1)

    def invalidate(self) -> None:
        """Something that answers depend on has changed, and the change is in place: forget what was remembered."""
        self._memos = _no_memos()

    def readmit(self) -> None:
        """Who is served has changed."""
        self._peers, self._destinations = set(), set()

    def stop(self) -> None:
        """End, and close all sockets; returns when that is done."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if self.ident is None:  # never started
            self._close()
        else:
            self.join()

    # ---- the thread ----

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self._stopping:
                for fd, _ in self._epoll.poll():
                    if fd == self._wake:
                        self._obey()
                    elif (link := self._sockets.get(fd)) is not None:
                        self._serve(link)
        except BaseException:
            log.exception("dns: nothing is answered over UDP any more")
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

    def _serve(self, link: UdpSocket) -> None:
        batch = self._batches[link.family]
        for _ in range(BATCHES_IN_A_ROW):
            count = batch.receive(link.fd)
            if not count:
                return
            self._answer(link, batch, count)
            if count < BATCH:
                return

    def _answer(self, link: UdpSocket, batch: _Batch, count: int) -> None:
        """The hot loop: all of it is written for speed, and everything that is rare is elsewhere."""
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
            at, name_at, control_at = slot * SLOT, slot * _NAME_BYTES, slot * _CONTROL_BYTES
            key = data[at + 2 : at + lengths[slot * _HEADER_WORDS + _LEN_WORD]]
            remembered = memo.get(key)
            if (
                remembered is not None  # the order of these is that of their price
                and remembered[0] > begun
                and names[name_at + peer_from : name_at + peer_to] in peers
                and (not checked or control[control_at + info_from : control_at + info_to] in destinations)
            ):
                _, body, cell = remembered
                cell[0] += 1
            else:
                packet = data[at : at + 2] + key
                found = self._look(link, batch, slot, packet, key, memo, begun, pending)
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

    def _send(self, link: UdpSocket, batch: _Batch, first: int, count: int) -> int:
        failed = batch.send(link.fd, first, count)
        if failed:
            self._metrics.dropped["send"][0] += failed
        return count - failed

    def _look(
        self,
        link: UdpSocket,
        batch: _Batch,
        slot: int,
        packet: bytes,
        key: bytes,
        memo: dict[bytes, _Remembered],
        now: float,
        pending: list[Pending],
    ) -> bytes | None:
        """What is not remembered: the answer without its id, or None where there is none (yet)."""
        name = batch.names[slot * _NAME_BYTES :][: link.layout.name_bytes]
        control = batch.control[slot * _CONTROL_BYTES :][: link.layout.control_bytes]
        if not self._may(link, name, control):
            return None
        try:
            found = self._responder.respond(packet, now)
            if self._tell and not isinstance(found, Drop):
                self._tell(found, *peer_of(name))
        except Exception as error:  # a bug must not cost the thread
            LIMITED.write(log, logging.ERROR, "dns: cannot answer a question: %s", packet[:64].hex(), error=error)
            return None
        if isinstance(found, Drop):
            self._metrics.malformed[found.reason][0] += 1
            return None
        if isinstance(found, Reply):
            cell = self._count(found, link.layout)
            cell[0] += 1
            if found.until > now and not self._tell and len(key) <= MEMO_KEY_BYTES:
                if len(memo) >= MEMO_ENTRIES:
                    memo.clear()
                memo[key] = (found.until, found.data[2:], cell)
            return found.data[2:]
        if control[16:18] != b"\xfe\x80" or link.family == socket.AF_INET:
            index = link.layout.index
            control = control[: index.start] + b"\0\0\0\0" + control[index.stop :]
        pending.append(Pending(link, name, control, found, now))
        return None

    def _count(self, reply: Reply, layout: _Layout) -> Cell:
        if reply.query is None:
            return self._metrics.malformed[reply.source]
        return self._metrics.cell("udp", layout.name, reply.query.type, reply.rcode, reply.source)

    def _may(self, link: UdpSocket, name: bytes, control: bytes) -> bool:
        """Whether this peer is served at this address; what is remembered of both spares the next look."""
        layout = link.layout
        peer, pktinfo = name[layout.address], control[layout.pktinfo]
        if name[2:4] == b"\0\0":  # nobody can be answered at port 0
            self._metrics.dropped["source"][0] += 1
            return False
        if pktinfo not in self._destinations:
            if not _is_unicast(link.family, pktinfo):
                self._metrics.dropped["group"][0] += 1
                return False
            if not self._serves(int.from_bytes(control[layout.index], sys.byteorder), control[layout.destination]):
                self._metrics.dropped["policy"][0] += 1
                return False
            if len(self._destinations) >= SEEN_ADDRESSES:
                self._destinations.clear()
            self._destinations.add(pktinfo)
        if peer not in self._peers:
            if not self._admits(peer):
                self._metrics.dropped["policy"][0] += 1
                return False
            if len(self._peers) >= SEEN_ADDRESSES:
                self._peers.clear()
            self._peers.add(peer)
        return True


def _is_unicast(family: socket.AddressFamily, pktinfo: bytes) -> bool:
    """Whether one address was asked: nobody can answer from a group's. IPv4's ipi_spec_dst is then another address than
    the packet's own, ipi_addr (ip(7)); no control message at all reads as zeros."""
    if family == socket.AF_INET:
        return pktinfo[4:8] == pktinfo[8:12] != b"\0\0\0\0"
    address = ipaddress.IPv6Address(pktinfo[:16])
    return not address.is_multicast and not address.is_unspecified
