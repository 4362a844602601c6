/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How the source address of a send was chosen. No map is used here: bcc rewrites map calls in the
 * main file only.
 */
#ifndef UDPWATCH_CAUSES_H
#define UDPWATCH_CAUSES_H

#include "common.h"

#define ALIKE_NS 10000000000ULL /* far longer than a send takes */

#if CAUSE_BY_SOCKET
/* The memory of a socket is used again for another one, which may be of another kind: so they are
 * taken for alike again some time after they differed. A send does not take as long. */
static __always_inline int are_alike(const struct socket_cause *known) {
    __u32 differed = READ_ONCE(known->differed);
    return !differed || (__u32)bpf_jiffies64() - differed > ALIKE_NS / TICK_NS;
}

/* Note the cause of one more send of a socket; whether all that is known of it have the same. */
static __always_inline int note_cause(struct socket_cause *known, __u16 cause) {
    if (known->cause == cause)
        return are_alike(known);
    if (are_alike(known))
        WRITE_ONCE(known->before, known->cause);
    WRITE_ONCE(known->differed, ((__u32)bpf_jiffies64() - 1) | 1); /* not 0, not later */
    WRITE_ONCE(known->cause, cause);
    return 0;
}

/* As note_cause, by the socket. To ask for the current thread costs more than all of this. */
static __always_inline int note_socket(struct socket_causes *causes, __u64 socket, __u16 cause) {
    if (!causes)
        return 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (causes->way[i].socket == socket)
            return note_cause(&causes->way[i], cause);
    }
    struct socket_cause *replaced = &causes->way[bpf_jiffies64() & 3];
    WRITE_ONCE(replaced->socket, 0); /* nobody's while it changes */
    WRITE_ONCE(replaced->differed, 0);
    WRITE_ONCE(replaced->cause, cause);
    WRITE_ONCE(replaced->socket, socket);
    return 0;
}

/* The cause of a socket's send: *alike if all that is known of it have the same, else that of a
 * thread of which nothing is noted. 0 where nothing is known. */
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
    /* Volatile: the verifier wants each member of a socket read at an offset of its own. */
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
