/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel programs keep and send up. agent/kernel/records.py mirrors each struct
 * that the agent reads; tests/unit/test_records.py compiles this file and compares sizes and
 * offsets.
 *
 * An address is always 16 bytes in network order; IPv4 stands in it as ::ffff:a.b.c.d
 * (RFC 4291, section 2.5.5.2), so that one logic serves IPv4, IPv6 and IPv4-mapped sockets.
 * Ports are in host order. Times are nanoseconds of CLOCK_MONOTONIC, but in the table of
 * conversations and in what it evicted, where they are ticks times TICK_NS (compat.h).
 */
#ifndef UDPWATCH_RECORDS_H
#define UDPWATCH_RECORDS_H

#define COMM_LEN     16
#define SENDER_SLOTS 4096 /* a power of two; of struct socket_causes as well */
#define TUPLE_LEN    40   /* struct nf_conntrack_tuple, up to and including dst.dir */
#define HASH_WORDS   12
#define WAYS         8 /* conversations in a set */

#define FINGERPRINT_WAYS 6 /* with `lost` a cache line */
#define LOST_WORDS       2
#define TENANT_CLASSES   80
#define CLASSES_A_WORD   40
#define CLASS_BITS       7
#define TIME_BITS        24 /* of ticks of about a millisecond */
#define TIME_SHIFT       20

/* Addresses in a set, all of which one conversation may take: as many as the verifier lets us look
 * at. Without CAP_PERFMON it follows each loop speculatively, for good. */
#if HAVE_KERNEL_READ
#define ADDRESS_WAYS 64
#else
#define ADDRESS_WAYS 16
#endif

enum verdict {
    VERDICT_NEW = 1,       /* conntrack booked the reply as a flow of its own */
    VERDICT_UNTRACKED = 2, /* no conntrack on this path */
    VERDICT_UNKNOWN = 3,   /* not readable here: user space asks conntrack before it reports */
};

enum cause {
    CAUSE_KERNEL_CHOSEN = 1, /* wildcard socket, no PKTINFO: routing chose the source */
    CAUSE_EXPLICIT = 2,      /* the application named this source (bind or PKTINFO) */
    CAUSE_CONNECTED = 3,     /* connect() froze the source */
    CAUSE_UNKNOWN = 4,       /* the sendmsg hook is not attached, or named no destination */
    CAUSE_FORWARDED = 5,     /* another machine's: seen from the side, by conntrack's entries */
};

/* Whether a send came with IP_PKTINFO or IPV6_PKTINFO, which only the function probes can tell. */
enum pktinfo {
    PKTINFO_UNKNOWN = 0,
    PKTINFO_NONE = 1,
    PKTINFO_PASSED = 2,
};

struct address {
    union {
        __u32 word[4];
        __u64 half[2];
    };
};

/* All that identifies a conversation, seen from this node. It is kept as its keyed hash, the tag.
 */
struct conversation_key {
    __u64 scope; /* cookie of the network namespace, or of the socket (see compat.h) */
    struct address peer;
    __u16 peer_port;
    __u16 port; /* the local socket's */
    __u32 link; /* interface index, for a link-local peer */
};

/* Random, filled in before the programs are attached: without them nobody can choose peers whose
 * conversations fall into one set. */
struct hash_keys {
    __u32 word[HASH_WORDS];
};

/* Whose conversation it is: a share of the table belongs to each server port of each namespace. */
struct tenant {
    __u32 scope; /* the lower half of conversation_key.scope */
    __u16 port;
    __u16 flags; /* of the conversation */
};

#define SEVERAL          1 /* it asked several addresses: they are in `addresses` */
#define WRONGLY_ANSWERED 2 /* its pending request was answered wrongly */
#define HEAVY            4 /* its tenant had pushed out many of its own when it came */
#define CLIENTS                                                                                    \
    8 /* a connected socket received the last request: an answer to this host, as a rule */

/* A request is pending while `asked` is later than `answered`, for the window at the most. */
struct conversation {
    struct address address; /* the one asked last; zero: a group, which any source may answer */
    __u64 asked;            /* 0: this way is free */
    __u64 answered;         /* 0: not yet. Of SEVERAL: when it last changed its address */
    struct tenant tenant;
};

