/* SPDX-License-Identifier: Apache-2.0 */
/*
 * namespaces COUNT PORT
 *     COUNT processes, each in a network namespace of its own with a server on PORT. Prints "made" when all are there.
 *     After a line on standard input each server sends one wrong reply; then it prints "sent". All end with standard
 *     input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void serve(int port, int done, int go) {
    struct ifreq up = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)}, peer;
    socklen_t length = sizeof(peer);
    char byte = 0;

    must(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
    must(unshare(CLONE_NEWNET), "unshare");
    int server = socket(AF_INET, SOCK_DGRAM, 0), client = socket(AF_INET, SOCK_DGRAM, 0);
    must(ioctl(server, SIOCSIFFLAGS, &up), "lo up");
    must(bind(server, (struct sockaddr *)&at, sizeof(at)), "bind");
    must(write(done, &byte, 1), "write");
    must(read(go, &byte, 1), "read");
    at.sin_addr.s_addr = htonl(0x7f000002); /* the reply comes from 127.0.0.1 */
    must(sendto(client, "x", 1, 0, (struct sockaddr *)&at, sizeof(at)), "request");
    must(recvfrom(server, &byte, 1, 0, (struct sockaddr *)&peer, &length), "receive");
    must(sendto(server, "x", 1, 0, (struct sockaddr *)&peer, length), "reply");
    must(write(done, &byte, 1), "write");
    for (;;)
        pause();
}

int main(int argc, char **argv) {
    int count = argc == 3 ? atoi(argv[1]) : 0, done[2], go[2];
    char byte = 0;

    must(count - 1, "namespaces COUNT PORT");
    must(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
    must(pipe(done), "pipe");
    must(pipe(go), "pipe");
    for (int number = 0; number < count; number++) {
        int child = fork();
        must(child, "fork");
        if (!child)
            serve(atoi(argv[2]), done[1], go[0]);
        must(read(done[0], &byte, 1), "read");
    }
    puts("made");
    fflush(stdout);
    if (read(0, &byte, 1) != 1)
        return 0;
    for (int number = 0; number < count; number++) {
        must(write(go[1], &byte, 1), "write");
        must(read(done[0], &byte, 1), "read");
    }
    puts("sent");
    fflush(stdout);
    while (read(0, &byte, 1) == 1)
        ;
    return 0;
}
