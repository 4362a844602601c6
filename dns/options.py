"""The words after `udpwatch dns`, and configuration files, dnsmasq's way.

Rules
1. Every option is one row of OPTIONS; the command line, files, --help and docs/dns-options.md are made from it.
2. Nothing is ignored. What dnsmasq has and we do not is refused by name, and so is what nobody has.
3. A word never means anything else than it means to dnsmasq; where that is not what we do, it is refused.
4. Order does not matter between options, but where dnsmasq says so: a file wins over the command line, and the order of
   servers and of names is kept. What depends on several options is worked out at the end, in `_finish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from udpwatch.dns import values, wire
from udpwatch.dns.conffile import lines, plain, shown
from udpwatch.dns.errors import ConfigError, FileError
from udpwatch.dns.settings import DomainServers, Settings, StaticRecord
from udpwatch.dns.values import Draft, Information, Read, Rejected

MAX_DEPTH = 16  # conf-file within conf-file
DOCUMENT = "docs/dns-options.md"


def _help(draft: Draft, _: str) -> None:
    draft.information = Information(usage())


def _version(draft: Draft, _: str) -> None:
    try:
        version = metadata.version("udpwatch")
    except metadata.PackageNotFoundError:  # a tree that is not installed
        version = "of a tree that is not installed"
    draft.information = Information(f"udpwatch {version}")


# ---- the table ----


@dataclass(frozen=True, slots=True)
class Option:
    """One option: how it is called, read, and explained."""

    name: str
    short: str  # dnsmasq's letter; "": none
    value: str  # what it takes; "": nothing; "[=..]": may be left out, and stands in the same word
    read: Read
    help: str
    differs: str = ""  # from dnsmasq
    once: bool = False  # as dnsmasq has it
    here: bool = False  # on the command line only

    @property
    def flag(self) -> str:
        """As it is written, with what it takes."""
        return f"--{self.name}" + (
            self.value if self.value.startswith("[=") else f"={self.value}" if self.value else ""
        )

    @property
    def needs_value(self) -> bool:
        """Whether it cannot stand alone."""
        return bool(self.value) and not self.value.startswith("[=")


def _option(usage: str, read: Read, help_: str, differs: str = "", once: bool = False, here: bool = False) -> Option:
    """A row; ``usage`` is how --help writes the option: ``[-LETTER ]--NAME[=VALUE]``, or ``[=VALUE]`` at the end."""
    short, _, long = usage.rpartition("--")
    name = long.partition("=")[0].removesuffix("[")
    value = long[len(name) :].removeprefix("=")
    return Option(name, short.strip("- "), value, read, help_, differs, once, here)


_FOREGROUND = "nothing: udpwatch always stays in the foreground"

OPTIONS = (
    # where it listens
    _option(
        "-p --port=PORT", values.one("port", values.port_number), "listen on this port (53)", "0 is refused", once=True
    ),
    _option(
        "-a --listen-address=ADDRESS[,..]",
        values.several("listen_addresses", values.listen_address),
        "listen on these addresses; one that does not exist yet is picked up when it comes",
    ),
    _option(
        "-i --interface=NAME[,..]",
        values.several("interfaces", values.listening_device),
        "listen on these interfaces; a final * stands for any rest",
        "a label (eth0:1) is refused",
    ),
    _option(
        "-I --except-interface=NAME[,..]",
        values.several("except_interfaces", values.listening_device),
        "do not listen on these interfaces",
        "a label (eth0:1) is refused",
    ),
    _option("--bind-dynamic", values.so_it_is, "nothing: each address has a socket, and comes and goes with it"),
    _option(
        "-z --bind-interfaces",
        values.so_it_is,
        "as --bind-dynamic",
        "an address that is missing is no failure; beside --bind-dynamic it is accepted",
    ),
    _option(
        "--local-service[=net|host]",
        values.read_local_service,
        "answer hosts of directly connected networks only; host: listen on lo only; without effect where "
        "--interface, --except-interface or --listen-address is given",
        "net is the default",
        once=True,
    ),
    # local names
    _option("-h --no-hosts", values.on("hosts", False), "do not read /etc/hosts"),
    _option(
        "-H --addn-hosts=PATH",
        values.each("addn_hosts", values.file_path),
        "read this file of hosts, or all of this folder, too; may be repeated",
        "changes are picked up without SIGHUP",
    ),
    _option("--hostsdir=FOLDER", values.each("addn_hosts", values.file_path), "as --addn-hosts"),
    _option("-E --expand-hosts", values.on("expand_hosts"), "names without a dot in hosts files get --domain too"),
    _option(
        "-s --domain=DOMAIN",
        values.one("domain", values.domain_name),
        "the domain for --expand-hosts and --srv-host",
        "a range of addresses, and #, are refused: there is no DHCP; the last one counts",
    ),
    _option("--domain-suffix=DOMAIN", values.one("domain", values.domain_name), "as --domain"),
    _option(
        "-A --address=/DOMAIN/[..][ADDRESS|#]",
        values.read_address,
        "a domain, and all below it, at an address; #: 0.0.0.0 and ::; nothing: NXDOMAIN; /#/: every name",
        "//, *DOMAIN and an address without a domain are refused; other types have no records and are not passed on",
    ),
    _option(
        "--host-record=NAME[,..][,IPv4][,IPv6][,TTL]",
        values.read_host_record,
        "names at addresses, and the reverse for the first name",
        "a second address of a family, and a record without name or address, are refused",
    ),
    _option("--cname=ALIAS[,..],TARGET[,TTL]", values.read_cname, "aliases of a name", "*.DOMAIN is refused"),
    _option(
        "-Y --txt-record=NAME[,TEXT..]", values.read_txt, "a TXT record; each text is one string, or several of 255"
    ),
    _option(
        "-W --srv-host=_SERVICE._PROTO[.DOMAIN][,TARGET[,PORT[,PRIORITY[,WEIGHT]]]]",
        values.read_srv,
        "an SRV record; without DOMAIN in --domain; without TARGET the service is not offered",
    ),
    _option("-m --mx-host=NAME,TARGET[,PREFERENCE]", values.read_mx, "an MX record", "TARGET may not be left out"),
    _option("--ptr-record=NAME,TARGET", values.read_ptr, "a PTR record", "TARGET may not be left out"),
    _option("-T --local-ttl=SECONDS", values.one("local_ttl", values.seconds), "TTL of local names (0)", once=True),
    # upstream servers
    _option("-R --no-resolv", values.on("resolv", False), "read no resolv file: only --server counts"),
    _option(
        "-r --resolv-file=FILE",
        values.each("resolv_files", values.file_path),
        "find upstream servers in this file instead of /etc/resolv.conf; may be repeated",
        "the file may not be left out",
    ),
    _option("-n --no-poll", values.on("poll", False), "do not watch the resolv file; SIGHUP reads it again"),
    _option(
        "-S --server=[/DOMAIN/[..]][ADDRESS[%IF][#PORT][@INTERFACE][@SOURCE]|#]",
        values.read_server,
        "an upstream server, for some domains or for all; #: those of the rest; nothing: the domain is local; "
        "//: names without a dot",
        "refused: names of servers, *DOMAIN, a port to ask from, and for one domain more than one of servers, # "
        "and nothing",
    ),
    _option(
        "--local=/DOMAIN/[..][ADDRESS|#]",
        values.read_local,
        "as --server, most often without an address",
        "a domain is needed",
    ),
    _option(
        "-0 --dns-forward-max=N",
        values.one("forward_max", values.whole(1, 65535)),
        "questions under way to the servers of one domain (1000), four times as many to all",
        "dnsmasq's default is 150",
        once=True,
    ),
    _option(
        "-P --edns-packet-max=OCTETS",
        values.one("edns_packet_max", values.whole(512, 65535)),
        "the longest message over UDP (1232)",
        "less than 512 is refused",
        once=True,
    ),
    _option("-D --domain-needed", values.on("domain_needed"), "do not forward A and AAAA of names without a dot"),
    _option(
        "-b --bogus-priv",
        values.on("bogus_priv"),
        "do not forward the reverse of private addresses, but to a --server of their domain",
        "of every type, not PTR and ANY alone, and with labels in front (b._dns-sd._udp.); not of parts of an address",
    ),
    _option(
        "--stop-dns-rebind",
        values.on("stop_dns_rebind"),
        "refuse private addresses from upstream",
        "the answer is REFUSED; dnsmasq's is empty",
    ),
    _option(
        "--rebind-localhost-ok",
        values.on("rebind_localhost_ok"),
        "with --stop-dns-rebind: let 127.0.0.0/8, 0.0.0.0/8, ::1 and :: pass",
    ),
    _option(
        "--rebind-domain-ok=[/]DOMAIN[/..]",
        values.read_rebind_domain_ok,
        "with --stop-dns-rebind: let these domains pass",
    ),
    # the cache
    _option(
        "-c --cache-size=N",
        values.one("cache_size", values.whole(0, values.MAX_CACHE_SIZE)),
        "answers kept (10000); 0: none",
        "dnsmasq's default is 150; answers of every type are kept",
        once=True,
    ),
    _option("-N --no-negcache", values.on("negcache", False), "keep no negative answers"),
    _option(
        "--neg-ttl=SECONDS",
        values.one("neg_ttl", values.seconds),
        "keep negative answers without SOA for this long (0: they are not kept)",
        once=True,
    ),
    _option(
        "--max-ttl=SECONDS",
        values.one("max_ttl", values.seconds),
        "the longest TTL that a client sees (0: no limit)",
        once=True,
    ),
    _option(
        "--use-stale-cache[=SECONDS|off]",
        values.one("stale_seconds", values.stale_seconds),
        "let an expired answer stand in while every upstream server is down, for this long (86400; 0: no limit)",
        "on by default, for outages only; off is ours",
        once=True,
    ),
    _option("--no-round-robin", values.so_it_is, "nothing: answers keep their order", "dnsmasq rotates without it"),
    # what it tells
    _option("-q --log-queries[=extra]", values.read_log_queries, "log questions and answers; extra: number and client"),
    _option("--no-ident", values.on("ident", False), "do not answer CHAOS names in bind."),
    _option(
        "--metrics-listen=HOST:PORT|off",
        values.one("metrics_listen", values.metrics_listen),
        "where Prometheus finds /metrics (127.0.0.1:9953)",
        "dnsmasq has no such option",
        once=True,
    ),
    # how it runs
    _option(
        "-u --user=NAME",
        values.one("user", values.user_name),
        "where started as root, change to this user (nobody) and keep no capability but CAP_NET_BIND_SERVICE",
        "root is uid 0 without other capabilities; other groups of the user are kept",
        once=True,
    ),
    _option(
        "-C --conf-file=FILE",
        values.read_conf_file,
        "read options from this file too; may be repeated",
        "without it no file is read, /etc/dnsmasq.conf least of all; - is refused",
    ),
    _option(
        "-7 --conf-dir=FOLDER[,SUFFIX|*SUFFIX..]",
        values.read_conf_dir,
        "read options from a folder's files, without those that end in SUFFIX, or only those that do",
    ),
    _option("-k --keep-in-foreground", values.so_it_is, _FOREGROUND),
    _option("-d --no-daemon", values.so_it_is, _FOREGROUND, "no debug mode"),
    _option("--test", values.test_only, "read everything, then say that it is fine or not", here=True),
    _option("-v --version", _version, "show the version", here=True),
    _option("-w --help", _help, "show this", "`--help dhcp` is not to be had", here=True),
)

#: dnsmasq's other options, with those that its --help does not show and those that came after 2.90; behind a colon the
#: letter of those that have one.
_REFUSED = """
    add-cpe-id add-mac add-subnet alias:V all-servers auth-peer auth-sec-servers auth-server auth-soa auth-ttl auth-zone
    bogus-nxdomain:B bootp-dynamic:3 bridge-interface caa-record cache-rr clear-on-reload conf-script
    connmark-allowlist connmark-allowlist-enable conntrack dhcp-alternate-port dhcp-authoritative:K dhcp-boot:M
    dhcp-broadcast dhcp-circuitid dhcp-client-update dhcp-duid dhcp-fqdn dhcp-generate-names dhcp-host:G dhcp-hostsdir
    dhcp-hostsfile dhcp-ignore:J dhcp-ignore-clid dhcp-ignore-names dhcp-lease dhcp-lease-max:X dhcp-leasefile:l
    dhcp-luascript dhcp-mac:4 dhcp-match dhcp-name-match dhcp-no-override dhcp-option:O dhcp-option-force
    dhcp-option-pxe dhcp-optsdir dhcp-optsfile dhcp-proxy dhcp-pxe-vendor dhcp-range:F dhcp-rapid-commit dhcp-relay
    dhcp-remoteid dhcp-reply-delay dhcp-script:6 dhcp-scriptuser dhcp-sequential-ip dhcp-split-relay dhcp-subscrid
    dhcp-ttl dhcp-userclass:j dhcp-vendorclass:U dns-loop-detect dns-rr dnssec dnssec-check-unsigned dnssec-debug
    dnssec-limits dnssec-no-timecheck dnssec-timestamp do-0x20-encode dumpfile dumpmask dynamic-host enable-dbus:1
    enable-ra enable-tftp enable-ubus fast-dns-retry filter-A filter-AAAA filter-rr filterwin2k:f group:g ignore-address
    interface-name ipset leasefile-ro:9 leasequery localise-queries:y localmx:L log-async log-debug log-dhcp
    log-facility:8 max-cache-ttl max-port max-tcp-connections min-cache-ttl min-port mx-target:t naptr-record nftset
    no-0x20-encode no-dhcp-interface:2 no-dhcpv4-interface no-dhcpv6-interface no-ping:5 pid-file:x port-limit
    proxy-dnssec pxe-prompt pxe-service query-port:Q quiet-dhcp quiet-dhcp6 quiet-ra quiet-tftp ra-param read-ethers:Z
    rev-server script-arp script-on-renewal selfmx:e servers-file shared-network strict-order:o strip-mac strip-subnet
    synth-domain tag-if tftp-lowercase tftp-max tftp-mtu tftp-no-blocksize tftp-no-fail tftp-port-range tftp-root
    tftp-secure tftp-single-port tftp-unique-root trust-anchor umbrella
