"""Which queries each combination of listening options serves, beside dnsmasq.

An address does not filter: Linux accepts a packet for any of its addresses on any interface, so a WAN host can send to
an address of the LAN or of lo (CVE-2012-3411).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import dns.exception
import pytest
from dns_server import PORT, Responder, ask, needs, rcode, texts
from waiting import wait_for

from udpwatch.agent.testing.child import COMMAND
from udpwatch.agent.testing.lab import Lab, Namespace

LAN, WAN, ON_LO = {"10.1.0.1", "fd01::1"}, {"10.2.0.1", "fd02::1"}, {"10.98.0.1", "fd98::1"}
LOOPBACK = {"127.0.0.1", "::1"}
EVERY = LAN | WAN | ON_LO
EVERY_4 = {address for address in EVERY if "." in address}
EVERY_6 = EVERY - EVERY_4
LISTEN_ON_LO, LISTEN_ON_WAN = (f"--listen-address={','.join(sorted(each))}" for each in (ON_LO, WAN))
SECONDS = 1.5  # without a response by then, a query is not served


@dataclass(frozen=True)
class Case:
    """Options, and the addresses at which they serve each host. ``node``: also from itself."""

    options: tuple[str, ...]
    lan: set[str]
    wan: set[str]
    pod: set[str]  # behind an interface without an address; IPv4
    node: set[str]
    same: bool = True  # in dnsmasq, over UDP


BY_LAN = EVERY, set[str](), set[str](), LAN | ON_LO | LOOPBACK
BOUND = LAN | ON_LO, set[str](), set[str](), LAN | ON_LO | LOOPBACK
CASES = [
    Case(("--interface=lan0",), *BY_LAN),
    Case(("--interface=lan*", "--interface=nosuch0"), *BY_LAN),
    Case(("--except-interface=wan*",), EVERY, set(), EVERY_4, LAN | ON_LO | LOOPBACK),
    Case(("--interface=lan0", "--except-interface=lo"), EVERY, set(), set(), LAN),
    Case(("--interface=pod*",), set(), set(), EVERY_4, ON_LO | LOOPBACK),
    Case(("--interface=lan0", LISTEN_ON_LO), EVERY, ON_LO, ON_LO & EVERY_4, LAN | ON_LO | LOOPBACK),
    Case(("--except-interface=wan0", LISTEN_ON_WAN), WAN, WAN, WAN & EVERY_4, WAN),
    Case((LISTEN_ON_WAN,), WAN, WAN, WAN & EVERY_4, WAN),
    Case(("--interface=lan0", "--bind-dynamic"), *BOUND),
    Case(("--interface=lan0", "--except-interface=lo", "--bind-dynamic"), LAN, set(), set(), LAN),
    # dnsmasq's --bind-interfaces does not look at the interface (CVE-2012-3411).
    Case(("--interface=lan0", "--bind-interfaces"), *BOUND, same=False),
    # There a response of dnsmasq may come from another address than the one that was asked.
    *(
        Case(("--bind-interfaces", f"--listen-address={text}", *more), *where, same=False)
        for text, where, more in (
            ("0.0.0.0", (EVERY_4, EVERY_4, EVERY_4, EVERY_4 | {"127.0.0.1"}), ()),
            ("::", (EVERY_6, EVERY_6, set(), EVERY_6 | {"::1"}), ()),
            ("0.0.0.0,::", (EVERY, EVERY, EVERY_4, EVERY | LOOPBACK), ()),
            ("0.0.0.0,fd01::1", (EVERY_4 | {"fd01::1"},) * 2 + (EVERY_4, EVERY_4 | {"fd01::1", "127.0.0.1"}), ()),
            ("0.0.0.0", (EVERY_4, EVERY_4, EVERY_4, EVERY_4 | {"127.0.0.1"}), ("--except-interface=wan0",)),
        )
    ),
    # dnsmasq compares 0.0.0.0 with the address that was asked.
    Case(("--interface=lan0", "--listen-address=0.0.0.0"), *BY_LAN),
    Case(("--listen-address=0.0.0.0,::,10.1.0.1",), *({"10.1.0.1"},) * 4),
]


@dataclass(frozen=True)
class Border:
    """A node between a LAN and a WAN, with a pod; all can reach all of its addresses."""

    node: Namespace
    lan: Namespace
    wan: Namespace
    pod: Namespace


@pytest.fixture(scope="module")
def border() -> Iterator[Border]:
    with Lab() as built:
        it = Border(*(built.namespace(name) for name in ("node", "lan", "wan", "pod")))
        it.node.ip("addr add 10.98.0.1/32 dev lo", "addr add fd98::1/128 dev lo nodad")
        for number, (name, host) in enumerate((("lan0", it.lan), ("wan0", it.wan)), start=1):
            built.link(it.node, name, host, "eth0")
            for end, place, interface in ((1, it.node, name), (2, host, "eth0")):
                place.ip(
                    f"addr add 10.{number}.0.{end}/24 dev {interface}",
                    f"addr add fd0{number}::{end}/64 dev {interface} nodad",
                )
            host.ip(f"route add default via 10.{number}.0.1", f"route add ::/0 via fd0{number}::1")
        built.link(it.node, "pod0", it.pod, "eth0")  # as Calico does
        it.node.ip("route add 10.3.0.2 dev pod0")
        hardware = it.node.run(["ip", "-o", "link", "show", "pod0"]).split("link/ether ")[1].split()[0]
        it.pod.ip(
            "addr add 10.3.0.2/32 dev eth0",
            "route add 169.254.1.1 dev eth0 scope link",
            f"neigh add 169.254.1.1 lladdr {hardware} dev eth0",
            "route add default via 169.254.1.1 dev eth0",
        )
        yield it


def answers(namespace: Namespace, address: str, tcp: bool = False, seconds: float = SECONDS) -> bool:
    """Whether a query to this address gets a response."""
    try:
        return texts(ask(namespace, address, "host.test", tcp=tcp, seconds=seconds)) == ["10.0.0.1"]
    except (TimeoutError, dns.exception.DNSException):  # an end of TCP without a word
        return False
    except OSError as error:
        assert error.errno in (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH), error
        return False


def served(border: Border, tcp: bool) -> tuple[set[str], ...]:
    """The addresses at which the node's server answers the LAN, the WAN, the pod and the node."""
    asked = [
        *((place, address) for place in (border.lan, border.wan) for address in EVERY),
        *((border.pod, address) for address in EVERY_4),
        *((border.node, address) for address in EVERY | LOOPBACK),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda each: answers(*each, tcp=tcp), asked))
    return tuple(
        {address for (of, address), answered in zip(asked, found, strict=True) if of is place and answered}
        for place in (border.lan, border.wan, border.pod, border.node)
    )


