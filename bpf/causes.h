/* SPDX-License-Identifier: GPL-2.0-only */
/* How the source address of a send was chosen. */
#ifndef UDPWATCH_CAUSES_H
#define UDPWATCH_CAUSES_H

#include "common.h"

#define ALIKE_NS 10000000000ULL /* far longer than a send takes */

#if CAUSE_BY_SOCKET
/* Return whether all recent sends of a socket had the same cause. The kernel reuses the memory of a
 * socket for sockets of another kind, so a difference counts only for a while. */
static __always_inline int are_alike(const struct socket_cause *known) {
    __u32 differed = READ_ONCE(known->differed);
    return !differed || (__u32)bpf_jiffies64() - differed > ALIKE_NS / TICK_NS;
}

/* Note the cause of one more send of a socket; return whether all recent sends had the same cause.
 */
static __always_inline int note_cause(struct socket_cause *known, __u16 cause) {
    if (known->cause == cause)
        return are_alike(known);
    if (are_alike(known))
        WRITE_ONCE(known->before, known->cause);
    WRITE_ONCE(known->differed, ((__u32)bpf_jiffies64() - 1) | 1); /* not 0, not later */
    WRITE_ONCE(known->cause, cause);
    return 0;
}

/* Like note_cause, but find the socket first. Asking for the current thread would cost more than
 * this whole function. */
static __always_inline int note_socket(struct socket_causes *causes, __u64 socket, __u16 cause) {
    if (!causes)
        return 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (causes->way[i].socket == socket)
            return note_cause(&causes->way[i], cause);
    }
    struct socket_cause *replaced = &causes->way[bpf_jiffies64() & 3];
    WRITE_ONCE(replaced->socket, 0); /* invalid while it changes */
    WRITE_ONCE(replaced->differed, 0);
    WRITE_ONCE(replaced->cause, cause);
    WRITE_ONCE(replaced->socket, socket);
    return 0;
}

/* Return the cause of a socket's send, 0 if it is unknown. *alike is 1 if all recent sends had this
 * cause; otherwise the cause applies only to threads without a note of their own. */
static __always_inline __u32 cause_of_socket(const struct socket_causes *causes, __u64 socket,
                                             int *alike) {
    __u32 cause = 0;

    *alike = 0;
    if (!causes)
        return 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const struct socket_cause *known = &causes->way[i];
        if (READ_ONCE(known->socket) == socket) {
            *alike = are_alike(known);
            cause = *alike ? READ_ONCE(known->cause) : READ_ONCE(known->before);
            if (READ_ONCE(known->socket) == socket)
                return cause;
            break;
        }
    }
    *alike = 0;
    return 0;
}

#endif

static __always_inline int leaves_from_own(struct bpf_sock *sk, const struct address *source,
                                           __u8 family) {
    /* Volatile, because the verifier requires a separate read at the offset of each member. */
    __u32 own4 = READ_ONCE(sk->src_ip4), own[4];
    own[0] = READ_ONCE(sk->src_ip6[0]);
    own[1] = READ_ONCE(sk->src_ip6[1]);
    own[2] = READ_ONCE(sk->src_ip6[2]);
    own[3] = READ_ONCE(sk->src_ip6[3]);
    if (family == FAMILY_INET)
        return source->word[3] == own4;
    return source->word[0] == own[0] && source->word[1] == own[1] && source->word[2] == own[2] &&
           source->word[3] == own[3];
}

#endif
