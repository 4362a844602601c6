"""The statements about a port, and the words that they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from udpwatch.agent.model import Row
from udpwatch.agent.servers.port.facts import SocketFacts, is_wildcard, plain

MAX_NAMED = 8  # processes that have statements of their own; a tenant may have thousands with a socket on the port
_SHOWN = 4  # names in one sentence


class Kind(StrEnum):
    """What a statement is about. The names are stable, for --json; docs/explain.md lists them."""

    LISTENS = "listens"
    NOT_LISTENING = "not-listening"
    ONLY_TCP = "only-tcp"
    OTHER_NAMESPACE = "other-namespace"
    OTHER_ADDRESS = "other-address"
    OTHER_FAMILY = "other-family"
    OTHER_DEVICE = "other-device"
    OTHER_PEER = "other-peer"
    NOT_LOCAL = "not-local"
    RECEIVE_BUFFER = "receive-buffer"
    SOCKET_FILTER = "socket-filter"
    NOT_READ = "not-read"
    FIREWALL = "firewall"
    REVERSE_PATH = "reverse-path"
    CHECKSUM = "checksum"
    NO_MEMORY = "no-memory"
    SEND_QUEUE = "send-queue"
    CONNTRACK_FULL = "conntrack-full"
    CONNTRACK_INSERT = "conntrack-insert-failed"
    CONNTRACK_DROP = "conntrack-drop"
    LOST = "lost"
    REDIRECTED = "redirected"
    WRONG_SOURCE = "wrong-source"
    NO_REPLY = "no-reply"
    NOTHING_ARRIVES = "nothing-arrives"
    REPLIES = "replies"


@dataclass(frozen=True, slots=True)
class Statement:
    """What is known about a port in one namespace, in a few sentences."""

    kind: Kind
    wrong: bool  # a datagram was lost, or has to be; otherwise the statement only narrows the search
    text: str
    fix: str = ""  # lines to copy: a command or a setting
    namespace: str = ""  # "": all that were looked into
    netns: int = 0  # its inode number
    row: Row | None = None  # of wrong replies: the same as a finding, without a verdict and a cause


def process(each: SocketFacts) -> str:
    """Name the process of a socket."""
    return each.sender.process or each.socket.process or "an unknown process"


def owner(each: SocketFacts) -> str:
    """Name the process of a socket with its id and its container."""
    if each.has_no_process:
        uid = f" of uid {each.socket.uid}" if each.socket.uid is not None else ""
        return f"The kernel itself (a tunnel such as VXLAN), or a process{uid} that this user may not examine,"
    return replace(each.sender, process=each.sender.process or each.socket.process, pid=each.socket.pid).title


def bound(each: SocketFacts) -> str:
    """Say what a socket is bound to."""
    sock = each.socket
    text = end(sock.address, sock.port)
    if sock.only_ipv6 and is_wildcard(sock):
        text += " (IPv6 only)"
    if each.device:
        text += f" on device {each.device}"
    return f"{text}, connected to {end(sock.peer, sock.peer_port)}" if sock.peer else text


def end(address: str, port: int) -> str:
    """Return ADDRESS:PORT or [ADDRESS]:PORT."""
    address = plain(address)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def several(words: Iterable[str]) -> str:
    """Join names without duplicates; of many, only the first."""
    names = list(dict.fromkeys(words))
    if len(names) > _SHOWN:
        return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def count(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
