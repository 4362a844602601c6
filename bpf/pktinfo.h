/* SPDX-License-Identifier: GPL-2.0-only */
/* Find whether a send names its source in a control message. */
#ifndef UDPWATCH_PKTINFO_H
#define UDPWATCH_PKTINFO_H

#include "common.h"

#define SOL_IP        0
#define SOL_IPV6      41
#define IP_PKTINFO    8
#define IPV6_PKTINFO  50
#define CONTROLS      4 /* control messages that are read */
#define CONTROL_BYTES 16

/* Return whether a control message is a PKTINFO with a source (ip(7), RFC 3542). *pktinfo is
 * PKTINFO_UNKNOWN if there are more messages than are read. */
static __always_inline int names_source(__u64 message, __u32 *pktinfo) {
    struct {
        __u64 length;
        __u32 level, type;
        __u8 data[CONTROL_BYTES + 8];
    } control;
    __u64 at = read_kernel(message + OFFSET_MSG_CONTROL);
    __u64 left = read_kernel(message + OFFSET_MSG_CONTROLLEN);

    *pktinfo = PKTINFO_NONE;
#pragma unroll
    for (int i = 0; i < CONTROLS; i++) {
        if (!at || left < CONTROL_BYTES)
            return 0;
        copy_from_kernel(&control, sizeof(control), (void *)at);
        if (control.length < CONTROL_BYTES || control.length > left)
            return 0;
        if (control.level == SOL_IP && control.type == IP_PKTINFO) {
            *pktinfo = PKTINFO_PASSED;
            return *(__u32 *)(control.data + 4) != 0; /* ipi_spec_dst */
        }
        if (control.level == SOL_IPV6 && control.type == IPV6_PKTINFO) {
            *pktinfo = PKTINFO_PASSED;
            return *(__u64 *)control.data || *(__u64 *)(control.data + 8); /* ipi6_addr */
        }
        __u64 step = (control.length + 7) & ~7ULL;
        if (step >= left)
            return 0;
        at += step;
        left -= step;
    }
    if (left >= CONTROL_BYTES)
        *pktinfo = PKTINFO_UNKNOWN;
    return 0;
}

#endif
