/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The finding: a UDP reply that leaves from another address than the one its peer asked.
 *
 * Rules
 * 1. The programs only look. Each returns 1 ("let it pass") on every path.
 * 2. Look up first, write only what changed. A packet of a known conversation costs a hash and a
 *    look at one set; the lock is taken where a request becomes pending, or is answered.
 * 3. A reply answers a request: what a socket sends to a peer of which no request is pending is not
 *    judged. Any address that the peer asked within the window is a right source.
 * 4. Every wrong reply is counted: in its finding, or in stats.overflow. What cannot be judged is
 *    counted too: stats.undecided, unparsed.
 *
 * ingress      after DNAT and defragmentation: remember which local address the peer asked.
 * sendmsg4/6   in udp_sendmsg() and udpv6_sendmsg(): remember whether the sender named its source.
 *              They do not run for the plain sends of a connected socket.
 * egress       after POSTROUTING, before segmentation: judge the source that really leaves.
 */
#include "causes.h"
#include "common.h"
#include "compat.h"
#include "conversations.h"
#include "packet.h"
#include "records.h"
#include "tracking.h"

/* ---- limits and settings: SETS, ADDRESS_SETS, FINGERPRINT_SETS, MAX_EVICTIONS, MAX_FINDINGS,
 * MAX_TENANTS, RING_PAGES, WINDOW_NS and EVENTS_PER_SECOND come with the compile, from Limits in
 * agent/kernel/loader.py ---- */

#define SECOND_NS       1000000000ULL
#define ROOT_CGROUP     1ULL         /* the id of the root of cgroup v2 (kernfs) */
#define ROOT_TENANT     (1ULL << 63) /* no cgroup's id: a namespace of the root cgroup's */
#define FIRST_EPHEMERAL 32768        /* ip_local_port_range's default; clients live above */

/* ---- maps ---- */

BPF_ARRAY(conversations, struct conversation_set, SETS);
BPF_ARRAY(addresses, struct address_set, ADDRESS_SETS);
BPF_ARRAY(fingerprints, struct fingerprint_set, FINGERPRINT_SETS);
BPF_TABLE("lru_hash", struct tenant, struct eviction, evictions, MAX_EVICTIONS);
BPF_ARRAY(last_eviction, __u64, 1); /* of a pending request, whoever's it was */
BPF_ARRAY(hash_keys, struct hash_keys, 1);
BPF_ARRAY(self_test, struct self_test, 1);
BPF_ARRAY(ephemeral, __u64, 65536 - FIRST_EPHEMERAL); /* when a conversation of this port asked */
BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
#if CAUSE_BY_SOCKET
BPF_ARRAY(socket_causes, struct socket_causes, SENDER_SLOTS);
#endif
BPF_TABLE("hash", struct finding_key, struct finding, findings, MAX_FINDINGS);
/* Of each tenant, a cgroup or a namespace of the root cgroup's: how many findings it holds, which
 * user space sets right at each reading, and how many wrong replies had no room. */
BPF_TABLE("lru_hash", __u64, __u64, findings_held, MAX_TENANTS);
BPF_TABLE("lru_hash", __u64, __u64, findings_beyond, MAX_TENANTS);
BPF_ARRAY(all_findings, __u64, 1); /* as findings_held, of all tenants */
BPF_TABLE("lru_hash", struct reported_key, __u64, reported, MAX_REPORTED);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
/* What runs for each packet is short; the rest is in programs of its own, one a map, since the
 * kernel keeps programs of the two hooks apart: SLOW in agent/kernel/loader.py. */
BPF_PROG_ARRAY(ingress_next, 1);
BPF_PROG_ARRAY(egress_next, 1);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline struct stats *stats_of_this_cpu(void) {
    int zero = 0;
    return counters.lookup(&zero);
}

static __always_inline void count_unparsed(void) {
    COUNT(unparsed, 1);
}

/* ---- conversations ---- */

static __always_inline const struct hash_keys *keys_of_hash(void) {
    int zero = 0;
    return hash_keys.lookup(&zero);
}

