/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Function probes: wrong replies seen from the side, in the flows that conntrack books, and who
 * sends, told by udp_sendmsg() itself. They are attached where the kernel allows it, by fentry or
 * as kprobes.
 *
 * Rules
 * 1. The programs only look.
 * 2. Conntrack speaks once a flow, when it books it: a finding made here counts flows.
 * 3. What mirrors an unanswered flow is a candidate, no more. Peers that call each other look the
 *    same at first; `settle` decides some time later, when they have answered each other.
 * 4. In doubt nothing is claimed: a client that asked two addresses from one port, an entry that
 *    went away unseen.
 *
 * send4/6      udp_sendmsg(), udpv6_sendmsg(): who sends, and whether with PKTINFO.
 * confirm      __nf_conntrack_confirm(): a new flow; remember whom it asks, see whom it mirrors.
 * gone         nf_ct_delete(): an entry's last status.
 * settle       attached to nothing; run by user space (BPF_PROG_TEST_RUN) on one candidate.
 */
#include "common.h"
#include "compat.h"
#include "records.h"

/* ---- limits and settings: MAX_REQUESTS, MAX_CANDIDATES, WINDOW_NS and FORWARDED come with the
 * compile, from Limits in agent/kernel/loader.py; so do *_ARGUMENT_n, the place of a function's
 * n-th argument in the context, which fentry and kprobes do not share (agent/kernel/probes.py) ----
 */

#define SOL_IP          0
#define SOL_IPV6        41
#define IP_PKTINFO      8
#define IPV6_PKTINFO    50
#define CONTROLS        4 /* control messages looked at */
#define CONTROL_BYTES   16
#define STATE_CONNECTED 1    /* TCP_ESTABLISHED */
#define SEEN_REPLY      0x2  /* IPS_SEEN_REPLY */
#define EXPECTED        0x1  /* IPS_EXPECTED: a helper announced it (FTP, TFTP, SIP) */
#define CT_INFO_MASK    7ULL /* NFCT_INFOMASK */
#define DEVICE_BUCKETS  256  /* NETDEV_HASHENTRIES */
#define DEVICES         8    /* of one bucket looked at */

/* ---- maps; the first three are reply.c's as well: what has the same name is the same map ---- */

BPF_ARRAY(senders, struct sender, SENDER_SLOTS);
BPF_PERCPU_ARRAY(counters, struct stats, 1);
#if HAVE_SOCKETS
BPF_TABLE("lru_hash", struct told_key, __u64, told, MAX_TOLD);
#endif
BPF_TABLE("lru_hash", struct request_key, struct requests, requests, MAX_REQUESTS);
BPF_TABLE("hash", __u64, struct candidate, candidates, MAX_CANDIDATES);
/* Too large for the stack. A program is not run again on a CPU on which it is running. */
BPF_PERCPU_ARRAY(scratch, struct candidate, 1);

static __always_inline struct stats *stats_of_this_cpu(void) {
    int zero = 0;
    return counters.lookup(&zero);
}

#define COUNT(field, n)                                                                            \
    do {                                                                                           \
        struct stats *stats_ = stats_of_this_cpu();                                                \
        if (stats_)                                                                                \
            __sync_fetch_and_add(&stats_->field, (n));                                             \
    } while (0)

/* ---- who sends ---- */

/* Whether one of the control messages is a PKTINFO that names a source (ip(7), RFC 3542). Where
 * there are more than are looked at, and none of these is one, *pktinfo says so. */
