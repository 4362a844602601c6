/* SPDX-License-Identifier: GPL-2.0-only */
#define PACKET_HOST      0
#define PACKET_BROADCAST 1
#define PACKET_MULTICAST 2
#define PACKET_LOOPBACK  5
