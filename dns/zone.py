"""The local names: hosts files and configured records, as one table that is built whole and never changed.

Rules
1. A reader sees the old table or the new one, never a mixture: `build` creates a new one, and its caller puts it in
   place.
2. A name with an address or an alias is answered for every type, with NODATA for types that it does not have, and is
   never forwarded: musl's resolver takes an upstream NXDOMAIN for the whole name. A name with only other records is
   forwarded for other types: one MX record must not hide a public domain's addresses. The same holds for a name above
   an existing one (an empty non-terminal). Both kinds of names exist: where they would get NXDOMAIN, from here or from
   an upstream server, they get NODATA, because NXDOMAIN would also deny the names below (RFC 8020).
3. An invalid line is reported with file and line number, and skipped. If a file cannot be read the build fails and the
   caller keeps its table. The other files are read nevertheless, so that all unreadable files are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain

from udpwatch.dns.errors import HostsError
from udpwatch.dns.hosts_file import Complain, hosts_files, read_hosts
from udpwatch.dns.interfaces import HostInterfaces
from udpwatch.dns.message import Type
from udpwatch.dns.names import MAX_ADDRESSES, REVERSE_4, REVERSE_6, address_of, is_single_label, pack_address, suffixes
from udpwatch.dns.settings import ETC_HOSTS, Settings, StaticRecord
from udpwatch.dns.synth import SynthDomains

CNAME_CHAIN = 10  # dnsmasq's limit; a longer chain is a loop
HOSTS, CONFIG = "hosts", "config"

_ADDRESS_BYTES = {Type.A: 4, Type.AAAA: 16}
_ARPA = b"\x04arpa\x00"


@dataclass(frozen=True, slots=True)
class Rrset:
    """Records of one name and type."""

    owner: bytes  # wire format
    type: int
    ttl: int  # seconds
    data: tuple[bytes, ...]  # RDATA in wire format, names uncompressed
    varies: bool = False  # it depends on the address that was asked


@dataclass(frozen=True, slots=True)
class Found:
    """The local answer to a question. Without records: NODATA, or NXDOMAIN if ``exists`` is False."""

    rrsets: tuple[Rrset, ...]
    exists: bool
    origin: str  # CONFIG or HOSTS; if queries are logged, the hosts file's name


class Zone:
    """All local names. Created by `build`, never changed afterwards, except for the addresses of interfaces."""

    def __init__(self, settings: Settings, interfaces: HostInterfaces | None = None) -> None:
        self._ttl = settings.local_ttl
        self._interfaces = interfaces or HostInterfaces(settings)
        self._local_mx, self._self_mx = settings.local_mx, settings.self_mx
        #: name -> concatenated addresses: 60 bytes per name less than a list
        self._addresses: dict[int, dict[bytes, bytes]] = {Type.A: {}, Type.AAAA: {}}
        self._reverse: dict[bytes, bytes] = {}  # packed address -> name
        self._records: dict[bytes, dict[int, list[StaticRecord]]] = {}
        self._own_ttl: dict[bytes, int] = {}  # names of host-record
        self._synth = SynthDomains(settings.synth_domains) if settings.synth_domains else None
        self._wild: dict[bytes, list[str | None]] = {}
        #: whether names may be local that are in no table of this zone
        self._has_patterns = bool(settings.synth_domains or settings.addresses or settings.interface_names)
        #: domains that `--server` names; replaced whole when a servers file changes
        self.delegated = frozenset(each.domain for each in settings.domain_servers)
        self._above: set[bytes] = set()  # names above others, without the root
        self._origins: dict[bytes, str] = {}  # name -> CONFIG; if queries are logged, also a file
        self.entries = 0  # names and aliases
        self.unreadable = 0  # files that could not be read

    def find(self, name: bytes, kind: int, asked: bytes = b"") -> Found | None:
        """Return the local answer for a name (wire format, lower case), or None if the name is not local.

        ``asked``: the address of this host that was asked, for `--localise-queries`; b"" if it does not matter.
        """
        if not self._may_know(name):
            return None
        aliases: list[Rrset] = []
        at = name
        for _ in range(CNAME_CHAIN):
            found = self._find(at, kind, asked)
            if found is None and aliases and at in self._records:  # answer with the alias alone, as dnsmasq does
                return Found(tuple(aliases), True, CONFIG)
            if found is None:
                return None  # an alias to a name that is not local
            if not found.rrsets or found.rrsets[0].type != Type.CNAME or kind in (Type.CNAME, Type.ANY):
                return Found((*aliases, *found.rrsets), found.exists, found.origin)
            aliases += found.rrsets
            at = found.rrsets[0].data[0]
        return Found((), True, CONFIG)

    def _may_know(self, name: bytes) -> bool:
        """Return False for most names that are not local: each query for a cached or forwarded name comes here."""
        addresses = self._addresses
        return (
            name in addresses[1]
            or name in addresses[28]
            or name in self._records
            or self._has_patterns
            or name.endswith(_ARPA)
        )

    def _find(self, name: bytes, kind: int, asked: bytes) -> Found | None:
        if name.endswith((REVERSE_4, REVERSE_6)) and (pointer := self._find_pointer(name, kind, True)):
            return pointer
        rrsets = self._address_rrsets(name, asked)
        origin = self._origins.get(name, HOSTS)
        for each, records in self._records.get(name, {}).items():
            ttl = next((record.ttl for record in records if record.ttl is not None), self._ttl)
            rrsets.append(Rrset(name, each, ttl, tuple(record.data for record in records)))
        wanted = [rrset for rrset in rrsets if kind in (rrset.type, Type.ANY)]
        if not wanted:
            wanted = [rrset for rrset in rrsets if rrset.type == Type.CNAME] or self._find_mx(name, kind, rrsets)
        if wanted or any(rrset.type in _ADDRESS_BYTES for rrset in rrsets) or self._records.get(name) == {}:
            return Found(tuple(wanted), True, origin)
        if name.endswith((REVERSE_4, REVERSE_6)) and (pointer := self._find_pointer(name, kind, False)):
            return pointer
        return self._find_synth(name, kind) or self._find_wild(name, kind)

    def _address_rrsets(self, name: bytes, asked: bytes) -> list[Rrset]:
        """Return the addresses of a name: those of interfaces, or those of hosts files and host records."""
        ttl, dynamic = self._own_ttl.get(name, self._ttl), self._interfaces.addresses(name)
        found = []
        for kind, size in _ADDRESS_BYTES.items():
            data = _split(self._addresses[kind].get(name, b""), size) if dynamic is None else dynamic[size]
            varies = size == 4 and len(data) > 1 and self._interfaces.selects(asked)
            if varies:
                data = self._interfaces.near(data, asked)
            if data:
                found.append(Rrset(name, kind, ttl, data, varies))
        return found

    def _find_pointer(self, name: bytes, kind: int, of_interfaces: bool) -> Found | None:
        """Answer a reverse name. Interfaces come before configured records, which come before hosts files."""
        address = address_of(name)
        if address is None:
            return None
        target = self._interfaces.pointer(address) if of_interfaces else self._reverse.get(address)
        if target is None:
            return None
        rrset = Rrset(name, Type.PTR, self._own_ttl.get(target, self._ttl), (target,))
        return Found((rrset,) if kind in (Type.PTR, Type.ANY) else (), True, self._origins.get(target, HOSTS))

    def _find_synth(self, name: bytes, kind: int) -> Found | None:
        """Answer by `--synth-domain`."""
        if not self._synth:
            return None
        rrsets = []
        if name.endswith((REVERSE_4, REVERSE_6)) and (address := address_of(name)):
            if target := self._synth.pointer(address):
                rrsets.append(Rrset(name, Type.PTR, self._ttl, (target,)))
        else:
            for packed in self._synth.addresses(name):
                rrsets.append(Rrset(name, Type.A if len(packed) == 4 else Type.AAAA, self._ttl, (packed,)))
        if not rrsets:
            return None
        return Found(tuple(rrset for rrset in rrsets if kind in (rrset.type, Type.ANY)), True, CONFIG)

    def _find_mx(self, name: bytes, kind: int, rrsets: list[Rrset]) -> list[Rrset]:
        """Return the MX record of a name with an address: `--localmx`, `--selfmx`."""
        target = name if self._self_mx else self._local_mx
        if kind != Type.MX or not target or not any(rrset.type in _ADDRESS_BYTES for rrset in rrsets):
            return []
        return [Rrset(name, Type.MX, self._ttl, (b"\0\1" + target,))]

    def _find_wild(self, name: bytes, kind: int) -> Found | None:
        """Answer by `--address`, unless `--server` names a longer domain, or the same domain while `--address` gives it
        no address (dnsmasq's rule)."""
        if not self._wild:
            return None
        for domain in suffixes(name):
            if domain == b"\0" != name and b"" in self.delegated and is_single_label(name):
                return None
            addresses = self._wild.get(domain, [])
            packed = [pack_address(address) for address in addresses if address is not None]
            if not packed and domain in self.delegated:
                return None
            if not addresses:
                continue
            if not packed:
                return Found((), self.exists(name), CONFIG)
            rrsets = []
            for each, size in _ADDRESS_BYTES.items():
                data = tuple(one for one in packed if len(one) == size)
                if data and kind in (each, Type.ANY):
                    rrsets.append(Rrset(name, each, self._ttl, data))
            return Found(tuple(rrsets), True, CONFIG)
        return None

    def exists(self, name: bytes) -> bool:
        """Return whether a name without a local answer exists and must not get NXDOMAIN: it has records of other types,
        or names below it."""
        return name in self._above or name in self._records

    # ---- building ----

    def _add_host(self, packed: bytes, names: list[bytes], origin: str = "") -> bool:
        """Add names (wire format, lower case) of an address; the first one is its reverse name. Return False if a name
        has MAX_ADDRESSES already."""
        table, fits = self._addresses[Type.A if len(packed) == 4 else Type.AAAA], True
        for name in names:
            known = table.get(name)
            if known is None:
                table[name] = packed
            elif not _holds(known, packed):
                if len(known) >= MAX_ADDRESSES * len(packed):
                    fits = False
                    continue
                table[name] = known + packed
            if origin:
                self._origins.setdefault(name, origin)
        self._reverse.setdefault(packed, names[0])
        self.entries += len(names)
        return fits

    def _add_hosts_line(self, origin: str, packed: bytes, names: list[bytes]) -> str:
        """Add a line of a hosts file. Return the problem with it, or ""."""
        fits = self._add_host(packed, names, origin)
        return "" if fits else f"line: more than {MAX_ADDRESSES} addresses of a name"

    def _add_settings(self, settings: Settings) -> None:
        for host in settings.host_records:
            for address in host.addresses:
                self._add_host(pack_address(address), list(host.names), CONFIG)
            for name in host.names:
                self._records.setdefault(name, {})  # is answered for every type, also without an address
                if host.ttl is not None:
                    self._own_ttl[name] = host.ttl
        for each in settings.interface_names:
            self._records.setdefault(each.name, {})
            self._origins.setdefault(each.name, CONFIG)
        for record in settings.records:
            self._origins.setdefault(record.name, CONFIG)
            self._records.setdefault(record.name, {}).setdefault(record.type, []).append(record)
        for wild in settings.addresses:
            self._wild.setdefault(wild.domain, []).append(wild.address)

    def _add_above(self) -> None:
        wild = (name for name, addresses in self._wild.items() if any(addresses))
        above = self._above
        for name in chain(*self._addresses.values(), self._records, wild):
            parent = name[1 + name[0] :]
            while len(parent) > 1 and parent not in above:  # else those above it are known, too
                above.add(parent)
                parent = parent[1 + parent[0] :]


def build(
    settings: Settings, complain: Complain, missing_ok: bool = False, interfaces: HostInterfaces | None = None
) -> Zone:
    """Read every file. Raises HostsError if some cannot be read; with ``missing_ok``, complain instead.

    ``/etc/hosts`` may always be missing, as with dnsmasq.
    """
    zone = Zone(settings, interfaces)
    missed: list[str] = []
    zone._add_settings(settings)
    domain = settings.domain if settings.expand_hosts else b""
    for path in hosts_files(settings, missed.append):
        try:
            read_hosts(path, domain, partial(zone._add_hosts_line, str(path) if settings.log_queries else ""), complain)
        except FileNotFoundError:
            if path == ETC_HOSTS:
                continue
            missed.append(f"cannot read {path}: No such file or directory")
        except OSError as error:
            missed.append(f"cannot read {path}: {error.strerror or error}")
    if missed and not missing_ok:
        raise HostsError(missed)
    for text in missed:
        complain(text)
    zone.unreadable = len(missed)
    zone._add_above()
    return zone


def _holds(known: bytes, packed: bytes) -> bool:
    """Return whether an address is among concatenated ones, without splitting them."""
    at = known.find(packed)
    while at > 0 and at % len(packed):
        at = known.find(packed, at + 1)
    return at >= 0


def _split(packed: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(packed[at : at + size] for at in range(0, len(packed), size))