@contextlib.contextmanager
def dnsmasq(node: Namespace, *options: str) -> Iterator[None]:
    """A dnsmasq that may answer nowhere."""
    needs("dnsmasq", "dnsmasq-base")
    words = ["--keep-in-foreground", "--no-hosts", "--no-resolv", "--conf-file=/dev/null", "--pid-file"]
    process = node.popen(["dnsmasq", *words, "--log-facility=-", "--host-record=host.test,10.0.0.1", *options])
    try:
        assert process.stderr
        for line in process.stderr:
            if b"read " in line or b"cleared cache" in line or b"started" in line:
                break
        wait_for(lambda: process.poll() is not None or _listens(node), "dnsmasq")
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def _listens(node: Namespace) -> bool:
    return ":53" in node.run(["ss", "-Hlntu"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.options))
def test_queries_are_filtered_by_options(border: Border, case: Case) -> None:
    expected = case.lan, case.wan, case.pod, case.node
    with Responder(border.node, "--host-record=host.test,10.0.0.1", *case.options) as responder:
        for _ in range(2):  # the second time from what is remembered
            for tcp in (False, True):
                assert served(border, tcp) == expected, tcp
        if any("interface=lan0" in each for each in case.options):
            assert responder.has_logged("ignoring query on interface wan0") == (case.wan != case.lan)


