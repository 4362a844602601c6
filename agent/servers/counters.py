"""Read the counters of a network namespace that show where its UDP datagrams are lost.

The sources are /proc/net/snmp, snmp6 and netstat (RFC 4113, RFC 4293), and conntrack's over netlink. All of them count
for the whole namespace, since it was created.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from udpwatch.agent.kernel.ctnetlink import Table
from udpwatch.agent.model import ConntrackHealth

_HERE = Path("/proc/thread-self/net")
_CONNTRACK = Path("/proc/sys/net/netfilter/nf_conntrack_max")


@dataclass(frozen=True, slots=True)
class NetworkCounters:
    """Counters of one network namespace, or their increase; both families together."""

    received: int = 0  # datagrams that processes read
    sent: int = 0  # datagrams that sockets sent
    no_port: int = 0  # datagrams for which there was no socket
    ignored_group: int = 0  # multicast and broadcast datagrams for which there was no socket
    receive_full: int = 0  # dropped: the receive buffer had no room
    send_full: int = 0  # dropped: the send buffer or the device's queue had no room
    bad_checksum: int = 0
    no_memory: int = 0  # dropped: net.ipv4.udp_mem was used up
    unreachable: int = 0  # ICMP destination unreachable messages sent
    reverse_path: int = 0  # dropped by rp_filter
    not_local: int = 0  # dropped: the address is not local, and the host does not forward
    no_route: int = 0  # dropped: there is no route, e.g. for forwarding
    no_fragment: int = 0  # fragments that were never completed

    def __sub__(self, before: Self) -> NetworkCounters:
        """Return the increase."""
        return NetworkCounters(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))


#: field -> its names in snmp and netstat ("Udp.NoPorts"), and in snmp6
_SOURCES = {
    "received": ("Udp.InDatagrams", "Udp6InDatagrams"),
    "sent": ("Udp.OutDatagrams", "Udp6OutDatagrams"),
    "no_port": ("Udp.NoPorts", "Udp6NoPorts"),
    "ignored_group": ("Udp.IgnoredMulti", "Udp6IgnoredMulti"),
    "receive_full": ("Udp.RcvbufErrors", "Udp6RcvbufErrors"),
    "send_full": ("Udp.SndbufErrors", "Udp6SndbufErrors"),
    "bad_checksum": ("Udp.InCsumErrors", "Udp6InCsumErrors"),
    "no_memory": ("Udp.MemErrors", "Udp6MemErrors"),
    "unreachable": ("Icmp.OutDestUnreachs", "Icmp6OutDestUnreachs"),
    "reverse_path": ("TcpExt.IPReversePathFilter",),
    "not_local": ("Ip.InAddrErrors", "Ip6InAddrErrors"),
    "no_route": ("IpExt.InNoRoutes", "Ip6InNoRoutes"),
    "no_fragment": ("Ip.ReasmFails", "Ip6ReasmFails"),
}


def network_counters(folder: Path = _HERE) -> NetworkCounters:
    """Return the counters of the namespace of the calling thread; those that the kernel lacks are 0. Raises OSError."""
    values = _pairs((folder / "snmp").read_text()) | _pairs((folder / "netstat").read_text())
    if (folder / "snmp6").exists():
        values |= dict(line.split() for line in (folder / "snmp6").read_text().splitlines())
    sums = {name: sum(int(values.get(source, 0)) for source in sources) for name, sources in _SOURCES.items()}
    return NetworkCounters(**sums)


def conntrack_health() -> ConntrackHealth | None:
    """Return conntrack's counters in the namespace of the calling thread; None without conntrack or CAP_NET_ADMIN."""
    if not _CONNTRACK.exists():  # asking would load its modules
        return None
    try:
        with Table() as table:
            return table.health()
    except OSError:
        return None


def received_drops(folder: Path = _HERE) -> dict[str, int]:
    """Return how many packets each device of the namespace of the calling thread received with an error or dropped."""
    found = {}
    for line in (folder / "dev").read_text().splitlines()[2:]:
        name, _, values = line.rpartition(":")
        errors, dropped, overrun = map(int, values.split()[2:5])
        found[name.strip()] = errors + dropped + overrun
    return found


def _pairs(text: str) -> dict[str, str]:
    """Parse pairs of lines, "Udp: NAME NAME" and "Udp: VALUE VALUE"."""
    found: dict[str, str] = {}
    lines = text.splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        group = names.partition(":")[0]
        found |= {f"{group}.{name}": value for name, value in zip(names.split()[1:], values.split()[1:], strict=False)}
    return found
