/* SPDX-License-Identifier: GPL-2.0-only */
/* Read conntrack's entries in kernel memory. */
#ifndef UDPWATCH_ENTRIES_H
#define UDPWATCH_ENTRIES_H

#include "common.h"

#define SEEN_REPLY     0x2 /* IPS_SEEN_REPLY */
#define EXPECTED       0x1 /* IPS_EXPECTED: a helper announced it (FTP, TFTP, SIP) */
#define DEVICE_BUCKETS 256 /* NETDEV_HASHENTRIES */
#define DEVICES        8   /* read from one bucket */

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

/* Convert conntrack's address, which holds IPv4 in the first word. */
static __always_inline void widen(struct address *to, const __u32 *from, __u8 family) {
    if (family == FAMILY_INET) {
        set_ip4(to, from[0]);
        return;
    }
    set_ip6(to, from);
}

static __always_inline __u16 zone_of(__u64 entry) {
#ifdef OFFSET_CT_ZONE
    return read_kernel16(entry + OFFSET_CT_ZONE);
#else
    return 0;
#endif
}

static __always_inline __u32 status_of(__u64 entry) {
    return read_kernel(entry + OFFSET_CT_STATUS); /* a long, but only 32 bits are used */
}

static __always_inline __u64 net_of(__u64 entry) {
    return read_kernel(entry + OFFSET_CT_NET);
}

/* Get the key of the request that began this flow, and the server that should reply. */
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

/* Read the name of an interface from the namespace's own table. */
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

static __always_inline int same_words(const void *a, const void *b) {
#pragma unroll
    for (int i = 0; i < TUPLE_LEN / sizeof(__u32); i++) {
        if (((const __u32 *)a)[i] != ((const __u32 *)b)[i])
            return 0;
    }
    return 1;
}

#endif
