/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Function probes: find wrong replies of machines behind this node in conntrack's new flows, and
 * learn about senders from udp_sendmsg(). They attach by fentry, or as kprobes, if the
 * kernel allows it.
 *
 * Rules
 * 1. The programs only watch.
 * 2. Conntrack confirms each flow once, so a finding of these programs counts flows.
 * 3. A new flow that mirrors an unanswered flow is only a candidate: two peers that send to
 *    each other look the same at first. `settle` decides some seconds later, when such peers have
 *    replied to each other.
 * 4. Unclear cases are undecided: a client that asked two addresses from one port, an entry that
 *    vanished unseen, a request that may have been evicted.
 *
 * send4/6      udp_sendmsg(), udpv6_sendmsg(): note the sender and whether it passed PKTINFO.
 * confirm      __nf_conntrack_confirm(): note the request of a new flow, and check whether the flow
 *              mirrors another one.
 * gone         nf_ct_delete(): note the last status of an entry.
 * settle       not attached; user space runs it (BPF_PROG_TEST_RUN) to decide one candidate.
 * add_request  not attached; user space runs it to add one request that conntrack knew before the
 *              probes were attached.
 */
#include "common.h"
#include "compat.h"
#include "entries.h"
#include "pktinfo.h"
#include "records.h"
#include "requests.h"
#include "table.h"

/* ---- limits: the compiler gets REQUEST_SETS, MAX_EVICTIONS, MAX_TENANTS, MAX_CANDIDATES,
 * WINDOW_NS and FORWARDED from agent/kernel/loader_child.py. *_ARGUMENT_n is the position of
 * argument n of a function in the context, which differs between fentry and kprobes
 * (agent/kernel/probes.py) ---- */

#define STATE_CONNECTED 1 /* TCP_ESTABLISHED */
/* Fingerprints are one and a half times as many as clients. */
#define FLOW_FINGERPRINT_SETS (2 * REQUEST_SETS)

/* ---- maps; maps of one name are one map: the first three are shared with sockets.c ---- */

BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
#if HAVE_SOCKETS
BPF_TABLE("lru_hash", struct reported_key, __u64, reported, MAX_REPORTED);
#endif
BPF_ARRAY(requests, struct request_set, REQUEST_SETS);
BPF_ARRAY(flow_fingerprints, struct fingerprint_set, FLOW_FINGERPRINT_SETS);
BPF_TABLE("lru_hash", struct tenant, struct eviction, flow_evictions, MAX_EVICTIONS);
BPF_ARRAY(flow_keys, struct hash_keys, 1);
BPF_TABLE("hash", __u64, struct candidate, candidates, MAX_CANDIDATES);
/* By network namespace and incoming interface: the number of waiting candidates, which user space
 * corrects at each sample. */
BPF_TABLE("lru_hash", __u64, __u64, candidates_held, MAX_TENANTS);
BPF_ARRAY(all_candidates, __u64, 1);

/* Variables too large for the stack. The kernel does not run a program again on a CPU where it is
 * already running. */
struct scratch {
    struct candidate candidate;
    struct requests known, evicted;
    struct request_key key;
    struct request asked;
    struct address source;
    struct tuple original, reply;
    struct looked_up entry;
};
BPF_PERCPU_ARRAY(scratch, struct scratch, 2); /* 0: `confirm`; 1: `add_request` and `settle` */

static __always_inline struct stats *stats_of_this_cpu(void) {
    int zero = 0;
    return counters.lookup(&zero);
}

/* ---- the sender ---- */

static __always_inline void note(__u64 socket, int bound, __u64 message) {
    __u64 pid_tgid = bpf_get_current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid), pktinfo;
    struct sender *sender = senders.lookup(&index);

    if (!sender)
        return;
    __u32 cause = names_source(message, &pktinfo) || bound ? CAUSE_EXPLICIT
                  : pktinfo == PKTINFO_UNKNOWN             ? CAUSE_UNKNOWN
                                                           : CAUSE_KERNEL_CHOSEN;
    if (sender->socket == socket && sender->pid_tgid == pid_tgid && sender->cause == cause &&
        sender->pktinfo == pktinfo)
        return;
    WRITE_ONCE(sender->socket, 0); /* invalid while it changes */
    sender->pid_tgid = pid_tgid;
    sender->cause = cause;
    sender->pktinfo = pktinfo;
