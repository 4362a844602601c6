/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the tables of sockets.c and conntrack.c share: sets of WAYS entries in an array map, found
 * by a keyed hash, with a share for each tenant (a server port of a network namespace).
 *
 * What is evicted: expired entries first. A full set evicts from the tenant with the most entries
 * in it: an answered request, else a wrongly answered one, else the oldest. A tenant that lost many
 * requests counts as holding more. A request that is evicted within the window leaves a
 * fingerprint.
 */
#ifndef UDPWATCH_TABLE_H
#define UDPWATCH_TABLE_H

#include "common.h"
#include "records.h"

#define REFRESH_NS     (WINDOW_NS / 256) /* precision of the time of a pending request */
#define REPEAT_NS      1000000000ULL /* a peer that waited longer and asks begins another wait */
#define NEVER          (1ULL << 62)  /* later than any time */
#define HEAVY_SHARE    16 /* a heavy tenant counts as holding 8 more ways, with 2 points each */
#define AGE_BITS       46
#define AGE_SHIFT      10 /* ages are compared in microseconds */
#define MANY_EVICTIONS 64 /* of one tenant within the window; more make it HEAVY */

/* ---- hashes ---- */

/* Like NH, the universal hash of UMAC (RFC 4418, section 5.2), but sums keep their carry. Two keys
 * of an attacker who does not know the words collide with probability 2^-32 at most. */
static __always_inline __u64 pair(const struct hash_keys *keys, int at, __u64 a, __u64 b) {
    return (a + keys->word[at]) * (b + keys->word[at + 1]);
}

static __always_inline __u64 mixed(__u64 x) {
    x ^= x >> 32;
    x *= 0x9e3779b97f4a7c15ULL;
    return x ^ x >> 29;
}

/* Return the tag of a conversation; 0 marks a free way and is never returned. */
static __always_inline __u64 tag_of(const struct hash_keys *keys,
                                    const struct conversation_key *key) {
    const struct address *peer = &key->peer;
    __u64 sum = pair(keys, 0, key->scope, key->scope >> 32) +
                pair(keys, 2, peer->word[0], peer->word[1]) +
                pair(keys, 4, peer->word[2], peer->word[3]) +
                pair(keys, 6, (__u32)key->peer_port << 16 | key->port, key->link);
    return mixed(sum) | 1;
}

/* Return the hash of a request, from the tag of its conversation and an address; never 0. */
static __always_inline __u64 request_hash(const struct hash_keys *keys, __u64 tag,
                                          const struct address *address) {
    return mixed(tag + pair(keys, 8, address->word[0], address->word[1]) +
                 pair(keys, 10, address->word[2], address->word[3])) |
           1;
}

/* Map a hash to a number below `count`, which need not be a power of two. */
static __always_inline __u32 share_of(__u64 hash, __u32 count) {
    return (hash >> 32) * count >> 32;
}

/* ---- arithmetic without branches, because the verifier follows both sides of each branch. The
 * results are opaque: if a compiler knows that they are 0 or 1, it may create branches again (LLVM
 * 19 does, and the verifier walks a million instructions instead of 40,000) ---- */

static __always_inline __u64 opaque(__u64 x) {
    asm volatile("" : "+r"(x));
    return x;
}

/* Return 1 if x is 0, else 0. */
static __always_inline __u64 is_zero(__u64 x) {
    x = opaque(x);
    return opaque(~(x | opaque(-x)) >> 63);
}

/* Return 1 if a < b, else 0. They must differ by less than 2^63, as times do. */
static __always_inline __u64 is_less(__u64 a, __u64 b) {
    return opaque(opaque(a - b) >> 63);
}

static __always_inline __u64 greater_of(__u64 a, __u64 b) {
    return a ^ ((a ^ b) & -is_less(a, b));
}

static __always_inline __u64 lesser_of(__u64 a, __u64 b) {
    return a ^ ((a ^ b) & -is_less(b, a));
}

/* ---- the choice of what is evicted ---- */

/* Return a score; the highest one is evicted. `held` is the share of the set that the tenant holds.
 */
static __always_inline __u64 eviction_score(__u64 held, __u64 is_heavy, __u64 is_answered,
                                            __u64 is_wrongly_answered, __u64 asked, __u64 now) {
    __u64 elapsed = (now + REFRESH_NS - asked) >> AGE_SHIFT & ((1ULL << AGE_BITS) - 1);
    held += is_heavy * HEAVY_SHARE;
    return held << 48 | is_answered << 47 | (is_wrongly_answered & ~is_answered) << 46 | elapsed;
}

/* Return the points that entry b adds to the share of the tenant of entry a: 1 for the same
 * namespace, 1 more for the same port. */
static __always_inline __u64 shares_of(const struct tenant *a, const struct tenant *b) {
    __u64 same_scope = is_zero(a->scope ^ b->scope);
    return same_scope + (same_scope & is_zero(a->port ^ b->port));
}

/* Return 1 if the tenant of an entry was heavy when the entry was added, or is heavy now that it
 * adds `fresh`. */
static __always_inline __u64 is_heavy(const struct tenant *of, const struct tenant *fresh) {
    return (of->flags / HEAVY & 1) | (fresh->flags / HEAVY & shares_of(of, fresh) >> 1);
}

