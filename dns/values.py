"""Parsers of option values. Each returns a value for Settings, or raises Rejected with what it expected."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path

import dnslib

from udpwatch.dns.conffile import parts
from udpwatch.dns.host_port import host_port
from udpwatch.dns.idn import to_ascii
from udpwatch.dns.names import lower, name_from_text
from udpwatch.dns.settings import Server, Settings, Subnet, Umbrella

MAX_SECONDS = 2**31 - 1  # of a TTL: RFC 2181, section 8
MAX_CACHE_SIZE = 5_000_000  # dnsmasq's limit
MAX_INTERFACE_BYTES = 15  # IFNAMSIZ without its NUL
SHORTEST_RETRY, LONGEST_RETRY = 50, 60_000  # milliseconds; the lower one is dnsmasq's limit
ROOT = b"\0"
ANY = 255
FACILITIES = (
    *("auth", "authpriv", "cron", "daemon", "ftp", "kern", "lpr", "mail", "news", "security", "syslog", "user", "uucp"),
    *(f"local{number}" for number in range(8)),
)
_NO_RECORD_TYPES = {41, *range(249, 256)}  # OPT, and types of queries (RFC 6895, section 3.1)


_UMBRELLA = "deviceid:HEX with 16 digits, orgid:NUMBER and assetid:NUMBER, each at most once"


class Rejected(ValueError):
    """An invalid value; the text is what was expected."""


def whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
            raise Rejected(f"a whole number from {low} to {high}")
        return int(text)

    return read


seconds = whole(0, MAX_SECONDS)
port_number = whole(1, 65535)
short = whole(0, 65535)
port_limit = whole(1, 2**31 - 1)


def source_port(text: str) -> int:
    """A port; 0 or nothing, as in dnsmasq: no particular one."""
    return short(text) if text else 0


def file_path(text: str) -> Path:
    if not text:
        raise Rejected("a path")
    return Path(text)


def optional_path(text: str) -> Path | None:
    return Path(text) if text else None


def name_of(text: str) -> bytes:
    """Convert to wire format in lower case; international names in their xn-- form."""
    if any(character < " " or character == "\x7f" for character in text) or text.strip(" .") == "":
        raise Rejected("a name with at least one label and without control characters")
    try:
        return lower(name_from_text(to_ascii(text)))
    except ValueError as error:
        raise Rejected(f"a valid name; this one has {error}") from None


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """``ADDRESS[/PREFIX]``."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Rejected("ADDRESS[/PREFIX]") from None


def record_type(text: str) -> int:
    """The name or the number of a record type that responses can have."""
    kind = whole(1, 65535)(text) if text.isdigit() else dnslib.QTYPE.reverse.get(text.upper(), 0)
    if not kind or kind in _NO_RECORD_TYPES:
        raise Rejected("names or numbers of record types")
    return int(kind)


def cached_type(text: str) -> int:
    """A record type, or ANY."""
    return ANY if text.upper() in ("ANY", str(ANY)) else record_type(text)


def domain_name(text: str) -> bytes:
    if text == "#" or "," in text:
        raise Rejected("one domain, without an address range, other than '#'")
    return name_of(text)