#if !KNOW_CURRENT
    sender->uid = bpf_get_current_uid_gid();
    sender->cgroup = bpf_get_current_cgroup_id();
    bpf_get_current_comm(sender->comm, COMM_LEN);
#endif
    WRITE_ONCE(sender->socket, socket);
}

int send4(__u64 *ctx) {
    __u64 socket = ctx[SEND4_ARGUMENT_0];
    note(socket, read_kernel32(socket + OFFSET_SOCK_RCV_SADDR) != 0, ctx[SEND4_ARGUMENT_1]);
    return 0;
}

#ifdef OFFSET_SOCK_RCV_SADDR6 /* the kernel has IPv6 */
int send6(__u64 *ctx) {
    __u64 socket = ctx[SEND6_ARGUMENT_0], own = socket + OFFSET_SOCK_RCV_SADDR6;
    note(socket, read_kernel(own) || read_kernel(own + 8), ctx[SEND6_ARGUMENT_1]);
    return 0;
}
#endif

/* ---- the table of requests ---- */

static __always_inline const struct hash_keys *keys_of_hash(void) {
    int zero = 0;
    return flow_keys.lookup(&zero);
}

static __always_inline struct request_set *set_of(__u64 tag) {
    int index = share_of(tag, REQUEST_SETS);
    return requests.lookup(&index);
}

static __always_inline struct fingerprint_set *fingerprints_of(__u64 hash) {
    int index = share_of(hash, FLOW_FINGERPRINT_SETS);
    return flow_fingerprints.lookup(&index);
}

static __always_inline struct eviction *evictions_of(const struct tenant *of) {
    struct tenant tenant = *of;

    tenant.flags = 0;
    return flow_evictions.lookup(&tenant);
}

/* Note that a client was evicted within the window. */
static __always_inline void note_eviction(const struct requests *evicted, __u64 tag,
                                          const struct hash_keys *keys, __u64 now) {
    int is_answered = seems_answered(&evicted->asked[0]) & seems_answered(&evicted->asked[1]);
    __u64 hash = is_answered ? hash_of_answered(tag) : tag;
    struct fingerprint_set *set = fingerprints_of(hash);
    struct tenant tenant = evicted->tenant;
    struct eviction fresh = {};

    COUNT(evicted, 1);
    tenant.flags = 0;
    if (set)
        note_fingerprint(set, hash, class_of(keys, &tenant), now);
    struct eviction *known = flow_evictions.lookup(&tenant);
    if (!known) {
        flow_evictions.insert(&tenant, &fresh);
        known = flow_evictions.lookup(&tenant);
    }
    if (known)
        note_loss_of_tenant(known, !is_answered, 0, 0, now);
}

/* Return whether a request of the client may have been evicted within the window; `hash` is the one
 * of note_eviction. */
static __always_inline int may_be_evicted(const struct hash_keys *keys, __u64 hash,
                                          const struct tenant *tenant, __u64 now) {
    struct eviction *lost = evictions_of(tenant);
    struct fingerprint_set *set = fingerprints_of(hash);

    if (!lost || !set || !is_remembered(lost->last, now))
        return 0;
    return may_have_fingerprint(set, hash, class_of(keys, tenant), 1, now);
}

/* ---- a new flow ---- */

/* Note the server that a client asked. `known` and `evicted` are scratch memory of the caller. */
static __always_inline void remember(const struct hash_keys *keys, const struct request_key *key,
                                     const struct request *asked, __u64 now, struct requests *known,
                                     struct requests *evicted) {
    __u64 tag = tag_of_request(keys, key), evicted_tag = 0;
    struct request_set *set = set_of(tag);
    __u32 way;

    if (!set)
        return;
    enum found found = find_requests(set, tag, known, &way);
    if (found == THERE) {
        struct request *one = &known->asked[0], *other = &known->asked[1];
        if (one->seen && same(&one->server, &asked->server))
            *one = *asked;
        else if (other->seen && same(&other->server, &asked->server))
            *other = *asked;
        else if (one->seen <= other->seen)
            *one = *asked;
        else
            *other = *asked;
    } else {
        __builtin_memset(known, 0, sizeof(*known));
        known->asked[0] = *asked;
        set_tenant(&known->tenant, key);
        struct eviction *lost = evictions_of(&known->tenant);
        if (lost && lost_many(lost, now))
            known->tenant.flags = HEAVY;
        if (found == ABSENT) {
            way = way_to_evict(set, &known->tenant, now);
            if (way >= WAYS)
                return;
            evicted_tag = READ_ONCE(set->tag[way]);
            copy_requests(evicted, &set->way[way]);
        }
    }
    if (!write_requests(set, way, tag, known))
        COUNT(unremembered, 1);
    if (evicted_tag && is_remembered(newest_of(evicted), now))
        note_eviction(evicted, evicted_tag, keys, now);
}

