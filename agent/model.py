"""The types that several folders of the agent share. This module imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """How conntrack classified the reply, or that it was healed (enum verdict in bpf/records.h)."""

    NEW = "new"
    UNTRACKED = "untracked"
    UNKNOWN = "unknown"
    HEALED = "healed"  # no wrong reply: udpwatch set the source that the peer asked


class Cause(StrEnum):
    """How the wrong source was chosen (enum cause in bpf/records.h)."""

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


class StateKeep(StrEnum):
    """After which ends of the agent its state folder stays."""

    ALWAYS = "always"
    CRASH = "crash"  # not after a stop by a signal


class Forwarded(StrEnum):
    """Whether to check the replies of machines behind this node."""

    AUTO = "auto"  # by function probes, where the kernel allows them
    ON = "on"  # else by conntrack's events, which cost more per flow
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
    actual: str  # the source of the reply
    port: int  # the server's
    family: int  # 4 or 6
    verdict: Verdict
    cause: Cause
    process: str
    cgroup: int  # id in the v2 hierarchy, 0: unknown
    netns: int  # cookie, or inode number if the kernel has no cookie, 0: unknown
    interface: str = ""  # on which a forwarded reply arrived; "": the reply of a socket of this node


@dataclass(frozen=True, slots=True)
class Increase:
    """``count`` more wrong replies of one kind since the last sample."""

    finding: Finding
    count: int
    last: int  # CLOCK_MONOTONIC, nanoseconds
    pid: int


UNKNOWN_PROCESS = "an unknown process"


@dataclass(frozen=True, slots=True)
class Sender:
    """The sender of a reply; "": unknown."""

    process: str  # name of the main thread
    pid: int = 0
    executable: str = ""  # path
    command: str = ""  # command line, arguments quoted for a shell
    cgroup: str = ""  # path, in the v2 hierarchy if there is one
    runtime: str = ""  # docker, containerd, cri-o, podman
    container_id: str = ""
    container: str = ""  # name, or the first 12 digits of the id
    namespace: str = ""
    pod: str = ""

    @property
    def title(self) -> str:
        """The process with its pod or container, for sentences. Its tenant chose these characters."""
        name = UNKNOWN_PROCESS if self.process in ("", "unknown") else self.process
        if self.pid:
            name += f" (pid {self.pid})"
        if self.pod:
            return f"{name} in pod {self.namespace}/{self.pod}" if self.namespace else f"{name} in pod {self.pod}"
        return f"{name} in container {self.container}" if self.container else name


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
    count: int  # of the finding, including this one
    peer: str
    peer_port: int
    segments: int  # datagrams in this send
    pid: int
    uid: int
    netns_inode: int | None
    original: Tuple | None  # the conntrack entry of the reply itself
    reply: Tuple | None
    conversation: Conversation | None  # of a suspected reply
    request: Tuple | None = None  # of a forwarded reply: the client's flow, which has no reply
    pktinfo: bool | None = None  # whether it was sent with IP_PKTINFO or IPV6_PKTINFO; None: unknown


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """A bound UDP socket. None: the source of the list does not tell."""

    address: str  # bound address; "0.0.0.0" or "::": every one
    port: int
    family: int  # 4 or 6, of the socket; a socket of family 6 may also serve IPv4
    netns: int = 0  # inode number of its network namespace, 0: unknown
    inode: int = 0  # of the socket's file
    cookie: int = 0
    uid: int | None = None
    peer: str = ""  # "": not connected
    peer_port: int = 0
    device: int = 0  # interface index it is bound to, 0: none
    only_ipv6: bool = False
    pktinfo: bool | None = None  # IP_PKTINFO is set
    pktinfo6: bool | None = None  # IPV6_RECVPKTINFO is set
    reuseport: bool | None = None
    transparent: bool | None = None
    queue: int | None = None  # octets in its receive buffer, with the kernel's overhead
    queue_limit: int | None = None
    drops: int | None = None  # datagrams dropped because the receive buffer was full, or by checksum
    cgroup: int = 0  # id in the v2 hierarchy, 0: unknown
    pid: int = 0  # a process that holds it, 0: unknown
    process: str = ""  # its name, as the kernel reports it
    kernel: bool = False  # the kernel's own, such as a tunnel's; False if the source of the list does not tell
    named: bool | None = None  # bind() named its port, as servers do; False: the kernel chose it


@dataclass(frozen=True, slots=True)
class ServerCount:
    """What one server port of a namespace did, as the kernel counts it."""

    scope: int  # its network namespace's cookie, else another number of it, else of its socket
    netns: int  # inode number, 0: unknown
    address: str  # bound address; "0.0.0.0" or "::": every one
    port: int
    cgroup: int  # id in the v2 hierarchy, 0: unknown
    pid: int  # of a process that sent a reply, 0: unknown
    process: str  # its name, as the kernel reports it
    requests: int  # datagrams
    replies: int
    unanswered: int
    slot: int = 0  # in the kernel's tables by server


@dataclass(slots=True)
class ServerTotals:
    """What several servers did."""

    requests: int = 0
    replies: int = 0
    unanswered: int = 0
    drops: int = 0

    def add(self, other: ServerTotals) -> None:
        """Add what other servers did."""
        self.requests += other.requests
        self.replies += other.replies
        self.unanswered += other.unanswered
        self.drops += other.drops


class Risk(StrEnum):
    """Whether a server will reply from the wrong address."""

    NONE = "none"
    UNKNOWN = "unknown"  # e.g. its namespace's addresses cannot be read
    POSSIBLE = "possible"  # a wildcard socket without PKTINFO, and an address from which routing would not reply
    VIRTUAL = "virtual"  # the same, and the address is a VIP's or a bridge's
    WRONG = "wrong"  # it has replied wrongly


@dataclass(frozen=True, slots=True)
class Server:
    """A UDP server of this node and what it did, as the agent publishes it.

    The sockets of one process name, container and port of a network namespace are one server.
    """

    sender: Sender
    port: int
    netns: int  # inode number, 0: unknown
    addresses: tuple[str, ...]  # bound addresses, sorted
    requests: int  # datagrams received on the port
    replies: int  # datagrams sent to peers that had asked
    unanswered: int  # requests that got no datagram within the window, or before they were repeated
    wrong: int  # wrong replies
    drops: int | None  # datagrams that its receive buffers had no room for; None: unknown
    queue: int | None  # octets in its receive buffers
    queue_limit: int | None
    pktinfo: bool | None  # every wildcard socket has IP_PKTINFO or IPV6_RECVPKTINFO set; None: unknown
    risk: Risk
    first: float  # seconds since the epoch
    last: float  # of its last request
    at_risk: int = 0  # sockets that will reply from the wrong address, or have done so
    #: what servers with the same labels in other network namespaces had counted when they ended: metrics add it, so
    #: that no counter falls
    inherited: ServerTotals = field(default_factory=ServerTotals)


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel programs' counters, summed over all CPUs (struct stats in bpf/records.h)."""

    checked: int = 0  # datagrams to peers that had asked: the replies of all servers, not in struct stats
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
    healed_overflow: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """An attached program, as the kernel reports it."""

    name: str
    attached: bool
    required: bool  # without it, the agent is not ready
    reattached: int  # times that the agent attached it again
    run_seconds: float  # 0 unless the sysctl kernel.bpf_stats_enabled is 1
    runs: int
    instructions: int  # that the verifier walked
    reason: str = ""  # why it is not attached
    how: str = ""  # "fentry" or "kprobe", of a function probe
    missed: int = 0  # runs that the kernel skipped


