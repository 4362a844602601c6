/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel programs store and send to the agent. agent/kernel/records.py mirrors each struct
 * that the agent reads; its unit test compiles this file and compares sizes and offsets.
 *
 * An address always has 16 bytes in network order. IPv4 addresses are mapped to ::ffff:a.b.c.d (RFC
 * 4291, section 2.5.5.2), so the same code serves IPv4, IPv6 and IPv4-mapped sockets. Ports are in
 * host order. Times are nanoseconds of CLOCK_MONOTONIC; the table of conversations and its
 * evictions use ticks times TICK_NS instead (compat.h).
 */
#ifndef UDPWATCH_RECORDS_H
#define UDPWATCH_RECORDS_H

#define COMM_LEN     16
#define SENDER_SLOTS 4096 /* a power of two; also the number of struct socket_causes */
#define TUPLE_LEN    40   /* struct nf_conntrack_tuple, up to and including dst.dir */
#define HASH_WORDS   12
#define WAYS         8 /* conversations in a set */

#define FINGERPRINT_WAYS 6 /* together with `lost` one cache line */
#define LOST_WORDS       2
#define TENANT_CLASSES   80
#define CLASSES_A_WORD   40
#define CLASS_BITS       7
#define TIME_BITS        24 /* in ticks of about a millisecond */
#define TIME_SHIFT       20

/* Addresses in a set, all of which one conversation may use. The verifier limits their number;
 * without CAP_PERFMON it also follows each loop speculatively. */
#if HAVE_KERNEL_READ
#define ADDRESS_WAYS 64
#else
#define ADDRESS_WAYS 16
#endif

enum verdict {
    VERDICT_NEW = 1,       /* conntrack created a new entry for the reply */
    VERDICT_UNTRACKED = 2, /* no conntrack on this path */
    VERDICT_UNKNOWN = 3,   /* not readable: user space asks conntrack before it reports the reply */
    VERDICT_HEALED = 4,    /* no wrong reply: heal.c set the source that the peer asked */
};

enum cause {
    CAUSE_KERNEL_CHOSEN = 1, /* wildcard socket, no PKTINFO: routing chose the source */
    CAUSE_EXPLICIT = 2,      /* the application named this source (bind or PKTINFO) */
    CAUSE_CONNECTED = 3,     /* connect() chose the source */
    CAUSE_UNKNOWN = 4,       /* no sendmsg hook, or the send named no destination */
    CAUSE_FORWARDED = 5, /* the reply of a machine behind this node, found in its conntrack flow */
};

/* Whether a send passed IP_PKTINFO or IPV6_PKTINFO; only function probes see it. */
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

/* The identity of a conversation on this node. The table stores its keyed hash, the tag. */
struct conversation_key {
    __u64 scope; /* cookie of the network namespace, or of the socket (see compat.h) */
    struct address peer;
    __u16 peer_port;
    __u16 port; /* of the local socket */
    __u32 link; /* interface index of a link-local peer, else 0 */
};

/* Random numbers, set before the programs are attached. An attacker who does not know them cannot
 * choose peers whose conversations share one set. */
struct hash_keys {
    __u32 word[HASH_WORDS];
};

/* The owner of a share of a table: a server port of a network namespace. */
struct tenant {
    __u32 scope; /* the lower half of conversation_key.scope */
    __u16 port;
    __u16 flags; /* of the conversation */
};

#define SEVERAL          1 /* it asked several addresses, which are in `addresses` */
#define WRONGLY_ANSWERED 2 /* its pending request was answered wrongly */
#define HEAVY            4 /* its tenant had lost many requests when it was added */
#define CLIENTS          8 /* its last request came to a connected socket: usually a reply */
#define SLOT_SHIFT       4 /* the other bits are the slot of its server in `server_counts` */
#define SLOT_MASK        0xfff0

/* A request is pending while `asked` is later than `answered`, for one window at most. The peer
 * then waits, and `answered` is the time just before its wait began. */
struct conversation {
    struct address address; /* the last one asked; zero: a group, which any source may answer */
    __u64 asked;            /* 0: this way is free */
    __u64 answered;         /* If SEVERAL: the time when the address last changed */
    struct tenant tenant;
};