#if !HAVE_SOCKETS
/* Fill in the sender if no cgroup program does: conntrack confirms a packet in the context of its
 * sender. */
static __always_inline void identify(struct candidate *to, __u64 socket) {
    __u64 pid_tgid = bpf_get_current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid);
    struct sender *sender = senders.lookup(&index);

    to->cause = CAUSE_UNKNOWN;
    to->pktinfo = PKTINFO_UNKNOWN;
    if (sender && sender->socket == socket && sender->pid_tgid == pid_tgid) {
        to->cause = sender->cause;
        to->pktinfo = sender->pktinfo;
        if (read_kernel8(socket + OFFSET_SOCK_STATE) == STATE_CONNECTED &&
            sender->pktinfo != PKTINFO_PASSED)
            to->cause = sender->pktinfo == PKTINFO_NONE ? CAUSE_CONNECTED : CAUSE_UNKNOWN;
    }
    to->tgid = pid_tgid >> 32;
    to->uid = bpf_get_current_uid_gid();
    to->cgroup = bpf_get_current_cgroup_id();
    bpf_get_current_comm(to->comm, COMM_LEN);
}
#endif

/* Return whether the finding of a local socket covers this datagram; the program of the socket ran
 * earlier. */
static __always_inline int is_reported(const struct request_key *key, const struct address *source,
                                       __u64 now) {
#if HAVE_SOCKETS
    struct reported_key wire = {};

    wire.source = *source;
    wire.peer = key->client;
    wire.source_port = key->port;
    wire.peer_port = key->client_port;
    __u64 *seen = reported.lookup(&wire);
    return seen && is_remembered(*seen, now);
#else
    return 0;
#endif
}

/* Return the one request that this flow may answer wrongly, else NULL. */
static __always_inline struct request *mirrored(struct scratch *room, __u64 tag,
                                                const struct hash_keys *keys, __u64 now) {
    struct request *newest = &room->known.asked[0], *other = &room->known.asked[1];
    const struct address *source = &room->source;

    if (other->seen > newest->seen) {
        newest = &room->known.asked[1];
        other = &room->known.asked[0];
    }
    /* A server that was asked may reply late or begin a flow of its own. */
    if (same(&newest->server, source) || (other->seen && same(&other->server, source)))
        return 0;
    if (!(newest->server.half[0] | newest->server.half[1])) /* a group */
        return 0;
    if (!is_remembered(newest->seen, now) || is_remembered(other->seen, now))
        return 0;
    if (status_of_request(newest, tag, keys, &room->entry) & SEEN_REPLY)
        return 0;
    return newest;
}

/* Return the request that a new flow seems to answer wrongly, else NULL. */
static __always_inline struct request *judge(struct scratch *room, const struct hash_keys *keys,
                                             __u64 now) {
    const struct request_key *key = &room->key;
    __u64 tag = tag_of_request(keys, key);
    struct request_set *set = set_of(tag);
    struct request *request = 0;
    struct tenant tenant;
    __u32 way;

    if (!set)
        return 0;
    enum found found = find_requests(set, tag, &room->known, &way);
    if (found == THERE)
        request = mirrored(room, tag, keys, now);
    if (found == THERE && !request)
        return 0;
    /* If the client is unknown, its request may have been evicted; if one request is known, another
     * one may have been evicted. */
    set_tenant(&tenant, key);
    if (found == TORN || may_be_evicted(keys, tag, &tenant, now) ||
        (request && may_be_evicted(keys, hash_of_answered(tag), &tenant, now))) {
        COUNT(undecided, 1);
        return 0;
    }
    return request;
}

