"""The listening sockets: on every address, or on the configured addresses and interfaces as they come and go.

Rules
1. For every address there is one socket per family on the wildcard address, unless another program uses port 53 on one
   address (systemd-resolved does, on 127.0.0.53): then each other address gets its own socket.
2. As in dnsmasq, --interface and --except-interface listen on every address, too: the interface on which a query
   arrives decides (admission.py). With --bind-interfaces or --bind-dynamic only the addresses of these interfaces have
   sockets.
3. Each --listen-address has its own socket. --listen-address=0.0.0.0 and :: mean every address of the family.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket

from udpwatch.dns import tcp, udp_socket
from udpwatch.dns.addresses import Local
from udpwatch.dns.admission import Admission, matches
from udpwatch.dns.errors import NetworkError
from udpwatch.dns.names import pack_address
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.tcp import TcpServer
from udpwatch.dns.udp import UdpServer
from udpwatch.dns.udp_socket import UdpSocket

#: Errors of an address that is just appearing or disappearing; binding is retried.
_PASSING = {errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO}
_WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104  the user asked for it
_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}

log = logging.getLogger(__name__)

_SocketAddress = tuple[str, int] | tuple[str, int, int, int]
_Pair = tuple[UdpSocket, socket.socket]


class Listening:
    """Keeps the sockets in step with this host's addresses."""

    def __init__(self, settings: Settings, admission: Admission) -> None:
        self._settings, self._admission = settings, admission
        self._open: dict[_SocketAddress, _Pair] = {}
        self._handed: set[_SocketAddress] = set()  # to the servers
        #: In use by other programs at the start: left to them, also while they restart, until the address disappears.
        self._taken: set[_SocketAddress] = set()
        self._logged: set[tuple[_SocketAddress, int]] = set()
        self._unbound: dict[_SocketAddress, str] = {}  # configured, and why it could not be bound
        self._every = _every_address(settings)  # families
        self._wildcard: set[socket.AddressFamily] = set()  # of these, those with a socket on the wildcard address

    @property
    def port(self) -> int:
        """The port; if 0 was configured (tests), the one that the kernel chose."""
        for link, _ in self._open.values():
            found: int = link.link.getsockname()[1]
            return found
        return self._settings.port

    @property
    def addresses(self) -> list[str]:
        """The addresses it listens on."""
        return [address[0] for address in self._open]

    def open(self, locals_: list[Local]) -> None:
        """Open the first sockets. Raises NetworkError if another program uses what was configured."""
        if self._every and not self._open_wildcard():
            log.info(
                "dns: another program uses port %d on an address of this host; listening on each other address with "
                "its own socket",
                self._settings.port,
            )
        self._adjust(locals_, starting=True)
        for line in warnings(self._settings, locals_):
            log.warning("dns: %s", line)

    @property
    def unbound(self) -> list[str]:
        """Why configured addresses of this host are not listened on."""
        return list(self._unbound.values())

    def serve(self, udp_server: UdpServer, tcp_server: TcpServer) -> None:
        """Hand the sockets, now and later, to the servers."""
        self._udp, self._tcp = udp_server, tcp_server
        self._hand_over()

    def _hand_over(self) -> list[_SocketAddress]:
        new = [address for address in self._open if address not in self._handed]
        for address in new:
            link, listener = self._open[address]
            log.debug("dns: serving %s port %d, descriptors %d and %d", *address[:2], link.fd, listener.fileno())
            self._handed.add(address)
            self._udp.add(link)
            self._tcp.add(listener)
        return new

    def update(self, locals_: list[Local]) -> bool:
        """Follow a change of addresses. Return False if one of them could not be bound yet: try again soon."""
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
        """Close the sockets that were not handed over."""
        for address, (link, listener) in self._open.items():
            if address not in self._handed:
                link.close()
                listener.close()
        self._open.clear()

    def is_own(self, server: Server, locals_: list[Local]) -> bool:
        """Return whether querying this server would mean querying ourselves."""
        if server.port != self.port:
            return False
        text, _, zone = server.address.partition("%")
        address = ipaddress.ip_address(text)
        address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 reaches an IPv4 socket
        if address.is_unspecified:  # Linux connects it to loopback
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        ours = {local.packed for local in locals_ if not zone or local.interface == zone}
        if address.packed not in ours and not (address.is_loopback and address.version == 4):
            return False
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        return family in self._wildcard or any(pack_address(each[0]) == address.packed for each in self._open)

    def _open_wildcard(self) -> bool:
        port = self._settings.port
        try:
            for family in sorted(self._every):
                try:
                    self._open[_WILDCARDS[family], port] = _pair((_WILDCARDS[family], port), family, checked=True)
                    self._wildcard.add(family)
                except OSError as error:
                    if error.errno not in _NO_FAMILY or family == socket.AF_INET:
                        raise
        except OSError as error:
            for link, listener in self._open.values():
                link.close()
                listener.close()
            self._open.clear()
            self._wildcard.clear()
            if error.errno != errno.EADDRINUSE:
                raise NetworkError(_refused("every address", port, error)) from None
            return False
        return True

    def _wanted(self, locals_: list[Local]) -> dict[_SocketAddress, socket.AddressFamily]:
        port, addresses = self._settings.port, self._admission.addresses
        wanted: dict[_SocketAddress, socket.AddressFamily] = {
            (_WILDCARDS[family], port): family for family in self._wildcard
        }
        for local in locals_:
            family = socket.AF_INET if len(local.packed) == 4 else socket.AF_INET6
            if family in self._wildcard or not local.usable:
                continue
            configured = local.packed in addresses or self._admission.serves_interface(local.interface)
            if not configured and family not in self._every:
                continue
            host = local.text.partition("%")[0]
            if family == socket.AF_INET:
                wanted[host, port] = family
            else:
                wanted[host, port, 0, local.index if local.is_link_local else 0] = family
        for packed in addresses:
            if _is_loopback(packed) and socket.AF_INET not in self._wildcard:
                wanted[socket.inet_ntop(socket.AF_INET, packed), port] = socket.AF_INET
        return wanted

    def _adjust(self, locals_: list[Local], starting: bool) -> tuple[dict[_SocketAddress, _Pair], bool]:
        """Open missing sockets. Return those to close, and whether everything wanted is open."""
        wanted, complete = self._wanted(locals_), True
        self._taken &= wanted.keys()
        self._unbound = {each: why for each, why in self._unbound.items() if each in wanted}
        for address, family in wanted.items():
            if address in self._open or address in self._taken:
                continue
            try:
                checked = self._admission.by_interface and pack_address(address[0]) not in self._admission.addresses
                self._open[address] = _pair(address, family, checked)
                self._unbound.pop(address, None)
            except OSError as error:
                complete = False
                self._on_bind_error(address, error, starting)
        if starting and not self._open and self._logged:
            raise NetworkError(
                f"cannot listen on port {self._settings.port}: other programs use it on every address; stop them, or "
                "choose another port with --port"
            )
        return {each: self._open.pop(each) for each in list(self._open) if each not in wanted}, complete

    def _on_bind_error(self, address: _SocketAddress, error: OSError, starting: bool) -> None:
        """Log that an address cannot be bound, once. At the start, raise NetworkError if it was configured."""
        number = error.errno or 0
        if number in _PASSING:
            return
        problem = _refused(address[0], self._settings.port, error)
        if not self._every:
            self._unbound[address] = problem
        if starting:
            if pack_address(address[0]) in self._admission.addresses or number != errno.EADDRINUSE:
                raise NetworkError(problem) from None
            self._taken.add(address)
        if (address, number) not in self._logged:
            self._logged.add((address, number))
            log.warning("dns: %s; the other addresses are served", problem)


