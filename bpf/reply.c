/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The finding: a UDP reply that leaves from another address than the one its peer asked.
 *
 * Rules
 * 1. The programs only look. Each returns 1 ("let it pass") on every path.
 * 2. Look up first, write only what changed. A known conversation costs one per-CPU array lookup
 *    a packet; the hash is touched once per REFRESH_NS and conversation.
 * 3. `flows` elements are replaced whole, except for the clock in them. A reader that is about to
 *    call a reply wrong looks the element up twice and wants the same answer twice, since the
 *    kernel may hand an element to another key while it is being read.
 * 4. Every wrong reply is counted: in its finding, or in stats.overflow. What cannot be judged is
 *    counted too: stats.unremembered, unparsed, crowded.
 *
 * ingress      after DNAT and defragmentation: remember which local address the peer asked.
 * sendmsg4/6   in udp_sendmsg() and udpv6_sendmsg(): remember whether the sender named its source.
 *              They do not run for the plain sends of a connected socket.
 * egress       after POSTROUTING, before segmentation: judge the source that really leaves.
 */
#include "common.h"
#include "compat.h"
#include "records.h"

/* ---- limits and settings: MAX_PEERS, MAX_FINDINGS, RING_PAGES, WINDOW_NS and EVENTS_PER_SECOND
 * come with the compile, from Limits in agent/kernel/loader.py ---- */

#define CACHE_SLOTS        1024 /* a power of two, per CPU and direction */
#define REFRESH_NS         (WINDOW_NS / 256)
#define IP6_EXTENSIONS     6
#define IP6_FRAGMENT       44 /* RFC 8200, section 4.5 */
#define IP6_AUTHENTICATION 51 /* RFC 4302 */
#define SECOND_NS          1000000000ULL
#define IP4_OFFSET_MASK    0x1fff /* RFC 791: fragment offset */
#define FAMILY_INET6       10
#define FIRST_EPHEMERAL    32768 /* ip_local_port_range's default; clients live above */
#define CT_ESTABLISHED     0     /* IP_CT_ESTABLISHED: original direction of an answered flow */
#define CT_REPLY           3 /* IP_CT_IS_REPLY: ctinfo of this and above is the reply direction */
#define CT_UNTRACKED       7 /* IP_CT_UNTRACKED */
#define CT_INFO_MASK       7ULL /* NFCT_INFOMASK */
#define EEXIST             17

/* ---- maps ---- */

/* The one conversation that a cache slot stands for, and the address in it known to be right.
 * It holds until REFRESH_NS are over or some conversation's addresses change: then the epoch
 * moves on and every slot of every CPU is void. A cache line. */
struct cached {
    struct flow_key key;
    struct address address;
    __u64 seen;
    __u64 epoch;
};

BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, MAX_PEERS);
BPF_PERCPU_ARRAY(asked_cache, struct cached, CACHE_SLOTS);
BPF_PERCPU_ARRAY(right_cache, struct cached, CACHE_SLOTS);
BPF_ARRAY(epochs, __u64, 1);

/* How many conversations were entered in this window and the one before. */
struct crowd {
    __u64 start;
    __u64 count;
    __u64 before;
};

BPF_ARRAY(crowds, struct crowd, 1);
BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
BPF_TABLE("hash", struct finding_key, struct finding, findings, MAX_FINDINGS);
BPF_TABLE("lru_hash", struct told_key, __u64, told, MAX_TOLD);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline struct stats *stats_of_this_cpu(void) {
    int zero = 0;
    return counters.lookup(&zero);
}

/* Atomic although per CPU: a program can be preempted, and interrupted by another run of itself. */
#define COUNT(field, n)                                                                            \
    do {                                                                                           \
        struct stats *stats_ = stats_of_this_cpu();                                                \
        if (stats_)                                                                                \
            __sync_fetch_and_add(&stats_->field, (n));                                             \
    } while (0)

/* ---- packets ---- */

struct packet {
    struct address source, destination;
    __u16 source_port, destination_port;
    __u8 family;
};

static __always_inline int is_extension(__u8 next) {
    /* RFC 8200, section 4: hop-by-hop, routing, destination options */
    return next == 0 || next == 43 || next == 60 || next == IP6_FRAGMENT ||
           next == IP6_AUTHENTICATION;
}

