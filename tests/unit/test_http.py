"""The HTTP view by itself; what it does under slow clients is in integration/test_agent.py."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request

import pytest

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.views.http import HttpView


def test_stopped_before_it_began() -> None:
    """The agent closes what it opened, also when it never came to start it: that must not wait for ever."""
    view = HttpView("127.0.0.1", 0)
    stopping = threading.Thread(target=view.stop, daemon=True)
    stopping.start()
    stopping.join(5)
    assert not stopping.is_alive()


def test_pages_over_ipv6() -> None:
    view = HttpView("::1", 0)
    view.start(lambda: b"metrics", lambda: (True, "well"), lambda: (False, "not yet"))
    try:
        assert view.url.startswith("http://[::1]:")
        with urllib.request.urlopen(view.url + "/metrics", timeout=5) as answer:
            assert answer.read() == b"metrics"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(view.url + "/readyz", timeout=5)
        with refused.value as answer:
            assert (answer.code, answer.read()) == (503, b"not yet\n")
    finally:
        view.stop()


def test_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UdpwatchError, match="in use"):
            HttpView("127.0.0.1", other.getsockname()[1])
