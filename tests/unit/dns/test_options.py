"""Options of `udpwatch dns`, compared with those of dnsmasq itself."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from option_docs import markdown, markdown_idle, markdown_refused

from udpwatch.dns import options, values
from udpwatch.dns.errors import ConfigError, DnsError, FileError
from udpwatch.dns.message import Type
from udpwatch.dns.names import name_from_text, pack_address
from udpwatch.dns.option import Option
from udpwatch.dns.option_table import OPTIONS, usage
from udpwatch.dns.options import Information, parse, read_conf
from udpwatch.dns.other_options import IDLE, REASONS, REFUSED
from udpwatch.dns.settings import (
    Alias,
    DomainAddress,
    DomainServers,
    HostRecord,
    InterfaceName,
    Ports,
    Server,
    Settings,
    StaticRecord,
    Subnet,
    SynthDomain,
    Umbrella,
)

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / options.DOCUMENT
BY_NAME = {option.name: option for option in OPTIONS}
IDLE_OPTIONS = [option for rows in IDLE.values() for option in rows]
LATER = {"dhcp-option-pxe", "dhcp-split-relay", "do-0x20-encode", "leasequery", "no-0x20-encode"}  # than dnsmasq 2.90
A, B, C = (name_from_text(text) for text in ("a.example", "b.example", "c.example"))
needs_dnsmasq = pytest.mark.skipif(not shutil.which("dnsmasq"), reason="needs dnsmasq: install dnsmasq-base")


def settings(*words: str) -> Settings:
    result = parse(words)
    assert isinstance(result, Settings)
    return result


def rejected(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def dnsmasq_test(*words: str) -> str:
    """dnsmasq's error for these arguments; "" if it accepts them. Without -C it would read its own file."""
    done = subprocess.run(["dnsmasq", "--test", *words], capture_output=True, text=True, timeout=30, check=False)
    return "" if done.returncode == 0 else done.stderr.strip()


def record(kind: Type, data: bytes, name: bytes = A, ttl: int | None = None) -> dict[str, Any]:
    return {"records": (StaticRecord(name, kind, data, ttl),)}


def servers(*given: Server, domain: bytes = A, standard: bool = False) -> dict[str, Any]:
    return {"domain_servers": (DomainServers(domain, given, standard),)}


def at(*addresses: str | None, domain: bytes = A) -> dict[str, Any]:
    return {"addresses": tuple(DomainAddress(domain, address) for address in addresses)}


def synth(first: str, last: str, prefix: str = "", numbered: bool = False) -> dict[str, Any]:
    return {"synth_domains": (SynthDomain(A, pack_address(first), pack_address(last), prefix, numbered),)}


HOST = name_from_text(socket.gethostname().lower())
NS, NS6 = Server("192.0.2.1"), Server("2001:db8::1")

