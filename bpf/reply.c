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
 * 4. Every wrong reply is counted: in its finding, or in stats.overflow.
 *
 * ingress      after DNAT and defragmentation: remember which local address the peer asked.
 * sendmsg4/6   in udp_sendmsg() and udpv6_sendmsg(): remember who sends, and whether it named its
 *              source. They run for unconnected sends only.
 * egress       after POSTROUTING, before segmentation: judge the source that really leaves.
 */
#include "compat.h"
#include "records.h"

/* ---- limits and settings: MAX_PEERS, MAX_FINDINGS, RING_PAGES, WINDOW_NS and EVENTS_PER_SECOND
 * come with the compile, from agent/kernel/reply.py ---- */

#define CACHE_SLOTS     1024 /* a power of two, per CPU and direction */
#define SENDER_SLOTS    4096 /* a power of two */
#define REFRESH_NS      (WINDOW_NS / 256)
#define IP6_EXTENSIONS  6
#define SECOND_NS       1000000000ULL
#define IP4_OFFSET_MASK 0x1fff /* RFC 791: fragment offset */
#define PROTO_UDP       17
#define FAMILY_INET     2
#define FAMILY_INET6    10
#define CT_REPLY        3    /* IP_CT_IS_REPLY: ctinfo of this and above is the reply direction */
#define CT_UNTRACKED    7    /* IP_CT_UNTRACKED */
#define CT_INFO_MASK    7ULL /* NFCT_INFOMASK */

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
BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
BPF_TABLE("hash", struct finding_key, struct finding, findings, MAX_FINDINGS);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline struct stats *stats_of_this_cpu(void) {
    int zero = 0;
    return counters.lookup(&zero);
}

#define COUNT(field, n)                                                                            \
    do {                                                                                           \
        struct stats *stats_ = stats_of_this_cpu();                                                \
        if (stats_)                                                                                \
            stats_->field += (n);                                                                  \
    } while (0)

/* ---- packets ---- */

struct packet {
    struct address source, destination;
    __u16 source_port, destination_port;
    __u8 family;
};

static __always_inline void set_ip4(struct address *to, __u32 address) {
    to->half[0] = 0;
    to->word[2] = net32(0xffff);
    to->word[3] = address;
}

static __always_inline int same(const struct address *a, const struct address *b) {
    return a->half[0] == b->half[0] && a->half[1] == b->half[1];
}

static __always_inline int is_extension(__u8 next) {
    /* RFC 8200, section 4: hop-by-hop, routing, fragment, destination options; RFC 4302: AH */
    return next == 0 || next == 43 || next == 44 || next == 60 || next == 51;
}

/* 1: `packet` holds a UDP datagram's addresses. 0: something else, or a fragment without ports. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *packet) {
    __u8 *data = (void *)(long)skb->data;
    __u8 *end = (void *)(long)skb->data_end;
    __u8 *udp;

    if (data + 20 > end)
        return 0;
    if (data[0] >> 4 == 4) {
        if (data[9] != PROTO_UDP)
            return 0;
        if (net16(*(__u16 *)(data + 6)) & IP4_OFFSET_MASK)
            return 0;
        packet->family = FAMILY_INET;
        set_ip4(&packet->source, *(__u32 *)(data + 12));
        set_ip4(&packet->destination, *(__u32 *)(data + 16));
        udp = data + (data[0] & 15) * 4;
    } else if (data[0] >> 4 == 6) {
        __u8 next = data[6];
        if (next != PROTO_UDP && !is_extension(next))
            return 0;
        if (data + 40 > end)
            goto unparsed;
        packet->family = FAMILY_INET6;
        __builtin_memcpy(&packet->source, data + 8, 16);
        __builtin_memcpy(&packet->destination, data + 24, 16);
        udp = data + 40;
        if (next != PROTO_UDP) {
#pragma unroll
            for (int i = 0; i < IP6_EXTENSIONS; i++) {
                if (!is_extension(next))
                    break;
                if (udp + 8 > end)
                    goto unparsed;
                if (next == 44 && net16(*(__u16 *)(udp + 2)) & 0xfff8)
                    return 0;
                __u32 length = next == 44 ? 8 : next == 51 ? (udp[1] + 2) * 4 : (udp[1] + 1) * 8;
                next = udp[0];
                udp += length;
            }
            if (next != PROTO_UDP)
                return 0;
        }
    } else {
        return 0;
    }
    if (udp + 8 > end)
        goto unparsed;
    packet->source_port = net16(*(__u16 *)udp);
    packet->destination_port = net16(*(__u16 *)(udp + 2));
    return 1;
unparsed:
    COUNT(unparsed, 1);
    return 0;
}

/* Nobody can answer from a multicast or broadcast address: such a request asks no address.
 * A looped-back copy of our own broadcast arrives as PACKET_LOOPBACK. A multicast frame that
 * carries a unicast packet is a request like any other (clusters are addressed so). */