static __always_inline int names_source(__u64 message, __u32 *pktinfo) {
    struct {
        __u64 length;
        __u32 level, type;
        __u8 data[CONTROL_BYTES + 8];
    } control;
    __u64 at = read_kernel(message + OFFSET_MSG_CONTROL);
    __u64 left = read_kernel(message + OFFSET_MSG_CONTROLLEN);

    *pktinfo = PKTINFO_NONE;
#pragma unroll
    for (int i = 0; i < CONTROLS; i++) {
        if (!at || left < CONTROL_BYTES)
            return 0;
        copy_from_kernel(&control, sizeof(control), (void *)at);
        if (control.length < CONTROL_BYTES || control.length > left)
            return 0;
        if (control.level == SOL_IP && control.type == IP_PKTINFO) {
            *pktinfo = PKTINFO_PASSED;
            return *(__u32 *)(control.data + 4) != 0; /* ipi_spec_dst */
        }
        if (control.level == SOL_IPV6 && control.type == IPV6_PKTINFO) {
            *pktinfo = PKTINFO_PASSED;
            return *(__u64 *)control.data || *(__u64 *)(control.data + 8); /* ipi6_addr */
        }
        __u64 step = (control.length + 7) & ~7ULL;
        if (step >= left)
            return 0;
        at += step;
        left -= step;
    }
    if (left >= CONTROL_BYTES)
        *pktinfo = PKTINFO_UNKNOWN;
    return 0;
}

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
    WRITE_ONCE(sender->socket, 0); /* nobody's while it changes */
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

/* ---- conntrack's entries ---- */

/* struct nf_conntrack_tuple, include/net/netfilter/nf_conntrack_tuple.h: TUPLE_LEN bytes */
struct tuple {
    __u32 source[4];
    __u16 source_port, layer3;
    __u32 destination[4];
    __u16 destination_port;
    __u8 protocol, direction;
};

static __always_inline void read_tuple(struct tuple *to, __u64 entry, __u32 offset) {
    copy_from_kernel(to, TUPLE_LEN, (void *)(entry + offset));
}

/* Conntrack keeps IPv4 in the first word. */
static __always_inline void widen(struct address *to, const __u32 *from, __u8 family) {
    if (family == FAMILY_INET) {
        set_ip4(to, from[0]);
        return;
    }
    to->word[0] = from[0];
    to->word[1] = from[1];
    to->word[2] = from[2];
    to->word[3] = from[3];
}

static __always_inline __u16 zone_of(__u64 entry) {
#ifdef OFFSET_CT_ZONE
    return read_kernel16(entry + OFFSET_CT_ZONE);
#else
    return 0;
#endif
}

static __always_inline __u32 status_of(__u64 entry) {
    return read_kernel(entry + OFFSET_CT_STATUS); /* a long, of which 32 bits are in use */
}

static __always_inline __u64 net_of(__u64 entry) {
    return read_kernel(entry + OFFSET_CT_NET);
}

/* The key under which an answer to this flow would be looked for, and who should answer. */
static __always_inline void key_of_flow(struct request_key *key, struct address *server,
                                        const struct tuple *reply, __u64 entry) {
    __u8 family = reply->layer3;
    widen(&key->client, reply->destination, family);
    widen(server, reply->source, family);
    key->client_port = net16(reply->destination_port);
    key->port = net16(reply->source_port);
    key->netns = read_kernel32(net_of(entry) + OFFSET_NET_INUM);
    key->zone = zone_of(entry);
}

/* Whether this memory still is the entry of that request: conntrack uses it again for others. */
static __always_inline int is_entry_of(__u64 entry, const struct request_key *key,
                                       const struct address *server) {
    struct tuple reply;
    struct address there;

    read_tuple(&reply, entry, OFFSET_TUPLE_REPLY);
    if (reply.protocol != PROTO_UDP || net16(reply.destination_port) != key->client_port ||
        net16(reply.source_port) != key->port)
        return 0;
    widen(&there, reply.source, reply.layer3);
    if (!same(&there, server))
        return 0;
    widen(&there, reply.destination, reply.layer3);
    return same(&there, &key->client);
}

/* The status of a request's entry; 0: it is not known. */
static __always_inline __u32 status_of_request(const struct request *request,
                                               const struct request_key *key) {
    if (request->final)
        return request->final;
    if (!request->entry || !is_entry_of(request->entry, key, &request->server))
        return 0;
    return status_of(request->entry);
}

