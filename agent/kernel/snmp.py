"""Read how many UDP datagrams this network namespace sent, to compare with what the programs saw.

The sources are /proc/net/snmp and /proc/net/snmp6 (RFC 4113, udpOutDatagrams). A datagram of an IPv6 socket to an IPv4
address counts in the first.
"""

from __future__ import annotations

from pathlib import Path


def udp_sent(folder: Path = Path("/proc/net")) -> int | None:
    """Return the datagrams sent since the namespace was created; None if the kernel does not report them."""
    try:
        names, values = (line.split() for line in (folder / "snmp").read_text().splitlines() if line[:5] == "Udp: ")
        sent = int(values[names.index("OutDatagrams")])
        return sent + _udp6_sent(folder / "snmp6")
    except (OSError, ValueError, IndexError):
        return None


def _udp6_sent(path: Path) -> int:
    """Return the datagrams over IPv6, 0 on a kernel without it."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Udp6OutDatagrams"))
