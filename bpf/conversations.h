/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The table of conversations: which addresses each client asked. Headers use no map, since bcc
 * rewrites map calls in the main file only; the caller looks sets up and passes them.
 *
 * Rules
 * 1. A set is changed under its lock. Without the lock, only the times of a conversation with a
 *    single address change. A reply is judged wrong only under the lock.
 * 2. table.h chooses the conversation that is evicted.
 * 3. sockets.c notes each eviction within the window; a reply that it may concern is undecided.
 *
 * Without CAP_PERFMON, the verifier refuses variable offsets into map memory. Each way then has a
 * constant offset and is selected by comparing values stored in it.
 */
#ifndef UDPWATCH_CONVERSATIONS_H
#define UDPWATCH_CONVERSATIONS_H

#include "table.h"

/* Call the helpers by number: bcc of Debian 12 has no wrappers for them. */
static void (*const spin_lock)(void *lock) = (void *)93;
static void (*const spin_unlock)(void *lock) = (void *)94;

/* ---- times ---- */

/* The clock is coarse; the order of two events within one tick is kept. */
static __always_inline __u64 after(__u64 now, __u64 other) {
    return now > other ? now : other + 1;
}

static __always_inline __u64 not_before(__u64 now, __u64 other) {
    return now > other ? now : other;
}

/* Return the nanoseconds since `then`, which are negative within one tick. */
static __always_inline __s64 age(__u64 then, __u64 now) {
    return now - then;
}

static __always_inline int is_pending(const struct conversation *request) {
    return request->asked > request->answered;
}

/* Note the time of a request, which begins a wait unless it continues one. */
static __always_inline void note_time(struct conversation *way, __u64 answered, int continues,
                                      __u64 now) {
    __u64 time = after(now, answered);

    if (!continues)
        WRITE_ONCE(way->answered, time - 1);
    WRITE_ONCE(way->asked, time);
}

/* A group is stored as the address zero. */
static __always_inline int is_any(const struct address *asked) {
    return !(asked->half[0] | asked->half[1]);
}

/* A request to a group may be answered from any address. */
static __always_inline int answers(const struct address *asked, const struct address *source) {
    return same(asked, source) || is_any(asked);
}

/* ---- conversations ---- */

/* Apply the macro X to the number of each way. The calls are written out where the verifier refuses
 * computed offsets: the compiler would merge the exits of a loop into code that computes the offset
 * (KEEP_APART). */
#define EACH_WAY(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#if HAVE_KERNEL_READ
static __always_inline __u32 way_of(const __u64 *words, __u64 word) {
#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        if (READ_ONCE(words[i]) == word)
            return i;
    }
    return WAYS;
}

/* Apply X to the way with this word. */
#define WAY_WITH(words, word, X)                                                                   \
    {                                                                                              \
        __u32 way_ = opaque(way_of(words, word));                                                  \
        if (way_ < WAYS)                                                                           \
            X(way_)                                                                                \
    }
#else
#define WAY_WITH(words, word, X) EACH_WAY(X)
#endif

/* Volatile, so that the compiler selects values and never pointers. */
static __always_inline void copy(struct conversation *to, const struct conversation *from) {
    const volatile __u64 *words = (const volatile __u64 *)from;
#pragma unroll
    for (int i = 0; i < sizeof(*to) / sizeof(__u64); i++)
        ((__u64 *)to)[i] = words[i];
}

static __always_inline int is_expired(const struct conversation *request, __u64 now) {
    return !is_remembered(request->asked, now);
}

/* ---- without the lock ---- */

/* Results without the lock. Another conversation may take the way meanwhile; DONE means that the
 * way still belonged to this conversation after the write. With DONE, the result has the bits
 * SLOT_MASK of the flags, and CONTINUED if the datagram neither began nor ended a wait. */
enum quick { UNKNOWN_PEER, DONE, LOOK_CLOSER };

#define QUICK_MASK 3
#define CONTINUED  4

static __always_inline __u32 done(__u16 flags, int continued) {
    return DONE | (continued ? CONTINUED : 0) | (flags & SLOT_MASK);
}