"""
REFUSED = {name: short for name, _, short in (word.partition(":") for word in _REFUSED.split())}

_BY_NAME = {option.name: option for option in OPTIONS}
_BY_SHORT = {option.short: option for option in OPTIONS if option.short}
_REFUSED_SHORT = {short: name for name, short in REFUSED.items() if short}


# ---- reading ----


def parse(arguments: Sequence[str]) -> Settings | Information:
    """Read the words after `udpwatch dns`. Raises ConfigError for a word, or a line of a file, that is not accepted,
    and FileError for a configuration file that cannot be read.
    """
    draft = Draft()
    for word in arguments:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"{word!r}: not UTF-8")
    for where, option, value in _words(arguments):
        _apply(draft, where, option, value, in_file=False)
        if draft.information:
            return draft.information
    _read_files(draft, depth=1)
    settings = _finish(draft)
    return Information("syntax check OK.") if draft.test else settings


def read_conf(path: Path) -> Settings:
    """Read one configuration file and what it includes. Raises ConfigError and FileError."""
    draft = Draft(files=[path])
    _read_files(draft, depth=1)
    return _finish(draft)


def usage() -> str:
    """What --help shows."""
    rows = ["Usage: udpwatch dns [options]", "", "The options are dnsmasq's, but for --metrics-listen:"]
    for option in OPTIONS:
        rows.append(f"{f'-{option.short}, ' if option.short else '':4}{option.flag}")
        rows.append(f"        {option.help}")
    return "\n".join([*rows, "", f"Where they differ from dnsmasq's: {DOCUMENT}"])


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, Option, str | None]]:
    """How the option is written, the option, and its value, as getopt_long takes words apart. Raises ConfigError."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            for rest in words:
                raise ConfigError(f"{rest!r}: a word that belongs to no option; see --help")
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _long(name)
            where = f"--{option.name}"
            if not equals and option.needs_value:
                yield where, option, _next(where, words)
            else:
                yield where, option, value if equals else None
        elif word.startswith("-") and word != "-":
            at = 1
            while at < len(word):
                option, where = _letter(word[at]), f"-{word[at]}"
                at += 1
                if option.needs_value:
                    yield where, option, word[at:] or _next(where, words)
                    break
                yield where, option, None  # getopt gives -q no value
        elif word.strip():  # dnsmasq passes over empty words, which scripts leave behind
            raise ConfigError(f"{word!r}: a word that belongs to no option; see --help")


