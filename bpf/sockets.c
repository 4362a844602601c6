/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Find wrong replies: UDP replies whose source differs from the address that the peer asked.
 *
 * Rules
 * 1. The programs only watch. Each returns 1 (accept the packet) on every path.
 * 2. Look up first and write only what changed. A packet of a known conversation costs one hash and
 *    one look at a set. The lock is taken only when a request becomes pending or is answered.
 * 3. A reply needs a request: a datagram to a peer without a pending request is not judged. Each
 *    address that the peer asked within the window is a right source.
 * 4. Every wrong reply is counted: in its finding or in stats.overflow. What cannot be judged is
 *    counted in stats.undecided or stats.unparsed.
 *
 * ingress      after DNAT and defragmentation: note which local address the peer asked.
 * sendmsg4/6   in udp_sendmsg() and udpv6_sendmsg(): note whether the sender named a source. They
 *              do not run for plain sends of a connected socket.
 * egress       after POSTROUTING, before segmentation: judge the source that leaves the node, and
 *              count the replies that heal.c has healed.
 */
#include "causes.h"
#include "common.h"
#include "compat.h"
#include "conversations.h"
#include "judge.h"
#include "packet.h"
#include "records.h"
#include "servers.h"
#include "tracking.h"

/* ---- limits: the compiler gets SETS, ADDRESS_SETS, FINGERPRINT_SETS, MAX_EVICTIONS, MAX_FINDINGS,
 * MAX_TENANTS, RING_PAGES, WINDOW_NS and EVENTS_PER_SECOND from agent/kernel/loader_child.py ----
 */

#define SECOND_NS 1000000000ULL

/* ---- maps ---- */

BPF_ARRAY(conversations, struct conversation_set, SETS);
BPF_ARRAY(addresses, struct address_set, ADDRESS_SETS);
BPF_ARRAY(fingerprints, struct fingerprint_set, FINGERPRINT_SETS);
BPF_TABLE("lru_hash", struct tenant, struct eviction, evictions, MAX_EVICTIONS);
BPF_ARRAY(last_eviction, __u64, 1); /* of any pending request */
BPF_ARRAY(hash_keys, struct hash_keys, 1);
BPF_ARRAY(self_test, struct self_test, 1);
BPF_ARRAY(ephemeral, __u64,
          65536 - FIRST_EPHEMERAL); /* the time of the last request to this port */
BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
#if CAUSE_BY_SOCKET
BPF_ARRAY(socket_causes, struct socket_causes, SENDER_SLOTS);
#endif
BPF_TABLE("hash", struct finding_key, struct finding, findings, MAX_FINDINGS);
/* By tenant (a cgroup, or a namespace of the root cgroup): the number of its findings, which user
 * space corrects at each sample, and the number of its wrong replies without room. */
BPF_TABLE("lru_hash", __u64, __u64, findings_held, MAX_TENANTS);
BPF_TABLE("lru_hash", __u64, __u64, findings_beyond, MAX_TENANTS);
BPF_ARRAY(all_findings, __u64, 1); /* like findings_held, for all tenants together */
BPF_TABLE("lru_hash", struct reported_key, __u64, reported, MAX_REPORTED);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
/* User space fills the queue with the slots that are free: all but NO_SERVER and OTHER_SERVERS.
 * `servers_held` and `all_servers` are like `findings_held` and `all_findings`. */
BPF_TABLE("hash", struct server_key, struct server, servers, SERVERS);
BPF_QUEUE(free_slots, __u32, SERVERS);
BPF_PERCPU_ARRAY(server_counts, struct server_counts, SERVERS);
BPF_TABLE("lru_hash", __u64, __u64, servers_held, MAX_TENANTS);
BPF_ARRAY(all_servers, __u64, 1);
BPF_ARRAY(waiting, struct waiting, SERVERS); /* by slot: the result of count_waiting */
/* The programs that run for each packet are short; the rare paths are programs of their own. Each
 * has its own map, because the kernel does not mix programs of the two hooks in one map (TailCall
 * in agent/kernel/programs.py). */
BPF_PROG_ARRAY(ingress_next, 1);
BPF_PROG_ARRAY(egress_next, 1);
BPF_PROG_ARRAY(egress_learning_next, 1);
#if HEALING
BPF_PROG_ARRAY(egress_healed_next, 1);
BPF_ARRAY(heal_ports, __u8, 65536); /* see heal.c */
BPF_ARRAY(healed_sends, struct healed_send, SENDER_SLOTS);
#endif
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