static __always_inline __u32 ask_way(struct conversation *way, const __u64 *its_tag, __u64 tag,
                                     const struct address *address, int is_client, __u64 now) {
    __u64 asked = READ_ONCE(way->asked), answered = READ_ONCE(way->answered);
    __u16 not_now = SEVERAL | WRONGLY_ANSWERED | (is_client ? 0 : CLIENTS);
    __u16 flags = READ_ONCE(way->tenant.flags);

    if (flags & not_now || !same(&way->address, address) || age(asked, now) > (__s64)WINDOW_NS)
        return LOOK_CLOSER;
    if (asked > answered && age(asked, now) < (__s64)REFRESH_NS)
        return done(flags, 1);
    int continues = asked > answered && age(answered, now) < (__s64)REPEAT_NS;
    note_time(way, answered, continues, now);
    if (READ_ONCE(*its_tag) != tag || READ_ONCE(way->tenant.flags) & SEVERAL)
        return LOOK_CLOSER;
    return done(flags, continues);
}

/* Note a repeated request for the single address of a conversation. */
static __always_inline __u32 ask_again(struct conversation_set *set, __u64 tag,
                                       const struct address *address, int is_client, __u64 now) {
    __u32 result;
#define ASK(i)                                                                                     \
    if (READ_ONCE(set->tag[i]) == tag) {                                                           \
        result = ask_way(&set->way[i], &set->tag[i], tag, address, is_client, now);                \
        KEEP_APART(i);                                                                             \
        return result;                                                                             \
    }
    WAY_WITH(set->tag, tag, ASK)
    return UNKNOWN_PEER;
}

static __always_inline __u32 answer_way(struct conversation *way, const __u64 *its_tag, __u64 tag,
                                        const struct address *source, __u64 now) {
    __u64 asked = READ_ONCE(way->asked);
    __u16 flags = READ_ONCE(way->tenant.flags);
    int is_waiting = asked > READ_ONCE(way->answered);

    if (flags & SEVERAL || !answers(&way->address, source) || age(asked, now) > (__s64)WINDOW_NS)
        return LOOK_CLOSER;
    if (is_waiting) {
        __u64 answered = not_before(now, asked);
        WRITE_ONCE(way->answered, answered);
        if (READ_ONCE(*its_tag) != tag && READ_ONCE(way->answered) == answered)
            WRITE_ONCE(way->answered, 0);
    }
    if (READ_ONCE(*its_tag) != tag || READ_ONCE(way->tenant.flags) & SEVERAL)
        return LOOK_CLOSER;
    return done(flags, !is_waiting);
}

/* Note a right reply from the single address of a conversation. */
static __always_inline __u32 answer(struct conversation_set *set, __u64 tag,
                                    const struct address *source, __u64 now) {
    __u32 result;
#define ANSWER_WAY(i)                                                                              \
    if (READ_ONCE(set->tag[i]) == tag) {                                                           \
        result = answer_way(&set->way[i], &set->tag[i], tag, source, now);                         \
        KEEP_APART(i);                                                                             \
        return result;                                                                             \
    }
    WAY_WITH(set->tag, tag, ANSWER_WAY)
    return UNKNOWN_PEER;
}

/* ---- under the lock ---- */

/* Score each way, of which one is evicted for `fresh`; return the highest score. */
static __always_inline __u64 scores_of(const struct conversation_set *set,
                                       const struct conversation *fresh, __u64 *score, __u64 now) {
    __u64 best = 0;

#pragma unroll
    for (int i = 0; i < WAYS; i++)
        score[i] = 2;
#pragma unroll
    for (int i = 0; i < WAYS; i++) {
#pragma unroll
        for (int j = i + 1; j < WAYS; j++) {
            __u64 shared = shares_of(&set->way[i].tenant, &set->way[j].tenant);
            score[i] += shared;
            score[j] += shared;
        }
    }
#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        const struct conversation *request = &set->way[i];
        __u32 flags = request->tenant.flags;
        __u64 is_answered =
            (is_less(request->answered, request->asked) ^ 1) & ~(__u64)(flags & SEVERAL);
        score[i] = eviction_score(score[i], is_heavy(&request->tenant, &fresh->tenant), is_answered,
                                  flags / WRONGLY_ANSWERED & 1, request->asked, now);
        best = greater_of(best, score[i]);
    }
    return best;
}