static __always_inline struct conversation_set *set_of(__u64 tag) {
    int index = share_of(tag, SETS);
    return conversations.lookup(&index);
}

/* A namespace has a part of the sets, and can push out no other's addresses elsewhere. */
static __always_inline struct address_set *addresses_of(__u64 tag, __u32 scope) {
    __u64 first = share_of(mixed(scope), ADDRESS_SETS), other = share_of(tag << 32, ADDRESS_SHARE);
    int index = (first + other) % ADDRESS_SETS;
    return addresses.lookup(&index);
}

static __always_inline struct fingerprint_set *fingerprints_of(__u64 hash) {
    int index = share_of(hash, FINGERPRINT_SETS);
    return fingerprints.lookup(&index);
}

static __always_inline void set_tenant(struct tenant *to, const struct conversation_key *key) {
    to->scope = key->scope;
    to->port = key->port;
    to->flags = 0;
}

/* A request had to make room within the window: whoever judges its tenant's replies must know.
 * `answered`: rightly. One that was answered wrongly leaves no fingerprint: a peer that goes on to
 * ask another address is not answered from this one any more. */
static __always_inline void note_eviction(__u64 hash, const struct tenant *of, int answered,
                                          __u64 now) {
    const struct hash_keys *keys = keys_of_hash();
    struct fingerprint_set *set = fingerprints_of(hash);
    struct tenant tenant = *of;
    struct eviction fresh = {};
    int zero = 0, wrongly_answered = of->flags & WRONGLY_ANSWERED && !answered;

    COUNT(evicted, 1);
    tenant.flags = 0;
    if (set && keys) {
        /* Apart from the pointers' checks, which the compiler would make one with it. */
        if (!opaque(wrongly_answered))
            note_fingerprint(set, hash, class_of(keys, &tenant), now);
    }
    __u64 *last = last_eviction.lookup(&zero);
    if (last && !answered && now - *last > REFRESH_NS)
        WRITE_ONCE(*last, now);
    struct eviction *known = evictions.lookup(&tenant);
    if (!known) {
        evictions.insert(&tenant, &fresh);
        known = evictions.lookup(&tenant);
        if (!known)
            return;
    }
    note_loss_of_tenant(known, !answered, wrongly_answered, of->flags & SEVERAL, now);
}

static __always_inline struct eviction *evictions_of(const struct conversation_key *key) {
    struct tenant tenant = {};

    set_tenant(&tenant, key);
    return evictions.lookup(&tenant);
}

static __always_inline int has_lost_many(const struct conversation_key *key, __u64 now) {
    int zero = 0;
    __u64 *last = last_eviction.lookup(&zero);

    if (!last || !is_remembered(*last, now))
        return 0;
    struct eviction *known = evictions_of(key);
    return known && lost_many(known, now);
}

/* Note one request of a conversation that asked several. */
static __always_inline void put_address(struct address_set *set, const struct hash_keys *keys,
                                        __u64 tag, const struct conversation *request, __u64 now) {
    struct asked_address put, evicted;

    put.tag = tag;
    put.hash = request_hash(keys, tag, &request->address);
    put.asked = request->asked;
    put.rank = is_pending(request) ? request->asked : request->asked - WINDOW_NS;
    put.address = request->address;
    put.tenant = request->tenant;
    put.tenant.flags = 0;
    note_address(set, &put, &evicted);
    if (evicted.hash && is_remembered(evicted.asked, now))
        note_eviction(evicted.hash, &evicted.tenant, evicted.rank != evicted.asked, now);
}

