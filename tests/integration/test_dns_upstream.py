"""Dead, slow, faulty or hostile upstream servers: the client gets a response or SERVFAIL within seconds."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import pytest
from dns_server import (
    ANSWER_SECONDS,
    PORT,
    Asked,
    FakeServer,
    Responder,
    Script,
    ask,
    bare_query,
    connected,
    environment,
    rcode,
    receive_message,
    right,
    send_message,
    texts,
    write,
)
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab
from udpwatch.dns.upstream_socket import POOL_SOCKETS, SOCKET_QUERIES

NODE, CLIENT, FIRST, SECOND, THIRD = "10.1.0.1", "10.1.0.2", "10.2.0.2", "10.2.0.3", "10.2.0.6"
GOOD = ["192.0.2.80"]
FAULTY_PORT = 5353
FLOOD = 100_000


class Scene:
    """A client, a node, and a host with room for upstream servers at 10.2.0.2 to .9."""

    def __init__(self, lab: Lab) -> None:
        self.node, self.client, self.servers = (lab.namespace(name) for name in ("node", "client", "servers"))
        lab.link(self.node, "eth0", self.client, "eth0")
        lab.link(self.node, "eth1", self.servers, "eth0")
        self.node.ip(
            f"addr add {NODE}/24 dev eth0",
            "addr add 10.2.0.1/24 dev eth1",
            "addr add 10.2.0.77/24 dev eth1",
            "addr add fd02::1/64 dev eth1 nodad",
        )
        self.client.ip(f"addr add {CLIENT}/24 dev eth0")
        self.servers.ip(*(f"addr add 10.2.0.{number}/24 dev eth0" for number in range(2, 10)))
        self.servers.ip("addr add fd02::2/64 dev eth0 nodad")

    def ask(self, name: str, kind: str = "A", tcp: bool = False, port: int = PORT) -> dns.message.Message:
        """Query from the client; the response must come in time."""
        begun = time.monotonic()
        answer = ask(self.client, NODE, name, kind, tcp, port)
        assert time.monotonic() - begun < ANSWER_SECONDS
        return answer


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab() as lab:
        yield Scene(lab)


@contextlib.contextmanager
def responder(scene: Scene, *options: str, servers: tuple[str, ...] = (FIRST,)) -> Iterator[Responder]:
    with Responder(scene.node, *(f"--server={server}" for server in servers), *options) as running:
        yield running


# ---- faulty servers: what each does over UDP and TCP ----


def silent(_: Asked) -> None:
    return None


def slow(asked: Asked) -> bytes:
    time.sleep(1.5)  # the behaviour under test: a slow response
    return right(asked)


def code(number: int) -> Script:
    return lambda asked: asked.answer(rcode=number)


def truncated(tcp: Script) -> Script:
    """Truncates every response over UDP."""

    def script(asked: Asked) -> bytes | list[bytes] | None:
        if asked.tcp:
            return tcp(asked)
        response = asked.reply()
        response.flags |= dns.flags.TC
        return response.to_wire()

    return script


def byte_by_byte(asked: Asked) -> None:
    message = right(asked)
    asked.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for octet in struct.pack("!H", len(message)) + message:
        asked.link.send(bytes((octet,)))


def half_a_message(asked: Asked) -> None:
    message = right(asked)
    asked.link.sendall(struct.pack("!H", len(message)) + message[:-5])


def too_long(asked: Asked) -> None:
    asked.link.sendall(b"\xff\xff" + right(asked))  # and then nothing
    asked.link.recv(1)


def garbage(asked: Asked) -> bytes:
    return bytes(range(256))


def bomb(asked: Asked) -> bytes:
    """65,535 bytes of names that point to names that point to names."""
    question = asked.data[12 : 12 + asked.data[12:].index(b"\0") + 5]
    message = bytearray(asked.data[:2] + struct.pack("!HHHHH", 0x8180, 1, 1, 0, 0) + question)
    message += b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 60, 0xFFFF - len(message) - 12)
    at = len(message)
    while len(message) < 0xFFFF - 4 and at < 0x3FFF:
        message += b"\x01a" + struct.pack("!H", 0xC000 | at)
        at = len(message) - 4
    message += b"\0" * (0xFFFF - len(message))
    return bytes(message)


def pointer_chain(asked: Asked) -> bytes:
    """Many records whose owners point to each other."""
    question = asked.data[12 : 12 + asked.data[12:].index(b"\0") + 5]
    message = bytearray(asked.data[:2] + struct.pack("!HHHHH", 0x8180, 1, 0xFFFF, 0, 0) + question)
    at = 12
    while len(message) < 0xFFFF - 20:
        owner = len(message)
        message += b"\x01a" + struct.pack("!H", 0xC000 | min(at, 0x3FFF)) + struct.pack("!HHIH", 1, 1, 60, 4) + b"aaaa"
        at = owner
    return bytes(message)


def other_question(asked: Asked) -> bytes:
    response = asked.reply("300 A 203.0.113.66")
    return response.to_wire().replace(b"\x07example", b"\x07exampel")


def other_type(asked: Asked) -> bytes:
    query = dns.message.make_query(asked.name, "TXT", id=asked.id)
    return dns.message.make_response(query).to_wire()


def wrong_id(asked: Asked) -> bytes:
    message = asked.answer("300 A 203.0.113.66")
    return struct.pack("!H", asked.id ^ 1) + message[2:]


def no_response(asked: Asked) -> bytes:
    """The query, unchanged."""
    return asked.data


def no_question(asked: Asked) -> bytes:
    response = asked.reply("300 A 203.0.113.66")
    response.question = []
    return response.to_wire()


def other_port(asked: Asked) -> None:
    with socket.socket(fileno=_clone(asked.link)) as link:
        link.bind((asked.link.getsockname()[0], 0))
        link.sendto(asked.answer("300 A 203.0.113.66"), asked.peer)


def other_address(asked: Asked) -> None:
    with socket.socket(fileno=_clone(asked.link)) as link:
        link.bind(("10.2.0.9", PORT))
        link.sendto(asked.answer("300 A 203.0.113.66"), asked.peer)


def _clone(link: socket.socket) -> int:
    """A new UDP socket in the namespace of another."""
    return CURRENT[0].servers.socket().detach()


CURRENT: list[Scene] = []


@pytest.fixture(autouse=True)
def _current(scene: Scene) -> None:
    CURRENT[:] = [scene]


FAULTS: dict[str, Script] = {
    "silent": silent,
    "servfail": code(2),
    "refused": code(5),
    "notimp": code(4),
    "formerr": code(1),
    "truncated, silent over TCP": truncated(silent),
    "truncated over TCP, too": truncated(
        lambda asked: truncated(silent)(Asked(asked.data, asked.peer, False, asked.link))
    ),
    "truncated, garbage over TCP": truncated(garbage),
    "truncated, half a message": truncated(half_a_message),
    "truncated, more is announced than comes": truncated(too_long),
    "truncated, chain of pointers": truncated(pointer_chain),
    "truncated, wrong id": truncated(wrong_id),
    "truncated, other question": truncated(other_question),
    "garbage": garbage,
    "one byte": lambda asked: b"x",
    "empty": lambda asked: b"",
    "mirror": no_response,
    "other question": other_question,
    "other type": other_type,
    "no question": no_question,
    "wrong id": wrong_id,
    "other port": other_port,
    "other address": other_address,
    "bomb": lambda asked: bomb(asked)[:60_000],
}


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalpha())


@pytest.fixture(scope="module")
def faulty(scene: Scene) -> Iterator[tuple[FakeServer, FakeServer, Responder]]:
    """Two servers, and a responder without a cache on its own port."""
    options = ("--cache-size=0", f"--port={FAULTY_PORT}", "--metrics-listen=off")
    with FakeServer(scene.servers, "10.2.0.4") as first, FakeServer(scene.servers, "10.2.0.5") as second:
        with responder(scene, *options, servers=("10.2.0.4", "10.2.0.5")) as running:
            yield first, second, running


@pytest.mark.parametrize("fault", FAULTS)
def test_next_server_is_queried(scene: Scene, faulty: tuple[FakeServer, FakeServer, Responder], fault: str) -> None:
    first, second, _ = faulty
    name = f"{_letters(fault)}.next.example"
    for server in (first, second):
        server.asked.clear()
    # Whichever server is queried first misbehaves, the other one does not.
    chosen: list[FakeServer] = []

    def script(server: FakeServer) -> Script:
        def run(asked: Asked) -> bytes | list[bytes] | None:
            chosen.append(server)
            return FAULTS[fault](asked) if server is chosen[0] else right(asked)

        return run

    first.script, second.script = script(first), script(second)
    assert texts(scene.ask(name, port=FAULTY_PORT)) == GOOD


def test_servfail_in_time(scene: Scene, faulty: tuple[FakeServer, FakeServer, Responder]) -> None:
    """No server has a usable response: the client gets SERVFAIL before it gives up. All kinds at the same time."""
    scripts = {f"{_letters(fault)}.none.example.": script for fault, script in FAULTS.items()}

    def script(asked: Asked) -> bytes | list[bytes] | None:
        scripted = scripts.get(asked.name)  # the responder may still repeat a query of the test before
        return scripted(asked) if scripted else None

    for server in faulty[:2]:
        server.script = script
    begun = time.monotonic()
    with connected(scene.client, NODE, port=FAULTY_PORT) as client:
        for number, name in enumerate(scripts):
            client.send(bare_query(name.rstrip("."), number))
        got = {answer.id: answer for answer in (dns.message.from_wire(client.recv(2000)) for _ in scripts)}
    assert time.monotonic() - begun < ANSWER_SECONDS
    for number, fault in enumerate(FAULTS):
        assert rcode(got[number]) == ("REFUSED" if fault == "refused" else "SERVFAIL"), fault
        assert not got[number].answer, fault


def test_malicious_response(scene: Scene, faulty: tuple[FakeServer, FakeServer, Responder]) -> None:
    """RDATA is forwarded as received, at no cost."""
    for server in faulty[:2]:
        server.script = truncated(bomb)
    answer = scene.ask("bomb.example", port=FAULTY_PORT)
    assert rcode(answer) == "SERVFAIL" or answer.flags & dns.flags.TC


def test_long_cname_chain(scene: Scene) -> None:
    """As dnsmasq: a long chain is cached; a loop is forwarded, and queried again next time."""

    def chained(asked: Asked) -> bytes:
        response = asked.reply()
        names = [asked.name, *(f"n{each}.chain.example." for each in range(20))]
        if asked.name.startswith("circle"):
            names.append(asked.name)
        response.answer += [dns.rrset.from_text(a, 300, "IN", "CNAME", b) for a, b in pairwise(names)]
        if not asked.name.startswith("circle"):
            response.answer.append(dns.rrset.from_text(names[-1], 300, "IN", "A", *GOOD))
        return response.to_wire(max_size=65_535)

    with FakeServer(scene.servers, FIRST, chained) as server, responder(scene):
        for name, aliases, times in (("long.example.", 20, 1), ("circle.example.", 21, 2)):
            for _ in range(2):
                answer = scene.ask(name, tcp=True)
                assert (rcode(answer), len(texts(answer))) == ("NOERROR", 21)
                assert sum(rrset.rdtype == dns.rdatatype.CNAME for rrset in answer.answer) == aliases
            assert server.names().count(name) == times


@pytest.mark.parametrize("way", ["slow", "byte by byte", "truncated"])
def test_late_response_counts(scene: Scene, faulty: tuple[FakeServer, FakeServer, Responder], way: str) -> None:
    first, second, _ = faulty
    script = {"slow": slow, "byte by byte": truncated(byte_by_byte), "truncated": truncated(right)}[way]
    first.script = second.script = script
    assert texts(scene.ask(f"{way.replace(' ', '')}.late.example", port=FAULTY_PORT)) == GOOD


def test_server_without_listener(scene: Scene) -> None:
    """ICMP reports it at once: the next server is queried without delay."""
    with FakeServer(scene.servers, SECOND), responder(scene, servers=("10.2.0.8", SECOND)) as running:
        assert texts(scene.ask("icmp.example")) == GOOD
        assert running.metric("upstream_failures_total", server="10.2.0.8#53", reason="network") == 1
        assert texts(scene.ask("icmp2.example")) == GOOD  # the good one is queried first now
        assert running.metric("upstream_failures_total") == 1
    with responder(scene, servers=("10.2.0.8",)):
        assert rcode(scene.ask("icmp.example")) == "SERVFAIL"


def test_server_without_edns(scene: Scene) -> None:
    """FORMERR in twelve octets, as old servers send it: the query is repeated at once without OPT."""

    def old(asked: Asked) -> bytes:
        if asked.message.edns >= 0:
            return asked.data[:2] + b"\x80\x01" + bytes(8)
        return right(asked)

    with FakeServer(scene.servers, FIRST, old) as server, responder(scene):
        begun = time.monotonic()
        assert texts(scene.ask("old.example")) == GOOD
        assert time.monotonic() - begun < 2.5  # without waiting for a timeout
        assert server.names() == ["old.example.", "old.example."]


def test_error_without_question(scene: Scene) -> None:
    """It is an error, not a forgery: the next server is queried at once."""
    with (
        FakeServer(scene.servers, FIRST, lambda asked: asked.data[:2] + b"\x80\x05" + bytes(8)),
        FakeServer(scene.servers, SECOND),
        responder(scene, servers=(FIRST, SECOND)) as running,
    ):
        assert texts(scene.ask("refused.example")) == GOOD
        assert running.metric("upstream_mismatched_responses_total") == 0
        assert running.metric("upstream_failures_total", reason="refused") == 1


def test_no_such_host(scene: Scene) -> None:
    """No host has the address; the kernel reports that later."""
    with FakeServer(scene.servers, SECOND), responder(scene, servers=("10.2.0.200", SECOND)):
        assert texts(scene.ask("nohost.example")) == GOOD
    with responder(scene, servers=("10.2.0.200", "192.0.2.1")):  # the second has no route
        assert rcode(scene.ask("nohost.example")) == "SERVFAIL"


def test_upstream_over_ipv6(scene: Scene) -> None:
    with FakeServer(scene.servers, "fd02::2", truncated(right)), responder(scene, servers=("fd02::2",)):
        assert texts(scene.ask("six.example")) == GOOD


def test_source_address_and_interface(scene: Scene) -> None:
    """ADDRESS@SOURCE, ADDRESS@INTERFACE, and a link-local server."""
    scene.servers.ip("addr add fe80::53/64 dev eth0 nodad")
    with FakeServer(scene.servers, FIRST) as server:
        with responder(scene, servers=(f"{FIRST}@10.2.0.77",)):
            assert texts(scene.ask("source.example")) == GOOD
        with responder(scene, servers=(f"{FIRST}@eth1",)):
            assert texts(scene.ask("interface.example")) == GOOD
        with responder(scene, servers=(f"{FIRST}@eth0",)):
            assert rcode(scene.ask("wrong.example")) == "SERVFAIL"
        assert [each.peer[0] for each in server.asked] == ["10.2.0.77", "10.2.0.1"]
    with FakeServer(scene.servers, "fe80::53%eth0"), responder(scene, servers=("fe80::53%eth1",)):
        assert texts(scene.ask("local.example")) == GOOD


def test_address_of_this_host_is_replaced(scene: Scene) -> None:
    """Connected sockets have the old one as their source: DHCP, a moved VIP. The second address goes with the first."""
    with FakeServer(scene.servers, FIRST), responder(scene, "--cache-size=0"):
        for number in range(2 * POOL_SOCKETS):
            assert texts(scene.ask(f"a{number}.example")) == GOOD
        scene.node.ip("addr del 10.2.0.1/24 dev eth1", "addr add 10.2.0.78/24 dev eth1")
        try:
            for number in range(2 * POOL_SOCKETS):
                begun = time.monotonic()
                assert texts(scene.ask(f"b{number}.example")) == GOOD
                assert time.monotonic() - begun < 0.5
        finally:
            scene.node.ip(
                "addr del 10.2.0.78/24 dev eth1", "addr add 10.2.0.1/24 dev eth1", "addr add 10.2.0.77/24 dev eth1"
            )


def test_failover_and_back(scene: Scene) -> None:
    """The first server dies; later both respond again."""
    with FakeServer(scene.servers, SECOND) as second:
        with responder(scene, servers=(FIRST, SECOND)):
            with FakeServer(scene.servers, FIRST) as first:
                for number in range(5):
                    assert texts(scene.ask(f"a{number}.example")) == GOOD
                assert len(first.asked) == 5 and not second.asked
            for number in range(5):
                assert texts(scene.ask(f"b{number}.example")) == GOOD
            assert len(second.asked) == 5
        second.script = silent


# ---- coalescing, caching, TTLs ----


def test_same_query_of_many_clients(scene: Scene) -> None:
    go = threading.Event()

    def script(asked: Asked) -> bytes:
        go.wait(4)
        return right(asked)

    with FakeServer(scene.servers, FIRST, script) as server, responder(scene) as running:
        clients = [scene.client.socket() for _ in range(200)]
        for number, client in enumerate(clients):
            client.settimeout(ANSWER_SECONDS)
            client.connect((NODE, PORT))
            client.send(bare_query("same.example", number))
        wait_for(lambda: running.metric("coalesced_total") == 199, "all of them to wait")
        go.set()
        for number, client in enumerate(clients):
            answer = dns.message.from_wire(client.recv(1000))
            assert answer.id == number and texts(answer) == GOOD
            client.close()
        assert server.names().count("same.example.") <= 2  # a slow machine may cause one retry after a timeout
        assert running.metric("in_flight") == 0


def test_ttl_counts_down(scene: Scene) -> None:
    with FakeServer(scene.servers, FIRST) as server, responder(scene):
        first = scene.ask("ttl.example").answer[0].ttl
        assert first == 300
        wait_for(lambda: scene.ask("ttl.example").answer[0].ttl < 299, "the TTL to count down")
        assert len(server.asked) == 1


def test_negative_responses_are_cached(scene: Scene) -> None:
    soa = ("60 SOA ns. admin. 1 2 3 4 60",)
    script: Script = lambda asked: asked.answer(rcode=3, authority=soa)  # noqa: E731
    with FakeServer(scene.servers, FIRST, script) as server, responder(scene):
        for _ in range(3):
            answer = scene.ask("nx.example")
            assert rcode(answer) == "NXDOMAIN" and answer.authority[0].ttl <= 60
        assert len(server.asked) == 1


def test_servfail_is_cached_briefly(scene: Scene) -> None:
    with FakeServer(scene.servers, FIRST, code(2)) as server, responder(scene):
        assert rcode(scene.ask("fail.example")) == "SERVFAIL"
        asked = len(server.asked)
        assert rcode(scene.ask("fail.example")) == "SERVFAIL"
        assert len(server.asked) == asked
        server.script = right
        wait_for(lambda: texts(scene.ask("fail.example")) == GOOD, "it to be asked again")


def test_stale_responses(scene: Scene) -> None:
    short: Script = lambda asked: asked.answer("1 A 192.0.2.80")  # noqa: E731
    with FakeServer(scene.servers, FIRST, short) as server, responder(scene) as running:
        assert texts(scene.ask("stale.example")) == GOOD
        server.script = silent
        wait_for(lambda: scene.ask("stale.example").answer[0].ttl == 30, "it to expire")
        begun = time.monotonic()
        assert texts(scene.ask("stale.example")) == GOOD
        assert time.monotonic() - begun < 1.8  # served stale without another attempt
        assert running.metric("cache_served_stale_total") >= 1
        assert rcode(scene.ask("unknown.example")) == "SERVFAIL"
        server.script = lambda asked: asked.answer("1 A 192.0.2.99")
        wait_for(lambda: texts(scene.ask("stale.example")) == ["192.0.2.99"], "the server to be asked again")


def test_no_stale_responses_when_disabled(scene: Scene) -> None:
    short: Script = lambda asked: asked.answer("1 A 192.0.2.80")  # noqa: E731
    with FakeServer(scene.servers, FIRST, short) as server, responder(scene, "--use-stale-cache=off"):
        assert texts(scene.ask("stale.example")) == GOOD
        server.script = code(2)
        wait_for(lambda: rcode(scene.ask("stale.example")) == "SERVFAIL", "it to expire")


def test_forward_limit(scene: Scene) -> None:
    with FakeServer(scene.servers, FIRST, silent), responder(scene, "--dns-forward-max=20") as running:
        with connected(scene.client, NODE) as client:
            for number in range(50):
                client.send(bare_query(f"x{number}.example", number))
            answers = [dns.message.from_wire(client.recv(1000)) for _ in range(50)]
        assert sorted({rcode(each) for each in answers}) == ["REFUSED", "SERVFAIL"]
        assert [rcode(each) for each in answers[:30]] == ["REFUSED"] * 30
        assert running.metric("forward_rejects_total") == 30


def test_forward_limit_is_per_domain(scene: Scene) -> None:
    """A dead server uses up its own limit only."""
    limit = 20
    options = (f"--dns-forward-max={limit}", f"--server=/dead.example/{SECOND}", f"--server=/dying.example/{THIRD}")
    with (
        FakeServer(scene.servers, FIRST),
        FakeServer(scene.servers, SECOND, silent),
        FakeServer(scene.servers, THIRD, silent),
        responder(scene, *options) as running,
        connected(scene.client, NODE) as client,
    ):
        for number in range(2 * limit):
            client.send(bare_query(f"x{number}.dead.example", number))
        wait_for(lambda: running.metric("forward_rejects_total") == limit, "the dead server to have enough")
        assert texts(scene.ask("www.example")) == GOOD
        for number in range(3 * limit):  # one client that waits for one query
            client.send(bare_query("same.dying.example", number))
        wait_for(lambda: running.metric("coalesced_total") == 3 * limit - 1, "all of them to wait")
        assert texts(scene.ask("www2.example")) == GOOD
        wait_for(lambda: running.metric("in_flight") == 0, "them to be given up")
        assert running.metric("forward_rejects_total") == limit


def test_servers_of_domains(scene: Scene) -> None:
    with FakeServer(scene.servers, FIRST) as standard, FakeServer(scene.servers, SECOND) as corp:
        options = (f"--server=/corp.example/{SECOND}", "--local=/lan/", "--server=/free.corp.example/#")
        with responder(scene, *options):
            assert texts(scene.ask("a.corp.example")) == GOOD
            assert texts(scene.ask("corp.example")) == GOOD
            assert texts(scene.ask("a.notcorp.example")) == GOOD
            assert texts(scene.ask("a.free.corp.example")) == GOOD
            assert rcode(scene.ask("printer.lan")) == "NXDOMAIN"
        assert sorted(corp.names()) == ["a.corp.example.", "corp.example."]
        assert sorted(standard.names()) == ["a.free.corp.example.", "a.notcorp.example."]


# ---- forged responses ----


def test_ports_and_ids_are_random(scene: Scene) -> None:
    """A new port for each query until POOL_SOCKETS are open, then a random one of them; none for long."""
    with FakeServer(scene.servers, FIRST) as server, responder(scene, "--cache-size=0"):
        with connected(scene.client, NODE) as client:
            for number in range(12_000):
                client.send(bare_query(f"port{number}.example", number))
                client.recv(1000)
        ports = [asked.peer[1] for asked in server.asked]
        ids = [asked.id for asked in server.asked]
        assert len(ports) >= 12_000
        assert len(set(ports[:POOL_SOCKETS])) == POOL_SOCKETS
        assert max(Counter(ports[:5_000]).values()) <= 2 * SOCKET_QUERIES  # the same port may come twice
        assert len(set(ports)) > 1.4 * POOL_SOCKETS  # renewed
        assert 10_500 < len(set(ids)) < 11_400  # as many as of 12,000 random ones: 10,969
        steps = [abs(one - other) for one, other in pairwise(ports)]
        assert sum(step <= 2 for step in steps) < 300  # not one after the other


def test_forged_responses(scene: Scene) -> None:
    """65,535 wrong ids and one wrong question from the server's own address and port, before the real response."""
    done = threading.Event()

    def script(asked: Asked) -> bytes | None:
        if asked.tcp:
            return right(asked)
        if not done.is_set():
            done.set()
            forged = bytearray(asked.answer("300 A 203.0.113.66"))
            for ident in range(0x1_0000):
                if ident != asked.id:
                    forged[:2] = struct.pack("!H", ident)
                    asked.link.sendto(forged, asked.peer)
            asked.link.sendto(other_question(asked), asked.peer)
        return right(asked)

    with FakeServer(scene.servers, FIRST, script), responder(scene) as running:
        assert texts(scene.ask("forged.example")) == GOOD
        assert running.metric("upstream_mismatched_responses_total") >= 20
        assert texts(scene.ask("forged.example")) == GOOD  # nothing else was cached


