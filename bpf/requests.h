/* SPDX-License-Identifier: GPL-2.0-only */
/* The table of requests: which servers a client asked, seen in conntrack's flows. Headers use no
 * map, since bcc rewrites map calls in the main file only; the caller looks sets up and passes
 * them. */
#ifndef UDPWATCH_REQUESTS_H
#define UDPWATCH_REQUESTS_H

#include "entries.h"
#include "table.h"

/* The current state of a request's entry. */
struct looked_up {
    struct request_key key;
    struct address server;
    struct tuple reply;
};

static __always_inline __u64 tag_of_request(const struct hash_keys *keys,
                                            const struct request_key *key) {
    struct conversation_key as = {};

    as.scope = (__u64)key->zone << 32 | key->netns;
    as.peer = key->client;
    as.peer_port = key->client_port;
    as.port = key->port;
    return tag_of(keys, &as);
}

static __always_inline void set_tenant(struct tenant *to, const struct request_key *key) {
    to->scope = key->netns;
    to->port = key->port;
    to->flags = 0;
}

/* Return the fingerprint of an evicted client whose requests were all answered; the tag is the
 * fingerprint of a client with a pending request. */
static __always_inline __u64 hash_of_answered(__u64 tag) {
    return ~tag | 1;
}

static __always_inline __u64 check_of(const struct requests *known, __u64 tag) {
    __u64 check = tag ^ known->tenant.scope ^ (__u64)known->tenant.port << 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const struct request *request = &known->asked[i];
        check = mixed(check + request->server.half[0]);
        check = mixed(check + request->server.half[1]);
        check = mixed(check + request->seen);
        check = mixed(check + request->entry);
    }
    return check;
}

static __always_inline void copy_requests(struct requests *to, const struct requests *from) {
#pragma unroll
    for (int i = 0; i < sizeof(*to) / sizeof(__u64); i++)
        ((__u64 *)to)[i] = READ_ONCE(((const __u64 *)from)[i]);
}

enum found { ABSENT, THERE, TORN };

/* Copy the requests of a client; *way is their position in the set. */
static __always_inline enum found find_requests(const struct request_set *set, __u64 tag,
                                                struct requests *known, __u32 *way) {
    *way = WAYS;
#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        if (READ_ONCE(set->tag[i]) == tag)
            *way = i;
    }
    if (*way >= WAYS)
        return ABSENT;
    copy_requests(known, &set->way[*way]);
    return known->check == check_of(known, tag) ? THERE : TORN;
}

/* Write all requests of a client; return 0 if another CPU wrote to them meanwhile. */
static __always_inline int write_requests(struct request_set *set, __u32 way, __u64 tag,
                                          struct requests *known) {
    if (way >= WAYS)
        return 0;
    known->check = check_of(known, tag);
    WRITE_ONCE(set->tag[way], 0);
    set->way[way] = *known;
    WRITE_ONCE(set->tag[way], tag);
    return READ_ONCE(set->way[way].check) == known->check && READ_ONCE(set->tag[way]) == tag;
}

/* Return one word that is valid only for the same request: the address of the entry, whether it was
 * answered, and 1. */
static __always_inline __u64 final_of(__u64 entry, __u32 status) {
    return entry << 2 | (status & SEEN_REPLY) | 1;
}

static __always_inline int is_final(const struct request *request) {
    return request->entry && request->final >> 2 == request->entry << 2 >> 2;
}

/* Return the status of a request's entry, with ENTRY_GONE if it is the last one, and 0 if it is
 * unknown. Conntrack reuses the memory of entries. */
static __always_inline __u32 status_of_request(const struct request *request, __u64 tag,
                                               const struct hash_keys *keys,
                                               struct looked_up *entry) {
    if (is_final(request))
        return (request->final & SEEN_REPLY) | ENTRY_GONE;
    if (!request->entry)
        return 0;
    read_tuple(&entry->reply, request->entry, OFFSET_TUPLE_REPLY);
    if (entry->reply.protocol != PROTO_UDP)
        return 0;
    __builtin_memset(&entry->key, 0, sizeof(entry->key));
    key_of_flow(&entry->key, &entry->server, &entry->reply, request->entry);
    if (tag_of_request(keys, &entry->key) != tag || !same(&entry->server, &request->server))
        return 0;
    return status_of(request->entry);
}

/* Return whether a request seems answered, to choose what is evicted; the memory may belong to
 * another entry by now. */
static __always_inline __u64 seems_answered(const struct request *request) {
    if (!request->seen)
        return 1;
    if (is_final(request))
        return request->final / SEEN_REPLY & 1;
    return request->entry ? status_of(request->entry) / SEEN_REPLY & 1 : 0;
}

static __always_inline __u64 newest_of(const struct requests *known) {
    __u64 one = known->asked[0].seen, other = known->asked[1].seen;
    return one > other ? one : other;
}

/* Choose the way to evict for a client of the tenant `fresh`. */
static __always_inline __u32 way_to_evict(const struct request_set *set, const struct tenant *fresh,
                                          __u64 now) {
    __u64 best = 0;
    __u32 way = 0;

#pragma unroll
    for (int i = 0; i < WAYS; i++) {
        if (!READ_ONCE(set->tag[i]) || !is_remembered(newest_of(&set->way[i]), now))
            return i;
    }
#pragma clang loop unroll(disable)
    for (int i = 0; i < WAYS; i++) {
        const struct requests *each = &set->way[i];
        __u64 held = 0;
#pragma clang loop unroll(disable)
        for (int j = 0; j < WAYS; j++)
            held += shares_of(&each->tenant, &set->way[j].tenant);
        __u64 is_answered = seems_answered(&each->asked[0]) & seems_answered(&each->asked[1]);
        __u64 score = eviction_score(held, is_heavy(&each->tenant, fresh), is_answered, 0,
                                     newest_of(each), now);
        if (score >= best) {
            best = score;
            way = i;
        }
    }
    return way;
}

#endif
