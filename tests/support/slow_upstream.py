"""A DNS server that answers every query with one address after a fixed time, as a server in another network does.

Run as a script: `slow_upstream.py ADDRESS PORT SECONDS`. It answers tens of thousands of queries a second.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

#: A pointer to the question's name, A, IN, TTL 3600, 10.9.9.9.
ANSWER = b"\xc0\x0c\0\1\0\1\0\0\x0e\x10\0\4\x0a\x09\x09\x09"


def answer(query: bytes) -> bytes:
    end = query.index(b"\0", 12) + 5
    return query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:end] + ANSWER


def serve(link: socket.socket, seconds: float) -> None:
    """Serve until it is killed."""
    link.setblocking(False)
    waiting: deque[tuple[float, bytes, object]] = deque()
    while True:
        left = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        select.select([link], [], [], left)
        try:
            while True:
                query, client = link.recvfrom(1500)
                waiting.append((time.monotonic() + seconds, query, client))
        except BlockingIOError:
            pass
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, query, client = waiting.popleft()
            link.sendto(answer(query), client)


if __name__ == "__main__":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind((sys.argv[1], int(sys.argv[2])))
        serve(bound, float(sys.argv[3]))