/* The tags are adjacent, so a lookup touches one or two cache lines. */
struct conversation_set {
    __u32 lock; /* struct bpf_spin_lock: see agent/kernel/locks.py */
    __u32 pad;
    __u64 tag[WAYS];
    struct conversation way[WAYS];
};

/* One address of a conversation with several. The rank of a pending request is its time; an
 * answered one ranks one window earlier. The lowest rank is evicted. */
struct asked_address {
    __u64 tag;  /* of the conversation */
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

/* Fingerprints of requests that were evicted within the window. A way holds a fingerprint of
 * conversation and address (33 bits; the lowest is always 1), the class of the tenant (7 bits) and
 * the time. Each word of `lost` tells for 40 classes whether one of their fingerprints was
 * overwritten, and the time of the last one. */
struct fingerprint_set {
    __u64 lost[LOST_WORDS];
    __u64 way[FINGERPRINT_WAYS];
};

/* The evictions of one tenant within the window. */
struct eviction {
    __u64 since;   /* when `count` began */
    __u64 count;   /* of pending requests */
    __u64 last;    /* time of the last fingerprint */
    __u64 pending; /* time of the last request that was not answered rightly */
    __u64 several; /* time of the last conversation with several addresses */
};

/* A server: a port of a network namespace, and the address that its socket is bound to. */
struct server_key {
    __u64 scope;          /* like conversation_key.scope */
    struct address bound; /* zero: every address */
    __u16 port;
    __u16 pad[3];
};

#define NO_SERVER     0 /* the slot of sockets that are no server's */
#define OTHER_SERVERS 1 /* the slot of servers for which there is no other */
#define FIRST_SLOT    2

struct server {
    __u64 cgroup; /* of the socket that got its first request */
    __u32 netns;  /* inode number, 0: unknown */
    __u32 slot;
};

/* What count_waiting counts, by slot. The last two members are used in slot NO_SERVER only. */
struct waiting {
    __u32 count;    /* peers that wait for a datagram */
    __u32 peers;    /* peers with a request within the window, of all servers */
    __u32 next_set; /* the set of conversations that the next run counts */
    __u32 pad;
};

/* What a server did, per CPU. A wait begins with a peer's request and ends with a datagram to it;
 * further requests and datagrams of the same wait are counted as `repeated` and `further`. */
struct server_counts {
    __u64 requests;
    __u64 repeated;
    __u64 replies;
    __u64 further;
    __u64 named;  /* when the members below were noted; 0: never */
    __u64 cgroup; /* of a process that sent a reply */
    __u32 tgid;
    __u32 pad;
    char comm[COMM_LEN];
};

/* The self-test: the agent's own reply, by which it checks that the programs see packets. It is
 * counted and is not a finding. */
struct self_test {
    __u64 netns; /* like finding_key.netns; 0: any, if the kernel has no namespace cookies */
    __u16 port;  /* 0: no self-test is running */
    __u16 peer_port;
    __u32 pad;
};

/* Whether a send named its source: written by the sendmsg hooks and the function probes, read on
 * egress. It identifies the sender only if egress cannot do that itself (compat.h). */
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

/* The cause of the sends of an unconnected socket. If they differed recently, each thread has a
 * struct sender of its own. */
struct socket_cause {
    __u64 socket;
    __u16 cause;    /* of the last send */
    __u16 before;   /* of sends that began before they differed */
    __u32 differed; /* the last time they differed, in ticks; 0: never */
};

/* The sockets of one port: in several namespaces, or with SO_REUSEPORT. One cache line. */
struct socket_causes {
    struct socket_cause way[4];
};

/* One finding: everything that user space distinguishes, and nothing that grows with the clients.
 * `conversation` is set only if the verdict is unknown, because conntrack has to be asked about
 * each one. */
struct finding_key {
    struct address expected;
    struct address actual;
    __u64 netns; /* cookie, else inode number, else 0 (see compat.h) */
    __u64 cgroup;
    char comm[COMM_LEN];
    __u16 port;
    __u8 verdict;
    __u8 cause;
    __u8 family; /* AF_INET or AF_INET6, of the packet */
    __u8 pad[3];
    struct {
        struct address peer;
        __u16 peer_port;
        __u16 source_port; /* when it left, after NAT */
        __u32 pad;
    } conversation;
};

struct finding {
    __u64 count; /* datagrams */
    __u64 began; /* when it was inserted: tells it from an earlier one of the same key */
    __u64 last;
    __u64 second;    /* start of the second that `in_second` counts */
    __u32 in_second; /* events sent in it */
    __u32 tgid;      /* of the latest sender */
};

/* One wrong reply, sent through the ring buffer. */
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
    __u8 reply[TUPLE_LEN];    /* all zero: no entry, or not readable */
    __u32 pktinfo;
    __u32 pad;
};

