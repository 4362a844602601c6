/* SPDX-License-Identifier: GPL-2.0-only */
/* Read conntrack's entry from the packet itself. */
#ifndef UDPWATCH_TRACKING_H
#define UDPWATCH_TRACKING_H

#include "packet.h"

#define CT_RELATED   1 /* IP_CT_RELATED: like IP_CT_NEW, for a flow that a helper announced */
#define CT_NEW       2 /* IP_CT_NEW: original direction of an unreplied flow */
#define CT_REPLY     3 /* IP_CT_IS_REPLY: from this value on, ctinfo means the reply direction */
#define CT_UNTRACKED 7 /* IP_CT_UNTRACKED */

#if HAVE_KERNEL_READ
/* The source address of a conntrack tuple. */
static __always_inline void read_source(__u64 tuple, __u8 family, struct address *to) {
    if (family == FAMILY_INET) {
        set_ip4(to, read_kernel32(tuple));
    } else {
        to->half[0] = read_kernel(tuple);
        to->half[1] = read_kernel(tuple + 8);
    }
}
#endif

/* How conntrack classified a packet. */
enum tracking { UNTRACKED, BOOKED_AS_NEW, IN_REPLY, BEGUN_HERE };

/* Read the entry of a packet. If the peer has sent in this flow, `source` becomes this host's
 * address before NAT, which is the address that the peer asked, if it asked one. */
static __always_inline enum tracking read_entry(struct __sk_buff *skb, const struct packet *packet,
                                                __u64 *entry, struct address *source) {
#if HAVE_KERNEL_READ
    __u64 nfct = read_kernel((__u64)skb + OFFSET_SKB_NFCT), info = nfct & CT_INFO_MASK;

    if (info == CT_UNTRACKED || !(nfct & ~CT_INFO_MASK))
        return UNTRACKED;
    *entry = nfct & ~CT_INFO_MASK;
    if (info == CT_NEW || info == CT_RELATED)
        return BOOKED_AS_NEW;
    int is_reply = info >= CT_REPLY;
    read_source(*entry + (is_reply ? OFFSET_TUPLE_REPLY : OFFSET_TUPLE_ORIGINAL), packet->family,
                source);
    return is_reply ? IN_REPLY : BEGUN_HERE;
#else
    return UNTRACKED;
#endif
}

#endif
