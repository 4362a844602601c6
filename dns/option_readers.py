"""Readers of options: each takes the draft of the settings and an option's value, and adds the value to the draft.

A reader raises Rejected with what it expected.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dnslib

from udpwatch.dns import message
from udpwatch.dns.conffile import folder_files, parts, plain
from udpwatch.dns.names import MAX_LABEL_BYTES, MAX_NAME_BYTES, name_to_text, suffixes
from udpwatch.dns.settings import (
    Alias,
    DomainAddress,
    DomainServers,
    HostRecord,
    InterfaceName,
    Server,
    Settings,
    StaticRecord,
    SynthDomain,
)
from udpwatch.dns.values import (
    ROOT,
    Rejected,
    address_of_text,
    domains_of,
    file_path,
    interface_or_label,
    ipv4_number,
    name_of,
    seconds,
    server_of,
    short,
    source_port,
    whole,
)
from udpwatch.dns.values import network as values_network

#: Types that `--dns-rr` cannot give: those whose data the zone reads (use --host-record and --cname), OPT and those of
#: queries (RFC 6895, section 3.1).
_NO_RAW_TYPES = {0, message.Type.A, message.Type.AAAA, message.Type.CNAME, message.Type.OPT, *range(128, 256)}


#: characters in front of an IPv4 and an IPv6 address, in one label
MAX_SYNTH_PREFIX = {4: 47, 6: 24}


@dataclass(frozen=True, slots=True)
class Information:
    """The output of --help, --version or --test: print it and exit with status 0."""

    text: str
    settings: Settings | None = field(default=None, compare=False)  # of --test


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
    mail_hosts: list[bytes] = field(default_factory=list)  # of --mx-host without a target
    mail_target: bytes = b""  # --mx-target
    mail_for_local: bool = False  # --localmx
    has_mail_or_service: bool = False  # --mx-host or --srv-host
    query_port: int | None = None
    min_port: int = 0
    max_port: int = 0
    local_service: str = ""  # "net", "host"; "": not given
    once: dict[str, bool] = field(default_factory=dict)  # options that must not be repeated: whether from a file
    files: list[Path] = field(default_factory=list)  # to read next
    seen: set[tuple[int, int]] = field(default_factory=set)  # device and inode of the files that were read
    information: Information | None = None
    test: bool = False

    @classmethod
    def of_servers(cls, servers: Iterable[Server], domains: Iterable[DomainServers]) -> Draft:
        """Return a draft with these servers."""
        draft = cls(many={"servers": dict.fromkeys(servers)})
        for each in domains:
            kind = "standard" if each.standard else "servers" if each.servers else "local"
            draft.domains[each.domain] = _Domain(kind, dict.fromkeys(each.servers))
        return draft

    def add(self, name: str, item: object) -> None:
        self.many.setdefault(name, {})[item] = None

    def domain_servers(self) -> tuple[DomainServers, ...]:
        """Return the servers of each domain."""
        return tuple(
            DomainServers(name, tuple(each.servers), each.kind == "standard") for name, each in self.domains.items()
        )


Read = Callable[[Draft, str], None]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def read_server(draft: Draft, value: str) -> None:
    value = plain(value)
    domains, rest = domains_of(value) if value.startswith("/") else ([ROOT], value)
    kind = {"": "local", "#": "standard"}.get(rest, "servers")
    server = server_of(rest) if kind == "servers" else None
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
    domains, rest = domains_of(plain(value))
    if b"" in domains:
        raise Rejected("a domain, or '#' for every name; '//' is not supported")
    addresses = {"": (None,), "#": ("0.0.0.0", "::")}.get(rest) or (str(address_of_text(rest)),)  # noqa: S104
    for domain in domains:
        for address in addresses:
            draft.add("addresses", DomainAddress(domain, address))


def read_rev_server(draft: Draft, value: str) -> None:
    network_text, comma, rest = plain(value).partition(",")
    network = values_network(network_text.strip(" "))
    if not network.prefixlen or (comma and not rest.strip(" ")):
        raise Rejected("ADDRESS[/PREFIX][,SERVER] with a prefix of at least 1")
    bits = 8 if network.version == 4 else 4  # of a label
    labels = -(-network.prefixlen // bits)
    zones = []
    for part in network.subnets(new_prefix=labels * bits):
        parts_of_name = part.network_address.reverse_pointer.split(".")
        zones.append(".".join(parts_of_name[-labels - 2 :]))
    read_server(draft, f"/{'/'.join(zones)}/{rest.strip(' ')}")


def filter_types(*kinds: int) -> Read:
    """Return the reader of an option that filters these types."""

    def read(draft: Draft, _: str) -> None:
        for kind in kinds:
            draft.add("filtered_types", kind)

    return read


def read_rebind_domain_ok(draft: Draft, value: str) -> None:
    text = plain(value)
    for name in parts(text.removeprefix("/").removesuffix("/"), "/"):
        draft.add("rebind_domains_ok", name_of(name))


def read_cname(draft: Draft, value: str) -> None:
    names = parts(value)
    ttl = seconds(names.pop()) if len(names) > 2 and names[-1].isdigit() else None
    if len(names) < 2:
        raise Rejected("ALIAS[,ALIAS..],TARGET[,TTL]")
    target = name_of(names.pop())
    for name in names:
        alias = name_of(name)
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
    draft.add("records", StaticRecord(name_of(plain(name.strip(" "))), message.Type.TXT, data))


def _packed(rdata: dnslib.RD) -> bytes:
    """Return RDATA in wire format."""
    buffer = dnslib.DNSBuffer()
    rdata.pack(buffer)
    return bytes(buffer.data)


def _label(name: bytes) -> dnslib.DNSLabel:
    """Convert a name in wire format to dnslib's form by its labels: from text, dnslib would apply IDNA."""
    return dnslib.DNSLabel([part[1 : 1 + part[0]] for part in suffixes(name) if part[0]])