/* Put a candidate into `candidates`, where it waits for user space. */
static __always_inline void wait_for_decision(struct candidate *candidate, __u64 skb, __u64 entry,
                                              __u32 interface, const struct request *request) {
    candidate->request = *request;
    if (request->entry)
        copy_from_kernel(candidate->asking, TUPLE_LEN,
                         (void *)(request->entry + OFFSET_TUPLE_ORIGINAL));
    if (interface) {
        candidate->cause = CAUSE_FORWARDED;
        read_interface(candidate->interface, net_of(entry), interface);
    }
#if !HAVE_SOCKETS
    else {
        identify(candidate, read_kernel(skb + OFFSET_SKB_SK));
    }
#endif
    /* A tenant may have as many waiting candidates as there is free room. A candidate under the
     * same address belongs to an entry that is gone. */
    __u64 tenant = (__u64)interface << 32 | candidate->key.netns, none = 0;
    int zero = 0;
    __u64 *held = candidates_held.lookup_or_try_init(&tenant, &none);
    __u64 *all = all_candidates.lookup(&zero);
    if (!held || !all || *held + *all >= MAX_CANDIDATES || candidates.insert(&entry, candidate)) {
        COUNT(candidates, 1);
        return;
    }
    __sync_fetch_and_add(held, 1);
    __sync_fetch_and_add(all, 1);
}

/* Return whether a new flow looks like a wrong reply; it then waits as a candidate, unless the
 * finding of a local socket covers it. */
static __always_inline int is_candidate(struct scratch *room, const struct hash_keys *keys,
                                        __u64 skb, __u64 entry, __u64 now) {
    __u32 interface = read_kernel32(skb + OFFSET_SKB_IIF); /* 0: sent by this node */
    struct request_key *key = &room->key;

    if (interface ? !FORWARDED : HAVE_SOCKETS)
        return 0;
    /* This flow goes to the client of the request that it would answer. */
    widen(&room->source, room->original.source, room->original.layer3);
    key->client_port = net16(room->original.destination_port);
    key->port = net16(room->original.source_port);
    key->netns = read_kernel32(net_of(entry) + OFFSET_NET_INUM);
    key->zone = zone_of(entry);
    struct request *request = judge(room, keys, now);
    if (!request)
        return 0;
    if (is_reported(key, &room->source, now))
        return 1;
    struct candidate *candidate = &room->candidate;
    __builtin_memset(candidate, 0, sizeof(*candidate));
    candidate->key = *key;
    candidate->ingress = interface;
    candidate->actual = room->source;
    candidate->time = now;
    candidate->family = room->original.layer3;
    __builtin_memcpy(candidate->original, &room->original, TUPLE_LEN);
    __builtin_memcpy(candidate->reply, &room->reply, TUPLE_LEN);
    wait_for_decision(candidate, skb, entry, interface, request);
    return 1;
}

int confirm(__u64 *ctx) {
    __u64 skb = ctx[CONFIRM_ARGUMENT_0];
    __u64 entry = read_kernel(skb + OFFSET_SKB_NFCT) & ~CT_INFO_MASK;
    const struct hash_keys *keys = keys_of_hash();
    int zero = 0, known_route;
    struct scratch *room = scratch.lookup(&zero);

    if (!entry || !keys || !room)
        return 0;
    read_tuple(&room->original, entry, OFFSET_TUPLE_ORIGINAL);
    if (room->original.protocol != PROTO_UDP)
        return 0;
    COUNT(flows, 1);
    if (status_of(entry) & EXPECTED)
        return 0;
    __u8 family = room->original.layer3;
    __u64 now = bpf_ktime_get_ns(); /* the clock that user space compares it with */
    read_tuple(&room->reply, entry, OFFSET_TUPLE_REPLY);
    __builtin_memset(&room->key, 0, sizeof(room->key));
    widen(&room->key.client, room->original.destination, family);
    int to_group = is_group(&room->key.client, family) ||
                   (family == FAMILY_INET && routed_to_group(skb, &known_route));
    if (!to_group && is_candidate(room, keys, skb, entry, now))
        return 0;
    key_of_flow(&room->key, &room->asked.server, &room->reply, entry);
    if (to_group)
        __builtin_memset(&room->asked.server, 0, sizeof(room->asked.server));
    room->asked.entry = entry;
    room->asked.seen = now;
    room->asked.final = 0;
    remember(keys, &room->key, &room->asked, now, &room->known, &room->evicted);
    return 0;
}