#: An option with its value, and the fields of Settings that it changes. dnsmasq accepts each, except OURS.
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("--port=5353", {"port": 5353}),
    ("--listen-address=192.0.2.1", {"listen_addresses": ("192.0.2.1",), "local_service": False}),
    (
        "--listen-address=192.0.2.1, 2001:DB8:0::1,192.0.2.1",
        {"listen_addresses": ("192.0.2.1", "2001:db8::1"), "local_service": False},
    ),
    ("--interface=eth0,veth*", {"interfaces": ("eth0", "veth*"), "local_service": False}),
    ("--interface=*", {"interfaces": ("*",), "local_service": False}),
    ("--except-interface=docker0", {"except_interfaces": ("docker0",), "local_service": False}),
    ("--bind-dynamic", {"bind_dynamic": True}),
    ("--bind-interfaces", {"bind_interfaces": True}),
    ("--local-service", {}),
    ("--local-service=net", {}),
    ("--local-service=host", {"local_service": False, "interfaces": ("lo",), "bind_interfaces": True}),
    ("--no-hosts", {"hosts": False}),
    ("--addn-hosts=/a b/hosts", {"addn_hosts": (Path("/a b/hosts"),)}),
    ("--hostsdir=/hosts.d", {"addn_hosts": (Path("/hosts.d"),)}),
    ("--expand-hosts", {"expand_hosts": True}),
    ("--domain=A.Example.", {"domain": A}),
    ("--domain=Caf\u00e9.example", {"domain": name_from_text("xn--caf-dma.example")}),
    ("--domain-suffix=a.example", {"domain": A}),
    ("--address=/a.example/192.0.2.1", at("192.0.2.1")),
    ("--address=/.a.example/192.0.2.1", at("192.0.2.1")),
    ("--address=/a.example/2001:db8::1", at("2001:db8::1")),
    ("--address=/a.example/", at(None)),
    ("--address=/a.example/#", at("0.0.0.0", "::")),
    ("--address=/#/192.0.2.1", at("192.0.2.1", domain=b"\0")),
    (
        "--address=/a.example/b.example/192.0.2.1",
        {"addresses": (DomainAddress(A, "192.0.2.1"), DomainAddress(B, "192.0.2.1"))},
    ),
    ("--host-record=a.example,192.0.2.1", {"host_records": (HostRecord((A,), ("192.0.2.1",)),)}),
    (
        "--host-record=a.example, b.example, 2001:db8::1, 192.0.2.1, 60",
        {"host_records": (HostRecord((A, B), ("2001:db8::1", "192.0.2.1"), 60),)},
    ),
    ("--interface-name=A.example,eth0", {"interface_names": (InterfaceName(A, "eth0"),)}),
    ("--interface-name=a.example, eth0:1/4", {"interface_names": (InterfaceName(A, "eth0:1", ipv6=None),)}),
    ("--interface-name=a.example,eth0/6", {"interface_names": (InterfaceName(A, "eth0", ipv4=None),)}),
    ("--dynamic-host=a.example,0.0.0.8,eth0", {"interface_names": (InterfaceName(A, "eth0", "0.0.0.8", None),)}),
    (
        "--dynamic-host=a.example,::0:8, 0.0.0.8,eth0",
        {"interface_names": (InterfaceName(A, "eth0", "0.0.0.8", "::8"),)},
    ),
    ("--localise-queries", {"localise_queries": True}),
    ("--synth-domain=A.example,192.0.2.7/24", synth("192.0.2.0", "192.0.2.255")),
    ("--synth-domain=a.example,192.0.2.7", synth("192.0.2.7", "192.0.2.7")),
    ("--synth-domain=a.example, 192.0.2.7, 192.0.2.9, host-*", synth("192.0.2.7", "192.0.2.9", "host-", True)),
    ("--synth-domain=a.example,2001:db8::/112,*", synth("2001:db8::", "2001:db8::ffff", "", True)),
    ("--synth-domain=a.example,2001:db8::/32,p_", synth("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "p_")),
    ("--cname=a.example,b.example", record(Type.CNAME, B)),
    ("--cname=a.example,b.example,60", record(Type.CNAME, B, ttl=60)),
    (
        "--cname=a.example,c.example,b.example",
        {"records": (StaticRecord(A, Type.CNAME, B), StaticRecord(C, Type.CNAME, B))},
    ),
    ("--txt-record=a.example", record(Type.TXT, b"\0")),
    ("--txt-record=a.example,", record(Type.TXT, b"\0")),
    ("--txt-record=a.example, v=spf1 a -all", record(Type.TXT, b"\x0dv=spf1 a -all")),
    ("--txt-record=a.example,x,, y", record(Type.TXT, b"\1x\0\2 y")),
    ("--txt-record=a.example,\u00e9", record(Type.TXT, b"\2\xc3\xa9")),
    ("--txt-record=a.example," + "x" * 256, record(Type.TXT, b"\xff" + b"x" * 255 + b"\1x")),
    ("--txt-record=My Printer._ipp._tcp.local,x", record(Type.TXT, b"\1x", b"\x0amy printer\4_ipp\4_tcp\5local\0")),
    ("--srv-host=a.example,b.example,80,1,2", record(Type.SRV, b"\0\1\0\2\0\x50" + B)),
    ("--srv-host=a.example,b.example,80,1", record(Type.SRV, b"\0\1\0\0\0\x50" + B)),
    ("--srv-host=a.example,b.example,80", record(Type.SRV, b"\0\0\0\0\0\x50" + B)),
    ("--srv-host=a.example,b.example", record(Type.SRV, b"\0\0\0\0\0\1" + B)),
    ("--srv-host=a.example", record(Type.SRV, b"\0\0\0\0\0\1\0")),
    ("--srv-host=a.example,,80", record(Type.SRV, b"\0\0\0\0\0\x50\0")),
    ("--mx-host=a.example,b.example", record(Type.MX, b"\0\1" + B)),
    ("--mx-host=a.example,b.example,50", record(Type.MX, b"\0\x32" + B)),
    ("--mx-host=a.example", record(Type.MX, b"\0\1" + HOST)),
    ("--mx-target=a.example", record(Type.MX, b"\0\0" + A, HOST)),
    ("--localmx", record(Type.MX, b"\0\0" + HOST, HOST) | {"local_mx": HOST}),
    ("--selfmx", {"self_mx": True}),
    ("--caa-record=a.example,128,issue,ca.example", record(Type.CAA, b"\x80\5issueca.example")),
    ("--caa-record=a.example,0,issuewild,", record(Type.CAA, b"\0\x09issuewild")),
    (
        "--naptr-record=a.example,10,20,u,E2U+sip,!^.*$!sip:x@y!",
        record(Type.NAPTR, b"\0\x0a\0\x14\1u\7E2U+sip\x0e!^.*$!sip:x@y!\0"),
    ),
    (
        "--naptr-record=a.example,10,20,s,SIP+D2U,,b.example",
        record(Type.NAPTR, b"\0\x0a\0\x14\1s\7SIP+D2U\0" + B),
    ),
    ("--naptr-record=a.example,1,2,,,,.", record(Type.NAPTR, b"\0\1\0\2\0\0\0\0")),
    ("--dns-rr=a.example,65280", {"records": (StaticRecord(A, 65280, b""),)}),
    ("--dns-rr=a.example,51,01:23:45", {"records": (StaticRecord(A, 51, b"\x01\x23\x45"),)}),
    ("--dns-rr=a.example,51,01 2345aF", {"records": (StaticRecord(A, 51, b"\x01\x23\x45\xaf"),)}),
    ("--ptr-record=a.example,b.example", record(Type.PTR, B)),
    ("--local-ttl=60", {"local_ttl": 60}),
    ("--no-resolv", {"resolv": False}),
    ("--resolv-file=/run/resolv.conf", {"resolv_files": (Path("/run/resolv.conf"),)}),
    ("--no-poll", {"poll": False}),
    ("--server=192.0.2.1", {"servers": (NS,)}),
    ("--server=192.0.2.1#5353", {"servers": (replace(NS, port=5353),)}),
    ("--server=192.0.2.1@192.0.2.9", {"servers": (replace(NS, source="192.0.2.9"),)}),
    ("--server=192.0.2.1#53@eth0", {"servers": (replace(NS, interface="eth0"),)}),
    ("--server=192.0.2.1@eth0@192.0.2.9", {"servers": (replace(NS, source="192.0.2.9", interface="eth0"),)}),
    ("--server=2001:DB8::1#5353", {"servers": (replace(NS6, port=5353),)}),
    ("--server=2001:db8::1@2001:db8::9", {"servers": (replace(NS6, source="2001:db8::9"),)}),
    ("--server=fe80::1%lo#5353", {"servers": (Server("fe80::1%lo", 5353),)}),
    ("--server=fe80::1@lo", {"servers": (Server("fe80::1%lo", interface="lo"),)}),
    ("--server=/#/192.0.2.1", {"servers": (NS,)}),
    ("--server=/a.example/192.0.2.1#54", servers(replace(NS, port=54))),
    ("--server=/a.example/#", servers(standard=True)),
    ("--server=/a.example/", servers()),
    ("--server=//192.0.2.1", servers(NS, domain=b"")),
    ("--server=//", servers(domain=b"")),
    (
        "--server=/a.example/b.example/192.0.2.1",
        {"domain_servers": (DomainServers(A, (NS,)), DomainServers(B, (NS,)))},
    ),
    ("--local=/a.example/", servers()),
    ("--local=//", servers(domain=b"")),
    ("--local=/a.example/192.0.2.1", servers(NS)),
    ("--rev-server=192.168.1.0/24,192.0.2.1", servers(NS, domain=name_from_text("1.168.192.in-addr.arpa"))),
    ("--rev-server=192.168.1.7/24", servers(domain=name_from_text("1.168.192.in-addr.arpa"))),
    ("--rev-server=192.168.1.7/16,#", servers(domain=name_from_text("168.192.in-addr.arpa"), standard=True)),
    (
        "--rev-server=192.0.2.7,192.0.2.1#54",
        servers(replace(NS, port=54), domain=name_from_text("7.2.0.192.in-addr.arpa")),
    ),
    (
        "--rev-server=10.20.0.0/15,192.0.2.1",
        {"domain_servers": tuple(DomainServers(name_from_text(f"{n}.10.in-addr.arpa"), (NS,)) for n in (20, 21))},
    ),
    ("--rev-server=2001:db8::/32,192.0.2.1", servers(NS, domain=name_from_text("8.b.d.0.1.0.0.2.ip6.arpa"))),
    (
        "--rev-server=fd00::/7,192.0.2.1",
        {"domain_servers": tuple(DomainServers(name_from_text(f"{n}.f.ip6.arpa"), (NS,)) for n in "cd")},
    ),
    ("--bogus-nxdomain=64.94.110.11", {"bogus_addresses": (ip_network("64.94.110.11"),)}),
    ("--bogus-nxdomain=2001:db8::1/32", {"bogus_addresses": (ip_network("2001:db8::/32"),)}),
    ("--ignore-address=192.0.2.9/24", {"ignored_addresses": (ip_network("192.0.2.0/24"),)}),
    ("--alias=0.0.1.2,0.0.3.4", {"aliases": (Alias(0x102, 0x102, 0x304, 0xFFFFFFFF, 0xFFFFFFFF),)}),
    ("--alias=0.0.1.2, 0.0.3.4, 255.255.255.0", {"aliases": (Alias(0x100, 0x100, 0x304, 0xFFFFFF00, 0xFFFFFF00),)}),
    (
        "--alias=0.0.1.2-0.0.1.9,0.0.3.4,255.255.255.0",
        {"aliases": (Alias(0x102, 0x109, 0x304, 0xFFFFFF00, 0xFFFFFFFF),)},
    ),
    ("--filterwin2k", {"filter_windows": True}),
    ("--cache-rr=TXT,mx, 65", {}),
    ("--cache-rr=ANY", {}),
    ("--servers-file=/servers", {"servers_file": Path("/servers")}),
    ("--filter-A", {"filtered_types": (1,)}),
    ("--filter-AAAA", {"filtered_types": (28,)}),
    ("--filter-rr=TXT,mx, 65", {"filtered_types": (16, 15, 65)}),
    ("--clear-on-reload", {"clear_on_reload": True}),
    ("--min-cache-ttl=3600", {"min_cache_ttl": 3600}),
    ("--max-cache-ttl=60", {"max_cache_ttl": 60}),
    ("--strict-order", {"strict_order": True}),
    ("--all-servers", {"all_servers": True}),
    ("--dns-loop-detect", {"loop_detect": True}),
    ("--query-port=4444", {"ports": Ports(4444, 4444, single=True)}),
    *((word, {"ports": Ports(0, 0, single=True)}) for word in ("--query-port=0", "--query-port=")),
    ("--min-port=60000", {"ports": Ports(60000, 65535)}),
    ("--max-port=2000", {"ports": Ports(1024, 2000)}),
    ("--max-port=0", {}),
    ("--port-limit=64", {}),
    ("--upstream-tcp", {"upstream_tcp": True}),
    ("--fast-dns-retry", {"retry_milliseconds": (1000, 10_000)}),
    ("--fast-dns-retry=50", {"retry_milliseconds": (50, 10_000)}),
    ("--fast-dns-retry=500,60000", {"retry_milliseconds": (500, 60_000)}),
    ("--do-0x20-encode", {"mixes_case": True}),
    ("--no-0x20-encode", {}),
    ("--dns-forward-max=150", {"forward_max": 150}),
    ("--max-tcp-connections=20", {"max_tcp_connections": 20}),
    ("--edns-packet-max=4096", {"edns_packet_max": 4096}),
    ("--domain-needed", {"domain_needed": True}),
    ("--bogus-priv", {"bogus_priv": True}),
    ("--stop-dns-rebind", {"stop_dns_rebind": True}),
    ("--rebind-localhost-ok", {"rebind_localhost_ok": True}),
    ("--rebind-domain-ok=a.example", {"rebind_domains_ok": (A,)}),
    ("--rebind-domain-ok=/a.example/b.example/", {"rebind_domains_ok": (A, B)}),
    ("--proxy-dnssec", {"proxy_dnssec": True}),
    ("--add-subnet", {"subnets": (Subnet(), Subnet())}),
    ("--add-subnet=24", {"subnets": (Subnet(24), Subnet())}),
    ("--add-subnet=,64", {"subnets": (Subnet(), Subnet(64))}),
    ("--add-subnet=24, 64", {"subnets": (Subnet(24), Subnet(64))}),
    (
        "--add-subnet=192.0.2.1/32,192.0.2.1/",
        {"subnets": (Subnet(32, "192.0.2.1"), Subnet(0, "192.0.2.1"))},
    ),
    ("--add-subnet=2001:DB8::1/128", {"subnets": (Subnet(128, "2001:db8::1"), Subnet())}),
    ("--strip-subnet", {}),
    ("--add-mac", {"mac_formats": ("binary",)}),
    ("--add-mac=base64", {"mac_formats": ("base64",)}),
    ("--add-mac=text", {"mac_formats": ("text",)}),
    ("--strip-mac", {}),
    ("--umbrella", {"umbrella": Umbrella()}),
    (
        "--umbrella=orgid:4294967295,deviceid:0123456789abcdEF,assetid:7",
        {"umbrella": Umbrella(2**32 - 1, 7, bytes.fromhex("0123456789abcdef"))},
    ),
    ("--umbrella=assetid:1, orgid:0", {"umbrella": Umbrella(asset=1)}),
    ("--add-cpe-id=a, b", {"cpe_id": b"a, b"}),
    ("--add-cpe-id=" + "\u00e9" * 127, {"cpe_id": b"\xc3\xa9" * 127}),
    ("--cache-size=150", {"cache_size": 150}),
    ("--cache-size=0", {"cache_size": 0}),
    ("--no-negcache", {"negcache": False}),
    ("--neg-ttl=3600", {"neg_ttl": 3600}),
    ("--max-ttl=3600", {"max_ttl": 3600}),
    ("--use-stale-cache", {}),
    ("--use-stale-cache=60", {"stale_seconds": 60}),
    ("--use-stale-cache=0", {"stale_seconds": 2**31 - 1}),
    ("--use-stale-cache=off", {"stale_seconds": 0}),
    ("--no-round-robin", {}),
    ("--log-queries", {"log_queries": True}),
    ("--log-queries=extra", {"log_queries": True, "log_extra": True}),
    ("--no-ident", {"ident": False}),
    ("--metrics-listen=off", {"metrics_listen": "off"}),
    ("--metrics-listen=[::1]:0", {"metrics_listen": "[::1]:0"}),
    ("--log-facility=-", {}),
    ("--log-facility=/var/log/dns.log", {"log_facility": "/var/log/dns.log"}),
    ("--log-facility=./dns.log", {"log_facility": "./dns.log"}),
    ("--log-facility=LOCAL7", {"log_facility": "local7"}),
    *((f"--log-facility={name}", {"log_facility": name}) for name in values.FACILITIES),
    ("--log-async", {}),
    ("--log-async=0", {}),
    ("--log-async=100", {}),
    ("--log-debug", {"log_debug": True}),
    ("--pid-file=/run/d.pid", {"pid_file": Path("/run/d.pid")}),
    ("--pid-file", {}),
    ("--pid-file=", {}),
    ("--user=nobody", {"user": "nobody"}),
    ("--group=daemon", {"group": "daemon"}),
    ("--group", {}),
    ("--conf-file=/dev/null", {}),
    ("--conf-dir=/proc/self/task,*.conf", {}),
    ("--keep-in-foreground", {"foreground": True}),
    ("--no-daemon", {"foreground": True}),
]
#: Options that dnsmasq does not have.
OURS = ("--metrics-listen", "--upstream-tcp", "--use-stale-cache=off")
ONE_WORD = [word for word, _ in GOOD]

BAD = [
    "--servers-file=",
    *(f"--cache-rr={value}" for value in ("", "FOO", "TXT,", "0", "65536", "OPT", "AXFR")),
    *(
        f"--alias={value}"
        for value in ("", "192.0.2.1", "192.0.2.1,", "::1,::2", "192.0.2.1,192.0.2.2,8", "a,192.0.2.1")
    ),
    *(f"--alias={value}" for value in ("192.0.2.1-192.0.2.9,192.0.3.1", "192.0.2.9-192.0.2.1,192.0.3.0,255.255.255.0")),
    *(f"--alias={value}" for value in ("192.0.2.1,192.0.2.2,255.0.0.0,1", "192.0.2.1-,192.0.3.1")),
    *(f"--port={value}" for value in ("", "0", "65536", "-1", "x", "1.5", "\u0661", "1" * 5000)),
    *(f"--listen-address={value}" for value in ("", "192.0.2.1,", "192.0.2.256", "010.0.0.1", "host", "fe80::1%lo")),
    *(f"--interface={value}" for value in ("", "eth0,", "a/b", "eth0:1", "a b", "a*b", "x" * 16, "..", "a\nb")),
    "--except-interface=",
    *(f"--local-service={value}" for value in ("on", "host,net")),
    "--addn-hosts=",
    "--hostsdir=",
    *(f"--domain={value}" for value in ("", ".", "#", "a..b", "a.example,192.0.2.0/24", "i\u2665ny.com", "a\tb")),
    "--domain=" + "x" * 64,
    "--domain=" + ".".join(["x" * 63] * 4),
    *(f"--address={value}" for value in ("", "192.0.2.1", "//192.0.2.1", "/*a/192.0.2.1", "/a/b", "/a/::1%lo")),
    *(f"--host-record={value}" for value in ("", "a", "192.0.2.1", "a,b", "a,192.0.2.1,192.0.2.2", "a,192.0.2.1,1,2")),
    *(f"--host-record={value}" for value in ("a,192.0.2.1,99999999999", "a..b,192.0.2.1", "a,,192.0.2.1")),
    *(f"--interface-name={value}" for value in ("", "a.example", "a.example,", ",eth0", "a,eth0/5", "a,b c", "a,b,c")),
    *(
        f"--synth-domain={value}"
        for value in ("", "a", "a,", "a,b", ",192.0.2.7", "a,192.0.2.7/33", "a,192.0.2.7/24,b,c")
    ),
    *(f"--synth-domain=a,192.0.2.7,{value}" for value in ("b", "192.0.2.6", "::1", "192.0.2.8,b.c", "192.0.2.8,*b")),
    *(f"--synth-domain=a,192.0.2.7/24,{value}" for value in ("b c", "b" * 48, "b**", "\u2665")),
    *(
        f"--synth-domain={value}"
        for value in ("a,2001:db8::/63,b*", f"{'a.' * 96},192.0.2.7", "a,2001:db8::,2001:db9::,*")
    ),
    *(f"--dynamic-host={value}" for value in ("", "a", "a,eth0", "a,0.0.0.8", "a,0.0.0.8,", "a,0.0.0.8,0.0.0.9,eth0")),
    *(f"--dynamic-host={value}" for value in ("a,0.0.0.8,eth0/4", "a,b,eth0", ",::8,eth0", "a,fe80::1%lo,eth0")),
    *(f"--cname={value}" for value in ("", "a", "a,", "a,1,", "*.a,b", "a,b,a,c", "a,b,99999999999", "a..b,c")),
    *(f"--txt-record={value}" for value in ("", ",x", "a..b,x", "a," + "x," * 33000)),
    *(f"--srv-host={value}" for value in ("", "a,b,x", "a,b,1,x", "a,b,1,1,65536", "a,b,1,1,1,1", "a..b", "a,b..c")),
    *(f"--mx-host={value}" for value in ("", "a,", "a,b,x", "a,b,1,1")),
    *(f"--mx-target={value}" for value in ("", "a..b")),
    *(f"--caa-record={value}" for value in ("", "a", "a,0,issue", "a,256,issue,x", "a,0,a b,x", "a,0,,x", "a,0,b,x,y")),
    *(f"--caa-record=a,0,{tag},{text}" for tag, text in (("x" * 256, ""), ("x", "y" * 65536))),
    *(
        f"--naptr-record={value}"
        for value in ("", "a,1,2,s,x", "a,65536,2,s,x,y", "a,1,2,s,x,y,b..c", "a,1,2,s,x,y,b,c")
    ),
    f"--naptr-record=a,1,2,s,x,{'y' * 256}",
    *(f"--dns-rr={value}" for value in ("", "a", "a,TXT", "a,65536", "a,16,0", "a,16,zz", "a,16,00,00", "a,16,0:0")),
    *(f"--dns-rr=a,{kind},00" for kind in (0, 1, 5, 28, 41, 250, 255)),
    *(f"--ptr-record={value}" for value in ("", "a", "a,b,c", "a,")),
    *(f"--local-ttl={value}" for value in ("", "-1", "2147483648", "1h")),
    "--resolv-file=",
    *(
        f"--server={value}"
        for value in ("", "#", "/#/", "/#/#", "dns.example", "/a", "/*a/192.0.2.1", "/a../192.0.2.1")
    ),
    *(
        f"--server=192.0.2.1{value}"
        for value in ("#", "#0", "#65536", "#x", "#1#2", "%lo", "@", "@a/b", "@2001:db8::9")
    ),
    *(f"--server=192.0.2.1{value}" for value in ("@192.0.2.9#5353", "@192.0.2.9@eth0", "@eth0@eth1", "@eth0@")),
    *(
        f"--server={value}"
        for value in ("fe80::1", "fe80::1%", "fe80::1#53%lo", "2001:db8::1%lo", "192.0.2.1,192.0.2.2")
    ),
    *(f"--local={value}" for value in ("", "192.0.2.1", "a.example", "/#/")),
    *(
        f"--rev-server={value}"
        for value in ("", "x", "192.0.2.0/33,192.0.2.1", "0.0.0.0/0", "10.0.0.0/8,", "10.0.0.0/8,x")
    ),
    *(
        f"--{name}={value}"
        for name in ("bogus-nxdomain", "ignore-address")
        for value in ("", "x", "1.2.3.4/33", "1.2.3.4,")
    ),
    *(f"--filter-rr={value}" for value in ("", "TXT,", "x", "ANY", "OPT", "0", "255", "65536")),
    *(f"--min-cache-ttl={value}" for value in ("", "-1", "3601")),
    *(f"--max-cache-ttl={value}" for value in ("", "x")),
    *(f"--{name}={value}" for name in ("query-port", "min-port", "max-port") for value in ("65536", "-1", "x")),
    *(f"--fast-dns-retry={value}" for value in ("49", "x", "50,x", "500,499", "60001", "50,60001", "50,60,70", ",50")),
    *(f"--port-limit={value}" for value in ("", "0", "x")),
    *(f"--dns-forward-max={value}" for value in ("", "0", "x")),
    *(f"--max-tcp-connections={value}" for value in ("", "0", "10001", "x")),
    *(f"--edns-packet-max={value}" for value in ("", "511", "65536")),
    *(f"--rebind-domain-ok={value}" for value in ("", "/", "//", "/a//b/")),
    *(f"--add-subnet={value}" for value in ("33", "24,129", "24,64,1", "x", "-1", "192.0.2.1", "/24", "24,/64")),
    *(f"--add-subnet={value}" for value in ("192.0.2.1/33", "2001:db8::1/129", "fe80::1%lo/64", "dns.example/24")),
    *(f"--add-cpe-id={value}" for value in ("", "x" * 256, "\u00e9" * 128)),
    *(
        f"--umbrella={value}"
        for value in ("x", "orgid:", "orgid:4294967296", "orgid:-1", "assetid:1,", "orgid:1,orgid:2")
    ),
    *(f"--umbrella={value}" for value in ("deviceid:1", f"deviceid:{'g' * 16}", "xorgid:1", "orgid:99999999999")),
    *(f"--add-mac={value}" for value in ("x", "Text", "base64,text")),
    *(f"--cache-size={value}" for value in ("", "-1", "5000001")),
    *(f"--neg-ttl={value}" for value in ("", "x")),
    *(f"--max-ttl={value}" for value in ("", "x")),
    *(f"--use-stale-cache={value}" for value in ("on", "-1", "x1")),
    *(f"--log-queries={value}" for value in ("proto", "Extra")),
    *(f"--group={value}" for value in ("a:b", "a\nb", "\0")),
    *(f"--user={value}" for value in ("", "a:b", "a\nb", "\0")),
    *(f"--log-facility={value}" for value in ("", "console", "dns.log", "local8", "/a\0b")),
    *(f"--log-async={value}" for value in ("x", "-1", "2147483648")),
    *(f"--metrics-listen={value}" for value in ("", "9953", ":9953", "a:", "a:65536", "Off")),
    *(f"--conf-file={value}" for value in ("", "-")),
    *(f"--conf-dir={value}" for value in ("", ",*.conf")),
]


# ---- values ----


@pytest.mark.parametrize(("word", "expected"), GOOD, ids=[word[:60] for word in ONE_WORD])
def test_valid_values(word: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert settings(word) == replace(Settings(), **expected)
    file = tmp_path / "f.conf"
    file.write_text(word.removeprefix("--") + "\n")
    assert read_conf(file) == replace(Settings(), **expected), "the same in a file"


@pytest.mark.parametrize("word", BAD, ids=[word[:60] for word in BAD])
def test_invalid_values(word: str) -> None:
    name, _, value = word.partition("=")
    message = rejected(word)
    assert message.startswith(f"{name}: ")
    assert repr(value[:200])[1:-1] in message
    assert "; expected " in message
    assert len(message) < 2000


def test_every_option_has_a_valid_and_an_invalid_value() -> None:
    commands = {"test", "version", "help"}
    assert {word[2:].partition("=")[0] for word in ONE_WORD} == set(BY_NAME) - commands
    valued = {option.name for option in OPTIONS if option.value} - {"domain-suffix", "pid-file"}
    assert {word[2:].partition("=")[0] for word in BAD} == valued


def test_every_setting_can_be_set() -> None:
    computed = {"notices"}
    assert {name for _, expected in GOOD for name in expected} == {field.name for field in fields(Settings)} - computed


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.value], ids=lambda option: option.name)
def test_switches_take_no_value(option: Option) -> None:
    assert rejected(f"--{option.name}=1") == f"--{option.name}: unexpected value '1'; this option takes none"


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.needs_value], ids=lambda option: option.name)
def test_missing_value(option: Option, tmp_path: Path) -> None:
    assert rejected(f"--{option.name}") == f"--{option.name}: missing value"
    assert rejected(f"--{option.name}", "--no-hosts") == f"--{option.name}: missing value before '--no-hosts'"
    file = tmp_path / "f.conf"
    file.write_text(f"\n{option.name}\n")
    assert rejected("-C", str(file)) == f"{file} line 2: {option.name}: missing value; expected {option.value}"