/* A conversation asks another address than before, which `known` holds, or has asked several. */
static __always_inline void remember_another(struct conversation_set *set, __u64 tag,
                                             struct conversation *fresh, struct conversation *known,
                                             __u64 now) {
    struct address_set *others = addresses_of(tag, fresh->tenant.scope);
    const struct hash_keys *keys = keys_of_hash();
    __u64 answered = known->answered;
    int was_one = !(known->tenant.flags & SEVERAL);

    if (!others || !keys)
        return;
    fresh->asked = after(now, known->asked);
    if (was_one)
        put_address(others, keys, tag, known, now);
    put_address(others, keys, tag, fresh, now);
    /* Nobody has answered this request before all of it stands there. The other one may have been
     * answered meanwhile. */
    set_newest(set, tag, fresh, now, known);
    if (was_one && !(known->tenant.flags & SEVERAL) && known->answered != answered)
        note_answer(others, request_hash(keys, tag, &known->address));
}

static __always_inline void remember(struct conversation_set *set, __u64 tag,
                                     const struct conversation_key *key,
                                     const struct address *address, int is_client, __u64 now) {
    struct conversation fresh = {}, known = {};
    __u64 evicted = 0;

    fresh.address = *address;
    fresh.asked = now;
    set_tenant(&fresh.tenant, key);
    fresh.tenant.flags = (has_lost_many(key, now) ? HEAVY : 0) | (is_client ? CLIENTS : 0);
    enum remembering done = note_request(set, tag, &fresh, now, &known, &evicted);
    if (done == ANOTHER) {
        remember_another(set, tag, &fresh, &known, now);
    } else if (done == FRESH) {
        COUNT(remembered, 1);
        const struct hash_keys *keys = keys_of_hash();
        if (!keys || !evicted || is_expired(&known, now))
            return;
        int answered = !(known.tenant.flags & SEVERAL) && !is_pending(&known);
        note_eviction(request_hash(keys, evicted, &known.address), &known.tenant, answered, now);
    }
}

/* What a packet answers: the judgement, with the right request marked as answered. */
static __always_inline enum judgement judge(struct conversation_set *set, __u64 tag,
                                            const struct conversation_key *key,
                                            const struct address *source, int port_kept, __u64 now,
                                            struct address *expected, __u32 *flags) {
    struct conversation known = {};
    const struct address group = {};

    enum judgement judgement = judge_one(set, tag, source, port_kept, now, &known);
    /* One that is there no more may have had any number of requests. */
    *flags = known.asked ? known.tenant.flags : SEVERAL;
    if (!(known.tenant.flags & SEVERAL)) {
        *expected = known.address;
        return judgement;
    }
    const struct hash_keys *keys = keys_of_hash();
    struct address_set *others = addresses_of(tag, key->scope);
    if (!keys || !others)
        return NOT_A_REPLY;
    /* A hash is never 0, so from another port no source is right. */
    return judge_several(others, tag, port_kept ? request_hash(keys, tag, source) : 0,
                         request_hash(keys, tag, &group), now, expected);
}

/* Whether a peer may have asked this address within the window although nothing is remembered of
 * it: its server had to make room. Where conntrack booked the packet as new (`tracked`) only what
 * is known to have been asked counts. */
static __always_inline int may_have_asked(__u64 tag, const struct conversation_key *key,
                                          const struct address *source, int tracked, __u64 now) {
    const struct hash_keys *keys = keys_of_hash();
    struct tenant tenant = {};

    if (!keys)
        return 0;
    struct eviction *evicted = evictions_of(key);
    if (evicted && !tracked && is_remembered(evicted->several, now))
        return 1;
    set_tenant(&tenant, key);
    __u64 hash = request_hash(keys, tag, source);
    struct fingerprint_set *set = fingerprints_of(hash);
    int or_lost = evicted && !tracked && is_remembered(evicted->last, now);
    return set && may_have_fingerprint(set, hash, class_of(keys, &tenant), or_lost, now);
}

/* A socket sends to a peer of which nothing is remembered: a reply all the same, if a pending
 * request of its server's had to make room. */
static __always_inline void count_unremembered(struct __sk_buff *skb,
                                               const struct conversation_key *key, __u64 now) {
    int zero = 0;
    __u64 *last = last_eviction.lookup(&zero);

    if (!last || !is_remembered(*last, now))
        return;
    struct eviction *evicted = evictions_of(key);
    if (evicted && is_remembered(evicted->pending, now))
        COUNT(undecided, segments_of(skb));
}

