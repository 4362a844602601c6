/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * List the UDP sockets of the node. Needs to read kernel memory.
 *
 * post_bind4/6    note that a process binds a UDP socket, in `udp_sockets`, a map whose elements
 *                 belong to sockets and vanish with them.
 * sockets_here    write a record of each UDP socket in the reader's network namespace.
 * adopt_sockets   the same, and note each socket in `udp_sockets`: those that are older than the
 *                 agent.
 * noted_sockets   write a record of each socket in `udp_sockets`, whatever its namespace.
 *
 * The last three are iterators: reading their descriptor runs them (kernel documentation,
 * bpf/bpf_iterators.rst). Their context is an array of pointers.
 */
#include "common.h"
#include "compat.h"
#include "records.h"

#define BINDPORT_LOCK 8 /* SOCK_BINDPORT_LOCK: bind() named the port (include/net/sock.h) */
#define F_CREATE      1 /* BPF_SK_STORAGE_GET_F_CREATE */

BPF_SK_STORAGE(udp_sockets, struct socket_owner);

/* Call the helper by number: bcc of Debian 12 has no wrapper for it. */
static long (*const seq_write)(void *seq, const void *data, __u32 length) = (void *)127;

static __always_inline int note_owner(struct bpf_sock *sk) {
    struct socket_owner owner = {};

    if (sk->protocol != PROTO_UDP)
        return 1;
    owner.tgid = bpf_get_current_pid_tgid() >> 32;
    owner.cgroup = bpf_get_current_cgroup_id();
    bpf_get_current_comm(owner.comm, COMM_LEN);
    udp_sockets.sk_storage_get(sk, &owner, F_CREATE);
    return 1;
}

int post_bind4(struct bpf_sock *sk) {
    return note_owner(sk);
}

int post_bind6(struct bpf_sock *sk) {
    return note_owner(sk);
}

static __always_inline void read_addresses(struct socket_record *to, __u64 sk) {
    if (to->family == FAMILY_INET) {
        set_ip4(&to->bound, read_kernel32(sk + OFFSET_SOCK_SADDR));
        set_ip4(&to->peer, read_kernel32(sk + OFFSET_SOCK_DADDR));
        return;
    }
#ifdef OFFSET_SOCK_SADDR6
    copy_from_kernel(&to->bound, sizeof(to->bound), (void *)(sk + OFFSET_SOCK_SADDR6));
    copy_from_kernel(&to->peer, sizeof(to->peer), (void *)(sk + OFFSET_SOCK_DADDR6));
#endif
}

static __always_inline void read_options(struct socket_record *to, __u64 sk) {
#ifdef OFFSET_INET_FLAGS
    __u64 flags = read_kernel(sk + OFFSET_INET_FLAGS);
    to->known |= KNOWN_PKTINFO;
    to->options |= flags & 1 ? HAS_PKTINFO : 0; /* INET_FLAGS_PKTINFO */
#elif defined(OFFSET_INET_CMSG_FLAGS)
    to->known |= KNOWN_PKTINFO;
    to->options |= read_kernel8(sk + OFFSET_INET_CMSG_FLAGS) & 1 ? HAS_PKTINFO : 0;
#endif
#if KNOW_TRANSPARENT
    to->known |= KNOWN_TRANSPARENT;
    to->options |= read_transparent(sk) ? HAS_TRANSPARENT : 0;
#endif
#ifdef BIT_SOCK_REUSEPORT
    to->known |= KNOWN_REUSEPORT;
    to->options |= read_bit(sk, BIT_SOCK_REUSEPORT) ? HAS_REUSEPORT : 0;
#endif
#ifdef BIT_SOCK_IPV6ONLY
    to->options |= read_bit(sk, BIT_SOCK_IPV6ONLY) ? HAS_IPV6ONLY : 0;
#endif
#ifdef BIT_IPV6_RXINFO
    if (to->family == FAMILY_INET6) {
        __u64 ipv6 = read_kernel(sk + OFFSET_INET_PINET6);
        to->known |= KNOWN_PKTINFO6;
        to->options |= ipv6 && read_bit(ipv6, BIT_IPV6_RXINFO) ? HAS_PKTINFO6 : 0;
    }
#endif
#ifdef OFFSET_SOCK_USERLOCKS
    to->known |= KNOWN_NAMED;
    if (read_kernel8(sk + OFFSET_SOCK_USERLOCKS) >> USERLOCKS_SHIFT & BINDPORT_LOCK)
        to->options |= HAS_NAMED;
#endif
}