# ---- combinations of options ----


def test_defaults_without_options() -> None:
    assert settings() == Settings()


def test_servers_of_a_domain_keep_their_order() -> None:
    words = (
        "--server=/a.example/192.0.2.9",
        "--server=/b.example/",
        "--server=/A.Example/192.0.2.1",
        "-S/a.example/192.0.2.9",
    )
    assert settings(*words).domain_servers == (DomainServers(A, (Server("192.0.2.9"), NS)), DomainServers(B, ()))


@pytest.mark.parametrize("second", ["/a.example/", "/a.example/#"])
def test_servers_of_a_domain_must_be_of_one_kind(second: str) -> None:
    message = rejected("--server=/a.example/192.0.2.1", f"--server={second}")
    assert message.startswith(f"--server: invalid value {second!r}")
    assert "a.example" in message


def test_mx_target_completes_mx_host() -> None:
    """dnsmasq adds a record of this host only if there is no --mx-host and no --srv-host."""

    def mx(*words: str) -> set[tuple[bytes, bytes]]:
        return {(record.name, record.data) for record in settings(*words).records if record.type == Type.MX}

    assert mx("--mx-host=a.example", "--mx-target=b.example") == {(A, b"\0\1" + B)}
    assert mx("--mx-target=b.example", "--mx-host=a.example,c.example,9") == {(A, b"\0\x09" + C)}
    assert mx("--mx-target=b.example", "--srv-host=_x._tcp.a,c") == set()
    assert mx("--localmx", "--srv-host=_x._tcp.a,c") == set()
    assert settings("--localmx", "--mx-target=b.example").local_mx == B


