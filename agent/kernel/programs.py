"""The table of BPF programs: the attach point of each one, and what is lost without it.

To add a program, add one function in bpf/ and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from udpwatch.agent.kernel.bpf import AttachType, ProgramType

#: source file -> the maps that the agent reads
MAPS = {
    "sockets.c": {
        "conversations",
        "hash_keys",
        "ingress_next",
        "egress_next",
        "egress_learning_next",
        "findings",
        "findings_held",
        "findings_beyond",
        "all_findings",
        "self_test",
        "events",
        "reported",
        "senders",
        "counters",
        "servers",
        "free_slots",
        "server_counts",
        "servers_held",
        "all_servers",
        "waiting",
    },
    "conntrack.c": {"candidates", "candidates_held", "all_candidates", "senders", "counters"},
    "inventory.c": set(),
    "heal.c": {"heal_ports", "heal_slots", "heal_counts", "local_devices", "egress_healed_next"},
}
#: sources whose programs may outlive the agent (pins.py)
KEPT_SOURCES = ("sockets.c", "inventory.c")
#: maps whose elements begin with a lock (map_types.py)
LOCKED = frozenset({"conversations", "addresses"})
#: maps whose elements belong to sockets
OF_SOCKETS = frozenset({"udp_sockets"})
#: maps that get random numbers before a program is attached
KEYS = frozenset({"hash_keys", "flow_keys"})


@dataclass(frozen=True, slots=True)
class Hook:
    """A hook of the watched cgroup."""

    attach: AttachType
    type: ProgramType = ProgramType.CGROUP_SKB


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel function, and the module that may contain it ("": always built in); probed by fentry or kprobe."""

    name: str
    module: str = ""


@dataclass(frozen=True, slots=True)
class TailCall:
    """Another program continues in this one (bpf_tail_call), through ``map``. The kernel empties the map when no
    process holds it.
    """

    attach: AttachType
    map: str
    type: ProgramType = ProgramType.CGROUP_SKB


@dataclass(frozen=True, slots=True)
class OnDemand:
    """The agent runs the program itself (BPF_PROG_TEST_RUN)."""

    type: ProgramType = ProgramType.SOCKET_FILTER


@dataclass(frozen=True, slots=True)
class Iterator:
    """Reading a descriptor runs the program once for each socket: of a namespace, or of a map."""

    target: str  # the kernel function that describes its context
    map: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """One program of bpf/."""

    name: str  # in metrics, doctor and docs; a function probe has the name of its function
    function: str  # in the source file
    source: str
    place: Hook | Function | TailCall | OnDemand | Iterator
    required: bool = False  # without it, the agent does not start
    without: str = ""  # what is lost without it
    is_for_forwarded: bool = False  # finds forwarded wrong replies: all such programs are attached, or none
    is_for_healing: bool = False  # loaded only if replies are to be healed
    is_for_learning: bool = False  # loaded only while another version's programs still count (handover.py)


SEND_WITHOUT = "events do not show whether PKTINFO was passed"
HOOK_WITHOUT = "the cause is 'unknown' for sockets that are not connected"
BIND_WITHOUT = "sockets that are opened in other namespaces after the start are not listed"
LIST_WITHOUT = "the sockets of servers are listed by sock_diag, which does not tell whether they have PKTINFO set"
HEAL_WITHOUT = "replies are not healed"
FORWARDED_WITHOUT = "wrong replies of machines behind this node are not found"

