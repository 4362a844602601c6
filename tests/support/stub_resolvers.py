"""Clients that resolve names as programs do: through the C library, in a namespace."""

from __future__ import annotations

from pathlib import Path

from udpwatch.agent.testing.lab import Namespace

#: a C program that prints the addresses of a name, and returns 0 when it has exactly one argument
LOOKUP = r"""
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    struct addrinfo hints, *found;
    char text[64];
    int error;

    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    error = getaddrinfo(argv[1], 0, &hints, &found);
    if (error)
        return printf("%s\n", gai_strerror(error)), 1;
    for (; found; found = found->ai_next) {
        void *at = found->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
                               : (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(found->ai_family, at, text, sizeof text));
    }
    return argc - 2;
}
"""


def resolve(namespace: Namespace, folder: Path, resolv: str, *command: str) -> list[str]:
    """Run a command with a resolv.conf of its own; the words that it says."""
    script = (
        f"mount --bind {folder}/{resolv} /etc/resolv.conf && "
        f'mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf && exec "$@"'
    )
    return namespace.run(["unshare", "--mount", "sh", "-c", script, "sh", *command]).split()