def test_host_name_that_is_no_domain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.socket, "gethostname", lambda: "a..b")
    assert rejected("--localmx").startswith("cannot use this host's name 'a..b' for MX records: expected ")
    assert settings("--no-hosts").records == ()


def test_source_ports() -> None:
    assert settings("--min-port=5000", "--max-port=5000").ports == Ports(5000, 5000)
    assert settings("--min-port=5000", "--max-port=6000", "--query-port=0").ports == Ports(0, 0, single=True)
    assert rejected("--min-port=5000", "--max-port=4999") == "--max-port=4999: less than --min-port=5000"
    assert rejected("--max-port=1023") == "--max-port=1023: less than --min-port=1024, the default"
    assert settings("-Q", "4444").ports == Ports(4444, 4444, single=True)
    assert rejected("--query-port=53").startswith("--query-port=53: is also --port; ")


def test_alias_has_one_target() -> None:
    assert "a.example already has a target" in rejected("--cname=a.example,b.example", "--cname=A.example,c.example")


@pytest.mark.parametrize("targets", [["aa"], ["ab", "ba"], ["ab", "bc", "ca"], ["xa", "ab", "bc", "cb"]])
def test_alias_loop_is_refused(targets: list[str]) -> None:
    assert "--cname: " in rejected(*(f"--cname={alias},{target}" for alias, target in targets))