def read_srv(draft: Draft, value: str) -> None:
    draft.has_mail_or_service = True
    name, *rest = parts(value)
    if len(rest) > 4:
        raise Rejected("_SERVICE._PROTO[.DOMAIN][,TARGET[,PORT[,PRIORITY[,WEIGHT]]]]")
    target = name_of(rest[0]) if rest and rest[0] not in ("", ".") else ROOT
    port, priority, weight = [short(number) for number in rest[1:]] + [1, 0, 0][max(len(rest) - 1, 0) :]
    data = _packed(dnslib.SRV(priority, weight, port, _label(target)))
    draft.add("records", StaticRecord(name_of(name), message.Type.SRV, data))


def read_mx(draft: Draft, value: str) -> None:
    name, *rest = parts(value)
    if len(rest) > 2:
        raise Rejected("NAME[,TARGET[,PREFERENCE]]")
    draft.has_mail_or_service = True
    if rest:
        add_mx(draft, name_of(name), name_of(rest[0]), short(rest[1]) if len(rest) > 1 else 1)
    else:
        draft.mail_hosts.append(name_of(name))


def add_mx(draft: Draft, name: bytes, target: bytes, preference: int = 1) -> None:
    """Add an MX record."""
    draft.add("records", StaticRecord(name, message.Type.MX, preference.to_bytes(2, "big") + target))


def read_mx_target(draft: Draft, value: str) -> None:
    draft.mail_target = name_of(plain(value))


def read_localmx(draft: Draft, _: str) -> None:
    draft.mail_for_local = True


def _string(text: str) -> bytes:
    octets = text.encode()
    if len(octets) > 255:
        raise Rejected("at most 255 octets in a string")
    return bytes((len(octets),)) + octets


def read_caa(draft: Draft, value: str) -> None:
    fields = parts(value)
    if len(fields) != 4:
        raise Rejected("NAME,FLAGS,TAG,VALUE")
    name, flags, tag, text = fields
    if not (tag.isascii() and tag.isalnum()):
        raise Rejected("a tag of letters and digits")  # RFC 8659, section 4.1
    data = bytes((whole(0, 255)(flags),)) + _string(tag) + text.encode()
    if len(data) > 65535:
        raise Rejected("at most 65535 octets")
    draft.add("records", StaticRecord(name_of(name), message.Type.CAA, data))


def read_naptr(draft: Draft, value: str) -> None:
    fields = parts(value)
    if not 6 <= len(fields) <= 7:
        raise Rejected("NAME,ORDER,PREFERENCE,FLAGS,SERVICE,REGEXP[,REPLACEMENT]")
    name, order, preference, *strings = fields[:6]
    replacement = fields[6] if len(fields) > 6 else ""
    data = b"".join(
        (
            *(short(number).to_bytes(2, "big") for number in (order, preference)),
            *(_string(text) for text in strings),
            name_of(replacement) if replacement not in ("", ".") else ROOT,
        )
    )
    draft.add("records", StaticRecord(name_of(name), message.Type.NAPTR, data))


def read_dns_rr(draft: Draft, value: str) -> None:
    name, *rest = parts(value)
    if not 1 <= len(rest) <= 2:
        raise Rejected("NAME,TYPE[,HEX]")
    kind, digits = short(rest[0]), rest[1] if len(rest) > 1 else ""
    if kind in _NO_RAW_TYPES:
        raise Rejected("the number of a type without an option of its own that can be looked up")
    if not re.fullmatch(r"([0-9A-Fa-f]{2}[: ]?)*", digits):
        raise Rejected("pairs of hexadecimal digits")
    data = bytes.fromhex(digits.replace(":", ""))
    if len(data) > 65535:
        raise Rejected("at most 65535 octets")
    draft.add("records", StaticRecord(name_of(name), kind, data))


def read_ptr(draft: Draft, value: str) -> None:
    names = parts(value)
    if len(names) != 2:
        raise Rejected("NAME,TARGET")
    draft.add("records", StaticRecord(name_of(names[0]), message.Type.PTR, name_of(names[1])))


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
            names.append(name_of(part))
            continue
        if address.version in addresses:
            raise Rejected("one address per family; use another --host-record for more")
        addresses[address.version] = str(address_of_text(part))
    if not names or not addresses:
        raise Rejected("NAME[,NAME..][,IPv4][,IPv6][,TTL] with at least a name and an address")
    draft.add("host_records", HostRecord(tuple(names), tuple(addresses.values()), ttl))


