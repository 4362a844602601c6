"""Run `udpwatch explain PORT` in a namespace, beside servers and clients of the test."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from agents import run_cli

from udpwatch.agent.testing.lab import Lab, Namespace, Process

SERVER, SECOND, SERVER_6 = "10.0.0.1", "10.0.0.3", "fd00::1"
CLIENT, CLIENT_6 = "10.0.0.2", "fd00::2"
SECONDS = 1
PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Told:
    """What the command printed."""

    status: int
    report: dict[str, Any]

    @property
    def kinds(self) -> set[str]:
        """The kinds of what is wrong."""
        return {each["kind"] for each in self.report["statements"] if each["wrong"]}

    def get(self, kind: str) -> dict[str, Any]:
        """Return the only statement of a kind."""
        (found,) = (each for each in self.report["statements"] if each["kind"] == kind)
        return dict(found)


def server_and_client(lab: Lab) -> tuple[Namespace, Namespace]:
    """Return a server's and a client's namespace."""
    return lab.pair("server", [SERVER, SECOND, SERVER_6], "client", [CLIENT, CLIENT_6])


def explain(where: Namespace, port: int, *words: str, seconds: float = SECONDS) -> Told:
    """Run the command in a namespace; what it says must agree with its exit status."""
    done = run_cli(
        *("explain", str(port), "--json", f"--seconds={seconds}", "--connect=/none", *words),
        preexec_fn=where.enter_in_child,
    )
    assert done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == int(report["wrong"])
    return Told(done.returncode, report)


def serve(
    where: Namespace,
    port: int,
    address: str = "0.0.0.0",
    answer: bool = True,
    prepare: Callable[[socket.socket], None] = lambda _: None,
) -> Process:
    """Run a server, which answers or only reads; returns when its socket is bound."""
    ready, told = os.pipe()

    def run() -> None:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        prepare(made)
        made.bind((address, port))
        os.write(told, b"1")
        while True:
            data, peer = made.recvfrom(2048)
            if answer:
                with suppress(OSError):  # a firewall drops it
                    made.sendto(data, peer)

    process = where.spawn("test-server", run)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return process


@contextmanager
def asking(
    where: Namespace,
    address: str,
    port: int,
    source: str = "",
    pause: float = PAUSE_SECONDS,
    packet: bytes = b"question",
) -> Iterator[None]:
    """Ask every few milliseconds, from one socket."""

    def run() -> None:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as made:
            if source:
                made.bind((source, 0))
            made.setblocking(False)
            while True:
                with suppress(OSError):  # the error of an earlier datagram
                    made.sendto(packet, (address, port))
                time.sleep(pause)

    client = where.spawn("test-client", run)
    try:
        yield
    finally:
        client.stop()
