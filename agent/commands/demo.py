"""`udpwatch demo`: moby/moby#15127 in network namespaces, and udpwatch catching it. Tells its story as it goes."""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from udpwatch.agent.testing import servers
from udpwatch.agent.testing.child import Child
from udpwatch.agent.testing.lab import ContainerHost

PORT, PORT_PKTINFO, PORT_BOUND, PORT_TCP = 56789, 56790, 56791, 56792
SILENCE_SECONDS = 1.0  # after so long without an answer, none comes
ANSWER_SECONDS = 5.0  # for what must come, on a slow machine too
EVENT_SECONDS = 5.0
_SEEN_REPLY = 2  # IPS_SEEN_REPLY, include/uapi/linux/netfilter/nf_conntrack_common.h

_INTRODUCTION = """\
A machine with two addresses runs a UDP server on "all addresses". A container on the same machine asks it at one
address; the kernel sends the answer from the other one. Nothing logs an error, and the container waits in vain. This
demo builds that machine, lets it happen, and shows what each side sees. One of them is conntrack, the kernel's list of
conversations: an answer that belongs to none of them is not translated back and not let in.
"""

_PICTURE = """\
  container                  node                          outside
  172.17.0.3 ------ docker0 172.17.0.1
                    eth0 172.16.13.13 --------------- 172.16.13.1
                    server on 0.0.0.0:56789
"""