def address_of_text(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise Rejected("an IPv4 or IPv6 address") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise Rejected("an address without %interface")
    return address


def ipv4_number(text: str) -> int:
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        raise Rejected("IPv4 addresses") from None


def listen_address(text: str) -> str:
    return str(address_of_text(text))


def _device(text: str, star: bool = False) -> str:
    """Check an interface name as the kernel does (dev_valid_name)."""
    bare = text[:-1] if star and text.endswith("*") else text
    good = bare.isprintable() and not set(bare) & set(" /:*#@%") and bare not in (".", "..")
    if not good or not text or len(bare.encode()) > MAX_INTERFACE_BYTES:
        rest = ", or a prefix followed by *" if star else ""
        raise Rejected(f"an interface name of at most {MAX_INTERFACE_BYTES} bytes{rest}")
    return text


def interface_or_label(text: str) -> str:
    """An interface, or a label of its addresses: eth0:1."""
    try:
        _device(text.partition(":")[0])
        _device(text.replace(":", "."))
    except Rejected:
        raise Rejected(f"an interface name or label of at most {MAX_INTERFACE_BYTES} bytes") from None
    return text


def listening_device(text: str) -> str:
    return _device(text, star=True)


def log_facility(text: str) -> str:
    """ "-", a path with a slash, or a syslog facility in lower case."""
    if text == "-" or ("/" in text and "\0" not in text):
        return text
    if text.lower() not in FACILITIES:
        raise Rejected(f"'-' for stderr, a path with a slash, or a syslog facility: {', '.join(FACILITIES)}")
    return text.lower()


def log_queue(text: str) -> str:
    return text and str(whole(0, 2**31 - 1)(text))


def user_name(text: str) -> str:
    if not text or not text.isprintable() or "\0" in text or ":" in text:
        raise Rejected("a user name")
    return text


def optional_group_name(text: str) -> str:
    if text and (not text.isprintable() or "\0" in text or ":" in text):
        raise Rejected("a group name")
    return text


def metrics_listen(text: str) -> str:
    if text != "off":
        try:
            host_port(text)
        except ValueError:
            raise Rejected("HOST:PORT, e.g. 127.0.0.1:9953 or [::1]:9953, or 'off'") from None
    return text


def server_of(text: str) -> Server:
    """``ADDRESS[%IF][#PORT][@INTERFACE][@SOURCE]``."""
    numeric, _, source = text.partition("@")
    numeric, hash_, port = (part.strip(" ") for part in numeric.partition("#"))
    numeric, percent, zone = (part.strip(" ") for part in numeric.partition("%"))
    address = address_of_text(numeric)
    interface, origin = "", ""
    if "#" in source:
        raise Rejected("no source port; --query-port sets that of every server")
    for number, part in enumerate(parts(source, "@") if "@" in text else []):
        try:
            asker = ipaddress.ip_address(part)
        except ValueError:
            if number:
                raise Rejected("@INTERFACE@SOURCE at the end") from None
            interface = _device(part)
            continue
        if origin or number > 1 or asker.version != address.version:
            raise Rejected("one source address, of the server's family")
        origin = str(asker)
    if percent or (address.version == 6 and address.is_link_local):
        zone = zone or interface
        if not (address.version == 6 and address.is_link_local) or not zone:
            raise Rejected("%INTERFACE for a link-local IPv6 address, and for no other")
        numeric = f"{address}%{_device(zone)}"
    else:
        numeric = str(address)
    return Server(numeric, port_number(port) if hash_ else 53, origin, interface)


def retry_milliseconds(text: str) -> tuple[int, int]:
    """``[INITIAL[,TOTAL]]`` in milliseconds, with dnsmasq's defaults."""
    try:
        first, total = [*map(whole(SHORTEST_RETRY, LONGEST_RETRY), parts(text) if text else ["1000"]), 10_000][:2]
        if first > total or text.count(",") > 1:
            raise Rejected
    except Rejected:
        raise Rejected(
            f"INITIAL[,TOTAL] milliseconds from {SHORTEST_RETRY} to {LONGEST_RETRY}, INITIAL not above TOTAL"
        ) from None
    return first, total


def domains_of(text: str) -> tuple[list[bytes], str]:
    """Split ``/DOMAIN/../REST`` into the domains and REST. ``#`` is the root, an empty domain is b""."""
    *names, rest = parts(text[1:], "/")
    if not text.startswith("/") or not names:
        raise Rejected("/DOMAIN/ first")
    domains = []
    for name in names:
        if name.startswith("*"):
            raise Rejected("whole labels; dnsmasq's *DOMAIN is not supported")
        domains.append(ROOT if name == "#" else name_of(name.lstrip(".")) if name else b"")
    return domains, rest


def client_subnets(text: str) -> tuple[Subnet, Subnet]:
    """``[[ADDRESS/]PREFIX][,[ADDRESS/]PREFIX]``, for IPv4 and for IPv6 clients."""
    texts = parts(text)
    if len(texts) > 2:
        raise Rejected("[ADDRESS/]PREFIX[,[ADDRESS/]PREFIX], for IPv4 and for IPv6 clients")
    return _client_subnet(texts[0], 32), _client_subnet(texts[1] if len(texts) > 1 else "", 128)


def _client_subnet(text: str, most: int) -> Subnet:
    address_text, slash, prefix = text.rpartition("/")
    if not slash:
        return Subnet(whole(0, most)(prefix or "0"))
    address = address_of_text(address_text)
    return Subnet(whole(0, address.max_prefixlen)(prefix or "0"), str(address))


def mac_format(text: str) -> str:
    if text not in ("", "base64", "text"):
        raise Rejected("nothing, 'base64' or 'text'")
    return text or "binary"


def cpe_id(text: str) -> bytes:
    octets = text.encode()
    if not 1 <= len(octets) <= 255:
        raise Rejected("1 to 255 octets")
    return octets


def umbrella(text: str) -> Umbrella:
    """``[deviceid:HEX][,orgid:N][,assetid:N]``, in any order."""
    found: dict[str, str] = {}
    for part in parts(text) if text else []:
        kind, _, value = part.partition(":")
        if kind in found or not re.fullmatch("[0-9a-fA-F]{16}" if kind == "deviceid" else "[0-9]{1,10}", value):
            raise Rejected(_UMBRELLA)
        found[kind] = value
    org, asset, device = (found.pop(kind, "") for kind in ("orgid", "assetid", "deviceid"))
    if found:
        raise Rejected(_UMBRELLA)
    number = whole(0, 2**32 - 1)
    return Umbrella(number(org or "0"), number(asset or "0"), bytes.fromhex(device))


def stale_seconds(text: str) -> int:
    if text == "off":
        return 0
    if not text:
        return Settings().stale_seconds
    try:
        return seconds(text) or MAX_SECONDS
    except Rejected:
        raise Rejected(f"seconds from 1 to {MAX_SECONDS}, 0 for no limit, or 'off'") from None
