"""The node's UDP servers: joins what the kernel counts of each, its sockets, and its wrong replies.

Rules
1. Memory is bounded: at most `max_servers` are listed; beyond that, the counts of a server are added to `other` of its
   Kubernetes namespace, and none is lost. A server of the tenant with the most is evicted first. A tenant is a
   container, else a cgroup, else a network namespace.
   A process may change its name, and several may reply in turn: a server's labels change at most once in
   RENAME_SECONDS after the first FREE_RENAMES times. Its counts then stay with other servers of its old labels.
2. Counts only grow while a server is listed, even if some of its sockets end or are evicted. They end with the server:
   ENDED_SECONDS after its socket or its container is gone, or when it has no known socket and the kernel has forgotten
   it. Wrong replies are forgotten like findings.
3. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from udpwatch.agent.daemon.memory import described, restored
from udpwatch.agent.model import (
    Cause,
    Finding,
    Risk,
    Sample,
    Sender,
    Server,
    ServerCount,
    ServerTotals,
    UdpSocket,
)
from udpwatch.agent.servers.audit import AT_RISK
from udpwatch.agent.servers.audit import ORDER as RISK_ORDER

READ_SECONDS = 2.0
SENDER_SECONDS = 10.0  # how often the sender of a server is looked up again
ENDED_SECONDS = 60.0  # longer than a scrape interval
MAX_EVICTIONS = 100  # in one sample
FREE_RENAMES = 2  # then a server's labels change only every RENAME_SECONDS: each change is a new series
RENAME_SECONDS = 300.0
MAX_OTHER_NAMESPACES = 100  # with an `other` of their own; further namespaces share one

_Place = tuple[int, str, int]  # namespace (inode number, or -scope), bound address, port
_Labels = tuple[str, str, str, str, int]  # process, namespace, pod, container, port
_Group = tuple[_Labels, int]  # labels, namespace: what is listed as one server
_Tenant = tuple[str, str, str]
_Replied = tuple[_Labels, int]  # who sent wrong replies: labels, and the finding's namespace


class ServerLookup(Protocol):
    """Finds the process of a server. No method blocks."""

    def sender_of(self, pid: int, process: str, cgroup: int, netns: int) -> Sender:
        """Return what is known about a process. ``pid``, ``cgroup``: 0 if unknown; ``process``: "" if unknown."""

    def has_ended(self, sender: Sender, now: float) -> bool:
        """Return whether the sender's pod or container has ended. ``now``: monotonic seconds."""


@dataclass(slots=True)
class _Entry:
    """The sockets of one port, bound to one address in one namespace."""

    place: _Place
    netns: int  # inode number, 0: unknown
    sender: Sender
    first: float  # seconds since the epoch
    last: float  # of its last request
    looked_up: float  # monotonic seconds
    who: tuple[int, str, int] = (0, "", 0)  # process id, name and cgroup of the lookup
    renames: int = 0
    renamed: float = 0.0  # monotonic seconds, of the last change of its labels
    counts: ServerTotals = field(default_factory=ServerTotals)  # since it was listed
    inherited: ServerTotals = field(default_factory=ServerTotals)  # see Server.inherited
    seen: ServerTotals = field(default_factory=ServerTotals)  # as last read
    sockets: tuple[UdpSocket, ...] = ()
    drops_of: dict[int, int] = field(default_factory=dict)  # socket -> its drops, as last read
    tenant: _Tenant | None = None  # None: it is not listed
    had_socket: bool = False
    is_counted: bool = False  # by the kernel, in the last sample
    gone: float | None = None  # monotonic seconds since when it has neither socket nor container
    wrong: int = 0  # wrong replies since it was listed
    replied_wrongly: float = 0.0  # monotonic seconds, of the last one