/* A datagram that is covered by the finding of a local socket. Conntrack also creates a flow for it
 * in each namespace that it passes; those flows are not findings. */
struct reported_key {
    struct address source;
    struct address peer;
    __u16 source_port;
    __u16 peer_port;
    __u32 pad;
};

/* ---- healing (heal.c) ---- */

/* What to do with the replies of a port or server. */
enum healing {
    HEAL_UNSET,   /* nothing is set for it */
    HEAL_DRY_RUN, /* only count what would be healed */
    HEAL_ON,
    HEAL_NEVER, /* not even if all other ports are healed */
};

/* In heal_ports[0]: the mode of all ports that have none of their own, and whether a server in
 * heal_slots has one. */
#define HEAL_MODE      3
#define HEAL_BY_SLOT   4
#define HEAL_THIS_PORT 8 /* never in a map: the mode is the own one of a port (heal.c) */

/* Why a reply of a selected port or server was not healed. */
enum refusal {
    REFUSED_SEVERAL,     /* its peer asked several addresses, or may have (HEAVY) */
    REFUSED_GROUP,       /* its peer asked a group */
    REFUSED_LINK,        /* the address is link-local, or loopback and its peer is elsewhere */
    REFUSED_NOT_LOCAL,   /* the address is not local now, or its device was not found */
    REFUSED_TRANSPARENT, /* the socket has IP_TRANSPARENT set */
    REFUSALS,
};

/* Per-CPU counters of sends. */
struct heal_counts {
    __u64 dry_run; /* those that HEAL_ON would have healed */
    __u64 refused[REFUSALS];
};

/* The address zero: the namespace is healed. */
struct local_key {
    struct address address;
    __u32 netns; /* inode number */
    __u32 pad;
};

/* A send whose source heal.c has set: egress counts its datagrams. */
struct healed_send {
    __u64 socket; /* 0: none */
    __u64 pid_tgid;
    __u64 tag; /* of the conversation */
    struct address source;
};

/* ---- sockets (inventory.c) ---- */

/* Who bound a socket. Zero: a socket that is older than the agent. */
struct socket_owner {
    __u64 cgroup;
    __u32 tgid;
    __u32 pad;
    char comm[COMM_LEN];
};

/* In `options` of a socket, and for all but HAS_IPV6ONLY in `known`: whether it could be read. */
#define HAS_PKTINFO       1 /* IP_PKTINFO */
#define HAS_PKTINFO6      2 /* IPV6_RECVPKTINFO */
#define HAS_REUSEPORT     4
#define HAS_TRANSPARENT   8
#define HAS_NAMED         16 /* bind() named the port */
#define HAS_IPV6ONLY      32
#define KNOWN_PKTINFO     HAS_PKTINFO
#define KNOWN_PKTINFO6    HAS_PKTINFO6
#define KNOWN_REUSEPORT   HAS_REUSEPORT
#define KNOWN_TRANSPARENT HAS_TRANSPARENT
#define KNOWN_NAMED       HAS_NAMED

