/* SPDX-License-Identifier: GPL-2.0-only */
/* What sockets.c and conntrack.c share. Headers use no map, since bcc rewrites map calls in the
 * main file only. */
#ifndef UDPWATCH_COMMON_H
#define UDPWATCH_COMMON_H

#include "compat.h"
#include "records.h"

#define PROTO_UDP    17
#define FAMILY_INET  2
#define FAMILY_INET6 10
#define ROUTE_GROUP  0x30000000 /* RTCF_BROADCAST | RTCF_MULTICAST */
#define CT_INFO_MASK 7ULL       /* NFCT_INFOMASK */
#define DST_NOREF    1ULL       /* SKB_DST_NOREF */

/* Counting is atomic although the map is per CPU: a program can be preempted or interrupted by
 * another run of itself. */
#define COUNT(field, n)                                                                            \
    do {                                                                                           \
        struct stats *stats_ = stats_of_this_cpu();                                                \
        if (stats_)                                                                                \
            __sync_fetch_and_add(&stats_->field, (n));                                             \
    } while (0)

static __always_inline void set_ip4(struct address *to, __u32 address) {
    to->half[0] = 0;
    to->word[2] = net32(0xffff);
    to->word[3] = address;
}

/* Copy word by word: the compiler copies memory of unknown alignment byte by byte. */
static __always_inline void set_ip6(struct address *to, const __u32 *from) {
    to->word[0] = from[0];
    to->word[1] = from[1];
    to->word[2] = from[2];
    to->word[3] = from[3];
}

static __always_inline int same(const struct address *a, const struct address *b) {
    return a->half[0] == b->half[0] && a->half[1] == b->half[1];
}

/* IPv4: 224/4, 240/4 and 127.255.255.255; IPv6: ff00::/8. */
static __always_inline int is_group(const struct address *address, __u8 family) {
    __u32 first = net32(address->word[0]), last = net32(address->word[3]);
    if (family == FAMILY_INET)
        return last >> 28 >= 14 || last == 0x7fffffff;
    return first >> 24 == 0xff;
}

/* A link-local address identifies a peer only together with its link (RFC 4291, section 2.5.6). */
static __always_inline int is_link_local(const struct address *address) {
    return (net32(address->word[0]) & 0xffc00000) == 0xfe800000;
}

#if HAVE_KERNEL_READ
/* Return whether the route of an IPv4 packet leads to a group; only the route knows broadcast
 * addresses. *known is 0 if the packet has no route. */
static __always_inline int routed_to_group(__u64 skb, int *known) {
    __u64 route = read_kernel(skb + OFFSET_SKB_DST) & ~DST_NOREF;
    *known = route != 0;
    return route && read_kernel32(route + OFFSET_ROUTE_FLAGS) & ROUTE_GROUP;
}
#endif

static __always_inline int is_remembered(__u64 seen, __u64 now) {
    return seen && (now <= seen || now - seen <= WINDOW_NS);
}

/* Return the slot of the sending thread. No other send uses it between the hooks of one send. If
 * egress cannot identify its thread, the slot belongs to the socket and also identifies the sender.
 */
static __always_inline __u32 sender_slot(__u64 socket, __u64 pid_tgid) {
    __u64 mixed = KNOW_CURRENT ? pid_tgid : socket * 0x9e3779b97f4a7c15ULL >> 40;
    return mixed & (SENDER_SLOTS - 1);
}

#endif