/* ---- the end of a flow ---- */

int gone(__u64 *ctx) {
    struct request_key key = {};
    struct address server = {};
    struct tuple reply;
    __u64 entry = ctx[GONE_ARGUMENT_0];
    const struct hash_keys *keys = keys_of_hash();

    read_tuple(&reply, entry, OFFSET_TUPLE_REPLY);
    if (reply.protocol != PROTO_UDP || !keys)
        return 0;
    __u32 status = status_of(entry);
    struct candidate *candidate = candidates.lookup(&entry);
    if (candidate && !candidate->final)
        candidate->final = status | ENTRY_GONE;
    key_of_flow(&key, &server, &reply, entry);
    __u64 tag = tag_of_request(keys, &key);
    struct request_set *set = set_of(tag);
    if (!set)
        return 0;
    __u32 way = WAYS;
#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        if (READ_ONCE(set->tag[i]) == tag)
            way = i;
    }
    if (way >= WAYS)
        return 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        struct request *request = &set->way[way].asked[i];
        /* Do not compute with `entry` itself: the verifier refuses arithmetic on a pointer argument
         * of fentry. */
        __u64 noted = READ_ONCE(request->entry), final = final_of(opaque(noted), status);
        if (noted == entry)
            WRITE_ONCE(request->final, final);
    }
    return 0;
}

/* ---- the decision ---- */

/* Decide the candidate of the entry whose address is in the "packet"; return an enum settled. */
int settle(struct __sk_buff *skb) {
    struct tuple now;
    __u64 entry;
    const struct hash_keys *keys = keys_of_hash();
    int one = 1;
    struct scratch *room = scratch.lookup(&one);

    if (!keys || !room || bpf_skb_load_bytes(skb, 0, &entry, sizeof(entry)))
        return SETTLED_NONE;
    struct candidate *candidate = candidates.lookup(&entry);
    if (!candidate)
        return SETTLED_NONE;
    __u32 status = candidate->final;
    if (!status) {
        read_tuple(&now, entry, OFFSET_TUPLE_ORIGINAL);
        if (!same_words(&now, candidate->original))
            return SETTLED_UNDECIDED;
        status = status_of(entry);
    }
    if (status & SEEN_REPLY)
        return SETTLED_ANSWERED;

    /* The end of the request's entry is noted in the table of requests. */
    struct request request = candidate->request;
    __u64 tag = tag_of_request(keys, &candidate->key);
    struct request_set *set = set_of(tag);
    __u32 way;
    if (set && request.entry && !is_final(&request) &&
        find_requests(set, tag, &room->known, &way) == THERE) {
        if (room->known.asked[0].entry == request.entry)
            request.final = room->known.asked[0].final;
        else if (room->known.asked[1].entry == request.entry)
            request.final = room->known.asked[1].final;
    }
    if (!request.entry)
        return SETTLED_ASK;
    status = status_of_request(&request, tag, keys, &room->entry);
    if (!status)
        return SETTLED_UNDECIDED;
    return status & SEEN_REPLY ? SETTLED_ANSWERED : SETTLED_WRONG;
}

/* Add a request that conntrack knew before the probes were attached; the "packet" is a struct
 * dumped_request. Requests that a probe saw are newer. */
int add_request(struct __sk_buff *skb) {
    struct dumped_request dumped;
    struct request asked = {};
    const struct hash_keys *keys = keys_of_hash();
    int one = 1;
    struct scratch *room = scratch.lookup(&one);
    __u32 way;

    if (!keys || !room || bpf_skb_load_bytes(skb, 0, &dumped, sizeof(dumped)))
        return 0;
    __u64 tag = tag_of_request(keys, &dumped.key);
    struct request_set *set = set_of(tag);
    if (!set)
        return 0;
    if (find_requests(set, tag, &room->known, &way) == THERE &&
        (room->known.asked[0].entry || room->known.asked[1].entry))
        return 0;
    asked.server = dumped.server;
    asked.seen = dumped.seen;
    remember(keys, &dumped.key, &asked, bpf_ktime_get_ns(), &room->known, &room->evicted);
    return 0;
}