/* ---- a new flow ---- */

static __always_inline void remember(struct request_key *key, const struct address *server,
                                     __u64 entry, __u64 now) {
    struct requests fresh = {};
    struct requests *known = requests.lookup(key);
    struct request asked = {};

    asked.server = *server;
    asked.seen = now;
    asked.entry = entry;
    if (!known) {
        fresh.asked[0] = asked;
        if (requests.update(key, &fresh))
            COUNT(unremembered, 1);
        else
            COUNT(requests, 1);
        return;
    }
    /* In place: two CPUs at once leave one of two true stories. */
    if (same(&known->asked[0].server, server) && known->asked[0].seen)
        known->asked[0] = asked;
    else if (same(&known->asked[1].server, server) && known->asked[1].seen)
        known->asked[1] = asked;
    else if (known->asked[0].seen <= known->asked[1].seen)
        known->asked[0] = asked;
    else
        known->asked[1] = asked;
}

/* The name of an interface of a namespace, by its index: the kernel's own table. */
static __always_inline void read_interface(char *to, __u64 net, __u32 index) {
    __u64 node = read_kernel(read_kernel(net + OFFSET_NET_DEVICES) +
                             (index & (DEVICE_BUCKETS - 1)) * sizeof(__u64));
#pragma unroll
    for (int i = 0; i < DEVICES; i++) {
        __u64 device = node - OFFSET_DEVICE_NODE;
        if (!node)
            return;
        if (read_kernel32(device + OFFSET_DEVICE_INDEX) == index) {
            copy_from_kernel(to, COMM_LEN, (void *)(device + OFFSET_DEVICE_NAME));
            return;
        }
        node = read_kernel(node);
    }
}

#if !HAVE_SOCKETS
/* Who sends, where no cgroup program tells: conntrack confirms a packet in its sender's context. */
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

/* Whether a socket of this node was found with this datagram: its own program ran before. */
static __always_inline int is_told(const struct request_key *key, const struct address *source,
                                   __u64 now) {
#if HAVE_SOCKETS
    struct told_key wire = {};

    wire.source = *source;
    wire.peer = key->client;
    wire.source_port = key->port;
    wire.peer_port = key->client_port;
    __u64 *seen = told.lookup(&wire);
    return seen && is_remembered(*seen, now);
#else
    return 0;
#endif
}

/* The one request that this flow may answer wrongly; NULL if it does not look so. */
static __always_inline struct request *mirrored(struct requests *known,
                                                const struct request_key *key,
                                                const struct address *source, __u64 now) {
    struct request *newest = &known->asked[0], *other = &known->asked[1];

    if (other->seen > newest->seen) {
        newest = &known->asked[1];
        other = &known->asked[0];
    }
    /* Who was ever asked may come late, or call by itself. */
    if (same(&newest->server, source) || (other->seen && same(&other->server, source)))
        return 0;
    if (!(newest->server.half[0] | newest->server.half[1])) /* a group */
        return 0;
    if (!is_remembered(newest->seen, now) || is_remembered(other->seen, now))
        return 0;
    if (status_of_request(newest, key) & SEEN_REPLY)
        return 0;
    return newest;
}