static __always_inline void set_ports(struct packet *packet, const __u16 *ports) {
    packet->source_port = net16(ports[0]);
    packet->destination_port = net16(ports[1]);
}

/* Behind IP options or extension headers. By copy: arithmetic on packet pointers with anything but
 * constants is refused to whom CAP_PERFMON is missing. */
static __always_inline int load_ports(struct __sk_buff *skb, __u32 at, struct packet *packet) {
    __u16 ports[2];
    if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports))) {
        COUNT(unparsed, 1);
        return 0;
    }
    set_ports(packet, ports);
    return 1;
}

/* As `parse`, for an IPv6 packet that begins with the extension header `next`. */
static __always_inline int skip_extensions(struct __sk_buff *skb, __u8 next,
                                           struct packet *packet) {
    __u32 at = 40;
#pragma unroll
    for (int i = 0; i < IP6_EXTENSIONS; i++) {
        __u8 header[4];
        if (!is_extension(next))
            break;
        if (bpf_skb_load_bytes(skb, at, header, sizeof(header))) {
            COUNT(unparsed, 1);
            return 0;
        }
        if (next == IP6_FRAGMENT) {
            if (header[2] || header[3] & 0xf8)
                return 0;
            at += 8;
        } else {
            at += next == IP6_AUTHENTICATION ? (header[1] + 2) * 4 : (header[1] + 1) * 8;
        }
        next = header[0];
    }
    return next == PROTO_UDP ? load_ports(skb, at, packet) : 0;
}

/* 1: `packet` holds a UDP datagram's addresses. 0: something else, or a fragment without ports. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *packet) {
    __u8 *data = (void *)(long)skb->data;
    __u8 *end = (void *)(long)skb->data_end;

    if (data + 28 > end)
        return 0; /* shorter than any UDP datagram */
    if (data[0] >> 4 == 4) {
        if (data[9] != PROTO_UDP || net16(*(__u16 *)(data + 6)) & IP4_OFFSET_MASK)
            return 0;
        packet->family = FAMILY_INET;
        set_ip4(&packet->source, *(__u32 *)(data + 12));
        set_ip4(&packet->destination, *(__u32 *)(data + 16));
        if ((data[0] & 15) == 5) {
            set_ports(packet, (__u16 *)(data + 20));
            KEEP_APART(1);
            return 1;
        }
        return load_ports(skb, (data[0] & 15) * 4, packet);
    }
    if (data[0] >> 4 == 6) {
        __u8 next = data[6];
        if (next != PROTO_UDP && !is_extension(next))
            return 0;
        if (data + 48 > end)
            return 0;
        packet->family = FAMILY_INET6;
        __builtin_memcpy(&packet->source, data + 8, 16);
        __builtin_memcpy(&packet->destination, data + 24, 16);
        if (next == PROTO_UDP) {
            set_ports(packet, (__u16 *)(data + 40));
            KEEP_APART(2);
            return 1;
        }
        return skip_extensions(skb, next, packet);
    }
    return 0;
}

/* Whether a request went to a group: nobody can answer from a multicast or broadcast address.
 * What is a broadcast address only the route knows; where it cannot be read, the frame tells, which
 * is wrong for a device without frames (tun) and for clusters that address each other by
 * broadcast frames. A copy of our own broadcast arrives as PACKET_LOOPBACK. */
static __always_inline int asks_group(struct __sk_buff *skb, const struct packet *packet) {
    if (is_group(&packet->destination, packet->family))
        return 1;
    if (packet->family != FAMILY_INET)
        return 0;
#if HAVE_KERNEL_READ
    int known, group = routed_to_group((__u64)skb, &known);
    if (known)
        return group;
#endif
    return skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_LOOPBACK;
}

/* ---- conversations ---- */

/* RFC 4291, section 2.5.6: a link-local peer is another one on each link. */
static __always_inline int is_link_local(const struct address *address) {
    return (net32(address->word[0]) & 0xffc00000) == 0xfe800000;
}