def test_alias_chain_is_accepted() -> None:
    words = [f"--cname=n{number},n{number + 1}" for number in range(2000)]
    assert len(settings(*words).records) == 2000
    assert len(settings(*reversed(words)).records) == 2000


@pytest.mark.parametrize("order", [1, -1])
def test_srv_host_without_domain_gets_the_domain(order: int) -> None:
    words = ("--domain=a.example", "--srv-host=_ldap._tcp,b.example,389")[::order]
    (service,) = settings(*words).records
    assert service.name == name_from_text("_ldap._tcp.a.example")
    (alone,) = settings("--srv-host=_ldap._tcp,b.example,389").records
    assert alone.name == name_from_text("_ldap._tcp")


def test_srv_host_too_long_with_domain_is_refused() -> None:
    domain = ".".join(["x" * 61] * 4)
    assert rejected(f"--domain={domain}", f"--srv-host={'y' * 10}.z").startswith("--srv-host: yyyyyyyyyy.z is too long")


@pytest.mark.parametrize("word", ["-i eth0", "-I eth0", "-a 192.0.2.1"])
@pytest.mark.parametrize("service", ["--local-service", "--local-service=host"])
def test_listening_options_override_local_service(word: str, service: str) -> None:
    result = settings(service, *word.split())
    assert not result.local_service
    assert "lo" not in result.interfaces


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("-a 0.0.0.0", "no query matches it without --bind-interfaces"),
        ("-a :: --bind-dynamic", "add --bind-interfaces instead of --bind-dynamic to listen on every IPv6 address"),
        ("-a 0.0.0.0,:: -I eth0", "no query matches it"),
        (
            "-a ::,::1 -z",
            "includes every IPv6 address, which dnsmasq cannot bind twice; remove it or --listen-address=::1",
        ),
        ("-a 0.0.0.0 -z -i eth0", "remove it or --interface=eth0"),
    ],
)
def test_every_address_is_refused_where_dnsmasq_serves_nothing(words: str, problem: str) -> None:
    assert problem in rejected(*words.split())