class Servers:
    """The agent's memory of servers."""

    def __init__(
        self,
        max_servers: int,
        senders: ServerLookup,
        risks: Callable[[Iterable[UdpSocket]], Mapping[int, Risk]],
        forget: float = 3600.0,
    ) -> None:
        """``risks`` returns the risk of each socket by the number that `socket_id` gives it; ``forget``: seconds after
        which wrong replies are forgotten.
        """
        self._max, self._senders, self._risks, self._forget = max_servers, senders, risks, forget
        self._wrong: Counter[_Replied] = Counter()  # since the last read
        self._unmatched: Counter[_Replied] = Counter()  # their server was not known at the last read
        self._entries: dict[_Place, _Entry] = {}
        self._held: Counter[_Tenant] = Counter()
        self.other: dict[str, ServerTotals] = {}  # by namespace; "": none or unknown
        self._kernel_other = ServerTotals()
        self._generation = ""  # of the programs that count
        self._read_at = -READ_SECONDS
        self._risk_of: Mapping[int, Risk] = {}
        self._evictions = 0  # in this sample
        self._renamed: list[tuple[_Entry, _Entry]] = []  # in this sample: entry, and its counts under the old labels

    def to_store(self, entries: bool = True) -> dict[str, Any]:
        """Return what the next process needs so that no counter falls (`restore`). Without ``entries``, it is small."""
        return {
            "entries": [
                described(entry) | {"sockets": (), "drops_of": sorted(entry.drops_of.items())}
                for entry in (self._entries.values() if entries else ())
            ],
            "generation": self._generation,
            "kernel_other": described(self._kernel_other),
            "other": {namespace: described(totals) for namespace, totals in self.other.items()},
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on with what an earlier process stored. Raises what `State.restore` raises."""
        entries: dict[_Place, _Entry] = {}
        totals = ("counts", "inherited", "seen")
        for each in stored["entries"]:
            netns, address, port = each["place"]
            pid, process, cgroup = each["who"]
            tenant = each["tenant"]
            parts = {name: restored(ServerTotals, each[name]) for name in totals} | {
                "place": (int(netns), str(address), int(port)),
                "who": (int(pid), str(process), int(cgroup)),
                "sender": restored(Sender, each["sender"]),
                "drops_of": {int(socket): int(drops) for socket, drops in each["drops_of"]},
                "tenant": tuple(map(str, tenant)) if tenant else None,
                "sockets": (),
            }
            entry = restored(_Entry, each | parts)
            entries[entry.place] = entry
        other = {str(namespace): restored(ServerTotals, each) for namespace, each in stored["other"].items()}
        kernel_other = restored(ServerTotals, stored["kernel_other"])
        generation = str(stored["generation"])
        self._entries, self.other, self._kernel_other = entries, other, kernel_other
        self._generation = generation
        self._held = Counter(entry.tenant for entry in entries.values() if entry.tenant)

    def add_wrong(self, sender: Sender, finding: Finding, count: int) -> None:
        """Add wrong replies; the next sample that is read adds them to their server."""
        if finding.cause is not Cause.FORWARDED:  # those are of another machine's server
            self._wrong[_labels(sender, finding.port), finding.netns] += count

    def move_times(self, seconds: float) -> None:
        """Move all times after the wall clock was set forward by so many seconds."""
        for entry in self._entries.values():
            entry.first += seconds
            entry.last += seconds

    def add(self, sample: Sample, now: float, monotonic: float) -> None:
        """Add a sample. ``now``: seconds since the epoch."""
        if monotonic - self._read_at < READ_SECONDS and not sample.is_last and sample.sockets is None:
            return
        self._read_at = monotonic
        if sample.generation != self._generation:
            self._generation, self._kernel_other = sample.generation, ServerTotals()
            for entry in self._entries.values():
                entry.seen = ServerTotals(drops=entry.seen.drops)
        for entry in self._entries.values():
            entry.is_counted = False
        self._evictions = 0
        if sample.sockets is not None:
            self._add_sockets(sample.sockets, now, monotonic)
            self._risk_of = self._risks(sample.sockets)
        for count in sample.servers:
            entry = self._entry(_place(count.netns, count.scope, count.address, count.port), count.netns, now)
            self._identify(entry, count.pid, count.process, count.cgroup, monotonic, by_reply=True)
            entry.is_counted = True
            unanswered = _not_below(count, entry.seen)
            read = ServerTotals(count.requests, count.replies, unanswered, entry.seen.drops)
            if read.requests != entry.seen.requests:
                entry.last = now
            self._count(entry, read)
        if sample.other_servers:
            self._add_kernel_other(sample.other_servers)
        self._leave_counts()
        self._match_wrong({each.scope: each.netns or -each.scope for each in sample.servers}, monotonic)
        self._end(monotonic, has_sockets=sample.sockets is not None)

    def identified(self, sample: Sample) -> list[tuple[ServerCount, Sender]]:
        """Return the counted servers of a sample that are known, each with its process."""
        found = []
        places = [_place(count.netns, count.scope, count.address, count.port) for count in sample.servers]
        shared = Counter(places)  # the kernel may give a new namespace the number of one that has ended
        for place, count in zip(places, sample.servers, strict=True):
            entry = self._entries.get(place)
            if entry and (shared[place] == 1 or entry.who == (count.pid, count.process, count.cgroup)):
                found.append((count, entry.sender))
        return found

    def _entry(self, place: _Place, netns: int, now: float) -> _Entry:
        entry = self._entries.get(place)
        if entry is None:
            entry = self._entries[place] = _Entry(place, netns, Sender(""), now, 0.0, -SENDER_SECONDS)
        return entry

    def _identify(
        self, entry: _Entry, pid: int, process: str, cgroup: int, monotonic: float, by_reply: bool = False
    ) -> None:
        """Find the process of a server, and list the server if there is room. The process that sent a reply takes
        precedence over the one that has bound the socket, which may have exited.
        """
        who = (pid, process, cgroup)
        if entry.who[0] and (not pid or not by_reply):
            who = entry.who
        if who != entry.who or monotonic - entry.looked_up >= SENDER_SECONDS:
            sender = self._senders.sender_of(*who, entry.netns)
            # Of a process that has ended only the name of its thread is left: what is known is better.
            if who != entry.who or sender.executable or not entry.sender.executable:
                self._rename(entry, sender, monotonic)
            entry.who, entry.looked_up = who, monotonic
        tenant = _tenant(entry)
        if entry.tenant is None and self._make_room(tenant):
            entry.tenant = tenant
            self._held[tenant] += 1

    def _rename(self, entry: _Entry, sender: Sender, monotonic: float) -> None:
        """Set the sender of a server, unless its labels have changed too often."""
        if _labels(sender, 0) != _labels(entry.sender, 0):
            if entry.sender.process:
                if entry.renames >= FREE_RENAMES and monotonic - entry.renamed < RENAME_SECONDS:
                    return
                entry.renames, entry.renamed = entry.renames + 1, monotonic
            if entry.tenant:
                self._renamed.append((entry, replace(entry)))
                entry.counts, entry.inherited = ServerTotals(), ServerTotals()
        entry.sender = sender

    def _leave_counts(self) -> None:
        """Leave the counts of renamed entries to others that still have their old labels; without such, keep them."""
        renamed, self._renamed = self._renamed, []
        orphans = {id(old) for old in self._bequeath([old for _, old in renamed])}
        for entry, old in renamed:
            if id(old) not in orphans:
                continue
            if entry.tenant:
                entry.counts.add(old.counts)
                entry.inherited.add(old.inherited)
            else:  # it was evicted meanwhile
                for counts in (old.counts, old.inherited):
                    self._other(old.sender.namespace).add(counts)

    def _make_room(self, tenant: _Tenant) -> bool:
        """Return whether there is room for another server of a tenant. If necessary, evict the idlest server of the
        tenant with the most, unless this tenant would then have as many.
        """
        if self._held.total() < self._max:
            return True
        most, held = max(self._held.items(), key=lambda each: each[1])
        if held <= self._held[tenant] + 1 or self._evictions >= MAX_EVICTIONS:
            return False
        self._evictions += 1
        evicted = min((each for each in self._entries.values() if each.tenant == most), key=lambda each: each.last)
        self._unlist(evicted)
        for orphan in self._bequeath([evicted]):
            other = self._other(orphan.sender.namespace)
            other.add(orphan.counts)
            other.add(orphan.inherited)
        evicted.counts, evicted.inherited, evicted.wrong = ServerTotals(), ServerTotals(), 0
        return True

    def _bequeath(self, gone: list[_Entry]) -> list[_Entry]:
        """Add the counts of entries that are no longer listed to others of the same labels, so that the sum in metrics
        does not fall. Return those without such an heir.
        """
        groups: dict[_Group, _Entry] = {}
        alike: dict[_Labels, _Entry] = {}
        for entry in self._entries.values() if gone else ():
            if entry.tenant:
                group = _group(entry)
                groups[group] = alike[group[0]] = entry
        orphans = []
        for entry in gone:
            group = _group(entry)
            heir = groups.get(group) or alike.get(group[0])
            if heir is None:
                orphans.append(entry)
                continue
            (heir.counts if _group(heir) == group else heir.inherited).add(entry.counts)
            heir.inherited.add(entry.inherited)
        return orphans

    def _unlist(self, entry: _Entry) -> None:
        assert entry.tenant
        self._held[entry.tenant] -= 1
        if not self._held[entry.tenant]:
            del self._held[entry.tenant]
        entry.tenant = None

    def _other(self, namespace: str) -> ServerTotals:
        if namespace not in self.other and len(self.other) >= MAX_OTHER_NAMESPACES:
            namespace = ""
        return self.other.setdefault(namespace, ServerTotals())

    def _count(self, entry: _Entry, read: ServerTotals) -> None:
        """Add what was counted since the last sample."""
        more = _more(read, entry.seen)
        entry.seen = read
        (entry.counts if entry.tenant else self._other(entry.sender.namespace)).add(more)

    def _add_kernel_other(self, count: ServerCount) -> None:
        read = ServerTotals(count.requests, count.replies, _not_below(count, self._kernel_other))
        self._other("").add(_more(read, self._kernel_other))
        self._kernel_other = read

    def _match_wrong(self, namespaces: Mapping[int, int], monotonic: float) -> None:
        """Add wrong replies to their servers. ``namespaces``: of each scope."""
        for entry in self._entries.values():
            if monotonic - entry.replied_wrongly > self._forget:
                entry.wrong = 0
        if not self._wrong and not self._unmatched:
            return
        entries: dict[tuple[_Labels | int, int], _Entry] = {}
        rivals: set[tuple[int, int]] = set()  # ports of a namespace with more than one server
        for entry in self._entries.values():
            netns, _, port = entry.place
            labels = _labels(entry.sender, port)
            entries.setdefault((labels, netns), entry)
            if _labels(entries.setdefault((port, netns), entry).sender, port) != labels:
                rivals.add((port, netns))
        unmatched: Counter[_Replied] = Counter()
        for replied, is_new in ((self._unmatched, False), (self._wrong, True)):
            for (labels, scope), count in replied.items():
                at = labels[-1], namespaces.get(scope, scope)
                server = entries.get((labels, at[1])) or (None if at in rivals else entries.get(at))
                if server:
                    server.wrong += count
                    server.replied_wrongly = monotonic
                elif is_new:
                    unmatched[labels, scope] = count
        self._wrong, self._unmatched = Counter(), unmatched

    def _add_sockets(self, sockets: tuple[UdpSocket, ...], now: float, monotonic: float) -> None:
        places: dict[_Place, list[UdpSocket]] = {}
        for each in sockets:
            places.setdefault(_place(each.netns, 0, each.address, each.port), []).append(each)
        for entry in self._entries.values():
            if entry.place not in places:
                entry.sockets = ()
        for place, group in places.items():
            entry = self._entry(place, group[0].netns, now)
            entry.sockets, entry.had_socket = tuple(group), True
            known = next((each for each in group if each.pid), group[0])
            self._identify(entry, known.pid, known.process, known.cgroup, monotonic)
            self._count_drops(entry)

    def _count_drops(self, entry: _Entry) -> None:
        """Add the drops of each socket since it was last seen."""
        now = {socket_id(each): each.drops for each in entry.sockets if each.drops}
        more = sum(_grown(drops, entry.drops_of.get(which, 0)) for which, drops in now.items())
        entry.drops_of = now
        seen = entry.seen
        self._count(entry, ServerTotals(seen.requests, seen.replies, seen.unanswered, seen.drops + more))

    def _end(self, monotonic: float, has_sockets: bool) -> None:
        """Remove servers that are gone."""
        gone = []
        for entry in self._entries.values():
            has_ended = bool(entry.sender.container_id) and self._senders.has_ended(entry.sender, monotonic)
            is_there = bool(entry.sockets) or (entry.is_counted and not (has_sockets and entry.had_socket))
            if is_there and not has_ended:
                entry.gone = None
            elif entry.gone is None:
                entry.gone = monotonic
            elif monotonic - entry.gone > ENDED_SECONDS:
                gone.append(entry)
        for entry in gone:
            del self._entries[entry.place]
        listed = [entry for entry in gone if entry.tenant]
        for entry in listed:
            self._unlist(entry)
        self._bequeath(listed)

    def listed(self) -> tuple[Server, ...]:
        """Return each listed server."""
        groups: dict[_Group, list[_Entry]] = {}
        for entry in self._entries.values():
            if entry.tenant:
                groups.setdefault(_group(entry), []).append(entry)
        servers = map(self._server, groups.values())
        return tuple(sorted(servers, key=lambda server: (-server.requests, server.port, server.addresses)))

    def _server(self, group: list[_Entry]) -> Server:
        counts, inherited, wrong = ServerTotals(), ServerTotals(), sum(entry.wrong for entry in group)
        for entry in group:
            counts.add(entry.counts)
            inherited.add(entry.inherited)
        sockets = [each for entry in group for each in entry.sockets]
        newest = max(group, key=lambda entry: entry.last)
        risks = [self._risk_of.get(socket_id(each), Risk.UNKNOWN) for each in sockets]
        return Server(
            sender=newest.sender,
            port=newest.place[2],
            netns=newest.netns,
            addresses=tuple(sorted({entry.place[1] for entry in group})),
            requests=counts.requests,
            replies=counts.replies,
            unanswered=counts.unanswered,
            wrong=wrong,
            drops=counts.drops if counts.drops or any(each.drops is not None for each in sockets) else None,
            queue=_sum(each.queue for each in sockets),
            queue_limit=_sum(each.queue_limit for each in sockets),
            pktinfo=_pktinfo(sockets),
            risk=Risk.WRONG if wrong else min(risks, key=RISK_ORDER.index, default=Risk.UNKNOWN),
            first=min(entry.first for entry in group),
            last=newest.last,
            at_risk=max(sum(risk in AT_RISK for risk in risks), 1 if wrong else 0),
            inherited=inherited,
        )

    def other_at_risk(self) -> dict[str, int]:
        """Return how many sockets of servers that are not listed are at risk, by namespace; "": none or unknown."""
        found: Counter[str] = Counter()
        for entry in self._entries.values():
            if not entry.tenant:
                namespace = entry.sender.namespace if entry.sender.namespace in self.other else ""
                found[namespace] += sum(self._risk_of.get(socket_id(each)) in AT_RISK for each in entry.sockets)
        return dict(found)


def socket_id(each: UdpSocket) -> int:
    """Return a number of a socket: its cookie, else its inode number."""
    return each.cookie or each.inode


def _place(netns: int, scope: int, address: str, port: int) -> _Place:
    return (netns or -scope), address, port


def _tenant(entry: _Entry) -> _Tenant:
    sender = entry.sender
    return sender.namespace, sender.pod, sender.container or sender.cgroup or f"netns {entry.place[0]}"


def _labels(sender: Sender, port: int) -> _Labels:
    return sender.process, sender.namespace, sender.pod, sender.container, port


def _group(entry: _Entry) -> _Group:
    return _labels(entry.sender, entry.place[2]), entry.netns


def _grown(now: int, before: int) -> int:
    return now - before if now >= before else now  # it began again at 0


def _not_below(count: ServerCount, seen: ServerTotals) -> int:
    """Return the unanswered requests. An agent that goes on where another one stopped may count fewer for a while."""
    return max(count.unanswered, seen.unanswered) if count.requests >= seen.requests else count.unanswered


def _more(now: ServerTotals, before: ServerTotals) -> ServerTotals:
    began_again = now.requests < before.requests or now.replies < before.replies
    if began_again:
        return ServerTotals(now.requests, now.replies, now.unanswered, max(0, now.drops - before.drops))
    return ServerTotals(
        now.requests - before.requests,
        now.replies - before.replies,
        max(0, now.unanswered - before.unanswered),
        now.drops - before.drops,
    )


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _pktinfo(sockets: Iterable[UdpSocket]) -> bool | None:
    """Return whether every wildcard socket has PKTINFO set; None: unknown, or there is no such socket."""
    wildcard = [each for each in sockets if each.address in ("0.0.0.0", "::")]  # noqa: S104 a comparison
    values = [_has_pktinfo(each) for each in wildcard]
    if not values or None in values:
        return None
    return all(values)


def _has_pktinfo(each: UdpSocket) -> bool | None:
    """Return whether a socket gets PKTINFO for each family that it serves."""
    if each.family == 4:
        return each.pktinfo
    if each.pktinfo6 is None or (not each.only_ipv6 and each.pktinfo is None):
        return None
    return each.pktinfo6 and (each.only_ipv6 or bool(each.pktinfo))