static __always_inline __u32 slot_of(const struct flow_key *key) {
    __u64 mix = key->scope ^ key->peer.half[0] ^ key->peer.half[1] * 0x9e3779b97f4a7c15ULL ^
                ((__u64)key->peer_port << 16 | key->port);
    return (mix * 0x9e3779b97f4a7c15ULL) >> 48 & (CACHE_SLOTS - 1);
}

static __always_inline int same_key(const struct flow_key *a, const struct flow_key *b) {
    return a->scope == b->scope && same(&a->peer, &b->peer) && a->peer_port == b->peer_port &&
           a->port == b->port && a->link == b->link;
}

static __always_inline __u64 *epoch_counter(void) {
    int zero = 0;
    return epochs.lookup(&zero);
}

static __always_inline __u64 epoch_now(void) {
    __u64 *epoch = epoch_counter();
    return epoch ? READ_ONCE(*epoch) : 0;
}

static __always_inline int is_fresh(const struct cached *cached, const struct flow_key *key,
                                    __u64 now) {
    return now - cached->seen < REFRESH_NS && same_key(&cached->key, key) &&
           cached->epoch == epoch_now();
}

static __always_inline int cached_is(const struct cached *cached, const struct flow_key *key,
                                     const struct address *address, __u64 now) {
    return cached && is_fresh(cached, key, now) && same(&cached->address, address);
}

static __always_inline void cache(struct cached *cached, const struct flow_key *key,
                                  const struct address *address, __u64 now, __u64 epoch) {
    if (!cached)
        return;
    cached->seen = 0;
    cached->key = *key;
    cached->address = *address;
    cached->epoch = epoch;
    WRITE_ONCE(cached->seen, now);
}

/* Volatile, so that the compiler selects among values and never among pointers (see KEEP_APART). */
static __always_inline void load(struct flow *to, const struct flow *from) {
    const volatile __u64 *words = (const volatile __u64 *)from;
#pragma unroll
    for (int i = 0; i < sizeof(*to) / sizeof(__u64); i++)
        ((__u64 *)to)[i] = words[i];
}

static __always_inline int is_asked(const struct asked *asked, const struct address *address) {
    return asked->seen && same(&asked->address, address);
}

static __always_inline void set_asked(struct asked *asked, const struct address *address,
                                      __u64 seen) {
    asked->address = *address;
    asked->seen = seen;
}

/* The clock is coarse: two requests of one tick still have an order. */
static __always_inline __u64 after(__u64 now, __u64 other) {
    return now > other ? now : other + 1;
}

static __always_inline struct crowd *the_crowd(void) {
    int zero = 0;
    return crowds.lookup(&zero);
}

static __always_inline void count_new(__u64 now) {
    struct crowd *crowd = the_crowd();

    COUNT(remembered, 1);
    if (!crowd)
        return;
    if (now - crowd->start > WINDOW_NS) {
        crowd->before = now - crowd->start > 2 * WINDOW_NS ? 0 : crowd->count;
        crowd->count = 0;
        crowd->start = now;
    }
    __sync_fetch_and_add(&crowd->count, 1);
}

/* Whether so many peers come that some are pushed out within the window: then what is remembered
 * of one may be less than it asked. */
static __always_inline int is_crowded(__u64 now) {
    struct crowd *crowd = the_crowd();
    return crowd && now - crowd->start <= 2 * WINDOW_NS &&
           crowd->count + crowd->before >= MAX_PEERS / 2;
}

static __always_inline void next_epoch(void) {
    __u64 *epoch = epoch_counter();
    if (epoch)
        __sync_fetch_and_add(epoch, 1);
}

enum remembering { AGAIN, SINGLE, SEVERAL };