/* What the programs know about one UDP packet. */
struct subject {
    struct packet packet;
    struct conversation_key key;
    struct bpf_sock *sk;
    struct conversation_set *set;
    __u64 tag, now;
};

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

/* Each namespace uses only a part of the sets, so it cannot evict addresses in other parts. */
static __always_inline struct address_set *addresses_of(__u64 tag, __u32 scope) {
    __u64 first = share_of(mixed(scope), ADDRESS_SETS), other = share_of(tag << 32, ADDRESS_SHARE);
    int index = (first + other) % ADDRESS_SETS;
    return addresses.lookup(&index);
}

static __always_inline struct fingerprint_set *fingerprints_of(__u64 hash) {
    int index = share_of(hash, FINGERPRINT_SETS);
    return fingerprints.lookup(&index);
}

/* Note that a request was evicted within the window, because later replies of its tenant may be
 * undecided. `answered` means that it got a right reply. A request with a wrong reply leaves no
 * fingerprint, because its server does not reply from the address that was asked. */
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
        /* Keep this check apart from the checks of the pointers: the compiler would merge them. */
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

/* Count a datagram to a peer without a conversation: it may be a reply to an evicted request. */
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

/* ---- the sender ---- */

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
    WRITE_ONCE(sender->socket, 0); /* invalid while it changes */
    if (sender->pid_tgid != pid_tgid || noted != socket)
        sender->pktinfo =
            PKTINFO_UNKNOWN; /* otherwise the function probe has set it for this send */
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

/* ---- servers ---- */

/* Return the slot of the server that this socket belongs to. A new server gets one if one is free,
 * and if its tenant holds fewer than are free. */
static __always_inline __u32 slot_of(struct __sk_buff *skb, const struct subject *it) {
    struct server_key key = {};
    struct server fresh = {};
    __u64 zero = 0;
    int first = 0;

    set_server(&key, it->sk, &it->key);
    struct server *known = servers.lookup(&key);
    if (known)
        return known->slot;
    if (!is_servers(skb, it->sk))
        return NO_SERVER;
    fresh.cgroup = bpf_skb_cgroup_id(skb);
#if HAVE_KERNEL_READ
    fresh.netns = read_netns_inode(skb);
#endif
    __u64 tenant = tenant_in(fresh.cgroup, key.scope);
    __u64 *held = servers_held.lookup_or_try_init(&tenant, &zero),
          *all = all_servers.lookup(&first);
    if (!held || !all || *held + *all >= SERVERS - FIRST_SLOT || free_slots.pop(&fresh.slot))
        return OTHER_SERVERS;
    if (servers.insert(&key, &fresh)) { /* another CPU has inserted it, or memory is short */
        free_slots.push(&fresh.slot, 0);
        known = servers.lookup(&key);
        return known ? known->slot : OTHER_SERVERS;
    }
    __sync_fetch_and_add(held, 1);
    __sync_fetch_and_add(all, 1);
    return fresh.slot;
}

static __always_inline void count_requests(__u32 slot, __u64 datagrams, int began) {
    struct server_counts *counts = server_counts.lookup(&slot);

    if (!counts)
        return;
    __sync_fetch_and_add(&counts->requests, datagrams);
    if (datagrams != began)
        __sync_fetch_and_add(&counts->repeated, datagrams - began);
}

/* Count datagrams to a peer that has asked. Egress runs in the sender's context; see `identify`. */
static __always_inline void count_replies(struct __sk_buff *skb, __u32 slot, __u64 datagrams,
                                          int ended, __u64 now) {
    struct server_counts *counts = server_counts.lookup(&slot);

    if (!counts)
        return;
    __sync_fetch_and_add(&counts->replies, datagrams);
    if (datagrams != ended)
        __sync_fetch_and_add(&counts->further, datagrams - ended);
#if KNOW_CURRENT
    if (now - counts->named >= NAME_NS) {
        counts->named = now;
        counts->tgid = current_pid_tgid() >> 32;
        counts->cgroup = current_cgroup(skb);
        current_comm(counts->comm);
    }
#endif
}

/* ---- findings ---- */

struct identity {
    __u32 tgid, uid, pktinfo;
};

