"""dnsmasq's options that do nothing here, and those that are refused: including those that its --help does not show and
those added after 2.90.

One word each: the name, the format of the value ("": none; "[=]": optional), and after a colon the short option.
"""

from __future__ import annotations

import re

from udpwatch.dns import option_readers as readers
from udpwatch.dns.option import Option


def _idle(words: str) -> tuple[Option, ...]:
    """Create the rows of options that are accepted and do nothing."""
    rows = []
    for word in words.split():
        name, value, short = re.fullmatch(r"([\w-]+)(=|\[=])?(?::(\w))?", word).groups("")  # type: ignore[union-attr]
        rows.append(Option(name, short, {"=": "VALUE", "[=]": "[=VALUE]"}.get(value, ""), readers.accept_noop, ""))
    return tuple(rows)


#: Options that do nothing in dnsmasq without another one, by the name of that one. udpwatch refuses the other one, and
#: accepts these.
IDLE = {
    "dhcp-range": _idle("""
        bootp-dynamic[=]:3 bridge-interface= dhcp-alternate-port[=] dhcp-authoritative:K dhcp-boot=:M dhcp-broadcast[=]
        dhcp-circuitid= dhcp-client-update dhcp-duid= dhcp-fqdn dhcp-generate-names[=] dhcp-host=:G dhcp-hostsdir=
        dhcp-hostsfile= dhcp-ignore=:J dhcp-ignore-clid dhcp-ignore-names[=] dhcp-lease= dhcp-lease-max=:X
        dhcp-leasefile[=]:l dhcp-mac=:4 dhcp-match= dhcp-name-match= dhcp-no-override dhcp-option=:O dhcp-option-force=
        dhcp-option-pxe= dhcp-optsdir= dhcp-optsfile= dhcp-proxy[=] dhcp-pxe-vendor= dhcp-rapid-commit dhcp-remoteid=
        dhcp-reply-delay= dhcp-script=:6 dhcp-scriptuser= dhcp-sequential-ip dhcp-subscrid= dhcp-ttl= dhcp-userclass=:j
        dhcp-vendorclass=:U leasefile-ro:9 leasequery[=] log-dhcp no-dhcp-interface=:2 no-dhcpv4-interface=
        no-dhcpv6-interface= no-ping:5 pxe-prompt= pxe-service= quiet-dhcp quiet-dhcp6 quiet-ra ra-param= read-ethers:Z
        script-on-renewal shared-network= tag-if=
    """),
    "enable-tftp": _idle("""
        quiet-tftp tftp-lowercase tftp-max= tftp-mtu= tftp-no-blocksize tftp-no-fail tftp-port-range= tftp-root=
        tftp-secure tftp-single-port tftp-unique-root[=]
    """),
    "dnssec": _idle("""
        dnssec-check-unsigned[=] dnssec-debug dnssec-limits= dnssec-no-timecheck dnssec-timestamp= trust-anchor=
    """),
}
#: Options that turn on what udpwatch does not have, and why they are refused.
MISSING = {
    "dhcp-range:F dhcp-relay dhcp-split-relay": "udpwatch has no DHCP; run dnsmasq with --port=0 for DHCP",
    "enable-tftp": "udpwatch has no TFTP; run dnsmasq with --port=0 for TFTP",
    "enable-ra": "udpwatch sends no router advertisements; run radvd, or dnsmasq with --port=0",
    "dnssec": "udpwatch does not validate DNSSEC; use an upstream server that does, and --proxy-dnssec",
    "auth-peer auth-sec-servers auth-server auth-soa auth-ttl auth-zone": (
        "udpwatch has no authoritative mode; for names of this node use --host-record and --local, for a zone a server "
        "such as NSD"
    ),
    "enable-dbus:1": (
        "udpwatch has no D-Bus interface; write changing servers to a --resolv-file, which is watched (NetworkManager "
        "writes /run/NetworkManager/no-stub-resolv.conf; see docs/dns.md)"
    ),
    "enable-ubus": "udpwatch has no ubus interface; read its metrics (--metrics-listen)",
    "dhcp-luascript script-arp conf-script": "udpwatch runs no scripts",
    "ipset nftset": (
        "udpwatch fills no address sets; let a dnsmasq do so, and forward these domains to it with "
        "--server=/DOMAIN/ADDRESS#PORT"
    ),
    "conntrack connmark-allowlist connmark-allowlist-enable": (
        "udpwatch neither copies conntrack marks nor filters by them; mark or filter queries in nftables"
    ),
    "dumpfile dumpmask": "udpwatch writes no packets; run tcpdump -w FILE port 53",
}
_missing = [(word.partition(":"), why) for words, why in MISSING.items() for word in words.split()]
REFUSED = {name: short for (name, _, short), _ in _missing}
REASONS = {name: why for (name, _, _), why in _missing}
REFUSED_SHORT = {short: name for name, short in REFUSED.items() if short}
