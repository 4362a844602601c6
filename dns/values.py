"""Reads the values of options, strictly, into a draft of the settings.

A reader takes the draft and an option's value and adds it to the draft. It raises Rejected with what it expected.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dnslib

from udpwatch.dns import message
from udpwatch.dns.conffile import folder_files, parts, plain
from udpwatch.dns.host_port import host_port
from udpwatch.dns.names import lower, name_from_text, name_to_text, suffixes
from udpwatch.dns.settings import DomainAddress, HostRecord, Server, Settings, StaticRecord

MAX_SECONDS = 2**31 - 1  # of a TTL: RFC 2181, section 8
MAX_CACHE_SIZE = 5_000_000  # dnsmasq's limit
MAX_INTERFACE_BYTES = 15  # IFNAMSIZ without its NUL
ROOT = b"\0"


@dataclass(frozen=True, slots=True)
class Information:
    """The output of --help, --version or --test: print it and exit with status 0."""

    text: str


class Rejected(ValueError):
    """An invalid value; the text is what was expected."""


@dataclass(slots=True)
class _Domain:
    """The servers of a domain so far."""

    kind: str  # "servers", "standard" ("#") or "local"
    servers: dict[Server, None] = field(default_factory=dict)


@dataclass(slots=True)
class Draft:
    """The options read so far. Dictionaries without values keep order and drop repetitions."""

    fields: dict[str, Any] = field(default_factory=dict)  # of Settings, with one value
    many: dict[str, dict[Any, None]] = field(default_factory=dict)  # of Settings, with several values
    domains: dict[bytes, _Domain] = field(default_factory=dict)
    cnames: dict[bytes, bytes] = field(default_factory=dict)  # alias: target
    local_service: str = ""  # "net", "host"; "": not given
    once: dict[str, bool] = field(default_factory=dict)  # options that must not be repeated: whether from a file
    files: list[Path] = field(default_factory=list)  # to read next
    seen: set[tuple[int, int]] = field(default_factory=set)  # device and inode of the files that were read
    information: Information | None = None
    test: bool = False

    def add(self, name: str, item: object) -> None:
        self.many.setdefault(name, {})[item] = None


Read = Callable[[Draft, str], None]


# ---- values: each parser returns a value for Settings, or raises Rejected ----


def whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
            raise Rejected(f"a whole number from {low} to {high}")
        return int(text)

    return read


seconds = whole(0, MAX_SECONDS)
port_number = whole(1, 65535)
_short = whole(0, 65535)


def file_path(text: str) -> Path:
    if not text:
        raise Rejected("a path")
    return Path(text)


def _name(text: str) -> bytes:
    """Convert to wire format in lower case. Only ASCII: clients ask for the xn-- form of other names."""
    if not text.isascii():
        raise Rejected("a name in ASCII; write an international name in its xn-- form")
    if any(character < " " or character == "\x7f" for character in text) or text.strip(" .") == "":
        raise Rejected("a name with at least one label and without control characters")
    try:
        return lower(name_from_text(text))
    except ValueError as error:
        raise Rejected(f"a valid name; this one has {error}") from None


def domain_name(text: str) -> bytes:
    if text == "#" or "," in text:
        raise Rejected("one domain, without an address range, other than '#'")
    return _name(text)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise Rejected("an IPv4 or IPv6 address") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise Rejected("an address without %interface")
    return address


def listen_address(text: str) -> str:
    return str(_address(text))


def _device(text: str, star: bool = False) -> str:
    """Check an interface name as the kernel does (dev_valid_name)."""
    bare = text[:-1] if star and text.endswith("*") else text
    good = bare.isprintable() and not set(bare) & set(" /:*#@%") and bare not in (".", "..")
    if not good or not text or len(bare.encode()) > MAX_INTERFACE_BYTES:
        rest = ", or a prefix followed by *" if star else ""
        raise Rejected(f"an interface name of at most {MAX_INTERFACE_BYTES} bytes{rest}")
    return text


def listening_device(text: str) -> str:
    return _device(text, star=True)


def user_name(text: str) -> str:
    if not text or not text.isprintable() or "\0" in text or ":" in text:
        raise Rejected("a user name")
    return text


def metrics_listen(text: str) -> str:
    if text != "off":
        try:
            host_port(text)
        except ValueError:
            raise Rejected("HOST:PORT, e.g. 127.0.0.1:9953 or [::1]:9953, or 'off'") from None
    return text


def _server(text: str) -> Server:
    """``ADDRESS[%IF][#PORT][@INTERFACE][@SOURCE]``."""
    numeric, _, source = text.partition("@")
    numeric, hash_, port = (part.strip(" ") for part in numeric.partition("#"))
    numeric, percent, zone = (part.strip(" ") for part in numeric.partition("%"))
    address = _address(numeric)
    interface, origin = "", ""
    if "#" in source:
        raise Rejected("no source port: each query has a random one")
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


def _domains(text: str) -> tuple[list[bytes], str]:
    """Split ``/DOMAIN/../REST`` into the domains and REST. ``#`` is the root, an empty domain is b""."""
    *names, rest = parts(text[1:], "/")
    if not text.startswith("/") or not names:
        raise Rejected("/DOMAIN/ first")
    domains = []
    for name in names:
        if name.startswith("*"):
            raise Rejected("whole labels; dnsmasq's *DOMAIN is not supported")
        domains.append(ROOT if name == "#" else _name(name.lstrip(".")) if name else b"")
    return domains, rest


# ---- options with several parts ----


def read_server(draft: Draft, value: str) -> None:
    value = plain(value)
    domains, rest = _domains(value) if value.startswith("/") else ([ROOT], value)
    kind = {"": "local", "#": "standard"}.get(rest, "servers")
    server = _server(rest) if kind == "servers" else None
    for domain in domains:
        if domain == ROOT:
            if server is None:
                raise Rejected("an address, or a domain before nothing or '#'")
            draft.add("servers", server)
            continue
        entry = draft.domains.setdefault(domain, _Domain(kind))
        if entry.kind != kind:
            text = name_to_text(domain) if domain else "//"
            raise Rejected(
                f"addresses, '#' or nothing, the same kind each time for a domain; {text} already has another"
            )
        if server is not None:
            entry.servers[server] = None


def read_local(draft: Draft, value: str) -> None:
    if not plain(value).startswith("/"):
        raise Rejected("/DOMAIN/; use --server for a default server")
    read_server(draft, value)


def read_address(draft: Draft, value: str) -> None:
    domains, rest = _domains(plain(value))
    if b"" in domains:
        raise Rejected("a domain, or '#' for every name; '//' is not supported")
    addresses = {"": (None,), "#": ("0.0.0.0", "::")}.get(rest) or (str(_address(rest)),)  # noqa: S104
    for domain in domains:
        for address in addresses:
            draft.add("addresses", DomainAddress(domain, address))


def read_rebind_domain_ok(draft: Draft, value: str) -> None:
    text = plain(value)
    for name in parts(text.removeprefix("/").removesuffix("/"), "/"):
        draft.add("rebind_domains_ok", _name(name))


def read_cname(draft: Draft, value: str) -> None:
    names = parts(value)
    ttl = seconds(names.pop()) if len(names) > 2 and names[-1].isdigit() else None
    if len(names) < 2:
        raise Rejected("ALIAS[,ALIAS..],TARGET[,TTL]")
    target = _name(names.pop())
    for name in names:
        alias = _name(name)
        if name.startswith("*"):
            raise Rejected("aliases without *")
        if alias in draft.cnames:
            raise Rejected(f"each alias once; {name_to_text(alias)} already has a target")
        draft.cnames[alias] = target
        draft.add("records", StaticRecord(alias, message.Type.CNAME, target, ttl))


def read_txt(draft: Draft, value: str) -> None:
    name, comma, text = value.partition(",")
    strings: list[bytes] = []
    for string in text.lstrip(" ").split(",") if comma else [""]:
        octets = plain(string).encode()
        # A longer text continues in the next string, as in dnsmasq.
        strings += [octets[at : at + 255] for at in range(0, max(len(octets), 1), 255)]
    data = _packed(dnslib.TXT(strings))
    if len(data) > 65535:
        raise Rejected("at most 65535 octets of text")
    draft.add("records", StaticRecord(_name(plain(name.strip(" "))), message.Type.TXT, data))


def _packed(rdata: dnslib.RD) -> bytes:
    """Return RDATA in wire format."""
    buffer = dnslib.DNSBuffer()
    rdata.pack(buffer)
    return bytes(buffer.data)


def _label(name: bytes) -> dnslib.DNSLabel:
    """Convert a name in wire format to dnslib's form by its labels: from text, dnslib would apply IDNA."""
    return dnslib.DNSLabel([part[1 : 1 + part[0]] for part in suffixes(name) if part[0]])


def read_srv(draft: Draft, value: str) -> None:
    name, *rest = parts(value)
    if len(rest) > 4:
        raise Rejected("_SERVICE._PROTO[.DOMAIN][,TARGET[,PORT[,PRIORITY[,WEIGHT]]]]")
    target = _name(rest[0]) if rest and rest[0] not in ("", ".") else ROOT
    port, priority, weight = [_short(number) for number in rest[1:]] + [1, 0, 0][max(len(rest) - 1, 0) :]
    data = _packed(dnslib.SRV(priority, weight, port, _label(target)))
    draft.add("records", StaticRecord(_name(name), message.Type.SRV, data))


def read_mx(draft: Draft, value: str) -> None:
    name, *rest = parts(value)
    if not 1 <= len(rest) <= 2:
        raise Rejected("NAME,TARGET[,PREFERENCE]")
    data = _packed(dnslib.MX(_label(_name(rest[0])), _short(rest[1]) if len(rest) > 1 else 1))
    draft.add("records", StaticRecord(_name(name), message.Type.MX, data))


def read_ptr(draft: Draft, value: str) -> None:
    names = parts(value)
    if len(names) != 2:
        raise Rejected("NAME,TARGET")
    draft.add("records", StaticRecord(_name(names[0]), message.Type.PTR, _name(names[1])))


def read_host_record(draft: Draft, value: str) -> None:
    names: list[bytes] = []
    addresses: dict[int, str] = {}
    ttl: int | None = None
    for part in parts(value):
        if part.isdigit():
            if ttl is not None:
                raise Rejected("one TTL")
            ttl = seconds(part)
            continue
        try:
            address = ipaddress.ip_address(part)
        except ValueError:
            names.append(_name(part))
            continue
        if address.version in addresses:
            raise Rejected("one address per family; use another --host-record for more")
        addresses[address.version] = str(_address(part))
    if not names or not addresses:
        raise Rejected("NAME[,NAME..][,IPv4][,IPv6][,TTL] with at least a name and an address")
    draft.add("host_records", HostRecord(tuple(names), tuple(addresses.values()), ttl))


def read_log_queries(draft: Draft, value: str) -> None:
    if value not in ("", "extra"):
        raise Rejected("nothing or 'extra'")
    draft.fields["log_queries"] = True
    draft.fields["log_extra"] = draft.fields.get("log_extra", False) or value == "extra"


def read_local_service(draft: Draft, value: str) -> None:
    if value not in ("", "net", "host"):
        raise Rejected("nothing, 'net' or 'host'")
    draft.local_service = value or "net"


def stale_seconds(text: str) -> int:
    if text == "off":
        return 0
    if not text:
        return Settings().stale_seconds
    try:
        return seconds(text) or MAX_SECONDS
    except Rejected:
        raise Rejected(f"seconds from 1 to {MAX_SECONDS}, 0 for no limit, or 'off'") from None


def read_conf_file(draft: Draft, value: str) -> None:
    if plain(value) == "-":
        raise Rejected("a file; standard input is not supported")
    draft.files.append(file_path(plain(value)))


def read_conf_dir(draft: Draft, value: str) -> None:
    if not parts(value)[0]:
        raise Rejected("FOLDER[,SUFFIX..]")
    draft.files.extend(folder_files(value))


def test_only(draft: Draft, _: str) -> None:
    draft.test = True


# ---- options with one part ----


def on(name: str, value: bool = True) -> Read:
    def read(draft: Draft, _: str) -> None:
        draft.fields[name] = value

    return read


def one(name: str, parse: Callable[[str], object]) -> Read:
    def read(draft: Draft, value: str) -> None:
        draft.fields[name] = parse(plain(value))

    return read


def each(name: str, parse: Callable[[str], object]) -> Read:
    def read(draft: Draft, value: str) -> None:
        draft.add(name, parse(plain(value)))

    return read


def several(name: str, parse: Callable[[str], object]) -> Read:
    def read(draft: Draft, value: str) -> None:
        for part in parts(value):
            draft.add(name, parse(part))

    return read


def accept_noop(_: Draft, __: str) -> None:
    """Accept an option whose behaviour is always on."""
