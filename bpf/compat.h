/* SPDX-License-Identifier: GPL-2.0-only */
/* Differences between kernels, and nothing else. agent/kernel/features.py finds by trying what this
 * kernel allows. It passes the result to the compiler as HAVE_* (1 or 0), and as OFFSET_* of
 * members of kernel structures if the programs may read kernel memory. */
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

/* End a branch that the compiler must not merge with others. If two branches differ only in an
 * offset, the compiler merges them and computes the offset. Without CAP_PERFMON, the verifier
 * refuses arithmetic on pointers to map or stack memory with anything but constants. */
#if HAVE_KERNEL_READ
#define KEEP_APART(n)
#else
#define KEEP_APART(n) asm volatile("" : : "i"(n))
#endif

#if HAVE_KERNEL_READ
/* Call the helper by its number. Without CAP_SYSLOG, bcc does not see the helper in /proc/kallsyms
 * and replaces it with bpf_probe_read, which these programs may not call. */
static int (*const copy_from_kernel)(void *to, __u32 size, const void *from) = (void *)113;

/* Read a member by its own size: on big-endian machines, the first bytes of a wider read are not
 * the member. The function without a number reads pointers, longs and halves of IPv6 addresses. */
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

static __always_inline __u8 read_bit(__u64 address, __u32 bit) {
    return read_kernel8(address + bit / 8) >> bit % 8 & 1;
}

/* Return whether a socket has IP_TRANSPARENT set. */
#ifdef OFFSET_INET_FLAGS
#define KNOW_TRANSPARENT     1
#define read_transparent(sk) (read_kernel((sk) + OFFSET_INET_FLAGS) >> INET_FLAGS_TRANSPARENT & 1)
#elif defined(BIT_INET_TRANSPARENT)
#define KNOW_TRANSPARENT     1
#define read_transparent(sk) read_bit(sk, BIT_INET_TRANSPARENT)
#else
#define KNOW_TRANSPARENT     0
#define read_transparent(sk) 0
#endif

static __always_inline __u64 read_net(struct __sk_buff *skb) {
    return read_kernel(read_kernel((__u64)skb + OFFSET_SKB_SK) + OFFSET_SOCK_NET);
}

static __always_inline __u32 read_netns_inode(struct __sk_buff *skb) {
    return read_kernel32(read_net(skb) + OFFSET_NET_INUM);
}
#endif

/* Identify a socket within one send: by its address in the kernel, which function probes also see,
 * or else by its cookie. */
#if HAVE_KERNEL_READ
#define socket_of_skb(skb)  ((__u64)(skb)->sk)
#define socket_of_send(ctx) ((__u64)(ctx)->sk)
#else
#define socket_of_skb(skb)  bpf_get_socket_cookie(skb)
#define socket_of_send(ctx) bpf_get_socket_cookie(ctx)
#endif

/* Whether a hook can find the cause of a send from the socket alone, without a call (causes.h). */
#define CAUSE_BY_SOCKET (HAVE_KERNEL_READ && KNOW_CURRENT)

/* The scope of a conversation: the cookie of its network namespace, else the address of the
 * namespace in the kernel (never sent to user space), else the socket. bpf_get_netns_cookie() in
 * cgroup_skb: Linux kernel commit c221d3744ad3 ("bpf: cgroups: Add bpf_get_netns_cookie() for
 * cgroup_skb") (in v6.15). */
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

/* The clock of the table of conversations. The kernel replaces this call with a load; calls that
 * read the time take 20 ns. A tick is far shorter than the window. This clock starts at another
 * time than CLOCK_MONOTONIC and is not slewed with it. */
#define now_ns() (bpf_jiffies64() * TICK_NS)

/* Identify the current thread in cgroup_skb: by the helpers, else from its task_struct. */
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

/* The socket may have been created by a process of another cgroup. */
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
