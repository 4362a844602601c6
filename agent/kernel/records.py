"""Mirror bpf/records.h, and decode what comes from the kernel into the types of model.py.

tests/unit/agent/kernel/test_records.py compiles the header and compares every size and offset with this file.
"""

from __future__ import annotations

import ctypes
import ipaddress
import struct
import sys
import time
from array import array
from collections.abc import Mapping
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import fields
from typing import Any, NamedTuple

from udpwatch.agent.model import REFUSALS, Cause, Conversation, Counters, Event, Finding, Tuple, UdpSocket, Verdict

COMM_LEN = 16
TUPLE_LEN = 40
WAYS = 8

VERDICTS = {1: Verdict.NEW, 2: Verdict.UNTRACKED, 3: Verdict.UNKNOWN, 4: Verdict.HEALED}
CAUSES = {1: Cause.KERNEL_CHOSEN, 2: Cause.EXPLICIT, 3: Cause.CONNECTED, 4: Cause.UNKNOWN, 5: Cause.FORWARDED}
PKTINFO = {0: None, 1: False, 2: True}
_CLOCK_MONOTONIC_COARSE = 6  # include/uapi/linux/time.h
_FAMILIES = {2: 4, 10: 6}  # AF_INET, AF_INET6
_V4_MAPPED = bytes(10) + b"\xff\xff"

Address = c_uint8 * 16


class Tenant(ctypes.Structure):
    """struct tenant."""

    _fields_ = [("scope", c_uint32), ("port", c_uint16), ("flags", c_uint16)]


class ConversationRecord(ctypes.Structure):
    """struct conversation."""

    _fields_ = [("address", Address), ("asked", c_uint64), ("answered", c_uint64), ("tenant", Tenant)]


class ConversationSet(ctypes.Structure):
    """struct conversation_set."""

    _fields_ = [("lock", c_uint32), ("pad", c_uint32), ("tag", c_uint64 * WAYS), ("way", ConversationRecord * WAYS)]


class Requester(NamedTuple):
    """Mirror struct request_key: a client, as the server sees it."""

    inode: int
    zone: int
    address: str
    client_port: int
    port: int  # of the server

    @property
    def tenant(self) -> int:
        """The port and namespace of the server as one number."""
        return self.inode << 16 | self.port


class FindingConversation(ctypes.Structure):
    """The anonymous struct in struct finding_key."""

    _fields_ = [("peer", Address), ("peer_port", c_uint16), ("source_port", c_uint16), ("pad", c_uint32)]


class FindingKey(ctypes.Structure):
    """struct finding_key."""

    _fields_ = [
        ("expected", Address),
        ("actual", Address),
        ("netns", c_uint64),
        ("cgroup", c_uint64),
        ("comm", c_char * COMM_LEN),
        ("port", c_uint16),
        ("verdict", c_uint8),
        ("cause", c_uint8),
        ("family", c_uint8),
        ("pad", c_uint8 * 3),
        ("conversation", FindingConversation),
    ]


class FindingValue(ctypes.Structure):
    """struct finding."""

    _fields_ = [
        ("count", c_uint64),
        ("began", c_uint64),
        ("last", c_uint64),
        ("second", c_uint64),
        ("in_second", c_uint32),
        ("tgid", c_uint32),
    ]


class EventRecord(ctypes.Structure):
    """struct event."""

    _fields_ = [
        ("key", FindingKey),
        ("time", c_uint64),
        ("count", c_uint64),
        ("peer", Address),
        ("peer_port", c_uint16),
        ("segments", c_uint16),
        ("tgid", c_uint32),
        ("uid", c_uint32),
        ("netns_inode", c_uint32),
        ("original", c_uint8 * TUPLE_LEN),
        ("reply", c_uint8 * TUPLE_LEN),
        ("pktinfo", c_uint32),
        ("pad", c_uint32),
    ]


class ReportedKey(ctypes.Structure):
    """struct reported_key."""

    _fields_ = [
        ("source", Address),
        ("peer", Address),
        ("source_port", c_uint16),
        ("peer_port", c_uint16),
        ("pad", c_uint32),
    ]