@pytest.mark.parametrize("words", ["-a 0.0.0.0,::,::1", "-a 0.0.0.0 -i eth0"])
def test_every_address_without_effect_is_noticed(words: str) -> None:
    settings = parse(words.split())
    assert isinstance(settings, Settings)
    assert settings.listen_addresses in (("::1",), ())
    assert "has no effect without --bind-interfaces" in settings.notices[0]


def test_no_poll_allows_one_resolv_file() -> None:
    words = ("-n", "-r", "/a", "-r", "/b")
    assert rejected(*words).startswith("--no-poll: ")
    assert settings(*words, "-R").resolv_files == (Path("/a"), Path("/b"))
    assert settings(*words[1:]).resolv_files == (Path("/a"), Path("/b"))


ONCE = [option for option in OPTIONS if option.once]
_VALUES = {
    "metrics-listen": "off",
    "local-service": "net",
    "edns-packet-max": "512",
    "log-facility": "-",
    "max-port": "2000",
    "fast-dns-retry": "100",
    "umbrella": "orgid:7",
}


@pytest.mark.parametrize("option", ONCE, ids=lambda option: option.name)
def test_single_option_is_allowed_once_and_files_win(option: Option, tmp_path: Path) -> None:
    word = f"--{option.name}={_VALUES.get(option.name, 7)}"
    assert rejected(word, word) == f"--{option.name}: given more than once"
    file = tmp_path / "f.conf"
    file.write_text(word.removeprefix("--"))
    settings(word, "-C", str(file))
    file.write_text(f"{word.removeprefix('--')}\n" * 2)
    assert rejected("-C", str(file)) == f"{file} line 2: {option.name}: given more than once"


def test_file_wins_at_any_position(tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_text("port=2\ndomain=b.example\n")
    for words in (("-p1", "-s", "a.example", "-C", str(file)), ("-C", str(file), "-p1", "-s", "a.example")):
        assert (settings(*words).port, settings(*words).domain) == (2, B)


# ---- arguments ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--port 54", {"port": 54}),
        ("-p54", {"port": 54}),
        ("-p 54", {"port": 54}),
        ("-kqp54 -h", {"foreground": True, "port": 54, "log_queries": True, "hosts": False}),
        ("-kqp 54 -h", {"foreground": True, "port": 54, "log_queries": True, "hosts": False}),
        ("-c 10 -C /dev/null -r /r", {"cache_size": 10, "resolv_files": (Path("/r"),)}),
        ("--cache-size 10 --conf-file /dev/null", {"cache_size": 10}),
        ("-0 5 -7 /proc/self/task,*.x", {"forward_max": 5}),
        ("--log-queries --no-hosts --", {"log_queries": True, "hosts": False}),
        ("--cache-s 10", {"cache_size": 10}),
        ("--no-res", {"resolv": False}),
        ("--domain a.example", {"domain": A}),
        ("--me=off", {"metrics_listen": "off"}),
    ],
)
def test_arguments_are_split_as_by_getopt(words: str, expected: dict[str, Any]) -> None:
    assert settings(*words.split()) == replace(Settings(), **expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hosts"], "'hosts': unexpected argument; see --help"),
        (["-"], "'-': unexpected argument; see --help"),
        (["--", "--no-hosts"], "'--no-hosts': unexpected argument; see --help"),
        (["--log-queries", "extra"], "'extra': unexpected argument; see --help"),
        (["--local-service", "host"], "'host': unexpected argument; see --help"),
        (["--nosuch"], "--nosuch: unknown option; see --help"),
        (["--a\nb"], "'--a\\nb': unknown option; see --help"),
        (["-l"], "-l: missing value"),
        (["-kF"], "--dhcp-range (-F): udpwatch has no DHCP; run dnsmasq with --port=0 for DHCP; see"),
        (["-?"], "-?: unknown option; see --help"),
        (["-q", "-x"], "-x: missing value"),
        (["--no-p"], "--no-p: ambiguous option; it could be --no-poll, --no-ping"),
        (["--domain-"], "--domain-: ambiguous option; it could be --domain-suffix, --domain-needed"),
        (["--dhcp"], "--dhcp: ambiguous option; it could be --dhcp-alternate-port, "),
        (["--dhcp-ra=x"], "--dhcp-ra: ambiguous option; it could be --dhcp-rapid-commit, --dhcp-range"),
        (["--dhcp-ran=x"], "--dhcp-range: udpwatch has no DHCP; run dnsmasq with --port=0 for DHCP; see"),
        (["--=x"], "--: ambiguous option; it could be "),
        (["--domain", "\udcff"], "'\\udcff': not UTF-8"),
        (["-p"], "-p: missing value"),
        (["-p", "-h"], "-p: missing value before '-h'"),
        (["-px"], "-p: invalid value 'x'; expected a whole number from 1 to 65535"),
    ],
)
def test_invalid_arguments(words: list[str], message: str) -> None:
    assert rejected(*words).startswith(message)


def test_empty_arguments_are_ignored() -> None:
    assert settings("", "-h", " ") == replace(Settings(), hosts=False)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_dnsmasq_option_is_refused_by_name(name: str, tmp_path: Path) -> None:
    why = f"{REASONS[name]}; see docs/dns-options.md"
    assert rejected(f"--{name}") == rejected(f"--{name}=x") == f"--{name}: {why}"
    if REFUSED[name]:
        assert rejected(f"-{REFUSED[name]}x") == f"--{name} (-{REFUSED[name]}): {why}"
    file = tmp_path / "f.conf"
    file.write_text(f"{name}=x\n")
    assert rejected("-C", str(file)) == f"{file} line 1: {name}: {why}"


