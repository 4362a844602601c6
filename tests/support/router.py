"""A node that forwards between two tun devices; the machines on both sides are packets that the test writes."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import select
import signal
import socket
import struct

from udpwatch.agent.testing.lab import Lab, Namespace

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_PATIENCE_SECONDS = 30.0


class Machine:
    """All machines behind one of the router's devices."""

    def __init__(self, name: str) -> None:
        """Make the device in the calling thread's namespace."""
        self.name = name
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH14s", name.encode(), _IFF_TUN_NO_PI, b""))

    def send(self, source: str, source_port: int, destination: str, port: int) -> None:
        """Let a datagram arrive at the router from this side."""
        os.write(self._fd, datagram(source, source_port, destination, port))

    def receive(self) -> tuple[str, int, str, int]:
        """Wait for the next datagram that the router sends to this side; returns (source, its port, destination, its
        port).
        """
        while True:
            assert select.select([self._fd], [], [], _PATIENCE_SECONDS)[0], f"nothing came out at {self.name}"
            found = _parse(os.read(self._fd, 65535))
            if found:
                return found

    def drain(self) -> None:
        """Discard what the router sent."""
        while select.select([self._fd], [], [], 0)[0]:
            os.read(self._fd, 65535)

    def close(self) -> None:
        os.close(self._fd)


class Router(Lab):
    """clients 10.1/16, fd00:1::/64 -- left [node] right -- 10.2/16, fd00:2::/64 servers; conntrack is active."""

    def __init__(self) -> None:
        super().__init__()
        self.node = self.namespace("node")
        inhabit(self.node)
        with self.node.entered():
            self.left, self.right = Machine("left"), Machine("right")
        self.node.sysctl("net/ipv4/ip_forward", "1")
        self.node.sysctl("net/ipv6/conf/all/forwarding", "1")
        self.node.ip(
            *(f"link set {name} up" for name in ("left", "right")),
            "addr add 10.1.0.1/16 brd 10.1.255.255 dev left",
            "addr add 10.2.0.1/16 brd 10.2.255.255 dev right",
            "addr add fd00:1::1/64 dev left nodad",
            "addr add fd00:2::1/64 dev right nodad",
        )
        self.node.nft("table inet t { chain f { type filter hook forward priority 0; ct state invalid drop; }; }")

    def ask(self, client: str, client_port: int, server: str, port: int) -> None:
        """Send a request through the router."""
        self.left.send(client, client_port, server, port)
        assert self.right.receive() == (client, client_port, server, port)

    def answer(self, server: str, port: int, client: str, client_port: int) -> None:
        """Send a reply, or a datagram that the other side starts with, through the router."""
        self.right.send(server, port, client, client_port)
        assert self.left.receive() == (server, port, client, client_port)

    def close(self) -> None:
        self.left.close()
        self.right.close()
        super().close()


def inhabit(namespace: Namespace) -> None:
    """Put a process into a namespace: the agent finds namespaces by their processes, as those of containers."""
    namespace.spawn("resident", signal.pause)


def datagram(source: str, source_port: int, destination: str, port: int) -> bytes:
    """Return an IP packet with a UDP datagram and valid checksums (RFC 791, 8200, 768)."""
    ends = [ipaddress.ip_address(address) for address in (source, destination)]
    addresses = b"".join(end.packed for end in ends)
    udp = struct.pack("!HHHH", source_port, port, 10, 0) + b"hi"
    if ends[0].version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
        return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + udp
    # IPv6 wants UDP's checksum, over a header of its own (RFC 8200, section 8.1)
    checksum = _checksum(addresses + struct.pack("!II", len(udp), 17) + udp)
    udp = udp[:6] + struct.pack("!H", checksum or 0xFFFF) + udp[8:]
    return struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + addresses + udp


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _parse(packet: bytes) -> tuple[str, int, str, int] | None:
    """Return None for other protocols than UDP, and for packets of the router itself (ICMP, neighbour discovery)."""
    if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
        at, first, length = (packet[0] & 15) * 4, 12, 4
    elif packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
        at, first, length = 40, 8, 16
    else:
        return None
    source, destination = (
        str(ipaddress.ip_address(packet[start : start + length])) for start in (first, first + length)
    )
    source_port, port = struct.unpack_from("!HH", packet, at)
    return source, source_port, destination, port