/* ---- who sends ---- */

#if CAUSE_BY_SOCKET
static __always_inline struct socket_causes *causes_of_port(struct bpf_sock *sk) {
    int index = sk->src_port & (SENDER_SLOTS - 1);
    return socket_causes.lookup(&index);
}
#endif

static __always_inline void note_sender(struct bpf_sock_addr *ctx, int source_named) {
    __u64 socket = socket_of_send(ctx);
    __u32 cause = source_named ? CAUSE_EXPLICIT : CAUSE_KERNEL_CHOSEN;
#if CAUSE_BY_SOCKET
    if (ctx->sk->state != BPF_TCP_ESTABLISHED &&
        note_socket(causes_of_port(ctx->sk), socket, cause))
        return;
#endif
    __u64 pid_tgid = bpf_get_current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid);
    struct sender *sender = senders.lookup(&index);

    if (!sender)
        return;
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

struct identity {
    __u32 tgid, uid, pktinfo;
};

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
#if CAUSE_BY_SOCKET
    int alike = 0;
    if (sk->state != BPF_TCP_ESTABLISHED)
        cause = cause_of_socket(causes_of_port(sk), socket, &alike);
#else
    const int alike = 0;
#endif
    if (sender && READ_ONCE(sender->socket) == socket && sender->pid_tgid == pid_tgid) {
        if (!alike)
            cause = sender->cause;
        who.pktinfo = sender->pktinfo;
    }
    if (!cause)
        cause = CAUSE_UNKNOWN;
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

static __always_inline __u64 tenant_of_finding(const struct finding_key *key) {
    return key->cgroup > ROOT_CGROUP ? key->cgroup : key->netns | ROOT_TENANT;
}

/* The element of `findings` for a key, made if it is new; NULL where there is no room. A tenant may
 * hold as many as are free: the more it has, the more it leaves to others (Choudhury and Hahne,
 * "Dynamic queue length thresholds", 1998). */
