/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load for the tests and the benchmark, in a network namespace of theirs.
 *
 * load flood SOURCE COUNT DESTINATION PORT RATE SECONDS
 *     Datagrams from a fresh port each, of COUNT addresses from SOURCE on, through a raw socket (CAP_NET_RAW);
 *     RATE a second, 0: as many as go. Prints how many were sent.
 * load answer FAMILY PORT
 *     A right server: answers each datagram from the address that was asked (PKTINFO). Runs until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <netinet/udp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH      64
#define FIRST_PORT 1024
#define PAYLOAD    18

static int must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void flood(char **words) {
    unsigned char source[16], first[16], destination[16];
    int is6 = strchr(words[0], ':') != NULL, on = 1;
    int family = is6 ? AF_INET6 : AF_INET, count = atoi(words[1]), port = atoi(words[3]);
    double rate = atof(words[4]), seconds = atof(words[5]);
    must(inet_pton(family, words[0], first) - 1, "source");
    must(inet_pton(family, words[2], destination) - 1, "destination");
    int raw = must(socket(family, SOCK_RAW, IPPROTO_RAW), "socket");
    if (is6)
        must(setsockopt(raw, IPPROTO_IPV6, 36 /* IPV6_HDRINCL */, &on, sizeof(on)), "IPV6_HDRINCL");

    static unsigned char packets[BATCH][sizeof(struct ip6_hdr) + sizeof(struct udphdr) + PAYLOAD];
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    struct sockaddr_in to4 = {.sin_family = AF_INET};
    struct sockaddr_in6 to6 = {.sin6_family = AF_INET6};
    memcpy(&to4.sin_addr, destination, 4);
    memcpy(&to6.sin6_addr, destination, 16);
    size_t header = is6 ? sizeof(struct ip6_hdr) : sizeof(struct iphdr);
    size_t length = header + sizeof(struct udphdr) + PAYLOAD, body = length - header;
    uint64_t sent = 0, next = 0;
    double start = now();

    while (now() - start < seconds) {
        if (rate && sent > (now() - start) * rate) {
            struct timespec pause = {0, 200000};
            nanosleep(&pause, NULL);
            continue;
        }
        for (int i = 0; i < BATCH; i++, next++) {
            unsigned char *packet = packets[i];
            struct udphdr udp = {.dest = htons(port), .len = htons(body)};
            /* All addresses of one port, then the next port. */
            memcpy(source, first, 16);
            source[(is6 ? 16 : 4) - 1] += next % count;
            udp.source = htons(FIRST_PORT + next / count % (65536 - FIRST_PORT));
            if (is6) {
                struct ip6_hdr ip = {.ip6_plen = htons(body), .ip6_nxt = IPPROTO_UDP, .ip6_hlim = 64};
                ip.ip6_vfc = 0x60;
                memcpy(&ip.ip6_src, source, 16);
                memcpy(&ip.ip6_dst, destination, 16);
                memcpy(packet, &ip, sizeof(ip));
                /* A checksum is due: the pseudo header's and the datagram's words. */
                uint32_t sum = htons(body) + htons(IPPROTO_UDP);
                uint16_t word;
                for (size_t at = 0; at < 16; at += 2) {
                    memcpy(&word, source + at, 2);
                    sum += word;
                    memcpy(&word, destination + at, 2);
                    sum += word;
                }
                sum += udp.source + udp.dest + udp.len;
                sum = (sum & 0xffff) + (sum >> 16);
                sum = (sum & 0xffff) + (sum >> 16);
                udp.check = ~sum ? ~sum : 0xffff;
            } else {
                struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP};
                ip.tot_len = htons(length);
                memcpy(&ip.saddr, source, 4);
                memcpy(&ip.daddr, destination, 4);
                memcpy(packet, &ip, sizeof(ip));
            }
            memcpy(packet + header, &udp, sizeof(udp));
            parts[i] = (struct iovec){packet, length};
            messages[i].msg_hdr.msg_iov = &parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
            messages[i].msg_hdr.msg_name = is6 ? (void *)&to6 : (void *)&to4;
            messages[i].msg_hdr.msg_namelen = is6 ? sizeof(to6) : sizeof(to4);
        }
        int done = sendmmsg(raw, messages, BATCH, 0);
        sent += done > 0 ? done : 0;
    }
    printf("%llu\n", (unsigned long long)sent);
}

static void answer(char **words) {
    int family = atoi(words[0]) == 6 ? AF_INET6 : AF_INET, on = 1, size = 8 << 20;
    struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_port = htons(atoi(words[1]))};
    struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(words[1]))};
    int server = must(socket(family, SOCK_DGRAM, 0), "socket");

    setsockopt(server, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
    if (family == AF_INET6) {
        must(setsockopt(server, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on)), "IPV6_RECVPKTINFO");
        must(bind(server, (struct sockaddr *)&at6, sizeof(at6)), "bind");
    } else {
        must(setsockopt(server, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on)), "IP_PKTINFO");
        must(bind(server, (struct sockaddr *)&at4, sizeof(at4)), "bind");
    }
    static char data[BATCH][64], control[BATCH][64];
    static struct sockaddr_storage peers[BATCH];
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            parts[i] = (struct iovec){data[i], sizeof(data[i])};
            messages[i].msg_hdr = (struct msghdr){
                .msg_name = &peers[i],
                .msg_namelen = sizeof(peers[i]),
                .msg_iov = &parts[i],
                .msg_iovlen = 1,
                .msg_control = control[i],
                .msg_controllen = sizeof(control[i]),
            };
        }
        int count = must(recvmmsg(server, messages, BATCH, MSG_WAITFORONE, NULL), "recvmmsg");
        for (int i = 0; i < count; i++) {
            struct cmsghdr *info = CMSG_FIRSTHDR(&messages[i].msg_hdr);
            parts[i].iov_len = messages[i].msg_len;
            if (!info)
                continue;
            if (family == AF_INET6) {
                struct in6_pktinfo *to = (void *)CMSG_DATA(info);
                to->ipi6_ifindex = 0;
            } else {
                struct in_pktinfo *to = (void *)CMSG_DATA(info);
                to->ipi_ifindex = 0;
            }
        }
        for (int done = 0; done < count;) {
            int more = sendmmsg(server, messages + done, count - done, 0);
            done += more > 0 ? more : 1;
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 8 && !strcmp(argv[1], "flood"))
        flood(argv + 2);
    else if (argc == 4 && !strcmp(argv[1], "answer"))
        answer(argv + 2);
    else
        return 2;
    return 0;
}