/* The tags stand together: to look one up touches a cache line or two. */
struct conversation_set {
    __u32 lock; /* struct bpf_spin_lock: see agent/kernel/locks.py */
    __u32 pad;
    __u64 tag[WAYS];
    struct conversation way[WAYS];
};

/* One address of a conversation that asked several. A request is pending while its rank is when it
 * was asked; an answered one ranks a window earlier. The lowest rank makes room. */
struct asked_address {
    __u64 tag;  /* the conversation's */
    __u64 hash; /* of tag and address */
    __u64 asked;
    __u64 rank;
    struct address address;
    struct tenant tenant;
};

struct address_set {
    __u32 lock; /* struct bpf_spin_lock */
    __u32 pad;
    struct asked_address way[ADDRESS_WAYS];
};

/* Requests that had to make room within the window: each way is a fingerprint of
 * conversation and address (33 bits, the lowest one of them always 1), the tenant's class (7 bits)
 * and the time. Each word of `lost` says of 40 classes whether fingerprints of theirs were
 * overwritten, and when that was last. */
struct fingerprint_set {
    __u64 lost[LOST_WORDS];
    __u64 way[FINGERPRINT_WAYS];
};

/* What of a tenant had to make room within the window. */
struct eviction {
    __u64 since;   /* when `count` began */
    __u64 count;   /* of requests that were not answered yet */
    __u64 last;    /* when a request that is in `fingerprints` went */
    __u64 pending; /* when one went that was not answered rightly */
    __u64 several; /* the last conversation that had asked several: more requests than one */
};

/* The agent's own wrong reply, by which it knows that the programs see packets: counted, no
 * finding. */
struct self_test {
    __u64 netns; /* as finding_key.netns; 0: any, where the kernel does not tell a namespace's
                    cookie */
    __u16 port;  /* 0: none is on its way */
    __u16 peer_port;
    __u32 pad;
};

/* Whether a send named its source: written by the sendmsg hooks and the function probes, read on
 * egress. Who sends is in it only where egress cannot tell that by itself (see compat.h). */
struct sender {
    __u64 socket; /* socket_of_*() in compat.h */
    __u64 pid_tgid;
    __u64 cgroup;
    __u32 uid;
    __u32 cause;
    char comm[COMM_LEN];
    __u32 pktinfo;
    __u32 pad;
};

/* The cause of the sends of a socket that is not connected. Where they differed lately, the struct
 * sender of each thread has its own. */
struct socket_cause {
    __u64 socket;
    __u16 cause;    /* of the last send */
    __u16 before;   /* of all sends before they differed: of those that are on their way */
    __u32 differed; /* the last time, in ticks; 0: never */
};

/* The sockets of a port: of several namespaces, or with SO_REUSEPORT. A cache line. */
struct socket_causes {
    struct socket_cause way[4];
};

/* One finding: everything that user space may tell apart, nothing that grows with the clients.
 * Only where the verdict is unknown `conversation` is filled in, so that each one can be looked up.
 */
struct finding_key {
    struct address expected;
    struct address actual;
    __u64 netns; /* cookie, else inode number, else 0 (see compat.h) */
    __u64 cgroup;
    char comm[COMM_LEN];
    __u16 port;
    __u8 verdict;
    __u8 cause;
    __u8 family; /* AF_INET or AF_INET6: the packet's */
    __u8 pad[3];
    struct {
        struct address peer;
        __u16 peer_port;
        __u16 source_port; /* as it left, after NAT */
        __u32 pad;
    } conversation;
};

struct finding {
    __u64 count; /* datagrams */
    __u64 last;
    __u64 second;    /* start of the second that `in_second` counts in */
    __u32 in_second; /* events sent in it */
    __u32 tgid;      /* of the latest sender */
};

/* One wrong reply, sent up through the ring buffer. */
struct event {
    struct finding_key key;
    __u64 time;
    __u64 count; /* of the finding, this reply included */
    struct address peer;
    __u16 peer_port;
    __u16 segments; /* datagrams in this one send (UDP_SEGMENT) */
    __u32 tgid;
    __u32 uid;
    __u32 netns_inode;        /* 0: not readable */
    __u8 original[TUPLE_LEN]; /* struct nf_conntrack_tuple of the packet's own entry */
    __u8 reply[TUPLE_LEN];    /* all zero: none, or not readable */
    __u32 pktinfo;
    __u32 pad;
};