/* Fill in key->cause, key->cgroup and key->comm; return the other facts about the sender. */
static __always_inline struct identity identify(struct __sk_buff *skb, struct bpf_sock *sk,
                                                struct finding_key *key) {
    /* Egress runs in the sender's context: the kernel defers nothing between udp_sendmsg() and this
     * hook, unless a rule sends the packet through a user-space queue. */
    __u64 socket = socket_of_skb(skb), pid_tgid = current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid), cause = CAUSE_UNKNOWN;
    struct sender *sender = senders.lookup(&index);
    struct identity identity = {};

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
        identity.pktinfo = sender->pktinfo;
    }
    if (!cause)
        cause = CAUSE_UNKNOWN;
    identity.tgid = pid_tgid >> 32;
    identity.uid = current_uid();
    key->cgroup = current_cgroup(skb);
    current_comm(key->comm);
#else
    key->cgroup = bpf_skb_cgroup_id(skb);
    if (sender && READ_ONCE(sender->socket) == socket) {
        cause = sender->cause;
        identity.tgid = sender->pid_tgid >> 32;
        identity.uid = sender->uid;
        key->cgroup = sender->cgroup;
        __builtin_memcpy(key->comm, sender->comm, COMM_LEN);
        if (READ_ONCE(sender->socket) != socket)
            cause = CAUSE_UNKNOWN; /* another socket took the slot meanwhile */
    }
#endif
    /* The sendmsg hooks do not run for most sends of a connected socket, so the noted cause is old.
     */
    if (sk->state == BPF_TCP_ESTABLISHED &&
        (cause != CAUSE_EXPLICIT || leaves_from_own(sk, &key->actual, key->family)))
        cause = CAUSE_CONNECTED;
    key->cause = cause;
    return identity;
}

/* Return the finding of a key, and create it if it is new; return NULL if there is no room. A
 * tenant may hold as many findings as are free (Choudhury and Hahne, "Dynamic queue length
 * thresholds", 1998). */
static __always_inline struct finding *finding_of(struct finding_key *key, __u64 segments) {
    __u64 tenant = tenant_in(key->cgroup, key->netns), zero = 0;
    int first = 0;
    struct finding *finding = findings.lookup(key);
    if (finding)
        return finding;
    struct finding fresh = {.began = bpf_ktime_get_ns()};
    __u64 *held = findings_held.lookup_or_try_init(&tenant, &zero),
          *all = all_findings.lookup(&first);
    if (held && all && *held + *all < MAX_FINDINGS && !findings.insert(key, &fresh)) {
        __sync_fetch_and_add(held, 1);
        __sync_fetch_and_add(all, 1);
    }
    finding = findings.lookup(key); /* another CPU may have inserted it */
    if (finding)
        return finding;
    if (key->verdict == VERDICT_HEALED) {
        COUNT(healed_overflow, segments);
        return 0;
    }
    COUNT(overflow, segments);
    __u64 *beyond = findings_beyond.lookup_or_try_init(&tenant, &zero);
    if (beyond)
        __sync_fetch_and_add(beyond, segments);
    return 0;
}

