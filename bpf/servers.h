/* SPDX-License-Identifier: GPL-2.0-only */
/* Which server a socket belongs to. */
#ifndef UDPWATCH_SERVERS_H
#define UDPWATCH_SERVERS_H

#include "common.h"
#include "packet.h"

#define ROOT_CGROUP     1ULL         /* the id of the root of cgroup v2 (kernfs) */
#define ROOT_TENANT     (1ULL << 63) /* a namespace of the root cgroup; not a cgroup id */
#define FIRST_EPHEMERAL 32768 /* the default of ip_local_port_range; clients use higher ports */
#define NAME_NS         10000000000ULL /* how often the process of a server is noted */
#define BINDPORT_LOCK   8 /* SOCK_BINDPORT_LOCK: bind() named the port (include/net/sock.h) */

/* Return the owner of a share of a table: a cgroup, or a namespace of the root cgroup. */
static __always_inline __u64 tenant_in(__u64 cgroup, __u64 scope) {
    return cgroup > ROOT_CGROUP ? cgroup : scope | ROOT_TENANT;
}

/* A connected socket of a server has the port of the socket that receives its new peers, which is
 * usually bound to every address. */
static __always_inline void set_server(struct server_key *to, const struct bpf_sock *sk,
                                       const struct conversation_key *key) {
    int is_connected = sk->state == BPF_TCP_ESTABLISHED;

    to->scope = key->scope;
    to->port = key->port;
    if (sk->family == FAMILY_INET) {
        set_ip4(&to->bound, is_connected ? 0 : sk->src_ip4);
    } else if (!is_connected) {
        to->bound.word[0] = sk->src_ip6[0];
        to->bound.word[1] = sk->src_ip6[1];
        to->bound.word[2] = sk->src_ip6[2];
        to->bound.word[3] = sk->src_ip6[3];
    }
}

/* Return whether an unknown socket is a server's: it is not connected, and bind() named its port.
 * If that cannot be read, the port decides. */
static __always_inline int is_servers(struct __sk_buff *skb, const struct bpf_sock *sk) {
    if (sk->state == BPF_TCP_ESTABLISHED)
        return 0;
#ifdef OFFSET_SOCK_USERLOCKS
    __u8 locks = read_kernel8(read_kernel((__u64)skb + OFFSET_SKB_SK) + OFFSET_SOCK_USERLOCKS);
    return locks >> USERLOCKS_SHIFT & BINDPORT_LOCK;
#else
    return sk->src_port < FIRST_EPHEMERAL;
#endif
}

#endif