/* One UDP socket, as an iterator writes it. */
struct socket_record {
    __u64 cookie; /* 0: it has none yet */
    __u64 inode;  /* of its file; 0: none */
    __u64 cgroup; /* 0: unknown */
    struct address bound;
    struct address peer; /* zero: not connected */
    __u32 netns;         /* inode number */
    __u32 device;        /* interface index it is bound to, else 0 */
    __u32 uid;
    __u32 queue; /* bytes in its receive buffer */
    __u32 queue_limit;
    __u32 drops;
    __u32 tgid;
    __u16 port;
    __u16 peer_port;
    __u16 family;
    __u8 options;
    __u8 known;
    __u32 pad;
    char comm[COMM_LEN];
};

/* ---- conntrack's flows (conntrack.c) ---- */

/* In `final` of a candidate: the entry is gone, and the other bits are its last status. */
#define ENTRY_GONE 0x80000000

/* A client, as the server sees it: the reply direction of the request's entry. */
struct request_key {
    struct address client;
    __u32 netns; /* inode number */
    __u16 client_port;
    __u16 port; /* of the server */
    __u16 zone;
    __u16 pad[3];
};

struct request {
    struct address server; /* zero: a group, which any source may answer */
    __u64 seen;            /* 0: unused */
    __u64 entry; /* address of its struct nf_conn; 0: it comes from a dump, so conntrack has to be
                    asked */
    __u64 final; /* last status of an entry that is gone: final_of() in requests.h */
};

/* The last two servers that a client asked, from one port at one port. The table has no lock,
 * because these programs may not take one. A reader checks that one writer wrote all that it
 * copied. */
struct requests {
    struct request asked[2];
    struct tenant tenant;
    __u64 check;
};

struct request_set {
    __u64 tag[WAYS]; /* of request_key; 0: free */
    struct requests way[WAYS];
};

/* A request from a dump of conntrack: the "packet" on which user space runs `add_request`. */
struct dumped_request {
    struct request_key key;
    struct address server;
    __u64 seen;
};

/* A new flow that mirrors an unanswered one. If both are still unanswered some seconds later, it
 * was a wrong reply. */
struct candidate {
    struct request_key key;
    struct request request;
    struct address actual;
    __u64 time;
    __u64 cgroup;
    __u8 asking[TUPLE_LEN]; /* original direction of the request's entry; zero: unknown */
    __u8 original[TUPLE_LEN];
    __u8 reply[TUPLE_LEN];
    char interface[COMM_LEN]; /* the incoming interface; IFNAMSIZ has the same length */
    char comm[COMM_LEN];      /* from here to `uid`: of a local sender */
    __u32 tgid;
    __u32 uid;
    __u32 final;   /* with ENTRY_GONE */
    __u32 ingress; /* index of `interface` */
    __u8 family;
    __u8 cause;
    __u8 pktinfo;
    __u8 pad[5];
};

/* The results of `settle`. */
enum settled {
    SETTLED_NONE = 0, /* the candidate does not exist */
    SETTLED_WRONG = 1,
    SETTLED_ANSWERED = 2,  /* one of the two flows was answered: not a wrong reply */
    SETTLED_ASK = 3,       /* the request is from a dump: conntrack has to be asked */
    SETTLED_UNDECIDED = 4, /* an entry vanished unseen */
};

/* Per-CPU counters; user space adds the CPUs up. */
struct stats {
    __u64 wrong;        /* wrong replies (verdict unknown: suspected replies) */
    __u64 remembered;   /* new conversations */
    __u64 unremembered; /* clients whose entry in `requests` another CPU overwrote */
    __u64 overflow; /* wrong replies without room in `findings` or in the share of their tenant */
    __u64 rate_limited; /* events above the limit of their finding */
    __u64 ring_full;    /* events without room in the ring buffer */
    __u64 unparsed;     /* unreadable UDP headers */
    __u64 undecided; /* datagrams that may answer an evicted request, or may continue a conversation
                        of this host while a request of the peer is pending */
    __u64 evicted;   /* requests evicted within the window */
    __u64 flows;     /* new UDP flows of conntrack */
    __u64 candidates;      /* of these, candidates for which there was no room */
    __u64 self_tests;      /* right replies of the self-test */
    __u64 healed_overflow; /* healed datagrams without room in `findings` */
};

#endif
