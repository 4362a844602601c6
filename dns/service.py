"""The responder at work: tables, upstream servers, sockets, and what keeps each of them up to date.

Two threads: the event loop's, and the one that answers over UDP from memory (udp.py). A table is replaced whole, by one
assignment, and what was remembered of the old one is forgotten after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from udpwatch.dns import addresses, cache, zone
from udpwatch.dns.cache import Cache, Entry, Key
from udpwatch.dns.errors import HostsError
from udpwatch.dns.listen import Listening
from udpwatch.dns.metrics import DnsCollector, Metrics
from udpwatch.dns.policy import Network, contains, rebinds
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Forward, Reply, Responder, Upstreams, from_entry
from udpwatch.dns.settings import ETC_HOSTS, Server, Settings
from udpwatch.dns.tcp import MAX_CONNECTIONS, TcpServer
from udpwatch.dns.udp import Pending, UdpThread, peer_of
from udpwatch.dns.upstream import NoAnswer, Upstream, read_resolv
from udpwatch.dns.watch import Watch
from udpwatch.dns.wire import Rcode, name_to_text
from udpwatch.dns.zone import Zone, unpack_address

STALE_SECONDS = 1.8  # RFC 8767, section 5: the client response timer
DRAIN_SECONDS = 5.0
RETRY_SECONDS = 1.0  # for addresses that could not be bound yet
SETTLE_SECONDS = 0.05  # for a burst of changes of addresses to end
#: Questions read from sockets that the event loop has not looked at yet. Beyond that the clients have to ask again: a
#: flood must find an end somewhere, and what is refused takes the loop's time, too.
MAX_QUEUED = 4_096
SOCKETS_PER_QUESTION = 4  # servers that are asked at the same time
#: In multiples of --dns-forward-max, which is for the servers of one domain, so that dead ones cost the others nothing:
#: questions to all servers together; clients that wait (many may for one question), for a domain's servers and for all.
ALL_ASKED, WAITING, ALL_WAITING = 4, 2, 4

Group = tuple[Server, ...]  # the servers of one domain

log = logging.getLogger(__name__)


class Service:
    """One responder; `start`, then `stop`."""

    def __init__(self, settings: Settings, version: str) -> None:
        """Bind what is to be bound; raises DnsError with nothing left behind."""
        self._settings = settings
        _raise_descriptor_limit(MAX_CONNECTIONS + SOCKETS_PER_QUESTION * ALL_ASKED * settings.forward_max)
        self.metrics = Metrics()
        self._cache = Cache(settings.cache_size, settings.stale_seconds)
        self._responder = Responder(settings, Zone(settings), self._cache)
        self._responder.version = f"udpwatch-{version}"
        self._responder.server_statistics, self._responder.totals = self._server_statistics, self._totals
        self._upstream = Upstream(self.metrics)
        self._query_log = QueryLog(settings.log_extra) if settings.log_queries else None
        self._locals = addresses.snapshot()
        self._networks: list[Network] = self._connected()
        self._warned_of_policy = False
        self._in_flight: dict[Key, asyncio.Task[Entry]] = {}
        self._asked: Counter[Group] = Counter()  # of _in_flight
        self._waiting: Counter[Group] = Counter()  # clients' questions, also where many are the same
        self._tasks: set[asyncio.Task[None]] = set()
        self._queued = self._taken = 0  # questions that the UDP thread handed over, that the loop took
        self._found_servers: tuple[Server, ...] = ()  # of the resolv file
        self._told_of_hosts = ""  # what was said last of files that cannot be read, so that each try need not say it
        self._told_of_resolv: list[str] = []
        self._own_servers: set[Server] = set()
        self._refresh_due = False
        self._loading = asyncio.Lock()
        self._watches: list[Watch] = []
        self._changes: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._serving = False
        tell = self._query_log.tell if self._query_log else None
        self._listening = Listening(settings)
        who = self.admits, self._listening.serves
        self._udp = UdpThread(self._responder, self.metrics, *who, self._take_from_thread, tell)
        self._tcp = TcpServer(self._responder, self.metrics, *who, self._ask_over_tcp, tell)
        try:
            self._listening.open(self._locals)
        except BaseException:
            self.close()
            raise

    @property
    def collector(self) -> DnsCollector:
        """For a registry of prometheus_client."""
        return DnsCollector(self.metrics, self._cache, lambda: len(self._in_flight))

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listening.port

    @property
    def ready(self) -> bool:
        """Whether the tables are loaded and questions are answered."""
        return self._serving and self._udp.is_alive()

    # ---- start, stop ----

    async def start(self) -> None:
        """Load the tables, then serve. Nothing that is missing keeps it from serving what is there."""
        self._loop = asyncio.get_running_loop()
        self._changes = addresses.changes()
        hosts, resolv = Watch(self._hosts_files, self._load), None
        if self._settings.resolv and self._settings.poll:
            resolv = Watch(lambda: list(self._settings.resolv_files), self._resolv_changed)
        self._watches = [each for each in (hosts, resolv) if each]
        hosts_read, resolv_read = await self._load(missing_ok=True), self._read_upstreams()
        self._listening.serve(self._udp, self._tcp)
        self._udp.start()
        self._loop.add_reader(self._changes, self._addresses_changed)
        hosts.start(hosts_read)
        if resolv:
            resolv.start(resolv_read)
        self._refresh_soon(SETTLE_SECONDS)  # what changed while the tables were read
        self._serving = True
        where = ", ".join(self._listening.addresses) or "no address yet"
        log.info("dns: listening on %s, port %d; %d local names", where, self.port, self.metrics.hosts_entries)

    def close(self) -> None:
        """In place of `stop`, where it never began."""
        self._udp.stop()
        self._listening.close()

    async def stop(self) -> None:
        """Answer what is under way, then close everything; also where `start` failed, or never began."""
        self._serving = False
        if self._retry:
            self._retry.cancel()
        if self._changes:
            self._loop.remove_reader(self._changes)
            self._changes.close()
        for watch in self._watches:
            await watch.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_SECONDS)
        await self._tcp.stop(DRAIN_SECONDS)
        left = [*self._tasks, *self._in_flight.values()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.to_thread(self._udp.stop)
        self._listening.close()

    def statistics(self) -> list[str]:
        """For the log, in dnsmasq's words (SIGUSR1)."""
        counts, (local, sent) = self._cache.statistics, self._totals()
        lines = [
            f"cache size {self._cache.max_entries}, {counts.evictions}/{counts.insertions} cache insertions re-used "
            "unexpired cache entries.",
            f"queries forwarded {sent}, queries answered locally {local}",
        ]
        for text in self._server_statistics():
            server, asked, failed = text.split()
            lines.append(f"server {server}: queries sent {asked}, retried or failed {failed}")
        return lines

    def _totals(self) -> tuple[int, int]:
        """Questions answered here, and passed on, as dnsmasq counts hits and misses."""
        found = [0, 0]
        for (*_, source), cell in list(self.metrics.answered.items()):
            found[source == "forward"] += cell[0]
        return found[0], found[1]

    def _server_statistics(self) -> list[str]:
        failed: Counter[str] = Counter()
        for (server, _), cell in list(self.metrics.upstream_failed.items()):
            failed[server] += cell[0]
        return [f"{server} {cell[0]} {failed[server]}" for server, cell in list(self.metrics.upstream_asked.items())]

    # ---- what may change ----

    async def reload(self) -> None:
        """SIGHUP: forget the cache, read the hosts files, and the resolv file if nobody watches it."""
        self._cache.clear()
        self._told_of_hosts, self._told_of_resolv = "", []  # somebody looks
        await self._load()
        if not self._settings.poll:
            self._read_upstreams()
        self._udp.invalidate()

    def _hosts_files(self) -> list[Path]:
        return [*([ETC_HOSTS] if self._settings.hosts else []), *self._settings.addn_hosts]

    async def _load(self, missing_ok: bool = False) -> bool:
        """A new table in place of the old one; the old one stays where a file cannot be read, unless ``missing_ok``.
        Whether all could be read."""
        async with self._loading:
            try:
                table = await asyncio.to_thread(zone.build, self._settings, _complain, missing_ok)
            except HostsError as error:
                self.metrics.hosts_unreadable = error.files
                if str(error) != self._told_of_hosts:
                    self._told_of_hosts = str(error)
                    self.metrics.reload_errors[0] += 1
                    log.error("dns: %s; the table before stays in force", error)
                return False
            self._told_of_hosts = ""
            self._responder.zone = table
            self._udp.invalidate()
            self.metrics.hosts_entries = table.entries
            self.metrics.hosts_unreadable = table.unreadable
            self.metrics.reload_time = time.time()
            self.metrics.reloads[0] += 1
            if self.ready:
                log.info("dns: read %d local names", table.entries)
            return not table.unreadable

    async def _resolv_changed(self) -> bool:
        return self._read_upstreams()

    def _read_upstreams(self) -> bool:
        """Whether all resolv files could be read; where none could, the servers before stay."""
        settings, complaints, complete = self._settings, list[str](), True
        if settings.resolv:
            servers, complete = read_resolv(settings.resolv_files, complaints.append)
            if servers is not None:
                self._found_servers = servers
            elif self._found_servers:
                complaints.append("no resolv file can be read; the upstream servers stay as they are")
        if complaints != self._told_of_resolv:
            self._told_of_resolv = complaints
            for text in complaints:
                _complain(text)
        self._use_upstreams()
        return complete

    def _use_upstreams(self) -> None:
        """Ask all servers but ourselves, which depends on our addresses."""
        settings, before = self._settings, self._responder.upstreams
        default = self._foreign(tuple(dict.fromkeys((*settings.servers, *self._found_servers))))
        domains = []
        for domain in settings.domain_servers:
            servers = self._foreign(domain.servers)
            if servers or not domain.servers:  # else as if it had not been said: () would make it ours alone
                domains.append(replace(domain, servers=servers))
        if (before.default, before.domains) == (default, tuple(domains)):
            return
        self._responder.upstreams = Upstreams(default, tuple(domains))
        self._upstream.forget()
        self._udp.invalidate()
        if before.default != default:
            log.info("dns: upstream servers: %s", ", ".join(map(str, default)) or "none")

    def _foreign(self, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        own = {server for server in servers if self._listening.is_own(server, self._locals)}
        for server in own - self._own_servers:
            log.warning("dns: ignoring nameserver %s: it is this responder itself", server)
        self._own_servers = (self._own_servers - set(servers)) | own
        return tuple(server for server in servers if server not in own)

    def _addresses_changed(self) -> None:
        assert self._changes
        addresses.drain(self._changes)
        self._refresh_soon(SETTLE_SECONDS)

    def _refresh_soon(self, seconds: float) -> None:
        if not self._refresh_due:
            self._refresh_due = True
            self._retry = self._loop.call_later(seconds, lambda: self._spawn(self._refresh_addresses()))

    async def _refresh_addresses(self) -> None:
        self._refresh_due = False
        try:
            self._locals = addresses.snapshot()
        except OSError as error:
            log.warning("dns: cannot read this host's addresses: %s", error.strerror)
            self._refresh_soon(RETRY_SECONDS)
            return
        self._networks = self._connected()
        complete = self._listening.update(self._locals)
        self._udp.readmit()
        self._use_upstreams()
        if not complete:  # an address that is there, but could not be bound yet, says no second word
            self._refresh_soon(RETRY_SECONDS)

    # ---- who is served ----

    def _connected(self) -> list[Network]:
        return sorted({local.network for local in self._locals}, key=str)

    def admits(self, peer: bytes) -> bool:
        """Whether a client (4 or 16 octets) is served: everybody, or directly connected networks (local_service)."""
        if not self._settings.local_service or contains(self._networks, peer):
            return True
        if not self._warned_of_policy:
            self._warned_of_policy = True
            log.warning(
                "dns: ignoring query from non-local network %s (logged only once); --listen-address or --interface "
                "serves everybody there",
                unpack_address(peer),
            )
        return False

    # ---- questions for others ----

    def _take_from_thread(self, pending: list[Pending]) -> None:
        if self._queued - self._taken > MAX_QUEUED:
            self.metrics.forward_rejects[0] += len(pending)
            return
        self._queued += len(pending)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, pending)

    def _take(self, pending: list[Pending]) -> None:
        self._taken += len(pending)
        for each in pending:
            self._spawn(self._answer(each))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("dns: %s", error, exc_info=error)

    async def _answer(self, pending: Pending) -> None:
        address, port = peer_of(pending.name)
        reply = await self._find(pending.forward, address, port)
        if reply.query:
            cell = self.metrics.cell("udp", pending.socket.layout.name, reply.query.type, reply.rcode, reply.source)
            cell[0] += 1
        self.metrics.duration["forward"].observe(time.monotonic() - pending.received)
        try:
            pending.socket.send(reply.data, pending.name, pending.control)
        except (OSError, ValueError):  # the address, or its socket, has gone meanwhile
            self.metrics.dropped["send"][0] += 1

    async def _ask_over_tcp(self, forward: Forward, address: str, port: int) -> Reply:
        begun = time.monotonic()
        reply = await self._find(forward, address, port)
        self.metrics.duration["forward"].observe(time.monotonic() - begun)
        return reply

    async def _find(self, forward: Forward, address: str, port: int) -> Reply:
        servers = self._responder.upstreams.for_name(forward.query.name)
        if not servers:  # they changed since
            return self._responder.refuse(forward.query, Rcode.REFUSED)
        if not self._has_room(forward.query.key, servers):
            self.metrics.forward_rejects[0] += 1
            return self._responder.refuse(forward.query, Rcode.REFUSED)
        with _counted(self._waiting, servers):
            reply = await self._resolve(forward, servers, address, port)
        if self._query_log:
            self._query_log.answer(reply, address, port)
        return reply

    def _has_room(self, key: Key, servers: Group) -> bool:
        """Whether one more question may go to these servers, or wait for an answer that is under way."""
        most = self._settings.forward_max
        if self._waiting[servers] >= WAITING * most or self._waiting.total() >= ALL_WAITING * most:
            return False
        return key in self._in_flight or (self._asked[servers] < most and len(self._in_flight) < ALL_ASKED * most)

    async def _resolve(self, forward: Forward, servers: Group, address: str, port: int) -> Reply:
        query, key = forward.query, forward.query.key
        if self._query_log:
            first = self._upstream.order(servers)[0]
            self._query_log.forwarded(query, first.address if first.port == 53 else str(first), address, port)
        task = self._fetch(key, servers)
        done, _ = await asyncio.wait([task], timeout=STALE_SECONDS)
        if not done:
            if old := self._stand_in(forward):
                return old
            await asyncio.wait([task])
        rcode = int(Rcode.SERVFAIL)
        try:
            entry = task.result()
            return from_entry(query, entry, forward.most, entry.stored, "forward")  # new: its TTLs as they came
        except NoAnswer as error:
            rcode = error.rcode
        except asyncio.CancelledError:
            pass  # stopping
        except Exception:  # a fault of ours: the client must not have to wait for its own time-out
            log.exception("dns: %s could not be asked for", name_to_text(query.name))
        return self._stand_in(forward) or self._responder.refuse(query, rcode)

    def _stand_in(self, forward: Forward) -> Reply | None:
        now = time.monotonic()
        entry = self._cache.stand_in(forward.query.key, now)
        source = "cache" if entry and now < entry.expires else "stale"  # somebody else may have had an answer meanwhile
        return from_entry(forward.query, entry, forward.most, now, source) if entry else None

    def _fetch(self, key: Key, servers: Group) -> asyncio.Task[Entry]:
        """The task that brings and keeps the answer. A question that is under way is not asked again: an attacker must
        not make us ask it a thousand times and guess at all of them (CVE-2020-25686)."""
        if task := self._in_flight.get(key):
            self.metrics.coalesced[0] += 1
            return task
        task = self._loop.create_task(self._bring(key, servers))
        self._in_flight[key] = task
        self._asked[servers] += 1

        def end(done: asyncio.Task[Entry]) -> None:
            del self._in_flight[key]
            _take_one(self._asked, servers)
            done.cancelled() or done.exception()  # so that nobody complains that it was not looked at

        task.add_done_callback(end)
        return task

    async def _bring(self, key: Key, servers: tuple[Server, ...]) -> Entry:
        try:
            answer = await self._upstream.ask(key, servers)
        except NoAnswer as error:
            if error.rcode == Rcode.SERVFAIL and not self._cache.stand_in(key, time.monotonic()):
                self._cache.put(key, cache.failure(time.monotonic()))
            raise
        if rebinds(self._settings, answer):
            log.warning("dns: possible DNS-rebind attack detected: %s", name_to_text(key[0]))
            raise NoAnswer(Rcode.REFUSED)
        entry = self._responder.entry_of(answer, time.monotonic())
        if entry.expires > entry.stored:
            self._cache.put(key, entry)
        return entry


def _take_one(count: Counter[Group], group: Group) -> None:
    count[group] -= 1
    if not count[group]:  # groups come and go with the resolv file
        del count[group]


@contextlib.contextmanager
def _counted(count: Counter[Group], group: Group) -> Iterator[None]:
    count[group] += 1
    try:
        yield
    finally:
        _take_one(count, group)


def _raise_descriptor_limit(wanted: int) -> None:
    """Let this process open as many files as it may come to need, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted += soft
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _complain(text: str) -> None:
    log.warning("dns: %s", text)