@dataclass(frozen=True, slots=True)
class ConntrackHealth:
    """Conntrack's counters in the agent's own namespace, which can explain lost UDP datagrams."""

    entries: int
    limit: int
    insert_failed: int
    dropped: int
    early_dropped: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What a cgroup uses of its memory limit, in bytes."""

    used: int  # without files that the kernel can drop from its cache
    limit: int


#: Faults of the node that the agent counts, beside the losses (udpwatch_events_lost_total), and what each count is.
#: Metrics show each from the start.
NODE_FAULTS = {
    "late_sample": "samples taken more than 5 s after the one before, because the agent got too little CPU",
    "memory": "checks, one every 5 s, that found less than a tenth of the memory limit free",
    "clock_step": "times that the wall clock was set",
    "suspend": "times that the machine was suspended",
}
#: What is there and beyond a limit of the agent, and what is not done for it. Metrics show each from the start.
UNWATCHED = {
    "namespaces": "network namespaces whose conntrack events are not read (--forwarded over netlink)",
    "sockets": "UDP sockets that are not listed among servers",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of the sensor."""

    increases: tuple[Increase, ...]
    counters: Counters
    probes: tuple[Probe, ...]
    tracked_peers: int
    evicted_peers: int
    undecided: int  # suspected replies without a decision
    generation: str = ""  # of the programs that count: with another one, their counters begin at 0
    is_last: bool = False  # of this generation
    #: tenant (records.tenant_of) -> its wrong replies for which the kernel's table of findings had no room
    beyond: dict[int, int] = field(default_factory=dict)
    dropped: int = 0  # events for which the queue for conntrack or for the reader was full
    held_back: int = 0  # events of flows beyond the rate limit
    flows: int = 0  # new UDP flows that were checked
    overruns: int = 0  # times that conntrack's events overran the buffer
    conntrack: ConntrackHealth | None = None
    udp_sent: int | None = None  # datagrams sent in the agent's own namespace, as the kernel counts them
    servers: tuple[ServerCount, ...] = ()
    other_servers: ServerCount | None = None  # the sum of those that the kernel had no room for
    sockets: tuple[UdpSocket, ...] | None = None  # None: they were not read
    unwatched: dict[str, int] = field(default_factory=dict)  # UNWATCHED -> how many
    node_faults: dict[str, int] = field(default_factory=dict)  # NODE_FAULTS -> how many since this process started
    memory: Memory | None = None  # None: no limit


