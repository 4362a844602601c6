"""Two hosts: many clients load one of them while a server on it sends wrong replies (load.c)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scene import PATIENCE_SECONDS, V4, Family, ask, bound

from udpwatch.agent.testing.lab import Lab, Namespace

RIGHT_PORT, SINK_PORT = 7001, 7002
TRACKING = {
    "untracked": "",
    "tracked": "ct state established accept",
    "notrack": "ct state established accept",
}


@dataclass(frozen=True)
class Place:
    """A server host with two addresses and a client host, in both families."""

    server: Namespace
    client: Namespace
    load: Path

    @contextmanager
    def flood(self, family: Family, port: int, rate: int, seconds: float) -> Iterator[None]:
        """Send requests from 40 addresses behind the client, each from a new port, during the body; leave when all are
        sent.
        """
        source, to = ("10.9.0.1", ASKED[0][0]) if family is V4 else ("fd00:9::1", ASKED[1][0])
        words = [str(self.load), "flood", source, "40", to, str(port), str(rate), str(seconds)]
        with self.client.popen(words) as process:
            yield
            sent, _ = process.communicate()
        assert process.returncode == 0
        assert int(sent) > 0

    @contextmanager
    def right_server(self, family: Family) -> Iterator[None]:
        with self.server.popen([str(self.load), "answer", str(family.number), str(RIGHT_PORT)]) as process:
            try:
                yield
            finally:
                process.kill()


ASKED = (("10.1.0.1", "10.1.0.2"), ("fd00:1::1", "fd00:1::2"))  # the first is what routing answers from


def compile_load(folder: Path) -> Path:
    """Compile load.c into a folder."""
    binary = folder / "load"
    subprocess.run(["gcc", "-O2", "-o", binary, Path(__file__).with_name("load.c")], check=True)
    return binary


def make_place(lab: Lab, load: Path, tracking: str) -> Place:
    """Build the hosts; ``tracking`` is a key of TRACKING."""
    server, client = lab.pair("server", [*ASKED[0], *ASKED[1]], "client", ["10.1.0.9", "fd00:1::9"])
    # Of two IPv6 addresses the kernel prefers the newer; one that is deprecated comes last.
    server.ip(f"addr change {ASKED[1][1]}/64 dev eth0 preferred_lft 0")
    server.ip("route add 10.9.0.0/24 via 10.1.0.9", "route add fd00:9::/64 via fd00:1::9")
    if TRACKING[tracking]:
        # The flood itself is not tracked: what fills conntrack's table is another matter.
        everything = "meta l4proto udp notrack" if tracking == "notrack" else ""
        server.nft(
            f"""table inet busy {{
              chain a {{ type filter hook prerouting priority raw;
                udp dport {{ {RIGHT_PORT}, {SINK_PORT} }} notrack; {everything}; }};
              chain b {{ type filter hook output priority raw;
                udp sport {{ {RIGHT_PORT}, {SINK_PORT} }} notrack; {everything}; }};
              chain c {{ type filter hook input priority filter; {TRACKING[tracking]}; }}; }}"""
        )
    return Place(server, client, load)


def answer_wrongly(place: Place, family: Family, port: int, rate: int, seconds: float) -> int:
    """Run a plain server, and ask it from a new port each time at the address that routing does not choose; returns the
    number of wrong replies.
    """
    index = 0 if family is V4 else 1
    sent = 0
    with bound(place.server, family.inet, family.wildcard, port) as server:
        server.settimeout(PATIENCE_SECONDS)
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            if sent > elapsed * rate:
                time.sleep(0.5 / rate)
                continue
            with place.client.socket(family.inet) as client:
                server.sendto(*ask(client, ASKED[index][1], port, server))
                sent += 1
    return sent
