"""`udpwatch demo`: reproduce moby/moby#15127 in network namespaces, and show what udpwatch reports."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from udpwatch.agent.client.connection import Client
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.child import Child
from udpwatch.agent.testing.lab import ContainerHost

PORT, PORT_PKTINFO, PORT_BOUND, PORT_TCP, PORT_MAPPED = 56789, 56790, 56791, 56792, 56793
SILENCE_SECONDS = 1.0  # a missing reply is accepted as missing after this time
REPLY_SECONDS = 5.0  # for an expected packet, also on a slow machine
EVENT_SECONDS = 5.0
ROUNDS, ROUND_SECONDS = 8, 0.3  # of healed replies: conntrack calls a flow assured if it goes on for two seconds
_SEEN_REPLY, _ASSURED = 2, 4  # IPS_*, include/uapi/linux/netfilter/nf_conntrack_common.h

_INTRODUCTION = """\
A machine with two addresses runs a UDP server on all addresses (0.0.0.0). A container on the same machine sends a
request to one address, and the kernel sends the reply from the other one. Nothing logs an error, and the client times
out. This demo builds that machine in network namespaces, reproduces the wrong reply, and shows what each side sees.
One side is conntrack, the kernel's table of flows: NAT does not translate a reply that matches no flow in this table.
"""

_PICTURE = """\
  container                  node                          outside
  172.17.0.3 ------ docker0 172.17.0.1
                    eth0 172.16.13.13 --------------- 172.16.13.1
                    server on 0.0.0.0:56789
"""


class _Agent(Child):
    """A real `udpwatch run` on the node of the lab, as a child process; its events are in a queue."""

    def __init__(self, lab: ContainerHost, folder: str) -> None:
        """Start it. Its socket is in ``folder``."""
        self.socket = Path(folder, "udpwatch.sock")
        with lab.node.entered():
            super().__init__(
                "run",
                *("--events=-", "--metrics-listen=off", f"--socket={self.socket}", "--heal=standby"),
                stdout=subprocess.PIPE,
                env={"UDPWATCH_CACHE": "off", **os.environ},  # without the cache, the demo leaves no files
            )
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read_events, daemon=True).start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _read_events(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.put(json.loads(line))

    @property
    def mode(self) -> str:
        """How the agent queries conntrack: "packet" or "netlink"."""
        found = re.search(r"mode (\w+)", " ".join(self.log))
        return found.group(1) if found else "unknown"


class _Report:
    """Prints the results and counts failed checks."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colour = out.isatty() and "NO_COLOR" not in os.environ
        self.failed = 0

    def line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def paragraph(self, text: str) -> None:
        self.line(textwrap.fill(" ".join(text.split()), 78) + "\n")

    def head(self, text: str) -> None:
        self.line("\n" + self._paint("1", text))

    def fact(self, observer: str, text: str) -> None:
        self.line(f"    {observer:<10} {text}")

    def check(self, passed: bool, observer: str, text: str) -> None:
        """Print a line that is marked ok or NO."""
        self.failed += not passed
        mark = self._paint("32", "ok") if passed else self._paint("31", "NO")
        self.line(f"{mark}  {observer:<10} {text}")

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


class _Capture:
    """Captures packets on the node's bridge."""

    def __init__(self, lab: ContainerHost) -> None:
        with lab.node.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
            self._socket.bind(("docker0", 0))

    def port_unreachable(self, seconds: float) -> bool:
        """Wait for a message of type 3 code 3 (RFC 792) or type 1 code 4 (RFC 4443); return whether one came."""
        end = time.monotonic() + seconds
        while select.select([self._socket], [], [], max(0, end - time.monotonic()))[0]:
            packet = self._socket.recv(2048)
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_ICMP:
                header = (packet[0] & 15) * 4
                if packet[header : header + 2] == b"\x03\x03":
                    return True
            if packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_ICMPV6 and packet[40:42] == b"\x01\x04":
                return True
        return False

    def replies(self) -> set[tuple[str, int]]:
        """Return the sources, address and port, of the datagrams that the servers have sent."""
        found = set()
        while select.select([self._socket], [], [], 0)[0]:
            packet = self._socket.recv(2048)
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                source, udp = packet[12:16], packet[(packet[0] & 15) * 4 :]
            elif packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
                source, udp = packet[8:24], packet[40:]
            else:
                continue
            if (port := int.from_bytes(udp[:2], "big")) in (PORT, PORT_MAPPED):
                found.add((str(ipaddress.ip_address(source)), port))
        return found

    def close(self) -> None:
        self._socket.close()