static __always_inline int asks_one_address(struct __sk_buff *skb, const struct packet *packet) {
    if (skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_LOOPBACK)
        return 0;
    if (packet->family == FAMILY_INET6)
        return (net32(packet->destination.word[0]) >> 24) != 0xff;
    return (net32(packet->destination.word[3]) >> 28) < 14; /* 224/4, 240/4 */
}

/* ---- conversations ---- */

static __always_inline __u32 slot_of(const struct flow_key *key) {
    __u64 mix = key->scope ^ key->peer.half[0] ^ key->peer.half[1] * 0x9e3779b97f4a7c15ULL ^
                ((__u64)key->peer_port << 16 | key->port);
    return (mix * 0x9e3779b97f4a7c15ULL) >> 48 & (CACHE_SLOTS - 1);
}

static __always_inline int same_key(const struct flow_key *a, const struct flow_key *b) {
    return a->scope == b->scope && same(&a->peer, &b->peer) && a->peer_port == b->peer_port &&
           a->port == b->port;
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

static __always_inline int remembered(const struct asked *asked, __u64 now) {
    __u64 seen = READ_ONCE(asked->seen);
    return seen && (now <= seen || now - seen <= WINDOW_NS);
}

/* The index of the newest remembered address, -1 where none is. */
static __always_inline int newest(const struct flow *flow, __u64 now) {
    int first = remembered(&flow->asked[0], now), second = remembered(&flow->asked[1], now);
    if (first && second)
        return flow->asked[1].seen > flow->asked[0].seen;
    return first ? 0 : second ? 1 : -1;
}

/* The clock is coarse: two requests of one tick still have an order. */
static __always_inline __u64 after(__u64 now, const struct asked *other) {
    return now > other->seen ? now : other->seen + 1;
}

static __always_inline void remember(struct flow_key *key, const struct address *address,
                                     __u64 now) {
    struct flow fresh = {};
    struct flow *flow = flows.lookup(key);
    long failed;

    if (!flow) {
        fresh.asked[0].address = *address;
        fresh.asked[0].seen = now;
        failed = flows.update(key, &fresh);
        if (failed)
            COUNT(unremembered, 1);
        else
            COUNT(remembered, 1);
        return;
    }
    int last = flow->asked[1].seen > flow->asked[0].seen;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (flow->asked[i].seen && same(&flow->asked[i].address, address)) {
            if (i != last || now - flow->asked[i].seen >= REFRESH_NS)
                WRITE_ONCE(flow->asked[i].seen, after(now, &flow->asked[!i]));
            return;
        }
    }
    now = after(now, &flow->asked[last]);
    if (last) {
        fresh.asked[1] = flow->asked[1];
        fresh.asked[0].address = *address;
        fresh.asked[0].seen = now;
    } else {
        fresh.asked[0] = flow->asked[0];
        fresh.asked[1].address = *address;
        fresh.asked[1].seen = now;
    }
    if (flows.update(key, &fresh))
        COUNT(unremembered, 1);
    __u64 *epoch = epoch_counter();
    if (epoch)
        __sync_fetch_and_add(epoch, 1);
}

enum judgement { NOT_A_REPLY, RIGHT, WRONG };

/* Judge by addresses alone; for WRONG, `expected` holds the newest address asked. */
static __always_inline enum judgement judge(struct flow_key *key, const struct address *source,
                                            __u64 now, struct address *expected) {
    struct flow *flow = flows.lookup(key);
    if (!flow)
        return NOT_A_REPLY;
    int last = newest(flow, now);
    if (last < 0)
        return NOT_A_REPLY;
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (remembered(&flow->asked[i], now) && same(&flow->asked[i].address, source))
            return RIGHT;
    *expected = last ? flow->asked[1].address : flow->asked[0].address;
    return WRONG;
}