int confirm(__u64 *ctx) {
    struct request_key key = {};
    struct address server = {}, source = {};
    struct tuple original, reply;
    __u64 skb = ctx[CONFIRM_ARGUMENT_0];
    __u64 entry = read_kernel(skb + OFFSET_SKB_NFCT) & ~CT_INFO_MASK;
    int zero = 0, known_route;

    if (!entry)
        return 0;
    read_tuple(&original, entry, OFFSET_TUPLE_ORIGINAL);
    if (original.protocol != PROTO_UDP)
        return 0;
    COUNT(flows, 1);
    read_tuple(&reply, entry, OFFSET_TUPLE_REPLY);
    __u8 family = original.layer3;
    __u64 now = bpf_ktime_get_ns(); /* these programs may not ask the coarse clock */
    widen(&key.client, original.destination, family);
    if (status_of(entry) & EXPECTED)
        return 0;
    if (is_group(&key.client, family) ||
        (family == FAMILY_INET && routed_to_group(skb, &known_route))) {
        key_of_flow(&key, &source, &reply, entry);
        remember(&key, &server, entry, now); /* `server` is zero */
        return 0;
    }

    /* Whom does it mirror? As the one who asked would be known: by where this flow goes. */
    widen(&source, original.source, family);
    key.client_port = net16(original.destination_port);
    key.port = net16(original.source_port);
    key.netns = read_kernel32(net_of(entry) + OFFSET_NET_INUM);
    key.zone = zone_of(entry);
    __u32 interface = read_kernel32(skb + OFFSET_SKB_IIF); /* 0: sent here */
    if (interface ? FORWARDED : !HAVE_SOCKETS) {
        struct requests *known = requests.lookup(&key);
        struct request *request = known ? mirrored(known, &key, &source, now) : 0;
        struct candidate *candidate = request ? scratch.lookup(&zero) : 0;
        if (candidate && is_told(&key, &source, now))
            return 0;
        if (candidate) {
            __builtin_memset(candidate, 0, sizeof(*candidate));
            candidate->key = key;
            candidate->request = *request;
            candidate->actual = source;
            candidate->time = now;
            candidate->family = family;
            __builtin_memcpy(candidate->original, &original, TUPLE_LEN);
            __builtin_memcpy(candidate->reply, &reply, TUPLE_LEN);
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
            /* One that waits under the same address is another entry's, which has gone. */
            if (candidates.insert(&entry, candidate))
                COUNT(candidates, 1);
            return 0;
        }
    }
    key_of_flow(&key, &server, &reply, entry);
    remember(&key, &server, entry, now);
    return 0;
}

/* ---- the end of a flow ---- */

int gone(__u64 *ctx) {
    struct request_key key = {};
    struct address server = {};
    struct tuple reply;
    __u64 entry = ctx[GONE_ARGUMENT_0];

    read_tuple(&reply, entry, OFFSET_TUPLE_REPLY);
    if (reply.protocol != PROTO_UDP)
        return 0;
    __u32 final = status_of(entry) | ENTRY_GONE;
    struct candidate *candidate = candidates.lookup(&entry);
    if (candidate && !candidate->final)
        candidate->final = final;
    key_of_flow(&key, &server, &reply, entry);
    struct requests *known = requests.lookup(&key);
    if (!known)
        return 0;
    if (known->asked[0].entry == entry && !known->asked[0].final)
        known->asked[0].final = final;
    if (known->asked[1].entry == entry && !known->asked[1].final)
        known->asked[1].final = final;
    return 0;
}

/* ---- the decision ---- */

static __always_inline int same_words(const void *a, const void *b) {
#pragma unroll
    for (int i = 0; i < TUPLE_LEN / sizeof(__u32); i++) {
        if (((const __u32 *)a)[i] != ((const __u32 *)b)[i])
            return 0;
    }
    return 1;
}

/* The candidate whose entry's address stands in the "packet": an enum settled. */
int settle(struct __sk_buff *skb) {
    struct tuple now;
    __u64 entry;

    if (bpf_skb_load_bytes(skb, 0, &entry, sizeof(entry)))
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

    /* What became of the request's entry meanwhile stands where it is remembered. */
    struct request request = candidate->request;
    struct requests *known = requests.lookup(&candidate->key);
    if (known && !request.final) {
        if (known->asked[0].entry == request.entry)
            request.final = known->asked[0].final;
        else if (known->asked[1].entry == request.entry)
            request.final = known->asked[1].final;
    }
    if (!request.entry && !request.final)
        return SETTLED_ASK;
    status = status_of_request(&request, &candidate->key);
    if (!status)
        return SETTLED_UNDECIDED;
    return status & SEEN_REPLY ? SETTLED_ANSWERED : SETTLED_WRONG;
}
