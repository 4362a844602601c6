"""The local names: hosts files and the records of the settings, as one table, built whole and never changed.

Rules
1. A reader has the old table or the new one, never a mixture: `build` makes a new one, its caller puts it in place.
2. A name that has an address or an alias has an answer for every type, if an empty one (NODATA): asked for what it
   does not have, it is never looked for elsewhere. musl's resolver takes the NXDOMAIN of an upstream server for the
   whole name. A name that has other records alone is somebody else's for the rest: one MX record must not take a public
   domain's addresses away. So is a name above one that exists (an empty non-terminal, RFC 8020). But where this
   responder has the only word on them (`--local=/DOMAIN/`, `--address=/DOMAIN/`) both exist, and are not denied.
3. A bad line is reported with file and number, and skipped. A file that cannot be read is an error of the whole: the
   caller keeps the table that it has. The others are read nevertheless, so that all such files are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain

from udpwatch.dns.errors import HostsError
from udpwatch.dns.hosts_file import Complain, hosts_files, read_hosts
from udpwatch.dns.message import Type
from udpwatch.dns.names import REVERSE_4, REVERSE_6, address_of, is_single_label, pack_address, suffixes
from udpwatch.dns.settings import ETC_HOSTS, Settings, StaticRecord

CNAME_CHAIN = 10  # dnsmasq's; longer ones are a loop
HOSTS, CONFIG = "hosts", "config"
MAX_ADDRESSES = 500  # of a name and family: they fit into one message over TCP, and its reader's limits
FEW_DOMAINS = 8  # up to which a look at the end of a name saves taking it apart

_ADDRESS_BYTES = {Type.A: 4, Type.AAAA: 16}


@dataclass(frozen=True, slots=True)
class Rrset:
    """Records of one name and type."""

    owner: bytes  # wire format
    type: int
    ttl: int  # seconds
    data: tuple[bytes, ...]  # each as on the wire, names uncompressed


@dataclass(frozen=True, slots=True)
class Found:
    """What is known here of a question. No records: NODATA, or NXDOMAIN where ``exists`` is False."""

    rrsets: tuple[Rrset, ...]
    exists: bool
    origin: str  # a hosts file's name where queries are logged, else HOSTS; or CONFIG


class Zone:
    """All local names. Made by `build`; nothing changes it afterwards."""

    def __init__(self, settings: Settings) -> None:
        self._ttl = settings.local_ttl
        #: name -> addresses one behind the other; 60 bytes a name less than a list
        self._addresses: dict[int, dict[bytes, bytes]] = {Type.A: {}, Type.AAAA: {}}
        self._reverse: dict[bytes, bytes] = {}  # packed address -> name
        self._records: dict[bytes, dict[int, list[StaticRecord]]] = {}
        self._own_ttl: dict[bytes, int] = {}  # of names from host-record
        self._wild: dict[bytes, list[str | None]] = {}
        self._delegated = {each.domain for each in settings.domain_servers}  # what `--server` says of a domain
        self._above: set[bytes] = set()  # names above others, in the domains that are ours alone
        self._origins: dict[bytes, str] = {}  # name -> "config", or, where queries are logged, a file
        self.entries = 0  # names and aliases read
        self.unreadable = 0  # files that are missing in it

    def find(self, name: bytes, kind: int) -> Found | None:
        """What is known of a name (wire format, lower case); None: nothing, somebody else may."""
        aliases: list[Rrset] = []
        at = name
        for _ in range(CNAME_CHAIN):
            found = self._find(at, kind)
            if found is None and aliases and at in self._records:  # the alias says enough, as dnsmasq's
                return Found(tuple(aliases), True, CONFIG)
            if found is None:
                return None  # an alias of what is not known here is no answer
            if not found.rrsets or found.rrsets[0].type != Type.CNAME or kind in (Type.CNAME, Type.ANY):
                return Found((*aliases, *found.rrsets), found.exists, found.origin)
            aliases += found.rrsets
            at = found.rrsets[0].data[0]
        return Found((), True, CONFIG)

    def _find(self, name: bytes, kind: int) -> Found | None:
        rrsets = [
            Rrset(name, each, self._own_ttl.get(name, self._ttl), _split(packed, _ADDRESS_BYTES[Type(each)]))
            for each, table in self._addresses.items()
            if (packed := table.get(name))
        ]
        origin = self._origins.get(name, HOSTS)
        for each, records in self._records.get(name, {}).items():
            ttl = next((record.ttl for record in records if record.ttl is not None), self._ttl)
            rrsets.append(Rrset(name, each, ttl, tuple(record.data for record in records)))
        wanted = [rrset for rrset in rrsets if kind in (rrset.type, Type.ANY)]
        if not wanted:
            wanted = [rrset for rrset in rrsets if rrset.type == Type.CNAME]
        if wanted or any(rrset.type in _ADDRESS_BYTES for rrset in rrsets) or self._records.get(name) == {}:
            return Found(tuple(wanted), True, origin)
        if name.endswith((REVERSE_4, REVERSE_6)) and (address := address_of(name)) in self._reverse:
            target = self._reverse[address]
            ttl = self._own_ttl.get(target, self._ttl)
            pointers = (Rrset(name, Type.PTR, ttl, (target,)),) if kind in (Type.PTR, Type.ANY) else ()
            return Found(pointers, True, self._origins.get(target, HOSTS))
        return self._find_wild(name, kind)

    def _find_wild(self, name: bytes, kind: int) -> Found | None:
        """By `--address`, unless `--server` says something of a longer domain, or servers of this one stand against
        nothing but NXDOMAIN (dnsmasq's rule)."""
        if not self._wild:
            return None
        for domain in suffixes(name):
            if domain == b"\0" != name and b"" in self._delegated and is_single_label(name):
                return None
            addresses = self._wild.get(domain, [])
            packed = [pack_address(address) for address in addresses if address is not None]
            if not packed and domain in self._delegated:
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
        """Whether a name that nothing was found of exists all the same, and may not be denied: it has records of other
        types, or is in a domain that is ours alone, and has others below it."""
        return name in self._above or name in self._records

    # ---- building ----

    def _add_host(self, packed: bytes, names: list[bytes], origin: str = "") -> bool:
        """Names (wire format, lower case) of an address; the first one is what the address is called. False: one has
        MAX_ADDRESSES already."""
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
        """What is wrong with it, or ""."""
        fits = self._add_host(packed, names, origin)
        return "" if fits else f"line: more than {MAX_ADDRESSES} addresses of a name"

    def _add_settings(self, settings: Settings) -> None:
        for host in settings.host_records:
            for address in host.addresses:
                self._add_host(pack_address(address), list(host.names), CONFIG)
            for name in host.names:
                self._records.setdefault(name, {})  # has an answer for every type, also without an address
                if host.ttl is not None:
                    self._own_ttl[name] = host.ttl
        for record in settings.records:
            self._origins.setdefault(record.name, CONFIG)
            self._records.setdefault(record.name, {}).setdefault(record.type, []).append(record)
        for wild in settings.addresses:
            self._wild.setdefault(wild.domain, []).append(wild.address)

    def _add_above(self, settings: Settings) -> None:
        ours = {each.domain for each in settings.domain_servers if not each.servers and not each.standard} - {b""}
        ours |= {name for name, addresses in self._wild.items() if not any(addresses) and name not in self._delegated}
        if not ours:
            return
        ends = tuple(ours) if len(ours) <= FEW_DOMAINS else b""
        for name in chain(*self._addresses.values(), self._records):
            if not name.endswith(ends):
                continue
            parents = tuple(suffixes(name))
            highest = max((at for at, parent in enumerate(parents) if parent in ours), default=0)
            self._above.update(parents[1 : highest + 1])


def build(settings: Settings, complain: Complain, missing_ok: bool = False) -> Zone:
    """Read every file. Raises HostsError where some cannot be read, unless ``missing_ok``: then they are complained of.

    ``/etc/hosts`` may be missing always, as for dnsmasq.
    """
    zone = Zone(settings)
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
    zone._add_above(settings)
    return zone


def _holds(known: bytes, packed: bytes) -> bool:
    """Whether an address is among others; a table of a thousand is no reason to take them apart."""
    at = known.find(packed)
    while at > 0 and at % len(packed):
        at = known.find(packed, at + 1)
    return at >= 0


def _split(packed: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(packed[at : at + size] for at in range(0, len(packed), size))