/* ---- who sends ---- */

static __always_inline void note_sender(struct bpf_sock_addr *ctx, struct flow_key *key,
                                        int source_named) {
    __u64 now = now_ns(), socket = bpf_get_socket_cookie(ctx);
    __u32 slot = slot_of(key), index = socket & (SENDER_SLOTS - 1);
    struct cached *cached = right_cache.lookup(&slot);
    struct sender *sender;

    /* Only a reply can be a wrong reply. */
    if (!cached || !is_fresh(cached, key, now)) {
        struct flow *flow = flows.lookup(key);
        if (!flow || newest(flow, now) < 0)
            return;
    }
    sender = senders.lookup(&index);
    if (!sender)
        return;
    __u64 pid_tgid = bpf_get_current_pid_tgid();
    __u32 cause = source_named ? CAUSE_EXPLICIT : CAUSE_KERNEL_CHOSEN;
    if (sender->socket == socket && sender->pid_tgid == pid_tgid && sender->cause == cause)
        return;
    sender->socket = socket;
    sender->pid_tgid = pid_tgid;
    sender->cause = cause;
    sender->uid = bpf_get_current_uid_gid();
    sender->cgroup = bpf_get_current_cgroup_id();
    bpf_get_current_comm(sender->comm, COMM_LEN);
}

/* ---- the finding ---- */

#if HAVE_CONNTRACK
static __always_inline __u64 read_kernel(__u64 address) {
    __u64 value = 0;
    bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
    return value;
}
#endif

static __always_inline void identify(struct __sk_buff *skb, struct bpf_sock *sk,
                                     struct event *event) {
    __u64 socket = bpf_get_socket_cookie(skb);
    __u32 index = socket & (SENDER_SLOTS - 1);
    struct sender *sender = senders.lookup(&index);

    event->key.cause = sk->state == BPF_TCP_ESTABLISHED ? CAUSE_CONNECTED : CAUSE_UNKNOWN;
    if (event->key.cause == CAUSE_UNKNOWN && sender && sender->socket == socket) {
        event->key.cause = sender->cause;
        event->key.cgroup = sender->cgroup;
        event->tgid = sender->pid_tgid >> 32;
        event->uid = sender->uid;
        __builtin_memcpy(event->key.comm, sender->comm, COMM_LEN);
        return;
    }
#if HAVE_CURRENT
    /* This hook runs in the sender's context: nothing between udp_sendmsg() and here defers. */
    event->tgid = bpf_get_current_pid_tgid() >> 32;
    event->uid = bpf_get_current_uid_gid();
    event->key.cgroup = bpf_get_current_cgroup_id();
    bpf_get_current_comm(event->key.comm, COMM_LEN);
#else
    event->key.cgroup = bpf_skb_cgroup_id(skb);
#endif
}

static __always_inline void send_event(struct __sk_buff *skb, struct event *event,
                                       struct finding *finding, __u64 tracked) {
    __u64 now = event->time;

    if (now - finding->second >= SECOND_NS) {
        finding->second = now;
        finding->in_second = 0;
    }
    if (finding->in_second >= EVENTS_PER_SECOND) {
        COUNT(rate_limited, 1);
        return;
    }
    __sync_fetch_and_add(&finding->in_second, 1);
    event->count = finding->count;
#if HAVE_CONNTRACK
    if (tracked) {
        bpf_probe_read_kernel(event->original, TUPLE_LEN,
                              (void *)(tracked + OFFSET_TUPLE_ORIGINAL));
        bpf_probe_read_kernel(event->reply, TUPLE_LEN, (void *)(tracked + OFFSET_TUPLE_REPLY));
    }
    __u64 net = read_kernel(read_kernel((__u64)skb + OFFSET_SKB_SK) + OFFSET_SOCK_NET);
    event->netns_inode = read_kernel(net + OFFSET_NET_INUM);
#endif
    if (events.ringbuf_output(event, sizeof(*event), 0))
        COUNT(ring_full, 1);
}

