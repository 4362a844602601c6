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
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from udpwatch.dns import addresses, zone
from udpwatch.dns.cache import Cache
from udpwatch.dns.errors import HostsError
from udpwatch.dns.forwarder import ALL_ASKED, Ask, Forwarder, HandOver
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.listen import Listening
from udpwatch.dns.metrics import DnsCollector, Metrics
from udpwatch.dns.policy import Network, contains
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Forward, Reply, Responder, Upstreams
from udpwatch.dns.settings import ETC_HOSTS, Server, Settings
from udpwatch.dns.tcp import MAX_CONNECTIONS, TcpServer
from udpwatch.dns.udp import Pending, UdpThread, peer_of
from udpwatch.dns.upstream import Upstream, read_resolv
from udpwatch.dns.watch import Watch
from udpwatch.dns.zone import Zone, pack_address, unpack_address

DRAIN_SECONDS = 5.0
RETRY_SECONDS = 1.0  # for addresses that could not be bound yet
SETTLE_SECONDS = 0.05  # for a burst of changes of addresses to end
LOG_SECONDS = 10.0  # between two looks for lines that were left out of the log
SOCKETS_PER_QUESTION = 4  # servers that are asked at the same time
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
        self._forwarder = Forwarder(
            settings, self._responder, self._cache, self._upstream, self.metrics, self._query_log
        )
        self._hand_over = HandOver(self.metrics, self._take)
        self._tasks: set[asyncio.Task[None]] = set()
        self._found_servers: tuple[Server, ...] = ()  # of the resolv file
        self._told_of_hosts = ""  # what was said last of files that cannot be read, so that each try need not say it
        self._told_of_resolv: list[str] = []
        self._own_servers: set[Server] = set()
        self._refresh_due = False
        self._loading = asyncio.Lock()
        self._watches: list[Watch] = []
        self._changes: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._log_timer: asyncio.TimerHandle | None = None
        self._serving = False
        tell = self._query_log.tell if self._query_log else None
        self._listening = Listening(settings)
        who = self.admits, self._listening.serves
        self._udp = UdpThread(self._responder, self.metrics, *who, self._hand_over.put, tell)
        self._tcp = TcpServer(self._responder, self.metrics, *who, self._ask_over_tcp, tell)
        try:
            self._listening.open(self._locals)
        except BaseException:
            self.close()
            raise

    @property
    def collector(self) -> DnsCollector:
        """For a registry of prometheus_client."""
        return DnsCollector(self.metrics, self._cache, lambda: len(self._forwarder))

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
        self._hand_over.start()
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
        self._flush_log()
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
        for timer in (self._retry, self._log_timer):
            if timer:
                timer.cancel()
        if self._changes:
            self._loop.remove_reader(self._changes)
            self._changes.close()
        for watch in self._watches:
            await watch.stop()
        await self._forwarder.drain(DRAIN_SECONDS)
        await self._tcp.stop(DRAIN_SECONDS)
        await self._forwarder.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._udp.stop)
        self._listening.close()
        LIMITED.flush(everything=True)

    def _flush_log(self) -> None:
        LIMITED.flush()
        self._log_timer = self._loop.call_later(LOG_SECONDS, self._flush_log)

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
            LIMITED.write(log, logging.WARNING, "dns: cannot read this host's addresses: %s", error.strerror)
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
        LIMITED.write(
            log,
            logging.WARNING,
            "dns: ignoring query from non-local network %s; --listen-address or --interface serves everybody there",
            unpack_address(peer),
        )
        return False

    # ---- questions for others ----

    def _take(self, pending: Pending) -> None:
        query = pending.forward.query
        origin = pending.name, query.id
        self._forwarder.ask(
            Ask(
                pending.forward,
                pending.peer,
                origin,
                peer=lambda: peer_of(pending.name),
                deliver=lambda reply: self._send(pending, reply),
                must_answer=False,
            )
        )

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            LIMITED.write(log, logging.ERROR, "dns: internal error: %s", error, error=error)

    def _send(self, pending: Pending, reply: Reply) -> None:
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
        future: asyncio.Future[Reply] = self._loop.create_future()

        def deliver(reply: Reply) -> None:
            if not future.done():
                future.set_result(reply)

        client = pack_address(address.partition("%")[0])
        ask = Ask(forward, client, future, lambda: (address, port), deliver, must_answer=True)
        self._forwarder.ask(ask)
        try:
            reply = await future
        except asyncio.CancelledError:
            self._forwarder.give_up(ask)
            raise
        self.metrics.duration["forward"].observe(time.monotonic() - begun)
        return reply


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
