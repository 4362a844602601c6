/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Heal replies: set the source that the kernel would choose to the address that the peer asked.
 *
 * Rules
 * 1. A send is healed if the application leaves its source to routing, and the peer asked exactly
 *    one address of this port within the window (the sensor's table of conversations).
 * 2. The address must be local at this moment (local.h). An address of loopback is the source of
 *    replies to this machine only: elsewhere, the kernel refuses it, or it leaves the machine.
 * 3. A socket whose port was chosen by the kernel is usually a client's. It is healed only if the
 *    operator has named this port.
 * 4. In doubt the programs change nothing. Each returns 1 (let the send go on) on every path.
 *
 * heal4/6  in udp_sendmsg() and udpv6_sendmsg(). They do not run for plain sends of a connected
 *          socket.
 */
#include "common.h"
#include "compat.h"
#include "conversations.h"
#include "local.h"
#include "records.h"

/* Maps of the sensor (sockets.c). */
BPF_ARRAY(conversations, struct conversation_set, SETS);
BPF_ARRAY(hash_keys, struct hash_keys, 1);
BPF_ARRAY(last_eviction, __u64, 1);
BPF_ARRAY(heal_ports, __u8, 65536); /* enum healing; [0]: HEAL_MODE and HEAL_BY_SLOT */
BPF_ARRAY(healed_sends, struct healed_send, SENDER_SLOTS);

BPF_ARRAY(heal_slots, __u8, SERVERS); /* enum healing, by slot of the server */
BPF_PERCPU_ARRAY(heal_counts, struct heal_counts, 1);
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

/* Return whether user space follows the addresses of a namespace. */
static __always_inline int is_followed(__u32 netns) {
    struct local_key key = {.netns = netns};
    return local_devices.lookup(&key) != 0;
}

/* 127.0.0.0/8 (RFC 1122, section 3.2.1.3) and ::1 */
static __always_inline int is_loopback(const struct address *address, int family) {
    if (family == FAMILY_INET)
        return net32(address->word[3]) >> 24 == 127;
    return !(address->half[0] | address->word[2]) && address->word[3] == net32(1);
}

static __always_inline int is_local(__u64 net, __u32 netns, const struct address *address,
                                    int family) {
    struct local_key key = {.netns = netns, .address = *address};
    __u32 *known = local_devices.lookup(&key), index = LOOPBACK_INDEX;

    if (known)
        index = *known;
    else if (!is_loopback(address, family))
        return 0;
    __u64 device = device_at(net, index);
    return device && has_address(device, address, family);
}

/* Return whether the kernel may use this source for this peer. */
static __always_inline int reaches(const struct address *source, const struct address *peer,
                                   __u64 net, __u32 netns, int family) {
    return !is_loopback(source, family) || is_loopback(peer, family) ||
           is_local(net, netns, peer, family);
}

/* Return whether a request of this conversation for another address may have been evicted. */
static __always_inline int may_have_asked_others(const struct conversation *asked, __u64 now) {
    int zero = 0;
    __u64 *last = last_eviction.lookup(&zero);

    return asked->tenant.flags & SEVERAL ||
           (asked->tenant.flags & HEAVY && last && is_remembered(*last, now));
}

static __always_inline enum healing mode_of(__u8 mode, __u32 slot) {
    int at_slot = slot;

    if (mode & HEAL_MODE)
        return slot != NO_SERVER || mode & HEAL_THIS_PORT ? mode & HEAL_MODE : HEAL_UNSET;
    __u8 *by_slot = heal_slots.lookup(&at_slot);
    return by_slot ? *by_slot : HEAL_UNSET;
}

/* Return the mode of a port: HEAL_MODE, with HEAL_THIS_PORT if it is not that of all ports, or
 * HEAL_BY_SLOT if it depends on the server. */
static __always_inline __u8 mode_of_port(__u16 port) {
    int at_port = port, any = 0;
    __u8 *own = heal_ports.lookup(&at_port), *all = heal_ports.lookup(&any);

    if (own && *own)
        return *own == HEAL_NEVER ? HEAL_UNSET : *own | HEAL_THIS_PORT;
    return all ? *all : HEAL_UNSET;
}

static __always_inline void refuse(enum refusal why) {
    int zero = 0;
    struct heal_counts *counts = heal_counts.lookup(&zero);

    if (counts && why < REFUSALS)
        counts->refused[why]++;
}

/* Return whether a reply to key->peer must be healed, the source to set, and the tag of the
 * conversation. `by`: mode_of_port */
static __always_inline int find_source(struct bpf_sock_addr *ctx, struct conversation_key *key,
                                       int family, __u8 by, struct address *source, __u64 *to) {
    struct conversation asked = {};
    int zero = 0;
    __u64 now = now_ns();
    __u64 sk = read_kernel((__u64)ctx + OFFSET_SEND_SK), net = read_kernel(sk + OFFSET_SOCK_NET);
    __u32 netns = read_kernel32(net + OFFSET_NET_INUM);

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
    enum healing mode = mode_of(by, asked.tenant.flags >> SLOT_SHIFT);
    if (mode == HEAL_UNSET || !is_followed(netns))
        return 0;
    if (may_have_asked_others(&asked, now)) {
        refuse(REFUSED_SEVERAL);
        return 0;
    }
    if (is_any(&asked.address)) {
        refuse(REFUSED_GROUP);
        return 0;
    }
    if (is_link_local(&asked.address) || !reaches(&asked.address, &key->peer, net, netns, family)) {
        refuse(REFUSED_LINK);
        return 0;
    }
    if (read_transparent(sk)) {
        refuse(REFUSED_TRANSPARENT);
        return 0;
    }
    if (!is_local(net, netns, &asked.address, family)) {
        refuse(REFUSED_NOT_LOCAL);
        return 0;
    }
    *source = asked.address;
    *to = tag;
    if (mode == HEAL_ON)
        return 1;
    struct heal_counts *counts = heal_counts.lookup(&zero);
    if (counts)
        counts->dry_run++;
    return 0;
}

/* Note for egress that this send was healed. */
static __always_inline void note_healed(struct bpf_sock_addr *ctx, const struct address *source,
                                        __u64 tag) {
    __u64 socket = socket_of_send(ctx), pid_tgid = bpf_get_current_pid_tgid();
    __u32 index = sender_slot(socket, pid_tgid);
    struct healed_send *send = healed_sends.lookup(&index);

    if (!send)
        return;
    send->pid_tgid = pid_tgid;
    send->tag = tag;
    send->source = *source;
    WRITE_ONCE(send->socket, socket);
}

int heal4(struct bpf_sock_addr *ctx) {
    struct conversation_key key = {};
    struct address source;
    __u64 tag;

    if (!ctx->sk || ctx->msg_src_ip4)
        return 1;
    key.port = ctx->sk->src_port;
    __u8 by = mode_of_port(key.port);
    if (!by)
        return 1;
    set_ip4(&key.peer, ctx->user_ip4);
    key.peer_port = net16(ctx->user_port);
    if (is_group(&key.peer, FAMILY_INET))
        return 1;
    if (find_source(ctx, &key, FAMILY_INET, by, &source, &tag)) {
        note_healed(ctx, &source, tag);
        ctx->msg_src_ip4 = source.word[3];
    }
    return 1;
}

int heal6(struct bpf_sock_addr *ctx) {
    struct conversation_key key = {};
    struct address source;
    __u64 tag;

    if (!ctx->sk || ctx->msg_src_ip6[0] || ctx->msg_src_ip6[1] || ctx->msg_src_ip6[2] ||
        ctx->msg_src_ip6[3])
        return 1;
    key.port = ctx->sk->src_port;
    __u8 by = mode_of_port(key.port);
    if (!by)
        return 1;
    key.peer.word[0] = ctx->user_ip6[0];
    key.peer.word[1] = ctx->user_ip6[1];
    key.peer.word[2] = ctx->user_ip6[2];
    key.peer.word[3] = ctx->user_ip6[3];
    key.peer_port = net16(ctx->user_port);
    if (is_link_local(&key.peer) || is_group(&key.peer, FAMILY_INET6))
        return 1;
    if (find_source(ctx, &key, FAMILY_INET6, by, &source, &tag)) {
        note_healed(ctx, &source, tag);
        ctx->msg_src_ip6[0] = source.word[0];
        ctx->msg_src_ip6[1] = source.word[1];
        ctx->msg_src_ip6[2] = source.word[2];
        ctx->msg_src_ip6[3] = source.word[3];
    }
    return 1;
}