class _Agent(Child):
    """A real `udpwatch run` beside us; its events are in a queue."""

    def __init__(self) -> None:
        super().__init__(
            "run",
            *("--events=-", "--metrics-listen=off", "--socket=off"),
            stdout=subprocess.PIPE,
            env={"UDPWATCH_CACHE": "off", **os.environ},  # nothing shall be left behind
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
        """How the agent asks conntrack, "packet" or "netlink"."""
        found = re.search(r"mode (\w+)", " ".join(self.log))
        return found.group(1) if found else "unknown"


class _Story:
    """Prints, and remembers whether everything came out."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colour = out.isatty() and "NO_COLOR" not in os.environ
        self.failed = 0

    def say(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def paragraph(self, text: str) -> None:
        self.say(textwrap.fill(" ".join(text.split()), 78) + "\n")

    def head(self, text: str) -> None:
        self.say("\n" + self._paint("1", text))

    def show(self, who: str, what: str) -> None:
        self.say(f"    {who:<10} {what}")

    def check(self, good: bool, who: str, what: str) -> None:
        """One line, marked by whether it came out as it should."""
        self.failed += not good
        mark = self._paint("32", "ok") if good else self._paint("31", "NO")
        self.say(f"{mark}  {who:<10} {what}")

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


class _Icmp:
    """Listens on the node's bridge for the container's "port unreachable"."""

    def __init__(self, lab: ContainerHost) -> None:
        with lab.node.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
            self._socket.bind(("docker0", 0))

    def port_unreachable(self, seconds: float) -> bool:
        """Whether one came: type 3 code 3 (RFC 792), or type 1 code 4 (RFC 4443)."""
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

    def close(self) -> None:
        self._socket.close()


def _ask(
    lab: ContainerHost,
    address: str,
    port: int,
    seconds: float = SILENCE_SECONDS,
    kind: socket.SocketKind = socket.SOCK_DGRAM,
) -> tuple[str, int]:
    """Ask from the container as a client does: connect, send, wait. (the answer or "", the client's port)."""
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


def _conntrack(lab: ContainerHost, family: socket.AddressFamily, client_port: int) -> list[tuple[str, bool]]:
    """The node's UDP entries of one client port: (as text, whether an answer was seen)."""
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket  # noqa: PLC0415  it is slow to import

    found = []
    with lab.node.entered(), NFCTSocket(nfgen_family=family) as conntrack:
        for entry in conntrack.dump():
            if entry["nfgen_family"] != family:
                continue
            flow = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
            if flow.proto == socket.IPPROTO_UDP and client_port in (flow.sport, flow.dport):
                text = f"{_join(flow.saddr, flow.sport)} -> {_join(flow.daddr, flow.dport)}"
                found.append((text, bool(entry.get_attr("CTA_STATUS") & _SEEN_REPLY)))
    return sorted(found, key=lambda entry: entry[0].endswith(f":{client_port}"))


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _serve(lab: ContainerHost, name: str, function: Any, address: str, port: int) -> None:
    """Start a server on the node; it is listening when this returns."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if function is servers.tcp else socket.SOCK_DGRAM
    with lab.node.socket(family, kind) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if function is servers.with_pktinfo:
            servers.want_pktinfo(server)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        lab.node.spawn(name, lambda: function(server))


def _next_event(agent: _Agent, lab: ContainerHost) -> dict[str, Any] | None:
    """The next event about the lab; other wrong replies of this machine are none of this story's."""
    end = time.monotonic() + EVENT_SECONDS
    while (left := end - time.monotonic()) > 0:
        try:
            event = agent.events.get(timeout=left)
        except queue.Empty:
            return None
        # In mode netlink the namespace is not told.
        if event["netns"] in (None, lab.node.inode) and event["peer"] in (lab.CONTAINER, lab.CONTAINER_6):
            return event
    return None


def _wrong(story: _Story, lab: ContainerHost, agent: _Agent, asked: str, other: str) -> None:
    """The plain server: what client, conntrack and udpwatch see."""
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    icmp = _Icmp(lab)
    try:
        answer, port = _ask(lab, asked, PORT)
        refused = icmp.port_unreachable(ANSWER_SECONDS)
    finally:
        icmp.close()
    story.check(not answer, "client", f"asked {_join(asked, PORT)}, got {answer or 'no answer'}")
    story.check(refused, "", "its kernel refused the answer: ICMP port unreachable")
    entries = _conntrack(lab, family, port)
    for text, replied in entries:
        story.show("conntrack" if text == entries[0][0] else "", f"{text}  {'replied' if replied else 'UNREPLIED'}")
    story.check(
        [replied for _, replied in entries] == [False, False],
        "",
        "two entries, none answered: the reply was booked as a new flow",
    )
    event = _next_event(agent, lab)
    if event is None:
        story.check(False, "udpwatch", "reported nothing")
        return
    story.show("udpwatch", f"process {event['process']} (pid {event['pid']}), port {event['port']}/udp")
    story.check(
        (event["expected"], event["actual"], event["port"], event["process"]) == (asked, other, PORT, "plain-server"),
        "",
        f"was asked at {event['expected']}, answered from {event['actual']}",
    )
    verdict = "unknown" if agent.mode == "netlink" else "new"
    story.check(
        (event["verdict"], event["cause"]) == (verdict, "kernel-chosen"),
        "",
        f"verdict {event['verdict']} (conntrack), cause {event['cause']} (routing)",
    )


def _right(story: _Story, lab: ContainerHost, asked: str) -> None:
    """The same server, done right in three ways: each answer must arrive."""
    for what, port, kind in (
        ("with IP_PKTINFO", PORT_PKTINFO, socket.SOCK_DGRAM),
        ("bound to the one address", PORT_BOUND, socket.SOCK_DGRAM),
        ("over TCP", PORT_TCP, socket.SOCK_STREAM),
    ):
        answer, _ = _ask(lab, asked, port, ANSWER_SECONDS, kind)
        story.check(bool(answer), "client", f"{what}: {'got its answer' if answer else 'got no answer'}")


def _tell(story: _Story, lab: ContainerHost, agent: _Agent) -> None:
    for family, asked, other, wildcard in (
        ("IPv4", lab.ETH0, lab.DOCKER0, "0.0.0.0"),  # noqa: S104  the fault needs it, and the namespace has no outside
        ("IPv6", lab.ETH0_6, lab.DOCKER0_6, "::"),
    ):
        story.head(f"{family}: a plain server (recvfrom, sendto) on {_join(wildcard, PORT)}")
        _serve(lab, "plain-server", servers.plain, wildcard, PORT)
        _wrong(story, lab, agent, asked, other)

        story.head(f"{family}: the same server, done right")
        _serve(lab, "pktinfo-server", servers.with_pktinfo, wildcard, PORT_PKTINFO)
        _serve(lab, "bound-server", servers.plain, asked, PORT_BOUND)
        _serve(lab, "tcp-server", servers.tcp, wildcard, PORT_TCP)
        _right(story, lab, asked)
        # Events keep their order: if the plain server is the next one heard of, the right ones were not flagged.
        _ask(lab, asked, PORT)
        event = _next_event(agent, lab)
        quiet = event is not None and event["process"] == "plain-server" and event["port"] == PORT
        story.check(quiet, "udpwatch", "flagged none of these, and the plain one when it was asked again")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: by an exception, so that everything is taken down."""

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
    return tell(sys.stdout)


def tell(out: TextIO) -> int:
    """Tell the story on ``out``; returns 0, or 1 if anything did not come out as it should.

    Raises CannotRun where this machine cannot run it.
    """
    story = _Story(out)
    started = time.monotonic()
    with _interruptible(), ContainerHost() as lab:
        story.paragraph(_INTRODUCTION)
        story.say(_PICTURE)
        agent = _Agent()
        try:
            story.show("udpwatch", f"is watching (mode {agent.mode}), ready after {time.monotonic() - started:.1f} s")
            _tell(story, lab, agent)
        finally:
            agent.stop()
    seconds = f"{time.monotonic() - started:.0f} s"
    if story.failed:
        story.say(f"\n{story.failed} of the lines above did not come out: they are marked NO ({seconds}).")
        return 1
    story.say(f"\nAll of it came out as it should ({seconds}). Nothing was left behind.")
    return 0
