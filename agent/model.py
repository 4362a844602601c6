"""The types that cross a border between two stages. This module imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What conntrack made of the reply (enum verdict in bpf/records.h)."""

    NEW = "new"
    UNTRACKED = "untracked"
    UNKNOWN = "unknown"


class Cause(StrEnum):
    """Why the source was wrong (enum cause in bpf/records.h)."""

    KERNEL_CHOSEN = "kernel-chosen"
    EXPLICIT = "explicit"
    CONNECTED = "connected"
    UNKNOWN = "unknown"
    FORWARDED = "forwarded"


class Hooks(StrEnum):
    """Which programs to attach."""

    ALL = "all"  # function probes where the kernel allows them
    CGROUP = "cgroup"
    FUNCTION = "function"


class Forwarded(StrEnum):
    """Whether wrong replies of other machines are looked for."""

    AUTO = "auto"  # by function probes, where the kernel allows them
    ON = "on"  # else by conntrack's events, which cost more a flow
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation behind one suspected reply; kept only where the verdict is unknown."""

    peer: str
    peer_port: int
    source_port: int  # as the reply left, after NAT


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of wrong reply. Nothing in it grows with the number of clients."""

    expected: str  # the newest address that the peer asked
    actual: str  # the source that left
    port: int  # the server's
    family: int  # 4 or 6
    verdict: Verdict
    cause: Cause
    process: str
    cgroup: int  # id in the v2 hierarchy, 0: not known
    netns: int  # cookie, inode number where the kernel tells no cookie, 0: not known
    interface: str = ""  # that another machine's reply came in by; "": a socket's of this node


@dataclass(frozen=True, slots=True)
class Increase:
    """``count`` more wrong replies of one kind since the last sample."""

    finding: Finding
    count: int
    last: int  # CLOCK_MONOTONIC, nanoseconds
    pid: int


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent a reply, as far as it is known; "": not known."""

    process: str  # name of the main thread
    pid: int = 0
    executable: str = ""  # path
    command: str = ""  # command line, arguments quoted as a shell would take them
    cgroup: str = ""  # path, of the v2 hierarchy where there is one
    runtime: str = ""  # docker, containerd, cri-o, podman
    container_id: str = ""
    container: str = ""  # its name; else the first 12 digits of its id
    namespace: str = ""
    pod: str = ""


@dataclass(frozen=True, slots=True)
class Tuple:
    """One direction of a conntrack entry."""

    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class Event:
    """One wrong reply, a sample."""

    finding: Finding
    time: int  # CLOCK_MONOTONIC, nanoseconds
    count: int  # of the finding, this one included
    peer: str
    peer_port: int
    segments: int  # datagrams in this one send
    pid: int
    uid: int
    netns_inode: int | None
    original: Tuple | None  # the conntrack entry of the reply itself
    reply: Tuple | None
    conversation: Conversation | None  # of a suspected reply
    request: Tuple | None = None  # the unanswered flow, as its client began it; of a reply seen from the side
    pktinfo: bool | None = None  # whether it was sent with IP_PKTINFO or IPV6_PKTINFO; None: not known


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel programs' own counters, all CPUs added up (struct stats in bpf/records.h)."""

    checked: int = 0
    wrong: int = 0
    remembered: int = 0
    unremembered: int = 0
    overflow: int = 0
    rate_limited: int = 0
    ring_full: int = 0
    unparsed: int = 0
    undecided: int = 0
    evicted: int = 0
    flows: int = 0
    candidates: int = 0
    self_tests: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """One program on one hook, as the kernel reports it."""

    name: str
    attached: bool
    required: bool  # without it the sensor is none
    reattached: int  # times that the agent had to attach it again
    run_seconds: float  # 0 unless the sysctl kernel.bpf_stats_enabled is 1
    runs: int
    instructions: int  # that the verifier walked
    reason: str = ""  # why it is not attached
    how: str = ""  # "fentry" or "kprobe", of a function probe
    missed: int = 0  # runs that the kernel left out


@dataclass(frozen=True, slots=True)
class ConntrackHealth:
    """Conntrack in the agent's own namespace, as far as it explains lost UDP."""

    entries: int
    limit: int
    insert_failed: int
    dropped: int
    early_dropped: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of the sensor."""

    increases: tuple[Increase, ...]
    counters: Counters
    probes: tuple[Probe, ...]
    tracked_peers: int
    evicted_peers: int
    undecided: int  # suspected replies that could not be decided
    #: tenant (records.tenant_of) -> its wrong replies for which the kernel's table of findings had no room
    beyond: dict[int, int] = field(default_factory=dict)
    dropped: int = 0  # events for which too many others waited: for conntrack's answer, or to be taken
    held_back: int = 0  # events of flows above the limit
    flows: int = 0  # new UDP flows that were looked at
    overruns: int = 0  # times that conntrack's events came faster than they were read
    conntrack: ConntrackHealth | None = None
    udp_sent: int | None = None  # datagrams that the agent's own namespace sent, by the kernel's count


@dataclass(frozen=True, slots=True)
class Row:
    """A finding with its numbers, as the views show it."""

    sender: Sender  # the newest one: several processes, of one name and container, may be behind a row
    port: int
    expected: str
    actual: str
    verdict: str
    cause: str
    family: int
    count: int
    first: float  # seconds since the epoch
    last: float  # seconds since the epoch
    interface: str = ""  # a reply of another machine came in by


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the views show, read at one moment."""

    version: str
    kernel: str
    node: str
    mode: str
    started: float  # seconds since the epoch
    time: float  # seconds since the epoch
    ready: bool
    notes: tuple[str, ...]  # what this machine does not allow, a line each
    rows: tuple[Row, ...]
    other: int  # wrong replies in no row, which had no room
    checked: int
    tracked_peers: int
    evicted_peers: int
    lost: dict[str, int]  # stage -> how many events, or peers, were lost there
    probes: tuple[Probe, ...]
    other_of: dict[str, int] = field(default_factory=dict)  # of `other`, by namespace; "": none, or not known
    flows: int = 0  # new UDP flows of conntrack's that were looked at
    conntrack: ConntrackHealth | None = None
    udp_sent: int | None = None  # datagrams that the agent's own namespace sent, by the kernel's count
    self_test_passed: bool = True