/* A datagram on the wire that a socket of this node answered wrongly with: conntrack will book it
 * in every namespace that it passes, and that is no finding of its own. */
struct reported_key {
    struct address source;
    struct address peer;
    __u16 source_port;
    __u16 peer_port;
    __u32 pad;
};

/* ---- conntrack's flows, seen from the side (conntrack.c) ---- */

#define ENTRY_GONE                                                                                 \
    0x80000000 /* in `final` of a candidate: the entry is gone, the other bits are its last status \
                */

/* Who asked, as the server's side sees it: the reply direction of the request's entry. */
struct request_key {
    struct address client;
    __u32 netns; /* inode number */
    __u16 client_port;
    __u16 port; /* the server's */
    __u16 zone;
    __u16 pad[3];
};

struct request {
    struct address server; /* zero: a group, which any source may answer */
    __u64 seen;            /* 0: this half is free */
    __u64 entry; /* address of its struct nf_conn; 0: read from a dump, conntrack has to be asked */
    __u64 final; /* of an entry that is gone, conntrack.c: final_of() */
};

/* The two servers that a client asked last, from one port at one port. The table has no lock (these
 * programs may take none), so a reader checks that what it copied was written by one writer. */
struct requests {
    struct request asked[2];
    struct tenant tenant;
    __u64 check;
};

struct request_set {
    __u64 tag[WAYS]; /* of request_key; 0: free */
    struct requests way[WAYS];
};

/* A request that was read from a dump: the "packet" that the program `enter` is run with. */
struct dumped_request {
    struct request_key key;
    struct address server;
    __u64 seen;
};

/* A new flow that mirrors an unanswered one. If neither of them has been answered some time later,
 * it was a wrong reply. */
struct candidate {
    struct request_key key;
    struct request request;
    struct address actual;
    __u64 time;
    __u64 cgroup;
    __u8 asking[TUPLE_LEN]; /* original direction of the request's entry; zero: not known */
    __u8 original[TUPLE_LEN];
    __u8 reply[TUPLE_LEN];
    char interface[COMM_LEN]; /* it came in by; IFNAMSIZ is as long */
    char comm[COMM_LEN];      /* and so on: of a local sender */
    __u32 tgid;
    __u32 uid;
    __u32 final;   /* with ENTRY_GONE */
    __u32 ingress; /* index of `interface` */
    __u8 family;
    __u8 cause;
    __u8 pktinfo;
    __u8 pad[5];
};

/* What `settle` returns. */
enum settled {
    SETTLED_NONE = 0, /* there is no such candidate */
    SETTLED_WRONG = 1,
    SETTLED_ANSWERED = 2,  /* one of the two was answered: no wrong reply */
    SETTLED_ASK = 3,       /* the request came from a dump: conntrack has to be asked */
    SETTLED_UNDECIDED = 4, /* an entry went away unseen */
};

/* Per-CPU counters; user space adds the CPUs up. */
struct stats {
    __u64 checked;      /* datagrams sent to a peer that had asked */
    __u64 wrong;        /* of these, wrong replies (verdict unknown: suspected) */
    __u64 remembered;   /* conversations entered */
    __u64 unremembered; /* clients whose entry in `requests` another CPU overwrote */
    __u64 overflow;     /* wrong replies for which `findings`, or the tenant's share, had no room */
    __u64 rate_limited; /* events held back */
    __u64 ring_full;    /* events that the ring buffer had no room for */
    __u64 unparsed;     /* UDP headers that were not readable */
    __u64 undecided;    /* datagrams that may answer an evicted request, or that continue a
                         * conversation of this host while a request of its peer is pending */
    __u64 evicted;      /* requests that had to make room within the window */
    __u64 flows;        /* new UDP flows that conntrack booked */
    __u64 candidates;   /* of these, mirrors for which `candidates` had no room */
    __u64 self_tests;   /* right replies of the agent's own, see struct self_test */
};

#endif