@dataclass(frozen=True, slots=True)
class Row:
    """A finding with its sender and its count, as the agent publishes it."""

    sender: Sender  # the newest one; several processes of one name and container share a row
    port: int
    expected: str
    actual: str
    verdict: str
    cause: str
    family: int
    count: int
    first: float  # seconds since the epoch
    last: float  # seconds since the epoch
    interface: str = ""  # on which a forwarded reply arrived

    @property
    def is_healed(self) -> bool:
        """Whether these replies were healed: they left from the address that was asked."""
        return self.verdict == Verdict.HEALED


@dataclass(frozen=True, slots=True)
class HealSelection:
    """Whose replies the settings tell to heal: those of servers that match everything that is given."""

    all_ports: bool = False
    ports: frozenset[int] = frozenset()
    processes: tuple[str, ...] = ()  # patterns of names; empty: every process
    namespaces: tuple[str, ...] = ()  # patterns of Kubernetes namespaces; empty: every one, and none
    dry_run: bool = False  # only count

    @property
    def by_server(self) -> bool:
        """Whether the selection needs to know the server of a port."""
        return bool(self.processes or self.namespaces)

    @property
    def is_empty(self) -> bool:
        """Whether no server can match."""
        return not self.all_ports and not self.ports

    def __str__(self) -> str:
        ports = ", ".join(map(str, sorted(self.ports)))
        words = "all ports" if self.all_ports else f"port{'s' * (len(self.ports) > 1)} {ports}" if ports else "no port"
        if self.processes:
            words += f", process {', '.join(self.processes)}"
        if self.namespaces:
            words += f", namespace {', '.join(self.namespaces)}"
        return words


