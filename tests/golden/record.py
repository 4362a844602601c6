"""Makes tests/golden/replay.jsonl: events of a real agent about real servers, in the lab and in cgroups and log folders
with names as kubelet's. `make screens` uses it.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agents import Agent
from waiting import wait_for

from udpwatch.agent.kernel import cgroup
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30.0
#: process, port, seconds between questions, IP version, namespace, pod, container
SERVERS = (
    ("openvpn", 1194, 0.2, 4, "edge", "vpn-6d5f9-x2v8q", "server"),
    ("unbound", 53, 0.3, 4, "dns", "resolver-hxk4t", "unbound"),
    ("snmpd", 161, 1.0, 4, "", "", ""),
    ("iperf3", 5201, 0.5, 4, "perf", "iperf-0", "iperf3"),
    ("radiusd", 1812, 1.5, 6, "auth", "radius-7c6b-9wqzl", "freeradius"),
)


def main() -> int:
    """Record; needs root."""
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        logs = folder / "containers"
        logs.mkdir()
        top = Path(opened.enter_context(closing(cgroup.find(None))).path, f"kubepods-udpwatch-{os.getpid()}")
        mount = f'mount --bind {folder} /var/log\nexec "$@"'
        agent = opened.enter_context(
            Agent(folder, "--node=node-1", wrapper=("unshare", "--mount", "sh", "-e", "-c", mount, "sh"))
        )
        groups = [top]
        opened.callback(lambda: [wait_for(lambda each=each: _removed(each), "its end") for each in reversed(groups)])
        lab = opened.enter_context(ContainerHost())
        top.mkdir()
        clients = []
        for name, port, every, version, namespace, pod, container in SERVERS:
            place = None
            if pod:
                ident = random.randbytes(32).hex()  # noqa: S311
                (logs / f"{pod}_{namespace}_{container}-{ident}.log").touch()
                place = top / f"cri-containerd-{ident}.scope"
                place.mkdir()
                groups.append(place)
            family = socket.AF_INET6 if version == 6 else socket.AF_INET
            server = lab.node.socket(family)
            server.bind(("::" if version == 6 else "0.0.0.0", port))

            def serve(server: socket.socket = server, place: Path | None = place) -> None:
                if place:
                    (place / "cgroup.procs").write_text(str(os.getpid()))
                servers.plain(server)

            lab.node.spawn(name, serve)
            asked = lab.ETH0_6 if version == 6 else lab.ETH0
            clients.append((lab.container.socket(family), (asked, port), every))
        _ask(clients)
        ports = {port for _, port, *_ in SERVERS}
        lines = [line for line in agent.events_file.read_text().splitlines() if json.loads(line)["port"] in ports]
    (ROOT / "tests/golden/replay.jsonl").write_text("\n".join(lines) + "\n")
    return 0


def _ask(clients: list[tuple[socket.socket, tuple[str, int], float]]) -> None:
    begun, due = time.monotonic(), [0.5] * len(clients)
    while (now := time.monotonic() - begun) < SECONDS:
        for number, (client, where, every) in enumerate(clients):
            if now >= due[number]:
                client.sendto(b"x", where)
                due[number] = now + every * random.uniform(0.7, 1.3)  # noqa: S311
        time.sleep(0.02)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
