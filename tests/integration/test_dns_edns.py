"""EDNS options of upstream queries, beside dnsmasq with the same options, the same clients and the same server."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import dns.edns
import dns.message
import pytest
from dns_server import (
    ANSWER_SECONDS,
    Asked,
    FakeServer,
    Responder,
    ask,
    elapsed,
    exchange,
    rcode,
    right,
)
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

SERVER, PORT = "127.0.0.99", 5300
NODE4, NODE6 = "198.51.100.1", "2001:db8:1:2::1"
CLIENT4, CLIENT6 = "198.51.100.215", "2001:db8:1:2:aaaa:bbbb:cccc:dddd"
OTHER4 = "198.51.100.216"  # of the same client
MAC = "02:00:00:ab:cd:ef"  # of the client
SUBNET = dns.edns.OptionType.ECS
#: (code, data) of each option
Options = list[tuple[int, bytes]]


class Net:
    """A node with a server under test and its upstream server, and a client beside it."""

    def __init__(self, node: Namespace, client: Namespace, upstream: FakeServer) -> None:
        self.node, self.client, self.upstream = node, client, upstream

    def ask(self, name: str, source: str, tcp: bool = False, options: list[dns.edns.Option] | None = None) -> str:
        """Query from an address of the client; return the response code."""
        query = dns.message.make_query(name, "A", use_edns=0 if options else False, options=options)
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        family, server = (socket.AF_INET6, NODE6) if ":" in source else (socket.AF_INET, NODE4)
        with self.client.socket(family, kind) as link:
            link.settimeout(ANSWER_SECONDS)
            link.bind((source, 0))
            link.connect((server, 53))
            return rcode(exchange(link, query, tcp))

    def becomes_known(self, source: str) -> None:
        """Query until an upstream query has an option: the server follows the kernel's table of neighbours."""
        numbers = itertools.count()

        def is_known() -> bool:
            name = f"known{next(numbers)}-{source.count(':')}.example"
            self.ask(name, source)
            return bool(self.received(name)[0])

        wait_for(is_known, f"the MAC address of {source}")

    def received(self, name: str) -> list[Options]:
        """The options of each query of a name that has reached the upstream server."""
        asked = [each for each in list(self.upstream.asked) if each.name == f"{name}."]
        return [[(int(option.otype), option.to_wire()) for option in each.message.options] for each in asked]


@contextlib.contextmanager
def net(
    server: Callable[..., AbstractContextManager[object]],
    *options: str,
    script: Callable[[Asked], bytes | list[bytes] | None] = right,
) -> Iterator[Net]:
    """A net with `Responder` or `dnsmasq` on its node."""
    with Lab() as lab:
        node, client = lab.pair("node", (NODE4, NODE6), "client", (CLIENT4, OTHER4, CLIENT6))
        client.ip(f"link set eth0 address {MAC}")
        with FakeServer(node, SERVER, script, PORT) as upstream, server(node, f"--server={SERVER}#{PORT}", *options):
            yield Net(node, client, upstream)


SERVERS = [Responder, dnsmasq]


@pytest.mark.parametrize(
    "options",
    [
        "--add-subnet",
        "--add-subnet=24,64",
        "--add-subnet=32,128",
        "--add-subnet=21,51",
        "--add-subnet=1,1",
        "--add-subnet=,56",
        "--add-subnet=192.0.2.255/24",
        "--add-subnet=192.0.2.255/23,192.0.2.255/22",
        "--add-subnet=2001:db8:ffff::1/33,2001:db8:ffff::1/36",
        "--add-subnet=192.0.2.255/0,2001:db8::1/0",
        "--add-subnet=24 --strip-subnet",
        "--add-cpe-id=home-\u00e9",
        f"--add-cpe-id={'x' * 255} --add-subnet=24",
        "--add-mac",
        "--add-mac=base64",
        "--add-mac=text --strip-mac",
        "--umbrella",
        "--umbrella=orgid:1,assetid:0",
        "--umbrella=assetid:4294967295,orgid:65536,deviceid:0123456789ABCDEF --add-subnet=24 --add-cpe-id=x",
        "--strip-subnet",
        "",
    ],
)
def test_options_are_those_of_dnsmasq(options: str) -> None:
    found = []
    for server in SERVERS:
        with net(server, *options.split()) as place:
            if "mac" in options:
                for source in (CLIENT4, CLIENT6):
                    place.becomes_known(source)
            for source in (CLIENT4, CLIENT6):
                for tcp in (False, True):
                    assert place.ask(f"a{source.count(':')}{tcp}.example".lower(), source, tcp) == "NOERROR"
            found.append([place.received(f"a{colons}{tcp}.example") for colons in (0, 7) for tcp in ("false", "true")])
    assert found[0] == found[1]
    assert all(len(queries) == 1 for queries in found[0]), "each name is asked once"
    assert bool(found[0][0][0]) is ("add-" in options or "umbrella" in options)


