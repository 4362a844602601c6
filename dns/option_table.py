"""The options of `udpwatch dns`: one row each. --help and docs/dns-options.md are generated from this table."""

from __future__ import annotations

from importlib import metadata

from udpwatch.dns import option_readers as readers
from udpwatch.dns import values
from udpwatch.dns.option import option
from udpwatch.dns.option_readers import Draft, Information
from udpwatch.dns.other_options import IDLE

DOCUMENT = "docs/dns-options.md"


def _help(draft: Draft, _: str) -> None:
    draft.information = Information(usage())


def _version(draft: Draft, _: str) -> None:
    try:
        version = metadata.version("udpwatch")
    except metadata.PackageNotFoundError:  # a source tree
        version = "(not installed)"
    draft.information = Information(f"udpwatch {version}")


_FOREGROUND = "no effect: udpwatch always stays in the foreground; without this option it logs so once"

OPTIONS = (
    # listening
    option(
        "-p --port=PORT", readers.one("port", values.port_number), "listen on this port (53)", "0 is refused", once=True
    ),
    option(
        "-a --listen-address=ADDRESS[,..]",
        readers.several("listen_addresses", values.listen_address),
        "listen on these addresses, also when they appear later; 0.0.0.0 and :: with --bind-interfaces: on every "
        "address of the family",
        "without --bind-interfaces and --bind-dynamic, too, only these addresses are bound; 0.0.0.0 and :: are refused "
        "where they match no query",
    ),
    option(
        "-i --interface=NAME[,..]",
        readers.several("interfaces", values.listening_device),
        "serve queries that arrive on these interfaces, and on lo, whatever address they ask; a final * matches any "
        "ending",
        "a label (eth0:1) is refused; TCP connections to an address of another interface are served, too",
    ),
    option(
        "-I --except-interface=NAME[,..]",
        readers.several("except_interfaces", values.listening_device),
        "do not listen on these interfaces",
        "a label (eth0:1) is refused",
    ),
    option(
        "--bind-dynamic",
        readers.on("bind_dynamic"),
        "with --interface or --except-interface, listen only on the addresses of these interfaces, each with its own "
        "socket while it exists",
        "without these options no effect",
    ),
    option(
        "-z --bind-interfaces",
        readers.on("bind_interfaces"),
        "the same as --bind-dynamic; also needed for --listen-address=0.0.0.0 and ::",
        "a missing address is not an error; may be combined with --bind-dynamic; the interface of a query is checked",
    ),
    option(
        "--local-service[=net|host]",
        readers.read_local_service,
        "serve only clients in directly connected networks; host: listen on lo only; no effect with --interface, "
        "--except-interface or --listen-address",
        "net is the default",
        once=True,
    ),
    # local names
    option("-h --no-hosts", readers.on("hosts", False), "do not read /etc/hosts"),
    option(
        "-H --addn-hosts=PATH",
        readers.each("addn_hosts", values.file_path),
        "also read this hosts file, or all files of this folder; may be repeated",
        "changes take effect without SIGHUP",
    ),
    option("--hostsdir=FOLDER", readers.each("addn_hosts", values.file_path), "the same as --addn-hosts"),
    option("-E --expand-hosts", readers.on("expand_hosts"), "also add --domain to names without a dot in hosts files"),
    option(
        "-s --domain=DOMAIN",
        readers.one("domain", values.domain_name),
        "the domain for --expand-hosts and --srv-host",
        "an address range and # are refused, because there is no DHCP; the last value wins",
    ),
    option("--domain-suffix=DOMAIN", readers.one("domain", values.domain_name), "the same as --domain"),
    option(
        "-A --address=/DOMAIN/[..][ADDRESS|#]",
        readers.read_address,
        "answer a domain and all names below it with this address; #: 0.0.0.0 and ::; nothing: NXDOMAIN; "
        "/#/: every name",
        "//, *DOMAIN and an address without a domain are refused; other types get NODATA and are not forwarded",
    ),
    option(
        "--host-record=NAME[,..][,IPv4][,IPv6][,TTL]",
        readers.read_host_record,
        "addresses of names, and the reverse of the first name",
        "a second address of a family, and a record without name or address, are refused",
    ),
    option("--cname=ALIAS[,..],TARGET[,TTL]", readers.read_cname, "aliases of a name", "*.DOMAIN is refused"),
    option(
        "--interface-name=NAME,INTERFACE[/4|/6]",
        readers.read_interface_name,
        "the addresses of an interface, as they change, and their reverse",
        "no address: NODATA; dnsmasq queries the upstream servers",
    ),
    option(
        "--dynamic-host=NAME,[IPv4],[IPv6],INTERFACE",
        readers.read_dynamic_host,
        "addresses in the networks of an interface, as they change, and their reverse; the host part is that of the "
        "given address",
        "a second address of a family is refused",
    ),
    option(
        "--synth-domain=DOMAIN,ADDRESS/PREFIX|FIRST[,LAST][,PREFIX[*]]",
        readers.read_synth_domain,
        "names for a range of addresses, and their reverse: PREFIX192-0-2-7.DOMAIN, PREFIXfd00--7.DOMAIN; with *, "
        "numbers: PREFIX0.DOMAIN",
        "a prefix with a dot or outside ASCII is refused; IPv6 ranges may be numbered",
    ),
    option(
        "-y --localise-queries",
        readers.on("localise_queries"),
        "if a name of a hosts file, a host record or an interface has several IPv4 addresses, return those in the "
        "network of the address that was asked, if there are any",
    ),
    option(
        "-Y --txt-record=NAME[,TEXT..]",
        readers.read_txt,
        "a TXT record; each text is one string, or several if longer than 255",
    ),
    option(
        "-W --srv-host=_SERVICE._PROTO[.DOMAIN][,TARGET[,PORT[,PRIORITY[,WEIGHT]]]]",
        readers.read_srv,
        "an SRV record; without DOMAIN in --domain; without TARGET the service is not available",
    ),
    option(
        "-m --mx-host=NAME[,TARGET[,PREFERENCE]]",
        readers.read_mx,
        "an MX record; without TARGET it is that of --mx-target",
        "an empty TARGET is refused",
    ),
    option(
        "-t --mx-target=NAME",
        readers.read_mx_target,
        "the target of --mx-host without TARGET and of --localmx (this host); without --mx-host and --srv-host also an "
        "MX record of this host",
        once=True,
    ),
    option("-L --localmx", readers.read_localmx, "an MX record, with --mx-target, for each name with an address"),
    option("-e --selfmx", readers.on("self_mx"), "an MX record to itself for each name with an address"),
    option(
        "--naptr-record=NAME,ORDER,PREFERENCE,FLAGS,SERVICE,REGEXP[,REPLACEMENT]", readers.read_naptr, "a NAPTR record"
    ),
    option(
        "--caa-record=NAME,FLAGS,TAG,VALUE",
        readers.read_caa,
        "a CAA record",
        "a VALUE with commas must be quoted in a file",
    ),
    option(
        "--dns-rr=NAME,TYPE[,HEX]",
        readers.read_dns_rr,
        "a record of another type, by its number, with its data in hexadecimal digits",
        "A, AAAA, CNAME and types of queries are refused",
    ),
    option("--ptr-record=NAME,TARGET", readers.read_ptr, "a PTR record", "TARGET is required"),
    option("-T --local-ttl=SECONDS", readers.one("local_ttl", values.seconds), "TTL of local names (0)", once=True),
    # upstream servers
    option("-R --no-resolv", readers.on("resolv", False), "do not read a resolv file: use only --server"),
    option(
        "-r --resolv-file=FILE",
        readers.each("resolv_files", values.file_path),
        "read upstream servers from this file instead of /etc/resolv.conf; may be repeated",
        "the value is required",
    ),
    option("-n --no-poll", readers.on("poll", False), "do not watch the resolv file; SIGHUP reads it again"),
    option(
        "--servers-file=FILE",
        readers.one("servers_file", values.file_path),
        "also read server and rev-server options from this file, and again when it changes",
        "changes take effect without SIGHUP",
        once=True,
    ),
    option(
        "-S --server=[/DOMAIN/[..]][ADDRESS[%IF][#PORT][@INTERFACE][@SOURCE]|#]",
        readers.read_server,
        "an upstream server, for all names or for these domains; #: the default servers; nothing: the domain is local; "
        "//: names without a dot",
        "refused: server names, *DOMAIN, a source port, and more than one of servers, # and nothing for a domain",
    ),
    option(
        "--rev-server=ADDRESS[/PREFIX][,SERVER]",
        readers.read_rev_server,
        "an upstream server, as with --server, for the reverse names of a network",
        "refused: server names",
    ),
    option(
        "--local=/DOMAIN/[..][ADDRESS|#]",
        readers.read_local,
        "the same as --server; usually without an address",
        "a domain is required",
    ),
    option(
        "-o --strict-order",
        readers.on("strict_order"),
        "query the servers of a domain in their order, not first the one that responded last",
        "the next one also if one is silent for 0.8 seconds; dnsmasq waits until the client repeats its query",
    ),
    option(
        "--all-servers", readers.on("all_servers"), "query all servers of a domain at the same time; the first wins"
    ),
    option(
        "--dns-loop-detect",
        readers.on("loop_detect"),
        "do not use servers that send queries back to this responder, until the servers change",
        "at most 64 servers are tested",
    ),
    option(
        "-Q --query-port=PORT",
        readers.read_query_port,
        "query upstream servers from this UDP port, not from random ones; 0: from a port that the kernel chooses once",
        "0: one port per server, not for all; also used with @SOURCE; makes responses easier to forge "
        "(docs/security.md)",
        once=True,
    ),
    option(
        "--min-port=PORT",
        readers.read_min_port,
        "query upstream servers from random UDP ports that are not lower (1024 with --max-port; without both, the "
        "kernel's range)",
        "several servers share the ports of a range of fewer than 2048",
        once=True,
    ),
    option(
        "--max-port=PORT",
        readers.read_max_port,
        "query upstream servers from random UDP ports that are not higher (65535 with --min-port)",
        once=True,
    ),
    option(
        "--do-0x20-encode",
        readers.on("mixes_case"),
        "give the letters of a query a random case; a response must have the same, which makes it harder to forge",
        "a response in another case is fetched over TCP; queries over TCP keep the case of their query over UDP",
    ),
    option("--no-0x20-encode", readers.on("mixes_case", False), "no random case, the default; the last of both wins"),
    option(
        "--port-limit=N",
        readers.checked(values.port_limit),
        "no effect: each query to a server, also a repeated one, has its own random port, or one of 128 open ones",
        once=True,
    ),
    option(
        "--fast-dns-retry[=INITIAL[,TOTAL]]",
        readers.one("retry_milliseconds", values.retry_milliseconds),
        "repeat a query without a response after INITIAL milliseconds (1000), then after twice as long each time, for "
        "TOTAL milliseconds (10000); without this option, after 800 each time, for 4800",
        "each time to the next server, at most 8 times; after TOTAL the client gets SERVFAIL; more than 60000, and "
        "TOTAL below INITIAL, are refused",
        once=True,
    ),
    option(
        "--upstream-tcp",
        readers.on("upstream_tcp"),
        "query upstream servers over TCP only; connections stay open for 10 seconds without queries",
        "only udpwatch has this option",
    ),
    option(
        "-0 --dns-forward-max=N",
        readers.one("forward_max", values.whole(1, 65535)),
        "maximum number of queries in flight to the servers of one domain (1000); to all servers, four times as many",
        "dnsmasq's default is 150",
        once=True,
    ),
    option(
        "--max-tcp-connections=N",
        readers.one("max_tcp_connections", values.whole(1, 10_000)),
        "maximum number of TCP connections of clients (512)",
        "dnsmasq's default is 20; at the limit the idlest connection of the client with the most is closed; dnsmasq "
        "lets new ones wait; more than 10000 is refused",
        once=True,
    ),
    option(
        "-P --edns-packet-max=OCTETS",
        readers.one("edns_packet_max", values.whole(512, 65535)),
        "maximum size of a response over UDP (1232)",
        "less than 512 is refused",
        once=True,
    ),
    option(
        "-D --domain-needed", readers.on("domain_needed"), "do not forward A and AAAA queries for names without a dot"
    ),
    option(
        "-b --bogus-priv",
        readers.on("bogus_priv"),
        "do not forward reverse lookups of private addresses, except to a --server for their domain",
        "applies to every type, not only PTR and ANY, and to names below an address (b._dns-sd._udp.); not to parts of "
        "an address",
    ),
    option(
        "-f --filterwin2k",
        readers.on("filter_windows"),
        "do not forward SOA and SRV queries, nor ANY queries for names with an underscore: they get NODATA",
    ),
    option(
        "--stop-dns-rebind",
        readers.on("stop_dns_rebind"),
        "reject private addresses in upstream responses",
        "the response is REFUSED; dnsmasq's is empty",
    ),
    option(
        "--rebind-localhost-ok",
        readers.on("rebind_localhost_ok"),
        "with --stop-dns-rebind: allow 127.0.0.0/8, 0.0.0.0/8, ::1 and ::",
    ),
    option(
        "--rebind-domain-ok=[/]DOMAIN[/..]",
        readers.read_rebind_domain_ok,
        "with --stop-dns-rebind: allow these domains",
    ),
    option(
        "-B --bogus-nxdomain=ADDRESS[/PREFIX]",
        readers.each("bogus_addresses", values.network),
        "turn upstream responses with this address into NXDOMAIN; may be repeated",
    ),
    option(
        "--ignore-address=ADDRESS[/PREFIX]",
        readers.each("ignored_addresses", values.network),
        "ignore upstream responses with this address and wait for another; may be repeated",
        "they count as mismatched: the 20th leads to TCP",
    ),
    option(
        "-V --alias=OLD|FIRST-LAST,NEW[,MASK]",
        readers.read_alias,
        "rewrite IPv4 addresses in upstream responses: those bits of OLD that MASK has (all) become those of NEW",
    ),
    option(
        "--filter-A",
        readers.filter_types(1),
        "remove A records from upstream responses",
        "what follows them in the response is removed, too; the same for --filter-AAAA and --filter-rr",
    ),
    option("--filter-AAAA", readers.filter_types(28), "remove AAAA records from upstream responses"),
    option(
        "--filter-rr=TYPE[,..]",
        readers.several("filtered_types", values.record_type),
        "remove records of these types from upstream responses",
        "ANY is refused",
    ),
    option(
        "--proxy-dnssec",
        readers.on("proxy_dnssec"),
        "pass the AD flag of upstream servers on, to clients that set AD or DO; trust the servers and the network to "
        "them",
        "AD is cached with its response; queries to upstream servers have AD set",
    ),
    # who asks
    option(
        "--add-subnet[=[[IPv4/]PREFIX][,[IPv6/]PREFIX]]",
        readers.one("subnets", values.client_subnets),
        "tell upstream servers the subnet of IPv4 and of IPv6 clients, or a given one (EDNS Client Subnet); 0, the "
        "default: ask them not to pass any on. If it depends on the client, no response is cached (docs/dns.md)",
        "a prefix longer than the address is refused; a client's own subnet is always replaced, as by --strip-subnet; "
        "dnsmasq still caches responses to clients of the family whose subnet is constant",
        once=True,
    ),
    option(
        "--add-mac[=base64|text]",
        readers.each("mac_formats", values.mac_format),
        "tell upstream servers the MAC address of each client in a network of this host, as octets, in Base64 or as "
        "text; no response is cached",
        "the kernel's table is followed, not read for a query: the first query of a new neighbour may be without; "
        "dnsmasq still caches responses to clients without a MAC address",
    ),
    option("--strip-mac", readers.accept_noop, "no effect: EDNS options of clients are never passed on"),
    option(
        "--add-cpe-id=TEXT",
        readers.one("cpe_id", values.cpe_id),
        "tell upstream servers this text, which identifies this network",
        "an empty text, and more than 255 octets, are refused",
        once=True,
    ),
    option(
        "--umbrella[=[deviceid:HEX][,orgid:N][,assetid:N]]",
        readers.one("umbrella", values.umbrella),
        "tell upstream servers the address of each client, and these ids, for Cisco Umbrella; no response is cached",
        once=True,
    ),
    option("--strip-subnet", readers.accept_noop, "no effect: EDNS options of clients are never passed on"),
    # cache
    option(
        "-c --cache-size=N",
        readers.one("cache_size", values.whole(0, values.MAX_CACHE_SIZE)),
        "maximum number of cached responses (10000); 0: no cache",
        "dnsmasq's default is 150; responses of every type are cached",
        once=True,
    ),
    option(
        "--cache-rr=TYPE[,..]",
        readers.checked(values.cached_type),
        "no effect: responses of every type are cached",
    ),
    option("-N --no-negcache", readers.on("negcache", False), "do not cache negative responses"),
    option(
        "--neg-ttl=SECONDS",
        readers.one("neg_ttl", values.seconds),
        "cache negative responses without SOA for this long (0: not at all)",
        once=True,
    ),
    option(
        "--max-ttl=SECONDS",
        readers.one("max_ttl", values.seconds),
        "maximum TTL that clients see (0: no limit)",
        once=True,
    ),
    option(
        "--clear-on-reload",
        readers.on("clear_on_reload"),
        "clear the cache when a resolv file is read again",
    ),
    option(
        "--min-cache-ttl=SECONDS",
        readers.one("min_cache_ttl", values.whole(0, 3600)),
        "raise smaller TTLs to this one, at most 3600 (0)",
        "the first response has it, too; more is refused",
        once=True,
    ),
    option(
        "--max-cache-ttl=SECONDS",
        readers.one("max_cache_ttl", values.seconds),
        "lower larger TTLs to this one (0: no limit)",
        "the first response has it, too; at most 86400 even without this option",
        once=True,
    ),
    option(
        "--use-stale-cache[=SECONDS|off]",
        readers.one("stale_seconds", values.stale_seconds),
        "serve expired responses for this long while every upstream server is down (86400; 0: no limit)",
        "on by default, but only during outages; only udpwatch has off",
        once=True,
    ),
    option(
        "--no-round-robin",
        readers.accept_noop,
        "no effect: records always keep their order",
        "without this option dnsmasq rotates them",
    ),
    # logging and metrics
    option(
        "-q --log-queries[=extra]",
        readers.read_log_queries,
        "log queries and responses; extra: with serial number and client",
    ),
    option(
        "-8 --log-facility=-|FILE|FACILITY",
        readers.one("log_facility", values.log_facility),
        "log to stderr (-), to a file, whose path has a slash and which SIGUSR2 opens again, or to syslog",
        "the default is -; the program's name is udpwatch",
        once=True,
    ),
    option(
        "--log-async[=N]",
        readers.checked(values.log_queue),
        "no effect: the log is always asynchronous, with a queue of 10,000 lines",
        once=True,
    ),
    option("--log-debug", readers.on("log_debug"), "also log what helps to debug"),
    option("--no-ident", readers.on("ident", False), "do not answer CHAOS names below bind."),
    option(
        "--metrics-listen=HOST:PORT|off",
        readers.one("metrics_listen", values.metrics_listen),
        "serve Prometheus metrics at /metrics on this address (127.0.0.1:9953)",
        "only udpwatch has this option",
        once=True,
    ),
    # process
    option(
        "-u --user=NAME",
        readers.one("user", values.user_name),
        "if started as root, change to this user (nobody) and keep only CAP_NET_BIND_SERVICE; before "
        "Linux 5.7 with --server=..@INTERFACE also CAP_NET_RAW",
        "root means uid 0 without other capabilities; the user's supplementary groups are kept",
        once=True,
    ),
    option(
        "-g --group[=NAME]",
        readers.one("group", values.optional_group_name),
        "if started as root, change to this group (the user's)",
        "the user's supplementary groups are kept; dnsmasq's default is dip",
        once=True,
    ),
    option(
        "-x --pid-file[=FILE]",
        readers.one("pid_file", values.optional_path),
        "write the process id to this file before changing user, and remove it at the end if allowed; nothing: none",
        "no file is written by default",
        once=True,
    ),
    option(
        "-C --conf-file=FILE",
        readers.read_conf_file,
        "also read options from this file; may be repeated",
        "no file is read by default, not even /etc/dnsmasq.conf; - is refused",
    ),
    option(
        "-7 --conf-dir=FOLDER[,SUFFIX|*SUFFIX..]",
        readers.read_conf_dir,
        "read options from a folder's files, except those that end in SUFFIX; with *SUFFIX, only those",
    ),
    option("-k --keep-in-foreground", readers.on("foreground"), _FOREGROUND),
    option("-d --no-daemon", readers.on("foreground"), _FOREGROUND, "no debug mode"),
    option("--test", readers.test_only, "read and check everything, then exit", command_line_only=True),
    option("-v --version", _version, "show the version", command_line_only=True),
    option("-w --help", _help, "show this help", "`--help dhcp` is not supported", command_line_only=True),
)

_ACCEPTED = (*OPTIONS, *(row for rows in IDLE.values() for row in rows))
BY_NAME = {row.name: row for row in _ACCEPTED}
BY_SHORT = {row.short: row for row in _ACCEPTED if row.short}


def usage() -> str:
    """Return the text of --help."""
    rows = [
        "Usage: udpwatch dns [options]",
        "",
        "The options are those of dnsmasq, except --metrics-listen and --upstream-tcp:",
    ]
    for row in OPTIONS:
        rows.append(f"{f'-{row.short}, ' if row.short else '':4}{row.flag}")
        rows.append(f"        {row.help}")
    return "\n".join([*rows, "", f"Differences from dnsmasq: {DOCUMENT}"])
