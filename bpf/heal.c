/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Heal replies: set the source that the kernel would choose to the address that the peer asked.
 *
 * Rules
 * 1. A send is healed if the application leaves its source to routing, and the peer asked exactly
 *    one address of this port within the window (the sensor's table of conversations).
 * 2. The address must be local at this moment (local.h).
 * 3. In doubt the programs change nothing. Each returns 1 (let the send go on) on every path.
 *
 * heal4/6  in udp_sendmsg() and udpv6_sendmsg(). They do not run for plain sends of a connected
 *          socket.
 */
#include "common.h"
#include "compat.h"
#include "conversations.h"
#include "local.h"
#include "records.h"

/* The maps of the sensor. */
BPF_ARRAY(conversations, struct conversation_set, SETS);
BPF_ARRAY(hash_keys, struct hash_keys, 1);

BPF_ARRAY(heal_ports, __u8, 65536); /* enum healing; [0]: whether heal_slots is used */
BPF_ARRAY(heal_slots, __u8, SERVERS);
BPF_PERCPU_ARRAY(heal_counts, struct heal_counts, SERVERS); /* by slot of the server */
/* User space keeps this: the index of the device that has an address. */
BPF_TABLE("hash", struct local_key, __u32, local_devices, MAX_LOCAL);

/* Copy the conversation with this tag. Return 0 if there is none. */
static __always_inline int find_conversation(struct conversation_set *set, __u64 tag,
                                             struct conversation *to) {
    int found = 0;

    spin_lock(&set->lock);
#define FIND(i)                                                                                    \
    if (set->tag[i] == tag) {                                                                      \
        copy(to, &set->way[i]);                                                                    \
        found = 1;                                                                                 \
        goto out;                                                                                  \
    }
    WAY_WITH(set->tag, tag, FIND)
out:
    spin_unlock(&set->lock);
    return found;
}

static __always_inline int is_local(__u64 net, const struct address *address, int family) {
    struct local_key key = {.netns = read_kernel32(net + OFFSET_NET_INUM), .address = *address};
    __u32 *index = local_devices.lookup(&key);

    if (!index)
        return 0;
    __u64 device = device_at(net, *index);
    return device && has_address(device, address, family);
}

static __always_inline enum healing mode_of(__u16 port, __u32 slot) {
    int at_port = port, at_slot = slot;
    __u8 *by_port = heal_ports.lookup(&at_port), *by_slot = heal_slots.lookup(&at_slot);

    if (by_port && *by_port)
        return *by_port;
    return by_slot ? *by_slot : HEAL_OFF;
}

static __always_inline int is_asked_for(__u16 port) {
    int at_port = port, any = 0;
    __u8 *by_port = heal_ports.lookup(&at_port), *slots = heal_ports.lookup(&any);

    return (by_port && *by_port) || (slots && *slots);
}

/* Return whether a reply to key->peer must be healed, and the source to set. */
static __always_inline int find_source(struct bpf_sock_addr *ctx, struct conversation_key *key,
                                       int family, struct address *source) {
    struct conversation asked = {};
    int zero = 0;
    __u64 now = now_ns();
    __u64 net = read_kernel(read_kernel((__u64)ctx + OFFSET_SEND_SK) + OFFSET_SOCK_NET);

#if HAVE_NETNS_COOKIE
    key->scope = bpf_get_netns_cookie(ctx);
#else
    key->scope = net;
#endif
    const struct hash_keys *keys = hash_keys.lookup(&zero);
    if (!keys)
        return 0;
    __u64 tag = tag_of(keys, key);
    int index = share_of(tag, SETS);
    struct conversation_set *set = conversations.lookup(&index);
    if (!set || !find_conversation(set, tag, &asked) || is_expired(&asked, now))
        return 0;
    __u32 slot = asked.tenant.flags >> SLOT_SHIFT;
    enum healing mode = mode_of(key->port, slot);
    struct heal_counts *counts = heal_counts.lookup(&slot);
    if (!mode || !counts)
        return 0;
    if (asked.tenant.flags & SEVERAL) {
        __sync_fetch_and_add(&counts->refused[REFUSED_SEVERAL], 1);
        return 0;
    }
    if (is_any(&asked.address)) {
        __sync_fetch_and_add(&counts->refused[REFUSED_GROUP], 1);
        return 0;
    }
    if (is_link_local(&asked.address)) {
        __sync_fetch_and_add(&counts->refused[REFUSED_LINK], 1);
        return 0;
    }
    if (!is_local(net, &asked.address, family)) {
        __sync_fetch_and_add(&counts->refused[REFUSED_NOT_LOCAL], 1);
        return 0;
    }
    __sync_fetch_and_add(&counts->healed, 1);
    *source = asked.address;
    return mode == HEAL_ON;
}

int heal4(struct bpf_sock_addr *ctx) {
    struct conversation_key key = {};
    struct address source;

    if (!ctx->sk || ctx->msg_src_ip4)
        return 1;
    key.port = ctx->sk->src_port;
    if (!is_asked_for(key.port))
        return 1;
    set_ip4(&key.peer, ctx->user_ip4);
    key.peer_port = net16(ctx->user_port);
    if (find_source(ctx, &key, FAMILY_INET, &source))
        ctx->msg_src_ip4 = source.word[3];
    return 1;
}

int heal6(struct bpf_sock_addr *ctx) {
    struct conversation_key key = {};
    struct address source;

    if (!ctx->sk || ctx->msg_src_ip6[0] || ctx->msg_src_ip6[1] || ctx->msg_src_ip6[2] ||
        ctx->msg_src_ip6[3])
        return 1;
    key.port = ctx->sk->src_port;
    if (!is_asked_for(key.port))
        return 1;
    key.peer.word[0] = ctx->user_ip6[0];
    key.peer.word[1] = ctx->user_ip6[1];
    key.peer.word[2] = ctx->user_ip6[2];
    key.peer.word[3] = ctx->user_ip6[3];
    key.peer_port = net16(ctx->user_port);
    if (is_link_local(&key.peer))
        return 1;
    if (find_source(ctx, &key, FAMILY_INET6, &source)) {
        ctx->msg_src_ip6[0] = source.word[0];
        ctx->msg_src_ip6[1] = source.word[1];
        ctx->msg_src_ip6[2] = source.word[2];
        ctx->msg_src_ip6[3] = source.word[3];
    }
    return 1;
}
