"""The options of `udpwatch dns`: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from udpwatch.dns import values
from udpwatch.dns.values import Draft, Information, Read

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

BY_NAME = {option.name: option for option in OPTIONS}
BY_SHORT = {option.short: option for option in OPTIONS if option.short}
REFUSED_SHORT = {short: name for name, short in REFUSED.items() if short}


def usage() -> str:
    """What --help shows."""
    rows = ["Usage: udpwatch dns [options]", "", "The options are dnsmasq's, but for --metrics-listen:"]
    for option in OPTIONS:
        rows.append(f"{f'-{option.short}, ' if option.short else '':4}{option.flag}")
        rows.append(f"        {option.help}")
    return "\n".join([*rows, "", f"Where they differ from dnsmasq's: {DOCUMENT}"])
