"""`udpwatch dns`: the responder of dns/ as a program of its own, with the agent's HTTP view for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from udpwatch.agent import __version__
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.views.http import HttpView
from udpwatch.agent.views.metrics import exposition
from udpwatch.dns.errors import NetworkError
from udpwatch.dns.service import Service
from udpwatch.dns.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Answer until SIGTERM or SIGINT. SIGHUP reads the tables anew, SIGUSR1 logs statistics. Raises DnsError."""
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.ExitStack() as opened:
        http = _listen(settings.metrics_listen)
        if http:
            opened.callback(http.stop)
        service = Service(settings, __version__)
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = loop.create_task(service.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        def tell() -> None:
            for line in service.statistics():
                log.info("dns: %s", line)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, done.set)
        loop.add_signal_handler(signal.SIGHUP, reload)
        loop.add_signal_handler(signal.SIGUSR1, tell)
        if http:
            http.start(exposition(service.collector, http.collector), lambda: (True, "ok"), lambda: ready(service))
        try:
            await service.start()
            log.info("ready")
            await done.wait()
        finally:
            await service.stop()


def ready(service: Service) -> tuple[bool, str]:
    """For /readyz."""
    return service.ready, "ready" if service.ready else "the tables are being read, or it is stopping"


def _listen(where: str) -> HttpView | None:
    if where == "off":
        return None
    host, _, port = where.rpartition(":")
    try:
        return HttpView(host.strip("[]"), int(port))
    except UdpwatchError as error:
        raise NetworkError(str(error)) from None