#: Options, and how many queries of one name reach the upstream server, when two addresses of one IPv4 network ask for
#: it twice, one after the other.
@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ("--add-subnet", 1),
        ("--add-cpe-id=home", 1),
        ("--add-subnet=192.0.2.0/24,192.0.2.0/24", 1),
        ("--add-subnet=24", 4),
        ("--umbrella", 4),
    ],
)
def test_responses_are_cached_as_by_dnsmasq(options: str, queries: int) -> None:
    for server in SERVERS:
        with net(server, options) as place:
            for source in (CLIENT4, OTHER4) * 2:
                assert place.ask("same.example", source) == "NOERROR"
            assert len(place.received("same.example")) == queries, server


def echo(asked: Asked) -> bytes:
    """A server that knows the option; its response is for another subnet if the name says so."""
    response = asked.reply("300 A 192.0.2.80")
    for sent in asked.message.options:
        address = "203.0.113.0" if asked.name.startswith("forged") else sent.address
        response.use_edns(0, options=[dns.edns.ECSOption(address, sent.srclen, sent.srclen + 1)])
    return response.to_wire()


def echo_after_forged(asked: Asked) -> list[bytes]:
    """The same, and then the right response."""
    return [echo(asked), right(asked)]


def test_response_for_another_subnet_is_ignored_as_by_dnsmasq() -> None:
    for server in SERVERS:
        with net(server, "--add-subnet=24", script=echo) as place:
            assert place.ask("own.example", CLIENT4) == "NOERROR"
            with contextlib.suppress(TimeoutError):  # dnsmasq sends nothing then
                assert place.ask("forged.example", CLIENT4) == "SERVFAIL"
    with net(Responder, "--add-subnet=24", script=echo_after_forged) as place:  # dnsmasq no longer waits for it
        assert place.ask("forged.example", CLIENT4) == "NOERROR"


def test_subnet_of_a_client_is_replaced() -> None:
    """dnsmasq passes a client's option on, except with --strip-subnet."""
    client = [dns.edns.ECSOption("203.0.113.0", 24)]
    for server, options in (
        (Responder, ""),
        (Responder, "--add-subnet=24"),
        (dnsmasq, "--add-subnet=24 --strip-subnet"),
    ):
        with net(server, *options.split()) as place:
            place.ask("own.example", CLIENT4, options=client)
            (received,) = place.received("own.example")
            assert received == ([(SUBNET, b"\0\x01\x18\0" + socket.inet_aton(CLIENT4)[:3])] if options else []), server


def test_server_that_refuses_edns_gets_the_options_again() -> None:
    """Without them it might respond with what is not meant for this client."""
    with net(Responder, "--add-subnet=24", script=lambda asked: asked.answer(rcode=1)) as place:
        assert place.ask("a.example", CLIENT4) == "SERVFAIL"
        received = place.received("a.example")
        assert len(received) > 1
        assert all(received)


def test_mac_addresses_of_neighbours_are_followed() -> None:
    """A neighbour that changes its address has the new one, a client that is none has no option, and a flood of
    neighbours, which the kernel reports, delays no query."""
    with net(Responder, "--add-mac=text") as place:
        place.becomes_known(CLIENT4)
        place.ask("first.example", CLIENT4)
        assert place.received("first.example") == [[(65073, MAC.encode())]]
        lines = [f"neigh replace 10.0.{at >> 8}.{at & 255} lladdr {MAC} dev eth0 nud permanent" for at in range(3000)]
        other = "02:00:00:00:00:77"
        place.client.ip(f"link set eth0 address {other}")
        place.node.ip(*lines, f"neigh replace {CLIENT4} lladdr {other} dev eth0 nud permanent")
        numbers = itertools.count()

        def has_other() -> bool:
            name = f"other{next(numbers)}.example"
            begin = time.monotonic()
            assert place.ask(name, CLIENT4) == "NOERROR"
            assert elapsed(begin) < 0.5
            return place.received(name) == [[(65073, other.encode())]]

        wait_for(has_other, "the new address")
        assert rcode(ask(place.node, "127.0.0.1", "local.example")) == "NOERROR"
        assert place.received("local.example") == [[]]
