/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Note requests and judge replies. The maps are in the including file, which defines the functions
 * that are only declared here.
 */
#ifndef UDPWATCH_JUDGE_H
#define UDPWATCH_JUDGE_H

#include "conversations.h"

static __always_inline struct stats *stats_of_this_cpu(void);
static __always_inline const struct hash_keys *keys_of_hash(void);
static __always_inline struct address_set *addresses_of(__u64 tag, __u32 scope);
static __always_inline struct fingerprint_set *fingerprints_of(__u64 hash);
static __always_inline struct eviction *evictions_of(const struct conversation_key *key);
static __always_inline void note_eviction(__u64 hash, const struct tenant *of, int answered,
                                          __u64 now);
static __always_inline int has_lost_many(const struct conversation_key *key, __u64 now);

static __always_inline void set_tenant(struct tenant *to, const struct conversation_key *key) {
    to->scope = key->scope;
    to->port = key->port;
    to->flags = 0;
}

/* Note one request of a conversation with several addresses. */
static __always_inline void put_address(struct address_set *set, const struct hash_keys *keys,
                                        __u64 tag, const struct conversation *request, __u64 now) {
    struct asked_address put, evicted;

    put.tag = tag;
    put.hash = request_hash(keys, tag, &request->address);
    put.asked = request->asked;
    put.rank = is_pending(request) ? request->asked : request->asked - WINDOW_NS;
    put.address = request->address;
    put.tenant = request->tenant;
    put.tenant.flags = 0;
    note_address(set, &put, &evicted);
    if (evicted.hash && is_remembered(evicted.asked, now))
        note_eviction(evicted.hash, &evicted.tenant, evicted.rank != evicted.asked, now);
}

/* Note a request for another address than the one in `known`, or of a conversation with several
 * addresses. */
static __always_inline void remember_another(struct conversation_set *set, __u64 tag,
                                             struct conversation *fresh, struct conversation *known,
                                             __u64 now) {
    struct address_set *others = addresses_of(tag, fresh->tenant.scope);
    const struct hash_keys *keys = keys_of_hash();
    int was_one = !(known->tenant.flags & SEVERAL);

    if (!others || !keys)
        return;
    fresh->asked = after(now, known->asked);
    if (was_one)
        put_address(others, keys, tag, known, now);
    put_address(others, keys, tag, fresh, now);
    /* This request cannot be answered before it is noted completely, but the previous one may have
     * been answered meanwhile. */
    set_newest(set, tag, fresh, now, known);
    if (was_one && !(known->tenant.flags & SEVERAL) && !is_pending(known))
        note_answer(others, request_hash(keys, tag, &known->address));
}

/* Return 1 if change_way() finds that a conversation has a single address again, else 0. */
static __always_inline int has_one_again(const struct conversation *known,
                                         const struct address *address, __u64 now) {
    __u64 other =
        (known->address.half[0] ^ address->half[0]) | (known->address.half[1] ^ address->half[1]);
    return (known->tenant.flags & SEVERAL) & is_zero(other) &
           is_less(known->answered + WINDOW_NS, now);
}

/* Note a request. Return how many waits it began: 1 or 0, or -1 if it ended one. The waits of a
 * conversation with several addresses are not counted. */
static __always_inline int remember(struct conversation_set *set, __u64 tag,
                                    const struct conversation_key *key,
                                    const struct address *address, int is_client, __u32 slot,
                                    __u64 now) {
    struct conversation fresh = {}, known = {};
    __u64 evicted = 0;

    fresh.address = *address;
    fresh.asked = now;
    fresh.answered = now - 1;
    set_tenant(&fresh.tenant, key);
    fresh.tenant.flags =
        (has_lost_many(key, now) ? HEAVY : 0) | (is_client ? CLIENTS : 0) | slot << SLOT_SHIFT;
    enum remembering done = note_request(set, tag, &fresh, now, &known, &evicted);
    if (done == ANOTHER) {
        int was_waiting = !(known.tenant.flags & SEVERAL) && is_pending(&known);
        remember_another(set, tag, &fresh, &known, now);
        return has_one_again(&known, address, now) - was_waiting;
    }
    if (done == FRESH) {
        COUNT(remembered, 1);
        const struct hash_keys *keys = keys_of_hash();
        if (!keys || !evicted || is_expired(&known, now))
            return 1;
        int answered = !(known.tenant.flags & SEVERAL) && !is_pending(&known);
        note_eviction(request_hash(keys, evicted, &known.address), &known.tenant, answered, now);
    }
    return done != WAITING;
}

/* Judge a packet, and mark a rightly answered request as answered; *ended is whether that ended a
 * wait. */
static __always_inline enum judgement judge(struct conversation_set *set, __u64 tag,
                                            const struct conversation_key *key,
                                            const struct address *source, int port_kept, __u64 now,
                                            struct address *expected, __u32 *flags, int *ended) {
    struct conversation known = {};
    const struct address group = {};

    enum judgement judgement = judge_one(set, tag, source, port_kept, now, &known);
    /* An evicted conversation may have had any number of requests. */
    *flags = known.asked ? known.tenant.flags : SEVERAL;
    if (!(known.tenant.flags & SEVERAL)) {
        *expected = known.address;
        *ended = judgement == RIGHT && is_pending(&known);
        return judgement;
    }
    const struct hash_keys *keys = keys_of_hash();
    struct address_set *others = addresses_of(tag, key->scope);
    if (!keys || !others)
        return NOT_A_REPLY;
    /* From another port no source is right: 0 is the hash of no request. */
    return judge_several(others, tag, port_kept ? request_hash(keys, tag, source) : 0,
                         request_hash(keys, tag, &group), now, expected);
}

/* Return whether an evicted request of the peer may have asked this address within the window. If
 * conntrack classified the packet as new (`tracked`), only a fingerprint of the request itself
 * counts. */
static __always_inline int may_have_asked(__u64 tag, const struct conversation_key *key,
                                          const struct address *source, int tracked, __u64 now) {
    const struct hash_keys *keys = keys_of_hash();
    struct tenant tenant = {};

    if (!keys)
        return 0;
    struct eviction *evicted = evictions_of(key);
    if (evicted && !tracked && is_remembered(evicted->several, now))
        return 1;
    set_tenant(&tenant, key);
    __u64 hash = request_hash(keys, tag, source);
    struct fingerprint_set *set = fingerprints_of(hash);
    int or_lost = evicted && !tracked && is_remembered(evicted->last, now);
    return set && may_have_fingerprint(set, hash, class_of(keys, &tenant), or_lost, now);
}

#endif
