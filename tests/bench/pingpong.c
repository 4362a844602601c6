/* SPDX-License-Identifier: Apache-2.0 */
/*
 * UDP questions and answers as fast as the kernel makes them; prints nanoseconds a pair.
 *
 * pingpong one COUNT [PORT]     both ends in one thread: no scheduling, the worst case for a hook
 * pingpong two COUNT [PORT]     a server process and a client process
 *
 * The server is the plain kind: a wildcard socket, recvfrom, sendto.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void must(int good, const char *what) {
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void answer(int server) {
    char data[64];
    struct sockaddr_in peer;
    socklen_t length = sizeof(peer);
    ssize_t size = recvfrom(server, data, sizeof(data), 0, (struct sockaddr *)&peer, &length);
    must(size > 0, "recvfrom");
    must(sendto(server, data, size, 0, (struct sockaddr *)&peer, length) == size, "sendto");
}

int main(int argc, char **argv) {
    int apart = argc > 1 && !strcmp(argv[1], "two");
    long count = argc > 2 ? atol(argv[2]) : 100000;
    int server = socket(AF_INET, SOCK_DGRAM, 0), client = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(argc > 3 ? atoi(argv[3]) : 0)};
    socklen_t length = sizeof(address);
    struct timespec from, to;
    pid_t child = 0;
    char data[64] = "question";

    must(!bind(server, (struct sockaddr *)&address, sizeof(address)), "bind");
    must(!getsockname(server, (struct sockaddr *)&address, &length), "getsockname");
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(!connect(client, (struct sockaddr *)&address, sizeof(address)), "connect");
    if (apart && !(child = fork()))
        for (;;)
            answer(server);
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (long i = 0; i < count; i++) {
        must(send(client, data, 32, 0) == 32, "send");
        if (!apart)
            answer(server);
        must(recv(client, data, sizeof(data), 0) == 32, "recv");
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (child) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    printf("%.1f\n", ((to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec)) / count);
    return 0;
}