static __always_inline struct finding *finding_of(struct finding_key *key, __u64 segments) {
    __u64 tenant = tenant_of_finding(key), zero = 0;
    struct finding none = {};
    int first = 0;
    struct finding *finding = findings.lookup(key);
    if (finding)
        return finding;
    __u64 *held = findings_held.lookup_or_try_init(&tenant, &zero),
          *all = all_findings.lookup(&first);
    if (held && all && *held + *all < MAX_FINDINGS && !findings.insert(key, &none)) {
        __sync_fetch_and_add(held, 1);
        __sync_fetch_and_add(all, 1);
    }
    finding = findings.lookup(key); /* another CPU may have been faster: that is as good */
    if (finding)
        return finding;
    __u64 *beyond = findings_beyond.lookup_or_try_init(&tenant, &zero);
    if (beyond)
        __sync_fetch_and_add(beyond, segments);
    return 0;
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
static __always_inline void note_reported(const struct packet *packet, __u64 now) {
#if NOTE_REPORTED
    struct reported_key key = {};

    key.source = packet->source;
    key.peer = packet->destination;
    key.source_port = packet->source_port;
    key.peer_port = packet->destination_port;
    __u64 *seen = reported.lookup(&key);
    if (seen)
        WRITE_ONCE(*seen, now);
    else
        reported.update(&key, &now);
#endif
}

static __always_inline int is_self_test(const struct conversation_key *key) {
    int zero = 0;
    const struct self_test *expected = self_test.lookup(&zero);

    return expected && expected->port && expected->port == key->port &&
           expected->peer_port == key->peer_port &&
           (!HAVE_NETNS_COOKIE || expected->netns == key->scope);
}

/* Count a wrong reply and tell of it; key->expected is filled in. */
static __always_inline void report_wrong_reply(struct __sk_buff *skb, struct bpf_sock *sk,
                                               const struct packet *packet,
                                               const struct conversation_key *peer,
                                               struct finding_key *key, enum tracking tracking,
                                               __u64 tracked) {
    __u64 time = bpf_ktime_get_ns();
#if HAVE_KERNEL_READ
    key->verdict = tracking == UNTRACKED ? VERDICT_UNTRACKED : VERDICT_NEW;
#else
    key->verdict = VERDICT_UNKNOWN;
    key->conversation.peer = packet->destination;
    key->conversation.peer_port = packet->destination_port;
    key->conversation.source_port = packet->source_port;
#endif
    key->netns = netns_of(peer->scope, skb);
    key->actual = packet->source;
    key->port = sk->src_port;
    key->family = packet->family;
    struct identity who = identify(skb, sk, key);

    COUNT(wrong, segments_of(skb));
    note_reported(packet, time);
    struct finding *finding = finding_of(key, segments_of(skb));
    if (!finding) {
        COUNT(overflow, segments_of(skb));
        return;
    }
    __sync_fetch_and_add(&finding->count, segments_of(skb));
    finding->last = time;
    finding->tgid = who.tgid;
    send_event(skb, packet, key, finding, who, time, tracked);
}

/* ---- entry points ---- */

/* Judge what the addresses alone do not show to be right. This path may be slow. */
static __always_inline void look_closer(struct __sk_buff *skb, struct bpf_sock *sk,
                                        const struct packet *packet, struct conversation_set *set,
                                        __u64 tag, const struct conversation_key *key,
                                        int port_kept, __u64 now) {
    struct finding_key finding = {};
    struct address source = packet->source;
    __u32 flags = 0;
    __u64 entry = 0;

    enum tracking tracking = read_entry(skb, packet, &entry, &source);
    if (tracking == IN_REPLY || tracking == BEGUN_HERE)
        port_kept = 1; /* NAT may have changed it; the peer knows */
    enum judgement judgement =
        judge(set, tag, key, &source, port_kept, now, &finding.expected, &flags);
    if (judgement == NOT_A_REPLY) {
        if (flags & SEVERAL)
            count_unremembered(skb, key, now); /* what it answers may have had to make room */
        return;
    }
    /* A client's socket that asks once more, from another address than the last client did. */
    if (judgement == WRONG && flags & CLIENTS && sk->state == BPF_TCP_ESTABLISHED)
        return;
    COUNT(checked, segments_of(skb));
    if (judgement == RIGHT && is_self_test(key))
        COUNT(self_tests, 1);
    /* In reply direction NAT turned the source back: the peer gets what it asked. */
    if (judgement == RIGHT || tracking == IN_REPLY)
        return;
    if (tracking == UNTRACKED && HAVE_KERNEL_READ && same(&finding.expected, &packet->source))
        return; /* only the port differs, and no conntrack that could have done it */
    /* A conversation that this host began and the peer answered may go on, or be where a request is
     * answered. */
    if (tracking == BEGUN_HERE ||
        may_have_asked(tag, key, &packet->source, tracking != UNTRACKED, now)) {
        COUNT(undecided, segments_of(skb));
        return;
    }
    report_wrong_reply(skb, sk, packet, key, &finding, tracking, entry);
}

/* Clients' sockets are connected and have ephemeral ports, and there are many of them: a
 * conversation of such a port is looked for only where one has asked within the window, in any
 * namespace. */
static __always_inline __u64 *asked_at(__u16 port) {
    int index = port - FIRST_EPHEMERAL;
    return port >= FIRST_EPHEMERAL ? ephemeral.lookup(&index) : 0;
}

static __always_inline void note_port(__u16 port, __u64 now) {
    __u64 *asked = asked_at(port);
    if (asked && now - *asked > REFRESH_NS)
        WRITE_ONCE(*asked, now);
}

static __always_inline int is_clients_port(struct bpf_sock *sk, __u16 port, __u64 now) {
    if (port < FIRST_EPHEMERAL || sk->state != BPF_TCP_ESTABLISHED)
        return 0;
    __u64 *asked = asked_at(port);
    /* Its time and that of the conversation may be REFRESH_NS apart. */
    return asked && !is_remembered(*asked, now - REFRESH_NS);
}

/* What a packet of UDP belongs to. */
struct subject {
    struct packet packet;
    struct conversation_key key;
    struct bpf_sock *sk;
    struct conversation_set *set;
    __u64 tag, now;
};

static __always_inline int find_subject(struct __sk_buff *skb, struct subject *to, int outgoing) {
    struct packet *packet = &to->packet;

    if (!parse(skb, packet))
        return 0;
    const struct hash_keys *keys = keys_of_hash();
    to->sk = skb->sk;
    if (!to->sk || !keys)
        return 0;
    /* The socket's own port, not the packet's: NAT may have rewritten that one by now. */
    to->key.port = outgoing ? to->sk->src_port : packet->destination_port;
    to->now = now_ns();
    if (is_clients_port(to->sk, to->key.port, to->now))
        return 0;
    to->key.scope = scope_of_skb(skb);
    to->key.peer = outgoing ? packet->destination : packet->source;
    to->key.peer_port = outgoing ? packet->destination_port : packet->source_port;
    if (is_link_local(&to->key.peer))
        to->key.link = skb->ifindex;
    to->tag = tag_of(keys, &to->key);
    to->set = set_of(to->tag);
    return to->set != 0;
}

int ingress(struct __sk_buff *skb) {
    struct subject it = {};

    if (!find_subject(skb, &it, 0))
        return 1;
    int is_client = it.sk->state == BPF_TCP_ESTABLISHED;
    enum quick quick = ask_again(it.set, it.tag, &it.packet.destination, is_client, it.now);
    if (quick == DONE) {
        note_port(it.key.port, it.now);
        return 1;
    }
    /* A client's connected socket receives answers to what it asked: nothing to remember, and there
     * are many of them. */
    if (quick == UNKNOWN_PEER && is_client && it.key.port >= FIRST_EPHEMERAL)
        return 1;
    ingress_next.call(skb, 0);
    return 1;
}

int ingress_slow(struct __sk_buff *skb) {
    struct subject it = {};
    struct address asked = {};

    if (!find_subject(skb, &it, 0))
        return 1;
    int is_client = it.sk->state == BPF_TCP_ESTABLISHED;
    note_port(it.key.port, it.now);
    if (!asks_group(skb, &it.packet))
        asked = it.packet.destination;
    remember(it.set, it.tag, &it.key, &asked, is_client, it.now);
    return 1;
}

int egress(struct __sk_buff *skb) {
    struct subject it = {};

    if (!find_subject(skb, &it, 1))
        return 1;
    /* Most replies are right, and most of them by their address alone. */
    enum quick quick = LOOK_CLOSER;
    if (it.packet.source_port == it.key.port)
        quick = answer(it.set, it.tag, &it.packet.source, it.now);
    if (quick == LOOK_CLOSER)
        egress_next.call(skb, 0);
    if (quick == DONE)
        COUNT(checked, segments_of(skb));
    else
        count_unremembered(skb, &it.key, it.now);
    return 1;
}

int egress_slow(struct __sk_buff *skb) {
    struct subject it = {};

    if (find_subject(skb, &it, 1))
        look_closer(skb, it.sk, &it.packet, it.set, it.tag, &it.key,
                    it.packet.source_port == it.key.port, it.now);
    return 1;
}

/* Attached to nothing: user space runs it (BPF_PROG_TEST_RUN) to compare times of the table with.
 */
int clock_ticks(struct __sk_buff *skb) {
    return bpf_jiffies64();
}

int sendmsg4(struct bpf_sock_addr *ctx) {
    if (ctx->sk)
        note_sender(ctx, ctx->msg_src_ip4 != 0);
    return 1;
}

int sendmsg6(struct bpf_sock_addr *ctx) {
    if (ctx->sk)
        note_sender(ctx, ctx->msg_src_ip6[0] || ctx->msg_src_ip6[1] || ctx->msg_src_ip6[2] ||
                             ctx->msg_src_ip6[3]);
    return 1;
}
