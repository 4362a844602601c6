"""Real UDP servers, as audit meets them: the command, and a request that each of them answers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PORT = "{port}"
_DNS_QUERY = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\x04host\x04test\0" + struct.pack("!2H", 1, 1)
# SNMPv2c, community public, get sysUpTime.0
_SNMP_GET = bytes.fromhex("302602010104067075626c6963a019020101020100020100300e300c06082b060102010103000500")


@dataclass(frozen=True)
class Program:
    """A server of Debian. ``configure`` writes its files and returns the arguments."""

    name: str
    executable: str
    package: str
    configure: Callable[[Path, int], Sequence[str]]
    request: bytes
    wrong: bool  # it replies from the wrong address
    once: bool = False  # it serves one client, and ends


def _socat(address: str) -> Callable[[Path, int], Sequence[str]]:
    return lambda folder, port: [address.replace(_PORT, str(port)), "PIPE"]


def _netcat(folder: Path, port: int) -> Sequence[str]:
    return ["-u", "-l", str(port)]


def _dnsmasq(folder: Path, port: int) -> Sequence[str]:
    (folder / "hosts").write_text("10.9.9.9 host.test\n")
    options = (
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--pid-file",
        "--user=root",
    )
    return [*options, f"--port={port}", f"--addn-hosts={folder / 'hosts'}"]


def _unbound(*lines: str) -> Callable[[Path, int], Sequence[str]]:
    def configure(folder: Path, port: int) -> Sequence[str]:
        settings = (
            f"directory: {folder}",
            'chroot: ""',
            'username: ""',
            'pidfile: ""',
            "use-syslog: no",
            "do-daemonize: no",
            f"port: {port}",
            "access-control: 0.0.0.0/0 allow",
            "access-control: ::/0 allow",
            "local-zone: test. static",
            "local-data: 'host.test. A 10.9.9.9'",
            *lines,
        )
        (folder / "unbound.conf").write_text("server:\n" + "".join(f"  {line}\n" for line in settings))
        return ["-d", "-c", str(folder / "unbound.conf")]

    return configure


def _snmpd(*transports: str) -> Callable[[Path, int], Sequence[str]]:
    def configure(folder: Path, port: int) -> Sequence[str]:
        (folder / "snmpd.conf").write_text("rocommunity public\nrocommunity6 public\n")
        listen = ",".join(transport.replace(_PORT, str(port)) for transport in transports)
        return ["-f", "-Lf", "/dev/null", "-C", "-c", str(folder / "snmpd.conf"), "-p", str(folder / "pid"), listen]

    return configure


PROGRAMS = (
    Program("socat", "socat", "socat", _socat("UDP4-RECVFROM:{port},fork"), b"x", wrong=True),
    Program("socat, IPv6", "socat", "socat", _socat("UDP6-RECVFROM:{port},fork"), b"x", wrong=True),
    Program("socat, bound", "socat", "socat", _socat("UDP4-RECVFROM:{port},fork,bind=172.16.13.13"), b"x", wrong=False),
    Program("netcat", "nc.openbsd", "netcat-openbsd", _netcat, b"x", wrong=True, once=True),
    Program("dnsmasq", "dnsmasq", "dnsmasq-base", _dnsmasq, _DNS_QUERY, wrong=False),
    Program("unbound", "unbound", "unbound", _unbound("interface: 0.0.0.0", "interface: ::0"), _DNS_QUERY, wrong=True),
    Program(
        "unbound, interface-automatic",
        "unbound",
        "unbound",
        _unbound("interface: 0.0.0.0", "interface: ::0", "interface-automatic: yes"),
        _DNS_QUERY,
        wrong=False,
    ),
    Program("snmpd, IPv4", "snmpd", "snmpd", _snmpd("udp:{port}"), _SNMP_GET, wrong=False),
    Program("snmpd, IPv6", "snmpd", "snmpd", _snmpd("udp6:{port}"), _SNMP_GET, wrong=True),
)