def _every_address(settings: Settings) -> set[socket.AddressFamily]:
    """Return the families for which every address is listened on."""
    by_interface = settings.interfaces or settings.except_interfaces
    if by_interface and not (settings.bind_interfaces or settings.bind_dynamic):
        return set(_WILDCARDS)
    if not by_interface and not settings.listen_addresses:
        return set(_WILDCARDS)
    return {family for family, host in _WILDCARDS.items() if host in settings.listen_addresses}


def warnings(settings: Settings, locals_: list[Local]) -> list[str]:
    """Return what is configured and does not listen (yet)."""
    lines = list(settings.notices)
    ours = {local.packed for local in locals_}
    for text in settings.listen_addresses:
        packed = pack_address(text)
        if packed not in ours and any(packed) and not _is_loopback(packed):
            lines.append(f"{text} is not an address of this host yet; listening on it when it appears")
    per_address = settings.bind_interfaces or settings.bind_dynamic
    with_address = {local.interface for local in locals_}
    names = with_address if per_address else {name for _, name in socket.if_nameindex()}
    for pattern in settings.interfaces:
        if not any(matches(name, (pattern,)) for name in names):
            problem = "has no address yet; listening on it when it has one"
            lines.append(
                f"interface {pattern} {problem if per_address else 'does not exist yet; serving it when it appears'}"
            )
    return lines


def _is_loopback(packed: bytes) -> bool:
    """Return whether an address is in 127.0.0.0/8: all of these can be bound, although only 127.0.0.1 is listed."""
    return len(packed) == 4 and packed[0] == 127


def _refused(address: str, port: int, error: OSError) -> str:
    hint = {
        errno.EADDRINUSE: "stop the other program, or choose other addresses with --listen-address",
        errno.EACCES: "CAP_NET_BIND_SERVICE is missing; run this as root, or choose another port with --port",
    }.get(error.errno or 0, "choose another address with --listen-address")
    return f"cannot listen on {address} port {port}: {error.strerror}; {hint}"


def _pair(address: _SocketAddress, family: socket.AddressFamily, checked: bool) -> _Pair:
    link = udp_socket.open_socket(address, family, checked)
    try:
        # Port 0 (tests): both on the port that the kernel chose first.
        chosen = (address[0], link.link.getsockname()[1], *address[2:])
        return link, tcp.open_socket(chosen, family)
    except BaseException:
        link.close()
        raise