class ServerKey(ctypes.Structure):
    """struct server_key."""

    _fields_ = [("scope", c_uint64), ("bound", Address), ("port", c_uint16), ("pad", c_uint16 * 3)]


class ServerValue(ctypes.Structure):
    """struct server."""

    _fields_ = [("cgroup", c_uint64), ("netns", c_uint32), ("slot", c_uint32)]


class ServerCounts(ctypes.Structure):
    """struct server_counts."""

    _fields_ = [
        ("requests", c_uint64),
        ("repeated", c_uint64),
        ("replies", c_uint64),
        ("further", c_uint64),
        ("named", c_uint64),
        ("cgroup", c_uint64),
        ("tgid", c_uint32),
        ("pad", c_uint32),
        ("comm", c_char * COMM_LEN),
    ]


class Waiting(ctypes.Structure):
    """struct waiting."""

    _fields_ = [("count", c_uint32), ("peers", c_uint32), ("next_set", c_uint32), ("pad", c_uint32)]


class SocketOwner(ctypes.Structure):
    """struct socket_owner."""

    _fields_ = [("cgroup", c_uint64), ("tgid", c_uint32), ("pad", c_uint32), ("comm", c_char * COMM_LEN)]


class SocketRecord(ctypes.Structure):
    """struct socket_record."""

    _fields_ = [
        ("cookie", c_uint64),
        ("inode", c_uint64),
        ("cgroup", c_uint64),
        ("bound", Address),
        ("peer", Address),
        ("netns", c_uint32),
        ("device", c_uint32),
        ("uid", c_uint32),
        ("queue", c_uint32),
        ("queue_limit", c_uint32),
        ("drops", c_uint32),
        ("tgid", c_uint32),
        ("port", c_uint16),
        ("peer_port", c_uint16),
        ("family", c_uint16),
        ("options", c_uint8),
        ("known", c_uint8),
        ("pad", c_uint32),
        ("comm", c_char * COMM_LEN),
    ]


class HealCounts(ctypes.Structure):
    """struct heal_counts."""

    _fields_ = [("dry_run", c_uint64), ("refused", c_uint64 * len(REFUSALS))]


class LocalKey(ctypes.Structure):
    """struct local_key."""

    _fields_ = [("address", Address), ("netns", c_uint32), ("pad", c_uint32)]


class SelfTest(ctypes.Structure):
    """struct self_test."""

    _fields_ = [("netns", c_uint64), ("port", c_uint16), ("peer_port", c_uint16), ("pad", c_uint32)]


class RequestKey(ctypes.Structure):
    """struct request_key."""

    _fields_ = [
        ("client", Address),
        ("netns", c_uint32),
        ("client_port", c_uint16),
        ("port", c_uint16),
        ("zone", c_uint16),
        ("pad", c_uint16 * 3),
    ]


class RequestRecord(ctypes.Structure):
    """struct request."""

    _fields_ = [
        ("server", Address),
        ("seen", c_uint64),
        ("entry", c_uint64),
        ("final", c_uint64),
    ]


class DumpedRequest(ctypes.Structure):
    """struct dumped_request."""

    _fields_ = [("key", RequestKey), ("server", Address), ("seen", c_uint64)]


