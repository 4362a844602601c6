/* SPDX-License-Identifier: GPL-2.0-only */
/* Run the parser of bpf/packet.h on its own, and note what it finds (kernel_parser.py). */
#include "compat.h"
#include "records.h"

#define RESULTS 4096

struct result {
    struct address source, destination;
    __u16 source_port, destination_port;
    __u32 segments;
    __u8 is_udp, family, unparsed, pad[5];
};

struct cursor {
    __u32 next, unparsed;
};

BPF_ARRAY(results, struct result, RESULTS);
BPF_ARRAY(cursor, struct cursor, 1);

static __always_inline void count_unparsed(void) {
    int first = 0;
    struct cursor *at = cursor.lookup(&first);
    if (at)
        at->unparsed++;
}

#include "packet.h"

int parse_one(struct __sk_buff *skb) {
    struct packet packet = {};
    int first = 0;
    struct cursor *at = cursor.lookup(&first);
    if (!at)
        return 1;
    at->unparsed = 0;
    int index = at->next++, is_udp = parse(skb, &packet);
    struct result *result = results.lookup(&index);
    if (!result)
        return 1;
    result->source = packet.source;
    result->destination = packet.destination;
    result->source_port = packet.source_port;
    result->destination_port = packet.destination_port;
    result->segments = segments_of(skb);
    result->is_udp = is_udp;
    result->family = packet.family;
    result->unparsed = at->unparsed;
    return 1;
}