static __always_inline void send_event(struct __sk_buff *skb, const struct packet *packet,
                                       const struct finding_key *key, struct finding *finding,
                                       struct identity identity, __u64 now, __u64 tracked) {
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
    event->tgid = identity.tgid;
    event->uid = identity.uid;
    event->pktinfo = identity.pktinfo;
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

/* Note that this datagram is covered by a socket's finding, so that it does not become a finding of
 * its conntrack flow too. */
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

/* Count the datagrams of a finding and send an event. */
static __always_inline void report(struct __sk_buff *skb, const struct packet *packet,
                                   struct finding_key *key, struct identity identity,
                                   __u64 tracked) {
    __u64 time = bpf_ktime_get_ns();
    struct finding *finding = finding_of(key, segments_of(skb));

    if (!finding)
        return;
    __sync_fetch_and_add(&finding->count, segments_of(skb));
    finding->last = time;
    finding->tgid = identity.tgid;
    send_event(skb, packet, key, finding, identity, time, tracked);
}

/* Count a wrong reply and send its event; the caller has set key->expected. */
static __always_inline void report_wrong_reply(struct __sk_buff *skb, struct bpf_sock *sk,
                                               const struct packet *packet,
                                               const struct conversation_key *peer,
                                               struct finding_key *key, enum tracking tracking,
                                               __u64 tracked) {
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
    struct identity identity = identify(skb, sk, key);

    COUNT(wrong, segments_of(skb));
    note_reported(packet, bpf_ktime_get_ns());
    report(skb, packet, key, identity, tracked);
}

#if HEALING
/* Return whether heal.c heals replies of this port. */
static __always_inline int may_be_healed(__u16 port) {
    int at_port = port, any = 0;
    __u8 *own = heal_ports.lookup(&at_port), *all = heal_ports.lookup(&any);

    return (own && *own == HEAL_ON) || (all && *all);
}

/* Count a reply if heal.c has set its source. */
static __always_inline void count_healed(struct __sk_buff *skb, const struct subject *it) {
    struct finding_key key = {};
    __u64 socket = socket_of_skb(skb), pid_tgid = current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid);
    struct healed_send *send = healed_sends.lookup(&index);

    if (!send || READ_ONCE(send->socket) != socket || send->tag != it->tag ||
        (KNOW_CURRENT && send->pid_tgid != pid_tgid))
        return;
    key.expected = send->source;
    WRITE_ONCE(send->socket, 0);
    key.actual = key.expected;
    key.netns = netns_of(it->key.scope, skb);
    key.verdict = VERDICT_HEALED;
    key.port = it->key.port;
    key.family = it->packet.family;
    struct identity identity = identify(skb, it->sk, &key);
    key.cause = CAUSE_KERNEL_CHOSEN;
    report(skb, &it->packet, &key, identity, 0);
}
#endif

/* ---- entry points ---- */

/* Judge a packet that is not right by its addresses alone. This path may be slow.
 * Return whether it is a right reply. If `learning`, report nothing. */
static __always_inline int look_closer(struct __sk_buff *skb, struct bpf_sock *sk,
                                       const struct packet *packet, struct conversation_set *set,
                                       __u64 tag, const struct conversation_key *key, int port_kept,
                                       int learning, __u64 now) {
    struct finding_key finding = {};
    struct address source = packet->source;
    __u32 flags = 0;
    __u64 entry = 0;
    int ended = 0;

    enum tracking tracking = read_entry(skb, packet, &entry, &source);
    if (tracking == IN_REPLY || tracking == BEGUN_HERE)
        port_kept = 1; /* NAT may have changed the port; the peer sees its own */
    enum judgement judgement =
        judge(set, tag, key, &source, port_kept, now, &finding.expected, &flags, &ended);
    if (judgement == NOT_A_REPLY) {
        if (flags & SEVERAL && !learning)
            count_unremembered(skb, key, now); /* its request may have been evicted */
        return 0;
    }
    /* Not a reply, but the request of a client, which sends from another address than the last
     * client on this port. */
    if (judgement == WRONG && flags & CLIENTS && sk->state == BPF_TCP_ESTABLISHED)
        return 0;
    count_replies(skb, flags >> SLOT_SHIFT, segments_of(skb), ended, now);
    if (judgement == RIGHT && is_self_test(key))
        COUNT(self_tests, 1);
    /* In reply direction, NAT restores the address that the peer asked. */
    if (judgement == RIGHT || tracking == IN_REPLY)
        return 1;
    if (learning)
        return 0;
    if (tracking == UNTRACKED && HAVE_KERNEL_READ && same(&finding.expected, &packet->source))
        return 0; /* only the port differs, and no conntrack could have changed it */
    /* The datagram may continue a conversation that this host began and the peer replied to, or it
     * may reply to an evicted request of that peer. */
    if (tracking == BEGUN_HERE ||
        may_have_asked(tag, key, &packet->source, tracking != UNTRACKED, now)) {
        COUNT(undecided, segments_of(skb));
        return 0;
    }
    report_wrong_reply(skb, sk, packet, key, &finding, tracking, entry);
    return 0;
}

/* Clients have many connected sockets with ephemeral ports. Look for a conversation of such a port
 * only if the port got a request within the window, in any namespace. */
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
    /* The times of the port and of its conversation may differ by REFRESH_NS. */
    return asked && !is_remembered(*asked, now - REFRESH_NS);
}