/* The source is not among the asked addresses. Called rarely: this path may be slow. */
static __always_inline void suspect(struct __sk_buff *skb, struct bpf_sock *sk,
                                    const struct packet *packet, struct event *event) {
    __u64 tracked = 0;
    struct finding *finding, none = {};

    event->key.verdict = VERDICT_UNKNOWN;
#if HAVE_CONNTRACK
    __u64 nfct = read_kernel((__u64)skb + OFFSET_SKB_NFCT);
    __u64 info = nfct & CT_INFO_MASK;
    tracked = nfct & ~CT_INFO_MASK;
    event->key.verdict = VERDICT_UNTRACKED;
    if (tracked && info != CT_UNTRACKED) {
        if (info >= CT_REPLY)
            return; /* NAT turned the source back: the peer gets what it asked */
        event->key.verdict = VERDICT_NEW;
    }
#else
    event->key.flow.peer = packet->destination;
    event->key.flow.peer_port = packet->destination_port;
    event->key.flow.source_port = packet->source_port;
#endif
    event->key.actual = packet->source;
    event->key.port = sk->src_port;
    event->key.family = packet->family;
    event->peer = packet->destination;
    event->peer_port = packet->destination_port;
    event->segments = skb->gso_segs ? skb->gso_segs : 1;
    identify(skb, sk, event);

    COUNT(wrong, event->segments);
    finding = findings.lookup(&event->key);
    if (!finding) {
        findings.insert(&event->key, &none);
        finding = findings.lookup(&event->key);
    }
    if (!finding) {
        COUNT(overflow, event->segments);
        return;
    }
    __sync_fetch_and_add(&finding->count, event->segments);
    finding->last = event->time;
    finding->tgid = event->tgid;
    send_event(skb, event, finding, tracked);
}

/* ---- entry points ---- */

int ingress(struct __sk_buff *skb) {
    struct packet packet = {};
    struct flow_key key = {};

    if (!parse(skb, &packet))
        return 1;
    struct bpf_sock *sk = skb->sk;
    /* A connected socket's source is frozen, and it receives only what was sent to that. */
    if (!sk || sk->state == BPF_TCP_ESTABLISHED || !asks_one_address(skb, &packet))
        return 1;
    key.scope = scope_of(skb);
    key.peer = packet.source;
    key.peer_port = packet.source_port;
    key.port = packet.destination_port;
    __u64 now = now_ns();
    __u32 slot = slot_of(&key);
    struct cached *cached = asked_cache.lookup(&slot);
    if (cached_is(cached, &key, &packet.destination, now))
        return 1;
    remember(&key, &packet.destination, now);
    cache(cached, &key, &packet.destination, now, epoch_now());
    return 1;
}

int egress(struct __sk_buff *skb) {
    struct packet packet = {};
    struct flow_key key = {};
    struct event event = {};

    if (!parse(skb, &packet))
        return 1;
    struct bpf_sock *sk = skb->sk;
    if (!sk)
        return 1;
    /* The socket's own port, not the packet's: NAT may have rewritten that one by now. */
    key.scope = scope_of(skb);
    key.peer = packet.destination;
    key.peer_port = packet.destination_port;
    key.port = sk->src_port;
    __u64 now = now_ns();
    __u32 slot = slot_of(&key);
    struct cached *cached = right_cache.lookup(&slot);
    if (!cached_is(cached, &key, &packet.source, now)) {
        __u64 epoch = epoch_now(); /* before the look: a change meanwhile voids what is cached */
        switch (judge(&key, &packet.source, now, &event.key.expected)) {
        case NOT_A_REPLY:
            return 1;
        case RIGHT:
            cache(cached, &key, &packet.source, now, epoch);
            break;
        case WRONG:
            event.time = now;
            event.key.netns = netns_of(key.scope);
            if (judge(&key, &packet.source, now, &event.key.expected) == WRONG)
                suspect(skb, sk, &packet, &event);
        }
    }
    COUNT(checked, 1);
    return 1;
}

int sendmsg4(struct bpf_sock_addr *ctx) {
    struct flow_key key = {};

    if (!ctx->sk || !ctx->user_port)
        return 1;
    key.scope = scope_of(ctx);
    set_ip4(&key.peer, ctx->user_ip4);
    key.peer_port = net16(ctx->user_port);
    key.port = ctx->sk->src_port;
    note_sender(ctx, &key, ctx->msg_src_ip4 != 0);
    return 1;
}

int sendmsg6(struct bpf_sock_addr *ctx) {
    struct flow_key key = {};

    if (!ctx->sk || !ctx->user_port)
        return 1;
    key.scope = scope_of(ctx);
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