def test_forged_responses_from_other_addresses(scene: Scene) -> None:
    """From another port or address: the kernel does not deliver them."""

    def script(asked: Asked) -> bytes:
        for _ in range(50):
            other_port(asked)
            other_address(asked)
        return right(asked)

    with FakeServer(scene.servers, FIRST, script), responder(scene) as running:
        assert texts(scene.ask("elsewhere.example")) == GOOD
        assert running.metric("upstream_mismatched_responses_total") == 0


# ---- bounds ----


def flood(scene: Scene, count: int, window: int = 400) -> int:
    """So many random names, ``window`` under way at a time; how many were answered."""
    answered = 0
    with connected(scene.client, NODE) as client:
        client.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        client.settimeout(1.0)
        for first in range(0, count, window):
            for number in range(first, min(first + window, count)):
                client.send(bare_query(f"{number:x}-flood.example", number & 0xFFFF))
            with contextlib.suppress(TimeoutError):
                for _ in range(min(window, count - first)):
                    client.recv(2000)
                    answered += 1
    return answered


def test_no_descriptor_or_memory_leaks(scene: Scene) -> None:
    """After 2,000 forwarded queries and 500 TCP connections, no descriptor is left open."""
    with FakeServer(scene.servers, FIRST), responder(scene, "--cache-size=0") as running:
        scene.ask("warm.example")
        before = running.descriptors()
        assert flood(scene, 2_000, window=100) > 1_900
        for number in range(500):
            with connected(scene.client, NODE, socket.SOCK_STREAM) as link:
                if number % 2:
                    send_message(link, bare_query("tcp.example", number))
                    assert receive_message(link)
        wait_for(lambda: running.descriptors() <= before, "the descriptors to be closed")
        assert running.metric("tcp_connections") == 0
        assert running.metric("in_flight") == 0


