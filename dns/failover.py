"""Query a group of servers: the preferred one first, then the others, until one has responded.

The next server is queried when the one before has failed or has been silent for STAGGER_SECONDS; a late response still
counts. Servers that have timed out repeatedly come last for a while. With `--strict-order` the order is always that of
the settings; with `--all-servers` all are queried at the same time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from udpwatch.dns.cache_entry import Key
from udpwatch.dns.message import Rcode, Response
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.settings import Server
from udpwatch.dns.upstream import AttemptFailed, Busy, UpstreamClient

STAGGER_SECONDS = 0.8
TOTAL_SECONDS = 4.5  # below the 5 s after which a stub resolver retries
ROUNDS = 2  # attempts per server at most
MAX_ATTEMPTS = 8
DOWN_AFTER = 2  # timeouts in a row
DOWN_SECONDS = 10.0  # during which such a server is queried last


class ResolutionFailed(Exception):
    """No server gave a response that can be forwarded. ``rcode`` is for the client."""

    def __init__(self, rcode: int = Rcode.SERVFAIL) -> None:
        super().__init__(rcode)
        self.rcode = rcode


@dataclass(slots=True)
class _Health:
    timeouts: int = 0  # in a row
    down_until: float = 0.0  # event loop time


class Failover:
    """Queries groups of servers and remembers which of them respond. Runs in the event loop's thread."""

    def __init__(
        self, client: UpstreamClient, metrics: Metrics, strict_order: bool = False, all_servers: bool = False
    ) -> None:
        self._client, self._metrics = client, metrics
        self._strict_order, self._all_servers = strict_order, all_servers
        self._health: dict[Server, _Health] = {}
        self._last_good: Server | None = None

    def forget_servers(self) -> None:
        """Drop what is known of servers because they have changed."""
        self._health.clear()
        self._last_good = None
        self._client.forget_servers()

    def order(self, servers: tuple[Server, ...]) -> list[Server]:
        """Sort servers: the one that responded last first, silent ones last."""
        if self._strict_order:
            return list(servers)
        now = asyncio.get_running_loop().time()

        def rank(server: Server) -> tuple[bool, bool]:
            health = self._health.get(server)
            return bool(health and health.down_until > now), server != self._last_good

        return sorted(servers, key=rank)

    async def query(self, key: Key, servers: tuple[Server, ...]) -> Response:
        """Return the first usable response. Raises ResolutionFailed within TOTAL_SECONDS."""
        loop = asyncio.get_running_loop()
        end = loop.time() + TOTAL_SECONDS
        ordered = self.order(servers)
        plan = (ordered * ROUNDS)[: max(MAX_ATTEMPTS, len(ordered))]
        running: dict[asyncio.Task[Response], Server] = {}
        rcode, next_ones = int(Rcode.SERVFAIL), len(ordered) if self._all_servers else 1
        try:
            while True:
                left = end - loop.time()
                if left > 0:
                    for server in plan[:next_ones]:
                        running[asyncio.create_task(self._client.query(server, key))] = server
                    del plan[:next_ones]
                    next_ones = 1
                if not running or left <= 0:
                    raise ResolutionFailed(rcode)
                wait = min(left, STAGGER_SECONDS) if plan else left
                await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in [each for each in running if each.done()]:
                    server = running.pop(task)
                    # Not raised again in this frame: that would make a cycle of frame, task and response, which lives
                    # until the garbage collector runs.
                    error = task.exception()
                    if error is None:
                        self._health.pop(server, None)
                        self._last_good = server
                        return task.result()
                    if not isinstance(error, AttemptFailed):
                        raise error
                    self._note_failure(server, error)
                    rcode = Rcode.REFUSED if error.rcode == Rcode.REFUSED else Rcode.SERVFAIL
                    del error
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.gather(*running, return_exceptions=True)

    def _note_failure(self, server: Server, failed: AttemptFailed) -> None:
        self._metrics.upstream_failed[str(server), failed.reason][0] += 1
        health = self._health.setdefault(server, _Health())
        if failed.reason in ("timeout", "network"):
            health.timeouts += 1
            if health.timeouts >= DOWN_AFTER:
                health.down_until = asyncio.get_running_loop().time() + DOWN_SECONDS
        if server == self._last_good and not isinstance(failed, Busy):
            self._last_good = None