#: The refusals after which a reply can leave from a wrong address.
HARMFUL_REFUSALS = ("several-addresses", "not-local", "transparent")
#: Why a reply was not healed although its server is to be (enum refusal in bpf/records.h).
REFUSALS = {
    "several-addresses": "the client asked several addresses within the window, or may have",
    "group": "the client asked a multicast or broadcast address; any source is right",
    "link-local": "the client asked a link-local address, or from elsewhere one of loopback",
    "not-local": "the address that was asked is not, or not for long enough, an address of the network namespace",
    "transparent": "the socket has IP_TRANSPARENT set",
}


@dataclass(frozen=True, slots=True)
class Healing:
    """What the agent heals (agent/heal/)."""

    selected: str  # by the settings, in words
    on: bool  # whether the servers that the settings select are healed
    dry_run: bool  # nothing is healed, only counted
    ports_on: tuple[int, ...] = ()  # switched on since the start
    ports_off: tuple[int, ...] = ()  # switched off since the start
    reason: str = ""  # why nothing can be healed
    namespaces: int = 0  # network namespaces that are healed
    not_healed: tuple[str, ...] = ()  # selected servers' namespaces that are not healed, and why, one line each
    addresses: int = 0  # local addresses of the healed namespaces
    dry_run_replies: int = 0  # sends that would have been healed without dry_run
    refused: dict[str, int] = field(default_factory=dict)  # REFUSALS -> sends

    def heals(self, port: int) -> bool:
        """Whether replies from a port may be healed."""
        return self.is_active and port not in self.ports_off and (self.on or port in self.ports_on)

    @property
    def is_active(self) -> bool:
        """Whether any replies are healed."""
        return (self.on or bool(self.ports_on)) and not self.dry_run and not self.reason

    @property
    def harmful(self) -> int:
        """Number of sends that were refused, and may have left from a wrong address."""
        return sum(self.refused.get(reason, 0) for reason in HARMFUL_REFUSALS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The agent's published state at one moment."""

    version: str
    kernel: str
    node: str
    mode: str
    started: float  # seconds since the epoch
    time: float  # seconds since the epoch
    ready: bool
    notes: tuple[str, ...]  # what does not work on this machine, one line each
    rows: tuple[Row, ...]
    other: int  # wrong replies for which there was no row
    checked: int
    tracked_peers: int
    evicted_peers: int
    lost: dict[str, int]  # stage -> number of events or replies lost there
    probes: tuple[Probe, ...]
    other_of: dict[str, int] = field(default_factory=dict)  # `other` by namespace; "": none, or unknown
    flows: int = 0  # new UDP flows of conntrack that were checked
    conntrack: ConntrackHealth | None = None
    udp_sent: int | None = None  # datagrams that the agent's own namespace sent, by the kernel's count
    self_test_passed: bool = True
    servers: tuple[Server, ...] = ()
    other_servers: dict[str, ServerTotals] = field(default_factory=dict)  # of those not listed, by namespace
    other_at_risk: dict[str, int] = field(default_factory=dict)  # sockets at risk of those, by namespace
    healing: Healing | None = None  # None: not enabled
    #: healed replies for which there was no row, by namespace; "": none, or unknown
    other_healed: dict[str, int] = field(default_factory=dict)
    node_faults: dict[str, int] = field(default_factory=dict)  # NODE_FAULTS -> how many
    unwatched: dict[str, int] = field(default_factory=dict)  # UNWATCHED -> how many
    memory: Memory | None = None  # None: no limit

    @property
    def wrong_rows(self) -> tuple[Row, ...]:
        """Return the rows of wrong replies."""
        return tuple(row for row in self.rows if not row.is_healed)

    @property
    def healed_rows(self) -> tuple[Row, ...]:
        """Return the rows of healed replies."""
        return tuple(row for row in self.rows if row.is_healed)
