/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Whether an address is local at this moment, read from the kernel's own lists. User space follows
 * rtnetlink and says which device has the address, but it is late: with a source that was removed,
 * an IPv4 send fails, and an IPv6 packet leaves with an address that the namespace does not own.
 */
#ifndef UDPWATCH_LOCAL_H
#define UDPWATCH_LOCAL_H

#include "common.h"

#define MAX_ADDRESSES  256  /* of one device that are searched */
#define MAX_COLLISIONS 16   /* devices in one bucket of the kernel's table */
#define DEVICE_BUCKETS 256  /* NETDEV_HASHENTRIES */
#define LOOPBACK_INDEX 1    /* LOOPBACK_IFINDEX, in each namespace */
#define IS_UP          1    /* IFF_UP */
#define IS_LOOPBACK    8    /* IFF_LOOPBACK */
#define IS_DUPLICATE   8    /* IFA_F_DADFAILED */
#define IS_TENTATIVE   0x40 /* IFA_F_TENTATIVE: nobody may use it yet */
#define IS_OPTIMISTIC  4    /* IFA_F_OPTIMISTIC: although it is tentative */

/* Return whether a device has an IPv4 address. On loopback, all of the address's network is local
 * (fib_add_ifaddr()). */
static __always_inline int has_ip4(__u64 device, __u32 flags, __u32 address) {
    __u64 in_device = read_kernel(device + OFFSET_DEVICE_IP);
    __u64 each = in_device ? read_kernel(in_device + OFFSET_IN_DEVICE_ADDRESSES) : 0;

#pragma clang loop unroll(disable)
    for (int i = 0; i < MAX_ADDRESSES; i++) {
        if (!each)
            break;
        __u32 mask = flags & IS_LOOPBACK ? read_kernel32(each + OFFSET_IFA_MASK) : ~0U;
        if (!((read_kernel32(each + OFFSET_IFA_LOCAL) ^ address) & mask))
            return 1;
        each = read_kernel(each + OFFSET_IFA_NEXT);
    }
    return 0;
}

static __always_inline int has_ip6(__u64 device, const struct address *address) {
    __u64 in_device = read_kernel(device + OFFSET_DEVICE_IP6);
    __u64 head = in_device + OFFSET_INET6_DEV_ADDRESSES;
    __u64 each = in_device ? read_kernel(head) : head;

#pragma clang loop unroll(disable)
    for (int i = 0; i < MAX_ADDRESSES; i++) {
        __u64 of = each - OFFSET_IFA6_LIST;
        struct address is = {};

        if (each == head || !each)
            break;
        copy_from_kernel(&is, sizeof(is), (void *)(of + OFFSET_IFA6_ADDRESS));
        if (same(&is, address)) {
            __u32 flags = read_kernel32(of + OFFSET_IFA6_FLAGS);
            return !(flags & IS_DUPLICATE) && (flags & IS_OPTIMISTIC || !(flags & IS_TENTATIVE));
        }
        each = read_kernel(each);
    }
    return 0;
}

static __always_inline int has_address(__u64 device, const struct address *address, int family) {
    __u32 flags = read_kernel32(device + OFFSET_DEVICE_FLAGS);

    if (!(flags & IS_UP))
        return 0;
    return family == FAMILY_INET ? has_ip4(device, flags, address->word[3])
                                 : has_ip6(device, address);
}

/* Return the device with an index, or 0. */
static __always_inline __u64 device_at(__u64 net, __u32 index) {
    __u64 bucket =
        read_kernel(net + OFFSET_NET_DEVICES) + (index & (DEVICE_BUCKETS - 1)) * sizeof(__u64);
    __u64 node = read_kernel(bucket);

#pragma clang loop unroll(disable)
    for (int i = 0; i < MAX_COLLISIONS; i++) {
        __u64 device = node - OFFSET_DEVICE_NODE;

        if (!node)
            break;
        if (read_kernel32(device + OFFSET_DEVICE_INDEX) == index)
            return device;
        node = read_kernel(node);
    }
    return 0;
}

#endif
