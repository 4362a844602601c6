"""`make bench`, the DNS responder's part: server CPU a query and rate, beside dnsmasq's and unbound's in the same run.

dnsperf asks from one CPU, the server has the other. Rates are what this pair comes to; CPU a query is the server's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agents import COMMAND
from dns_bombs import BOMBS
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace
from udpwatch.dns.cache_entry import entry_of
from udpwatch.dns.cname import CnameLoop, follow
from udpwatch.dns.message import Malformed, parse_response
from udpwatch.dns.policy import rebinds
from udpwatch.dns.settings import Settings

NAMES = 1_000
ROUNDS = 5
SECONDS = 3
PORT, UPSTREAM_PORT = 5300, 5353
OUTSTANDING = 100
SERVER_CPU, CLIENT_CPU = "0", str(min(1, (os.cpu_count() or 1) - 1))
CHECKED = Settings(stop_dns_rebind=True)
FRESH, FORWARD_ROUNDS = 10_000, 3
LATENCY_SECONDS = 0.005
SUPPORT = Path(__file__).resolve().parents[1] / "support"


def line(what: str, figure: str, reach: str = "") -> None:
    print(f"  {what:<52} {figure:>24}  {reach}", flush=True)


def hosts_servers(folder: Path) -> dict[str, Sequence[str]]:
    """Return the servers that have NAMES names in a file."""
    records = "\n".join(f'  local-data: "{name(n)} 3600 IN A {address(n)}"' for n in range(NAMES))
    return {
        "udpwatch": [*COMMAND, "dns", "--no-resolv", *hosts(folder), *OURS],
        "dnsmasq": ["dnsmasq", "--no-resolv", *hosts(folder), *dnsmasq(folder)],
        "unbound": unbound(folder, f"server:\n  local-zone: example. transparent\n{records}\n"),
    }


def cache_servers(folder: Path) -> dict[str, Sequence[str]]:
    """Return the servers that forward and cache."""
    upstream = ["--no-resolv", "--no-hosts", f"--server=127.0.0.1#{UPSTREAM_PORT}", f"--cache-size={2 * NAMES}"]
    forward = f"forward-zone:\n  name: .\n  forward-addr: 127.0.0.1@{UPSTREAM_PORT}\n"
    return {
        "udpwatch": [*COMMAND, "dns", *upstream, *OURS],
        "dnsmasq": ["dnsmasq", *upstream, *dnsmasq(folder)],
        "unbound": unbound(folder, f"server:\n  do-not-query-localhost: no\n{forward}"),
    }


OURS = (f"--port={PORT}", "--listen-address=127.0.0.1", "--metrics-listen=off", "--user=root")


def dnsmasq(folder: Path, port: int = PORT) -> list[str]:
    where = ["--keep-in-foreground", "--conf-file=/dev/null", f"--pid-file={folder}/pid-{port}", "--user=root"]
    return [*where, f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces"]


def unbound(folder: Path, more: str) -> list[str]:
    path = folder / "unbound.conf"
    path.write_text(
        f'server:\n  interface: 127.0.0.1@{PORT}\n  chroot: ""\n  username: ""\n  pidfile: ""\n'
        f'  directory: "{folder}"\n'
        f"  num-threads: 1\n  use-syslog: no\n  verbosity: 0\n  module-config: iterator\nremote-control:\n"
        f"  control-enable: no\n{more}"
    )
    return ["unbound", "-d", "-c", str(path)]


def hosts(folder: Path) -> list[str]:
    return ["--no-hosts", f"--addn-hosts={folder}/hosts"]


def name(number: int) -> str:
    return f"name{number}.example"


def address(number: int) -> str:
    return f"10.0.{number // 250}.{number % 250 + 1}"


@contextlib.contextmanager
def running(place: Namespace, words: Sequence[str], folder: Path, port: int = PORT) -> Iterator[int]:
    """Run a server; yields its process id once it responds. An upstream server shares the client's CPU."""
    process = subprocess.Popen(
        ["taskset", "-c", SERVER_CPU if port == PORT else CLIENT_CPU, *words],
        preexec_fn=place.enter_in_child,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    probe = ["dig", "+short", "+tries=1", "+time=1", "@127.0.0.1", "-p", str(port), name(0), "A"]
    try:
        wait_for(lambda: "10." in place.run(["sh", "-c", f"{' '.join(probe)} || true"]), f"{words[0]} to answer", 20)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of the process and all its threads (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def ask(place: Namespace, folder: Path, pid: int) -> tuple[float, float]:
    """Return microseconds of the server's CPU for each query, and queries each second."""
    before = cpu_seconds(pid)
    words = ["dnsperf", "-s", "127.0.0.1", "-p", str(PORT), "-d", str(folder / "queries"), "-l", str(SECONDS)]
    said = place.run(["taskset", "-c", CLIENT_CPU, *words, "-c", "4", "-T", "1", "-q", str(OUTSTANDING)])
    completed = int(re.search(r"Queries completed:\s+(\d+)", said).group(1))  # type: ignore[union-attr]
    rate = float(re.search(r"Queries per second:\s+([\d.]+)", said).group(1))  # type: ignore[union-attr]
    return (cpu_seconds(pid) - before) / completed * 1e6, rate


def compare(what: str, place: Namespace, folder: Path, servers: dict[str, Sequence[str]]) -> None:
    print(f"dns, {what}: us of server CPU a query; queries a second (median of {ROUNDS}, alternating)")
    figures: dict[str, list[tuple[float, float]]] = {server: [] for server in servers}
    for _ in range(ROUNDS):
        for server, words in servers.items():
            with running(place, words, folder) as pid:
                place.run(["dnsperf", "-s", "127.0.0.1", "-p", str(PORT), "-d", str(folder / "queries"), "-n", "3"])
                figures[server].append(ask(place, folder, pid))
    for server, found in figures.items():
        cpu, rate = (statistics.median(column) for column in zip(*found, strict=True))
        line(server, f"{cpu:.2f} us   {rate:,.0f}/s", "at or below dnsmasq's" if server == "udpwatch" else "")


def forwarding(what: str, place: Namespace, folder: Path, servers: dict[str, Sequence[str]], mix: bool = False) -> None:
    """Measure names that nobody has asked for before: each query goes to the upstream server. ``mix``: 85 % of the
    queries are for names in the cache."""
    print(f"dns, {what}: us of server CPU a query; queries a second; latency in ms (median of {FORWARD_ROUNDS})")
    fresh = [f"host{number}.wild.example A\n" for number in range(FRESH)]
    if mix:
        cached = [f"{name(number % NAMES)} A\n" for number in range(FRESH * 85 // 15)]
        fresh = [query for n, one in enumerate(fresh) for query in (one, *cached[n * 85 // 15 : (n + 1) * 85 // 15])]
    (folder / "fresh").write_text("".join(fresh))
    figures: dict[str, list[Sequence[float]]] = {server: [] for server in servers}
    for _ in range(FORWARD_ROUNDS):
        for server, words in servers.items():
            with running(place, words, folder) as pid:
                if mix:
                    place.run(["dnsperf", "-s", "127.0.0.1", "-p", str(PORT), "-d", str(folder / "queries"), "-n", "3"])
                figures[server].append(ask_once(place, folder, pid, len(fresh)))
    for server, found in figures.items():
        cpu, rate, *latencies = (statistics.median(column) for column in zip(*found, strict=True))
        shown = " / ".join(f"{milliseconds:.1f}" for milliseconds in latencies)
        reach = "at most 35 us and 1.3 times dnsmasq's" if server == "udpwatch" and not mix else ""
        line(server, f"{cpu:.1f} us   {rate:,.0f}/s", f"p50/p95/p99 {shown}   {reach}")


def ask_once(place: Namespace, folder: Path, pid: int, queries: int) -> Sequence[float]:
    """Ask each query of the file once. Return microseconds of CPU for each, queries a second, and latencies."""
    before = cpu_seconds(pid)
    words = ["dnsperf", "-v", "-s", "127.0.0.1", "-p", str(PORT), "-d", str(folder / "fresh"), "-n", "1"]
    said = place.run(["taskset", "-c", CLIENT_CPU, *words, "-c", "4", "-q", str(OUTSTANDING)])
    cpu = cpu_seconds(pid) - before
    rate = float(re.search(r"Queries per second:\s+([\d.]+)", said).group(1))  # type: ignore[union-attr]
    latencies = sorted(float(found) * 1e3 for found in re.findall(r"^> NOERROR \S+ A ([\d.]+)", said, re.MULTILINE))
    assert len(latencies) > 0.99 * queries, said[-2000:]
    return cpu / queries * 1e6, rate, *(latencies[int(len(latencies) * part)] for part in (0.5, 0.95, 0.99))


def malicious() -> None:
    """Measure what the event loop does with one expensive upstream response: parse it, check its
    addresses (`--stop-dns-rebind`), and make a cache entry of it."""
    print("dns, malicious responses: ms of CPU to parse, check and store one (best of 20)")
    for what, data in BOMBS.items():
        line(what, f"{min(bomb_seconds(data) for _ in range(20)) * 1e3:.2f} ms", "at most 2")


def bomb_seconds(data: bytes) -> float:
    """Return the CPU time for one response, that of a rejected one until it is rejected."""
    begin = time.thread_time()
    with contextlib.suppress(Malformed):
        answer = parse_response(data)
        with contextlib.suppress(CnameLoop):
            follow(answer)
        rebinds(CHECKED, answer)
        entry_of(answer, 0.0, 60, 0, True)
    return time.thread_time() - begin


def main() -> None:
    """Run the whole benchmark."""
    malicious()
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as scratch, Lab() as lab:
        folder, place = Path(scratch), lab.namespace("alone")
        folder.chmod(0o755)
        (folder / "hosts").write_text("".join(f"{address(n)} {name(n)}\n" for n in range(NAMES)))
        (folder / "queries").write_text("".join(f"{name(n)} A\n" for n in range(NAMES)))
        compare("names of a hosts file", place, folder, hosts_servers(folder))
        upstream = [*dnsmasq(folder, UPSTREAM_PORT), "--no-resolv", *hosts(folder), "--local-ttl=3600"]
        wild = ["--address=/wild.example/10.9.9.9"]
        with running(place, ["dnsmasq", *upstream, *wild], folder, UPSTREAM_PORT):
            compare("cache hits", place, folder, cache_servers(folder))
            forwarding("forwarded, each of 10,000 names once", place, folder, cache_servers(folder))
            forwarding("85 % cached, 15 % forwarded", place, folder, cache_servers(folder), mix=True)
        slow = [
            sys.executable,
            str(SUPPORT / "slow_upstream.py"),
            "127.0.0.1",
            str(UPSTREAM_PORT),
            str(LATENCY_SECONDS),
        ]
        with running(place, slow, folder, UPSTREAM_PORT):
            forwarding("forwarded, to a server 5 ms away", place, folder, cache_servers(folder))


if __name__ == "__main__":
    main()