/* One attempt; AGAIN where another CPU changed the same conversation meanwhile. */
static __always_inline enum remembering try_remember(struct flow_key *key,
                                                     const struct address *address, __u64 now) {
    struct flow copy = {};
    struct flow *flow = flows.lookup(key);
    int failed;

    if (!flow) {
        set_asked(&copy.asked[0], address, now);
        failed = flows.insert(key, &copy);
        if (failed == -EEXIST)
            return AGAIN;
        if (failed)
            COUNT(unremembered, 1);
        else
            count_new(now);
        return SINGLE;
    }
    load(&copy, flow);
    __u64 first = copy.asked[0].seen, second = copy.asked[1].seen;
    if (is_asked(&copy.asked[0], address)) {
        if (second > first || now - first >= REFRESH_NS)
            WRITE_ONCE(flow->asked[0].seen, after(now, second));
        KEEP_APART(3);
        return second ? SEVERAL : SINGLE;
    }
    if (is_asked(&copy.asked[1], address)) {
        if (first > second || now - second >= REFRESH_NS)
            WRITE_ONCE(flow->asked[1].seen, after(now, first));
        KEEP_APART(4);
        return SEVERAL;
    }
    if (second > first) {
        set_asked(&copy.asked[0], address, after(now, second));
        KEEP_APART(5);
    } else {
        set_asked(&copy.asked[1], address, after(now, first));
        KEEP_APART(6);
    }
    if (flows.update(key, &copy))
        COUNT(unremembered, 1);
    next_epoch();
    flow = flows.lookup(key);
    if (!flow)
        return SEVERAL;
    load(&copy, flow);
    if (is_asked(&copy.asked[0], address) || is_asked(&copy.asked[1], address))
        return SEVERAL;
    return AGAIN;
}

/* 1: the conversation has a single address and may be cached. With two, their order matters. */
static __always_inline int remember(struct flow_key *key, const struct address *address,
                                    __u64 now) {
#pragma unroll
    for (int attempt = 0; attempt < 3; attempt++) {
        enum remembering done = try_remember(key, address, now);
        if (done != AGAIN)
            return done == SINGLE;
    }
    COUNT(unremembered, 1);
    return 0;
}

/* A group, which is remembered as the address zero, may be answered from any address. */
static __always_inline int answers(const struct address *asked, const struct address *source) {
    return same(asked, source) || (!asked->half[0] && !asked->half[1]);
}

enum judgement { NOT_A_REPLY, RIGHT, WRONG };

/* Judge by addresses alone; for WRONG, `expected` holds the newest address asked. */
static __always_inline enum judgement judge(struct flow_key *key, const struct address *source,
                                            __u64 now, struct address *expected) {
    struct flow copy;
    struct flow *flow = flows.lookup(key);

    if (!flow)
        return NOT_A_REPLY;
    load(&copy, flow);
    __u64 first = copy.asked[0].seen, second = copy.asked[1].seen;
    int has_first = is_remembered(first, now), has_second = is_remembered(second, now);
    if (!has_first && !has_second)
        return NOT_A_REPLY;
    if ((has_first && answers(&copy.asked[0].address, source)) ||
        (has_second && answers(&copy.asked[1].address, source)))
        return RIGHT;
    /* What is over its time is also the older of the two. */
    if (second > first) {
        *expected = copy.asked[1].address;
        KEEP_APART(7);
    } else {
        *expected = copy.asked[0].address;
        KEEP_APART(8);
    }
    return WRONG;
}

/* ---- who sends ---- */

static __always_inline void note_sender(struct bpf_sock_addr *ctx, struct flow_key *key,
                                        int source_named) {
    __u64 now = now_ns(), socket = socket_of_send(ctx);
    __u64 pid_tgid = bpf_get_current_pid_tgid();
    __u32 slot = slot_of(key), index = sender_slot(socket, pid_tgid);
    struct cached *cached = right_cache.lookup(&slot);
    struct sender *sender;

    /* Only a reply can be a wrong reply. Of a link-local peer's link this hook knows nothing, and
     * nothing of a connected socket's peer unless the send names it again. */
    if (key->peer_port && !is_link_local(&key->peer) && (!cached || !is_fresh(cached, key, now))) {
        struct flow *flow = flows.lookup(key);
        if (!flow || (!is_remembered(READ_ONCE(flow->asked[0].seen), now) &&
                      !is_remembered(READ_ONCE(flow->asked[1].seen), now)))
            return;
    }
    sender = senders.lookup(&index);
    if (!sender)
        return;
    __u32 cause = source_named ? CAUSE_EXPLICIT : CAUSE_KERNEL_CHOSEN;
#if KNOW_CURRENT
    if (sender->socket == socket && sender->pid_tgid == pid_tgid && sender->cause == cause)
        return;
#endif
    __u64 noted = sender->socket;
    WRITE_ONCE(sender->socket, 0); /* nobody's while it changes */
    if (sender->pid_tgid != pid_tgid || noted != socket)
        sender->pktinfo = PKTINFO_UNKNOWN; /* else the function probe has said it of this send */
    sender->pid_tgid = pid_tgid;
    sender->cause = cause;
#if !KNOW_CURRENT
    sender->uid = bpf_get_current_uid_gid();
    sender->cgroup = bpf_get_current_cgroup_id();
#if HAVE_SENDER_COMM
    bpf_get_current_comm(sender->comm, COMM_LEN);
#endif
#endif
    WRITE_ONCE(sender->socket, socket);
}

