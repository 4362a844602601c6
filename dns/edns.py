"""EDNS options that tell upstream servers who asks, as dnsmasq adds them. Bytes and values; no sockets.

Rules
1. A query has the options of the client that has caused it. If they depend on the client, so may the response: it is
   shared only with clients that get the same options, and no response is cached (`depend_on_client`).
2. Options of clients are never passed on, and no option is added unless the settings say so.
3. A query with options is never repeated without them: the server may filter by them.
"""

from __future__ import annotations

import base64
import ipaddress
import struct
from collections.abc import Callable, Iterator

from udpwatch.dns.settings import Settings, Subnet, Umbrella

SUBNET = 8  # RFC 7871
MAC = 65001
MAC_TEXT = 65073
CPE_ID = 65074  # of no standard, and so are the others; numbers as in dnsmasq
UMBRELLA = 20292  # Cisco's
MAX_OPTIONS = 64  # of a response that are read: its time must be bounded

_FAMILIES = {4: 1, 16: 2}  # octets of an address: its number (RFC 7871, section 6)
_OPT_START = b"\0\0\x29"  # owner and type
_option = struct.Struct("!HH")
_length = struct.Struct("!H")

#: Returns an option for a client's address of 4 or 16 octets; b"": none.
Build = Callable[[bytes], bytes]


class ClientOptions:
    """The options of each client's queries."""

    def __init__(self, settings: Settings, mac_of: Build = lambda _: b"") -> None:
        """Add what the settings say. ``mac_of``: returns the link-layer address of a client; b"": unknown."""
        self._builders: list[Build] = []
        if settings.mac_formats:
            self._builders.append(_macs(settings.mac_formats, mac_of))
        if settings.cpe_id:
            cpe_id = option(CPE_ID, settings.cpe_id)
            self._builders.append(lambda _: cpe_id)
        if settings.umbrella:
            self._builders.append(_umbrella(settings.umbrella))
        if settings.subnets:  # the last one, as in dnsmasq
            self._builders.append(_subnets(*settings.subnets))
        #: Whether clients with different options must not share a response.
        self.vary = depend_on_client(settings)

    def of(self, client: bytes) -> bytes:
        """Return the options of a client's queries in wire format."""
        return b"".join([build(client) for build in self._builders])


def are_added(settings: Settings) -> bool:
    """Return whether queries have options."""
    return bool(settings.subnets or settings.cpe_id or settings.umbrella or settings.mac_formats)


def depend_on_client(settings: Settings) -> bool:
    """Return whether options depend on the client, so that no response may be cached for others."""
    return bool(
        settings.mac_formats
        or settings.umbrella
        or any(subnet.prefix and not subnet.address for subnet in settings.subnets or ())
    )


def option(code: int, data: bytes) -> bytes:
    """Build one option."""
    return _option.pack(code, len(data)) + data


def with_options(opt: bytes, options: bytes) -> bytes:
    """Return an OPT record that had no options with these; b"" without a record."""
    return opt and opt[:-2] + _length.pack(len(options)) + options


# ---- link-layer address ----


def _macs(formats: tuple[str, ...], mac_of: Build) -> Build:
    """Return the builder of the options with a client's link-layer address, in dnsmasq's formats."""

    def build(client: bytes) -> bytes:
        mac = mac_of(client)
        if not mac:
            return b""
        options = option(MAC, mac) if "binary" in formats else b""
        if "text" in formats:  # instead of Base64, as in dnsmasq
            return options + option(MAC_TEXT, mac.hex(":").encode())
        if "base64" in formats:
            return options + option(MAC_TEXT, base64.b64encode(mac[:6]))
        return options

    return build


# ---- Umbrella ----

_UMBRELLA_HEAD = b"ODNS\x01\0"  # version 1, no flags
_UMBRELLA_ADDRESS = {4: b"\0\x10", 16: b"\0\x20"}  # octets of an address: the type of its field


def _umbrella(umbrella: Umbrella) -> Build:
    """Return the builder of Cisco's option: fields of a type and a value, in dnsmasq's order."""
    before, after = _UMBRELLA_HEAD, b""
    if umbrella.org:
        before += b"\0\x08" + umbrella.org.to_bytes(4, "big")
    if umbrella.device:
        after += b"\0\x40" + umbrella.device
    if umbrella.asset:
        after += b"\0\x04" + umbrella.asset.to_bytes(4, "big")
    return lambda client: option(UMBRELLA, before + _UMBRELLA_ADDRESS[len(client)] + client + after)


# ---- client subnet ----


def _subnets(ipv4: Subnet, ipv6: Subnet) -> Build:
    """Return the builder of RFC 7871's option; the settings are for IPv4 and for IPv6 clients."""
    builders = {4: _subnet(ipv4, 4), 16: _subnet(ipv6, 16)}
    return lambda client: builders[len(client)](client)


def _subnet(subnet: Subnet, octets: int) -> Build:
    constant = ipaddress.ip_address(subnet.address).packed if subnet.address else b""
    head = struct.pack("!HBB", _FAMILIES[len(constant) or octets], subnet.prefix, 0)
    kept, bits = (subnet.prefix + 7) // 8, subnet.prefix % 8
    mask = 0xFF << (8 - bits) & 0xFF if bits else 0xFF

    def build(address: bytes) -> bytes:
        network = address[:kept]
        if bits:
            network = network[:-1] + bytes((network[-1] & mask,))
        return option(SUBNET, head + network)

    if constant:
        built = build(constant)
        return lambda _: built
    return build


def has_same_subnet(options: bytes, response: bytes, opt_at: int) -> bool:
    """Return whether a response is for the subnet in these options of its query, or names none: another one belongs to
    another query, or is forged (RFC 7871, section 11.2). ``opt_at``: where its OPT record is, if it has one."""
    sent = _find(options, 0, len(options))
    if sent is None or not response.startswith(_OPT_START, opt_at) or opt_at + 11 > len(response):
        return True
    start = opt_at + 11
    (length,) = _length.unpack_from(response, start - 2)
    received = _find(response, start, min(start + length, len(response)))
    return received is None or (received[:3] == sent[:3] and received[4:] == sent[4:])  # the octet between is its scope


def _find(data: bytes, at: int, end: int) -> bytes | None:
    """Return the subnet option's data."""
    return next((data for code, data in _options(data, at, end) if code == SUBNET), None)


def _options(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    for _ in range(MAX_OPTIONS):
        if at + 4 > end:
            return
        code, length = _option.unpack_from(data, at)
        at += 4 + length
        if at > end:
            return
        yield code, data[at - length : at]