@pytest.mark.parametrize("option", IDLE_OPTIONS, ids=lambda option: option.name)
def test_option_of_a_missing_service_has_no_effect(option: Option, tmp_path: Path) -> None:
    """With and without a value, as dnsmasq takes it."""
    file = tmp_path / "f.conf"
    for line, valid in ((option.name, not option.needs_value), (f"{option.name}=set:a,b", bool(option.value))):
        file.write_text(f"{line}\n")
        if valid:
            assert settings(f"--{line}") == read_conf(file) == Settings()
        else:
            rejected(f"--{line}")
            rejected("-C", str(file))


@needs_dnsmasq
@pytest.mark.parametrize("option", [o for o in IDLE_OPTIONS if o.name not in LATER], ids=lambda option: option.name)
def test_dnsmasq_takes_a_value_for_the_same_idle_options(option: Option, tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_text(f"{option.name}\ndomain=a.example\n")
    missing = dnsmasq_test("-C", str(file))
    file.write_text(f"{option.name}=1\n")
    extra = dnsmasq_test("-C", str(file))
    assert ("missing parameter" in missing) is option.needs_value
    assert ("extraneous parameter" in extra) is not option.value
    if option.short:
        word = "x" if option.short_needs_value else ""
        words = f"-{option.short}{word}", "--domain=a.example"
        assert "requires an argument" not in dnsmasq_test("-C", "/dev/null", *words)
        assert settings(*words) == replace(Settings(), domain=A)
        assert bool(dnsmasq_test("-C", "/dev/null", f"-{option.short}")) is option.short_needs_value


def test_published_dhcp_lines_have_no_effect(tmp_path: Path) -> None:
    """A configuration whose DHCP is switched off by commenting out dhcp-range."""
    file = tmp_path / "f.conf"
    lines = (
        "log-dhcp",
        "dhcp-leasefile=/var/lib/misc/dnsmasq.leases",
        "dhcp-host=11:22:33:44:55:66,fred,192.168.0.60,45m",
        "dhcp-option=3,1.2.3.4",
        "dhcp-authoritative",
        "no-dhcp-interface=eth0",
        "tftp-root=/var/ftpd",
        "trust-anchor=.,20326,8,2,E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D",
        "server=192.0.2.1",
    )
    file.write_text("".join(f"{line}\n" for line in lines))
    assert read_conf(file) == replace(Settings(), servers=(NS,))
    if shutil.which("dnsmasq"):
        assert dnsmasq_test("-C", str(file)) == ""


def test_commands() -> None:
    assert parse(["--help", "--nosuch"]) == parse(["-w"]) == Information(usage())
    version = parse(["--version"])
    assert isinstance(version, Information)
    assert version == parse(["-v"])
    assert version.text.startswith("udpwatch ")
    assert parse(["--test", "-p54"]) == Information("syntax check OK.")
    assert rejected("--test", "-p0").startswith("-p: ")


@pytest.mark.parametrize("name", ["help", "test", "version"])
def test_commands_are_refused_in_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_text(name)
    assert rejected("-C", str(file)) == f"{file} line 1: {name}: allowed on the command line only"


def test_help_lists_every_option() -> None:
    shown = re.findall(r"^(?:-(.), |    )--([\w-]+)", usage(), re.MULTILINE)
    assert shown == [(option.short, option.name) for option in OPTIONS]


# ---- files ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# port=1\n  #port=2\n\t\n", {}),
        ("port = 54 # why\r\n", {"port": 54}),
        ("\tport=54\t#why", {"port": 54}),
        ("addn-hosts=/a#b", {"addn_hosts": (Path("/a#b"),)}),
        ("server=192.0.2.1#54", {"servers": (replace(NS, port=54),)}),
        ('addn-hosts="/a b #c"', {"addn_hosts": (Path("/a b #c"),)}),
        ('addn-hosts=/a" "b # "c', {"addn_hosts": (Path("/a b"),)}),
        ('txt-record=a.example,"x, y" , z', record(Type.TXT, b"\x05x, y \2 z")),
        ('txt-record=a.example," x","#"', record(Type.TXT, b"\2 x\1#")),
        ('txt-record=a.example,"\\"\\\\\\t\\n\\e\\b\\r\\x"', record(Type.TXT, b'\x09"\\\t\n\x1b\b\r\\x')),
        ('host-record="a.example","192.0.2.1"', {"host_records": (HostRecord((A,), ("192.0.2.1",)),)}),
        ('server="/a.example/192.0.2.1"', servers(NS)),
        ('port="54"\nmetrics-listen="off"\nlog-queries', {"port": 54, "metrics_listen": "off", "log_queries": True}),
        ('"port"=54', {"port": 54}),
        ("ptr-record=_x._tcp.a,\"My, 'page'._x\"", record(Type.PTR, b"\x0amy, 'page'\2_x\0", b"\2_x\4_tcp\1a\0")),
    ],
)
def test_lines(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_bytes(text.encode())
    assert read_conf(file) == replace(Settings(), **expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'domain="a', 'line 1: a missing "'),
        (b'\n\ndomain="a\\"', 'line 3: a missing "'),
        (b"domain=\xff", "line 1: not UTF-8"),
        (b"domain=a\0b", "line 1: a NUL character"),
        (b"no-hosts=", "line 1: no-hosts: unexpected value ''; this option takes none"),
        (b"no-host", "line 1: no-host: unknown option; see docs/dns-options.md"),
        (b"--no-hosts", "line 1: --no-hosts: unknown option; see docs/dns-options.md"),
        (b"=1", "line 1: : unknown option; see docs/dns-options.md"),
        (b'port="\\n"', "line 1: port: invalid value '\\n'; expected a whole number from 1 to 65535"),
        (b"server=/a/1.2.3.4\nlocal=/a/", "line 2: local: invalid value '/a/'; expected addresses, '#' or nothing"),
    ],
)
def test_invalid_lines(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_bytes(data)
    assert rejected("-C", str(file)).startswith(f"{file} {message}")


def test_no_file_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path) -> bytes:
        raise AssertionError

    monkeypatch.setattr(Path, "read_bytes", read)
    assert settings("-h") == replace(Settings(), hosts=False)


