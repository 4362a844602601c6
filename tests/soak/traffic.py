"""Steady traffic with exact counts: servers on the node, wrong and right ones, and their clients."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import dns.exception
from dns_server import FakeServer, ask, texts
from scene import V4, V6, Family, picked_source
from tally import Tally

from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, Namespace

REQUESTS_PER_SECOND = 40  # of each client
SOCKETS = 4  # of each client
REQUESTS_PER_SOCKET = 25  # then it is replaced by one with another port
REPLY_SECONDS = 2.0
QUERIES_PER_SECOND = 20
QUERY_SECONDS = 8.0
TCP_EVERY = 7  # each seventh query is sent over TCP
HOSTS = {f"host{number}.soak.test": f"10.7.0.{number}" for number in range(1, 51)}
FORWARDED = {f"name{number}.example": "192.0.2.80" for number in range(50)}  # by dns_server.right()


@dataclass(frozen=True)
class Server:
    """A server on the node. Every reply of a wrong one is wrong."""

    name: str
    port: int
    family: Family
    is_right: bool


SERVERS = (
    Server("wrong-ipv4", 5001, V4, False),
    Server("wrong-ipv6", 5002, V6, False),
    Server("right-ipv4", 5003, V4, True),
    Server("right-ipv6", 5004, V6, True),
)
#: each server's clients: one in the container, one outside
CLIENTS = tuple(f"{server.name} {place}" for server in SERVERS for place in ("container", "outside"))
#: numbers of the tally: the replies of each server; queries to the agent's responder, and those with a right response;
#: "agent": the number of the running agent if it is ready, else 0
NUMBERS = (*(server.name for server in SERVERS), "asked", "answered", "agent")


def start(host: ContainerHost, tally: Tally, problems: Path) -> None:
    """Start a process for each server and each client. Each counts for itself."""
    for server in SERVERS:
        with host.node.socket(server.family.inet) as link:
            servers.enable_pktinfo(link)
            link.bind((server.family.wildcard, server.port))
            host.node.spawn(server.name, functools.partial(_serve, link, server, tally))
        for place in (host.container, host.outside):
            asked = _asked(host, server.family, place)
            place.spawn(
                "soak-client", functools.partial(_converse, f"{server.name} {place.name}", server, asked, tally)
            )
    host.outside.spawn("upstream", functools.partial(_serve_names, host.outside))
    host.outside.spawn("soak-resolver", functools.partial(_resolve, host, tally, problems))


def _asked(host: ContainerHost, family: Family, place: Namespace) -> str:
    """Return an address of the node that routing does not choose for replies to this place."""
    if place is host.container:
        return family.eth0
    picked = picked_source(host.node, family, family.outside)
    return family.second if picked == family.eth0 else family.eth0


def _serve(link: socket.socket, server: Server, tally: Tally) -> None:
    while True:
        data, control, _, peer = link.recvmsg(100, socket.CMSG_SPACE(32))
        level, kind, asked = control[0]
        answer = [(level, kind, servers.reply_control(asked))] if server.is_right else []
        link.sendmsg([data], answer, 0, peer)
        tally.add(server.name)


def _converse(name: str, server: Server, asked: str, tally: Tally) -> None:
    """Send requests from several ports, each when the last one has its reply. A client that is not connected accepts a
    reply from any address.
    """
    links: list[socket.socket | None] = [None] * SOCKETS
    for number in itertools.count():
        time.sleep(random.uniform(0.5, 1.5) / REQUESTS_PER_SECOND)  # noqa: S311
        tally.pass_gate(name)
        place = number % SOCKETS
        link = links[place]
        if link is None or number % (SOCKETS * REQUESTS_PER_SOCKET) == place:
            if link:
                link.close()
            link = links[place] = socket.socket(server.family.inet, socket.SOCK_DGRAM)
            link.settimeout(REPLY_SECONDS)
        link.sendto(b"request", (asked, server.port))
        with contextlib.suppress(TimeoutError):
            link.recvfrom(100)


def _serve_names(place: Namespace) -> None:
    with FakeServer(place, ContainerHost.OUTSIDE):
        signal.pause()


def _resolve(host: ContainerHost, tally: Tally, problems: Path) -> None:
    """Send queries to the agent's responder while it is ready, and check each response."""
    places = [(host.container, address) for address in (host.ETH0, host.DOCKER0, host.ETH0_6, host.DOCKER0_6)]
    places += [(host.outside, address) for address in (host.ETH0, host.ETH0_6)]
    names = list((HOSTS | FORWARDED).items())
    for number in itertools.count():
        time.sleep(random.uniform(0.5, 1.5) / QUERIES_PER_SECOND)  # noqa: S311
        agent = tally["agent"]
        if not agent:
            continue
        (place, address), (name, expected) = places[number % len(places)], names[number % len(names)]
        try:
            response = ask(place, address, name, tcp=number % TCP_EVERY == 0, seconds=QUERY_SECONDS)
            problem = "" if texts(response) == [expected] else f"the response is {response.to_text()!r}"
        except (OSError, AssertionError, dns.exception.DNSException) as error:
            problem = repr(error)
        if problem and tally["agent"] != agent:
            continue  # the agent has ended meanwhile
        tally.add("asked")
        if not problem:
            tally.add("answered")
            continue
        with problems.open("a") as file:
            print(f"query {number} for {name} to {address}: {problem}", file=file)
