"""Find candidates by function probes (bpf/conntrack.c)."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator

from udpwatch.agent.kernel import bpf, clock, netns, records
from udpwatch.agent.kernel.cpu import unpaced
from udpwatch.agent.kernel.ctnetlink import SEEN_REPLY, Table
from udpwatch.agent.kernel.loader import Limits, Loaded
from udpwatch.agent.kernel.shares import Shares
from udpwatch.agent.model import Event
from udpwatch.agent.sources import flows
from udpwatch.agent.sources.flows import (
    ANY_SERVER,
    MAX_NAMESPACES,
    Settled,
    client_of,
    entry_age_ns,
    entry_timeout,
    is_broadcast,
    is_group,
    settle_by_netlink,
)


class ProbedFlows:
    """The candidates of bpf/conntrack.c."""

    def __init__(self, loaded: Loaded, limits: Limits, pace: Callable[[], None] = unpaced) -> None:
        """Use the maps, and add the requests that conntrack knows already."""
        self._pace = pace
        self._candidates = loaded.maps["candidates"]
        self._shares = Shares(loaded.maps["candidates_held"], loaded.maps["all_candidates"])
        self._settle, self._add_request = loaded.programs["settle"], loaded.programs["add_request"]
        self._tables: dict[int, Table] = {}  # of namespaces with requests from a dump, while these count
        self._keep_tables_until = clock.monotonic_ns() + limits.window_ns + int(flows.GRACE_SECONDS * 1e9)
        self.undecided = self.overruns = self.evicted = 0
        self.flows = None
        self.unwatched = ()
        self.missing = 0
        self._read_existing(limits)

    def close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables.clear()

    def decided(self, now: int) -> Iterator[Event]:
        """Remove the due candidates, and yield those that were wrong replies.

        The oldest is first: a reply that passes several namespaces begins in that of its sender, where the sender is
        known.
        """
        items = list(bpf.map_items(self._candidates, records.CANDIDATE_KEY_BYTES, records.CANDIDATE_BYTES))
        candidates = [(key, records.tenant_of_candidate(raw), *records.decode_candidate(raw)) for key, raw in items]
        held = Counter(tenant for _, tenant, _, _ in candidates)
        for key, tenant, candidate, zone in sorted(candidates, key=lambda each: each[2].time):
            if now - candidate.time < flows.GRACE_SECONDS * 1e9:
                break
            self._pace()
            event = candidate
            outcome, _ = bpf.program_test_run(self._settle, _frame(key), 1)
            bpf.map_delete(self._candidates, key)
            held[tenant] -= 1
            if outcome == Settled.ASK:
                table = self._tables.get(event.netns_inode or 0)
                outcome, event = settle_by_netlink(table, event, zone) if table else (Settled.UNDECIDED, event)
            if outcome == Settled.WRONG:
                yield event
            elif outcome == Settled.UNDECIDED:
                self.undecided += 1
        self._shares.set(held)
        if self._tables and now > self._keep_tables_until:
            self.close()

    def _read_existing(self, limits: Limits) -> None:
        with contextlib.suppress(OSError):  # no free descriptors; new flows are seen anyway
            for fd in itertools.islice(netns.everywhere(), MAX_NAMESPACES):
                with contextlib.suppress(OSError), netns.entered(fd):
                    self._read_namespace(os.fstat(fd).st_ino, limits)

    def _read_namespace(self, inode: int, limits: Limits) -> None:
        table = Table()
        asked: dict[records.Requester, list[tuple[str, int]]] = {}
        now, timeout = clock.monotonic_ns(), entry_timeout()
        try:
            for entry in table.dump():
                seen = now - entry_age_ns(entry, timeout)
                if entry.status & SEEN_REPLY or now - seen > limits.window_ns:
                    continue
                client = client_of(inode, entry)
                if len(asked) >= limits.max_peers and client not in asked:
                    continue
                group = is_group(entry.original.destination) or is_broadcast(entry.reply.source)
                asked.setdefault(client, []).append((ANY_SERVER if group else entry.reply.source, seen))
            for client, servers in asked.items():
                for server, seen in sorted(servers, key=lambda server: server[1])[-2:]:
                    bpf.program_test_run(self._add_request, _frame(records.encode_request(client, server, seen)), 1)
        except BaseException:
            table.close()
            raise
        if asked:
            self._tables[inode] = table
        else:
            table.close()


def _frame(message: bytes) -> bytes:
    """Return a "packet" with a message for a program: an Ethernet header, and the minimum length."""
    return bytes(14) + message.ljust(50, b"\0")