class CandidateRecord(ctypes.Structure):
    """struct candidate."""

    _fields_ = [
        ("key", RequestKey),
        ("request", RequestRecord),
        ("actual", Address),
        ("time", c_uint64),
        ("cgroup", c_uint64),
        ("asking", c_uint8 * TUPLE_LEN),
        ("original", c_uint8 * TUPLE_LEN),
        ("reply", c_uint8 * TUPLE_LEN),
        ("interface", c_char * COMM_LEN),
        ("comm", c_char * COMM_LEN),
        ("tgid", c_uint32),
        ("uid", c_uint32),
        ("final", c_uint32),
        ("ingress", c_uint32),
        ("family", c_uint8),
        ("cause", c_uint8),
        ("pktinfo", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class StatsRecord(ctypes.Structure):
    """struct stats."""

    _fields_ = [(field.name, c_uint64) for field in fields(Counters) if field.name != "checked"]


CONVERSATION_SET_BYTES = ctypes.sizeof(ConversationSet)
FINDING_KEY_BYTES = ctypes.sizeof(FindingKey)
FINDING_BYTES = ctypes.sizeof(FindingValue)
EVENT_BYTES = ctypes.sizeof(EventRecord)
_ROOT_CGROUP, _ROOT_TENANT = 1, 1 << 63  # as in bpf/sockets.c
CANDIDATE_KEY_BYTES = 8
CANDIDATE_BYTES = ctypes.sizeof(CandidateRecord)
STATS_BYTES = ctypes.sizeof(StatsRecord)
SERVER_KEY_BYTES = ctypes.sizeof(ServerKey)
SERVER_BYTES = ctypes.sizeof(ServerValue)
SERVER_COUNTS_BYTES = ctypes.sizeof(ServerCounts)
HEAL_COUNTS_BYTES = ctypes.sizeof(HealCounts)
HEAL_UNSET, HEAL_DRY_RUN, HEAL_ON, HEAL_NEVER, HEAL_BY_SLOT = range(5)  # enum healing, and HEAL_BY_SLOT
WAITING_BYTES = ctypes.sizeof(Waiting)
NO_SERVER, OTHER_SERVERS, FIRST_SLOT = 0, 1, 2  # slots
SOCKET_OWNER_BYTES = ctypes.sizeof(SocketOwner)
SOCKET_BYTES = ctypes.sizeof(SocketRecord)
#: where numbers of a socket's record begin and end: most records need not be decoded
INODE, NETNS, PORT = (
    (each.offset, each.offset + each.size) for each in (SocketRecord.inode, SocketRecord.netns, SocketRecord.port)
)
_PKTINFO, _PKTINFO6, _REUSEPORT, _TRANSPARENT, _NAMED, _IPV6ONLY = 1, 2, 4, 8, 16, 32  # HAS_* in bpf/records.h


#: the structs that the agent reads from maps that another version's programs may have made
_KEPT = {
    "finding_key": FindingKey,
    "finding": FindingValue,
    "event": EventRecord,
    "server_key": ServerKey,
    "server": ServerValue,
    "server_counts": ServerCounts,
    "waiting": Waiting,
    "stats": StatsRecord,
    "reported_key": ReportedKey,
}


class _Place(NamedTuple):
    offset: int
    size: int


def _places(kind: type[ctypes.Structure], prefix: str = "", at: int = 0) -> dict[str, _Place]:
    """Return where each member is, also those of nested structs ("key.netns")."""
    found = dict[str, _Place]()
    for name, member, *_ in kind._fields_:
        place = getattr(kind, name)
        if isinstance(member, type) and issubclass(member, ctypes.Structure):
            found |= _places(member, f"{prefix}{name}.", at + place.offset)
        else:
            found[prefix + name] = _Place(at + place.offset, place.size)
    return found


def layout() -> dict[str, Any]:
    """Describe the structs that another version's agent reads: their sizes, and where their members are."""
    return {name: {"size": ctypes.sizeof(kind), "members": _places(kind)} for name, kind in _KEPT.items()}


class Layout:
    """How the maps of a generation are laid out. Members are matched by name: one that the other version lacks is 0.
    The numbers of an enum never change their meaning, so that they need no translation.
    """

    def __init__(self, described: Mapping[str, Any] | None = None) -> None:
        """Read what `layout` described; None: our own. Raises LookupError, TypeError or ValueError for other things."""
        described = layout() if described is None else described
        self._pieces: dict[str, list[tuple[int, int, int]] | None] = {}  # None: like ours
        self._sizes: dict[str, int] = {}
        for name, kind in _KEPT.items():
            own, other = _places(kind), {at: _Place(*place) for at, place in dict(described[name]["members"]).items()}
            self._sizes[name] = int(described[name]["size"])
            is_alike = own == other and self._sizes[name] == ctypes.sizeof(kind)
            shared = [(own[at], other[at]) for at in own.keys() & other.keys()]
            pieces = [(ours.offset, theirs.offset, min(ours.size, theirs.size)) for ours, theirs in shared]
            if any(theirs + size > self._sizes[name] or theirs < 0 for _, theirs, size in pieces):
                raise ValueError(f"struct {name} is shorter than its members")
            self._pieces[name] = None if is_alike else pieces

    def size(self, name: str) -> int:
        """Return the size of a struct in bytes."""
        return self._sizes[name]

    def is_own(self, name: str) -> bool:
        """Return whether a struct is laid out like ours."""
        return self._pieces[name] is None

    def own(self, name: str, raw: bytes) -> bytes:
        """Translate structs that lie one after the other, such as those of all CPUs, into our own layout."""
        pieces, size = self._pieces[name], self._sizes[name]
        if pieces is None:
            return raw
        own = ctypes.sizeof(_KEPT[name])
        translated = bytearray(len(raw) // size * own)
        for number in range(len(raw) // size):
            for ours, theirs, length in pieces:
                at, source = number * own + ours, number * size + theirs
                translated[at : at + length] = raw[source : source + length]
        return bytes(translated)


OWN_LAYOUT = Layout()


def decode_address(raw: bytes) -> str:
    """Decode 16 bytes in network order to text; an IPv4-mapped address becomes IPv4."""
    if raw[:12] == _V4_MAPPED:
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))


def encode_address(text: str) -> bytes:
    """Encode an address; the reverse of `decode_address`."""
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else _V4_MAPPED + address.packed


def encode_local_key(address: str, netns: int) -> bytes:
    """Encode struct local_key. ``netns``: inode number; "::" marks the namespace as followed."""
    return bytes(LocalKey(Address.from_buffer_copy(encode_address(address)), netns, 0))


def decode_heal_counts(raw: bytes) -> tuple[int, dict[str, int]]:
    """Add up struct heal_counts of all CPUs; return the replies of dry runs, and those that were refused by reason."""
    each = [HealCounts.from_buffer_copy(raw, at) for at in range(0, len(raw), HEAL_COUNTS_BYTES)]
    refused = {reason: sum(cpu.refused[number] for cpu in each) for number, reason in enumerate(REFUSALS)}
    return sum(cpu.dry_run for cpu in each), refused


def printable(name: bytes) -> str:
    """Return a process name as text that is safe on a terminal and in a label; a process can choose any bytes."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def decode_finding_key(raw: bytes) -> tuple[Finding, Conversation | None]:
    """Decode struct finding_key; the conversation is None unless the verdict is unknown.

    A number that this version does not know comes from the programs of another one: it counts as a wrong reply of
    unknown cause.
    """
    return _finding(FindingKey.from_buffer_copy(raw))


def _finding(key: FindingKey) -> tuple[Finding, Conversation | None]:
    verdict = VERDICTS.get(key.verdict, Verdict.NEW)
    finding = Finding(
        expected=decode_address(bytes(key.expected)),
        actual=decode_address(bytes(key.actual)),
        port=key.port,
        family=_FAMILIES.get(key.family, 6),
        verdict=verdict,
        cause=CAUSES.get(key.cause, Cause.UNKNOWN),
        process=printable(key.comm),
        cgroup=key.cgroup,
        netns=key.netns,
    )
    if verdict is not Verdict.UNKNOWN:
        return finding, None
    conversation = key.conversation
    return finding, Conversation(
        decode_address(bytes(conversation.peer)), conversation.peer_port, conversation.source_port
    )


def tenant_of(finding: Finding) -> int:
    """Return the tenant of a finding: its cgroup, or its namespace in the root cgroup."""
    return finding.cgroup if finding.cgroup > _ROOT_CGROUP else finding.netns | _ROOT_TENANT


class CountedFinding(NamedTuple):
    """A struct finding. Times are monotonic nanoseconds."""

    datagrams: int
    last: int  # time of the last reply; 0: the element is being created
    pid: int
    began: int


def decode_finding(raw: bytes) -> CountedFinding:
    """Decode struct finding."""
    value = FindingValue.from_buffer_copy(raw)
    return CountedFinding(value.count, value.last, value.tgid, value.began)


def decode_tuple(raw: bytes) -> Tuple | None:
    """Decode the struct nf_conntrack_tuple of the kernel; return None if it is empty.

    Layout (include/net/netfilter/nf_conntrack_tuple.h): source address 16, source port 2, layer-3 protocol 2,
    destination address 16, destination port 2, protocol 1, direction 1.
    """
    (layer3,) = struct.unpack_from("=H", raw, 18)
    family = _FAMILIES.get(layer3)
    if family is None:
        return None
    length = 4 if family == 4 else 16
    source_port, destination_port = struct.unpack_from("!H", raw, 16)[0], struct.unpack_from("!H", raw, 36)[0]
    source, destination = (ipaddress.ip_address(raw[at : at + length]) for at in (0, 20))
    return Tuple(str(source), source_port, str(destination), destination_port)


def decode_event(raw: bytes) -> Event:
    """Decode a struct event of the ring buffer."""
    record = EventRecord.from_buffer_copy(raw)
    finding, conversation = _finding(record.key)
    return Event(
        finding=finding,
        time=record.time,
        count=record.count,
        peer=decode_address(bytes(record.peer)),
        peer_port=record.peer_port,
        segments=record.segments,
        pid=record.tgid,
        uid=record.uid,
        netns_inode=record.netns_inode or None,
        original=decode_tuple(bytes(record.original)),
        reply=decode_tuple(bytes(record.reply)),
        conversation=conversation,
        pktinfo=PKTINFO.get(record.pktinfo),
    )


def tick_ns() -> int:
    """Return the nanoseconds of a tick (a jiffy), the unit of times in the table of conversations."""
    return round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)


class CountedServer(NamedTuple):
    """A struct server_key and its struct server."""

    scope: int
    address: str  # bound address
    port: int
    cgroup: int
    netns: int  # inode number, 0: unknown
    slot: int

    @property
    def tenant(self) -> int:
        """The owner of its share of the table."""
        return self.cgroup if self.cgroup > _ROOT_CGROUP else self.scope | _ROOT_TENANT


def decode_server(key: bytes, value: bytes) -> CountedServer:
    """Decode an element of the map of servers."""
    its, server = ServerKey.from_buffer_copy(key), ServerValue.from_buffer_copy(value)
    return CountedServer(
        its.scope, decode_address(bytes(its.bound)), its.port, server.cgroup, server.netns, server.slot
    )


class ServerTotals(NamedTuple):
    """The struct server_counts of all CPUs."""

    requests: int
    replies: int
    ended: int  # waits that ended with a reply
    begun: int  # waits
    cgroup: int  # of the process that sent a reply last, 0: unknown
    pid: int
    process: str


def decode_server_counts(raw: bytes) -> ServerTotals:
    """Decode the values of all CPUs, and add them up."""
    words, numbers = SERVER_COUNTS_BYTES // 8, array("Q", raw)
    requests, repeated, replies, further = (sum(numbers[at::words]) for at in range(4))
    named = numbers[ServerCounts.named.offset // 8 :: words]
    at = max(range(len(named)), key=named.__getitem__) * SERVER_COUNTS_BYTES
    last = ServerCounts.from_buffer_copy(raw, at)
    # Sums wrap: a wait that is no longer counted is subtracted.
    begun, ended = (requests - repeated) % (1 << 64), (replies - further) % (1 << 64)
    return ServerTotals(requests, replies, ended, begun, last.cgroup, last.tgid, printable(last.comm))


def decode_waiting(raw: bytes) -> tuple[int, int]:
    """Decode struct waiting: (peers that wait, peers of all servers)."""
    value = Waiting.from_buffer_copy(raw)
    return value.count, value.peers


def decode_socket(raw: bytes) -> UdpSocket:
    """Decode struct socket_record."""
    record = SocketRecord.from_buffer_copy(raw)

    def option(bit: int) -> bool | None:
        return bool(record.options & bit) if record.known & bit else None

    family = _FAMILIES[record.family]
    peer = bytes(record.peer)
    is_connected = record.peer_port != 0
    return UdpSocket(
        # An IPv6 socket that is bound to ::ffff:0.0.0.0 serves IPv4 only.
        address=sys.intern(decode_address(bytes(record.bound))),  # thousands of sockets have the same
        port=record.port,
        family=family,
        netns=record.netns,
        inode=record.inode,
        cookie=record.cookie,
        uid=record.uid,
        peer=decode_address(peer) if is_connected else "",
        peer_port=record.peer_port,
        device=record.device,
        only_ipv6=bool(record.options & _IPV6ONLY),
        pktinfo=option(_PKTINFO),
        pktinfo6=option(_PKTINFO6) if family == 6 else None,
        reuseport=option(_REUSEPORT),
        transparent=option(_TRANSPARENT),
        named=option(_NAMED),
        queue=record.queue,
        queue_limit=record.queue_limit,
        drops=record.drops,
        cgroup=record.cgroup,
        pid=record.tgid,
        process=sys.intern(printable(record.comm)),
        kernel=not record.inode,
    )


def encode_self_test(netns: int, port: int, peer_port: int) -> bytes:
    """Encode struct self_test; ``netns`` is a cookie."""
    return bytes(SelfTest(netns, port, peer_port))


def encode_reported(actual: str, port: int, peer: str, peer_port: int) -> bytes:
    """Encode the struct reported_key of a datagram."""
    source, to = Address(*encode_address(actual)), Address(*encode_address(peer))
    return bytes(ReportedKey(source, to, port, peer_port))


def encode_request(client: Requester, server: str, seen: int) -> bytes:
    """Encode struct dumped_request. ``server`` is "" for a group; ``seen`` is in nanoseconds of CLOCK_MONOTONIC."""
    address = Address(*encode_address(client.address))
    key = RequestKey(address, client.inode, client.client_port, client.port, client.zone)
    return bytes(DumpedRequest(key, Address(*encode_address(server or "::")), seen))


def tenant_of_candidate(raw: bytes) -> int:
    """Return the tenant of a struct candidate: its namespace and interface."""
    record = CandidateRecord.from_buffer_copy(raw)
    return int(record.ingress) << 32 | int(record.key.netns)


def decode_candidate(raw: bytes) -> tuple[Event, int]:
    """Decode struct candidate: (the event if it was a wrong reply, its zone)."""
    record = CandidateRecord.from_buffer_copy(raw)
    key = record.key
    peer = decode_address(bytes(key.client))
    finding = Finding(
        expected=decode_address(bytes(record.request.server)),
        actual=decode_address(bytes(record.actual)),
        port=key.port,
        family=_FAMILIES[record.family],
        verdict=Verdict.NEW,
        cause=CAUSES[record.cause],
        process=printable(record.comm),
        cgroup=record.cgroup,
        netns=key.netns,
        interface=printable(record.interface),
    )
    event = Event(
        finding=finding,
        time=record.time,
        count=0,
        peer=peer,
        peer_port=key.client_port,
        segments=1,
        pid=record.tgid,
        uid=record.uid,
        netns_inode=key.netns,
        original=decode_tuple(bytes(record.original)),
        reply=decode_tuple(bytes(record.reply)),
        conversation=None,
        request=decode_tuple(bytes(record.asking)),
        pktinfo=PKTINFO[record.pktinfo],
    )
    return event, key.zone


def decode_counters(raw: bytes) -> Counters:
    """Decode the per-CPU array of struct stats, and add up all CPUs."""
    names = [name for name, *_ in StatsRecord._fields_]
    totals = [0] * len(names)
    for values in struct.iter_unpack(f"={len(names)}Q", raw):
        totals = [total + value for total, value in zip(totals, values, strict=True)]
    return Counters(**dict(zip(names, totals, strict=True)))
