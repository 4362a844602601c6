/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Everything that differs between kernels, and nothing else. agent/kernel/features.py finds out by
 * trying what this kernel allows and passes it in as HAVE_* (1 or 0) when the programs are
 * compiled, with OFFSET_* of the members of kernel structures where kernel memory may be read.
 */
#ifndef UDPWATCH_COMPAT_H
#define UDPWATCH_COMPAT_H

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define net16(x) __builtin_bswap16(x)
#define net32(x) __builtin_bswap32(x)
#else
#define net16(x) (x)
#define net32(x) (x)
#endif

#define READ_ONCE(x)         (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

/* Ends a branch that must stay one. Where two branches differ only in an offset, the compiler makes
 * one of them with a computed offset, and the verifier allows arithmetic on a pointer to map or
 * stack memory with anything but constants only to whom CAP_PERFMON is given. */
#if HAVE_KERNEL_READ
#define KEEP_APART(n)
#else
#define KEEP_APART(n) asm volatile("" : : "i"(n))
#endif

#if HAVE_KERNEL_READ
/* By number: bcc puts bpf_probe_read in place of bpf_probe_read_kernel, which these programs may
 * not call, where /proc/kallsyms does not show it the newer one (without CAP_SYSLOG). */
static int (*const copy_from_kernel)(void *to, __u32 size, const void *from) = (void *)113;

/* By the member's own size: the first bytes of a wider read are the member only where the least
 * significant byte comes first. Without a number: pointers, longs, halves of an IPv6 address. */
#define READ_KERNEL(name, type)                                                                    \
    static __always_inline type name(__u64 address) {                                              \
        type value = 0;                                                                            \
        copy_from_kernel(&value, sizeof(value), (void *)address);                                  \
        return value;                                                                              \
    }

READ_KERNEL(read_kernel, __u64)
READ_KERNEL(read_kernel32, __u32)
READ_KERNEL(read_kernel16, __u16)
READ_KERNEL(read_kernel8, __u8)

static __always_inline __u64 read_net(struct __sk_buff *skb) {
    return read_kernel(read_kernel((__u64)skb + OFFSET_SKB_SK) + OFFSET_SOCK_NET);
}

static __always_inline __u32 read_netns_inode(struct __sk_buff *skb) {
    return read_kernel32(read_net(skb) + OFFSET_NET_INUM);
}
#endif

/* A socket's identity within one send: its address in the kernel, where function probes see it too,
 * else its cookie. */
#if HAVE_KERNEL_READ
#define socket_of_skb(skb)  ((__u64)(skb)->sk)
#define socket_of_send(ctx) ((__u64)(ctx)->sk)
#else
#define socket_of_skb(skb)  bpf_get_socket_cookie(skb)
#define socket_of_send(ctx) bpf_get_socket_cookie(ctx)
#endif

/* Whether a hook of a send can tell the cause by the socket alone, without a call (see sockets.c).
 */
#define CAUSE_BY_SOCKET (HAVE_KERNEL_READ && KNOW_CURRENT)

/* The scope of a conversation: the network namespace, by its cookie, else by its address in the
 * kernel, which leaves the kernel nowhere; where neither can be had, the socket.
 * bpf_get_netns_cookie() in cgroup_skb: Linux kernel commit c221d3744ad3 ("bpf: cgroups: Add
 * bpf_get_netns_cookie() for cgroup_skb") (in v6.15). */
#if HAVE_NETNS_COOKIE
#define scope_of_skb(skb)    bpf_get_netns_cookie(skb)
#define netns_of(scope, skb) (scope)
#elif HAVE_KERNEL_READ
#define scope_of_skb(skb)    read_net(skb)
#define netns_of(scope, skb) read_netns_inode(skb)
#else
#define scope_of_skb(skb)    bpf_get_socket_cookie(skb)
#define netns_of(scope, skb) 0
#endif

/* The clock of the table of conversations. The kernel puts a load in place of this call, where the
 * calls that read the time take 20 ns. Its precision, a tick, is far below the window's; its zero
 * is not CLOCK_MONOTONIC's, and it is not slewed with it. */
#define now_ns() (bpf_jiffies64() * TICK_NS)

/* The current thread in cgroup_skb: by the helpers, else from its task_struct. */
#define KNOW_CURRENT (HAVE_CURRENT || HAVE_CURRENT_TASK)
#if HAVE_CURRENT
#define current_pid_tgid()  bpf_get_current_pid_tgid()
#define current_uid()       ((__u32)bpf_get_current_uid_gid())
#define current_cgroup(skb) bpf_get_current_cgroup_id()
#if HAVE_CURRENT_COMM
#define current_comm(to) bpf_get_current_comm(to, COMM_LEN)
#else
#define current_comm(to)
#endif
#elif HAVE_CURRENT_TASK
static __always_inline __u64 current_pid_tgid(void) {
    __u64 task = bpf_get_current_task();
    __u64 tgid = read_kernel32(task + OFFSET_TASK_TGID);
    return tgid << 32 | read_kernel32(task + OFFSET_TASK_PID);
}

static __always_inline __u32 current_uid(void) {
    return read_kernel32(read_kernel(bpf_get_current_task() + OFFSET_TASK_CRED) + OFFSET_CRED_UID);
}

/* Else the cgroup of the process that made the socket, which may be another one's. */
#ifdef OFFSET_TASK_CGROUPS
static __always_inline __u64 read_current_cgroup(void) {
    __u64 set = read_kernel(bpf_get_current_task() + OFFSET_TASK_CGROUPS);
    __u64 node = read_kernel(read_kernel(set + OFFSET_CSS_SET_CGROUP) + OFFSET_CGROUP_NODE);
    return read_kernel(node + OFFSET_NODE_ID);
}
#define current_cgroup(skb) read_current_cgroup()
#else
#define current_cgroup(skb) bpf_skb_cgroup_id(skb)
#endif
#define current_comm(to)                                                                           \
    copy_from_kernel(to, COMM_LEN, (void *)(bpf_get_current_task() + OFFSET_TASK_COMM))
#else
#define current_pid_tgid() 0ULL
#endif

#endif