def _request(
    lab: ContainerHost,
    address: str,
    port: int,
    seconds: float = SILENCE_SECONDS,
    kind: socket.SocketKind = socket.SOCK_DGRAM,
) -> tuple[str, int]:
    """Send a request from the container: connect, send, wait. Return the reply, or "", and the client's port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with lab.container.socket(family, kind) as client:
        client.settimeout(seconds)
        client.connect((address, port))
        own_port: int = client.getsockname()[1]
        client.send(b"hello")
        try:
            return client.recv(2048).decode(), own_port
        except OSError:
            return "", own_port


def _conntrack(lab: ContainerHost, family: socket.AddressFamily, client_port: int) -> list[tuple[str, int]]:
    """Return the node's UDP entries for a client port: (as text, status)."""
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket  # noqa: PLC0415  slow to import

    found = []
    with lab.node.entered(), NFCTSocket(nfgen_family=family) as conntrack:
        for entry in conntrack.dump():
            if entry["nfgen_family"] != family:
                continue
            flow = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
            if flow.proto == socket.IPPROTO_UDP and client_port in (flow.sport, flow.dport):
                text = f"{_join(flow.saddr, flow.sport)} -> {_join(flow.daddr, flow.dport)}"
                found.append((text, entry.get_attr("CTA_STATUS")))
    return sorted(found, key=lambda entry: entry[0].endswith(f":{client_port}"))


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _serve(lab: ContainerHost, name: str, function: Any, address: str, port: int, only_ipv6: int = 1) -> None:
    """Start a server on the node, and return when it is listening."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if function is servers.tcp else socket.SOCK_DGRAM
    with lab.node.socket(family, kind) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        if function is servers.with_pktinfo:
            servers.enable_pktinfo(server)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        lab.node.spawn(name, lambda: function(server))


def _next_event(agent: _Agent, lab: ContainerHost) -> dict[str, Any] | None:
    """Return the next event of the lab, without those of other servers on this machine; None if there is none."""
    end = time.monotonic() + EVENT_SECONDS
    while (left := end - time.monotonic()) > 0:
        try:
            event = agent.events.get(timeout=left)
        except queue.Empty:
            return None
        # In mode netlink, events do not contain the namespace.
        if event["netns"] in (None, lab.node.inode) and event["peer"] in (lab.CONTAINER, lab.CONTAINER_6):
            return event
    return None


def _check_plain_server(report: _Report, lab: ContainerHost, agent: _Agent, asked: str, other: str) -> None:
    """Send a request to the plain server, and report what client, conntrack and udpwatch see."""
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    icmp = _Capture(lab)
    try:
        reply, port = _request(lab, asked, PORT)
        rejected = icmp.port_unreachable(REPLY_SECONDS)
    finally:
        icmp.close()
    report.check(not reply, "client", f"asked {_join(asked, PORT)}, received {reply or 'no reply'}")
    report.check(rejected, "", "its kernel rejected the reply: ICMP port unreachable")
    entries = _conntrack(lab, family, port)
    for text, status in entries:
        replied = "replied" if status & _SEEN_REPLY else "UNREPLIED"
        report.fact("conntrack" if text == entries[0][0] else "", f"{text}  {replied}")
    report.check(
        [status & _SEEN_REPLY for _, status in entries] == [0, 0],
        "",
        "two flows without a reply: the reply counts as a new flow",
    )
    event = _next_event(agent, lab)
    if event is None:
        report.check(False, "udpwatch", "reported nothing")
        return
    report.fact("udpwatch", f"process {event['process']} (pid {event['pid']}), port {event['port']}/udp")
    report.check(
        (event["expected"], event["actual"], event["port"], event["process"]) == (asked, other, PORT, "plain-server"),
        "",
        f"was asked at {event['expected']}, replied from {event['actual']}",
    )
    verdict = "unknown" if agent.mode == "netlink" else "new"
    report.check(
        (event["verdict"], event["cause"]) == (verdict, "kernel-chosen"),
        "",
        f"verdict {event['verdict']} (conntrack), cause {event['cause']} (routing)",
    )


def _check_fixed_servers(report: _Report, lab: ContainerHost, asked: str) -> None:
    """Send a request to the same server with three fixes: each reply must arrive."""
    for fix, port, kind in (
        ("with IP_PKTINFO", PORT_PKTINFO, socket.SOCK_DGRAM),
        ("bound to one address", PORT_BOUND, socket.SOCK_DGRAM),
        ("over TCP", PORT_TCP, socket.SOCK_STREAM),
    ):
        reply, _ = _request(lab, asked, port, REPLY_SECONDS, kind)
        report.check(bool(reply), "client", f"{fix}: received {'the reply' if reply else 'no reply'}")


def _run_scenario(report: _Report, lab: ContainerHost, agent: _Agent) -> None:
    for family, asked, other, wildcard in (
        ("IPv4", lab.ETH0, lab.DOCKER0, "0.0.0.0"),  # noqa: S104  the bug needs this, and the namespace is isolated
        ("IPv6", lab.ETH0_6, lab.DOCKER0_6, "::"),
    ):
        report.head(f"{family}: a plain server (recvfrom, sendto) on {_join(wildcard, PORT)}")
        _serve(lab, "plain-server", servers.plain, wildcard, PORT)
        _check_plain_server(report, lab, agent, asked, other)

        report.head(f"{family}: the same server, fixed")
        _serve(lab, "pktinfo-server", servers.with_pktinfo, wildcard, PORT_PKTINFO)
        _serve(lab, "bound-server", servers.plain, asked, PORT_BOUND)
        _serve(lab, "tcp-server", servers.tcp, wildcard, PORT_TCP)
        _check_fixed_servers(report, lab, asked)
        # Events are in order: if the next one is about the plain server, the fixed servers were not reported.
        _request(lab, asked, PORT)
        event = _next_event(agent, lab)
        quiet = event is not None and event["process"] == "plain-server" and event["port"] == PORT
        report.check(quiet, "udpwatch", "reported none of these, and the plain server when asked again")
    _run_healed(report, lab, agent)


def _exchange(lab: ContainerHost, asked: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """Send ROUNDS requests to each address and port, from one socket each; return (replies, the client's port)."""
    with contextlib.ExitStack() as opened:
        clients = []
        for address, port in asked:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            client = opened.enter_context(lab.container.socket(family))
            client.settimeout(REPLY_SECONDS)
            client.connect((address, port))
            clients.append(client)
        replies = [0] * len(clients)
        for _ in range(ROUNDS):
            for number, client in enumerate(clients):
                with contextlib.suppress(OSError):
                    client.send(b"hello")
                    replies[number] += bool(client.recv(2048))
            time.sleep(ROUND_SECONDS)
        return [(count, client.getsockname()[1]) for count, client in zip(replies, clients, strict=True)]


def _healed(client: Client, expected: int) -> int:
    """Return how many replies of the plain servers the agent has healed; wait until it has counted them."""
    end = time.monotonic() + EVENT_SECONDS
    while True:
        rows = [row for row in client.snapshot().healed_rows if row.port in (PORT, PORT_MAPPED)]
        count = sum(row.count for row in rows if row.sender.process == "plain-server")
        if count >= expected or time.monotonic() > end:
            return count
        time.sleep(0.1)


def _run_healed(report: _Report, lab: ContainerHost, agent: _Agent) -> None:
    """Heal the plain servers, ask them at the address that they do not reply from, and stop healing."""
    report.head(f"The plain servers, unchanged: udpwatch heal on {PORT} {PORT_MAPPED}")
    with Client(agent.socket) as client:
        healing = client.heal()
        if reason := healing.reason or "; ".join(healing.not_healed):
            report.fact("udpwatch", f"cannot heal here: {reason}")
            return
        client.heal(True, [PORT, PORT_MAPPED])
    _serve(lab, "plain-server", servers.plain, "::", PORT_MAPPED, only_ipv6=0)
    report.fact("", f"port {PORT_MAPPED} is another plain server, on [::] for IPv6 and IPv4")
    asked = [(lab.ETH0, PORT), (lab.ETH0_6, PORT), (lab.ETH0, PORT_MAPPED)]
    capture = _Capture(lab)
    try:
        exchanged = _exchange(lab, asked)
        sources = capture.replies()
    finally:
        capture.close()
    for (address, port), (replies, client_port) in zip(asked, exchanged, strict=True):
        note = " (server on ::)" if port == PORT_MAPPED else ""
        text = f"asked {_join(address, port)}{note}, received {replies} of {ROUNDS} replies"
        report.check(replies == ROUNDS, "client", text)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        statuses = [status for _, status in _conntrack(lab, family, client_port)]
        report.check([bool(each & _ASSURED) for each in statuses] == [True], "conntrack", "one flow, assured")
    report.check(sources == set(asked), "capture", "each reply left from the address that was asked")
    with Client(agent.socket) as client:
        healed = _healed(client, sum(replies for replies, _ in exchanged))
        report.check(healed == len(asked) * ROUNDS, "udpwatch", f"healed {healed} replies of process plain-server")
        client.heal(False)
    report.head("The same servers: udpwatch heal off")
    reply, _ = _request(lab, lab.ETH0, PORT)
    report.check(not reply, "client", f"asked {_join(lab.ETH0, PORT)}, received {reply or 'no reply'}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM end the demo as Ctrl-C does: by an exception, so that everything is cleaned up."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the description; there are no arguments."""
    parser.description = (
        "Build a container host in network namespaces, let a server reply from the wrong address, and show what the "
        "client, conntrack and udpwatch see. Takes less than a minute and leaves nothing behind."
    )


def run(_parsed: argparse.Namespace) -> int:
    """Run the demo on standard output; return 0, or 1 if a line did not come out as expected. Raises CannotRun."""
    return run_demo(sys.stdout)


def run_demo(out: TextIO) -> int:
    """Run the demo and print the results to ``out``. Return 0, or 1 if a check failed.

    Raises CannotRun if this machine cannot run it.
    """
    report = _Report(out)
    started = time.monotonic()
    with _interruptible(), tempfile.TemporaryDirectory(prefix="udpwatch-") as folder, ContainerHost() as lab:
        report.paragraph(_INTRODUCTION)
        report.line(_PICTURE)
        agent = _Agent(lab, folder)
        try:
            report.fact("udpwatch", f"is ready after {time.monotonic() - started:.1f} s (mode {agent.mode})")
            _run_scenario(report, lab, agent)
        finally:
            agent.stop()
    seconds = f"{time.monotonic() - started:.0f} s"
    if report.failed:
        report.line(f"\n{report.failed} of the checks above failed: they are marked NO ({seconds}).")
        return 1
    report.line(f"\nAll checks passed ({seconds}). Its namespaces and processes are gone.")
    return 0