def _next(where: str, words: Iterator[str]) -> str:
    """The word behind an option. One that looks like an option is not taken: dnsmasq lets the values of --resolv-file,
    --cache-size and --conf-file be left out, and would read it as one."""
    value = next(words, "-")
    if value.startswith("-"):
        raise ConfigError(f"{where}: it takes a value" + (f", which {value!r} is not" if len(value) > 1 else ""))
    return value


def _long(name: str) -> Option:
    """The option of this name, or the only one of ours and dnsmasq's that begins so. Raises ConfigError."""
    if name not in _BY_NAME and name not in REFUSED:
        meant = [known for known in (*_BY_NAME, *REFUSED) if known.startswith(name)]
        if len(meant) > 1:
            more = ", .." if len(meant) > 5 else ""
            raise ConfigError(f"--{name}: this may be {', '.join(f'--{known}' for known in meant[:5])}{more}")
        name = meant[0] if meant else name
    return _known(name, f"--{name}", "--help")


def _letter(letter: str) -> Option:
    if letter in _BY_SHORT:
        return _BY_SHORT[letter]
    name = _REFUSED_SHORT.get(letter, "")
    return _known(name, f"--{name} (-{letter})" if name else f"-{letter}", "--help")


def _known(name: str, where: str, see: str) -> Option:
    if name in REFUSED:
        raise ConfigError(f"{where}: udpwatch's responder does not have this option of dnsmasq's; see {DOCUMENT}")
    if name not in _BY_NAME:
        raise ConfigError(f"{where if where.isprintable() else repr(where)}: there is no such option; see {see}")
    return _BY_NAME[name]


