"""Store which servers a client asked, by conntrack's events; bpf/requests.h does the same in the kernel.

Rules
1. The table is bounded. A full one evicts the oldest request of the server port with the most requests, in the
   namespace with the most: a flood evicts its own.
2. Requests evicted within the window are noted, so that a reply to one is undecided and never a finding.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from udpwatch.agent.kernel.records import Requester
from udpwatch.dns.shares import Counts

MAX_REQUESTS = 32_768  # about a kilobyte each


@dataclass(slots=True)
class Asked:
    """The last two servers that a client asked: (server, time), the newest last."""

    servers: list[tuple[str, int]]

    @property
    def newest(self) -> int:
        return self.servers[-1][1]


class Requests:
    """Bounded; each operation takes constant time. Times are nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, window_ns: int, size: int = MAX_REQUESTS) -> None:
        self._window_ns, self._size = window_ns, size
        # The last one refreshed is at the end. A plain dict would need ever longer to find its first key after
        # deletions.
        self._asked: OrderedDict[Requester, Asked] = OrderedDict()
        self._of_tenant: dict[int, OrderedDict[Requester, None]] = {}
        self._by_namespace: Counts[int] = Counts()
        self._by_port: dict[int, Counts[int]] = {}  # namespace -> its tenants
        self._evicted_clients: OrderedDict[int, tuple[int, int]] = (
            OrderedDict()
        )  # hash of an evicted client -> (time, tenant)
        self._lost: OrderedDict[int, int] = OrderedDict()  # tenant -> time when one of its hashes was dropped
        self.evicted = 0  # within the window

    def __len__(self) -> int:
        return len(self._asked)

    def get(self, client: Requester) -> Asked | None:
        return self._asked.get(client)

    def remember(self, client: Requester, server: str, seen: int) -> None:
        """Note that a client asked a server."""
        known = self._asked.pop(client, None) or Asked([])
        others = [each for each in known.servers if each[0] != server]
        # A dumped table has no order, so what is known of this server may be newer.
        seen = max([seen, *(when for known_server, when in known.servers if known_server == server)])
        known.servers = sorted([*others, (server, seen)], key=lambda each: each[1])[-2:]
        self._asked[client] = known
        held = self._of_tenant.setdefault(client.tenant, OrderedDict())
        if client in held:
            held.move_to_end(client)
        else:
            held[client] = None
            self._by_namespace.add(client.inode, 1)
            self._by_port.setdefault(client.inode, Counts()).add(client.tenant, 1)
        if len(self._asked) > self._size:
            self._evict(seen)

    def expire(self, before: int) -> None:
        """Drop requests that are older than ``before``."""
        while self._asked:
            client, asked = next(iter(self._asked.items()))
            if asked.newest >= before:
                return
            self._drop(client)

    def may_be_evicted(self, client: Requester, now: int) -> bool:
        """Return whether a request of this client may have been evicted within the window."""
        evicted, _ = self._evicted_clients.get(hash(client), (None, 0))
        times = evicted, self._lost.get(client.tenant)
        return any(when is not None and now - when <= self._window_ns for when in times)

    def _evict(self, now: int) -> None:
        tenant = self._by_port[self._by_namespace.greediest()].greediest()
        client = next(iter(self._of_tenant[tenant]))
        asked = self._drop(client)
        if now - asked.newest > self._window_ns:
            return
        self.evicted += 1
        self._evicted_clients.pop(hash(client), None)
        self._evicted_clients[hash(client)] = now, tenant
        if len(self._evicted_clients) > self._size:
            _, (when, tenant) = self._evicted_clients.popitem(last=False)
            if now - when <= self._window_ns:
                self._lost.pop(tenant, None)
                self._lost[tenant] = when
                if len(self._lost) > self._size:
                    self._lost.popitem(last=False)

    def _drop(self, client: Requester) -> Asked:
        held = self._of_tenant[client.tenant]
        del held[client]
        if not held:
            del self._of_tenant[client.tenant]
        ports = self._by_port[client.inode]
        ports.add(client.tenant, -1)
        if not len(ports):
            del self._by_port[client.inode]
        self._by_namespace.add(client.inode, -1)
        return self._asked.pop(client)