/* ---- fingerprints of evicted requests ---- */

#define TIME_MASK    ((1ULL << TIME_BITS) - 1)
#define WINDOW_TICKS (WINDOW_NS >> TIME_SHIFT)

static __always_inline __u64 ticks_since(__u64 word, __u64 now) {
    return ((now >> TIME_SHIFT) - word) & TIME_MASK;
}

static __always_inline __u32 class_of(const struct hash_keys *keys, const struct tenant *tenant) {
    return share_of(mixed(pair(keys, 2, tenant->scope, tenant->port)), TENANT_CLASSES);
}

static __always_inline __u64 fingerprint(__u64 hash, __u32 class) {
    return hash << CLASS_BITS | class;
}

/* Note that a fingerprint was overwritten within the window. */
static __always_inline void note_loss(struct fingerprint_set *set, __u64 word, __u64 now) {
    __u32 class = word >> TIME_BITS & ((1 << CLASS_BITS) - 1);
    __u64 bit = 1ULL << (class % CLASSES_A_WORD + TIME_BITS);
#define LOSE(i)                                                                                    \
    if (class / CLASSES_A_WORD == i) {                                                             \
        __u64 lost = READ_ONCE(set->lost[i]);                                                      \
        if (ticks_since(lost, now) > WINDOW_TICKS)                                                 \
            lost = 0;                                                                              \
        WRITE_ONCE(set->lost[i], ((lost | bit) & ~TIME_MASK) | (now >> TIME_SHIFT & TIME_MASK));   \
        KEEP_APART(i);                                                                             \
        return;                                                                                    \
    }
    LOSE(0) LOSE(1)
}

/* Add a fingerprint. This needs no lock: a fingerprint is one word, and of two concurrent writes
 * one is lost. */
static __always_inline void note_fingerprint(struct fingerprint_set *set, __u64 hash, __u32 class,
                                             __u64 now) {
    __u64 word = fingerprint(hash, class) << TIME_BITS | (now >> TIME_SHIFT & TIME_MASK);
    __u64 elapsed[FINGERPRINT_WAYS], held, oldest = 0;

#pragma unroll
    for (int i = 0; i < FINGERPRINT_WAYS; i++) {
        elapsed[i] = ticks_since(READ_ONCE(set->way[i]), now);
        oldest = greater_of(oldest, elapsed[i]);
    }
#define REPLACE_OLDEST(i)                                                                          \
    if (elapsed[i] == oldest) {                                                                    \
        held = READ_ONCE(set->way[i]);                                                             \
        WRITE_ONCE(set->way[i], word);                                                             \
        KEEP_APART(i);                                                                             \
        goto out;                                                                                  \
    }
    REPLACE_OLDEST(0)
    REPLACE_OLDEST(1)
    REPLACE_OLDEST(2) REPLACE_OLDEST(3) REPLACE_OLDEST(4) REPLACE_OLDEST(5) return;
out:
    if (held && oldest <= WINDOW_TICKS)
        note_loss(set, held, now);
}

/* Return whether there is a fingerprint of a request. With `or_lost`, also return 1 if a
 * fingerprint of the same class of tenants was overwritten. */
static __always_inline int may_have_fingerprint(const struct fingerprint_set *set, __u64 hash,
                                                __u32 class, __u64 or_lost, __u64 now) {
    __u64 sought = fingerprint(hash, class) << TIME_BITS, found = 0;

#pragma unroll
    for (int i = 0; i < FINGERPRINT_WAYS; i++) {
        __u64 held = READ_ONCE(set->way[i]);
        found |= is_zero((held ^ sought) >> TIME_BITS) &
                 is_less(ticks_since(held, now), WINDOW_TICKS + 1);
    }
#pragma unroll
    for (int i = 0; i < LOST_WORDS; i++) {
        __u64 lost = READ_ONCE(set->lost[i]);
        __u64 is_word = is_zero(class / CLASSES_A_WORD ^ i);
        found |= or_lost & is_word & lost >> (class % CLASSES_A_WORD + TIME_BITS) &
                 is_less(ticks_since(lost, now), WINDOW_TICKS + 1);
    }
    return found & 1;
}

/* Note in the record of a tenant that one of its requests was evicted: a `pending` one, or one of a
 * conversation with SEVERAL addresses. A wrongly answered one leaves no fingerprint. */
static __always_inline void note_loss_of_tenant(struct eviction *of, int pending,
                                                int wrongly_answered, int several, __u64 now) {
    if (!wrongly_answered && now - of->last > REFRESH_NS)
        WRITE_ONCE(of->last, now);
    if (several)
        WRITE_ONCE(of->several, now);
    if (pending && now - of->pending > REFRESH_NS)
        WRITE_ONCE(of->pending, now);
    if (!pending || wrongly_answered)
        return;
    if (!is_remembered(of->since, now)) {
        WRITE_ONCE(of->since, now);
        WRITE_ONCE(of->count, 0);
    }
    __sync_fetch_and_add(&of->count, 1);
}

/* Return whether a tenant lost so many requests that its entries are evicted first. */
static __always_inline int lost_many(const struct eviction *of, __u64 now) {
    return of->count >= MANY_EVICTIONS && is_remembered(of->pending, now);
}

#endif