def _read_files(draft: Draft, depth: int) -> None:
    """Read the files that have been named, and those that they name, each where it is named.

    As with dnsmasq, a file counts once, however often it is named; thus a circle ends.
    """
    files, draft.files = draft.files, []
    for path in files:
        if depth > MAX_DEPTH:
            raise ConfigError(f"conf-file: {shown(path)} is more than {MAX_DEPTH} files deep")
        try:
            status = path.stat()
        except OSError as error:
            raise FileError(f"conf-file: cannot read {shown(path)}: {error.strerror}") from None
        if (status.st_dev, status.st_ino) in draft.seen:
            continue
        draft.seen.add((status.st_dev, status.st_ino))
        for line in lines(path):
            where = f"{line.where}: {line.name}"
            option = _known(line.name, where, DOCUMENT)
            if option.here:
                raise ConfigError(f"{where}: an option for the command line only")
            _apply(draft, where, option, line.value, in_file=True)
            if draft.files:
                _read_files(draft, depth + 1)


def _apply(draft: Draft, where: str, option: Option, value: str | None, in_file: bool) -> None:
    """Add one option to the draft. Raises ConfigError, and FileError for a folder."""
    if value is not None and not option.value:
        raise ConfigError(f"{where}: it takes no value, and {_shown(value)} is one")
    if value is None and option.needs_value:
        raise ConfigError(f"{where}: it takes {option.value}")
    if option.once:
        if draft.once.get(option.name) is in_file:
            raise ConfigError(f"{where}: given before; it counts once")
        draft.once[option.name] = in_file
    try:
        option.read(draft, value or "")
    except Rejected as error:
        raise ConfigError(f"{where}: {_shown(value or '')} is not accepted; it takes {error}") from None


