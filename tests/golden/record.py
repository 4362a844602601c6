"""Makes tests/golden/replay.jsonl and servers.jsonl: events and servers of a real agent, in the lab and in cgroups and
log folders with names as kubelet's. `make screens` uses them.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agents import Agent
from scene_agent import InNamespace
from waiting import wait_for

from udpwatch.agent.kernel import cgroup
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost

ROOT = Path(__file__).resolve().parents[2]
Serve = Callable[[socket.socket], None]
SECONDS = 30.0
SNAPSHOTS = 12  # the last ones of servers, a second apart
#: process, port, seconds between questions, IP version, namespace, pod, container: they reply from the wrong address
WRONG = (
    ("openvpn", 1194, 0.2, 4, "edge", "vpn-6d5f9-x2v8q", "server"),
    ("unbound", 53, 0.3, 4, "dns", "resolver-hxk4t", "unbound"),
    ("snmpd", 161, 1.0, 4, "", "", ""),
    ("iperf3", 5201, 0.5, 4, "perf", "iperf-0", "iperf3"),
    ("radiusd", 1812, 1.5, 6, "auth", "radius-7c6b-9wqzl", "freeradius"),
)

#: the same: they reply with PKTINFO
RIGHT = (
    ("named", 5353, 0.02, 4, "dns", "authority-0", "bind9"),
    ("chronyd", 123, 0.4, 4, "", "", ""),
    ("dnsmasq", 5300, 0.05, 6, "", "", ""),
)
#: the same: they are asked at the bridge's address only, so that routing has replied rightly so far
AT_RISK = (
    ("turnserver", 3478, 0.1, 4, "voice", "turn-7f9c5-b2m4x", "coturn"),
    ("memcached", 11211, 0.2, 4, "", "", ""),
)
SERVERS = (*WRONG, *RIGHT, *AT_RISK)


def main() -> int:
    """Record; needs root."""
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        logs = folder / "containers"
        logs.mkdir()
        top = Path(opened.enter_context(closing(cgroup.find(None))).path, f"kubepods-udpwatch-{os.getpid()}")
        mount = f'mount --bind {folder} /var/log\nexec "$@"'
        groups = [top]
        opened.callback(lambda: [wait_for(lambda each=each: _removed(each), "its end") for each in reversed(groups)])
        lab = opened.enter_context(ContainerHost())
        wrapper = ("unshare", "--mount", "sh", "-e", "-c", mount, "sh")
        flags = ("--no-dns", "--node=node-1")
        agent = opened.enter_context(InNamespace(lab, folder, *flags, wrapper=wrapper))
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
            serves = servers.plain
            if port in {each[1] for each in RIGHT}:
                servers.enable_pktinfo(server)
                if version == 6:
                    server.setsockopt(socket.IPPROTO_IP, servers.IP_PKTINFO, 1)
                serves = servers.with_pktinfo
            server.bind(("::" if version == 6 else "0.0.0.0", port))

            def serve(server: socket.socket = server, place: Path | None = place, serves: Serve = serves) -> None:
                if place:
                    (place / "cgroup.procs").write_text(str(os.getpid()))
                serves(server)

            lab.node.spawn(name, serve)
            asked = lab.ETH0_6 if version == 6 else lab.DOCKER0 if port in {each[1] for each in AT_RISK} else lab.ETH0
            clients.append((lab.container.socket(family), (asked, port), every))
        ports = {port for _, port, *_ in SERVERS}
        snapshots: deque[str] = deque(maxlen=SNAPSHOTS)
        _ask(clients, lambda: snapshots.append(_snapshot(agent, ports)))
        lines = [line for line in agent.events_file.read_text().splitlines() if json.loads(line)["port"] in ports]
    (ROOT / "tests/golden/servers.jsonl").write_text("\n".join(snapshots) + "\n")
    (ROOT / "tests/golden/replay.jsonl").write_text("\n".join(lines) + "\n")
    return 0


def _snapshot(agent: Agent, ports: set[int]) -> str:
    """Return the agent's snapshot as JSON, without what is not about these servers."""
    told = agent.snapshot() | {"probes": [], "notes": [], "kernel": os.uname().release.partition("-")[0]}
    for name in ("servers", "rows"):
        told[name] = [each for each in told[name] if each["port"] in ports]
        for each in told[name]:
            each["sender"] |= {"command": "", "executable": ""}
    return json.dumps(told)


def _ask(clients: list[tuple[socket.socket, tuple[str, int], float]], every_second: Callable[[], None]) -> None:
    begun, due, next_second = time.monotonic(), [0.5] * len(clients), 0.0
    while (now := time.monotonic() - begun) < SECONDS:
        for number, (client, where, every) in enumerate(clients):
            if now >= due[number]:
                client.sendto(b"x", where)
                due[number] = now + every * random.uniform(0.7, 1.3)  # noqa: S311
        if now >= next_second:
            every_second()
            next_second = now + 1
        time.sleep(0.005)


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