PROGRAMS = (
    Program("ingress_slow", "ingress_slow", "sockets.c", TailCall(AttachType.CGROUP_INET_INGRESS, "ingress_next")),
    Program("egress_slow", "egress_slow", "sockets.c", TailCall(AttachType.CGROUP_INET_EGRESS, "egress_next")),
    Program(
        "egress_learning_slow",
        "egress_learning_slow",
        "sockets.c",
        TailCall(AttachType.CGROUP_INET_EGRESS, "egress_learning_next"),
        is_for_learning=True,
    ),
    Program(
        "egress_healed",
        "egress_healed",
        "sockets.c",
        TailCall(AttachType.CGROUP_INET_EGRESS, "egress_healed_next"),
        is_for_healing=True,
    ),
    Program("count_waiting", "count_waiting", "sockets.c", OnDemand(ProgramType.CGROUP_SKB)),
    Program("ingress", "ingress", "sockets.c", Hook(AttachType.CGROUP_INET_INGRESS), required=True),
    Program("egress", "egress", "sockets.c", Hook(AttachType.CGROUP_INET_EGRESS), required=True),
    Program(
        "egress_learning",
        "egress_learning",
        "sockets.c",
        Hook(AttachType.CGROUP_INET_EGRESS),
        required=True,
        is_for_learning=True,
    ),
    Program(
        "sendmsg4",
        "sendmsg4",
        "sockets.c",
        Hook(AttachType.CGROUP_UDP4_SENDMSG, ProgramType.CGROUP_SOCK_ADDR),
        without=HOOK_WITHOUT,
    ),
    Program(
        "sendmsg6",
        "sendmsg6",
        "sockets.c",
        Hook(AttachType.CGROUP_UDP6_SENDMSG, ProgramType.CGROUP_SOCK_ADDR),
        without=HOOK_WITHOUT,
    ),
    Program(
        "post_bind4",
        "post_bind4",
        "inventory.c",
        Hook(AttachType.CGROUP_INET4_POST_BIND, ProgramType.CGROUP_SOCK),
        without=BIND_WITHOUT,
    ),
    Program(
        "post_bind6",
        "post_bind6",
        "inventory.c",
        Hook(AttachType.CGROUP_INET6_POST_BIND, ProgramType.CGROUP_SOCK),
        without=BIND_WITHOUT,
    ),
    Program("sockets_here", "sockets_here", "inventory.c", Iterator("bpf_iter_udp"), without=LIST_WITHOUT),
    Program("adopt_sockets", "adopt_sockets", "inventory.c", Iterator("bpf_iter_udp"), without=BIND_WITHOUT),
    Program(
        "noted_sockets",
        "noted_sockets",
        "inventory.c",
        Iterator("bpf_iter_bpf_sk_storage_map", "udp_sockets"),
        without=BIND_WITHOUT,
    ),
    Program(
        "heal4",
        "heal4",
        "heal.c",
        Hook(AttachType.CGROUP_UDP4_SENDMSG, ProgramType.CGROUP_SOCK_ADDR),
        without=HEAL_WITHOUT,
        is_for_healing=True,
    ),
    Program(
        "heal6",
        "heal6",
        "heal.c",
        Hook(AttachType.CGROUP_UDP6_SENDMSG, ProgramType.CGROUP_SOCK_ADDR),
        without=HEAL_WITHOUT,
        is_for_healing=True,
    ),
    Program("udp_sendmsg", "send4", "conntrack.c", Function("udp_sendmsg"), without=SEND_WITHOUT),
    Program("udpv6_sendmsg", "send6", "conntrack.c", Function("udpv6_sendmsg", "ipv6"), without=SEND_WITHOUT),
    Program(
        "__nf_conntrack_confirm",
        "confirm",
        "conntrack.c",
        Function("__nf_conntrack_confirm", "nf_conntrack"),
        without=FORWARDED_WITHOUT,
        is_for_forwarded=True,
    ),
    Program(
        "nf_ct_delete",
        "gone",
        "conntrack.c",
        Function("nf_ct_delete", "nf_conntrack"),
        without=FORWARDED_WITHOUT,
        is_for_forwarded=True,
    ),
    Program("settle", "settle", "conntrack.c", OnDemand(), is_for_forwarded=True),
    Program("add_request", "add_request", "conntrack.c", OnDemand(), is_for_forwarded=True),
)

BY_NAME = {program.name: program for program in PROGRAMS}
#: (program, hook) of each program on a hook of the cgroup
_ALL_HOOKS = tuple((program, program.place) for program in PROGRAMS if isinstance(program.place, Hook))
HOOKS = tuple(each for each in _ALL_HOOKS if not each[0].is_for_healing and not each[0].is_for_learning)
#: the same, of the program that learns
LEARNING_HOOKS = tuple(each for each in _ALL_HOOKS if each[0].is_for_learning)
#: the same, of each program that heals replies on a cgroup hook
HEAL_HOOKS = tuple(each for each in _ALL_HOOKS if each[0].is_for_healing)
#: (program, function) of each function probe
FUNCTIONS = tuple((program, program.place) for program in PROGRAMS if isinstance(program.place, Function))
#: (program, tail call) of each program that continues another one
TAIL_CALLS = tuple((program, program.place) for program in PROGRAMS if isinstance(program.place, TailCall))
#: (program, iterator) of each program that lists sockets
ITERATORS = tuple((program, program.place) for program in PROGRAMS if isinstance(program.place, Iterator))
#: (program, how) of each program that the agent runs itself
ON_DEMAND = tuple((program, program.place) for program in PROGRAMS if isinstance(program.place, OnDemand))