def read_interface_name(draft: Draft, value: str) -> None:
    fields = parts(value)
    if len(fields) != 2:
        raise Rejected("NAME,INTERFACE[/4|/6]")
    interface, slash, family = fields[1].partition("/")
    if slash and family not in ("4", "6"):
        raise Rejected("/4, /6 or nothing after the interface")
    ipv4, ipv6 = None if family == "6" else "", None if family == "4" else ""
    draft.add("interface_names", InterfaceName(name_of(fields[0]), interface_or_label(interface), ipv4, ipv6))


def read_dynamic_host(draft: Draft, value: str) -> None:
    name, *given = parts(value)
    interface = given.pop() if given else ""
    hosts: dict[int, str] = {}
    for text in given:
        address = address_of_text(text)
        if address.version in hosts:
            raise Rejected("one address per family; use another --dynamic-host for more")
        hosts[address.version] = str(address)
    if not hosts:
        raise Rejected("NAME,[IPv4],[IPv6],INTERFACE with at least one address")
    dynamic = InterfaceName(name_of(name), interface_or_label(interface), hosts.get(4), hosts.get(6))
    draft.add("interface_names", dynamic)


def read_synth_domain(draft: Draft, value: str) -> None:
    name, *fields = parts(value)
    if not fields:
        raise Rejected("DOMAIN,ADDRESS/PREFIX[,PREFIX[*]] or DOMAIN,FIRST[,LAST[,PREFIX[*]]]")
    first, last, rest = _range(fields)
    if len(rest) > 1:
        raise Rejected("one prefix after the addresses")
    text = rest[0].lower() if rest else ""
    prefix, numbered = text.removesuffix("*"), text.endswith("*")
    if not re.fullmatch(r"[a-z0-9_-]*", prefix) or len(prefix) > MAX_SYNTH_PREFIX[first.version]:
        most = MAX_SYNTH_PREFIX[first.version]
        raise Rejected(f"a prefix of at most {most} letters, digits, - and _, with * at its end for numbers")
    if numbered and first.packed[:-8] != last.packed[:-8]:
        raise Rejected("addresses in one /64 for numbered names")
    domain = name_of(name)
    if len(domain) > MAX_NAME_BYTES - 1 - MAX_LABEL_BYTES:
        raise Rejected(f"a domain of at most {MAX_NAME_BYTES - 1 - MAX_LABEL_BYTES} octets")
    draft.add("synth_domains", SynthDomain(domain, first.packed, last.packed, prefix, numbered))


def _range(fields: list[str]) -> tuple[Address, Address, list[str]]:
    """Return the first and the last address of ADDRESS/PREFIX or FIRST[,LAST], and the fields after them."""
    if "/" in fields[0]:
        network = values_network(fields[0])
        return network[0], network[-1], fields[1:]
    first, last = address_of_text(fields[0]), address_of_text(fields[1] if len(fields) > 1 else fields[0])
    if first.version != last.version or first.packed > last.packed:
        raise Rejected("two addresses of one family, the smaller one first")
    return first, last, fields[2:]


def read_alias(draft: Draft, value: str) -> None:
    fields = parts(value)
    if not 2 <= len(fields) <= 3:
        raise Rejected("OLD|FIRST-LAST,NEW[,MASK]")
    first_text, dash, last_text = (part.strip(" ") for part in fields[0].partition("-"))
    first, new, mask = (ipv4_number(text) for text in (first_text, fields[1], *(fields[2:] or ["255.255.255.255"])))
    if not dash:
        draft.add("aliases", Alias(first & mask, first & mask, new, mask, mask))
        return
    last = ipv4_number(last_text)
    if first > last or first & mask != last & mask:
        raise Rejected("FIRST-LAST,NEW,MASK with the smaller address first and both in one network of MASK")
    draft.add("aliases", Alias(first, last, new, mask, 0xFFFFFFFF))


def read_log_queries(draft: Draft, value: str) -> None:
    if value not in ("", "extra"):
        raise Rejected("nothing or 'extra'")
    draft.fields["log_queries"] = True
    draft.fields["log_extra"] = draft.fields.get("log_extra", False) or value == "extra"


def read_local_service(draft: Draft, value: str) -> None:
    if value not in ("", "net", "host"):
        raise Rejected("nothing, 'net' or 'host'")
    draft.local_service = value or "net"


def read_query_port(draft: Draft, value: str) -> None:
    draft.query_port = source_port(plain(value))


def read_min_port(draft: Draft, value: str) -> None:
    draft.min_port = source_port(plain(value))


def read_max_port(draft: Draft, value: str) -> None:
    draft.max_port = source_port(plain(value))


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


def checked(parse: Callable[[str], object]) -> Read:
    """Return the reader of an option with several values whose behaviour is always on."""

    def read(_: Draft, value: str) -> None:
        for part in parts(value):
            parse(part)

    return read


def accept_noop(_: Draft, __: str) -> None:
    """Accept an option whose behaviour is always on."""