@pytest.mark.parametrize("case", [case for case in CASES if case.same], ids=lambda case: " ".join(case.options))
def test_dnsmasq_serves_the_same(border: Border, case: Case) -> None:
    with dnsmasq(border.node, *case.options):
        assert served(border, tcp=False) == (case.lan, case.wan, case.pod, case.node)


@pytest.mark.parametrize(
    "options",
    [
        ("--listen-address=0.0.0.0",),
        ("--listen-address=::",),
        ("--listen-address=0.0.0.0", "--bind-dynamic"),
        ("--listen-address=::", "--except-interface=wan0"),
    ],
    ids=" ".join,
)
def test_options_that_serve_nothing_are_refused(border: Border, options: tuple[str, ...]) -> None:
    with dnsmasq(border.node, *options):
        assert served(border, tcp=False) == (set(),) * 4
    responder = Responder(border.node, *options, ready=False)
    assert responder.process.wait(60) == 1
    responder.stop()
    assert "no query matches it without --bind-interfaces" in responder.log[-1]


@pytest.mark.parametrize("more", ["--listen-address=10.1.0.1", "--interface=lan0"])
def test_address_beside_every_address_is_refused(border: Border, more: str) -> None:
    """dnsmasq cannot bind both."""
    options = ("--bind-interfaces", "--listen-address=0.0.0.0", more)
    needs("dnsmasq", "dnsmasq-base")
    process = border.node.popen(["dnsmasq", "-k", "-C/dev/null", "--pid-file", "--log-facility=-", *options])
    try:
        assert b"Address already in use" in process.communicate(timeout=60)[1]
    finally:
        process.kill()
    responder = Responder(border.node, *options, ready=False)
    assert responder.process.wait(60) == 1
    responder.stop()
    assert (
        f"--listen-address=0.0.0.0: includes every IPv4 address, which dnsmasq cannot bind twice; remove it or {more}"
        in (responder.log[-1])
    )