static __always_inline int find_subject(struct __sk_buff *skb, struct subject *to, int outgoing) {
    struct packet *packet = &to->packet;

    if (!parse(skb, packet))
        return 0;
    const struct hash_keys *keys = keys_of_hash();
    to->sk = skb->sk;
    if (!to->sk || !keys)
        return 0;
    /* Use the port of the socket: NAT may have changed the port of the packet. */
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
    __u32 result = ask_again(it.set, it.tag, &it.packet.destination, is_client, it.now);
    enum quick quick = result & QUICK_MASK;
    if (quick == DONE) {
        count_requests(result >> SLOT_SHIFT, segments_of(skb), !(result & CONTINUED));
        note_port(it.key.port, it.now);
        return 1;
    }
    /* A client's connected socket receives replies to its own requests. They are many, and there is
     * nothing to note. */
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
    __u32 slot = slot_of(skb, &it);
    int began = remember(it.set, it.tag, &it.key, &asked, is_client, slot, it.now);
    count_requests(slot, segments_of(skb), began);
    return 1;
}

/* Note and count a reply that is right by its addresses alone, as most are. */
static __always_inline enum quick answer_quickly(struct __sk_buff *skb, const struct subject *it) {
    if (it->packet.source_port != it->key.port)
        return LOOK_CLOSER;
    __u32 result = answer(it->set, it->tag, &it->packet.source, it->now);
    enum quick quick = result & QUICK_MASK;
    if (quick == DONE)
        count_replies(skb, result >> SLOT_SHIFT, segments_of(skb), !(result & CONTINUED), it->now);
    return quick;
}

int egress(struct __sk_buff *skb) {
    struct subject it = {};

    if (!find_subject(skb, &it, 1))
        return 1;
    enum quick quick = answer_quickly(skb, &it);
    if (quick == LOOK_CLOSER)
        egress_next.call(skb, 0);
    if (quick != DONE)
        count_unremembered(skb, &it.key, it.now);
#if HEALING
    if (quick == DONE && may_be_healed(it.key.port))
        egress_healed_next.call(skb, 0);
#endif
    return 1;
}

int egress_slow(struct __sk_buff *skb) {
    struct subject it = {};
    int is_right = 0;

    if (find_subject(skb, &it, 1))
        is_right = look_closer(skb, it.sk, &it.packet, it.set, it.tag, &it.key,
                               it.packet.source_port == it.key.port, 0, it.now);
#if HEALING
    if (is_right && may_be_healed(it.key.port)) /* e.g. NAT has restored another source */
        egress_healed_next.call(skb, 0);
#endif
    return 1;
}

/* While another version's programs still judge and count, these only learn which requests are
 * answered (agent/sources/handover.py). */
int egress_learning(struct __sk_buff *skb) {
    struct subject it = {};

    if (find_subject(skb, &it, 1) && answer_quickly(skb, &it) == LOOK_CLOSER)
        egress_learning_next.call(skb, 0);
    return 1;
}

int egress_learning_slow(struct __sk_buff *skb) {
    struct subject it = {};

    if (find_subject(skb, &it, 1))
        look_closer(skb, it.sk, &it.packet, it.set, it.tag, &it.key,
                    it.packet.source_port == it.key.port, 1, it.now);
    return 1;
}

#if HEALING
int egress_healed(struct __sk_buff *skb) {
    struct subject it = {};

    if (find_subject(skb, &it, 1))
        count_healed(skb, &it);
    return 1;
}
#endif

static __always_inline void count_way(struct waiting *all, const struct conversation *way,
                                      __u64 tag, __u64 now) {
    __u32 flags = way->tenant.flags, slot = flags >> SLOT_SHIFT;

    if (!tag || !is_remembered(way->asked, now))
        return;
    all->peers++;
    struct waiting *of = waiting.lookup(&slot);
    if (of && !(flags & SEVERAL) && is_pending(way))
        of->count++;
}

/* Not attached: user space runs it (BPF_PROG_TEST_RUN) once for each set of conversations, to count
 * those with a request within the window, and those that wait for a reply. */
int count_waiting(struct __sk_buff *skb) {
    int zero = 0;
    __u64 now = now_ns();
    struct waiting *all = waiting.lookup(&zero);

    if (!all)
        return 0;
    int index = all->next_set++;
    struct conversation_set *set = conversations.lookup(&index);
    if (!set)
        return 0;
#define COUNT_WAY(i) count_way(all, &set->way[i], set->tag[i], now);
    EACH_WAY(COUNT_WAY)
    return 0;
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
