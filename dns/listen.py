"""Which sockets there are: on everything, or on the addresses and interfaces that were named, as they come and go.

On everything is one socket per family on the wildcard address, unless another program holds port 53 on one address
(systemd-resolved does, on 127.0.0.53): then each address gets a socket of its own, but for that one.

An address is no fence: Linux takes a packet for any of its addresses from any interface. So where interfaces were
named, it counts by which one a question came, whatever address it asked (CVE-2012-3411).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from fnmatch import fnmatchcase

from udpwatch.dns import tcp, udp
from udpwatch.dns.addresses import Local
from udpwatch.dns.errors import NetworkError
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.tcp import TcpServer
from udpwatch.dns.udp import UdpSocket, UdpThread
from udpwatch.dns.zone import pack_address

LOOPBACK = "lo"
#: what an address may do while it comes or goes; it is tried again
_PASSING = {errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO}
_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}

log = logging.getLogger(__name__)

_SocketAddress = tuple[str, int] | tuple[str, int, int, int]
_Pair = tuple[UdpSocket, socket.socket]


class Listening:
    """Keeps the sockets in step with the addresses."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._named = bool(settings.listen_addresses or settings.interfaces or settings.except_interfaces)
        self._by_interface = bool(settings.interfaces or settings.except_interfaces)
        self._ways: dict[int, bool] = {}  # interfaces by index: whether what comes by them is served
        self._addresses = {pack_address(text) for text in settings.listen_addresses}
        self._open: dict[_SocketAddress, _Pair] = {}
        self._handed: set[_SocketAddress] = set()  # to the servers
        #: Had by other programs when we began: theirs, also while they restart, until the address itself goes.
        self._theirs: set[_SocketAddress] = set()
        self._told: set[tuple[_SocketAddress, int]] = set()
        self._wildcard = False

    @property
    def port(self) -> int:
        """The port that is listened on; the one that the kernel chose, where 0 was asked for (tests)."""
        for link, _ in self._open.values():
            found: int = link.link.getsockname()[1]
            return found
        return self._settings.port

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [address[0] for address in self._open]

    def open(self, locals_: list[Local]) -> None:
        """The first sockets; raises NetworkError where what was asked for belongs to another program."""
        if not self._named and self._open_wildcard():
            self._wildcard = True
            return
        self._adjust(locals_, starting=True)
        for text in self._settings.listen_addresses:
            if all(local.packed != pack_address(text) for local in locals_):
                log.warning("%s is no address of this host yet: it is listened on when it comes", text)

    def serve(self, udp_thread: UdpThread, tcp_server: TcpServer) -> None:
        """Hand the sockets over, these and all that come."""
        self._udp, self._tcp = udp_thread, tcp_server
        self._hand_over()

    def _hand_over(self) -> list[_SocketAddress]:
        new = [address for address in self._open if address not in self._handed]
        for address in new:
            link, listener = self._open[address]
            self._handed.add(address)
            self._udp.add(link)
            self._tcp.add(listener)
        return new

    def update(self, locals_: list[Local]) -> bool:
        """Addresses or interfaces have changed. False: one of them could not be had yet, and should be tried again."""
        self._ways = {}
        if self._wildcard:
            return True
        gone, complete = self._adjust(locals_, starting=False)
        for address, (link, listener) in gone.items():
            self._handed.discard(address)
            self._udp.remove(link)
            self._tcp.remove(listener)
            log.info("dns: no longer listening on %s", address[0])
        for address in self._hand_over():
            log.info("dns: listening on %s", address[0])
        return complete

    def close(self) -> None:
        """What was not handed over."""
        for address, (link, listener) in self._open.items():
            if address not in self._handed:
                link.close()
                listener.close()
        self._open.clear()

    def serves(self, index: int, destination: bytes) -> bool:
        """Whether a question is served that came by this interface for this address (4 or 16 octets); any thread may
        ask. dnsmasq's rule: what comes to a `--listen-address`, by an interface that is served, or from this host."""
        if not self._by_interface or destination in self._addresses:
            return True
        ways = self._ways
        if (served := ways.get(index)) is not None:
            return served
        try:
            name = socket.if_indextoname(index)
        except OSError:  # it has gone; or no descriptor is free, so that this cannot be remembered
            return False
        served = ways[index] = name == LOOPBACK or self._is_served(name)
        if not served:  # once for each interface: the answer is remembered
            LIMITED.write(
                log,
                logging.WARNING,
                "dns: ignoring query that came by %s, an interface that is not served; "
                "--listen-address serves an address whichever way questions come",
                name,
            )
        return served

    def _is_served(self, interface: str) -> bool:
        settings = self._settings
        if _matches(interface, settings.except_interfaces):
            return False
        everything = not settings.listen_addresses and not settings.interfaces
        return everything or _matches(interface, settings.interfaces)

    def is_own(self, server: Server, locals_: list[Local]) -> bool:
        """Whether asking this server would be asking ourselves."""
        if server.port != self.port:
            return False
        text, _, zone = server.address.partition("%")
        address = ipaddress.ip_address(text)
        address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 leads to an IPv4 socket
        if address.is_unspecified:  # Linux connects it to loopback
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        ours = {local.packed for local in locals_ if not zone or local.interface == zone}
        if address.packed not in ours and not (address.is_loopback and address.version == 4):
            return False
        return self._wildcard or any(pack_address(each[0]) == address.packed for each in self._open)

    def _open_wildcard(self) -> bool:
        port = self._settings.port
        try:
            for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104  asked for
                try:
                    self._open[host, port] = _pair((host, port), family, checked=True)
                except OSError as error:
                    if error.errno not in _NO_FAMILY or family == socket.AF_INET:
                        raise
        except OSError as error:
            for link, listener in self._open.values():
                link.close()
                listener.close()
            self._open.clear()
            if error.errno != errno.EADDRINUSE:
                raise NetworkError(_refused("every address", port, error)) from None
            return False
        return True

    def _wanted(self, locals_: list[Local]) -> dict[_SocketAddress, socket.AddressFamily]:
        settings, port = self._settings, self._settings.port
        wanted: dict[_SocketAddress, socket.AddressFamily] = {}
        for local in locals_:
            # As dnsmasq: this host is served by every --interface.
            is_loopback = local.interface == LOOPBACK and bool(settings.interfaces)
            excepted = _matches(local.interface, settings.except_interfaces)
            by_interface = self._is_served(local.interface) or (is_loopback and not excepted)
            if not local.usable or not (by_interface or local.packed in self._addresses):
                continue
            host = local.text.partition("%")[0]
            if len(local.packed) == 4:
                wanted[host, port] = socket.AF_INET
            else:
                scope = local.index if local.is_link_local else 0
                wanted[host, port, 0, scope] = socket.AF_INET6
        for packed in self._addresses:  # any of 127.0.0.0/8 can be bound, though only the first is listed
            if packed[:1] == b"\x7f" and len(packed) == 4:
                wanted[socket.inet_ntop(socket.AF_INET, packed), port] = socket.AF_INET
        return wanted

    def _adjust(self, locals_: list[Local], starting: bool) -> tuple[dict[_SocketAddress, _Pair], bool]:
        """Open what is missing; returns what is to be closed, and whether everything wanted is open."""
        wanted, complete = self._wanted(locals_), True
        self._theirs &= wanted.keys()
        for address, family in wanted.items():
            if address in self._open or address in self._theirs:
                continue
            try:
                checked = self._by_interface and pack_address(address[0]) not in self._addresses
                self._open[address] = _pair(address, family, checked)
            except OSError as error:
                number, complete = error.errno or 0, False
                if starting and number not in _PASSING:
                    if pack_address(address[0]) in self._addresses or number != errno.EADDRINUSE:
                        raise NetworkError(_refused(address[0], self._settings.port, error)) from None
                    self._theirs.add(address)
                if number not in _PASSING and (address, number) not in self._told:
                    self._told.add((address, number))
                    log.warning("%s; the other addresses are served", _refused(address[0], self._settings.port, error))
        if starting and not self._open and self._told:
            raise NetworkError(
                f"cannot listen on port {self._settings.port}: other programs have it on every address; stop them, or "
                "choose another port with --port"
            )
        return {each: self._open.pop(each) for each in list(self._open) if each not in wanted}, complete


def _matches(interface: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(interface, pattern) for pattern in patterns)


def _refused(address: str, port: int, error: OSError) -> str:
    way_out = {
        errno.EADDRINUSE: "another program has it; stop that one, or choose other addresses with --listen-address",
        errno.EACCES: "CAP_NET_BIND_SERVICE is missing; run this as root, or choose another port with --port",
    }.get(error.errno or 0, "choose another address with --listen-address")
    return f"cannot listen on {address} port {port}: {error.strerror}: {way_out}"


def _pair(address: _SocketAddress, family: socket.AddressFamily, checked: bool) -> _Pair:
    link = udp.open_socket(address, family, checked)
    try:
        # Port 0 (tests): both on the one that the kernel chose first.
        chosen = (address[0], link.link.getsockname()[1], *address[2:])
        return link, tcp.open_socket(chosen, family)
    except BaseException:
        link.close()
        raise
