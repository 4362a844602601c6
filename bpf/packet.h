/* SPDX-License-Identifier: GPL-2.0-only */
/* Find the UDP header in a packet of a cgroup_skb program. */
#ifndef UDPWATCH_PACKET_H
#define UDPWATCH_PACKET_H

#include "common.h"

#define IP6_EXTENSIONS     32     /* the kernel has no limit; each has 8 bytes or more */
#define IP6_FRAGMENT       44     /* RFC 8200, section 4.5 */
#define IP6_AUTHENTICATION 51     /* RFC 4302 */
#define IP4_OFFSET_MASK    0x1fff /* RFC 791: fragment offset */

/* The including file defines this: it has the map of counters. */
static __always_inline void count_unparsed(void);

/* Return the number of datagrams in one packet (UDP_SEGMENT). */
static __always_inline __u32 segments_of(struct __sk_buff *skb) {
    return skb->gso_segs ? skb->gso_segs : 1;
}

struct packet {
    struct address source, destination;
    __u16 source_port, destination_port;
    __u8 family;
};

static __always_inline int is_extension(__u8 next) {
    /* RFC 8200, section 4: hop-by-hop, routing, destination options */
    return next == 0 || next == 43 || next == 60 || next == IP6_FRAGMENT ||
           next == IP6_AUTHENTICATION;
}

static __always_inline void set_ports(struct packet *packet, const __u16 *ports) {
    packet->source_port = net16(ports[0]);
    packet->destination_port = net16(ports[1]);
}

/* Read the ports behind IP options or extension headers. They are copied because the verifier
 * refuses arithmetic on packet pointers with anything but constants without CAP_PERFMON. */
static __always_inline int load_ports(struct __sk_buff *skb, __u32 at, struct packet *packet) {
    __u16 header[4]; /* with length and checksum: without them, it is no datagram */
    if (bpf_skb_load_bytes(skb, at, header, sizeof(header))) {
        count_unparsed();
        return 0;
    }
    set_ports(packet, header);
    return 1;
}

/* Like `parse`, for an IPv6 packet that begins with the extension header `next`. */
static __always_inline int skip_extensions(struct __sk_buff *skb, __u8 next,
                                           struct packet *packet) {
    __u32 at = 40;
#pragma clang loop unroll(disable)
    for (int i = 0; i < IP6_EXTENSIONS && is_extension(next); i++) {
        __u8 header[4];
        if (bpf_skb_load_bytes(skb, at, header, sizeof(header))) {
            count_unparsed();
            return 0;
        }
        if (next == IP6_FRAGMENT) {
            if (header[2] || header[3] & 0xf8)
                return 0;
            at += 8;
        } else {
            at += next == IP6_AUTHENTICATION ? (header[1] + 2) * 4 : (header[1] + 1) * 8;
        }
        next = header[0];
    }
    if (is_extension(next))
        count_unparsed();
    return next == PROTO_UDP ? load_ports(skb, at, packet) : 0;
}

/* Read addresses and ports of a UDP datagram into `packet`. Return 0 for other packets and for
 * fragments without ports. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *packet) {
    __u8 *data = (void *)(long)skb->data;
    __u8 *end = (void *)(long)skb->data_end;

    if (data + 28 > end)
        return 0; /* shorter than any UDP datagram */
    if (data[0] >> 4 == 4) {
        if (data[9] != PROTO_UDP || net16(*(__u16 *)(data + 6)) & IP4_OFFSET_MASK)
            return 0;
        packet->family = FAMILY_INET;
        set_ip4(&packet->source, *(__u32 *)(data + 12));
        set_ip4(&packet->destination, *(__u32 *)(data + 16));
        if ((data[0] & 15) == 5) {
            set_ports(packet, (__u16 *)(data + 20));
            KEEP_APART(1);
            return 1;
        }
        /* A raw socket may send a header that is shorter than its own fields. */
        return (data[0] & 15) > 5 ? load_ports(skb, (data[0] & 15) * 4, packet) : 0;
    }
    if (data[0] >> 4 == 6) {
        __u8 next = data[6];
        if (next != PROTO_UDP && !is_extension(next))
            return 0;
        if (data + 48 > end)
            return 0;
        packet->family = FAMILY_INET6;
        set_ip6(&packet->source, (__u32 *)(data + 8));
        set_ip6(&packet->destination, (__u32 *)(data + 24));
        if (next == PROTO_UDP) {
            set_ports(packet, (__u16 *)(data + 40));
            KEEP_APART(2);
            return 1;
        }
        return skip_extensions(skb, next, packet);
    }
    return 0;
}

/* Return whether a request went to a group: a server cannot reply from a multicast or broadcast
 * address. Only the route knows broadcast addresses. If the route is not readable, the frame
 * decides; this is wrong for devices without frames (tun) and for clusters that use broadcast
 * frames. A copy of our own broadcast arrives as PACKET_LOOPBACK. */
static __always_inline int asks_group(struct __sk_buff *skb, const struct packet *packet) {
    if (is_group(&packet->destination, packet->family))
        return 1;
    if (packet->family != FAMILY_INET)
        return 0;
#if HAVE_KERNEL_READ
    int known, group = routed_to_group((__u64)skb, &known);
    if (known)
        return group;
#endif
    return skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_LOOPBACK;
}

#endif