/* ---- the finding ---- */

/* Datagrams in one packet of UDP_SEGMENT. */
static __always_inline __u32 segments_of(struct __sk_buff *skb) {
    return skb->gso_segs ? skb->gso_segs : 1;
}

struct identity {
    __u32 tgid, uid, pktinfo;
};

static __always_inline int leaves_from_own(struct bpf_sock *sk, const struct address *source,
                                           __u8 family) {
    /* Volatile: the verifier wants each member of a socket read at an offset of its own. */
    __u32 own4 = READ_ONCE(sk->src_ip4), own[4];
    own[0] = READ_ONCE(sk->src_ip6[0]);
    own[1] = READ_ONCE(sk->src_ip6[1]);
    own[2] = READ_ONCE(sk->src_ip6[2]);
    own[3] = READ_ONCE(sk->src_ip6[3]);
    if (family == FAMILY_INET)
        return source->word[3] == own4;
    return source->word[0] == own[0] && source->word[1] == own[1] && source->word[2] == own[2] &&
           source->word[3] == own[3];
}

/* Who sends, into key->cause, key->cgroup, key->comm and the identity. */
static __always_inline struct identity identify(struct __sk_buff *skb, struct bpf_sock *sk,
                                                struct finding_key *key) {
    /* Egress runs in the sender's context: nothing between udp_sendmsg() and here defers, unless
     * a rule sends the packet through a user-space queue. */
    __u64 socket = socket_of_skb(skb), pid_tgid = current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid), cause = CAUSE_UNKNOWN;
    struct sender *sender = senders.lookup(&index);
    struct identity who = {};

#if KNOW_CURRENT
    if (sender && READ_ONCE(sender->socket) == socket && sender->pid_tgid == pid_tgid) {
        cause = sender->cause;
        who.pktinfo = sender->pktinfo;
    }
    who.tgid = pid_tgid >> 32;
    who.uid = current_uid();
    key->cgroup = current_cgroup(skb);
    current_comm(key->comm);
#else
    key->cgroup = bpf_skb_cgroup_id(skb);
    if (sender && READ_ONCE(sender->socket) == socket) {
        cause = sender->cause;
        who.tgid = sender->pid_tgid >> 32;
        who.uid = sender->uid;
        key->cgroup = sender->cgroup;
        __builtin_memcpy(key->comm, sender->comm, COMM_LEN);
        if (READ_ONCE(sender->socket) != socket)
            cause = CAUSE_UNKNOWN; /* another socket took the slot meanwhile */
    }
#endif
    /* The sendmsg hooks do not run for most sends of a connected socket: what is noted is old. */
    if (sk->state == BPF_TCP_ESTABLISHED &&
        (cause != CAUSE_EXPLICIT || leaves_from_own(sk, &key->actual, key->family)))
        cause = CAUSE_CONNECTED;
    key->cause = cause;
    return who;
}

/* The element of `findings` for a key, made if it is new; NULL where there is no room. */
static __always_inline struct finding *finding_of(struct finding_key *key) {
    struct finding none = {};
    struct finding *finding = findings.lookup(key);
    if (finding)
        return finding;
    findings.insert(key, &none); /* another CPU may have been faster: that is as good */
    return findings.lookup(key);
}