/* Insert a conversation where the least is lost, and copy what it replaces. The caller holds the
 * lock of the set. */
static __always_inline void insert(struct conversation_set *set, __u64 tag,
                                   const struct conversation *fresh, __u64 now,
                                   struct conversation *evicted, __u64 *evicted_tag) {
    __u64 score[WAYS], best = 0;

#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        score[i] = NEVER - set->way[i].asked;
        best = greater_of(best, score[i]);
    }
    if (is_remembered(NEVER - best, now))
        best = scores_of(set, fresh, score, now);
#define INSERT(i)                                                                                  \
    if (score[i] == best) {                                                                        \
        *evicted_tag = set->tag[i];                                                                \
        copy(evicted, &set->way[i]);                                                               \
        WRITE_ONCE(set->tag[i], 0);                                                                \
        set->way[i] = *fresh;                                                                      \
        WRITE_ONCE(set->tag[i], tag);                                                              \
        KEEP_APART(i);                                                                             \
        return;                                                                                    \
    }
    WAY_WITH(score, best, INSERT)
}

enum remembering {
    KNOWN,   /* this address was asked before, and no other */
    WAITING, /* KNOWN + 1: the same, and the request continues a wait */
    FRESH,   /* the conversation is new */
    ANOTHER, /* it asked another address before, copied to `known` */
};

static __always_inline enum remembering note_in_way(struct conversation *way,
                                                    const struct conversation *fresh, __u64 now,
                                                    struct conversation *known) {
    if (is_expired(way, now)) {
        *way = *fresh;
        return KNOWN;
    }
    if (!(way->tenant.flags & SEVERAL) && same(&way->address, &fresh->address)) {
        /* A peer that waited for long and asks again begins another wait: its first request stays
         * unanswered. */
        int continues =
            is_less(way->answered, way->asked) & is_less(now, way->answered + REPEAT_NS) & 1;
        note_time(way, way->answered, continues, now);
        way->tenant.flags =
            (way->tenant.flags & HEAVY) | (fresh->tenant.flags & (CLIENTS | SLOT_MASK));
        return KNOWN + continues;
    }
    copy(known, way);
    return ANOTHER;
}

/* Note a request in its conversation, unless another address was asked within the window. If the
 * conversation is new, `known` is the one that was evicted. Takes and releases the lock. */
static __always_inline enum remembering note_request(struct conversation_set *set, __u64 tag,
                                                     const struct conversation *fresh, __u64 now,
                                                     struct conversation *known,
                                                     __u64 *evicted_tag) {
    enum remembering done = FRESH;

    spin_lock(&set->lock);
#define NOTE(i)                                                                                    \
    if (set->tag[i] == tag) {                                                                      \
        done = note_in_way(&set->way[i], fresh, now, known);                                       \
        KEEP_APART(i);                                                                             \
        goto out;                                                                                  \
    }
    WAY_WITH(set->tag, tag, NOTE)
    insert(set, tag, fresh, now, known, evicted_tag);
out:
    spin_unlock(&set->lock);
    return done;
}

static __always_inline void change_way(struct conversation *way, const struct conversation *fresh,
                                       __u64 now) {
    if (!same(&way->address, &fresh->address)) {
        way->address = fresh->address;
        way->answered = now;
        way->tenant.flags = SEVERAL | (way->tenant.flags & (HEAVY | SLOT_MASK));
    } else if (!is_remembered(way->answered, now)) {
        way->answered = fresh->asked - 1;
        way->tenant.flags &= HEAVY | SLOT_MASK;
    }
    way->asked = fresh->asked;
}

/* Note the newest address of a conversation with several addresses, if it still exists, and copy
 * its previous state to `known`. After a window without another address, the conversation has a
 * single address again. Takes and releases the lock. */
