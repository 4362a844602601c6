"""A real dnsmasq in a namespace, to compare with."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from dns_server import ask, needs
from waiting import wait_for

from udpwatch.agent.testing.lab import Namespace


@contextlib.contextmanager
def dnsmasq(node: Namespace, *options: str, ready: str = "ready.example") -> Iterator[subprocess.Popen[bytes]]:
    """dnsmasq in a namespace, once it responds. It reads files as its own user."""
    needs("dnsmasq", "dnsmasq-base")
    words = ["--keep-in-foreground", "--no-hosts", "--no-resolv", "--conf-file=/dev/null", "--pid-file", *options]
    process = node.popen(["env", "LC_ALL=C.UTF-8", "dnsmasq", *words])
    try:
        wait_for(lambda: process.poll() is not None or _answers(node, ready), "dnsmasq")
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def _answers(node: Namespace, name: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(node, "127.0.0.1", name))
    return False
