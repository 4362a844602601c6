"""Keeps the zone and the routes up to date with hosts files, resolv.conf and this host's addresses.

A table is replaced whole, by one assignment; then what was remembered of the old one is dropped (``invalidate``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from udpwatch.dns import zone
from udpwatch.dns.errors import HostsError
from udpwatch.dns.interfaces import HostInterfaces
from udpwatch.dns.loop_detection import LoopDetector
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.resolvconf import read_resolv
from udpwatch.dns.responder import Responder
from udpwatch.dns.routes import Routes, build_routes
from udpwatch.dns.servers_file import read_servers
from udpwatch.dns.settings import ETC_HOSTS, Server, Settings

log = logging.getLogger(__name__)


class ZoneReloader:
    """Replaces the responder's zone."""

    def __init__(
        self,
        settings: Settings,
        responder: Responder,
        metrics: Metrics,
        invalidate: Callable[[], None],
        interfaces: HostInterfaces | None = None,
    ) -> None:
        self._settings, self._responder, self._metrics, self._invalidate = settings, responder, metrics, invalidate
        self._interfaces = interfaces
        self._logged_error = ""  # so that retries do not repeat it
        self._loading = asyncio.Lock()

    def files(self) -> list[Path]:
        """Return the files and folders to watch."""
        return [*([ETC_HOSTS] if self._settings.hosts else []), *self._settings.addn_hosts]

    def forget_errors(self) -> None:
        """Log known errors again."""
        self._logged_error = ""

    async def load(self, missing_ok: bool = False) -> bool:
        """Read all hosts files. Return whether all could be read.

        If one cannot be read the old zone stays, except with ``missing_ok``, for the start.
        """
        async with self._loading:
            try:
                table = await asyncio.to_thread(zone.build, self._settings, warn, missing_ok, self._interfaces)
            except HostsError as error:
                self._metrics.hosts_unreadable = error.files
                if str(error) != self._logged_error:
                    self._logged_error = str(error)
                    self._metrics.reload_errors[0] += 1
                    log.error("dns: %s; the previous local names stay in use", error)
                return False
            self._logged_error = ""
            table.delegated = self._responder.zone.delegated
            self._responder.zone = table
            self._invalidate()
            self._metrics.hosts_entries = table.entries
            self._metrics.hosts_unreadable = table.unreadable
            self._metrics.reload_time = time.time()
            self._metrics.reloads[0] += 1
            if not missing_ok:
                log.info("dns: read %d local names", table.entries)
            return not table.unreadable


class RouteReloader:
    """Replaces the responder's routes."""

    def __init__(
        self,
        settings: Settings,
        responder: Responder,
        forget_servers: Callable[[], None],
        is_own: Callable[[Server], bool],
        invalidate: Callable[[], None],
        loops: LoopDetector | None = None,
    ) -> None:
        """``forget_servers`` is called after a change. ``is_own``: whether querying this server would mean querying
        ourselves; it depends on our addresses. ``loops`` tests the default servers."""
        self._settings, self._responder, self._forget_servers = settings, responder, forget_servers
        self._is_own, self._invalidate, self._loops = is_own, invalidate, loops
        self._from_resolv: tuple[Server, ...] = ()
        self._own: set[Server] = set()
        self._given = settings  # without the servers file
        self._logged: list[str] = []  # problems of resolv files
        self._logged_servers: list[str] = []  # problems of the servers file

    def forget_errors(self) -> None:
        """Log known errors again."""
        self._logged.clear()
        self._logged_servers.clear()

    async def read_servers_file(self) -> bool:
        """Read `--servers-file`. Return whether it could be read; if not, the old servers stay."""
        path, problems = self._given.servers_file, list[str]()
        if path is None:
            return True
        try:
            servers, domains = await asyncio.to_thread(read_servers, path, self._given, problems.append)
        except OSError as error:
            problems.append(f"cannot read {path}: {error.strerror or error}; its servers stay as they are")
            self._log_new(self._logged_servers, problems)
            return False
        self._log_new(self._logged_servers, problems)
        if (servers, domains) != (self._settings.servers, self._settings.domain_servers):
            self._settings = replace(self._settings, servers=servers, domain_servers=domains)
            self._responder.zone.delegated = frozenset(each.domain for each in domains)
            self._responder.cache.clear()  # as dnsmasq, which reads the file with SIGHUP only
            self._invalidate()
            log.info("dns: read %s: servers of %d domains", path, len(domains))
            self.apply()
        return True

    async def on_change(self) -> bool:
        """Read the files again; for `Watch`."""
        complete = self.read()
        if self._settings.clear_on_reload:
            self._responder.cache.clear()
            self._invalidate()
        return complete

    def read(self) -> bool:
        """Read resolv.conf. Return whether all files could be read; if none could, the old servers stay."""
        settings, problems, complete = self._settings, list[str](), True
        if settings.resolv:
            servers, complete = read_resolv(settings.resolv_files, problems.append)
            if servers is not None:
                self._from_resolv = servers
            elif self._from_resolv:
                problems.append("no resolv file can be read; the upstream servers stay as they are")
        self._log_new(self._logged, problems)
        self.apply()
        return complete

    def _log_new(self, logged: list[str], problems: list[str]) -> None:
        """Log problems, unless they are those that were logged last time."""
        if problems != logged:
            logged[:] = problems
            for text in problems:
                warn(text)

    def apply(self) -> None:
        """Put new routes in place if the servers or this host's addresses have changed them."""
        routes = build_routes(self._settings, self._from_resolv, self._without_own)
        if self._loops:
            routes = Routes(self._loops.usable(routes.default), routes.domains)
        before = self._responder.routes
        if (before.default, before.domains) == (routes.default, routes.domains):
            return
        self._responder.routes = routes
        self._forget_servers()
        self._invalidate()
        if before.default != routes.default:
            log.info("dns: upstream servers: %s", ", ".join(map(str, routes.default)) or "none")

    def _without_own(self, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        own = {server for server in servers if self._is_own(server)}
        for server in own - self._own:
            log.warning("dns: ignoring nameserver %s: it is this responder itself", server)
        self._own = (self._own - set(servers)) | own
        return tuple(server for server in servers if server not in own)


def warn(text: str) -> None:
    """Log a warning."""
    log.warning("dns: %s", text)