static __always_inline void set_newest(struct conversation_set *set, __u64 tag,
                                       const struct conversation *fresh, __u64 now,
                                       struct conversation *known) {
    spin_lock(&set->lock);
#define CHANGE(i)                                                                                  \
    if (set->tag[i] == tag) {                                                                      \
        copy(known, &set->way[i]);                                                                 \
        change_way(&set->way[i], fresh, now);                                                      \
        KEEP_APART(i);                                                                             \
        goto out;                                                                                  \
    }
    WAY_WITH(set->tag, tag, CHANGE)
out:
    spin_unlock(&set->lock);
}

enum judgement { NOT_A_REPLY, RIGHT, WRONG };

static __always_inline enum judgement
judge_way(struct conversation *way, const struct address *source, int port_kept, __u64 now) {
    if (is_expired(way, now) || way->tenant.flags & SEVERAL)
        return NOT_A_REPLY;
    if ((port_kept || is_any(&way->address)) && answers(&way->address, source)) {
        way->answered = not_before(now, way->asked);
        return RIGHT;
    }
    if (!is_pending(way))
        return NOT_A_REPLY;
    way->tenant.flags |= WRONGLY_ANSWERED;
    return WRONG;
}

/* Judge a datagram of a conversation with a single address, and copy the conversation as it was
 * before to `known`; a conversation with SEVERAL addresses is not judged. If `port_kept` is 0, the
 * datagram leaves from another port than the one asked and is right for no request. Takes and
 * releases the lock. */
static __always_inline enum judgement judge_one(struct conversation_set *set, __u64 tag,
                                                const struct address *source, int port_kept,
                                                __u64 now, struct conversation *known) {
    enum judgement judgement = NOT_A_REPLY;

    spin_lock(&set->lock);
#define JUDGE(i)                                                                                   \
    if (set->tag[i] == tag) {                                                                      \
        copy(known, &set->way[i]);                                                                 \
        judgement = judge_way(&set->way[i], source, port_kept, now);                               \
        KEEP_APART(i);                                                                             \
        goto out;                                                                                  \
    }
    WAY_WITH(set->tag, tag, JUDGE)
out:
    spin_unlock(&set->lock);
    return judgement;
}

/* ---- conversations with several addresses ---- */

/* Apply the macro X to a pointer to each way. */
#if HAVE_KERNEL_READ
#define EACH_ADDRESS(set, X)                                                                       \
    {                                                                                              \
        struct asked_address *way_ = (set)->way;                                                   \
        _Pragma("clang loop unroll(disable)") for (int i_ = 0; i_ < ADDRESS_WAYS; i_++) {          \
            X(way_)                                                                                \
            way_ = (void *)opaque((__u64)(way_ + 1));                                              \
        }                                                                                          \
    }
#else
#define FOUR(X, way) X((way)) X((way) + 1) X((way) + 2) X((way) + 3)
#define EACH_ADDRESS(set, X)                                                                       \
    FOUR(X, (set)->way)                                                                            \
    FOUR(X, (set)->way + 4)                                                                        \
    FOUR(X, (set)->way + 8)                                                                        \
    FOUR(X, (set)->way + 12)
#endif

/* Note a request; an answered one stays answered. Copy the one that was evicted, or set its hash to
 * 0. Takes and releases the lock. */
static __always_inline void note_address(struct address_set *set, const struct asked_address *fresh,
                                         struct asked_address *evicted) {
    __u64 lowest = NEVER;

    evicted->hash = 0;
    spin_lock(&set->lock);
#define UPDATE(way)                                                                                \
    if ((way)->hash == fresh->hash) {                                                              \
        if ((way)->asked == fresh->asked)                                                          \
            (way)->rank = lesser_of((way)->rank, fresh->rank);                                     \
        else                                                                                       \
            (way)->rank = fresh->rank;                                                             \
        (way)->asked = fresh->asked;                                                               \
        KEEP_APART(__COUNTER__);                                                                   \
        goto out;                                                                                  \
    }
    EACH_ADDRESS(set, UPDATE)
#define LOWEST(way) lowest = lesser_of(lowest, READ_ONCE((way)->rank));
    EACH_ADDRESS(set, LOWEST)
#define REPLACE(way)                                                                               \
    if (READ_ONCE((way)->rank) == lowest) {                                                        \
        evicted->hash = (way)->hash;                                                               \
        evicted->asked = (way)->asked;                                                             \
        evicted->rank = lowest;                                                                    \
        evicted->tenant = (way)->tenant;                                                           \
        *(way) = *fresh;                                                                           \
        KEEP_APART(__COUNTER__);                                                                   \
        goto out;                                                                                  \
    }
    EACH_ADDRESS(set, REPLACE)
out:
    spin_unlock(&set->lock);
}