@pytest.mark.parametrize("taken", ["127.0.0.53", "10.2.0.1"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda case: " ".join(case.options))
def test_another_program_uses_an_address(border: Border, case: Case, taken: str) -> None:
    """The wildcard address cannot be bound beside systemd-resolved; each other address gets a socket."""
    with border.node.socket() as other:
        other.bind((taken, PORT))
        with Responder(border.node, "--host-record=host.test,10.0.0.1", *case.options) as responder:
            assert responder.has_logged(
                "another program uses port 53 on an address of this host; listening on each other"
            )
            expected = tuple(each - {taken} for each in (case.lan, case.wan, case.pod, case.node))
            for tcp in (False, True):
                assert served(border, tcp) == expected, tcp
            border.node.ip("addr add 10.98.0.7/32 dev lo")
            try:
                asker = border.lan if case.lan else border.pod
                wait_for(lambda: answers(asker, "10.98.0.7", seconds=0.5), "the new address")
                assert not answers(border.wan, "10.98.0.7")
            finally:
                border.node.ip("addr del 10.98.0.7/32 dev lo")


def test_address_of_an_unserved_interface_is_our_own(border: Border) -> None:
    """The wildcard socket gets such a query, and ignores it: it must not be sent."""
    with Responder(border.node, "--interface=lan0", "--server=10.2.0.1") as responder:
        assert responder.has_logged("ignoring nameserver 10.2.0.1#53: it is this responder itself")
        assert rcode(ask(border.lan, "10.1.0.1", "www.example")) == "REFUSED"
    with Responder(border.node, "--interface=lan0", "--bind-dynamic", "--server=10.2.0.1") as responder:
        assert not responder.has_logged("ignoring nameserver")


def test_filter_follows_a_renamed_interface(border: Border) -> None:
    """A renamed interface is checked again."""
    node, lan = border.node, border.lan
    with Responder(node, "--host-record=host.test,10.0.0.1", "--interface=lan*"):
        assert answers(lan, "10.98.0.1") and answers(lan, "10.98.0.1", tcp=True)
        node.ip("link set lan0 down", "link set lan0 name old0", "link set old0 up")
        try:
            wait_for(lambda: not answers(lan, "10.98.0.1", seconds=0.5), "old0 to be served no more")
            assert not answers(lan, "10.98.0.1", tcp=True)
        finally:
            node.ip("link set old0 down", "link set old0 name lan0", "link set lan0 up")
        wait_for(lambda: answers(lan, "10.98.0.1", seconds=0.5), "lan0 to be served")
        assert answers(lan, "10.98.0.1", tcp=True)
        node.ip("addr replace fd01::1/64 dev lan0 nodad")  # a link that goes down loses these


# ---- what does not listen yet ----

MISSING = {
    "--listen-address=127.0.0.7,10.1.0.1": [],
    "--listen-address=10.9.9.9": ["10.9.9.9 is not an address of this host yet; listening on it when it appears"],
    "--interface=lan0,nosuch*": ["interface nosuch* does not exist yet; serving it when it appears"],
    "--interface=nosuch0 --bind-dynamic": ["interface nosuch0 has no address yet; listening on it when it has one"],
    "--interface=lo --listen-address=0.0.0.0": [
        "--listen-address=0.0.0.0 has no effect without --bind-interfaces, as in dnsmasq"
    ],
}


@pytest.mark.parametrize("options", MISSING)
def test_missing_addresses_are_warnings(border: Border, options: str) -> None:
    command = [*COMMAND, "dns", "--test", *options.split()]
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=border.node.enter_in_child, check=True)
    assert found.stdout == "syntax check OK.\n"
    assert found.stderr.splitlines() == [f"udpwatch: warning: {line}" for line in MISSING[options]]
    with Responder(border.node, *options.split()) as responder:
        assert responder.get("/readyz") == (
            200,
            "".join(f"{line}\n" for line in ("ready", *(f"warning: {line}" for line in MISSING[options]))),
        )
        assert all(responder.has_logged(line) for line in MISSING[options])


def test_address_that_another_program_uses_is_a_warning(border: Border) -> None:
    """It was missing at the start; in use there, it would be an error."""
    problem = "cannot listen on 10.98.0.9 port 53: Address already in use; stop the other program"
    with contextlib.ExitStack() as stack:
        responder = stack.enter_context(Responder(border.node, "--listen-address=10.98.0.9,127.0.0.1"))
        with border.node.socket() as other:
            other.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND
            other.bind(("10.98.0.9", PORT))
            border.node.ip("addr add 10.98.0.9/32 dev lo")
            stack.callback(border.node.ip, "addr del 10.98.0.9/32 dev lo")
            wait_for(lambda: f"warning: {problem}" in responder.get("/readyz")[1], "the warning")
        wait_for(lambda: responder.get("/readyz") == (200, "ready\n"), "it to be bound")
        assert rcode(ask(border.lan, "10.98.0.9", "www.example")) == "REFUSED"


def test_warning_ends_when_the_address_appears(border: Border) -> None:
    with Responder(border.node, "--listen-address=10.98.0.9,127.0.0.1") as responder:
        assert "10.98.0.9 is not an address" in responder.get("/readyz")[1]
        border.node.ip("addr add 10.98.0.9/32 dev lo")
        try:
            wait_for(lambda: responder.get("/readyz") == (200, "ready\n"), "the warning to end")
            assert rcode(ask(border.lan, "10.98.0.9", "www.example")) == "REFUSED"
        finally:
            border.node.ip("addr del 10.98.0.9/32 dev lo")
        wait_for(lambda: "warning" in responder.get("/readyz")[1], "the warning to return")
