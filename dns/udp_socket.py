"""UDP sockets that report which address was asked, and the memory that the kernel fills and sends in batches."""

from __future__ import annotations

import ctypes
import ipaddress
import mmap
import socket
import struct
from dataclasses import dataclass

from udpwatch.dns import libc

BATCH = 64  # datagrams per system call
SLOT = 4096  # bytes read of a datagram; no query is longer
RECEIVE_BUFFER_BYTES = 4 << 20

NAME_BYTES, CONTROL_BYTES = 32, 64  # per datagram: enough for either family
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT = 10, 23, 5
_SO_RCVBUFFORCE = 33


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr, including its struct msghdr (recvmmsg(2))."""

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
LEN_WORD, HEADER_WORDS = _Mmsghdr.len.offset // 4, ctypes.sizeof(_Mmsghdr) // 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a sockaddr and of the pktinfo control message are, per family."""

    name: str  # metric label: 1 IPv4, 2 IPv6 (IANA address family numbers)
    name_bytes: int
    address: slice  # in the sockaddr
    control_bytes: int
    pktinfo: slice  # in the control message
    index: slice  # of the interface, in the control message
    destination: slice  # the address that was asked, in the control message


LAYOUTS = {
    socket.AF_INET: Layout("1", 16, slice(4, 8), 32, slice(16, 28), slice(16, 20), slice(24, 28)),
    socket.AF_INET6: Layout("2", 28, slice(8, 24), 40, slice(16, 36), slice(32, 36), slice(16, 32)),
}


class Batch:
    """Memory for BATCH datagrams of one family, in and out, that the kernel reads and writes in place."""

    def __init__(self, layout: Layout) -> None:
        self.data = mmap.mmap(-1, BATCH * SLOT)
        self.answers = mmap.mmap(-1, BATCH * SLOT)
        self.names = mmap.mmap(-1, BATCH * NAME_BYTES)
        self.control = mmap.mmap(-1, BATCH * CONTROL_BYTES)
        data, answers, names, control = map(_address, (self.data, self.answers, self.names, self.control))
        self._iov_in, self._iov_out = (_Iovec * BATCH)(), (_Iovec * (2 * BATCH))()
        self._in, self._out = (_Mmsghdr * BATCH)(), (_Mmsghdr * BATCH)()
        for slot in range(BATCH):
            self._iov_in[slot] = _Iovec(data + slot * SLOT, SLOT)
            # A response starts with the id of its query, taken from where the query is.
            self._iov_out[2 * slot] = _Iovec(data + slot * SLOT, 2)
            self._iov_out[2 * slot + 1] = _Iovec(answers + slot * SLOT, 0)
            for headers, iov, count in ((self._in, self._iov_in, 1), (self._out, self._iov_out, 2)):
                header = headers[slot]
                header.name, header.namelen = names + slot * NAME_BYTES, layout.name_bytes
                header.control, header.controllen = control + slot * CONTROL_BYTES, layout.control_bytes
                header.iov, header.iovlen = ctypes.addressof(iov) + slot * count * ctypes.sizeof(_Iovec), count
        self._fresh = bytes(self._in)
        self.lengths = memoryview(self._in).cast("B").cast("I")
        self.answer_lengths = memoryview(self._iov_out).cast("B").cast("Q")
        self._in_at, self._out_at = ctypes.addressof(self._in), ctypes.addressof(self._out)

    def receive(self, fd: int) -> int:
        """Receive datagrams. Return how many; 0 for none, or for an error that the next call reports again."""
        ctypes.memmove(self._in_at, self._fresh, len(self._fresh))  # the kernel writes lengths into it
        count: int = libc.recvmmsg(fd, self._in_at, BATCH, libc.DONTWAIT, None)
        return max(count, 0)

    def send(self, fd: int, first: int, count: int) -> int:
        """Send the responses of consecutive slots. Return how many could not be sent."""
        failed = 0
        while count > 0:
            sent = libc.sendmmsg(fd, self._out_at + first * ctypes.sizeof(_Mmsghdr), count, libc.DONTWAIT)
            if sent <= 0:  # the first one failed: its address has disappeared, the buffer is full, ...
                failed, sent = failed + 1, 1
            first, count = first + sent, count - sent
        return failed


class Outgoing(Batch):
    """A batch of responses that is filled one by one, for one socket."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.link: UdpSocket | None = None
        self.count = 0

    @property
    def is_full(self) -> bool:
        """Whether the batch must be sent first."""
        return self.count >= BATCH

    def add(self, name: bytes, control: bytes, data: bytes) -> None:
        """Add a response of at most SLOT octets, with the client's sockaddr and the control message."""
        slot = self.count
        self.count += 1
        at, name_at, control_at, size = slot * SLOT, slot * NAME_BYTES, slot * CONTROL_BYTES, len(data) - 2
        self.data[at : at + 2] = data[:2]
        self.answers[at : at + size] = data[2:]
        self.names[name_at : name_at + len(name)] = name
        self.control[control_at : control_at + len(control)] = control
        self.answer_lengths[4 * slot + 3] = size

    def take(self) -> int:
        """Return the number of responses, and start anew."""
        count, self.count = self.count, 0
        return count


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class UdpSocket:
    """A bound socket. ``checked``: whether a query is served depends on the address that it asked or its interface."""

    def __init__(self, link: socket.socket, family: socket.AddressFamily, checked: bool) -> None:
        self.link, self.family, self.checked = link, family, checked
        self.fd = link.fileno()
        self.layout = LAYOUTS[family]

    def close(self) -> None:
        """Close the socket."""
        self.link.close()

    def receive(self, batch: Batch) -> int:
        """Fill ``batch``. Return the number of datagrams."""
        return batch.receive(self.fd)

    def send_batch(self, batch: Batch, first: int, count: int) -> int:
        """Send the responses of consecutive slots. Return how many could not be sent."""
        return batch.send(self.fd, first, count)


def open_socket(
    address: tuple[str, int] | tuple[str, int, int, int], family: socket.AddressFamily, checked: bool
) -> UdpSocket:
    """Bind a socket that reports which address was asked. Raises OSError. ``checked``: see `UdpSocket`."""
    link = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            link.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            link.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
        else:
            link.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            # A forged "fragmentation needed" must not make us send fragments, which can be forged too (RFC 9715).
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


def peer_of(name: bytes) -> tuple[str, int]:
    """Return address and port of a raw sockaddr."""
    port = struct.unpack_from("!H", name, 2)[0]
    if len(name) == LAYOUTS[socket.AF_INET].name_bytes:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port


def is_unicast(family: socket.AddressFamily, pktinfo: bytes) -> bool:
    """Return whether a unicast address was asked: a multicast or broadcast address cannot be a source.

    For these, IPv4's ipi_spec_dst differs from the packet's own ipi_addr (ip(7)). A missing control message reads as
    zeros.
    """
    if family == socket.AF_INET:
        return pktinfo[4:8] == pktinfo[8:12] != b"\0\0\0\0"
    address = ipaddress.IPv6Address(pktinfo[:16])
    return not address.is_multicast and not address.is_unspecified
