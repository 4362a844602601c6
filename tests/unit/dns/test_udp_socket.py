"""Batches of responses over real sockets."""

from __future__ import annotations

import socket
import struct

from udpwatch.dns.udp_socket import BATCH, LAYOUTS, Outgoing, open_socket

V4 = LAYOUTS[socket.AF_INET]
LOCALHOST, BROADCAST = bytes((127, 0, 0, 1)), bytes((255, 255, 255, 255))


def name_of(address: bytes, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + address + bytes(8)


def leaving_from(address: bytes) -> bytes:
    """A control message with IP_PKTINFO."""
    return struct.pack("=Qii", 28, socket.IPPROTO_IP, 8) + bytes(4) + address + bytes(8)


def test_full_batch_is_filled_and_sent_again_and_again() -> None:
    batch = Outgoing(V4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.bind(("127.0.0.1", 0))
        name, control = name_of(LOCALHOST, client.getsockname()[1]), leaving_from(LOCALHOST)
        link = open_socket(("0.0.0.0", 0), socket.AF_INET, checked=False)
        for size in (500, 2, 100):
            for number in range(BATCH):
                assert (batch.count, batch.is_full) == (number, False)
                batch.add(name, control, number.to_bytes(2, "big") + b"x" * size)
            assert batch.is_full
            assert link.send_batch(batch, 0, batch.take()) == 0
            assert not batch.count
            for number in range(BATCH):
                data, peer = client.recvfrom(1000)
                assert data == number.to_bytes(2, "big") + b"x" * size
                assert peer == ("127.0.0.1", link.link.getsockname()[1])
        link.close()


def test_response_that_the_kernel_refuses_costs_only_itself() -> None:
    """sendmmsg(2) stops at the first datagram that fails: the rest of the batch is still sent."""
    batch = Outgoing(V4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.bind(("127.0.0.1", 0))
        port = client.getsockname()[1]
        link = open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False)
        for number in range(9):
            name = name_of(LOCALHOST if number % 3 else BROADCAST, port)
            batch.add(name, leaving_from(LOCALHOST), b"number %d" % number)
        assert link.send_batch(batch, 0, batch.take()) == 3
        assert [client.recv(100) for _ in range(6)] == [b"number %d" % number for number in range(9) if number % 3]
        link.close()


def test_closed_socket_sends_nothing() -> None:
    batch = Outgoing(V4)
    link = open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False)
    for _ in range(3):
        batch.add(name_of(LOCALHOST, 9), leaving_from(LOCALHOST), b"response")
    link.close()
    assert batch.send(link.link.fileno(), 0, batch.take()) == 3
