"""What a change of a resolv file does to the cache."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from virtual_time import run

from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import Entry
from udpwatch.dns.reload import RouteReloader
from udpwatch.dns.responder import Responder
from udpwatch.dns.settings import Server, Settings
from udpwatch.dns.zone import build


@pytest.mark.parametrize("clear", [False, True])
def test_clear_on_reload(clear: bool, tmp_path: Path) -> None:
    """As in dnsmasq: whenever the file is read again, also when its servers are the same."""
    file = tmp_path / "resolv.conf"
    settings = Settings(hosts=False, resolv_files=(file,), clear_on_reload=clear)
    responder = Responder(settings, build(settings, pytest.fail), Cache(10, 0))
    invalidated: list[int] = []
    forgotten: list[int] = []

    async def scene() -> None:
        routes = RouteReloader(
            settings, responder, lambda: forgotten.append(1), lambda _: False, lambda: invalidated.append(1)
        )
        file.write_text("nameserver 192.0.2.1\n")
        routes.read()
        assert responder.routes.default == (Server("192.0.2.1"),)
        assert forgotten == [1], "its servers have changed"
        responder.cache.put((b"\1a\0", 1, 1, 0), Entry(0, b"", (0, 0, 0), array("H"), 0.0, 1e9))
        invalidated.clear()
        assert await routes.on_change()

    run(scene())
    assert len(responder.cache) == (0 if clear else 1)
    assert bool(invalidated) is clear
    assert forgotten == [1], "its servers are the same"