def test_memory_under_a_flood(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """100,000 random names get NXDOMAIN; an existing name stays in the cache."""

    def script(asked: Asked) -> bytes:
        if b"flood" not in asked.data:
            return right(asked)
        body = asked.data[12 : 12 + asked.data[12:].index(b"\0") + 5]
        record = b"\xc0\x0c" + struct.pack("!HHIH", 6, 1, 60, 22) + b"\0\0" + struct.pack("!IIIII", 1, 2, 3, 4, 60)
        return asked.data[:2] + struct.pack("!HHHHH", 0x8183, 1, 0, 1, 0) + body + record

    with FakeServer(scene.servers, FIRST, script) as server, responder(scene) as running:
        for _ in range(3):
            assert texts(scene.ask("good.example")) == GOOD
        before = running.resident_kib()
        answered = flood(scene, FLOOD)
        after = running.resident_kib()
        assert texts(scene.ask("good.example")) == GOOD
        assert server.names().count("good.example.") == 1
        assert running.metric("cache_entries") <= 10_000
        with capsys.disabled():
            print(f" [{FLOOD} names, {answered} answered: {before >> 10} MB before, {after >> 10} MB after]", end="")
        assert after < 100 << 10


def test_memory_when_upstream_is_dead(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """A fast client and a silent server: queries above the limits are refused or dropped, not kept."""
    with FakeServer(scene.servers, FIRST, silent), responder(scene) as running, connected(scene.client, NODE) as client:
        before = running.resident_kib()
        client.settimeout(0)
        for number in range(FLOOD):
            with contextlib.suppress(BlockingIOError):
                client.send(bare_query(f"{number:x}-dead.example", number & 0xFFFF))
        wait_for(lambda: running.metric("in_flight") == 0, "it to end")
        after = running.resident_kib()
        with capsys.disabled():
            print(f" [dead upstream: {before >> 10} MB before, {after >> 10} MB after]", end="")
        assert after < 100 << 10
        assert running.metric("forward_rejects_total") > 0


def test_few_descriptors(scene: Scene) -> None:
    """Fewer descriptors than queries: some fail, but it recovers."""
    wrapper = ("prlimit", "--nofile=40:40")
    options = [f"--server={FIRST}", "--cache-size=0"]
    with FakeServer(scene.servers, FIRST) as server, Responder(scene.node, *options, wrapper=wrapper) as running:
        server.script = silent
        with connected(scene.client, NODE) as client:
            for number in range(100):
                client.send(bare_query(f"few{number}.example", number))
            answers = [dns.message.from_wire(client.recv(1000)) for _ in range(100)]
        assert {rcode(each) for each in answers} == {"SERVFAIL"}
        server.script = right
        wait_for(lambda: texts(scene.ask("after.example")) == GOOD, "it to work again")
        assert texts(scene.ask("after2.example", tcp=True)) == GOOD
        del running


# ---- resolv file ----


def test_resolv_file(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    with FakeServer(scene.servers, FIRST) as first, FakeServer(scene.servers, SECOND) as second:
        write(file, "search example", "nameserver 10.2.0.2", "nameserver nonsense")
        with Responder(scene.node, f"--resolv-file={file}") as running:
            assert running.has_logged("ignoring nameserver 'nonsense'")
            assert texts(scene.ask("one.example")) == GOOD and len(first.asked) == 1
            write(file, "nameserver 10.2.0.3")
            wait_for(lambda: running.has_logged("upstream servers: 10.2.0.3#53"), "the new server")
            assert texts(scene.ask("two.example")) == GOOD
            assert second.names() == ["two.example."] and len(first.asked) == 1
            file.unlink()
            wait_for(lambda: running.has_logged("the upstream servers stay as they are"), "its absence to be noticed")
            assert texts(scene.ask("three.example")) == GOOD
            os.mkfifo(file)  # opening it must not block
            wait_for(lambda: running.has_logged(f"cannot read {file}: not a regular file"), "the FIFO to be noticed")
            assert texts(scene.ask("four.example")) == GOOD and len(second.asked) == 3
            file.unlink()
            write(file, "# nobody")
            wait_for(lambda: running.has_logged("upstream servers: none"), "no server")
            assert rcode(scene.ask("five.example")) == "REFUSED"
            write(file, "nameserver 10.2.0.2")
            wait_for(lambda: rcode(scene.ask("six.example")) == "NOERROR", "the file to be back")


def test_temporarily_unreadable_files(scene: Scene, tmp_path: Path) -> None:
    """No descriptor is free when the files change, and they do not change again."""
    resolv, hosts = tmp_path / "resolv.conf", tmp_path / "hosts"
    write(resolv, "nameserver 10.2.0.2")
    write(hosts, "10.0.0.1 a.test")
    with FakeServer(scene.servers, FIRST), FakeServer(scene.servers, SECOND) as second:
        with Responder(scene.node, f"--resolv-file={resolv}", f"--addn-hosts={hosts}") as running:
            pid = running.process.pid
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (running.descriptors() // 2, hard))
            write(resolv, "nameserver 10.2.0.3")
            write(hosts, "10.0.0.2 a.test")
            for file in (resolv, hosts):
                said = f"cannot read {file}: Too many open files"
                wait_for(lambda said=said: running.has_logged(said), f"{file.name} not to be read")
            assert texts(scene.ask("a.test")) == ["10.0.0.1"]
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert texts(scene.ask("one.example")) == GOOD and not second.asked
            wait_for(lambda: running.has_logged("upstream servers: 10.2.0.3#53"), "the new server")
            wait_for(lambda: texts(scene.ask("a.test")) == ["10.0.0.2"], "the new name")
            assert texts(scene.ask("two.example")) == GOOD and second.asked


def test_resolv_file_without_poll(scene: Scene, tmp_path: Path) -> None:
    file = write(tmp_path / "resolv.conf", "nameserver 10.2.0.2")
    hosts = write(tmp_path / "hosts", "10.0.0.1 a.test")
    with FakeServer(scene.servers, FIRST), FakeServer(scene.servers, SECOND) as second:
        options = (f"--resolv-file={file}", "--no-poll", f"--addn-hosts={hosts}")
        with Responder(scene.node, *options) as running:
            write(file, "nameserver 10.2.0.3")
            write(hosts, "10.0.0.2 a.test")  # this file is watched: once it is read, the other would be read, too
            wait_for(lambda: texts(scene.ask("a.test")) == ["10.0.0.2"], "the hosts file")
            assert texts(scene.ask("one.example")) == GOOD and not second.asked
            running.reload()
            assert texts(scene.ask("two.example")) == GOOD and len(second.asked) == 1


def test_asyncio_debug_mode_reports_nothing(scene: Scene) -> None:
    wrapper = environment(PYTHONASYNCIODEBUG="1", PYTHONWARNINGS="error")
    with FakeServer(scene.servers, FIRST, truncated(right)):
        with Responder(scene.node, f"--server={FIRST}", wrapper=wrapper) as running:
            for number in range(20):
                assert texts(scene.ask(f"debug{number}.example", tcp=bool(number % 2))) == GOOD
            running.reload()
            assert running.stop() == 0
            text = "\n".join(running.log)
            assert "Warning" not in text and "Error" not in text and "exception" not in text, text
            running.process.poll = lambda: None  # type: ignore[method-assign]