static __always_inline void send_event(struct __sk_buff *skb, const struct packet *packet,
                                       const struct finding_key *key, struct finding *finding,
                                       struct identity who, __u64 now, __u64 tracked) {
    if (now - finding->second >= SECOND_NS) {
        finding->second = now;
        finding->in_second = 0;
    }
    if (finding->in_second >= EVENTS_PER_SECOND) {
        COUNT(rate_limited, 1);
        return;
    }
    __sync_fetch_and_add(&finding->in_second, 1);
    struct event *event = events.ringbuf_reserve(sizeof(*event));
    if (!event) {
        COUNT(ring_full, 1);
        return;
    }
    event->key = *key;
    event->time = now;
    event->count = finding->count;
    event->peer = packet->destination;
    event->peer_port = packet->destination_port;
    event->segments = segments_of(skb);
    event->tgid = who.tgid;
    event->uid = who.uid;
    event->pktinfo = who.pktinfo;
    event->pad = 0;
    event->netns_inode = 0;
    __builtin_memset(event->original, 0, TUPLE_LEN);
    __builtin_memset(event->reply, 0, TUPLE_LEN);
#if HAVE_KERNEL_READ
    if (tracked) {
        copy_from_kernel(event->original, TUPLE_LEN, (void *)(tracked + OFFSET_TUPLE_ORIGINAL));
        copy_from_kernel(event->reply, TUPLE_LEN, (void *)(tracked + OFFSET_TUPLE_REPLY));
    }
    event->netns_inode = read_netns_inode(skb);
#endif
    events.ringbuf_submit(event, 0);
}

/* Remember this datagram as a socket's finding, for those who watch conntrack's entries. */
static __always_inline void tell(const struct packet *packet, __u64 now) {
#if TELL
    struct told_key key = {};

    key.source = packet->source;
    key.peer = packet->destination;
    key.source_port = packet->source_port;
    key.peer_port = packet->destination_port;
    __u64 *seen = told.lookup(&key);
    if (seen)
        WRITE_ONCE(*seen, now);
    else
        told.update(&key, &now);
#endif
}

#if HAVE_KERNEL_READ
/* The source of a tracked packet before NAT touched it. */
static __always_inline void read_original_source(__u64 tracked, __u8 family, struct address *to) {
    __u64 tuple = tracked + OFFSET_TUPLE_ORIGINAL;
    if (family == FAMILY_INET) {
        set_ip4(to, read_kernel32(tuple));
    } else {
        to->half[0] = read_kernel(tuple);
        to->half[1] = read_kernel(tuple + 8);
    }
}
#endif

/* The source is not among the asked addresses, or its port is not the socket's; key->expected is
 * filled in. This path may be slow. */
static __always_inline void suspect(struct __sk_buff *skb, struct bpf_sock *sk,
                                    const struct packet *packet, struct flow_key *flow,
                                    struct finding_key *key, __u64 now) {
    __u64 tracked = 0;

    key->verdict = VERDICT_UNKNOWN;
#if HAVE_KERNEL_READ
    __u64 nfct = read_kernel((__u64)skb + OFFSET_SKB_NFCT);
    __u64 info = nfct & CT_INFO_MASK;
    if (info != CT_UNTRACKED)
        tracked = nfct & ~CT_INFO_MASK;
    if (tracked) {
        struct address source = {}, ignored = {};
        if (info >= CT_REPLY)
            return; /* NAT turned the source back: the peer gets what it asked */
        if (info == CT_ESTABLISHED) {
            /* A conversation of our own making, which source NAT gives another address. */
            read_original_source(tracked, packet->family, &source);
            if (judge(flow, &source, now, &ignored) != WRONG)
                return;
        }
        key->verdict = VERDICT_NEW;
    } else {
        if (same(&key->expected, &packet->source))
            return; /* only the port differs, and no conntrack that could have done it */
        if (is_crowded(now)) {
            COUNT(crowded, segments_of(skb));
            return;
        }
        key->verdict = VERDICT_UNTRACKED;
    }
    key->netns = netns_of(flow->scope, skb);
#else
    key->netns = netns_of(flow->scope, skb);
    key->flow.peer = packet->destination;
    key->flow.peer_port = packet->destination_port;
    key->flow.source_port = packet->source_port;
#endif
    key->actual = packet->source;
    key->port = sk->src_port;
    key->family = packet->family;
    struct identity who = identify(skb, sk, key);

    COUNT(wrong, segments_of(skb));
    tell(packet, now);
    struct finding *finding = finding_of(key);
    if (!finding) {
        COUNT(overflow, segments_of(skb));
        return;
    }
    __sync_fetch_and_add(&finding->count, segments_of(skb));
    finding->last = now;
    finding->tgid = who.tgid;
    send_event(skb, packet, key, finding, who, now, tracked);
}