/* Note that a request was answered, if it is in the set. Takes and releases the lock. */
static __always_inline void note_answer(struct address_set *set, __u64 hash) {
    spin_lock(&set->lock);
#define SETTLE(way)                                                                                \
    if ((way)->hash == hash) {                                                                     \
        (way)->rank = (way)->asked - WINDOW_NS;                                                    \
        KEEP_APART(__COUNTER__);                                                                   \
        goto out;                                                                                  \
    }
    EACH_ADDRESS(set, SETTLE)
out:
    spin_unlock(&set->lock);
}

/* Return 1 if a way holds one of two requests, else 0. */
static __always_inline __u64 is_request(const struct asked_address *way, __u64 one, __u64 other) {
    __u64 hash = READ_ONCE(way->hash);
    return is_zero(hash ^ one) | is_zero(hash ^ other);
}

/* Mark a way as answered if it holds one of two requests; return 1 if it does, else 0. */
static __always_inline __u64 answer_request(struct asked_address *way, __u64 one, __u64 other,
                                            __u64 now) {
    __u64 rank = READ_ONCE(way->rank), asked = READ_ONCE(way->asked);
    __u64 is_it = is_request(way, one, other) & is_less(now, asked + WINDOW_NS + 1);
    WRITE_ONCE(way->rank, rank ^ ((rank ^ (asked - WINDOW_NS)) & opaque(-is_it)));
    return is_it;
}

/* Return the later of `newest` and the time of a way, if the way is a pending request of this
 * conversation. */
static __always_inline __u64 newest_of(__u64 newest, const struct asked_address *way, __u64 tag) {
    __u64 rank = READ_ONCE(way->rank);
    __u64 differs = (READ_ONCE(way->tag) ^ tag) | (READ_ONCE(way->asked) ^ rank);
    return greater_of(newest, rank & -is_zero(differs));
}

/* Like judge_one, for a conversation with several addresses. `hash` is the request of the source
 * address, `group` the one of the address zero. If the result is WRONG, `expected` is the newest
 * address with a pending request. Takes and releases the lock. */
static __always_inline enum judgement judge_several(struct address_set *set, __u64 tag, __u64 hash,
                                                    __u64 group, __u64 now,
                                                    struct address *expected) {
    enum judgement judgement = RIGHT;
    __u64 newest = 0, right = 0;

    spin_lock(&set->lock);
/* The reply answers a request for its address and a request for a group. */
#define ANSWER(way) right |= answer_request(way, hash, group, now);
    EACH_ADDRESS(set, ANSWER)
    if (right)
        goto out;
    judgement = NOT_A_REPLY;
#define NEWEST(way) newest = newest_of(newest, way, tag);
    EACH_ADDRESS(set, NEWEST)
    if (!is_remembered(newest, now))
        goto out;
    judgement = WRONG; /* the times of two requests of one conversation differ */
#define EXPECT(way)                                                                                \
    if (is_zero((READ_ONCE((way)->rank) ^ newest) | (READ_ONCE((way)->tag) ^ tag))) {              \
        expected->half[0] = (way)->address.half[0];                                                \
        expected->half[1] = (way)->address.half[1];                                                \
        KEEP_APART(__COUNTER__);                                                                   \
        goto out;                                                                                  \
    }
    EACH_ADDRESS(set, EXPECT)
out:
    spin_unlock(&set->lock);
    return judgement;
}

#endif
