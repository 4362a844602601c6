"""One running responder: its parts, how they are connected, and the order in which they start and stop.

Two threads: the packet loop's for UDP, to clients and upstream servers; the event loop's for TCP, files and addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
from collections.abc import Callable

from udpwatch.dns import addresses, edns, listen
from udpwatch.dns.address_monitor import AddressMonitor
from udpwatch.dns.addresses import Local
from udpwatch.dns.admission import Admission
from udpwatch.dns.budget import FORWARD_SHARE, TCP_SHARE, Budget
from udpwatch.dns.cache import Cache
from udpwatch.dns.edns import ClientOptions
from udpwatch.dns.failover import DELAYS, Failover, doubling
from udpwatch.dns.forwarder import Forwarder
from udpwatch.dns.interfaces import HostInterfaces
from udpwatch.dns.limited_log import LIMITED
from udpwatch.dns.listen import Listening
from udpwatch.dns.loop_detection import LoopDetector
from udpwatch.dns.metrics import DnsCollector, Metrics
from udpwatch.dns.neighbours import Neighbours
from udpwatch.dns.pacing import PacedQueue
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.reload import RouteReloader, ZoneReloader
from udpwatch.dns.responder import Responder
from udpwatch.dns.settings import Settings
from udpwatch.dns.statistics import Statistics
from udpwatch.dns.tcp import TcpServer
from udpwatch.dns.transport import SocketTransport
from udpwatch.dns.udp import UdpServer
from udpwatch.dns.upstream import UpstreamClient
from udpwatch.dns.upstream_socket import MAX_SOCKETS
from udpwatch.dns.upstream_tcp import MAX_TCP_ANSWERS, TcpClient
from udpwatch.dns.watch import Watch
from udpwatch.dns.zone import Zone

DRAIN_SECONDS = 5.0
LOG_SECONDS = 10.0  # between two checks for log lines that were left out
OTHER_FILES = 64  # open files that are no connections

log = logging.getLogger(__name__)


class Service:
    """A responder; call `start`, then `stop`."""

    def __init__(self, settings: Settings, version: str, cpus: Callable[[], float] = lambda: math.inf) -> None:
        """Bind the sockets. Raises DnsError, and then leaves nothing behind. ``cpus``: how many CPUs may be used."""
        self._settings = settings
        if settings.log_debug:
            logging.getLogger("udpwatch.dns").setLevel(logging.DEBUG)
        others = settings.max_tcp_connections + MAX_TCP_ANSWERS + OTHER_FILES
        files = _raise_descriptor_limit(others + MAX_SOCKETS)
        self._max_sockets = min(MAX_SOCKETS, max(files - others, files // 4))
        self.metrics = Metrics()
        self._cache = Cache(0 if edns.depend_on_client(settings) else settings.cache_size, settings.stale_seconds)
        self._statistics = Statistics(self.metrics, self._cache)
        self._responder = Responder(settings, Zone(settings), self._cache)
        self._responder.version = f"udpwatch-{version}"
        self._responder.server_statistics = self._statistics.servers
        self._responder.totals = self._statistics.totals
        query_log = QueryLog(settings.log_extra) if settings.log_queries else None
        log_query = query_log.log_query if query_log else None
        self._admission = Admission(settings)
        self._listening = Listening(settings, self._admission)
        self._packets = PacketLoop()
        self._neighbours = Neighbours()
        self._make_forwarder(cpus, query_log)
        common = self._responder, self.metrics, self._admission
        queue = PacedQueue(self._packets, self.metrics, self._forwarder.submit, Budget(cpus, FORWARD_SHARE))
        self._udp = UdpServer(self._packets, *common, queue.put, log_query)
        post, forwarder = self._packets.post, self._forwarder
        self._tcp = TcpServer(
            *common,
            lambda query: post(lambda: forwarder.submit(query)),
            lambda query: post(lambda: forwarder.cancel(query)),
            log_query,
            self._tcp_budget,
            settings.max_tcp_connections,
        )
        for at_end in (forwarder.stop, self._udp.close, self._upstream.close):
            self._packets.at_end(at_end)
        self._interfaces = HostInterfaces(settings)
        self._zone = ZoneReloader(settings, self._responder, self.metrics, self._udp.invalidate, self._interfaces)
        self._routes = RouteReloader(
            settings,
            self._responder,
            lambda: self._packets.post(self._failover.forget_servers),
            lambda server: self._listening.is_own(server, self._locals),
            self._udp.invalidate,
            self._loops,
        )
        self._addresses = AddressMonitor(self._on_addresses)
        self._watches: list[Watch] = []
        self._log_timer: asyncio.TimerHandle | None = None
        self._serving = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        try:
            self._use_addresses(addresses.snapshot())
            self._listening.open(self._locals)
        except BaseException:
            self.close()
            raise

    def _make_forwarder(self, cpus: Callable[[], float], query_log: QueryLog | None) -> None:
        settings, packets = self._settings, self._packets
        self._tcp_budget = Budget(cpus, TCP_SHARE)
        transport = SocketTransport(packets)
        self._upstream_tcp = TcpClient(transport, self._tcp_budget)
        self._upstream = UpstreamClient(
            packets,
            self.metrics,
            transport,
            self._upstream_tcp,
            self._responder.direct_entry,
            proxy_dnssec=settings.proxy_dnssec,
            ignored=settings.ignored_addresses,
            ports=settings.ports,
            mixes_case=settings.mixes_case,
            only_tcp=settings.upstream_tcp,
            max_sockets=self._max_sockets,
        )
        self._loops = LoopDetector(packets, transport, self._on_loop) if settings.loop_detect else None
        if self._loops:
            self._responder.is_loop_test = self._loops.is_test
            packets.at_end(self._loops.close)
        retry = settings.retry_milliseconds
        self._failover = Failover(
            packets,
            self._upstream,
            self.metrics,
            settings.strict_order,
            settings.all_servers,
            doubling(retry[0] / 1e3, retry[1] / 1e3) if retry else DELAYS,
        )
        self._forwarder = Forwarder(
            packets,
            settings,
            self._responder,
            self._cache,
            self._failover,
            self.metrics,
            query_log,
            ClientOptions(settings, self._neighbours.address_of) if edns.are_added(settings) else None,
        )

    @property
    def collector(self) -> DnsCollector:
        """For a registry of prometheus_client."""
        return DnsCollector(self.metrics, self._cache, lambda: len(self._forwarder))

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._listening.port

    @property
    def ready(self) -> bool:
        """Whether the tables are loaded and queries are answered."""
        return self._serving and self._packets.is_alive()

    def warnings(self) -> list[str]:
        """Return what is configured and does not listen (yet)."""
        return listen.warnings(self._settings, self._locals) + self._listening.unbound

    def statistics(self) -> list[str]:
        """Return log lines in dnsmasq's words (SIGUSR1)."""
        return self._statistics.lines()

    # ---- life cycle ----

    async def start(self) -> None:
        """Load the tables, then serve. A missing file does not stop it from serving the rest."""
        self._event_loop = asyncio.get_running_loop()
        self._upstream_tcp.start()
        self._addresses.open()
        if self._settings.mac_formats:
            self._neighbours.start()
        hosts, resolv = Watch(self._zone.files, self._zone.load), None
        servers: Watch | None = None
        if self._settings.resolv and self._settings.poll:
            resolv = Watch(lambda: list(self._settings.resolv_files), self._routes.on_change)
        if (servers_file := self._settings.servers_file) is not None:
            servers = Watch(lambda: [servers_file], self._routes.read_servers_file)
        self._watches = [each for each in (hosts, resolv, servers) if each]
        hosts_read, resolv_read = await self._zone.load(missing_ok=True), self._routes.read()
        servers_read = await self._routes.read_servers_file()
        self._listening.serve(self._udp, self._tcp)
        self._packets.start()
        self._addresses.start()
        hosts.start(hosts_read)
        if servers:
            servers.start(servers_read)
        if resolv:
            resolv.start(resolv_read)
        self._flush_log()
        self._serving = True
        if edns.depend_on_client(self._settings):
            log.info("dns: no upstream response is cached, because queries have options that depend on the client")
        where = ", ".join(self._listening.addresses) or "no address yet"
        log.info("dns: listening on %s, port %d; %d local names", where, self.port, self.metrics.hosts_entries)

    async def reload(self) -> None:
        """SIGHUP: clear the cache, read the hosts files, and resolv.conf if it is not watched."""
        self._cache.clear()
        self._zone.forget_errors()  # an operator is looking
        self._routes.forget_errors()
        await self._zone.load()
        await self._routes.read_servers_file()
        if not self._settings.poll:
            self._routes.read()
        self._udp.invalidate()

    def close(self) -> None:
        """Close the sockets of a responder that was never started."""
        self._packets.stop()
        self._listening.close()

    async def stop(self) -> None:
        """Answer the queries in progress, then close everything; also if `start` failed or was never called."""
        self._serving = False
        if self._log_timer:
            self._log_timer.cancel()
        self._addresses.stop()
        self._neighbours.stop()
        for watch in self._watches:
            await watch.stop()
        await self._forwarder.drain(DRAIN_SECONDS)
        await self._tcp.stop(DRAIN_SECONDS)
        await self._upstream_tcp.stop()
        await asyncio.to_thread(self._packets.stop)
        self._listening.close()
        LIMITED.flush(everything=True)

    # ---- changes ----

    def _use_addresses(self, locals_: list[Local]) -> None:
        self._locals = locals_
        self._admission.update(locals_)
        if self._interfaces.update(locals_):
            self._udp.invalidate()

    def _on_addresses(self, locals_: list[Local]) -> bool:
        """Follow a change of addresses. Return whether all that should be bound is bound."""
        self._use_addresses(locals_)
        complete = self._listening.update(locals_)
        self._udp.readmit()
        self._routes.apply()
        return complete

    def _on_loop(self) -> None:
        """Stop using a server; called in the thread that has found a forwarding loop."""
        if self._event_loop:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._event_loop.call_soon_threadsafe(self._routes.apply)

    def _flush_log(self) -> None:
        LIMITED.flush()
        self._log_timer = asyncio.get_running_loop().call_later(LOG_SECONDS, self._flush_log)


def _raise_descriptor_limit(wanted: int) -> int:
    """Raise the limit on open files by what may be needed, as far as allowed. Return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted += soft
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