/* ---- entry points ---- */

int ingress(struct __sk_buff *skb) {
    struct packet packet = {};
    struct flow_key key = {};
    struct address asked = {};

    if (!parse(skb, &packet))
        return 1;
    struct bpf_sock *sk = skb->sk;
    if (!sk)
        return 1;
    key.scope = scope_of_skb(skb);
    key.peer = packet.source;
    key.peer_port = packet.source_port;
    key.port = packet.destination_port;
    if (is_link_local(&key.peer))
        key.link = skb->ifindex;
    __u64 now = now_ns(), epoch = epoch_now();
    __u32 slot = slot_of(&key);
    struct cached *cached = asked_cache.lookup(&slot);
    if (cached_is(cached, &key, &packet.destination, now))
        return 1;
    /* A client's connected socket receives answers to what it asked: nothing to remember, and
     * there are many of them. */
    if (sk->state == BPF_TCP_ESTABLISHED && key.port >= FIRST_EPHEMERAL && !flows.lookup(&key))
        return 1;
    if (!asks_group(skb, &packet))
        asked = packet.destination;
    if (remember(&key, &asked, now))
        cache(cached, &key, &packet.destination, now, epoch);
    return 1;
}

int egress(struct __sk_buff *skb) {
    struct packet packet = {};
    struct flow_key key = {};
    struct finding_key finding = {};

    if (!parse(skb, &packet))
        return 1;
    struct bpf_sock *sk = skb->sk;
    if (!sk)
        return 1;
    /* The socket's own port, not the packet's: NAT may have rewritten that one by now. */
    key.scope = scope_of_skb(skb);
    key.peer = packet.destination;
    key.peer_port = packet.destination_port;
    key.port = sk->src_port;
    if (is_link_local(&key.peer))
        key.link = skb->ifindex;
    int port_kept = packet.source_port == key.port;
    __u64 now = now_ns();
    __u32 slot = slot_of(&key);
    struct cached *cached = right_cache.lookup(&slot);
    if (!port_kept || !cached_is(cached, &key, &packet.source, now)) {
        __u64 epoch = epoch_now(); /* before the look: a change meanwhile voids what is cached */
        enum judgement judgement = judge(&key, &packet.source, now, &finding.expected);
        if (judgement == NOT_A_REPLY)
            return 1;
        if (judgement == RIGHT && port_kept)
            cache(cached, &key, &packet.source, now, epoch);
        else if (judgement == RIGHT)
            finding.expected = packet.source;
        if (!port_kept ||
            (judgement == WRONG && judge(&key, &packet.source, now, &finding.expected) == WRONG))
            suspect(skb, sk, &packet, &key, &finding, now);
    }
    COUNT(checked, segments_of(skb));
    return 1;
}

int sendmsg4(struct bpf_sock_addr *ctx) {
    struct flow_key key = {};

    if (!ctx->sk)
        return 1;
    key.scope = scope_of_send(ctx);
    set_ip4(&key.peer, ctx->user_ip4);
    key.peer_port = net16(ctx->user_port);
    key.port = ctx->sk->src_port;
    note_sender(ctx, &key, ctx->msg_src_ip4 != 0);
    return 1;
}

int sendmsg6(struct bpf_sock_addr *ctx) {
    struct flow_key key = {};

    if (!ctx->sk)
        return 1;
    key.scope = scope_of_send(ctx);
    key.peer.word[0] = ctx->user_ip6[0];
    key.peer.word[1] = ctx->user_ip6[1];
    key.peer.word[2] = ctx->user_ip6[2];
    key.peer.word[3] = ctx->user_ip6[3];
    key.peer_port = net16(ctx->user_port);
    key.port = ctx->sk->src_port;
    note_sender(ctx, &key,
                ctx->msg_src_ip6[0] || ctx->msg_src_ip6[1] || ctx->msg_src_ip6[2] ||
                    ctx->msg_src_ip6[3]);
    return 1;
}