static __always_inline __u32 read_drops(__u64 sk) {
    __u32 drops = read_kernel32(sk + OFFSET_SOCK_DROPS);
#ifdef OFFSET_SOCK_DROP_COUNTERS
    /* Linux kernel commit 51132b99f01c ("udp: add drop_counters to udp_sock") (in v6.18) */
    __u64 counters = read_kernel(sk + OFFSET_SOCK_DROP_COUNTERS);
    if (counters)
        drops = read_kernel32(counters + OFFSET_DROPS0) + read_kernel32(counters + OFFSET_DROPS1);
#endif
    return drops;
}

/* Write a record of a socket, unless it has no port. */
static __always_inline int write_record(void *seq, __u64 sk, const struct socket_owner *owner) {
    struct socket_record to = {};

    to.port = read_kernel16(sk + OFFSET_SOCK_NUM);
    if (!to.port || read_kernel16(sk + OFFSET_SOCK_PROTOCOL) != PROTO_UDP)
        return 0;
    to.family = read_kernel16(sk + OFFSET_SOCK_FAMILY);
    read_addresses(&to, sk);
    to.peer_port = net16(read_kernel16(sk + OFFSET_SOCK_DPORT));
    read_options(&to, sk);
    to.cookie = read_kernel(sk + OFFSET_SOCK_COOKIE);
    to.netns = read_kernel32(read_kernel(sk + OFFSET_SOCK_NET) + OFFSET_NET_INUM);
    to.device = read_kernel32(sk + OFFSET_SOCK_DEVICE);
    to.uid = read_kernel32(sk + OFFSET_SOCK_UID);
    to.queue = read_kernel32(sk + OFFSET_SOCK_RMEM);
    to.queue_limit = read_kernel32(sk + OFFSET_SOCK_RCVBUF);
    to.drops = read_drops(sk);
    __u64 socket = read_kernel(sk + OFFSET_SOCK_SOCKET);
    if (socket && read_kernel(socket + OFFSET_SOCKET_FILE)) /* else it is the kernel's own */
        to.inode = read_kernel(socket + OFFSET_SOCKET_INODE);
#ifdef OFFSET_SOCK_CGROUP
    __u64 cgroup = read_kernel(sk + OFFSET_SOCK_CGROUP);
    if (cgroup)
        to.cgroup = read_kernel(read_kernel(cgroup + OFFSET_CGROUP_NODE) + OFFSET_NODE_ID);
#endif
    if (owner) {
        to.tgid = owner->tgid;
        if (owner->cgroup)
            to.cgroup = owner->cgroup;
        __builtin_memcpy(to.comm, owner->comm, COMM_LEN);
    }
    seq_write(seq, &to, sizeof(to));
    return 0;
}

/* struct bpf_iter__udp: meta, udp_sk, uid, bucket. struct bpf_iter_meta: seq, session_id, seq_num.
 * After the last socket, the pointer is 0. */
int sockets_here(__u64 *context) {
    __u64 *meta = (void *)context[0];
    void *sk = (void *)context[1];

    return sk ? write_record((void *)meta[0], (__u64)sk, 0) : 0;
}

int adopt_sockets(__u64 *context) {
    __u64 *meta = (void *)context[0];
    void *sk = (void *)context[1];
    struct socket_owner owner = {};

    if (!sk)
        return 0;
    udp_sockets.sk_storage_get(sk, &owner, F_CREATE);
    return write_record((void *)meta[0], (__u64)sk, 0);
}

/* struct bpf_iter__bpf_sk_storage_map: meta, map, sk, value. */
int noted_sockets(__u64 *context) {
    __u64 *meta = (void *)context[0];
    void *sk = (void *)context[2];
    struct socket_owner *owner = (void *)context[3];

    return sk && owner ? write_record((void *)meta[0], (__u64)sk, owner) : 0;
}
