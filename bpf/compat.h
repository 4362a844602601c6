/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Everything that differs between kernels, and nothing else. agent/kernel/features.py finds out by
 * trying what this kernel allows and passes it in as HAVE_* (1 or 0) when the programs are
 * compiled.
 */
#ifndef UDPWATCH_COMPAT_H
#define UDPWATCH_COMPAT_H

/* bpf_get_netns_cookie() in cgroup_skb: Linux kernel commit c221d3744ad3 ("bpf: cgroups: Add
 * bpf_get_netns_cookie() for cgroup_skb") (in v6.15). Without it the scope is the socket. */
#if HAVE_NETNS_COOKIE
#define scope_of(ctx)   bpf_get_netns_cookie(ctx)
#define netns_of(scope) (scope)
#else
#define scope_of(ctx)   bpf_get_socket_cookie(ctx)
#define netns_of(scope) 0
#endif

/* bpf_ktime_get_coarse_ns(): Linux kernel commit d05512618056 ("bpf: Add bpf_ktime_get_coarse_ns
 * helper") (in v5.11). A tick's precision is far below the window's. */
#if HAVE_COARSE_CLOCK
#define now_ns() bpf_ktime_get_coarse_ns()
#else
#define now_ns() bpf_ktime_get_ns()
#endif

/* Ends a branch that must stay one. Where two branches differ only in an offset, the compiler makes
 * one of them with a computed offset, and the verifier allows arithmetic on a pointer to map or
 * stack memory with anything but constants only to whom CAP_PERFMON is given. */
#define KEEP_APART(n) asm volatile("" : : "i"(n))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define net16(x) __builtin_bswap16(x)
#define net32(x) __builtin_bswap32(x)
#else
#define net16(x) (x)
#define net32(x) (x)
#endif

#define READ_ONCE(x)         (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

#endif