def _shown(value: str) -> str:
    text = plain(value)
    return repr(text if len(text) <= 200 else text[:200] + "..")


# ---- what depends on several options ----


def _finish(draft: Draft) -> Settings:
    """Settings from all that was said. Raises ConfigError for what does not fit together."""
    many = {name: tuple(items) for name, items in draft.many.items()}
    said: dict[str, Any] = draft.fields | many
    said["domain_servers"] = tuple(
        DomainServers(name, tuple(domain.servers), domain.kind == "standard") for name, domain in draft.domains.items()
    )
    settings = Settings(**said)
    if settings.resolv and not settings.poll and len(settings.resolv_files) > 1:
        raise ConfigError("--no-poll: it takes one --resolv-file: the newest of several is found by looking")
    _check_cnames(draft.cnames)
    changes: dict[str, Any] = {"records": tuple(_qualified(record, settings.domain) for record in settings.records)}
    if settings.interfaces or settings.except_interfaces or settings.listen_addresses:
        changes["local_service"] = False
    elif draft.local_service == "host":
        changes |= {"local_service": False, "interfaces": ("lo",)}
    return replace(settings, **changes)


def _qualified(record: StaticRecord, domain: bytes) -> StaticRecord:
    """An SRV record of _SERVICE._PROTO alone goes into --domain."""
    if record.type != wire.Type.SRV or not domain or wire.label_count(record.name) != 2:
        return record
    name = record.name[:-1] + domain
    if len(name) > wire.MAX_NAME_BYTES:
        raise ConfigError(f"--srv-host: {wire.name_to_text(record.name)} is too long for --domain")
    return replace(record, name=name)


def _check_cnames(cnames: dict[bytes, bytes]) -> None:
    """Raises ConfigError where aliases lead in a circle."""
    fine: set[bytes] = set()
    for alias in cnames:
        path: dict[bytes, None] = {}
        name = alias
        while name in cnames and name not in fine:
            if name in path:
                raise ConfigError(f"--cname: {wire.name_to_text(name)} leads back to itself")
            path[name] = None
            name = cnames[name]
        fine.update(path)