def test_included_file_is_read_in_place(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text(f"server=192.0.2.1\nconf-file={b}\nserver=192.0.2.3\n")
    b.write_text("server=192.0.2.2\n")
    assert [server.address[-1] for server in read_conf(a).servers] == ["1", "2", "3"]
    b.write_text("server=x\n")
    assert rejected("-C", str(a)).startswith(f"{b} line 1: server: invalid value 'x'")


def test_file_is_read_once_so_that_loops_end(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text(f"port=54\nconf-file={b}\n")
    b.write_text(f"conf-file={a}\nconf-file={b}\nconf-dir={tmp_path}\n")
    assert settings("-C", str(a), "-C", str(b), "-7", str(tmp_path)).port == 54


@pytest.mark.parametrize(("count", "fine"), [(options.MAX_DEPTH, True), (options.MAX_DEPTH + 1, False)])
def test_nesting_of_files_is_limited(count: int, fine: bool, tmp_path: Path) -> None:
    for number in range(1, count):
        (tmp_path / f"{number}").write_text(f"conf-file={tmp_path}/{number + 1}\n")
    (tmp_path / f"{count}").write_text("port=54\n")
    if fine:
        assert read_conf(tmp_path / "1").port == 54
    else:
        assert rejected("-C", f"{tmp_path}/1") == f"conf-file: {tmp_path}/17 is nested more than 16 files deep"


@pytest.mark.parametrize(
    ("suffixes", "expected"),
    [
        ("", ["Z.conf", "a.conf", "b.bak", "c"]),
        (",*.conf", ["Z.conf", "a.conf"]),
        (",*.conf,*.bak", ["Z.conf", "a.conf", "b.bak"]),
        (", .bak , .conf", ["c"]),
        (",*.conf,Z.conf", ["Z.conf", "a.conf"]),
        (",*.conf,a.conf", ["Z.conf", "a.conf"]),
        (",*.conf,.conf", []),
        (",*,", ["Z.conf", "a.conf", "b.bak", "c"]),
    ],
)
def test_folders(suffixes: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "folder.conf").mkdir()
    for name in ("c", "b.bak", "a.conf", "Z.conf", ".x.conf", "x.conf~", "#x.conf#"):
        (tmp_path / name).write_text(f"addn-hosts={name}\n")
    assert [str(path) for path in settings(f"--conf-dir={tmp_path}{suffixes}").addn_hosts] == expected


def _missing(_: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_missing, _folder, _loop])
def test_unreadable_files(make: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    make(file)
    for read in (lambda: read_conf(file), lambda: parse(["-C", str(file)])):
        with pytest.raises(FileError, match=f"^conf-file: cannot read {file}: ") as caught:
            read()
        assert caught.value.exit_status == 3


@pytest.mark.parametrize("make", [_missing, lambda path: path.write_text(""), _loop])
def test_unreadable_folders(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    make(folder)
    with pytest.raises(FileError, match=f"^conf-dir: cannot read {folder}: "):
        parse([f"--conf-dir={folder}"])


def test_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    """As in `--conf-file=<(..)`."""
    reading, writing = os.pipe()
    os.write(writing, b"port=54\n")
    os.close(writing)
    try:
        assert read_conf(Path(f"/proc/self/fd/{reading}")).port == 54
    finally:
        os.close(reading)


# ---- agreement with dnsmasq ----


@needs_dnsmasq
def test_every_dnsmasq_option_is_supported_or_refused() -> None:
    text = subprocess.run(["dnsmasq", "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    theirs = {name: short for short, name in re.findall(r"^(?:-(.), |    )--([\w-]+)", text, re.MULTILINE)}
    ours = {option.name: option.short for option in (*OPTIONS, *IDLE_OPTIONS)} | REFUSED
    assert len(theirs) > 150
    assert {name: ours.get(name) for name in theirs} == theirs
    hidden = {"dhcp-lease", "domain-suffix", "dnssec-limits"}
    assert set(ours) - set(theirs) - LATER - hidden == {"metrics-listen", "upstream-tcp"}


@needs_dnsmasq
@pytest.mark.parametrize(
    "word",
    [word for word in ONE_WORD if not word.startswith((*OURS, "--conf-", *(f"--{name}" for name in LATER)))],
)
def test_dnsmasq_accepts_what_udpwatch_accepts(word: str, tmp_path: Path) -> None:
    assert dnsmasq_test("-C", "/dev/null", word) == ""
    file = tmp_path / "f.conf"
    file.write_text(word.removeprefix("--") + "\n")
    assert dnsmasq_test("-C", str(file)) == ""


@needs_dnsmasq
@pytest.mark.parametrize(
    "option",
    [
        option
        for option in OPTIONS
        if not option.command_line_only
        and option.name not in {"metrics-listen", "upstream-tcp", "conf-file", "conf-dir", *LATER}
    ],
    ids=lambda option: option.name,
)
def test_dnsmasq_agrees_on_values_and_repetition(option: Option, tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    if not option.value:
        file.write_text(f"{option.name}=1")
        assert "extraneous parameter" in dnsmasq_test("-C", str(file))
    elif not option.needs_value:
        file.write_text(option.name)
        assert dnsmasq_test("-C", str(file)) == ""
    word = next(word for word in ONE_WORD if re.match(rf"--{option.name}(=|$)", word))
    file.write_text(f"{word.removeprefix('--')}\n" * 2)
    assert ("illegal repeated keyword" in dnsmasq_test("-C", str(file))) is option.once


@needs_dnsmasq
@pytest.mark.parametrize(
    "words",
    [
        "--no-res",
        "--cache-s=10",
        "--cache=10",
        "--no-p",
        "--domain-",
        "--dhcp-ra=x",
        "-kq",
        "-qextra",
        "--log-queries x",
        "x",
    ],
)
def test_dnsmasq_splits_arguments_alike(words: str) -> None:
    try:
        parse(words.split())
        accepted = True
    except ConfigError:
        accepted = False
    theirs = dnsmasq_test("-C", "/dev/null", *words.split()) == ""
    assert accepted is theirs


# ---- the document ----


def test_golden_document_lists_the_options() -> None:
    """The lists in docs/dns-options.md are generated (`make golden`)."""
    for heading, expected in (("# Opt", markdown()), ("## No effect", markdown_idle()), ("## Ref", markdown_refused())):
        text = DOCUMENT.read_text() + "\n## "
        start = text.index("\n- ", text.index(heading)) + 1
        end = text.index("\n## ", start)
        if os.environ.get("UDPWATCH_GOLDEN") == "write":
            DOCUMENT.write_text((text[:start] + expected + text[end:]).removesuffix("\n## "))
        assert DOCUMENT.read_text()[start:].startswith(expected)


def test_document_lists_refused_options() -> None:
    listed = DOCUMENT.read_text().partition("## Refused\n")[2]
    assert re.findall(r"`([\w-]+)`", listed) == list(REFUSED)


def test_example_in_the_document_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "f.conf"
    file.write_text(DOCUMENT.read_text().split("```")[1])
    assert len(read_conf(file).domain_servers) == 2
    if shutil.which("dnsmasq"):
        assert dnsmasq_test("-C", str(file)) == ""


# ---- random input ----

_WORDS = st.one_of(
    st.sampled_from(ONE_WORD),
    st.sampled_from(BAD),
    st.builds(
        "--{}={}".format, st.sampled_from(list(BY_NAME)), st.text('a1.:/,#@%*_-\\" \u00e9\udc41\udcff\0\n', max_size=12)
    ),
    st.text(st.characters(), max_size=8),
)


@given(st.lists(_WORDS, max_size=4))
def test_random_arguments_raise_only_dns_errors(words: list[str]) -> None:
    """Settings, or an error of one line."""
    words = [word for word in words if not word.startswith(("--conf-", "-C", "-7"))]
    try:
        parse(words)
    except DnsError as error:
        assert str(error).isprintable()


@given(
    st.binary(max_size=60)
    | st.lists(_WORDS, max_size=3).map("\n".join).map(lambda text: text.encode("utf-8", "ignore"))
)
def test_random_files_raise_only_dns_errors(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data.replace(b"--", b"").replace(b"conf", b""))
        file.flush()
        try:
            read_conf(Path(file.name))
        except DnsError as error:
            assert str(error).isprintable()
