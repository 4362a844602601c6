"""Options that change upstream responses, beside dnsmasq with the same options and the same upstream server."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import dns.flags
import dns.message
import dns.rrset
import pytest
from dns_server import ANSWER_SECONDS, Asked, FakeServer, Responder, ask, connected, needs, rcode, right, texts
from dnsmasq import dnsmasq

from udpwatch.agent.testing.lab import Lab, Namespace
from udpwatch.dns.resolution import FAILS_SECONDS, POOR_AFTER

UPSTREAM, PORT, REVERSE_PORT = "127.0.0.99", 5300, 5301
OPTIONS = (
    *(f"--server={UPSTREAM}#{PORT}", f"--rev-server=10.7.0.0/16,{UPSTREAM}#{REVERSE_PORT}", "--filter-AAAA"),
    *("--bogus-nxdomain=64.94.110.0/24", "--ignore-address=203.0.113.0/24", "--filter-rr=TXT", "--proxy-dnssec"),
    *("--min-cache-ttl=30", "--max-cache-ttl=60", "--dhcp-leasefile=/nowhere/leases", "--log-dhcp"),
    *("--alias=198.51.100.0,10.9.0.0,255.255.255.0", "--alias=203.0.114.4-203.0.114.6,10.8.0.0,255.255.255.0"),
    *("--alias=192.0.2.7,64.94.110.9", "--filterwin2k", "--srv-host=_own._tcp.example,here.example,1"),
)


#: label: addresses
ADDRESSES = {
    "bogus": ["64.94.110.11"],
    "doctored": ["198.51.100.7", "203.0.114.5", "203.0.114.3"],
    "turned": ["192.0.2.7"],  # by --alias into an address of --bogus-nxdomain
}


def upstream(asked: Asked) -> bytes | list[bytes]:
    """Respond as the first label of the name says."""
    label, kind = asked.name.split(".")[0], asked.type
    if label == "forged":
        return [asked.answer("300 A 203.0.113.9"), asked.answer("300 A 192.0.2.80")]
    if label == "alias":
        reply = asked.reply("300 CNAME target.example.")
        data = {"A": "192.0.2.80", "AAAA": "2001:db8::80", "TXT": "x"}[kind]
        reply.answer.append(dns.rrset.from_text("target.example.", 300, "IN", kind, data))
        return reply.to_wire()
    if label in ADDRESSES:
        return asked.answer(*(f"300 A {address}" for address in ADDRESSES[label]))
    if label == "signed":
        reply = asked.reply("300 A 192.0.2.80")
        reply.flags |= dns.flags.AD
        return reply.to_wire()
    ttl = {"short": 1, "long": 1000}.get(label, 300)
    data = {"A": "192.0.2.80", "AAAA": "2001:db8::80", "TXT": "x", "MX": "1 mail.example."}.get(kind)
    return asked.answer(f"{ttl} {kind} {data}") if data else asked.answer(rcode=3)


def reverse(asked: Asked) -> bytes:
    """The server of a reverse zone."""
    return asked.answer("300 PTR host.example.")


def failing(asked: Asked) -> bytes:
    """A server that always fails."""
    return asked.answer(rcode=2)


def silent(_: Asked) -> None:
    """A server that never responds."""


@contextlib.contextmanager
def upstream_servers(node: Namespace) -> Iterator[None]:
    with FakeServer(node, UPSTREAM, upstream, PORT), FakeServer(node, UPSTREAM, reverse, REVERSE_PORT):
        yield


@pytest.fixture(scope="module")
def ours() -> Iterator[Namespace]:
    with Lab() as built:
        node = built.namespace("ours")
        with upstream_servers(node), Responder(node, *OPTIONS):
            yield node


@pytest.fixture(scope="module")
def theirs() -> Iterator[Namespace]:
    with Lab() as built:
        node = built.namespace("theirs")
        with upstream_servers(node), dnsmasq(node, *OPTIONS):
            yield node


@pytest.mark.parametrize(
    ("name", "kind", "code", "answer"),
    [
        ("plain.example", "A", "NOERROR", ["192.0.2.80"]),
        ("plain.example", "MX", "NOERROR", ["1 mail.example."]),
        ("plain.example", "AAAA", "NOERROR", []),
        ("plain.example", "TXT", "NOERROR", []),
        ("alias.example", "A", "NOERROR", ["192.0.2.80", "target.example."]),
        ("alias.example", "AAAA", "NOERROR", ["target.example."]),
        ("bogus.example", "A", "NXDOMAIN", []),
        ("forged.example", "A", "NOERROR", ["192.0.2.80"]),
        ("doctored.example", "A", "NOERROR", ["10.8.0.5", "10.9.0.7", "203.0.114.3"]),
        ("turned.example", "A", "NXDOMAIN", []),
        ("plain.example", "SOA", "NOERROR", []),
        ("_ldap._tcp.example", "SRV", "NOERROR", []),
        ("_own._tcp.example", "SRV", "NOERROR", ["0 0 1 here.example."]),
        ("under_score.example", "ANY", "NOERROR", []),
        ("other.example", "ANY", "NXDOMAIN", []),
        ("1.2.7.10.in-addr.arpa", "PTR", "NOERROR", ["host.example."]),
        ("1.2.8.10.in-addr.arpa", "PTR", "NXDOMAIN", []),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["forwarded", "cached"])
def test_changed_responses_are_those_of_dnsmasq(
    ours: Namespace, theirs: Namespace, name: str, kind: str, code: str, answer: list[str], again: bool
) -> None:
    for node in (ours, theirs):
        response = ask(node, "127.0.0.1", name, kind)
        assert (rcode(response), texts(response)) == (code, answer), (node.name, again)


@pytest.mark.parametrize(("name", "low", "high"), [("short.example", 2, 30), ("long.example", 31, 60)])
def test_cached_ttls_have_the_limits_of_dnsmasq(
    ours: Namespace, theirs: Namespace, name: str, low: int, high: int
) -> None:
    for node in (ours, theirs):
        ask(node, "127.0.0.1", name)
        assert low <= ask(node, "127.0.0.1", name).answer[0].ttl <= high


@pytest.mark.parametrize(("option", "most"), [("--strict-order", 20), ("--all-servers", 20), ("", POOR_AFTER + 2)])
def test_servers_are_chosen_as_by_dnsmasq(option: str, most: int) -> None:
    """The first server always fails; without an option it is only probed after a while. There dnsmasq is not compared:
    it asks all servers now and then, and forwards a failure that comes first. Beside all others it is silent for that
    reason.
    """
    needs("dnsmasq", "dnsmasq-base")
    script = silent if option == "--all-servers" else failing
    words = [f"--server={UPSTREAM}#{each}" for each in (PORT, REVERSE_PORT)] + [option]
    for theirs in (False, True) if option else (False,):
        with Lab() as built:
            node = built.namespace("node")
            with FakeServer(node, UPSTREAM, script, PORT) as first, FakeServer(node, UPSTREAM, right, REVERSE_PORT):
                with dnsmasq(node, *words) if theirs else Responder(node, *words):
                    before = len(first.asked)
                    for number in range(20):
                        if number == POOR_AFTER and not option:
                            time.sleep(FAILS_SECONDS)
                        assert texts(ask(node, "127.0.0.1", f"n{number}.example")) == ["192.0.2.80"]
                    asked = len(set(first.names()[before:]))
                    assert (asked == most) if option else (POOR_AFTER <= asked <= most), (theirs, first.names())


def test_ad_is_passed_on_as_by_dnsmasq(ours: Namespace, theirs: Namespace) -> None:
    for node in (ours, theirs):
        query = dns.message.make_query("signed.example", "A")
        query.flags |= dns.flags.AD
        with connected(node, "127.0.0.1", socket.SOCK_DGRAM) as link:
            link.settimeout(ANSWER_SECONDS)
            link.send(query.to_wire())
            response = dns.message.from_wire(link.recv(65_535))
        assert query.is_response(response)
        assert response.flags & dns.flags.AD
        assert not ask(node, "127.0.0.1", "plain.example").flags & dns.flags.AD
